"""Runs the checks of a script one after the other and prints the outcome of each."""

import sys
import traceback


def run(checks):
    """Calls each check, whose name is a sentence. Prints one line for each and a summary, and exits with 1 if one failed."""
    failed = 0
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            check()
        except Exception:
            failed += 1
            print(f"FAILED  {name}", flush=True)
            traceback.print_exc()
        else:
            print(f"ok      {name}", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed", flush=True)
    sys.exit(bool(failed))
