"""Measures the duration of the first run of the demo: the clone of the repository, the download of the crates, and
`cargo demo` with an empty target directory until the end of the build, the first response and the end of the demo. Also
prints the size of the program and the processor time.

    python first_run.py [PROFILE]

`PROFILE` is the profile of the build. The default is `demo`, as in `cargo demo`. `cargo fetch` downloads the crates
before the build. Its time is printed separately, because it depends on the network and on the cache of cargo. The
script ends with exit code 1 if the demo fails or sends no first response.
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
# Matches the line of the first response in the output of the demo. An earlier line contains the address of the demo.
FIRST_RESPONSE = re.compile(r"request +1/\d+ +200")
TIMEOUT_SECONDS = 1800


def run_timed(*command, **options):
    """Runs a command. Returns its duration in seconds."""
    started_at = time.monotonic()
    subprocess.run(command, check=True, timeout=TIMEOUT_SECONDS, **options)
    return time.monotonic() - started_at


def run_demo(clone, profile):
    """Runs the demo. Returns three times in seconds from the start of cargo: to the first line of the demo, which
    follows the build, to the first response, and to the end of the demo."""
    started_at = time.monotonic()
    command = ["cargo", "run", "--locked", "--profile", profile, "--", "demo"]
    demo = subprocess.Popen(command, cwd=clone, env=build_environment(), stdout=subprocess.PIPE, text=True)
    first_line = first_response = None
    for line in demo.stdout:
        first_line = first_line or time.monotonic() - started_at
        if first_response is None and FIRST_RESPONSE.search(line):
            first_response = time.monotonic() - started_at
    if demo.wait(timeout=TIMEOUT_SECONDS) != 0 or first_response is None:
        sys.exit("the demo failed or had no first response")
    return first_line, first_response, time.monotonic() - started_at


def processor_seconds():
    """Returns the processor time of all programs that this script has run and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def build_environment():
    """Returns the environment without a shared target directory, and with English messages."""
    return {name: value for name, value in os.environ.items() if name != "CARGO_TARGET_DIR"} | {"LC_ALL": "C"}


def main():
    profile = sys.argv[1] if len(sys.argv) > 1 else "demo"
    with tempfile.TemporaryDirectory() as folder:
        clone = pathlib.Path(folder, "keychoir")
        clone_seconds = run_timed("git", "clone", "--quiet", ROOT, clone)
        fetch_seconds = run_timed("cargo", "fetch", "--locked", "--quiet", cwd=clone, env=build_environment())
        processor_before = processor_seconds()
        build_seconds, response_seconds, demo_seconds = run_demo(clone, profile)
        processor_used = processor_seconds() - processor_before
        size = sum(file.stat().st_size for file in clone.glob("target/*/keychoir")) / 1e6
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    print(f"profile {profile}, {cores} cores, load {load:.1f} at the end, program of {size:.1f} MB")
    for name, seconds in (("clone", clone_seconds), ("download of the crates", fetch_seconds), ("build", build_seconds)):
        print(f"{seconds:7.1f} s  {name}")
    print(f"{response_seconds:7.1f} s  from the start of cargo to the first response")
    print(f"{demo_seconds:7.1f} s  from the start of cargo to the end of the demo")
    print(f"{processor_used:7.1f} s  of processor time on all cores")


if __name__ == "__main__":
    main()
