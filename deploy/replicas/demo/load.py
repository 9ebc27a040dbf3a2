"""Runs clients that send requests for speech through HAProxy or directly to replicas, and retry them like the official
SDKs. Records each attempt with its replica and its result."""

import hashlib
import http.client
import json
import random
import threading
import time
from dataclasses import dataclass, field

from pool import SPEECH_PATH, TOKEN

# The official SDKs retry a request up to two times after these statuses and after statuses from 500 on. They do not
# retry it if the connection was closed without a response.
RETRIED_STATUSES = (408, 409, 429)
MAX_RETRIES = 2
# The SDKs wait 1 s before the first retry. A shorter delay is a harder test for the replicas.
FIRST_RETRY_DELAY_SECONDS = 0.5
REQUEST_TIMEOUT_SECONDS = 60

# The result of a response that ended too early. No SDK and no load balancer can retry such a request, because the app
# may have played a part of the response. The clients of the demo request the response again, as an app would.
CUT_OFF = "cut off"


@dataclass
class Attempt:
    """One sending of a request."""

    # The times in seconds by the monotonic clock.
    started_at: float
    ended_at: float
    # The replica that HAProxy named in the response, or `None` without a response of a replica.
    replica: "str | None"
    # The status, `CUT_OFF`, or the name of the connection error if there was no response.
    result: str


@dataclass
class Request:
    """A request of an app, which is one call of the SDK with its retries."""

    number: int
    body: bytes
    # The number of the client that sends the request.
    client: int
    attempts: list = field(default_factory=list)
    # The phase of the load in which the request ended.
    phase: str = ""

    @property
    def is_served(self):
        return self.attempts[-1].result == "200"

    @property
    def seconds(self):
        return self.attempts[-1].ended_at - self.attempts[0].started_at

    @property
    def digest(self):
        """Returns the SHA-256 of the body, which identifies the request in the provider's ledger."""
        return hashlib.sha256(self.body).hexdigest()


class Load:
    """Clients that send one request after the other until they are stopped. They use `ports` in rotation, which
    contains the port of HAProxy, or the ports of all replicas if the clients balance the load."""

    def __init__(self, ports, clients):
        self.phase = ""
        self.requests = []
        self._ports, self._clients = ports, clients
        self._lock = threading.Lock()
        self._number = 0
        self._stop = threading.Event()
        self._threads = []

    def start(self):
        for client in range(self._clients):
            thread = threading.Thread(target=self._run, args=(client,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self):
        """Stops the clients after their requests in flight."""
        self._stop.set()
        for thread in self._threads:
            thread.join((MAX_RETRIES + 1) * REQUEST_TIMEOUT_SECONDS)

    def completed_count(self):
        """Returns the number of completed requests."""
        return len(self.requests)

    def _run(self, client):
        connections = {}
        while not self._stop.is_set():
            with self._lock:
                self._number += 1
                number = self._number
            # Each text is unique, so that each charge matches exactly one request. A character costs one credit.
            text = f"Request {number} of the demo" + "!" * random.randrange(40)
            body = json.dumps({"text": text, "model_id": "eleven_multilingual_v2"}).encode()
            request = Request(number, body, client)
            for retry in range(MAX_RETRIES + 1):
                port = self._ports[(number + retry) % len(self._ports)]
                attempt = send_attempt(connections, port, body, f"{number}-{retry}")
                request.attempts.append(attempt)
                if not is_retried(attempt.result):
                    break
                # The delays differ between clients, so that not all clients retry at the same time.
                time.sleep(FIRST_RETRY_DELAY_SECONDS * 2**retry * random.uniform(0.8, 1.2))
            request.phase = self.phase
            self.requests.append(request)


def is_retried(result):
    """Returns whether an app with an official SDK sends the request again after `result`."""
    if not result.isdigit():
        return result == CUT_OFF
    return int(result) >= 500 or int(result) in RETRIED_STATUSES


def send_attempt(connections, port, body, request_id):
    """Sends a request to `port`, if possible on the open connection in `connections`. Returns the attempt."""
    started_at = time.monotonic()
    connection = connections.get(port)
    if connection is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_SECONDS)
        connections[port] = connection
    headers = {"content-type": "application/json", "xi-api-key": TOKEN, "x-request-id": request_id}
    replica, response = None, None
    try:
        connection.request("POST", SPEECH_PATH, body, headers)
        response = connection.getresponse()
        replica = response.headers.get("x-keychoir-replica")
        response.read()
        result = str(response.status)
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        del connections[port]
        result = CUT_OFF if response else type(error).__name__
    return Attempt(started_at, time.monotonic(), replica, result)
