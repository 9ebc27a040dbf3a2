"""Makes the pytest fixtures of `tests/sdk/python` available to the tests in this directory."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "python"))

from fixtures import session_environment, start_environment  # noqa: E402, F401
