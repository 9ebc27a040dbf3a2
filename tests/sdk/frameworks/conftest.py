"""The fixtures of the tests in this folder, which are those of the SDK tests."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "python"))

from fixtures import session_environment, start_environment  # noqa: E402, F401
