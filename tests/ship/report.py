"""Runs the checks of a script in this directory one after the other, prints the outcome of each, and sets the exit code
of the script.

A check whose tools or permissions are missing is skipped with the reason. With `TESTS_SKIP_NOTHING=1`, it fails.
"""

import os
import sys
import traceback

SKIP_NOTHING = os.environ.get("TESTS_SKIP_NOTHING") == "1"


class Skipped(Exception):
    """This machine cannot run a check. The message contains the reason."""


def need(condition, what):
    """Skips the running check if `condition` is false. `what` names the required program or permission."""
    if not condition:
        raise Skipped(f"needs {what}")


def run_checks(checks):
    """Calls each check, whose name is a sentence. Prints a line for each check and a summary. Exits with 1 if a check
    failed, and with 0 otherwise."""
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
