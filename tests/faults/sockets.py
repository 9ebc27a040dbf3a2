"""Tests WebSocket sessions with misbehaving clients: 2,000 concurrent clients in each of three rounds.

Some clients are silent, some never read, some disconnect within a frame or a handshake, some send invalid frames, some
are killed, and 300 behave regularly. Keychoir must serve the regular clients, limit its memory per session, and release
the resources of all sessions. The script prints its measurements and limits. The exit code is 1 if a case fails. The
script needs Linux, Python and the built `keychoir` binary, and takes less than a minute. The environment variable
`FAULTS_SEED` changes its random choices:

    python3 tests/faults/sockets.py target/release/keychoir

The script starts itself with `--clients` as the process of the clients that are killed.
"""

import asyncio
import contextlib
import os
import random
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request

from proxy_process import memory_bytes, start_proxy

ECHO_PATH = "/v1/something/new"
SPEECH_PATH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input"
CONTEXTS_PATH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/multi-stream-input"
TRANSCRIPTION_PATH = "/v1/speech-to-text/realtime?model_id=scribe_v2_realtime&audio_format=pcm_16000"
ROUND_COUNT = 3
IDLE_SECONDS = 8
# The maximum memory of a session: the default of `websocket.max_buffered_message_size` in each direction.
MAX_SESSION_BYTES = 2 * 256 * 1024
# The maximum memory that Keychoir retains after a round, and the maximum growth of this memory per round.
MAX_RETAINED_BYTES = 48 * 1024 * 1024
MAX_GROWTH_PER_ROUND = 5 * 1024 * 1024
KIB, MIB = 1024, 1024 * 1024

# The opcodes of frames.
CONTINUATION, TEXT, BINARY, CLOSE, PING = 0, 1, 2, 8, 9

failed_case_count = 0


def report(case, is_ok, measured):
    """Prints the measurements of a case, and counts the case if it failed."""
    global failed_case_count
    failed_case_count += not is_ok
    print(f"{'ok' if is_ok else 'FAILED':>6}  {case}: {measured}", flush=True)


def frame_header(opcode, length, is_final=True, is_masked=True, reserved=0):
    """Encodes the header of a frame. The mask of a masked frame consists of zeros, so that it changes no payload."""
    masked = 0x80 if is_masked else 0
    start = bytes([(0x80 if is_final else 0) | reserved << 4 | opcode])
    if length < 126:
        start += bytes([masked | length])
    elif length < 65_536:
        start += bytes([masked | 126]) + struct.pack(">H", length)
    else:
        start += bytes([masked | 127]) + struct.pack(">Q", length)
    return start + (bytes(4) if is_masked else b"")


def frame(opcode, payload, **options):
    """Encodes a frame with its payload."""
    return frame_header(opcode, len(payload), **options) + payload


def text_frame(length):
    """Encodes a text message of `length` bytes. Keychoir buffers it until it is complete, because it may contain
    credentials."""
    return frame(TEXT, b'{"text":"' + b"a" * (length - 11) + b'"}')


class Client:
    """A WebSocket client. It uses no WebSocket library, because a library would prevent protocol violations."""

    def __init__(self, port):
        self.port = port
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.buffer = b""

    async def connect(self, path, only_half_handshake=False):
        """Opens a session, or only sends a handshake without its empty last line. Returns the client."""
        await self.loop.sock_connect(self.socket, ("127.0.0.1", self.port))
        request = (
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
            "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        ).encode()
        await self.send(request if only_half_handshake else request + b"\r\n")
        if only_half_handshake:
            return self
        while b"\r\n\r\n" not in self.buffer:
            await self.receive()
        response, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        assert response.startswith(b"HTTP/1.1 101 "), response
        return self

    async def send(self, data):
        await self.loop.sock_sendall(self.socket, data)

    async def receive(self):
        data = await self.loop.sock_recv(self.socket, 64 * KIB)
        if not data:
            raise EOFError
        self.buffer += data

    async def receive_frame(self):
        """Receives a frame without a mask and of less than 64 KiB. Returns its opcode and its payload."""
        while True:
            if len(self.buffer) >= 4:
                length, header_length = self.buffer[1], 2
                if length == 126:
                    (length,), header_length = struct.unpack(">H", self.buffer[2:4]), 4
                end = header_length + length
                if len(self.buffer) >= end:
                    received, self.buffer = self.buffer[:end], self.buffer[end:]
                    return received[0] & 15, received[header_length:]
            await self.receive()

    async def echoes_and_closes(self):
        """Sends a message and a close frame. Returns whether the client receives the same message and a close frame."""
        sent = b'{"text":"%d"}' % random.randrange(10**9)
        await self.send(frame(TEXT, sent))
        received = await asyncio.wait_for(self.receive_frame(), 20)
        await self.send(frame(CLOSE, b"\x03\xe8"))
        return received == (TEXT, sent) and (await asyncio.wait_for(self.receive_frame(), 20))[0] == CLOSE

    async def receive_close(self, timeout):
        """Receives frames until the connection ends. Returns the code of the last close frame, or None if there was none.
        Raises TimeoutError if the connection does not end within `timeout` seconds."""
        code = None

        async def receive_frames():
            nonlocal code
            while True:
                opcode, payload = await self.receive_frame()
                if opcode == CLOSE:
                    code = int.from_bytes(payload[:2], "big")

        try:
            await asyncio.wait_for(receive_frames(), timeout)
        except TimeoutError:
            # TimeoutError is a subclass of OSError, which is ignored below.
            raise
        except (EOFError, OSError):
            pass
        return code

    def reset(self):
        """Resets the connection without a close frame."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def open_clients(port, count, *paths, only_half_handshake=False):
    """Opens `count` clients on `paths` in rotation, or on the echo path if there are no paths. At most a hundred
    clients connect concurrently."""
    slots, paths = asyncio.Semaphore(100), paths or [ECHO_PATH]

    async def open_client(number):
        async with slots:
            return await Client(port).connect(paths[number % len(paths)], only_half_handshake)

    return await asyncio.gather(*map(open_client, range(count)))


async def run_for_each(clients, operation):
    """Runs `operation` for all clients at the same time. Returns its results, without those of clients whose
    connections failed, which is expected."""
    results = await asyncio.gather(*(operation(client) for client in clients), return_exceptions=True)
    errors = [result for result in results if isinstance(result, Exception)]
    unexpected_errors = [error for error in errors if not isinstance(error, (OSError, EOFError))]
    assert not unexpected_errors, unexpected_errors[0]
    return [result for result in results if not isinstance(result, Exception)]


def metric_sum(port, name):
    """Returns the sum of all series of a metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        values = re.findall(rf"^keychoir_{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.M)
    assert values, f"the metrics must contain {name}"
    return sum(map(float, values))


async def wait_until(condition, seconds):
    """Waits at most `seconds` for a condition. Returns the duration, or None if the condition did not hold in time."""
    started_at = time.perf_counter()
    while not condition():
        if time.perf_counter() - started_at > seconds:
            return None
        await asyncio.sleep(0.1)
    return time.perf_counter() - started_at


async def send_without_reading(keychoir, clients):
    """Sends as much as possible without reading, and reports the memory of Keychoir per session. Most of the data must
    stay in the socket buffers of the kernel."""
    bytes_before = memory_bytes(keychoir)
    # Text messages are buffered until they are complete, and binary messages are forwarded immediately.
    binary_message = frame(BINARY, b"s" * MIB)
    messages = [text_frame(200 * KIB), binary_message, text_frame(16 * KIB), text_frame(600 * KIB), text_frame(500)]
    sent_bytes = [0] * len(clients)

    async def flood(number, client):
        # The last clients request speech, whose responses are larger than the requests.
        message = messages[min(number // 20, 4)]
        while True:
            await client.loop.sock_sendall(client.socket, message)
            sent_bytes[number] += len(message)

    flood_tasks = [asyncio.create_task(flood(number, client)) for number, client in enumerate(clients)]
    peak_bytes, last_sum, unchanged_count = 0, -1, 0
    # The loop ends when no client has sent data for a second.
    while unchanged_count < 10:
        await asyncio.sleep(0.1)
        peak_bytes = max(peak_bytes, memory_bytes(keychoir) - bytes_before)
        last_sum, unchanged_count = sum(sent_bytes), unchanged_count + 1 if sum(sent_bytes) == last_sum else 0
    for task in flood_tasks:
        task.cancel()
    bytes_per_session = peak_bytes // len(clients)
    report(
        f"{len(clients)} clients that never read",
        bytes_per_session <= MAX_SESSION_BYTES,
        f"{bytes_per_session // KIB} KiB per session at the peak, at most {MAX_SESSION_BYTES // KIB} allowed, "
        f"{sum(sent_bytes) // MIB} MiB sent",
    )


async def disconnect_within_a_frame(clients):
    """Sends an incomplete frame with each client, and then resets or closes the connection."""
    incomplete_frames = [
        frame_header(TEXT, 1_000)[:3],
        frame_header(TEXT, 100_000) + b'{"text":"half',
        frame_header(BINARY, 2**40) + bytes(5_000),
        frame_header(TEXT, 2**40) + b'{"text":"' + b"a" * 400_000,
        frame_header(PING, 50) + b"half",
        frame(TEXT, b'{"text":', is_final=False) + frame_header(CONTINUATION, 100) + b'"half',
        frame_header(CLOSE, 2) + b"\x03",
    ]

    async def send_and_disconnect(client):
        await client.send(random.choice(incomplete_frames))
        if random.random() < 0.5:
            client.reset()
        else:
            client.socket.close()

    await run_for_each(clients, send_and_disconnect)


async def send_invalid_frames(clients):
    """Sends an invalid frame or random bytes with each client. Half of the clients then disconnect, and the others wait
    until Keychoir ends the session or the timeout expires. Returns one element for each client without an error."""
    invalid_frames = [
        frame(3, b"reserved"),
        frame(11, b"reserved"),
        frame(TEXT, b'{"text":"x"}', reserved=7),
        frame(TEXT, b'{"text":"x"}', is_masked=False),
        frame_header(TEXT, 2**63 - 1) + b'{"text":"' + bytes(1_000),
        frame_header(BINARY, 2**64 - 1) + bytes(1_000),
        frame_header(PING, 126) + bytes(200),
        frame_header(PING, 5, is_final=False) + bytes(5),
        frame(CONTINUATION, b"without a start"),
        frame(TEXT, b"\xff\xfe{}"),
        frame(TEXT, b"{" * 5_000),
        frame(CLOSE, b"\0"),
        frame(CLOSE, b"\x03\xe8\xff\xff"),
        b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(600),
    ]

    async def send_and_wait_for_end(client):
        index = random.randrange(len(invalid_frames) + 5)
        await client.send(invalid_frames[index] if index < len(invalid_frames) else random.randbytes(3_000))
        if random.random() < 0.5:
            # Keychoir may wait for the remaining bytes of a frame, so these clients disconnect.
            await asyncio.sleep(0.5)
            return client.socket.close()
        await client.receive_close(IDLE_SECONDS + 5)
        client.socket.close()

    return await run_for_each(clients, send_and_wait_for_end)


async def start_clients_to_kill(port, count):
    """Starts a process that opens `count` sessions. Returns the process when the sessions are open."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--clients", str(port), str(count)], stdout=subprocess.PIPE, text=True
    )
    first_line = await asyncio.to_thread(child.stdout.readline)
    assert first_line == "open\n", f"the process must open its sessions: {first_line}"
    return child


async def run_clients_to_kill(port, count):
    """Opens `count` sessions with an incomplete frame, and keeps them open until the process is killed."""
    clients = await open_clients(port, count)
    await run_for_each(clients, lambda client: client.send(text_frame(1_000) + frame_header(TEXT, 1_000)))
    print("open", flush=True)
    await asyncio.sleep(60)


async def run_round(keychoir, port):
    """Runs all cases once. Returns the memory of Keychoir afterwards."""
    bytes_before = memory_bytes(keychoir)
    killed_process = await start_clients_to_kill(port, 300)
    silent = await open_clients(port, 300, ECHO_PATH, SPEECH_PATH, TRANSCRIPTION_PATH)
    half_handshakes = await open_clients(port, 100, only_half_handshake=True)
    half_closed = await open_clients(port, 100)
    never_reading = await open_clients(port, 80) + await open_clients(port, 20, SPEECH_PATH)
    all_paths = (ECHO_PATH, SPEECH_PATH, CONTEXTS_PATH, TRANSCRIPTION_PATH)
    disconnecting, invalid = await open_clients(port, 400, *all_paths), await open_clients(port, 400, *all_paths)
    regular = await open_clients(port, 300)
    open_sessions, added_bytes = metric_sum(port, "websocket_sessions"), memory_bytes(keychoir) - bytes_before
    # The 100 clients with an incomplete handshake have no session.
    report("2,000 sessions", open_sessions == 1_900, f"{open_sessions:.0f} are open, {added_bytes / MIB:.1f} MiB")
    for client in half_closed:
        client.socket.shutdown(socket.SHUT_WR)
    receive_closes = (client.receive_close(IDLE_SECONDS + 10) for client in silent)
    silent_closes = asyncio.gather(*receive_closes, return_exceptions=True)
    invalid_task = asyncio.create_task(send_invalid_frames(invalid))
    await disconnect_within_a_frame(disconnecting)
    served = await run_for_each(regular, Client.echoes_and_closes)
    report("300 regular clients", sum(served) == 300, f"{sum(served)} of 300 were served")
    never_reading_task = asyncio.create_task(send_without_reading(keychoir, never_reading))
    await asyncio.sleep(1)
    killed_process.send_signal(signal.SIGKILL)
    killed_process.wait()
    await never_reading_task
    going_away_count = sum(code == 1001 for code in await silent_closes)
    ended_invalid_count = len(await invalid_task)
    report("300 silent clients", going_away_count == 300, f"{going_away_count} received 1001 after {IDLE_SECONDS} s")
    report("400 clients with invalid frames", ended_invalid_count == 400, f"{ended_invalid_count} sessions ended")
    for client in half_handshakes + half_closed + never_reading + regular:
        client.socket.close()
    count_open = lambda: (metric_sum(port, "websocket_sessions"), metric_sum(port, "requests_in_flight"))
    elapsed = await wait_until(lambda: count_open() == (0, 0), 15)
    open_sessions, active_requests = count_open()
    measured = f"{open_sessions:.0f} are open, {active_requests:.0f} active requests"
    report("after all clients disconnected", elapsed is not None, measured)
    served = await run_for_each(await open_clients(port, 50), Client.echoes_and_closes)
    report("50 new clients", sum(served) == 50, f"{sum(served)} of 50 were served")
    return memory_bytes(keychoir)


async def run_rounds(binary):
    """Runs all rounds with one Keychoir process. Reports the memory that it retains, and its exit code."""
    with start_proxy(binary, KEYCHOIR_WEBSOCKET__IDLE_TIMEOUT=f"{IDLE_SECONDS}s") as (keychoir, port, _):
        # The first sessions allocate memory that does not depend on the number of later sessions.
        assert all(await run_for_each(await open_clients(port, 300), Client.echoes_and_closes))
        baseline = memory_bytes(keychoir)
        retained = [await run_round(keychoir, port) - baseline for _ in range(ROUND_COUNT)]
        growth = (retained[-1] - retained[0]) / (ROUND_COUNT - 1)
        retained_mib = " then ".join(f"{retained_bytes / MIB:.1f}" for retained_bytes in retained)
        measured = f"{retained_mib} MiB more than {baseline / MIB:.0f} before"
        report("memory", max(retained) < MAX_RETAINED_BYTES and growth < MAX_GROWTH_PER_ROUND, measured)
    report("exit", keychoir.returncode == 0, f"exit code {keychoir.returncode}")


async def main(binary):
    started_at = time.perf_counter()
    random.seed(int(os.environ.get("FAULTS_SEED", "1")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    await run_rounds(binary)
    print(f"{failed_case_count} cases failed, {time.perf_counter() - started_at:.0f} s")
    return min(failed_case_count, 1)


if __name__ == "__main__":
    if sys.argv[1] == "--clients":
        asyncio.run(run_clients_to_kill(int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(asyncio.run(main(sys.argv[1])))
