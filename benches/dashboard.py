"""Compares the latency of requests with and without 20 open tabs of the dashboard, and measures the memory of Keychoir
over 1,000 loads of each page.

Each tab keeps a stream of events open as `app.js` does. A tab of the overview is loaded again every minute, with its
assets and a new stream. Each round has four measurements: without tabs, with tabs of the overview, again without tabs,
and with tabs of the live list. The two measurements without tabs show how much results vary on the machine. The tabs
are in a process of the lowest priority, because browsers usually run on other machines. Keychoir records events for 30
seconds after the last tab was closed.

The exit code is 1 if the p99 with tabs is more than MAX_RATIO times the p99 without tabs, both in three of four rounds
and in all requests together, or if the memory grows by more than MAX_GROWTH_BYTES after 100 loads of each page. The
script also ends with an error if a request or a stream fails. It needs only Python and the built program:

    python3 benches/dashboard.py target/release/keychoir [--rounds NUMBER] [--seconds NUMBER] [--tabs NUMBER]
        [--keys NUMBER] [--only memory|latency]
"""

import argparse
import contextlib
import gc
import http.client
import json
import multiprocessing
import os
import re
import selectors
import socket
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests", "faults"))
from proxy_process import memory_bytes, processor_seconds, start_proxy

ADMIN_TOKEN = "kca_admin_token_of_the_bench"
# The rate is far below the maximum of one core, so that requests are not queued.
REQUESTS_PER_SECOND = 400
# The interval at which `app.js` loads the overview again.
RELOAD_SECONDS = 60
PAGES = ["", "keys", "live", "usage", "usage?by=key", "clients", "connect", "system"]
ASSETS = ["app.js", "app.css", "icon.svg", "uplot.js", "uplot.css"]
# The stream of each page that has one.
STREAMS = {"": "events?only=state&keys=", "live": "events?only=requests"}
# The numbers of loads after which the memory is measured.
LOADS = [100, 300, 1_000]
MAX_GROWTH_BYTES = 2 * 2**20
MAX_RATIO = 1.05
SPEECH_BODY = json.dumps({"text": "Hello there", "model_id": "eleven_flash_v2_5"}).encode()
SPEECH = ("POST", "/v1/text-to-speech/JBFqnCBsd6RMkjVDRZzb", SPEECH_BODY)
SPEECH_HEADERS = {"xi-api-key": "local", "content-type": "application/json"}


def sign_in(port):
    """Returns the header with the cookie of a new session."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {"authorization": f"Bearer {ADMIN_TOKEN}", "content-type": "application/json"}
    connection.request("POST", "/api/keychoir/v1/dashboard-codes", "{}", headers)
    code = json.load(connection.getresponse())["code"]
    headers = {"origin": f"http://127.0.0.1:{port}", "content-type": "application/x-www-form-urlencoded"}
    connection.request("POST", "/_/login", f"code={code}", headers)
    response = connection.getresponse()
    assert response.status == 303, f"the code must open a session, not {response.status}"
    return {"cookie": response.headers["set-cookie"].split(";")[0]}


class Browser:
    """Loads pages on one connection. Assets are loaded only if they have changed."""

    def __init__(self, port, session):
        self.port, self.session = port, session
        self.connection = http.client.HTTPConnection("127.0.0.1", port)
        self.tags = {}
        # The IDs of the keys on the last page.
        self.keys = ""

    def load(self, name):
        """Loads a page and its assets."""
        self.connection.request("GET", f"/_/{name}", headers=self.session)
        response = self.connection.getresponse()
        page = response.read()
        assert response.status == 200 and b"Sign out" in page, f"the page must load, not with {response.status}"
        self.keys = ",".join(re.findall(r'data-key="(\w+)"', page.decode()))
        for asset in ASSETS:
            condition = {"if-none-match": self.tags[asset]} if asset in self.tags else {}
            self.connection.request("GET", f"/_/assets/{asset}", headers={"accept-encoding": "gzip", **condition})
            response = self.connection.getresponse()
            response.read()
            expected = 304 if condition else 200
            assert response.status == expected, f"the status must be {expected}, not {response.status}"
            self.tags[asset] = response.headers["etag"]

    def open_stream(self, name):
        """Opens the stream of events of a page."""
        stream = socket.create_connection(("127.0.0.1", self.port))
        header_lines = "".join(f"{header}: {content}\r\n" for header, content in self.session.items())
        path = STREAMS[name] + (self.keys if name == "" else "")
        stream.sendall(f"GET /_/{path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n{header_lines}\r\n".encode())
        assert stream.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        return stream


def run_tabs(port, session, tabs, name, ready, stop):
    """Opens the tabs, reads their streams and loads their pages again until `stop` is set."""
    os.nice(19)
    browser, selector = Browser(port, session), selectors.DefaultSelector()
    streams = []

    def open_stream():
        stream = browser.open_stream(name)
        selector.register(stream, selectors.EVENT_READ)
        streams.append(stream)

    browser.load(name)
    for _ in range(tabs):
        open_stream()
    interval = RELOAD_SECONDS / tabs if name == "" else float("inf")
    next_load = time.monotonic() + interval / 2
    ready.set()
    while not stop.is_set():
        if time.monotonic() >= next_load:
            oldest = streams.pop(0)
            selector.unregister(oldest)
            oldest.close()
            browser.load(name)
            open_stream()
            next_load += interval
        for key, _ in selector.select(min(0.2, max(0, next_load - time.monotonic()))):
            assert key.fileobj.recv(1 << 18), "a stream must not end"


class Client:
    """Sends requests on one connection."""

    def __init__(self, port):
        self.connection = http.client.HTTPConnection("127.0.0.1", port)

    def measure(self, seconds):
        """Sends requests for `seconds`. Returns their latencies in ms. A request is sent at its scheduled time, or
        after the previous request if that took longer."""
        latencies = []
        started_at = time.monotonic()
        for number in range(int(seconds * REQUESTS_PER_SECOND)):
            time.sleep(max(0, started_at + number / REQUESTS_PER_SECOND - time.monotonic()))
            sent_at = time.perf_counter()
            self.connection.request(*SPEECH, SPEECH_HEADERS)
            response = self.connection.getresponse()
            response.read()
            latencies.append((time.perf_counter() - sent_at) * 1_000)
            assert response.status == 200, f"the request must be served, not refused with {response.status}"
        return latencies


@contextlib.contextmanager
def open_tabs(port, session, tabs, name):
    """Keeps tabs of the page `name` open during the block, or no tabs if it is `None`."""
    if name is None:
        yield
        return
    ready, stop = multiprocessing.Event(), multiprocessing.Event()
    process = multiprocessing.Process(target=run_tabs, args=(port, session, tabs, name, ready, stop))
    process.start()
    assert ready.wait(60), "the tabs must open"
    yield
    stop.set()
    process.join(60)
    assert process.exitcode == 0, "the process of the tabs must not fail"


def percentile(values, share):
    """Returns the value that this share of the values does not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def format_quartiles(values):
    """Returns the median, with the first and the third quartile in parentheses."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def measure_latency(keychoir, port, arguments):
    """Prints the latency and the processor time with tabs, as ratios to those without tabs. Returns whether the latency
    is within its limit."""
    client, session = Client(port), sign_in(port)
    client.measure(2)
    slots = [("no tabs", None), ("overview", ""), ("again no tabs", None), ("live list", "live")]
    figures = {name: [] for name, _ in slots}
    all_latencies = {name: [] for name, _ in slots}
    for _ in range(arguments.rounds):
        # Each round begins with a different slot, so that no slot always follows the same other slot.
        slots.append(slots.pop(0))
        for name, page in slots:
            with open_tabs(port, session, arguments.tabs, page):
                seconds_before = processor_seconds(keychoir)
                latencies = client.measure(arguments.seconds)
                processor_micros = (processor_seconds(keychoir) - seconds_before) / len(latencies) * 1_000_000
            all_latencies[name] += latencies
            figures[name].append((percentile(latencies, 0.5), percentile(latencies, 0.99), processor_micros))
    print(
        f"{arguments.tabs} tabs, {arguments.keys} keys, {REQUESTS_PER_SECOND} speech requests per second,"
        f" {arguments.rounds} rounds of {arguments.seconds} s for each;"
        " ratios to no tabs in the same round: median (quartiles)"
    )
    print("| | p50 | p99 | p99 of all requests | processor time per request |")
    print("|---|---|---|---|---|")
    baseline = figures["no tabs"]
    medians = [statistics.median(column) for column in zip(*baseline)]
    latencies_without_tabs = all_latencies["no tabs"] + all_latencies["again no tabs"]
    overall_p99 = percentile(latencies_without_tabs, 0.99)
    print(f"| no tabs | {medians[0]:.3f} ms | {medians[1]:.3f} ms | {overall_p99:.3f} ms | {medians[2]:.0f} µs |")
    is_ok = True
    for name in ("again no tabs", "overview", "live list"):
        ratios = [[new / old for new, old in zip(*pair)] for pair in zip(figures[name], baseline_of(figures, name))]
        columns = list(zip(*ratios))
        ratio = percentile(all_latencies[name], 0.99) / overall_p99
        p50, p99, processor_time = map(format_quartiles, columns)
        print(f"| {name} | {p50} | {p99} | {ratio:.3f} | {processor_time} |")
        is_slower = statistics.quantiles(columns[1], n=4)[0] > MAX_RATIO and ratio > MAX_RATIO
        is_ok &= name == "again no tabs" or not is_slower
    return is_ok


def baseline_of(figures, name):
    """Returns the figures of each round with which those of `name` are compared. Measurements with tabs are compared
    with the mean of both measurements without tabs."""
    if name == "again no tabs":
        return figures["no tabs"]
    pairs = zip(figures["no tabs"], figures["again no tabs"])
    return [tuple(statistics.mean(column) for column in zip(*pair)) for pair in pairs]


def measure_memory(keychoir, port):
    """Prints the memory after numbers of loads of each page. Returns whether its growth is within the limit."""
    browser = Browser(port, sign_in(port))
    seconds = dict.fromkeys(PAGES, 0.0)
    memory = {}
    for count in range(1, LOADS[-1] + 1):
        for name in PAGES:
            started_at = time.perf_counter()
            browser.load(name)
            seconds[name] += time.perf_counter() - started_at
            if name in STREAMS:
                browser.open_stream(name).close()
        if count in LOADS:
            memory[count] = memory_bytes(keychoir)
            print(f"{memory[count] / 2**20:.1f} MiB after {count} loads of each of {len(PAGES)} pages")
    print("; ".join(f"/_/{name} {total / LOADS[-1] * 1_000:.1f} ms" for name, total in seconds.items()), "with assets")
    return memory[LOADS[-1]] - memory[LOADS[0]] <= MAX_GROWTH_BYTES


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("binary")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--tabs", type=int, default=20)
    parser.add_argument("--keys", type=int, default=1_000)
    parser.add_argument("--only", choices=["memory", "latency"])
    arguments = parser.parse_args()
    keys = [f"sk_dashboard_key_number_{number:05d}" for number in range(arguments.keys)]
    gc.disable()
    measurements = {
        "memory": measure_memory,
        "latency": lambda keychoir, port: measure_latency(keychoir, port, arguments),
    }
    outcomes = []
    for measure in [measurements[arguments.only]] if arguments.only else measurements.values():
        with start_proxy(arguments.binary, keys=keys, KEYCHOIR_ADMIN_TOKEN=ADMIN_TOKEN) as (keychoir, port, _):
            outcomes.append(measure(keychoir, port))
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
