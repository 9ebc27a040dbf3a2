"""Provides the pytest fixtures that start Keychoir and the simulator for tests with real clients. `conftest.py` in this
directory and in `tests/sdk/frameworks` imports them."""

import certifi
import pytest

from proxy_process import ProxyEnvironment
from sessions import SESSION_CASES, SessionEnvironment


@pytest.fixture
def start_environment(tmp_path):
    """Returns a function that starts an environment. After the test, each environment is closed, and its usage records
    are compared with the ledger of the simulator."""
    environments = []

    def start(keys, **settings):
        environments.append(ProxyEnvironment(keys, tmp_path, **settings))
        return environments[-1]

    yield start
    for environment in environments:
        environment.close()


@pytest.fixture(params=SESSION_CASES, ids=" ".join)
def session_environment(start_environment, request, monkeypatch):
    """Starts an environment whose first keys are in the given state. For wss, sets SSL_CERT_FILE to the CA bundle of
    `keychoir env`."""
    scheme, key_state = request.param
    environment = SessionEnvironment(start_environment, scheme, key_state)
    if scheme == "wss":
        monkeypatch.setenv("SSL_CERT_FILE", environment.ca_bundle(SSL_CERT_FILE=certifi.where()))
    return environment
