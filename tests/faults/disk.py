"""The books on a disk that is full, read-only, or fails: no request and no record is lost for it.

Each case prints what it found; ends with 1 when one does not hold. Fills and remounts a tmpfs where
it may mount one, and has system calls fail where `strace` is installed; says so where not. Needs
nothing else but Python and the built program:

    python3 tests/faults/disk.py target/release/keychoir
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time

from house import house

BODY = json.dumps({"text": "a" * 7, "model_id": "eleven_v3"}).encode()
SPEECH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM"
RECOVERY_MAX = 30

failures = 0


def holds(case, is_so, measured):
    global failures
    failures += not is_so
    print(f"{'ok' if is_so else 'FAILED':>6}  {case}: {measured}", flush=True)


def speak(port, count):
    """So many requests, on four connections; how many were answered with 200."""

    def some(share):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        served = 0
        for _ in range(share):
            connection.request("POST", SPEECH, BODY, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            served += answer.status == 200
        return served

    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        return sum(clients.map(some, [count // 4] * 4))


def ready(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/readyz")
    return json.load(connection.getresponse())


def awaited(port, wanted):
    """Whether `/readyz` comes to say this of the books, within a bound."""
    until = time.monotonic() + RECOVERY_MAX
    while time.monotonic() < until:
        if ready(port)["store"] == wanted:
            return True
        time.sleep(0.05)
    return False


def written(path):
    with contextlib.closing(sqlite3.connect(path)) as books:
        integrity = books.execute("PRAGMA integrity_check").fetchone()[0]
        attempts, summed = books.execute(
            "SELECT (SELECT count(*) FROM attempts), (SELECT sum(attempts) FROM hours)"
        ).fetchone()
    return integrity, attempts, summed


def accounts(case, path, served, sent, was_failing, has_recovered, lost):
    integrity, attempts, summed = written(path)
    aside = [name for name in os.listdir(os.path.dirname(path)) if ".broken-" in name]
    is_so = (integrity, attempts, summed, served, lost, aside) == ("ok", sent, sent, sent, 0, [])
    said = f"{served} of {sent} served, {attempts} written, {lost} lost, integrity {integrity}"
    holds(case, is_so and was_failing and has_recovered, f"{said}, failing {was_failing}, recovered {has_recovered}")


@contextlib.contextmanager
def tmpfs(size):
    with tempfile.TemporaryDirectory() as folder:
        mounting = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True)
        if mounting.returncode:
            yield None
            return
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)


def full_disk(binary):
    with tmpfs("1m") as folder:
        if folder is None:
            print("     -  a full disk: no right to mount one")
            return
        path = os.path.join(folder, "keychoir.db")
        with house(binary, KEYCHOIR_STORAGE__PATH=path, KEYCHOIR_SERVER__TLS="off") as (_, port, _):
            served = speak(port, 40)
            ballast = os.path.join(folder, "ballast")
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4_096))
            served += speak(port, 2_000)
            was_failing = awaited(port, "failing")
            os.remove(ballast)
            # There is room again, but for few: the records are small, their log is not.
            subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
            has_recovered = awaited(port, "ok")
            served += speak(port, 40)
            lost = ready(port)["recordsLost"]
        accounts("a full disk", path, served, 2_080, was_failing, has_recovered, lost)


def read_only(binary):
    with tmpfs("64m") as folder:
        if folder is None:
            print("     -  a read-only disk: no right to mount one")
            return
        path = os.path.join(folder, "state", "keychoir.db")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with house(binary, KEYCHOIR_STORAGE__PATH=path, KEYCHOIR_SERVER__TLS="off") as (_, port, _):
            served = speak(port, 200)
            was_failing = awaited(port, "failing")
            subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
            has_recovered = awaited(port, "ok")
            served += speak(port, 40)
            lost = ready(port)["recordsLost"]
        accounts("a read-only disk at the start", path, served, 240, was_failing, has_recovered, lost)


def failing_calls(binary, case, call, error, when):
    if not shutil.which("strace"):
        print(f"     -  {case}: strace is not installed")
        return
    inject = f"inject={call}:error={error}:when={when}"
    strace = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "keychoir.db")
        settings = {"KEYCHOIR_STORAGE__PATH": path, "KEYCHOIR_SERVER__TLS": "off"}
        with house(binary, before=strace, **settings) as (_, port, _):
            served, sent, was_failing = 0, 0, False
            # Until the calls that fail have come.
            while not was_failing and sent < 4_000:
                served, sent = served + speak(port, 40), sent + 40
                was_failing = ready(port)["store"] == "failing"
            has_recovered = awaited(port, "ok")
            served, sent = served + speak(port, 40), sent + 40
            lost = ready(port)["recordsLost"]
        accounts(case, path, served, sent, was_failing, has_recovered, lost)


def main(binary):
    full_disk(binary)
    read_only(binary)
    # Counted by thread: the start takes some, and the next tries fail as well.
    failing_calls(binary, "a disk that does not flush", "fsync,fdatasync", "EIO", "30..33")
    failing_calls(binary, "a disk that does not write", "pwrite64", "EIO", "120..126")
    failing_calls(binary, "a disk that is full for a while", "pwrite64", "ENOSPC", "120..126")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
