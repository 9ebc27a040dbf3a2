"""Type-checks the program for other platforms than this one, without their linkers, SDKs and C compilers.

    python platforms.py [TARGET]…

Without arguments, the targets are those in `TARGETS`. One that rustup has not installed is skipped, and a failure with
TESTS_SKIP_NOTHING=1. `cargo check` generates no code for the program, so nothing is
linked. The C and assembly code of ring and SQLite is not compiled: a stand-in for the C compiler writes empty object
files. What this shows is that the Rust code has all functions, types and constants that it uses on the platform. It
runs nothing.
"""

import os
import pathlib
import stat
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGETS = ["x86_64-apple-darwin", "aarch64-apple-darwin", "x86_64-pc-windows-gnu"]
CHECK_TIMEOUT_SECONDS = 1800

# Creates the file after `-o`, or for an archiver the first argument that names an archive.
STAND_IN = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        -o) : >"$2"; shift ;;
        *.a) : >"$1" ;;
    esac
    shift
done
"""


def installed_targets():
    listing = subprocess.run(
        ["rustup", "target", "list", "--installed"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listing.stdout.split())


def check(target, stand_in):
    """Returns whether the program type-checks for the target. Cargo's messages go to the terminal."""
    suffix = target.replace("-", "_")
    environment = os.environ | {
        f"CC_{suffix}": str(stand_in),
        f"AR_{suffix}": str(stand_in),
        # Otherwise the crate `cc` asks Xcode for the SDK.
        "SDKROOT": "/",
    }
    command = ["cargo", "check", "--locked", "--quiet", "--lib", "--bins", "--target", target]
    command += ["--target-dir", str(ROOT / "target/platforms")]
    return subprocess.run(command, cwd=ROOT, env=environment, timeout=CHECK_TIMEOUT_SECONDS).returncode == 0


def main():
    targets = sys.argv[1:] or TARGETS
    installed = installed_targets()
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory() as folder:
        stand_in = pathlib.Path(folder, "cc")
        stand_in.write_text(STAND_IN)
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
        for target in targets:
            if target not in installed:
                print(f"{target}: skipped, it needs `rustup target add {target}`")
                skipped += 1
            elif check(target, stand_in):
                print(f"{target}: type-checks")
                passed += 1
            else:
                print(f"{target}: does not type-check")
                failed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(bool(failed or (skipped and os.environ.get("TESTS_SKIP_NOTHING") == "1")))


if __name__ == "__main__":
    main()
