"""The binary as a person starts it: a simulated ElevenLabs, Keychoir before it, both on port 0."""

import contextlib
import json
import os
import pathlib
import signal
import sqlite3
import hashlib
import subprocess
import threading
import urllib.error
import urllib.request
import uuid

BINARY = os.environ.get("KEYCHOIR_BIN") or str(pathlib.Path(__file__).parents[3] / "target/debug/keychoir")
WAIT_MAX_S = 30


def clean_environment():
    """This machine's environment without what concerns Keychoir."""
    foreign = ("KEYCHOIR_", "ELEVENLABS_", "SSL_CERT_")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def fingerprint(key):
    """What a key is known by in the books."""
    return hashlib.sha256(b"keychoir:key:1:" + key.encode()).hexdigest()


class Process:
    """A program whose output is read to its end, so that no pipe ever fills."""

    def __init__(self, *arguments, stream, **environment):
        pipes = {stream: subprocess.PIPE}
        self._child = subprocess.Popen(
            [BINARY, *arguments], env={**clean_environment(), **environment}, text=True, **pipes
        )
        self._source = getattr(self._child, stream)
        self._changed = threading.Condition()
        self._ended = False
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._source:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def line(self, wanted):
        """The first line that `wanted` finds something in, as soon as it is there."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._find(wanted) or self._ended, WAIT_MAX_S)
            found = self._find(wanted)
            assert found, f"it said no such thing: {self.lines}"
            return found

    def _find(self, wanted):
        return next(filter(None, map(wanted, self.lines)), None)

    def signal(self, which):
        self._child.send_signal(which)

    def stop(self):
        self.signal(signal.SIGTERM)
        code = self._child.wait(WAIT_MAX_S)
        self._reader.join(WAIT_MAX_S)
        return code


class Simulator:
    def __init__(self, keys):
        arguments = [word for key, credits in keys.items() for word in ("--key", f"{key}={credits}")]
        self.process = Process("simulate", "--listen", "127.0.0.1:0", *arguments, stream="stdout")
        self.url = self.process.line(lambda line: next((word for word in line.split() if word.startswith("http://")), None))

    def fault(self, key, always):
        """What every request and every session with this key meets from now on."""
        order = json.dumps({"key": key, "always": always}).encode()
        urllib.request.urlopen(f"{self.url}/_simulator/faults", order).close()

    def ledger(self):
        with urllib.request.urlopen(f"{self.url}/_simulator/ledger") as answer:
            return json.load(answer)


class Keychoir:
    def __init__(self, keys, upstream, folder, **settings):
        self.books = folder / "keychoir.db"
        self._file = folder / "keychoir.toml"
        self._file.touch()
        self.process = Process(
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--config",
            str(self._file),
            stream="stderr",
            ELEVENLABS_API_KEYS=",".join(keys),
            KEYCHOIR_UPSTREAM__BASE_URL=upstream,
            KEYCHOIR_STORAGE__PATH=str(self.books),
            KEYCHOIR_LOG__FORMAT="json",
            **settings,
        )
        self.url = "http://" + self.process.line(self._address)

    @staticmethod
    def _address(line):
        event = json.loads(line)
        return event.get("event") == "server_started" and event["address"]

    def configure(self, text):
        """Settles what cannot be known before it listens, and waits until it counts."""
        self._file.write_text(text)
        self.process.signal(signal.SIGHUP)
        self.process.line(lambda line: json.loads(line).get("event") == "reloaded")

    def env(self, **environment):
        """What a shell knows after `eval "$(keychoir env)"`, with this environment."""
        environment = {**clean_environment(), "KEYCHOIR_STORAGE__PATH": str(self.books), **environment}
        script = 'eval "$("$0" env)" && printf "%s\\n" "$SSL_CERT_FILE" "$NODE_EXTRA_CA_CERTS"'
        shell = subprocess.run(
            ["/bin/sh", "-c", script, BINARY], env=environment, capture_output=True, text=True, timeout=WAIT_MAX_S
        )
        assert shell.returncode == 0, shell.stderr
        return dict(zip(("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS"), shell.stdout.splitlines(), strict=True))

    def events(self, name):
        """Events of one kind. Lines come in order: when that of this request is there, all before it are."""
        marker = str(uuid.uuid4())
        asked = urllib.request.Request(f"{self.url}/v1/models", headers={"x-request-id": marker})
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(asked) as answer:
            answer.read()
        self.process.line(lambda line: json.loads(line).get("request_id") == marker)
        return [event for event in map(json.loads, self.process.lines) if event.get("event") == name]

    def status(self):
        with urllib.request.urlopen(f"{self.url}/api/elevenlabs-status") as answer:
            return json.load(answer)

    def stop(self):
        assert self.process.stop() == 0

    def spent(self):
        """Credits by key, as the books have them, but for what is told later or never."""
        with contextlib.closing(sqlite3.connect(self.books)) as books:
            others = f"route NOT IN ({', '.join('?' for _ in UNTOLD)})"
            rows = books.execute(f"SELECT key_hash, sum(credits) FROM attempts WHERE {others} GROUP BY key_hash", UNTOLD)
            return dict(rows.fetchall())


# Sockets whose messages do not tell what they cost. The watch asks for an agent's price a second after its
# end; a test may be over by then, or not.
UNTOLD = ("/v1/speech-to-text/realtime", "/v1/convai/conversation")


class House:
    """Keychoir before a simulator with these keys."""

    def __init__(self, keys, folder, **settings):
        self.keys = keys
        self._folder = folder
        self.simulator = Simulator(keys)
        self.keychoir = Keychoir(keys, self.simulator.url, folder, **settings)
        self.url = self.keychoir.url

    def restart(self, keys):
        """Keychoir alone, with the same books and these keys in this order."""
        self.keychoir.stop()
        self.keychoir = Keychoir(keys, self.simulator.url, self._folder)
        self.url = self.keychoir.url

    def close(self):
        """Ends both, and holds the books against the provider's ledger."""
        self.keychoir.stop()
        ledger = self.simulator.ledger()
        self.simulator.process.stop()
        assert ledger["violations"] == []
        charged = {entry["key"]: entry["charged"] for entry in ledger["keys"]}
        for request in ledger["requests"]:
            if request.get("socket") and request["path_and_query"].split("?")[0] in UNTOLD and request["charged"]:
                charged[request["socket"]["payer"]] -= request["charged"]
        spent = self.keychoir.spent()
        booked = {key: spent.get(fingerprint(key), 0) for key in self.keys}
        assert booked == charged
        return ledger
