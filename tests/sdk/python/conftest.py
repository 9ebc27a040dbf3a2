"""What the tests of this folder are given."""

from fixtures import house, line  # noqa: F401
