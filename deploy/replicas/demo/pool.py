"""Starts the parts of the demo: the simulated ElevenLabs, and replicas of Keychoir and HAProxy with the configuration
files in `deploy/replicas`."""

import http.client
import json
import os
import re
import shutil
import socket
import time
from dataclasses import dataclass

from processes import Failure, wait_until

# The folder of the configuration files.
FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKEN = "kc_demo_token_of_the_replicas_0001"
SPEECH_PATH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM"


def get(port, path):
    """Requests `path` from a server on this machine. Returns the status and the JSON document."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


class Provider:
    """The simulated ElevenLabs. It charges a speech request on receipt, and sends the response after `delay`.
    ElevenLabs also charges a request before it sends the response."""

    def __init__(self, processes, binary, keys, delay):
        arguments = [argument for key, credits in keys.items() for argument in ("--key", f"{key}={credits}")]
        fault = f"*@POST {SPEECH_PATH}:slow_head={delay}"
        process = processes.start(
            "simulator", [binary, "simulate", "--listen", "127.0.0.1:0", *arguments, "--fault", fault]
        )
        self.keys = list(keys)
        self.url = process.wait_for_output(re.compile(r"Simulated ElevenLabs at (http://\S+)\n"))
        self.port = int(self.url.rpartition(":")[2])

    def ledger(self):
        """Returns the simulator's document of requests and charges."""
        return get(self.port, "/_simulator/ledger")[1]


@dataclass
class Kill:
    """The times before and after a replica was killed, in seconds by the monotonic clock."""

    started_at: float
    ended_at: float


class Replica:
    """A replica of Keychoir with its own folder, database and port."""

    def __init__(self, processes, binary, name, provider, redis_url, settings=None):
        self.name = name
        self._processes = processes
        self._arguments = [binary, "serve"]
        folder = processes.path(name)
        os.mkdir(folder, 0o700)
        shutil.copy(os.path.join(FOLDER, "keychoir.toml"), folder)
        for file, text in (("app_token", TOKEN), ("redis_url", redis_url)):
            with open(os.open(os.path.join(folder, file), os.O_WRONLY | os.O_CREAT, 0o600), "w") as secret:
                secret.write(text + "\n")
        self.database = os.path.join(folder, "keychoir.db")
        # The addresses and paths on this machine, and the settings of the log that the demo reads.
        self._environment = {
            "KEYCHOIR_CONFIG": os.path.join(folder, "keychoir.toml"),
            "KEYCHOIR_STORAGE__PATH": self.database,
            "KEYCHOIR_UPSTREAM__BASE_URL": provider.url,
            "KEYCHOIR_LOG__FORMAT": "json",
            "KEYCHOIR_LOG__LEVEL": "warn,keychoir::cli=info",
            # HAProxy keeps idle connections open, and the demo need not wait for them at its end.
            "KEYCHOIR_SERVER__DRAIN_IDLE_TIMEOUT": "0s",
            "ELEVENLABS_API_KEYS": ",".join(provider.keys),
            **(settings or {}),
        }
        has_started = lambda process, _: '"event":"server_started"' in process.read_output()
        self.process, self.port = processes.start_on_free_port(self._start, has_started)

    def _start(self, port):
        return self._processes.start(self.name, [*self._arguments, "--listen", f"127.0.0.1:{port}"], self._environment)

    def kill(self):
        """Sends SIGKILL and waits for the end."""
        started_at = time.monotonic()
        self.process.kill()
        return Kill(started_at, time.monotonic())

    def restart(self):
        """Starts a killed replica again, with its database and its port."""
        self.process = self._start(self.port)
        self.process.wait_for_output(re.compile(r'"event":"(server_started)"'))

    def readiness(self):
        """Returns the document of `/readyz`."""
        return get(self.port, "/readyz")[1]

    def wait_until_shared(self):
        """Waits until the replica shares its pool through Redis."""

        def is_shared():
            document = self.readiness()
            if "shared" not in document:
                raise Failure(f"/readyz of replica {self.name} does not report a shared pool: {document}")
            return document["status"] == "ready" and document["shared"] == "connected"

        wait_until(f"replica {self.name} to share the pool", is_shared)


def start_haproxy(processes, replicas):
    """Starts HAProxy in front of the replicas. Returns its port."""
    with open(os.path.join(FOLDER, "haproxy.cfg"), encoding="utf-8") as file:
        config = file.read()
    listener = socket.create_server(("127.0.0.1", 0))
    environment = {"KEYCHOIR_BIND": f"fd@{listener.fileno()}"}
    for replica in replicas:
        variable = f"KEYCHOIR_REPLICA_{replica.name.upper()}"
        environment[variable] = f"127.0.0.1:{replica.port}"
        if variable not in config:
            # The servers are the last lines of the file.
            config += f'    server {replica.name} "${{{variable}}}"\n'
    path = processes.path("haproxy.cfg")
    with open(path, "w", encoding="utf-8") as file:
        file.write(config)
    haproxy = processes.start("haproxy", ["haproxy", "-db", "-f", path], environment, [listener.fileno()])
    port = listener.getsockname()[1]
    listener.close()

    def is_ready():
        if haproxy.has_exited():
            raise Failure(f"HAProxy exited:\n{haproxy.read_output()}")
        try:
            return get(port, "/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    wait_until("HAProxy to forward requests", is_ready)
    return port
