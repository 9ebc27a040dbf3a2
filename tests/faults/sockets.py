"""Sessions that go wrong in every way a client can: 2,000 of them at once, three times.

Some say nothing and are there no more, some never read while they are flooded, some are cut in the
middle of a frame, some send what is no frame, some are killed. Afterwards nothing of them must be
left. Prints what it measured and what it allows; ends with 1 when something does not hold. Needs
nothing but Python and the built program, and takes less than a minute:

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

from house import house, memory

ECHO = "/v1/something/new"
SPEECH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input"
CONTEXTS = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/multi-stream-input"
SCRIBE = "/v1/speech-to-text/realtime?model_id=scribe_v2_realtime&audio_format=pcm_16000"
ROUNDS = 3
IDLE_SECONDS = 8
# What a session may hold: `websocket.max_buffered_message_size` in each direction.
HELD_BYTES_MAX = 2 * 256 * 1024
# Afterwards: what the allocator keeps for the next ones, and what every round may add to that.
LEFT_BYTES_MAX = 48 * 1024 * 1024
ADDED_BYTES_MAX = 5 * 1024 * 1024
KIB, MIB = 1024, 1024 * 1024

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9

failures = 0


def holds(case, is_so, measured):
    global failures
    failures += not is_so
    print(f"{'ok' if is_so else 'FAILED':>6}  {case}: {measured}", flush=True)


def head(opcode, length, is_final=True, is_masked=True, reserved=0):
    """The head of a frame; its mask changes nothing."""
    masked = 0x80 if is_masked else 0
    start = bytes([(0x80 if is_final else 0) | reserved << 4 | opcode])
    if length < 126:
        start += bytes([masked | length])
    elif length < 65_536:
        start += bytes([masked | 126]) + struct.pack(">H", length)
    else:
        start += bytes([masked | 127]) + struct.pack(">Q", length)
    return start + (bytes(4) if is_masked else b"")


def frame(opcode, payload, **more):
    return head(opcode, len(payload), **more) + payload


def text(length):
    """A message that is read for credentials, and goes on when all of it has come."""
    return frame(TEXT, b'{"text":"' + b"a" * (length - 11) + b'"}')


class Client:
    """One end of a session, without a library that would keep it from mistakes."""

    def __init__(self, port):
        self.port = port
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.heard = b""

    async def connect(self, path, half=False):
        await self.loop.sock_connect(self.socket, ("127.0.0.1", self.port))
        ask = (
            f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\n"
            "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        ).encode()
        await self.say(ask if half else ask + b"\r\n")
        if half:
            return self
        while b"\r\n\r\n" not in self.heard:
            await self.hear()
        answer, _, self.heard = self.heard.partition(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        return self

    async def say(self, data):
        await self.loop.sock_sendall(self.socket, data)

    async def hear(self):
        more = await self.loop.sock_recv(self.socket, 64 * KIB)
        if not more:
            raise EOFError
        self.heard += more

    async def message(self):
        """The next frame of the provider: its opcode and its payload."""
        while True:
            if len(self.heard) >= 4:
                length, at = self.heard[1], 2
                if length == 126:
                    (length,), at = struct.unpack(">H", self.heard[2:4]), 4
                if len(self.heard) >= at + length:
                    found, self.heard = self.heard[: at + length], self.heard[at + length :]
                    return found[0] & 15, found[at:]
            await self.hear()

    async def echoes(self):
        """Whether it is served as it should be, to its close."""
        said = b'{"text":"%d"}' % random.randrange(10**9)
        await self.say(frame(TEXT, said))
        heard = await asyncio.wait_for(self.message(), 20)
        await self.say(frame(CLOSE, b"\x03\xe8"))
        return heard == (TEXT, said) and (await asyncio.wait_for(self.message(), 20))[0] == CLOSE

    async def end(self, within):
        """How it ends, when its end hears it: the code of the close, or nothing."""
        code = None

        async def hearing():
            nonlocal code
            while True:
                opcode, payload = await self.message()
                if opcode == CLOSE:
                    code = int.from_bytes(payload[:2], "big")

        try:
            await asyncio.wait_for(hearing(), within)
        except (EOFError, OSError):
            return code
        return "none"

    def reset(self):
        """Is gone without a goodbye."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def many(port, count, *paths, half=False):
    """So many clients, on these paths in turns, a hundred connecting at once."""
    room, paths = asyncio.Semaphore(100), paths or [ECHO]

    async def one(number):
        async with room:
            return await Client(port).connect(paths[number % len(paths)], half)

    return await asyncio.gather(*map(one, range(count)))


async def each(clients, what):
    """Does it with every one; how many did it without an error, which is nobody's fault here."""
    done = await asyncio.gather(*(what(client) for client in clients), return_exceptions=True)
    strange = [error for error in done if isinstance(error, Exception) and not isinstance(error, (OSError, EOFError))]
    assert not strange, strange[0]
    return [result for result in done if not isinstance(result, Exception)]


def metric(port, name):
    """The sum of a family."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        found = re.findall(rf"^keychoir_{name}(?:{{.*}})? (\S+)$", page.read().decode(), re.M)
    assert found, name
    return sum(map(float, found))


async def until(is_so, seconds):
    """Waits for it; how long that took, or nothing when it was too long."""
    began = time.perf_counter()
    while not is_so():
        if time.perf_counter() - began > seconds:
            return None
        await asyncio.sleep(0.1)
    return time.perf_counter() - began


async def never_read(keychoir, clients):
    """Clients that say what they can and never read what comes back. What is said lies in the buffers
    of the system's sockets; the program itself holds little."""
    before = memory(keychoir)
    # Large enough that a message is waited for, and sound that goes on as it comes.
    kinds = [text(200 * KIB), frame(BINARY, b"s" * MIB), text(16 * KIB), text(600 * KIB), text(500)]
    said = [0] * len(clients)

    async def flood(number, client):
        # The last ones speak: what comes back is more than what is said.
        data = kinds[min(number // 20, 4)]
        while True:
            said[number] += await client.loop.sock_sendall(client.socket, data) or len(data)

    floods = [asyncio.create_task(flood(number, client)) for number, client in enumerate(clients)]
    highest, last, still = 0, -1, 0
    # Until nobody gets anything more rid of.
    while still < 10:
        await asyncio.sleep(0.1)
        highest = max(highest, memory(keychoir) - before)
        last, still = sum(said), still + 1 if sum(said) == last else 0
    for task in floods:
        task.cancel()
    passed = sum(said) // MIB
    grew = highest // len(clients)
    is_so = grew <= HELD_BYTES_MAX
    holds(
        f"{len(clients)} that never read",
        is_so,
        f"{grew // KIB} KiB each at the most, of {HELD_BYTES_MAX // KIB}; they said {passed} MiB",
    )


async def cut_in_a_frame(clients):
    """Half a head, half a text, half a sound, half a control frame; then a reset or an end."""
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
        await client.say(halves[number // 2])
        if number % 2:
            client.reset()
        else:
            client.socket.close()

    await each(clients, cut)


async def talk_garbage(clients):
    """What is no frame of a client; the provider says so, or the connection ends."""
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
        await client.say(garbage[what] if what < len(garbage) else random.randbytes(3_000))
        if random.random() < 0.5:
            # A client that left a frame unfinished disconnects by itself.
            await asyncio.sleep(0.5)
            return client.socket.close()
        await client.end(IDLE_SECONDS + 5)
        client.socket.close()

    return await each(clients, talk)


async def to_kill(port, count):
    """A program that has so many sessions."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--clients", str(port), str(count)], stdout=subprocess.PIPE, text=True
    )
    assert await asyncio.to_thread(child.stdout.readline) == "open\n"
    return child


async def clients_to_kill(port, count):
    clients = await many(port, count)
    await each(clients, lambda client: client.say(text(1_000) + head(TEXT, 1_000)))
    print("open", flush=True)
    await asyncio.sleep(60)


async def round_of(keychoir, port):
    """All of them, once; what the program's memory is afterwards."""
    before = memory(keychoir)
    child = await to_kill(port, 300)
    silent, half_asked = await many(port, 300, ECHO, SPEECH, SCRIBE), await many(port, 100, half=True)
    half_closed, slow = await many(port, 100), await many(port, 80) + await many(port, 20, SPEECH)
    cut, garbage = [await many(port, 400, ECHO, SPEECH, CONTEXTS, SCRIBE) for _ in range(2)]
    polite = await many(port, 300)
    measured = f"{metric(port, 'websocket_sessions'):.0f} are open, {(memory(keychoir) - before) / MIB:.1f} MiB"
    holds("2,000 sessions", metric(port, "websocket_sessions") == 1_900, measured)
    for client in half_closed:
        client.socket.shutdown(socket.SHUT_WR)
    ends = asyncio.gather(*(client.end(IDLE_SECONDS + 10) for client in silent), return_exceptions=True)
    talking = asyncio.create_task(talk_garbage(garbage))
    await cut_in_a_frame(cut)
    served = await each(polite, Client.echoes)
    holds("beside them", sum(served) == 300, f"{sum(served)} of 300 were served")
    flooding = asyncio.create_task(never_read(keychoir, slow))
    await asyncio.sleep(1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    await flooding
    ends, talked = await ends, len(await talking)
    away = sum(end == 1001 for end in ends)
    holds("300 that say nothing", away == 300, f"{away} were told 1001 after {IDLE_SECONDS} s")
    holds("400 that send no frames", talked == 400, f"{talked} came to an end")
    for client in half_asked + half_closed + slow + polite:
        client.socket.close()
    took = await until(lambda: metric(port, "websocket_sessions") == 0 and metric(port, "requests_in_flight") == 0, 15)
    left = f"{metric(port, 'websocket_sessions'):.0f} are open, {metric(port, 'requests_in_flight'):.0f} requests under way"
    holds("when all have left", took is not None, left)
    again = await each(await many(port, 50), Client.echoes)
    holds("and then", sum(again) == 50, f"{sum(again)} of 50 were served")
    return memory(keychoir)


async def sessions(binary):
    with house(binary, KEYCHOIR_WEBSOCKET__IDLE_TIMEOUT=f"{IDLE_SECONDS}s") as (keychoir, port, _):
        # Memory that is needed once, whatever the number of clients.
        assert all(await each(await many(port, 300), Client.echoes))
        baseline = memory(keychoir)
        left = [await round_of(keychoir, port) - baseline for _ in range(ROUNDS)]
        added = (left[-1] - left[0]) / (ROUNDS - 1)
        measured = f"{' then '.join(f'{bytes / MIB:.1f}' for bytes in left)} MiB more than {baseline / MIB:.0f} before"
        holds("memory", max(left) < LEFT_BYTES_MAX and added < ADDED_BYTES_MAX, measured)
    holds("its end", keychoir.returncode == 0, f"exit code {keychoir.returncode}")


async def main(binary):
    began = time.perf_counter()
    random.seed(int(os.environ.get("FAULTS_SEED", "1")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    await sessions(binary)
    print(f"{failures} cases failed, {time.perf_counter() - began:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    if sys.argv[1] == "--clients":
        asyncio.run(clients_to_kill(int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(asyncio.run(main(sys.argv[1])))
