"""Tests the usage database on a disk that is full, read-only or failing. In each case, `/readyz` must report that the
store fails and recovers, and no request and no usage record may be lost.

The script prints the measurements of each case. The exit code is 1 if a case fails. Two cases fill or remount a tmpfs,
and are skipped if it cannot be mounted. The other cases inject errors into system calls, and are skipped if `strace` is
not installed. The script needs Linux, Python and the built `keychoir` binary:

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

from proxy_process import start_proxy

BODY = json.dumps({"text": "a" * 7, "model_id": "eleven_v3"}).encode()
SPEECH_PATH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM"
RECOVERY_TIMEOUT_SECONDS = 30

failed_case_count = 0


def report(case, is_ok, measured):
    """Prints the measurements of a case, and counts the case if it failed."""
    global failed_case_count
    failed_case_count += not is_ok
    print(f"{'ok' if is_ok else 'FAILED':>6}  {case}: {measured}", flush=True)


def request_speech(port, count):
    """Sends `count` requests for speech on four connections. Returns the number of responses with status 200."""

    def send_requests(request_count):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        served = 0
        for _ in range(request_count):
            connection.request("POST", SPEECH_PATH, BODY, {"content-type": "application/json"})
            response = connection.getresponse()
            response.read()
            served += response.status == 200
        return served

    with concurrent.futures.ThreadPoolExecutor(4) as clients:
        return sum(clients.map(send_requests, [count // 4] * 4))


def read_readiness(port):
    """Returns the document of `/readyz`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/readyz")
    return json.load(connection.getresponse())


def wait_for_store_state(port, state):
    """Waits until `/readyz` reports this state of the store. Returns False after the timeout."""
    deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if read_readiness(port)["store"] == state:
            return True
        time.sleep(0.05)
    return False


def read_database(path):
    """Returns the result of the integrity check, the number of recorded attempts, and the number of attempts in the
    hourly sums."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        integrity = database.execute("PRAGMA integrity_check").fetchone()[0]
        attempts, summed = database.execute(
            "SELECT (SELECT count(*) FROM attempts), (SELECT sum(attempts) FROM hours)"
        ).fetchone()
    return integrity, attempts, summed


def check_records(case, path, served, sent, was_failing, has_recovered, lost):
    """Reports a case. It passes if each sent request was served and recorded, if the store failed and recovered, and if
    the database is intact and was not replaced."""
    integrity, attempts, summed = read_database(path)
    quarantined = [name for name in os.listdir(os.path.dirname(path)) if ".broken-" in name]
    is_ok = (integrity, attempts, summed, served, lost, quarantined) == ("ok", sent, sent, sent, 0, [])
    summary = f"{served} of {sent} served, {attempts} written, {lost} lost, integrity {integrity}"
    summary += f", failing {was_failing}, recovered {has_recovered}"
    report(case, is_ok and was_failing and has_recovered, summary)


@contextlib.contextmanager
def tmpfs(size):
    """Mounts a tmpfs, a file system in memory. Yields its directory, or None if it cannot be mounted."""
    with tempfile.TemporaryDirectory() as directory:
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], capture_output=True)
        if mount.returncode:
            yield None
            return
        try:
            yield directory
        finally:
            subprocess.run(["umount", directory], check=True)


def test_full_disk(binary):
    """Fills the disk between requests, and then enlarges it."""
    with tmpfs("1m") as directory:
        if directory is None:
            print("     -  a full disk: skipped, because a tmpfs cannot be mounted")
            return
        path = os.path.join(directory, "keychoir.db")
        with start_proxy(binary, KEYCHOIR_STORAGE__PATH=path, KEYCHOIR_SERVER__TLS="off") as (_, port, _):
            served = request_speech(port, 40)
            ballast = os.path.join(directory, "ballast")
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4_096))
            served += request_speech(port, 2_000)
            was_failing = wait_for_store_state(port, "failing")
            os.remove(ballast)
            # Removing the ballast frees too little space for the write-ahead log, so the file system is enlarged.
            subprocess.run(["mount", "-o", "remount,size=64m", directory], check=True)
            has_recovered = wait_for_store_state(port, "ok")
            served += request_speech(port, 40)
            lost = read_readiness(port)["recordsLost"]
        check_records("a full disk", path, served, 2_080, was_failing, has_recovered, lost)


def test_read_only_disk(binary):
    """Starts Keychoir on a read-only disk, and then makes the disk writable."""
    with tmpfs("64m") as directory:
        if directory is None:
            print("     -  a read-only disk: skipped, because a tmpfs cannot be mounted")
            return
        path = os.path.join(directory, "state", "keychoir.db")
        subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
        with start_proxy(binary, KEYCHOIR_STORAGE__PATH=path, KEYCHOIR_SERVER__TLS="off") as (_, port, _):
            served = request_speech(port, 200)
            was_failing = wait_for_store_state(port, "failing")
            subprocess.run(["mount", "-o", "remount,rw", directory], check=True)
            has_recovered = wait_for_store_state(port, "ok")
            served += request_speech(port, 40)
            lost = read_readiness(port)["recordsLost"]
        check_records("a read-only disk at the start", path, served, 240, was_failing, has_recovered, lost)


def test_failing_calls(binary, case, call, error, when):
    """Starts Keychoir under strace, which makes some system calls fail with `error`. `call` contains the names of the
    system calls, and `when` the range of their invocations that fail, counted per thread."""
    if not shutil.which("strace"):
        print(f"     -  {case}: skipped, because strace is not installed")
        return
    inject = f"inject={call}:error={error}:when={when}"
    strace = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e", inject]
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "keychoir.db")
        settings = {"KEYCHOIR_STORAGE__PATH": path, "KEYCHOIR_SERVER__TLS": "off"}
        with start_proxy(binary, before=strace, **settings) as (_, port, _):
            served, sent, was_failing = 0, 0, False
            # Requests are sent until the injected errors have occurred.
            while not was_failing and sent < 4_000:
                served, sent = served + request_speech(port, 40), sent + 40
                was_failing = read_readiness(port)["store"] == "failing"
            has_recovered = wait_for_store_state(port, "ok")
            served, sent = served + request_speech(port, 40), sent + 40
            lost = read_readiness(port)["recordsLost"]
        check_records(case, path, served, sent, was_failing, has_recovered, lost)


def main(binary):
    test_full_disk(binary)
    test_read_only_disk(binary)
    # The ranges begin after the calls at the start of Keychoir, and include the retries of its writer.
    test_failing_calls(binary, "a disk that does not flush", "fsync,fdatasync", "EIO", "30..33")
    test_failing_calls(binary, "a disk that does not write", "pwrite64", "EIO", "120..126")
    test_failing_calls(binary, "a disk that is full for a while", "pwrite64", "ENOSPC", "120..126")
    sys.exit(failed_case_count > 0)


if __name__ == "__main__":
    main(os.path.abspath(sys.argv[1]))
