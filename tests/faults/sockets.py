"""Tests WebSocket sessions with misbehaving clients: 2,000 concurrent sessions in each of three rounds.

Some clients are silent, some never read, some disconnect within a frame, some send invalid frames, and some are
killed. Keychoir must release the resources of all these sessions. The script prints its measurements and limits. The
exit code is 1 if a case fails. It needs only Python and the built `keychoir` binary, and takes less than a minute:

    python3 tests/faults/sockets.py target/release/keychoir
"""

import asyncio
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

from proxy_process import start_proxy, memory_bytes

ECHO = "/v1/something/new"
SPEECH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input"
CONTEXTS = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/multi-stream-input"
SCRIBE = "/v1/speech-to-text/realtime?model_id=scribe_v2_realtime&audio_format=pcm_16000"
ROUNDS = 3
IDLE_SECONDS = 8
# The maximum memory of a session: `websocket.max_buffered_message_size` in each direction.
MAX_SESSION_BYTES = 2 * 256 * 1024
# The memory that the allocator may retain after a round, and its maximum growth per round.
MAX_RETAINED_BYTES = 48 * 1024 * 1024
MAX_GROWTH_PER_ROUND = 5 * 1024 * 1024
KIB, MIB = 1024, 1024 * 1024

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9

failures = 0


def report(case, is_ok, measured):
    global failures
    failures += not is_ok
    print(f"{'ok' if is_ok else 'FAILED':>6}  {case}: {measured}", flush=True)


def frame_header(opcode, length, is_final=True, is_masked=True, reserved=0):
    """Encodes the header of a frame, with a mask of zeros."""
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
    return frame_header(opcode, len(payload), **options) + payload


def text_frame(length):
    """Encodes a text message. The proxy buffers it until it is complete, because it may contain credentials."""
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
        """Receives a provider frame. Returns its opcode and its payload."""
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

    async def is_echoed(self):
        """Sends a message and a close frame. Returns whether both are answered correctly."""
        sent = b'{"text":"%d"}' % random.randrange(10**9)
        await self.send(frame(TEXT, sent))
        received = await asyncio.wait_for(self.receive_frame(), 20)
        await self.send(frame(CLOSE, b"\x03\xe8"))
        return received == (TEXT, sent) and (await asyncio.wait_for(self.receive_frame(), 20))[0] == CLOSE

    async def receive_close(self, timeout):
        """Receives until the session ends. Returns the close code, or None without a close frame, or "timeout"."""
        code = None

        async def receive_frames():
            nonlocal code
            while True:
                opcode, payload = await self.receive_frame()
                if opcode == CLOSE:
                    code = int.from_bytes(payload[:2], "big")

        try:
            await asyncio.wait_for(receive_frames(), timeout)
        except (EOFError, OSError):
            return code
        return "timeout"

    def reset(self):
        """Resets the connection without a close frame."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def open_clients(port, count, *paths, only_half_handshake=False):
    """Opens `count` clients, on `paths` in rotation. At most a hundred clients connect concurrently."""
    slots, paths = asyncio.Semaphore(100), paths or [ECHO]

    async def open_client(number):
        async with slots:
            return await Client(port).connect(paths[number % len(paths)], only_half_handshake)

    return await asyncio.gather(*map(open_client, range(count)))


async def run_for_each(clients, operation):
    """Runs `operation` for all clients. Returns the results without an error. Connection errors are expected."""
    results = await asyncio.gather(*(operation(client) for client in clients), return_exceptions=True)
    unexpected = [error for error in results if isinstance(error, Exception) and not isinstance(error, (OSError, EOFError))]
    assert not unexpected, unexpected[0]
    return [result for result in results if not isinstance(result, Exception)]


def metric_sum(port, name):
    """Returns the sum of all series of a metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        values = re.findall(rf"^keychoir_{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.M)
    assert values, f"the metrics must contain {name}"
    return sum(map(float, values))


async def wait_until(is_ok, seconds):
    """Waits for a condition. Returns the duration, or None after the timeout."""
    started_at = time.perf_counter()
    while not is_ok():
        if time.perf_counter() - started_at > seconds:
            return None
        await asyncio.sleep(0.1)
    return time.perf_counter() - started_at


async def send_without_reading(keychoir, clients):
    """Sends as much as possible without reading. Most of the data must stay in the socket buffers of the kernel, so
    that the program itself buffers little."""
    bytes_before = memory_bytes(keychoir)
    # Text messages are buffered until they are complete, and binary messages are forwarded immediately.
    messages = [text_frame(200 * KIB), frame(BINARY, b"s" * MIB), text_frame(16 * KIB), text_frame(600 * KIB), text_frame(500)]
    sent_bytes = [0] * len(clients)

    async def flood(number, client):
        # The last clients request speech, whose responses are larger than the requests.
        data = messages[min(number // 20, 4)]
        while True:
            sent_bytes[number] += await client.loop.sock_sendall(client.socket, data) or len(data)

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
        f"{bytes_per_session // KIB} KiB per session at the peak, limit {MAX_SESSION_BYTES // KIB}; they sent {sum(sent_bytes) // MIB} MiB",
    )


async def disconnect_within_a_frame(clients):
    """Sends an incomplete frame, and then resets or closes the connection."""
    incomplete_frames = [
        frame_header(TEXT, 1_000)[:3],
        frame_header(TEXT, 100_000) + b'{"text":"half',
        frame_header(BINARY, 2**40) + bytes(5_000),
        frame_header(TEXT, 2**40) + b'{"text":"' + b"a" * 400_000,
        frame_header(PING, 50) + b"half",
        frame(TEXT, b'{"text":', is_final=False) + frame_header(0, 100) + b'"half',
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
    """Sends invalid frames. Each session must be closed, or its connection must end."""
    invalid_frames = [
        frame(3, b"reserved"),
        frame(11, b"reserved"),
        frame(TEXT, b'{"text":"x"}', reserved=7),
        frame(TEXT, b'{"text":"x"}', is_masked=False),
        frame_header(TEXT, 2**63 - 1) + b'{"text":"' + bytes(1_000),
        frame_header(BINARY, 2**64 - 1) + bytes(1_000),
        frame_header(PING, 126) + bytes(200),
        frame_header(PING, 5, is_final=False) + bytes(5),
        frame(0, b"of nothing"),
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
            # The proxy may wait for the remaining bytes of a frame, so some clients disconnect.
            await asyncio.sleep(0.5)
            return client.socket.close()
        await client.receive_close(IDLE_SECONDS + 5)
        client.socket.close()

    return await run_for_each(clients, send_and_wait_for_end)


async def start_clients_to_kill(port, count):
    """Starts a process with `count` open sessions."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--clients", str(port), str(count)], stdout=subprocess.PIPE, text=True
    )
    assert await asyncio.to_thread(child.stdout.readline) == "open\n"
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
    silent, half_handshakes = await open_clients(port, 300, ECHO, SPEECH, SCRIBE), await open_clients(port, 100, only_half_handshake=True)
    half_closed, never_reading = await open_clients(port, 100), await open_clients(port, 80) + await open_clients(port, 20, SPEECH)
    disconnecting, invalid = [await open_clients(port, 400, ECHO, SPEECH, CONTEXTS, SCRIBE) for _ in range(2)]
    regular = await open_clients(port, 300)
    measured = f"{metric_sum(port, 'websocket_sessions'):.0f} are open, {(memory_bytes(keychoir) - bytes_before) / MIB:.1f} MiB"
    report("2,000 sessions", metric_sum(port, "websocket_sessions") == 1_900, measured)
    for client in half_closed:
        client.socket.shutdown(socket.SHUT_WR)
    silent_closes = asyncio.gather(*(client.receive_close(IDLE_SECONDS + 10) for client in silent), return_exceptions=True)
    invalid_task = asyncio.create_task(send_invalid_frames(invalid))
    await disconnect_within_a_frame(disconnecting)
    served = await run_for_each(regular, Client.is_echoed)
    report("300 regular clients", sum(served) == 300, f"{sum(served)} of 300 were served")
    never_reading_task = asyncio.create_task(send_without_reading(keychoir, never_reading))
    await asyncio.sleep(1)
    killed_process.send_signal(signal.SIGKILL)
    killed_process.wait()
    await never_reading_task
    going_away = sum(code == 1001 for code in await silent_closes)
    invalid_ended = len(await invalid_task)
    report("300 silent clients", going_away == 300, f"{going_away} received 1001 after {IDLE_SECONDS} s")
    report("400 clients with invalid frames", invalid_ended == 400, f"{invalid_ended} sessions ended")
    for client in half_handshakes + half_closed + never_reading + regular:
        client.socket.close()
    elapsed = await wait_until(lambda: metric_sum(port, "websocket_sessions") == 0 and metric_sum(port, "requests_in_flight") == 0, 15)
    remaining = f"{metric_sum(port, 'websocket_sessions'):.0f} are open, {metric_sum(port, 'requests_in_flight'):.0f} active requests"
    report("after all clients disconnected", elapsed is not None, remaining)
    served = await run_for_each(await open_clients(port, 50), Client.is_echoed)
    report("50 new clients", sum(served) == 50, f"{sum(served)} of 50 were served")
    return memory_bytes(keychoir)


async def run_rounds(binary):
    with start_proxy(binary, KEYCHOIR_WEBSOCKET__IDLE_TIMEOUT=f"{IDLE_SECONDS}s") as (keychoir, port, _):
        # The first sessions allocate memory that does not depend on the number of later sessions.
        assert all(await run_for_each(await open_clients(port, 300), Client.is_echoed))
        baseline = memory_bytes(keychoir)
        retained = [await run_round(keychoir, port) - baseline for _ in range(ROUNDS)]
        growth = (retained[-1] - retained[0]) / (ROUNDS - 1)
        measured = f"{' then '.join(f'{bytes / MIB:.1f}' for bytes in retained)} MiB more than {baseline / MIB:.0f} before"
        report("memory", max(retained) < MAX_RETAINED_BYTES and growth < MAX_GROWTH_PER_ROUND, measured)
    report("exit", keychoir.returncode == 0, f"exit code {keychoir.returncode}")


async def main(binary):
    started_at = time.perf_counter()
    random.seed(int(os.environ.get("FAULTS_SEED", "1")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    await run_rounds(binary)
    print(f"{failures} cases failed, {time.perf_counter() - started_at:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    if sys.argv[1] == "--clients":
        asyncio.run(run_clients_to_kill(int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(asyncio.run(main(sys.argv[1])))
