"""Runs the checks of a script one after the other and prints the outcome of each.

A check whose tools or permissions are missing is skipped with the reason. With `TESTS_SKIP_NOTHING=1` it fails.
"""

import os
import sys
import traceback

SKIP_NOTHING = os.environ.get("TESTS_SKIP_NOTHING") == "1"


class Skipped(Exception):
    """A check that this machine cannot run."""


def need(condition, what):
    """Skips the check if `condition` is false. `what` is what it needs."""
    if not condition:
        raise Skipped(f"needs {what}")


def run(checks):
    """Calls each check, whose name is a sentence. Prints one line for each and a summary, and exits with 1 if one failed."""
    failed = skipped = 0
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            check()
        except Skipped as reason:
            failed += SKIP_NOTHING
            skipped += not SKIP_NOTHING
            print(f"{'FAILED' if SKIP_NOTHING else 'skipped'} {name}: {reason}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {name}", flush=True)
            traceback.print_exc()
        else:
            print(f"ok      {name}", flush=True)
    print(f"{len(checks) - failed - skipped} passed, {failed} failed, {skipped} skipped", flush=True)
    sys.exit(bool(failed))
