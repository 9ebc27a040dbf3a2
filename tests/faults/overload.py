"""More than there should be: of clients, of connections, of failures.

Each case prints what it measured and what it allows; ends with 1 when one does not hold. Needs
nothing but Python and the built program:

    python3 tests/faults/overload.py target/release/keychoir
"""

import asyncio
import resource
import socket
import sys
import time

from house import KEYS, fault, house, memory, processor_seconds, requests

GET = b"GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
POST = b"POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}"

failures = 0


def holds(case, is_so, measured):
    global failures
    failures += not is_so
    print(f"{'ok' if is_so else 'FAILED':>6}  {case}: {measured}", flush=True)


async def ask(port, request=GET):
    """One request on a connection of its own; its status and how long it took."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return int(answer.split()[1]) if answer else 0, time.perf_counter() - began


async def paced(port, rate, seconds, request=GET):
    """So many requests a second, each begun on time whatever became of the others."""
    began, running = time.perf_counter(), []
    for number in range(rate * seconds):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        running.append(asyncio.create_task(ask(port, request)))
    return await asyncio.gather(*running)


def p99(answers):
    spans = sorted(span for _, span in answers)
    return spans[len(spans) * 99 // 100]


async def slow_heads(binary):
    """1,000 clients that trickle their heads beside 50 requests a second."""
    with house(binary, KEYCHOIR_SERVER__REQUEST_HEADERS_TIMEOUT="1m") as (keychoir, port, _):
        before = await paced(port, 50, 5)
        idle = memory(keychoir)
        writers = [(await asyncio.open_connection("127.0.0.1", port))[1] for _ in range(1_000)]

        async def trickle():
            while True:
                for writer in writers:
                    writer.write(b"a")
                await asyncio.sleep(1)

        for writer in writers:
            writer.write(b"GET /v1/voices HTTP/1.1\r\nx-slow: ")
        trickling = asyncio.create_task(trickle())
        beside = await paced(port, 50, 10)
        trickling.cancel()
        each = (memory(keychoir) - idle) // len(writers)
        for writer in writers:
            writer.close()
    # A quiet machine answers in a millisecond, where twice the baseline is noise.
    allowed = max(2 * p99(before), 0.010)
    is_so = all(status == 200 for status, _ in beside) and p99(beside) <= allowed
    holds("1,000 slow heads", is_so, f"p99 {p99(before) * 1e3:.1f} ms before, {p99(beside) * 1e3:.1f} ms beside, {each} bytes each")


async def many_connections(binary):
    """10,000 clients that connect and say nothing, and one more that does."""
    count = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
    with house(binary, KEYCHOIR_SERVER__MAX_CONNECTIONS=str(count), KEYCHOIR_SERVER__REQUEST_HEADERS_TIMEOUT="10m") as (keychoir, port, _):
        idle = memory(keychoir)
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
        waiting = asyncio.create_task(ask(port))
        used = processor_seconds(keychoir)
        await asyncio.sleep(2)
        spun = processor_seconds(keychoir) - used
        each = (memory(keychoir) - idle) // count
        was_waiting = not waiting.done()
        for client in clients:
            client.close()
        began = time.perf_counter()
        status, _ = await waiting
        recovered = time.perf_counter() - began
    is_so = was_waiting and spun < 0.5 and status == 200 and recovered < 5
    holds(f"{count:,} connections", is_so, f"{each} bytes each, {spun:.2f} s of processor in 2 s, served {recovered:.2f} s after they left")


async def no_more_files(binary):
    """More connections than the program may have files."""
    with house(binary, files_max=256) as (keychoir, port, _):
        clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(1_000)]
        used = processor_seconds(keychoir)
        await asyncio.sleep(2)
        spun = processor_seconds(keychoir) - used
        for client in clients:
            client.close()
        began, status = time.perf_counter(), 0
        while status != 200 and time.perf_counter() - began < 5:
            try:
                status, _ = await ask(port)
            except OSError:
                pass
        recovered = time.perf_counter() - began
    is_so = keychoir.returncode == 0 and spun < 0.5 and status == 200
    holds("256 files", is_so, f"{spun:.2f} s of processor in 2 s, served {recovered:.2f} s after they left")


async def storm_of_failures(binary):
    """An upstream that fails every request: what changes nothing is repeated within the budget,
    and what may have been charged not at all."""
    with house(binary) as (_, port, upstream):
        for key in KEYS:
            fault(upstream, key, always="server_error")
        for name, request, allowed in (("GET", GET, 1.2 * 2_000 + 10 * 11), ("POST", POST, 2_000)):
            asked = requests(upstream)
            answers = await paced(port, 200, 10, request)
            sent = requests(upstream) - asked
            is_so = all(status == 500 for status, _ in answers) and len(answers) <= sent <= allowed
            holds(f"2,000 failing {name}s", is_so, f"{sent} sent, at most {allowed:.0f} allowed")


async def main(binary):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
    for case in (slow_heads, many_connections, no_more_files, storm_of_failures):
        await case(binary)
    print(f"{failures} cases failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1])))
