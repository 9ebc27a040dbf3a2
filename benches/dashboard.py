"""Compares the latency of requests while nobody and while 20 tabs look at the dashboard, and the memory of the program
after many page loads.

A tab is a stream of events and a load of its page every 5 seconds, of the overview or of the live list. The tabs are in a process of their own. Rounds
alternate: without tabs, with tabs, without tabs, so that the two rounds without tabs show the noise of the machine. It
needs only Python and the built program:

    python3 benches/dashboard.py target/release/keychoir [--rounds NUMBER] [--seconds NUMBER] [--tabs NUMBER]
"""

import argparse
import http.client
import json
import multiprocessing
import os
import selectors
import socket
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests", "faults"))
from proxy_process import memory_bytes, start_proxy

ADMIN_TOKEN = "kca_admin_token_of_the_bench"
# Far below the limit of one core, so that the latency is not that of a queue.
REQUESTS_PER_SECOND = 400
PAGE_INTERVAL = 5
SPEECH_BODY = json.dumps({"text": "Hello there", "model_id": "eleven_flash_v2_5"}).encode()
KINDS = {
    "speech": ("POST", "/v1/text-to-speech/JBFqnCBsd6RMkjVDRZzb", SPEECH_BODY),
    "models": ("GET", "/v1/models", b""),
}


def sign_in(port):
    """Returns the header with the cookie of a new session."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}", "content-type": "application/json"}
    connection.request("POST", "/api/keychoir/v1/dashboard-codes", "{}", headers)
    code = json.load(connection.getresponse())["code"]
    headers = {"origin": f"http://127.0.0.1:{port}", "content-type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/_/login", f"code={code}", headers)
    response = connection.getresponse()
    assert response.status == 303, response.status
    return {"cookie": response.headers["set-cookie"].split(";")[0]}


def load_page(connection, headers, name=""):
    connection.request("GET", f"/_/{name}", headers=headers)
    response = connection.getresponse()
    page = response.read()
    assert response.status == 200 and b"Sign out" in page, response.status


def look(port, headers, tabs, name, ready, stop):
    """Opens the tabs and reads their streams and pages until `stop` is set."""
    selector = selectors.DefaultSelector()
    events = "events" if name == "live" else "events?requests=0"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    for _ in range(tabs):
        stream = socket.create_connection(("127.0.0.1", port))
        stream.sendall(f"GET /_/{events} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\n{lines}\r\n".encode())
        assert stream.recv(12) == b"HTTP/1.1 200"
        selector.register(stream, selectors.EVENT_READ)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    next_page = time.monotonic()
    ready.set()
    while not stop.is_set():
        if time.monotonic() >= next_page:
            load_page(connection, headers, name)
            next_page += PAGE_INTERVAL / tabs
        for key, _ in selector.select(max(0, next_page - time.monotonic())):
            assert key.fileobj.recv(1 << 16), "a stream must not end"


class Client:
    """Sends requests on one connection and reads their responses by `content-length` or chunks."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port)

    def measure(self, seconds):
        """Returns the latencies of each kind in ms. The next request is sent at its time, not when the previous ends."""
        latencies = {kind: [] for kind in KINDS}
        start = time.monotonic()
        for number in range(int(seconds * REQUESTS_PER_SECOND)):
            due = start + number / REQUESTS_PER_SECOND
            time.sleep(max(0, due - time.monotonic()))
            kind = list(KINDS)[number % len(KINDS)]
            method, path, body = KINDS[kind]
            sent_at = time.perf_counter()
            self.connection.request(method, path, body, {"xi-api-key": "local", "content-type": "application/json"})
            response = self.connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            latencies[kind].append((time.perf_counter() - sent_at) * 1000)
        return latencies


def percentile(values, share):
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def measure_with_tabs(port, client, headers, tabs, name, seconds):
    ready, stop = multiprocessing.Event(), multiprocessing.Event()
    process = multiprocessing.Process(target=look, args=(port, headers, tabs, name, ready, stop))
    process.start()
    assert ready.wait(30), "the tabs must open"
    latencies = client.measure(seconds)
    stop.set()
    process.join(30)
    assert process.exitcode == 0, "no tab may fail"
    return latencies


def compare(port, name, arguments):
    client, headers = Client(port), sign_in(port)
    client.measure(2)
    ratios = {(kind, share): [] for kind in KINDS for share in (0.5, 0.99)}
    noise = {key: [] for key in ratios}
    absolute = {key: [] for key in ratios}
    for _ in range(arguments.rounds):
        before = client.measure(arguments.seconds)
        during = measure_with_tabs(port, client, headers, arguments.tabs, name, arguments.seconds)
        after = client.measure(arguments.seconds)
        for kind, share in ratios:
            first, looked, last = (percentile(run[kind], share) for run in (before, during, after))
            ratios[kind, share].append(looked / ((first + last) / 2))
            noise[kind, share].append(last / first)
            absolute[kind, share].append(first)
    print(f"{arguments.rounds} rounds of 3 x {arguments.seconds} s, {REQUESTS_PER_SECOND} requests/s, {arguments.tabs} tabs of the page {name or 'overview'}")
    print("| requests | | without tabs, ms | with tabs / without: median (spread) | without / without: median (spread) |")
    print("|---|---|---|---|---|")
    for kind, share in ratios:
        spread = lambda values: f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        key = (kind, share)
        print(f"| {kind} | p{share * 100:.0f} | {statistics.median(absolute[key]):.3f} | {spread(ratios[key])} | {spread(noise[key])} |")


def measure_memory(keychoir, port):
    connection, headers = http.client.HTTPConnection("127.0.0.1", port), sign_in(port)
    loaded, start = 0, time.perf_counter()
    for count in (100, 1_000, 3_000):
        while loaded < count:
            load_page(connection, headers)
            loaded += 1
        seconds = time.perf_counter() - start
        print(f"{count} loads of the overview: {memory_bytes(keychoir) / 2**20:.1f} MiB, {seconds / count * 1000:.2f} ms per load")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--tabs", type=int, default=20)
    arguments = parser.parse_args()
    with start_proxy(arguments.binary, KEYCHOIR_ADMIN_TOKEN=ADMIN_TOKEN) as (keychoir, port, _):
        measure_memory(keychoir, port)
    with start_proxy(arguments.binary, KEYCHOIR_ADMIN_TOKEN=ADMIN_TOKEN) as (keychoir, port, _):
        for name in ("", "live"):
            compare(port, name, arguments)


if __name__ == "__main__":
    main()
