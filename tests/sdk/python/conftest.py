"""The fixtures of the tests in this folder."""

from fixtures import session_environment, start_environment  # noqa: F401
