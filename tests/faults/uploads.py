"""Refusals of every kind, before, while and after an upload, from 10 KB to 1 GB, chunked and not.

Each upload is refused by two keys and must be served by the third: status 200, every byte there,
once; and Keychoir's memory stays within 64 MiB of what it was before. Prints a table; ends with 1
when a row does not hold. Needs nothing but Python and the built program:

    python3 tests/faults/uploads.py target/release/keychoir [LARGEST_MB]
"""

import hashlib
import json
import re
import socket
import sys

from house import KEYS, fault, house, memory, requests

REFUSALS = {"401": "quota", "402": "insufficient_credits", "403": "quota_403", "429": "rate_limit"}
SIZES = [10_000, 200_000, 2_000_000, 32_000_000, 1_000_000_000]
PIECE = bytes(range(251)) * 1_000
MEMORY_MAX = 64 * 1024 * 1024


def pieces(size):
    while size > 0:
        yield PIECE[:size]
        size -= len(PIECE)


def upload(port, size, chunked):
    """Sends a body as fast as it is taken; returns the status and what the provider says it got."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        length = "transfer-encoding: chunked" if chunked else f"content-length: {size}"
        head = f"POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n{length}\r\n\r\n"
        connection.sendall(head.encode())
        for piece in pieces(size):
            connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
        if chunked:
            connection.sendall(b"0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    echo = re.search(rb"\{.*\}", answer, re.S)
    return int(answer.split()[1]), json.loads(echo.group()) if echo else {}


def main(binary, largest):
    settings = {
        # Refused keys come back at once, so that every upload finds them.
        "KEYCHOIR_POOL__EXHAUSTED_COOLDOWN": "1ms",
        "KEYCHOIR_POOL__RATE_LIMITED_COOLDOWN": "1ms",
    }
    with house(binary, **settings) as (keychoir, port, upstream):
        failures = table(keychoir, port, upstream, [size for size in SIZES if size <= largest])
    print(f"{failures} rows failed")
    return min(failures, 1)


def table(keychoir, port, upstream, sizes):
    idle, failures = memory(keychoir), 0
    print(f"idle memory {idle // 1024} KiB\n{'status':>6} {'when':>6} {'framing':>8} {'bytes':>13}  result")
    for size in sizes:
        sha256 = hashlib.sha256()
        for piece in pieces(size):
            sha256.update(piece)
        for status, refusal in REFUSALS.items():
            for when, prefix in {"before": "early:", "during": f"mid={size // 2}:", "after": ""}.items():
                for framing in ("length", "chunked"):
                    for key in KEYS[:2]:
                        fault(upstream, key, next=[prefix + refusal])
                    asked = requests(upstream)
                    got, echo = upload(port, size, framing == "chunked")
                    used = memory(keychoir, "VmHWM") - idle
                    is_whole = (got, echo.get("body_sha256")) == (200, sha256.hexdigest())
                    holds = is_whole and requests(upstream) - asked == 3 and used <= MEMORY_MAX
                    failures += not holds
                    result = f"{got} {'ok' if holds else 'FAILED'}, {used // 1024} KiB above idle"
                    print(f"{status:>6} {when:>6} {framing:>8} {size:>13,}  {result}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) * 1_000_000 if len(sys.argv) > 2 else max(SIZES)))
