"""Makes the shared fixtures available to the tests in this directory."""

from fixtures import session_environment, start_environment  # noqa: F401
