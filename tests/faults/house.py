"""Keychoir before a simulated ElevenLabs, as the fault scripts start them."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import tempfile
import urllib.request

KEYS = [f"sk_faults_key_number_{number}" for number in range(3)]


def start(arguments, stream, pattern, files_max=None, **environment):
    """Starts a program and waits for the line that says where it listens."""
    limit = files_max and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max)))
    child = subprocess.Popen(
        arguments,
        env={**os.environ, **environment},
        text=True,
        preexec_fn=limit,
        **{stream: subprocess.PIPE},
    )
    for line in getattr(child, stream):
        found = re.search(pattern, line)
        if found:
            return child, found.group(1)
    raise SystemExit(f"{arguments} did not start")


@contextlib.contextmanager
def house(binary, files_max=None, before=(), **settings):
    """Both programs, Keychoir's behind the words `before`; yields Keychoir's process, its port, and the simulator's URL."""
    given = [word for key in KEYS for word in ("--key", f"{key}=1000000000")]
    with tempfile.TemporaryDirectory() as folder:
        simulator, upstream = start([binary, "simulate", "--listen", "127.0.0.1:0", *given], "stdout", r"(http://\S+)")
        keychoir, port = start(
            [*before, binary, "serve", "--listen", "127.0.0.1:0"],
            "stderr",
            r"Server started at http://127\.0\.0\.1:(\d+)",
            files_max,
            **{
                "ELEVENLABS_API_KEYS": ",".join(KEYS),
                "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
                "KEYCHOIR_STORAGE__PATH": os.path.join(folder, "keychoir.db"),
                "KEYCHOIR_LOG__FORMAT": "json",
                "KEYCHOIR_LOG__LEVEL": "error,keychoir::cli=info",
                "KEYCHOIR_QUOTA_POLLING__ENABLED": "false",
                **settings,
            },
        )
        try:
            yield keychoir, int(port), upstream
        finally:
            for child in (keychoir, simulator):
                child.send_signal(signal.SIGTERM)
                child.wait(60)


def memory(process, field="VmRSS"):
    """Bytes of a process: VmRSS now, VmHWM at the most."""
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def processor_seconds(process):
    with open(f"/proc/{process.pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def requests(upstream):
    """Requests that the provider has seen."""
    with urllib.request.urlopen(f"{upstream}/_simulator/ledger") as answer:
        return json.load(answer)["totals"]["requests"]


def fault(upstream, key, **what):
    """Sets a key's faults: next=[...] or always="..."."""
    urllib.request.urlopen(f"{upstream}/_simulator/faults", json.dumps({"key": key, **what}).encode()).read()
