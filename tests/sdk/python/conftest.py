"""Makes the shared pytest fixtures available to the tests in this directory."""

from fixtures import session_environment, start_environment  # noqa: F401
