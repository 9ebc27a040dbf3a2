"""Sessions on sockets, and how the first two keys stand while one is opened."""

import json

# What a client calls its key is its own affair; nothing of it may reach the provider.
CLIENT_TOKEN = "anything-the-app-sends"

FIRST = ["sk_session_key_one", "sk_session_key_two"]
LAST = "sk_session_key_last"

# How the first two keys stand: what the simulator is told of them, and their credits.
STANDINGS = {
    "every key serves": (None, 1_000_000),
    "the first keys are invalid": ("invalid", 1_000_000),
    "the first keys are spent": (None, 0),
    "the first keys are busy": ("concurrency", 1_000_000),
}

PLAIN = [("ws", standing) for standing in STANDINGS]
SECRET = [("wss", standing) for standing in STANDINGS]
LINES = PLAIN + SECRET


class Line:
    """A house whose first keys stand so, and how a client reaches it."""

    def __init__(self, house, scheme, standing):
        fault, credits = STANDINGS[standing]
        self._refused = [] if standing == "every key serves" else FIRST
        # Nothing but sessions asks the keys: a refusal is met there and nowhere before.
        self._house = house({**dict.fromkeys(FIRST, credits), LAST: 1_000_000}, KEYCHOIR_QUOTA_POLLING__ENABLED="false")
        for key in FIRST if fault else []:
            self._house.simulator.fault(key, fault)
        self.host = self._house.url.removeprefix("http://")
        self.http = f"{'https' if scheme == 'wss' else 'http'}://{self.host}"
        self.ws = f"{scheme}://{self.host}"
        self._house.keychoir.configure(f'websocket.signed_url_base = "{self.ws}"')

    @property
    def serving(self):
        """The key that is to serve."""
        return LAST if self._refused else FIRST[0]

    def bundle(self, **environment):
        return self._house.keychoir.env(**environment)["SSL_CERT_FILE"]

    def sessions(self):
        """The sessions that the provider has seen."""
        return [request for request in self._ledger()["requests"] if request.get("socket")]

    def _ledger(self):
        ledger = self._house.simulator.ledger()
        assert ledger["violations"] == []
        assert CLIENT_TOKEN not in json.dumps(ledger), "the client's token arrived"
        return ledger

    def check(self, path, served=1):
        """The provider saw what it should: the refused keys once each, and then so many sessions with
        the key that serves, all of them at this path; returns the last."""
        sessions = self.sessions()
        keys = [session["key"] for session in sessions]
        assert keys == self._refused + [self.serving] * served, keys
        for session in sessions:
            assert session["path_and_query"].startswith(path)
        assert all(session["socket"]["refused"] for session in sessions[: len(self._refused)])
        assert not any(session["socket"]["refused"] for session in sessions[len(self._refused) :])
        return sessions[-1]["socket"]
