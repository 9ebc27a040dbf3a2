"""What tests with real clients are given; `conftest.py` of each folder takes it over."""

import certifi
import pytest

from house import House
from sessions import LINES, Line


@pytest.fixture
def house(tmp_path):
    opened = []

    def start(keys, **settings):
        opened.append(House(keys, tmp_path, **settings))
        return opened[-1]

    yield start
    for house in opened:
        house.close()


@pytest.fixture(params=LINES, ids=" ".join)
def line(house, request, monkeypatch):
    """A house whose keys stand so, and this process as a shell that has taken `keychoir env`."""
    scheme, standing = request.param
    opened = Line(house, scheme, standing)
    if scheme == "wss":
        monkeypatch.setenv("SSL_CERT_FILE", opened.bundle(SSL_CERT_FILE=certifi.where()))
    return opened
