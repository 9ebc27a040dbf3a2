"""Measures what a newcomer waits for: a clean clone of the repository, an empty target directory, and
`cargo demo` until the first response and until its end.

    python first_run.py [PROFILE]

`PROFILE` is `demo`, that of `cargo demo`, unless another one is given.
The crates are downloaded before, by `cargo fetch`, whose time is a line of its own: it depends on the network, and is
short when cargo has the crates in its cache.
"""

import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The line of the first response. It is preceded by the address of the demo.
FIRST_RESPONSE = re.compile(r"request +1/\d+ +200")
TIMEOUT_SECONDS = 1800


def timed(*command, **options):
    started = time.monotonic()
    subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS, **options)
    return time.monotonic() - started


def run_demo(clone, profile):
    """Returns the times from the start of cargo to the end of the build, to the first response, and to the end."""
    started = time.monotonic()
    command = ["cargo", "run", "--locked", "--profile", profile, "--", "demo"]
    demo = subprocess.Popen(command, cwd=clone, env=environment(clone), stdout=subprocess.PIPE, text=True)
    first_line = first_response = None
    for line in demo.stdout:
        first_line = first_line or time.monotonic() - started
        if first_response is None and FIRST_RESPONSE.search(line):
            first_response = time.monotonic() - started
    if demo.wait(timeout=TIMEOUT_SECONDS) != 0 or first_response is None:
        sys.exit("the demo failed")
    return first_line, first_response, time.monotonic() - started


def processor_seconds():
    """The processor time of all programs that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def environment(clone):
    return {name: value for name, value in os.environ.items() if name != "CARGO_TARGET_DIR"} | {"LC_ALL": "C"}


def main():
    profile = sys.argv[1] if len(sys.argv) > 1 else "demo"
    with tempfile.TemporaryDirectory() as folder:
        clone = pathlib.Path(folder, "keychoir")
        cloned = timed("git", "clone", "--quiet", ROOT, clone)
        fetched = timed("cargo", "fetch", "--locked", "--quiet", cwd=clone, env=environment(clone))
        before = processor_seconds()
        built, answered, ended = run_demo(clone, profile)
        used = processor_seconds() - before
        size = sum(file.stat().st_size for file in clone.glob("target/*/keychoir")) / 1e6
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print(f"profile {profile}, {cores} cores, load {load:.1f} at the end, program of {size:.1f} MB")
    for name, seconds in (("clone", cloned), ("download of the crates", fetched), ("build", built)):
        print(f"{seconds:7.1f} s  {name}")
    print(f"{answered:7.1f} s  from the start of cargo to the first response")
    print(f"{ended:7.1f} s  from the start of cargo to the end of the demo")
    print(f"{used:7.1f} s  of processor time, of all cores")


if __name__ == "__main__":
    main()
