"""Type-checks the program for other platforms than this one, without their linkers, SDKs and C compilers.

    python platforms.py [TARGET]…

Without arguments, the script checks all `TARGETS`. A target that rustup has not installed is skipped, or fails with
TESTS_SKIP_NOTHING=1. `cargo check` links no program, so no linker is needed. The C and assembly code of ring and SQLite
is not compiled: a script that replaces the C compiler writes empty object files. The check shows that all functions,
types and constants that the Rust code uses exist on the platform. The program is not run. The exit code is 1 if a
target fails.
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

# Replaces the C compiler and the archiver. It creates the file after `-o` and each archive in its arguments, empty.
COMPILER_STUB = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in
        -o) : >"$2"; shift ;;
        *.a) : >"$1" ;;
    esac
    shift
done
"""


def installed_targets():
    """Returns the targets that rustup has installed for the toolchain of the repository."""
    listing = subprocess.run(
        ["rustup", "target", "list", "--installed"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listing.stdout.split())


def type_checks(target, compiler_stub):
    """Returns whether the program type-checks for the target. The messages of cargo appear in the terminal."""
    suffix = target.replace("-", "_")
    environment = os.environ | {
        f"CC_{suffix}": str(compiler_stub),
        f"AR_{suffix}": str(compiler_stub),
        # Without this variable, the crate `cc` runs a program of Xcode to find the SDK.
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
        compiler_stub = pathlib.Path(folder, "cc")
        compiler_stub.write_text(COMPILER_STUB)
        compiler_stub.chmod(compiler_stub.stat().st_mode | stat.S_IXUSR)
        for target in targets:
            if target not in installed:
                print(f"{target}: skipped, it needs `rustup target add {target}`")
                skipped += 1
            elif type_checks(target, compiler_stub):
                print(f"{target}: type-checks")
                passed += 1
            else:
                print(f"{target}: does not type-check")
                failed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    sys.exit(bool(failed or (skipped and os.environ.get("TESTS_SKIP_NOTHING") == "1")))


if __name__ == "__main__":
    main()
