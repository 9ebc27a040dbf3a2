"""WebSocket sessions with misbehaving clients: 2,000 concurrent sessions in three rounds.

Some clients are silent, some never read, some disconnect within a frame, some send invalid frames, and some are
killed. Afterwards Keychoir must have released their resources. The script prints its measurements and limits. The
exit code is 1 if a case fails. It needs only Python and the built program, and takes less than a minute:

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


def head(opcode, length, is_final=True, is_masked=True, reserved=0):
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
    return head(opcode, len(payload), **options) + payload


def text(length):
    """Encodes a text message, which is buffered until it is complete, because it may contain credentials."""
    return frame(TEXT, b'{"text":"' + b"a" * (length - 11) + b'"}')


class Client:
    """The client of a session, without a library, because a library would prevent protocol violations."""

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
        """Receives a frame of the provider. Returns its opcode and its payload."""
        while True:
            if len(self.buffer) >= 4:
                length, at = self.buffer[1], 2
                if length == 126:
                    (length,), at = struct.unpack(">H", self.buffer[2:4]), 4
                if len(self.buffer) >= at + length:
                    found, self.buffer = self.buffer[: at + length], self.buffer[at + length :]
                    return found[0] & 15, found[at:]
            await self.receive()

    async def is_echoed(self):
        """Sends a message and a close frame. Returns whether both are answered correctly."""
        sent = b'{"text":"%d"}' % random.randrange(10**9)
        await self.send(frame(TEXT, sent))
        received = await asyncio.wait_for(self.receive_frame(), 20)
        await self.send(frame(CLOSE, b"\x03\xe8"))
        return received == (TEXT, sent) and (await asyncio.wait_for(self.receive_frame(), 20))[0] == CLOSE

    async def receive_close(self, within):
        """Receives until the session ends. Returns the close code, None without a close frame, or "none" after the timeout."""
        code = None

        async def receive_frames():
            nonlocal code
            while True:
                opcode, payload = await self.receive_frame()
                if opcode == CLOSE:
                    code = int.from_bytes(payload[:2], "big")

        try:
            await asyncio.wait_for(receive_frames(), within)
        except (EOFError, OSError):
            return code
        return "none"

    def reset(self):
        """Resets the connection without a close frame."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def open_clients(port, count, *paths, only_half_handshake=False):
    """Opens this number of clients, on these paths in turns. At most a hundred connect concurrently."""
    slots, paths = asyncio.Semaphore(100), paths or [ECHO]

    async def open_client(number):
        async with slots:
            return await Client(port).connect(paths[number % len(paths)], only_half_handshake)

    return await asyncio.gather(*map(open_client, range(count)))


async def run_for_each(clients, what):
    """Runs `what` for all clients. Returns the results of those without an error. Connection errors are expected."""
    done = await asyncio.gather(*(what(client) for client in clients), return_exceptions=True)
    unexpected = [error for error in done if isinstance(error, Exception) and not isinstance(error, (OSError, EOFError))]
    assert not unexpected, unexpected[0]
    return [result for result in done if not isinstance(result, Exception)]


def metric_sum(port, name):
    """Returns the sum of a metric family."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        found = re.findall(rf"^keychoir_{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.M)
    assert found, name
    return sum(map(float, found))


async def wait_until(is_ok, seconds):
    """Waits for a condition. Returns the duration, or None after the timeout."""
    started_at = time.perf_counter()
    while not is_ok():
        if time.perf_counter() - started_at > seconds:
            return None
        await asyncio.sleep(0.1)
    return time.perf_counter() - started_at


async def never_read(keychoir, clients):
    """Clients that send as much as possible and never read. Most of the data stays in the socket buffers of the
    kernel, and the program itself buffers little."""
    before = memory_bytes(keychoir)
    # Messages that are buffered until they are complete, and audio that is forwarded immediately.
    kinds = [text(200 * KIB), frame(BINARY, b"s" * MIB), text(16 * KIB), text(600 * KIB), text(500)]
    sent = [0] * len(clients)

    async def flood(number, client):
        # The last clients request speech, whose responses are larger than the requests.
        data = kinds[min(number // 20, 4)]
        while True:
            sent[number] += await client.loop.sock_sendall(client.socket, data) or len(data)

    floods = [asyncio.create_task(flood(number, client)) for number, client in enumerate(clients)]
    highest, last, still = 0, -1, 0
    # Until no client can send any more data.
    while still < 10:
        await asyncio.sleep(0.1)
        highest = max(highest, memory_bytes(keychoir) - before)
        last, still = sum(sent), still + 1 if sum(sent) == last else 0
    for task in floods:
        task.cancel()
    passed = sum(sent) // MIB
    grew = highest // len(clients)
    is_ok = grew <= MAX_SESSION_BYTES
    report(
        f"{len(clients)} clients that never read",
        is_ok,
        f"{grew // KIB} KiB per session at the peak, limit {MAX_SESSION_BYTES // KIB}; they sent {passed} MiB",
    )


async def cut_in_a_frame(clients):
    """Sends an incomplete frame and then resets or closes the connection."""
    halves = [
        head(TEXT, 1_000)[:3],
        head(TEXT, 100_000) + b'{"text":"half',
        head(BINARY, 2**40) + bytes(5_000),
        head(TEXT, 2**40) + b'{"text":"' + b"a" * 400_000,
        head(PING, 50) + b"half",
        frame(TEXT, b'{"text":', is_final=False) + head(0, 100) + b'"half',
        head(CLOSE, 2) + b"\x03",
    ]

    async def cut(client):
        number = random.randrange(len(halves) * 2)
        await client.send(halves[number // 2])
        if number % 2:
            client.reset()
        else:
            client.socket.close()

    await run_for_each(clients, cut)


async def send_garbage(clients):
    """Sends invalid frames. The session is closed, or the connection ends."""
    garbage = [
        frame(3, b"reserved"),
        frame(11, b"reserved"),
        frame(TEXT, b'{"text":"x"}', reserved=7),
        frame(TEXT, b'{"text":"x"}', is_masked=False),
        head(TEXT, 2**63 - 1) + b'{"text":"' + bytes(1_000),
        head(BINARY, 2**64 - 1) + bytes(1_000),
        head(PING, 126) + bytes(200),
        head(PING, 5, is_final=False) + bytes(5),
        frame(0, b"of nothing"),
        frame(TEXT, b"\xff\xfe{}"),
        frame(TEXT, b"{" * 5_000),
        frame(CLOSE, b"\0"),
        frame(CLOSE, b"\x03\xe8\xff\xff"),
        b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(600),
    ]

    async def talk(client):
        what = random.randrange(len(garbage) + 5)
        await client.send(garbage[what] if what < len(garbage) else random.randbytes(3_000))
        if random.random() < 0.5:
            # A client with an incomplete frame disconnects.
            await asyncio.sleep(0.5)
            return client.socket.close()
        await client.receive_close(IDLE_SECONDS + 5)
        client.socket.close()

    return await run_for_each(clients, talk)


async def start_clients_to_kill(port, count):
    """Starts a process with this number of sessions."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--clients", str(port), str(count)], stdout=subprocess.PIPE, text=True
    )
    assert await asyncio.to_thread(child.stdout.readline) == "open\n"
    return child


async def clients_to_kill(port, count):
    clients = await open_clients(port, count)
    await run_for_each(clients, lambda client: client.send(text(1_000) + head(TEXT, 1_000)))
    print("open", flush=True)
    await asyncio.sleep(60)


async def run_round(keychoir, port):
    """Runs all cases once. Returns the memory of the program afterwards."""
    before = memory_bytes(keychoir)
    child = await start_clients_to_kill(port, 300)
    silent, half_handshakes = await open_clients(port, 300, ECHO, SPEECH, SCRIBE), await open_clients(port, 100, only_half_handshake=True)
    half_closed, slow = await open_clients(port, 100), await open_clients(port, 80) + await open_clients(port, 20, SPEECH)
    cut, garbage = [await open_clients(port, 400, ECHO, SPEECH, CONTEXTS, SCRIBE) for _ in range(2)]
    regular = await open_clients(port, 300)
    measured = f"{metric_sum(port, 'websocket_sessions'):.0f} are open, {(memory_bytes(keychoir) - before) / MIB:.1f} MiB"
    report("2,000 sessions", metric_sum(port, "websocket_sessions") == 1_900, measured)
    for client in half_closed:
        client.socket.shutdown(socket.SHUT_WR)
    ends = asyncio.gather(*(client.receive_close(IDLE_SECONDS + 10) for client in silent), return_exceptions=True)
    talking = asyncio.create_task(send_garbage(garbage))
    await cut_in_a_frame(cut)
    served = await run_for_each(regular, Client.is_echoed)
    report("300 regular clients", sum(served) == 300, f"{sum(served)} of 300 were served")
    flooding = asyncio.create_task(never_read(keychoir, slow))
    await asyncio.sleep(1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    await flooding
    ends, talked = await ends, len(await talking)
    away = sum(end == 1001 for end in ends)
    report("300 silent clients", away == 300, f"{away} received 1001 after {IDLE_SECONDS} s")
    report("400 clients with invalid frames", talked == 400, f"{talked} sessions ended")
    for client in half_handshakes + half_closed + slow + regular:
        client.socket.close()
    took = await wait_until(lambda: metric_sum(port, "websocket_sessions") == 0 and metric_sum(port, "requests_in_flight") == 0, 15)
    left = f"{metric_sum(port, 'websocket_sessions'):.0f} are open, {metric_sum(port, 'requests_in_flight'):.0f} active requests"
    report("after all clients disconnected", took is not None, left)
    again = await run_for_each(await open_clients(port, 50), Client.is_echoed)
    report("50 new clients", sum(again) == 50, f"{sum(again)} of 50 were served")
    return memory_bytes(keychoir)


async def sessions(binary):
    with start_proxy(binary, KEYCHOIR_WEBSOCKET__IDLE_TIMEOUT=f"{IDLE_SECONDS}s") as (keychoir, port, _):
        # Allocates memory that does not depend on the number of later clients.
        assert all(await run_for_each(await open_clients(port, 300), Client.is_echoed))
        baseline = memory_bytes(keychoir)
        left = [await run_round(keychoir, port) - baseline for _ in range(ROUNDS)]
        added = (left[-1] - left[0]) / (ROUNDS - 1)
        measured = f"{' then '.join(f'{bytes / MIB:.1f}' for bytes in left)} MiB more than {baseline / MIB:.0f} before"
        report("memory", max(left) < MAX_RETAINED_BYTES and added < MAX_GROWTH_PER_ROUND, measured)
    report("exit", keychoir.returncode == 0, f"exit code {keychoir.returncode}")


async def main(binary):
    started_at = time.perf_counter()
    random.seed(int(os.environ.get("FAULTS_SEED", "1")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    await sessions(binary)
    print(f"{failures} cases failed, {time.perf_counter() - started_at:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    if sys.argv[1] == "--clients":
        asyncio.run(clients_to_kill(int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(asyncio.run(main(sys.argv[1])))
