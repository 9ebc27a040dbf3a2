"""What the tests of this folder are given: the same as those of the SDK."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parents[1] / "python"))

from fixtures import house, line  # noqa: E402, F401
