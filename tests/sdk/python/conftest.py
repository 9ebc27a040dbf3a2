"""Makes the pytest fixtures of `fixtures.py` available to the tests in this directory."""

from fixtures import session_environment, start_environment  # noqa: F401
