"""The Autobahn cases (kosoku drives them) between two programs that talk directly, and between the
same two through Keychoir: it must change no verdict.

As a server, the cases are asked by an echo client, over ws and over wss; as a client, they ask an
echo server. The cases' paths are none of the provider's, where frames are held to the rules: here a
proxy passes on what is wrong as it is, so the verdicts are compared and not wished for, and a case that
an echo does not pass directly need not pass through Keychoir either.

    tests/sockets/.venv/bin/python tests/sockets/conformance.py target/debug/keychoir [--all]

Prints a row for each case that differs and ends with 1 when there is one. Without --all it leaves
out what sends megabytes in small pieces: half a minute instead of twenty.
"""

import asyncio
import contextlib
import os
import pathlib
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time

import aiohttp
import kosoku
from aiohttp import web

KEY = "sk_of_the_sockets_tests"
# What the client in front calls its key: the server behind must see the pool's instead.
CLIENT_TOKEN = "anything-the-app-sends"

# Framing, pings, reserved bits, opcodes, fragments, UTF-8, closes, sizes; of compression the smallest.
QUICK = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.1.*", "9.2.*", "10.*"]
QUICK += [f"{group}.{case}" for group in ("12.1", "12.2", "13.1", "13.3", "13.4", "13.7") for case in (1, 5)]
# Cases at once. Each waits for its peer more than it computes.
AT_ONCE = 4
# More than the longest case: its peer hangs.
CASE_S_MAX = 600
START_S_MAX = 30


async def results(run):
    """What became of each case, also when some did not pass."""
    try:
        return await run
    except kosoku.FailureError as failure:
        return failure.results


async def echo(socket):
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await socket.send_bytes(message.data)


@contextlib.asynccontextmanager
async def echo_server():
    async def handle(request):
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        await echo(socket)
        return socket

    app = web.Application()
    app.router.add_get("/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield "http://127.0.0.1:%d" % runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def asked_by_an_echo_client(cases, through):
    """The verdicts on an echo client; `through` yields, for the server's URL, where the client connects."""
    async with kosoku.run_fuzzingserver(cases, host="127.0.0.1", port=0) as server:
        async with through(f"http://127.0.0.1:{server.port}") as (base, tls):
            async with aiohttp.ClientSession(headers={"xi-api-key": CLIENT_TOKEN}) as session:
                connect = lambda path: session.ws_connect(f"{base}{path}", max_msg_size=0, compress=15, ssl=tls)
                async with connect("/getCaseCount") as socket:
                    count = int((await socket.receive()).data)
                turns = asyncio.Semaphore(AT_ONCE)

                async def ask(case):
                    # What goes wrong here is the case's affair: the server has its verdict.
                    async with turns:
                        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                            async with asyncio.timeout(CASE_S_MAX), connect(f"/runCase?case={case}&agent=echo") as socket:
                                await echo(socket)

                await asyncio.gather(*map(ask, range(1, count + 1)))
                async with connect("/updateReports?agent=echo") as socket:
                    await socket.receive()
                return await results(server.get_result())


async def asking_an_echo_server(cases, through):
    """The verdicts on an echo server."""
    async with echo_server() as server, through(server) as (base, _):
        # The root is Keychoir's own page: every other path goes to the server.
        url = base.replace("http://", "ws://") + "/echo"
        return await results(kosoku.run_fuzzingclient(url, cases, concurrency=AT_ONCE))


@contextlib.asynccontextmanager
async def directly(upstream):
    yield upstream, True


def keychoir(binary, scheme):
    """Through Keychoir, over http or https."""

    @contextlib.asynccontextmanager
    async def through(upstream):
        with tempfile.TemporaryDirectory() as folder:
            own = ("KEYCHOIR_", "ELEVENLABS_", "SSL_CERT_")
            environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
            environment |= {
                "ELEVENLABS_API_KEYS": KEY,
                "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
                "KEYCHOIR_STORAGE__PATH": str(pathlib.Path(folder, "keychoir.db")),
                "KEYCHOIR_LOG__FORMAT": "json",
                # The cases' server speaks nothing but sockets.
                "KEYCHOIR_QUOTA_POLLING__ENABLED": "false",
            }
            log = pathlib.Path(folder, "log")
            with log.open("w") as stderr:
                child = subprocess.Popen([binary, "serve", "--listen", "127.0.0.1:0"], env=environment, stderr=stderr)
            try:
                port = await listening(child, log)
                printed = subprocess.run([binary, "env"], env=environment, capture_output=True, text=True, check=True)
                authority = re.search(r"^export NODE_EXTRA_CA_CERTS=(.*)$", printed.stdout, re.M).group(1)
                yield f"{scheme}://127.0.0.1:{port}", ssl.create_default_context(cafile=authority)
            finally:
                child.send_signal(signal.SIGTERM)
                code = await asyncio.to_thread(child.wait, 60)
            if code:
                raise SystemExit(f"keychoir ended with {code}:\n{log.read_text()}")

    return through


async def listening(child, log):
    """Its port, as soon as its log has it."""
    began = time.monotonic()
    while time.monotonic() - began < START_S_MAX and child.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if found:
            return found.group(1)
        await asyncio.sleep(0.01)
    raise SystemExit(f"keychoir did not start:\n{log.read_text()}")


def verdict(result):
    """What must be the same: whether the messages were right and the close, and the close that arrived."""
    behavior, close = result.behavior.value, result.behavior_close.value
    # Where any close will do, it may also be cut off, and is now and then between the two alone (7.1.6).
    if close == "INFORMATIONAL":
        return behavior, close, None, None
    return behavior, close, result.remote_close_code, result.remote_close_reason


def told(verdict):
    behavior, close, code, reason = verdict
    return f"{behavior}, close {close}" + (f" {code} {reason or ''}".rstrip() if code else "")


def differences(title, direct, proxied):
    """Prints the cases that differ; how many."""
    before = {result.case_id: verdict(result) for result in direct}
    after = {result.case_id: verdict(result) for result in proxied}
    rows = [
        (case, told(before[case]) if case in before else "absent", told(after[case]) if case in after else "absent")
        for case in sorted(before | after, key=lambda case: [int(part) for part in case.split(".")])
        if before.get(case) != after.get(case)
    ]
    passed = sum(result.passed for result in direct)
    print(f"{title}: {len(before)} cases, {passed} pass directly, {len(rows)} differ", flush=True)
    for case, was, is_now in rows:
        print(f"    {case:9}  directly: {was:40}  through keychoir: {is_now}")
    return len(rows)


def foreign_agents(results):
    """How many handshakes arrived without the pool's key, or with the client's."""
    requests = [result.http_request.lower() for result in results]
    return sum(CLIENT_TOKEN in request or f"xi-api-key: {KEY}" not in request for request in requests)


async def main(binary, cases):
    began = time.monotonic()
    plain, secret = keychoir(binary, "http"), keychoir(binary, "https")
    direct = await asked_by_an_echo_client(cases, directly)
    over_ws = await asked_by_an_echo_client(cases, plain)
    failures = differences("an echo client over ws", direct, over_ws)
    over_wss = await asked_by_an_echo_client(cases, secret)
    failures += differences("an echo client over wss", direct, over_wss)
    foreign = foreign_agents(over_ws) + foreign_agents(over_wss)
    print(f"{foreign} handshakes arrived without the pool's key or with the client's")
    direct = await asking_an_echo_server(cases, directly)
    failures += differences("an echo server", direct, await asking_an_echo_server(cases, plain))
    print(f"{failures} differences in {time.monotonic() - began:.0f} s")
    return 1 if failures or foreign else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    chosen = None if "--all" in arguments else QUICK
    sys.exit(asyncio.run(main(next(argument for argument in arguments if argument != "--all"), chosen)))
