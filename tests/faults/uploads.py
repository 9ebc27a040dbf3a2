"""Tests refusals before, during and after uploads of 10 KB to 1 GB, with a content length and chunked.

The simulator refuses each upload with two keys, and must receive the complete body with the third key. The refusals
have the statuses 401, 402, 403 and 429. The memory of Keychoir must never exceed its idle memory by more than 64 MiB.
The script prints a table with a row for each upload. The exit code is 1 if a row fails. The script needs Linux, Python
and the built `keychoir` binary. LARGEST_MB excludes larger uploads:

    python3 tests/faults/uploads.py target/release/keychoir [LARGEST_MB]
"""

import hashlib
import json
import re
import socket
import sys

from proxy_process import KEYS, memory_bytes, request_count, set_faults, start_proxy

# The statuses of the refusals, and the faults of the simulator that cause them.
REFUSALS = {"401": "quota", "402": "insufficient_credits", "403": "quota_403", "429": "rate_limit"}
SIZES = [10_000, 200_000, 2_000_000, 32_000_000, 1_000_000_000]
CHUNK = bytes(range(251)) * 1_000
MAX_ADDED_BYTES = 64 * 1024 * 1024


def chunks(size):
    """Yields `size` bytes in chunks."""
    while size > 0:
        yield CHUNK[:size]
        size -= len(CHUNK)


def upload(port, size, is_chunked):
    """Sends a body as fast as possible. Returns the status, and the JSON document in which the simulator describes the
    received body, or an empty one if the response contains none."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        length = "transfer-encoding: chunked" if is_chunked else f"content-length: {size}"
        head = f"POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{length}\r\n\r\n"
        connection.sendall(head.encode())
        for chunk in chunks(size):
            connection.sendall(b"%x\r\n%b\r\n" % (len(chunk), chunk) if is_chunked else chunk)
        if is_chunked:
            connection.sendall(b"0\r\n\r\n")
        response = b"".join(iter(lambda: connection.recv(65_536), b""))
    echo = re.search(rb"\{.*\}", response, re.S)
    return int(response.split()[1]), json.loads(echo.group()) if echo else {}


def main(binary, max_size):
    settings = {
        # Refused keys are usable again after a millisecond, so that every upload uses them.
        "KEYCHOIR_POOL__EXHAUSTED_COOLDOWN": "1ms",
        "KEYCHOIR_POOL__RATE_LIMITED_COOLDOWN": "1ms",
        "KEYCHOIR_POOL__UNPROVEN_COOLDOWN": "1ms",
    }
    with start_proxy(binary, **settings) as (keychoir, port, upstream):
        failed_row_count = run_uploads(keychoir, port, upstream, [size for size in SIZES if size <= max_size])
    print(f"{failed_row_count} rows failed")
    return min(failed_row_count, 1)


def run_uploads(keychoir, port, upstream, sizes):
    """Runs the uploads and prints the table. Returns the number of failed rows."""
    idle_bytes, failed_row_count = memory_bytes(keychoir), 0
    print(f"idle memory {idle_bytes // 1024} KiB\n{'status':>6} {'moment':>6} {'framing':>8} {'bytes':>13}  result")
    for size in sizes:
        sha256 = hashlib.sha256()
        for chunk in chunks(size):
            sha256.update(chunk)
        for status, refusal in REFUSALS.items():
            for moment, prefix in {"before": "early:", "during": f"mid={size // 2}:", "after": ""}.items():
                for framing in ("length", "chunked"):
                    for key in KEYS[:2]:
                        set_faults(upstream, key, next=[prefix + refusal])
                    count_before = request_count(upstream)
                    received_status, echo = upload(port, size, framing == "chunked")
                    added_bytes = memory_bytes(keychoir, "VmHWM") - idle_bytes
                    is_complete = (received_status, echo.get("body_sha256")) == (200, sha256.hexdigest())
                    used_all_keys = request_count(upstream) - count_before == 3
                    is_ok = is_complete and used_all_keys and added_bytes <= MAX_ADDED_BYTES
                    failed_row_count += not is_ok
                    outcome = f"{received_status} {'ok' if is_ok else 'FAILED'}, {added_bytes // 1024} KiB above idle"
                    print(f"{status:>6} {moment:>6} {framing:>8} {size:>13,}  {outcome}", flush=True)
    return failed_row_count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) * 1_000_000 if len(sys.argv) > 2 else max(SIZES)))
