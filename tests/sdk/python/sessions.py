"""Defines the cases of the WebSocket tests with real clients: the scheme, and the state of the first two keys. Starts
an environment for a case, and checks which keys opened the sessions that the provider received."""

import json

# The client credential, which must not reach the provider.
CLIENT_TOKEN = "anything-the-app-sends"

FIRST_KEYS = ["sk_session_key_one", "sk_session_key_two"]
LAST_KEY = "sk_session_key_last"

# The states of the first two keys: the fault in the simulator, and the credits.
KEY_STATES = {
    "every key serves": (None, 1_000_000),
    "the first keys are invalid": ("invalid", 1_000_000),
    "the first keys are exhausted": (None, 0),
    "the first keys are busy": ("concurrency", 1_000_000),
}

WS_CASES = [("ws", key_state) for key_state in KEY_STATES]
WSS_CASES = [("wss", key_state) for key_state in KEY_STATES]
SESSION_CASES = WS_CASES + WSS_CASES


class SessionEnvironment:
    """Keychoir whose first keys have a given state, and its URLs for a client."""

    def __init__(self, start_environment, scheme, key_state):
        fault, credits = KEY_STATES[key_state]
        self._refused_keys = [] if key_state == "every key serves" else FIRST_KEYS
        # Quota polling is disabled, so that a session is the first to be refused.
        keys = {**dict.fromkeys(FIRST_KEYS, credits), LAST_KEY: 1_000_000}
        self._environment = start_environment(keys, KEYCHOIR_QUOTA_POLLING__ENABLED="false")
        for key in FIRST_KEYS if fault else []:
            self._environment.simulator.set_fault(key, fault)
        self.host = self._environment.url.removeprefix("http://")
        self.http = f"{'https' if scheme == 'wss' else 'http'}://{self.host}"
        self.ws = f"{scheme}://{self.host}"
        self._environment.keychoir.configure(f'websocket.signed_url_base = "{self.ws}"')

    @property
    def serving_key(self):
        """Returns the key that serves a session."""
        return LAST_KEY if self._refused_keys else FIRST_KEYS[0]

    def ca_bundle(self, **environment):
        """Returns the path of the CA bundle that `keychoir env` sets."""
        return self._environment.keychoir.env(**environment)["SSL_CERT_FILE"]

    def sessions(self):
        """Returns the WebSocket sessions that the provider has received, including refused ones."""
        return [request for request in self._ledger()["requests"] if request.get("socket")]

    def _ledger(self):
        ledger = self._environment.simulator.ledger()
        assert ledger["violations"] == []
        assert CLIENT_TOKEN not in json.dumps(ledger), "the provider must not receive the client token"
        return ledger

    def check_sessions(self, path, served=1):
        """Asserts that the provider received one session with each refused key and then `served` sessions with the
        serving key, whose paths start with `path`. Returns the last session."""
        sessions = self.sessions()
        keys = [session["key"] for session in sessions]
        expected_keys = self._refused_keys + [self.serving_key] * served
        assert keys == expected_keys, f"the sessions must have the keys {expected_keys}, not {keys}"
        for session in sessions:
            assert session["path_and_query"].startswith(path)
        assert all(session["socket"]["refused"] for session in sessions[: len(self._refused_keys)])
        assert not any(session["socket"]["refused"] for session in sessions[len(self._refused_keys) :])
        return sessions[-1]["socket"]
