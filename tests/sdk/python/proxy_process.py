"""Starts the simulator and Keychoir in front of it, both on free ports, for tests with real clients. Also configures
both, and reads the ledger of the simulator, and the log, status document and usage database of Keychoir. At the end,
the usage records are compared with the credits that the simulator has charged."""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import sqlite3
import subprocess
import threading
import urllib.error
import urllib.request
import uuid

BINARY = os.environ.get("KEYCHOIR_BIN") or str(pathlib.Path(__file__).parents[3] / "target/debug/keychoir")
TIMEOUT_SECONDS = 30


def clean_environment():
    """Returns the environment without the variables of Keychoir."""
    prefixes = ("KEYCHOIR_", "ELEVENLABS_", "SSL_CERT_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def fingerprint(key):
    """Returns the fingerprint of a key, as the usage database contains it."""
    return hashlib.sha256(b"keychoir:key:1:" + key.encode()).hexdigest()


class Process:
    """A program whose output is read continuously, so that it does not block on a full pipe."""

    def __init__(self, *arguments, stream, **environment):
        pipes = {stream: subprocess.PIPE}
        self._child = subprocess.Popen(
            [BINARY, *arguments], env={**clean_environment(), **environment}, text=True, **pipes
        )
        self._stream = getattr(self._child, stream)
        self._changed = threading.Condition()
        self._ended = False
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._stream:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for_line(self, parse):
        """Waits for the first line for which `parse` returns a true value. Returns this value."""
        with self._changed:
            self._changed.wait_for(lambda: self._find(parse) or self._ended, TIMEOUT_SECONDS)
            parsed = self._find(parse)
            assert parsed, f"the program must print the expected line: {self.lines}"
            return parsed

    def _find(self, parse):
        return next(filter(None, map(parse, self.lines)), None)

    def signal(self, number):
        self._child.send_signal(number)

    def stop(self):
        """Stops the program. Returns its exit code."""
        self.signal(signal.SIGTERM)
        code = self._child.wait(TIMEOUT_SECONDS)
        self._reader.join(TIMEOUT_SECONDS)
        return code


class Simulator:
    """A simulated provider that accepts `keys`, which are given with their credits."""

    def __init__(self, keys):
        arguments = [argument for key, credits in keys.items() for argument in ("--key", f"{key}={credits}")]
        self.process = Process("simulate", "--listen", "127.0.0.1:0", *arguments, stream="stdout")
        find_url = lambda line: next((word for word in line.split() if word.startswith("http://")), None)
        self.url = self.process.wait_for_line(find_url)

    def set_fault(self, key, always):
        """Sets the fault of all further requests and sessions with `key`."""
        body = json.dumps({"key": key, "always": always}).encode()
        urllib.request.urlopen(f"{self.url}/_simulator/faults", body).close()

    def ledger(self):
        with urllib.request.urlopen(f"{self.url}/_simulator/ledger") as response:
            return json.load(response)


class Keychoir:
    """Keychoir with a configuration file and a usage database in `directory`."""

    def __init__(self, keys, upstream, directory, **settings):
        self.database = directory / "keychoir.db"
        self._config_file = directory / "keychoir.toml"
        self._config_file.touch()
        self.process = Process(
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--config",
            str(self._config_file),
            stream="stderr",
            ELEVENLABS_API_KEYS=",".join(keys),
            KEYCHOIR_UPSTREAM__BASE_URL=upstream,
            KEYCHOIR_STORAGE__PATH=str(self.database),
            KEYCHOIR_LOG__FORMAT="json",
            **settings,
        )
        self.url = "http://" + self.process.wait_for_line(self._parse_address)

    @staticmethod
    def _parse_address(line):
        event = json.loads(line)
        return event.get("event") == "server_started" and event["address"]

    def configure(self, text):
        """Writes the configuration file and waits until it is reloaded."""
        self._config_file.write_text(text)
        self.process.signal(signal.SIGHUP)
        self.process.wait_for_line(lambda line: json.loads(line).get("event") == "reloaded")

    def env(self, **environment):
        """Returns the CA file variables that `eval "$(keychoir env)"` sets in a shell with this environment."""
        environment = {**clean_environment(), "KEYCHOIR_STORAGE__PATH": str(self.database), **environment}
        script = 'eval "$("$0" env)" && printf "%s\\n" "$SSL_CERT_FILE" "$NODE_EXTRA_CA_CERTS"'
        shell = subprocess.run(
            ["/bin/sh", "-c", script, BINARY], env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        assert shell.returncode == 0, f"`keychoir env` must succeed: {shell.stderr}"
        return dict(zip(("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"), shell.stdout.splitlines(), strict=True))

    def events(self, name):
        """Returns the logged events with this name. The log is in order, so all of them are logged when the event of a
        further request is logged."""
        marker = str(uuid.uuid4())
        further_request = urllib.request.Request(f"{self.url}/v1/models", headers={"x-request-id": marker})
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(further_request) as response:
            response.read()
        self.process.wait_for_line(lambda line: json.loads(line).get("request_id") == marker)
        return [event for event in map(json.loads, self.process.lines) if event.get("event") == name]

    def status(self):
        """Returns the status document."""
        with urllib.request.urlopen(f"{self.url}/api/elevenlabs-status") as response:
            return json.load(response)

    def stop(self):
        assert self.process.stop() == 0

    def recorded_credits(self):
        """Returns the recorded credits by the fingerprint of the key, without ROUTES_WITHOUT_REPORTED_COST."""
        with contextlib.closing(sqlite3.connect(self.database)) as database:
            condition = f"route NOT IN ({', '.join('?' for _ in ROUTES_WITHOUT_REPORTED_COST)})"
            query = f"SELECT key_hash, sum(credits) FROM attempts WHERE {condition} GROUP BY key_hash"
            return dict(database.execute(query, ROUTES_WITHOUT_REPORTED_COST).fetchall())


# WebSocket routes whose messages do not report the cost. Keychoir polls the price of a conversation a second after
# its end, which may be after the end of a test.
ROUTES_WITHOUT_REPORTED_COST = ("/v1/speech-to-text/realtime", "/v1/convai/conversation")


class ProxyEnvironment:
    """Keychoir with `keys`, which are given with their credits, in front of a simulator that also accepts `spare_keys`.
    """

    def __init__(self, keys, directory, spare_keys=None, **settings):
        self.keys = {**keys, **(spare_keys or {})}
        self._directory = directory
        self.simulator = Simulator(self.keys)
        self.keychoir = Keychoir(keys, self.simulator.url, directory, **settings)
        self.url = self.keychoir.url

    def restart(self, keys):
        """Restarts Keychoir with the same database and with `keys` in this order."""
        self.keychoir.stop()
        self.keychoir = Keychoir(keys, self.simulator.url, self._directory)
        self.url = self.keychoir.url

    def close(self):
        """Stops both programs and compares the recorded credits with the credits that the provider charged."""
        self.keychoir.stop()
        ledger = self.simulator.ledger()
        self.simulator.process.stop()
        assert ledger["violations"] == []
        charged = {key["key"]: key["charged"] for key in ledger["keys"]}
        for request in ledger["requests"]:
            is_unreported = request["path_and_query"].split("?")[0] in ROUTES_WITHOUT_REPORTED_COST
            if request.get("socket") and is_unreported and request["charged"]:
                charged[request["socket"]["payer"]] -= request["charged"]
        recorded_credits = self.keychoir.recorded_credits()
        recorded = {key: recorded_credits.get(fingerprint(key), 0) for key in self.keys}
        assert recorded == charged, "the recorded credits of each key must be the charged credits"
        return ledger
