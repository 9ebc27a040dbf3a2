"""Compares programs that were built with different profiles: their size, their processor time and duration per request,
the duration of their start, and their memory.

    python profiles.py PROGRAM…

Each program forwards the same requests, one after the other, to a simulated provider, which the last program runs. Of
several rounds, the one with the least processor time is printed. The
processor time of the proxy is read from `/proc`, which exists only on Linux, and does not include this script.
"""

import contextlib
import http.client
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

KEY = "sk_profiles_key_number_0"
SPEECH_PATH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM"
SPEECH_BODY = json.dumps({"text": "Hello.", "model_id": "eleven_flash_v2_5"})
HEADERS = {"xi-api-key": "anything", "content-type": "application/json"}
WARM_UP_REQUESTS = 200
REQUESTS = 3000
ROUNDS = 3


@contextlib.contextmanager
def start_program(program, *arguments, stream, pattern, environment):
    """Starts a program, and waits for a line of `stream` that matches `pattern`. Yields the process and the first group
    of the match."""
    command = [str(program), *arguments]
    child = subprocess.Popen(command, env=environment, text=True, **{stream: subprocess.PIPE})
    try:
        for line in getattr(child, stream):
            if match := re.search(pattern, line):
                break
        else:
            sys.exit(f"{command} ended with {child.wait()}")
        # The further output must be read, so that the program never blocks on a full pipe.
        subprocess.Popen(["cat"], stdin=getattr(child, stream), stdout=subprocess.DEVNULL)
        yield child, match.group(1)
    finally:
        child.terminate()
        child.wait()


def processor_seconds(process):
    """Returns the processor time of a process since its start."""
    fields = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    # The fields `utime` and `stime`.
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_megabytes(process):
    """Returns the memory of a process in RAM."""
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024 / 1e6


def send_requests(address, count):
    """Sends requests for speech one after the other on one connection."""
    connection = http.client.HTTPConnection(address)
    for _ in range(count):
        connection.request("POST", SPEECH_PATH, body=SPEECH_BODY, headers=HEADERS)
        response = connection.getresponse()
        response.read()
        assert response.status == 200, f"the request must be served, not refused with {response.status}"
    connection.close()


def measure(program, upstream, directory):
    """Returns the processor time and the duration of a request in microseconds, the duration of the start in
    milliseconds, and the memory in megabytes."""
    environment = {
        "ELEVENLABS_API_KEYS": KEY,
        "KEYCHOIR_SERVER__LISTEN": "127.0.0.1:0",
        "KEYCHOIR_STORAGE__PATH": str(directory / "keychoir.db"),
        "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
        "XDG_CONFIG_HOME": str(directory),
    }
    started_at, pattern = time.monotonic(), r"Server started at http://([\d.]+:\d+)"
    with start_program(program, stream="stderr", pattern=pattern, environment=environment) as (proxy, address):
        startup = time.monotonic() - started_at
        send_requests(address, WARM_UP_REQUESTS)
        used_before, sent_at = processor_seconds(proxy), time.monotonic()
        send_requests(address, REQUESTS)
        used, elapsed = processor_seconds(proxy) - used_before, time.monotonic() - sent_at
        return used / REQUESTS * 1e6, elapsed / REQUESTS * 1e6, startup * 1e3, resident_megabytes(proxy)


def main():
    programs = [pathlib.Path(name).resolve() for name in sys.argv[1:]] or sys.exit(__doc__)
    simulate = ["simulate", "--listen", "127.0.0.1:0", "--key", f"{KEY}=1000000000"]
    with start_program(programs[-1], *simulate, stream="stdout", pattern=r"(http://\S+)", environment={}) as (_, upstream):
        for program in programs:
            rounds = []
            for _ in range(ROUNDS):
                with tempfile.TemporaryDirectory() as directory:
                    rounds.append(measure(program, upstream, pathlib.Path(directory)))
            processor, elapsed, startup, memory = min(rounds)
            size = program.stat().st_size / 1e6
            print(f"{program}: {size:.1f} MB")
            print(f"{processor:9.0f} us  of processor time for a request, {elapsed:.0f} us from its start to its end")
            print(f"{startup:9.0f} ms  from the start to the first accepted request, then {memory:.0f} MB of memory")


if __name__ == "__main__":
    main()
