"""Tests that an operator can change keys and clients of a running Keychoir while the official SDK sends requests: no
request fails, each change is recorded, a change with a stale generation is refused, and no secret is printed or stored
outside of the file of the admin token."""

import json
import os
import pathlib
import subprocess
import threading
import urllib.error
import urllib.request

import pytest
from elevenlabs import ElevenLabs

from proxy_process import BINARY, TIMEOUT_SECONDS, clean_environment
from test_sdk import MODEL, TEXT, VOICE, is_mp3

FIRST_KEY = "sk_operator_first_0000000000000000000000000000000001"
SPARE_KEY = "sk_operator_spare_0000000000000000000000000000000002"
KEYS = {FIRST_KEY: 10_000_000}
SPARE_KEYS = {SPARE_KEY: 10_000_000}
# The number of requests that must be served after a change before the next change is made.
REQUESTS_PER_STEP = 4
LOAD_THREADS = 3


class Load:
    """Threads that send requests for speech with the SDK until they are stopped. The first failed request ends all
    threads."""

    def __init__(self, url, token):
        self.token = token
        self._url = url
        self._changed = threading.Condition()
        self._served = 0
        self._error = None
        self._stopped = False
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(LOAD_THREADS)]
        for thread in self._threads:
            thread.start()

    def _run(self):
        clients = {}
        while not self._stopped:
            token = self.token
            client = clients.setdefault(token, ElevenLabs(base_url=self._url, api_key=token, timeout=TIMEOUT_SECONDS))
            error = None
            try:
                options = {"max_retries": 0}
                speech = client.text_to_speech.convert(VOICE, text=TEXT, model_id=MODEL, request_options=options)
                assert is_mp3(b"".join(speech))
            except Exception as caught:
                error = caught
            with self._changed:
                self._served += error is None
                self._error = self._error or error
                self._stopped = self._stopped or error is not None
                self._changed.notify_all()

    def wait_for_requests(self):
        """Waits until at least REQUESTS_PER_STEP requests that began after this call were served."""
        with self._changed:
            # Each thread may have one request that began before this call.
            target = self._served + LOAD_THREADS + REQUESTS_PER_STEP
            is_reached = self._changed.wait_for(lambda: self._error or self._served >= target, TIMEOUT_SECONDS)
            assert self._error is None, f"no request may fail: {self._error}"
            assert is_reached, "the requests must continue"

    def stop(self):
        with self._changed:
            self._stopped = True
        for thread in self._threads:
            thread.join(TIMEOUT_SECONDS)
            assert not thread.is_alive()
        assert self._error is None, f"no request may fail: {self._error}"
        assert self._served > 0


class Operator:
    """Operates a running Keychoir with the command line and the admin API, and records all outputs."""

    def __init__(self, environment):
        self._url = environment.url
        self._database = environment.keychoir.database
        self.arguments = []
        self.outputs = []

    def run(self, *arguments, stdin=""):
        """Runs a command. Returns its exit code, standard output and standard error."""
        self.arguments.extend(arguments)
        completed = subprocess.run(
            [BINARY, *arguments, "--url", self._url],
            env={**clean_environment(), "KEYCHOIR_STORAGE__PATH": str(self._database)},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        self.outputs.append(completed.stderr)
        return completed.returncode, completed.stdout.strip(), completed.stderr.strip()

    def run_successfully(self, *arguments, stdin=""):
        """Runs a command, which must succeed. Returns its output."""
        code, output, error = self.run(*arguments, stdin=stdin)
        assert code == 0, f"{arguments} must succeed: {error}"
        return output

    @property
    def admin_token(self):
        return (self._database.parent / "admin_token").read_text().strip()

    def call(self, method, path, body=None, **headers):
        """Calls the admin API. Returns the status, the entity tag and the document."""
        request = urllib.request.Request(f"{self._url}/api/keychoir/v1{path}", method=method)
        request.add_header("authorization", f"Bearer {self.admin_token}")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        if body is not None:
            request.add_header("content-type", "application/json")
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                text = response.read().decode()
                status, tag = response.status, response.headers["etag"]
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            status, tag = error.code, error.headers["etag"]
        self.outputs.append(text)
        return status, tag, json.loads(text)


@pytest.fixture
def environment(start_environment):
    return start_environment(KEYS, spare_keys=SPARE_KEYS, KEYCHOIR_LOG__LEVEL="trace")


def speech_requests_with(environment, key):
    """Returns the number of requests for speech that the provider has received with a key."""
    requests = environment.simulator.ledger()["requests"]
    return sum(request["key"] == key and "/text-to-speech/" in request["path_and_query"] for request in requests)


def test_keys_and_tokens_change_under_load_without_a_failed_request(environment):
    operator = Operator(environment)
    token = operator.run_successfully("clients", "add", "app")
    load = Load(environment.url, token)
    load.wait_for_requests()
    assert speech_requests_with(environment, SPARE_KEY) == 0

    # A key is added and checked. Pausing the other key moves all requests to it.
    operator.run_successfully("keys", "add", "spare", stdin=SPARE_KEY)
    checks = json.loads(operator.run_successfully("keys", "check", "spare", "--json"))["checks"]
    assert [(check["name"], check["outcome"]) for check in checks] == [("spare", "valid")]
    _, _, document = operator.call("GET", "/keys")
    first_id = next(key["id"] for key in document["keys"] if key["name"] != "spare")
    operator.run_successfully("keys", "pause", first_id, "--until", "2h", "--reason", "billing dispute")
    load.wait_for_requests()
    first_key_requests = speech_requests_with(environment, FIRST_KEY)
    load.wait_for_requests()
    assert speech_requests_with(environment, FIRST_KEY) == first_key_requests, "a paused key must get no request"
    assert speech_requests_with(environment, SPARE_KEY) >= REQUESTS_PER_STEP

    # The pause ends. The added key is paused, so that it gets no further requests, and is then removed.
    operator.run_successfully("keys", "resume", first_id)
    operator.run_successfully("keys", "pause", "spare")
    load.wait_for_requests()
    operator.run_successfully("keys", "remove", "spare")
    load.wait_for_requests()
    assert speech_requests_with(environment, FIRST_KEY) > first_key_requests, "a resumed key must get requests"
    code, _, error = operator.run("keys", "remove", first_id)
    assert code == 1 and "can only be paused" in error, "a key of the environment must not be removed"

    # The token rotates. Both tokens are valid during the grace period.
    new_token = operator.run_successfully("clients", "rotate", "app", "--grace", "1h")
    load.wait_for_requests()
    load.token = new_token
    load.wait_for_requests()
    load.stop()

    # A change with a stale generation is refused, and changes nothing.
    _, stale_tag, _ = operator.call("GET", "/clients")
    operator.run_successfully("clients", "set", "app", "--max-concurrent", "9")
    status, current_tag, document = operator.call("PATCH", "/clients/app", {"max_concurrent": 1}, If_Match=stale_tag)
    assert (status, document["detail"]["code"]) == (412, "stale_generation")
    assert "9 concurrent" in operator.run_successfully("clients", "list")
    status, _, _ = operator.call("PATCH", "/clients/app", {"max_concurrent": 7}, If_Match=current_tag)
    assert status == 200

    # Each change is recorded once. The output, the log, the responses and the stored files contain no secret.
    _, _, document = operator.call("GET", "/changes")
    actions = [change["action"] for change in reversed(document["changes"])]
    assert actions == [
        "client_added",
        "key_added",
        "key_paused",
        "key_resumed",
        "key_paused",
        "key_removed",
        "client_rotated",
        "client_changed",
        "client_changed",
    ]
    texts = [*operator.outputs, *operator.arguments, *environment.keychoir.process.lines]
    for secret in (FIRST_KEY, SPARE_KEY, token, new_token, operator.admin_token):
        assert not any(secret in text for text in texts), "a secret must not be printed"
        # Only the file of the admin token contains a secret.
        folder = pathlib.Path(operator._database).parent
        files = [path for path in folder.rglob("*") if path.is_file()]
        files_with_secret = [path.name for path in files if secret.encode() in path.read_bytes()]
        assert files_with_secret in ([], ["admin_token"]), "no other file may contain a secret"
    assert os.stat(operator._database.parent / "admin_token").st_mode & 0o777 == 0o600
