"""Starts Keychoir with the simulator as its provider, for the fault scripts in this directory. Reads the memory and the
processor time of a process from `/proc`, and reads the number of requests and sets faults at the simulator."""

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


def start_program(arguments, stream, pattern, max_files=None, **environment):
    """Starts a program, and waits for a line of its output `stream` that matches `pattern`. `max_files` is the limit of
    open files. Returns the process and the first group of the match."""
    set_limit = max_files and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files)))
    child = subprocess.Popen(
        arguments,
        env={**os.environ, **environment},
        text=True,
        preexec_fn=set_limit,
        **{stream: subprocess.PIPE},
    )
    for line in getattr(child, stream):
        match = re.search(pattern, line)
        if match:
            return child, match.group(1)
    raise SystemExit(f"{arguments} did not start")


@contextlib.contextmanager
def start_proxy(binary, max_files=None, before=(), keys=KEYS, **settings):
    """Starts the simulator and Keychoir with these keys. `before` contains the start of the command line, such as a
    call of strace, and `settings` environment variables of Keychoir. Yields the process and the port of Keychoir, and
    the URL of the simulator. Stops both programs at the end."""
    key_arguments = [argument for key in keys for argument in ("--key", f"{key}=1000000000")]
    with tempfile.TemporaryDirectory() as directory:
        simulate = [binary, "simulate", "--listen", "127.0.0.1:0", *key_arguments]
        simulator, upstream = start_program(simulate, "stdout", r"(http://\S+)")
        keychoir, port = start_program(
            [*before, binary, "serve", "--listen", "127.0.0.1:0"],
            "stderr",
            r"Server started at http://127\.0\.0\.1:(\d+)",
            max_files,
            **{
                "ELEVENLABS_API_KEYS": ",".join(keys),
                "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
                "KEYCHOIR_STORAGE__PATH": os.path.join(directory, "keychoir.db"),
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


def memory_bytes(process, field="VmRSS"):
    """Returns the resident memory of a process. The field `VmRSS` is the current value, and `VmHWM` is the peak."""
    with open(f"/proc/{process.pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def processor_seconds(process):
    """Returns the processor time of a process since its start."""
    with open(f"/proc/{process.pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    # The fields `utime` and `stime`.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def request_count(upstream):
    """Returns the number of requests that the simulator has received."""
    with urllib.request.urlopen(f"{upstream}/_simulator/ledger") as response:
        return json.load(response)["totals"]["requests"]


def set_faults(upstream, key, **faults):
    """Sets the faults of a key at the simulator. `next=[...]` applies to the next requests, one fault for each, and
    `always="..."` to all requests."""
    urllib.request.urlopen(f"{upstream}/_simulator/faults", json.dumps({"key": key, **faults}).encode()).read()
