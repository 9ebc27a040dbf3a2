"""Runs the Autobahn test cases for WebSockets without and with Keychoir between the client and the server, and compares
the verdicts, which must be equal. Also checks that each handshake that Keychoir forwards to the fuzzing server contains
the key of the pool and does not contain the client credential.

The Python package kosoku runs the cases. Its fuzzing server tests an echo client, which connects directly, and through
Keychoir over ws and over wss. Its fuzzing client tests an echo server, directly and through Keychoir over ws. Keychoir
validates frames only on the paths of the provider's API. On the paths of the cases, it forwards invalid frames
unchanged, so a case that fails directly may also fail through Keychoir.

    tests/sockets/.venv/bin/python tests/sockets/conformance.py target/debug/keychoir [--all]

Prints a row for each case that differs. The exit code is 1 if a case differs, a handshake has a wrong credential, or
Keychoir does not start or ends with an error. Without --all, the cases that send megabytes in small fragments and most
cases of compression are skipped, so that the run takes half a minute instead of twenty minutes.
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
# The client credential. The fuzzing server must receive the key of the pool instead.
CLIENT_TOKEN = "anything-the-app-sends"

# The cases of frames, pings, reserved bits, opcodes, fragments, UTF-8, closes and sizes, and two cases from each of six
# groups of compression.
QUICK_CASES = ["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.1.*", "9.2.*", "10.*"]
QUICK_CASES += [f"{group}.{case}" for group in ("12.1", "12.2", "13.1", "13.3", "13.4", "13.7") for case in (1, 5)]
# The maximum number of concurrent cases. Concurrency shortens the run, because a case mostly waits for its peer.
MAX_CONCURRENT_CASES = 4
# The timeout is longer than the longest case, so that only a case whose peer hangs exceeds it.
CASE_TIMEOUT_SECONDS = 600
START_TIMEOUT_SECONDS = 30


async def all_results(run):
    """Awaits a run of cases. Returns the results of all cases, including the failed cases."""
    try:
        return await run
    except kosoku.FailureError as failure:
        return failure.results


async def echo(socket):
    """Echoes messages until the session ends."""
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is aiohttp.WSMsgType.BINARY:
            await socket.send_bytes(message.data)


@contextlib.asynccontextmanager
async def echo_server():
    """Starts an echo server. Yields its URL."""
    async def respond(request):
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        await echo(socket)
        return socket

    app = web.Application()
    app.router.add_get("/{path:.*}", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield "http://127.0.0.1:%d" % runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def run_cases_against_echo_client(cases, through):
    """Runs the cases of the fuzzing server against an echo client, and returns the results. `through` returns a context
    manager that yields the URL and the TLS setting with which the client connects to the fuzzing server."""
    async with kosoku.run_fuzzingserver(cases, host="127.0.0.1", port=0) as server:
        async with through(f"http://127.0.0.1:{server.port}") as (base_url, tls):
            async with aiohttp.ClientSession(headers={"xi-api-key": CLIENT_TOKEN}) as session:
                connect = lambda path: session.ws_connect(f"{base_url}{path}", max_msg_size=0, compress=15, ssl=tls)
                async with connect("/getCaseCount") as socket:
                    case_count = int((await socket.receive()).data)
                case_slots = asyncio.Semaphore(MAX_CONCURRENT_CASES)

                async def run_case(case):
                    # Some cases cause an error in the client. The server records a verdict for these cases, too.
                    async with case_slots:
                        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
                            path = f"/runCase?case={case}&agent=echo"
                            async with asyncio.timeout(CASE_TIMEOUT_SECONDS), connect(path) as socket:
                                await echo(socket)

                await asyncio.gather(*map(run_case, range(1, case_count + 1)))
                async with connect("/updateReports?agent=echo") as socket:
                    await socket.receive()
                return await all_results(server.get_result())


async def run_cases_against_echo_server(cases, through):
    """Runs the cases of the fuzzing client against an echo server, and returns the results. The fuzzing client connects
    to the URL that `through` yields."""
    async with echo_server() as server, through(server) as (base_url, _):
        # Keychoir serves its own page at `/`, and forwards the path `/echo` to the echo server.
        url = base_url.replace("http://", "ws://") + "/echo"
        return await all_results(kosoku.run_fuzzingclient(url, cases, concurrency=MAX_CONCURRENT_CASES))


@contextlib.asynccontextmanager
async def connect_directly(upstream):
    """Yields the URL of the upstream and the default TLS setting."""
    yield upstream, True


def through_keychoir(binary, scheme):
    """Returns a function whose context manager starts Keychoir in front of an upstream, and yields the URL of Keychoir
    with `scheme` and the TLS setting of its clients."""

    @contextlib.asynccontextmanager
    async def through(upstream):
        with tempfile.TemporaryDirectory() as directory:
            prefixes = ("KEYCHOIR_", "ELEVENLABS_", "SSL_CERT_")
            environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
            environment |= {
                "ELEVENLABS_API_KEYS": KEY,
                "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
                "KEYCHOIR_STORAGE__PATH": str(pathlib.Path(directory, "keychoir.db")),
                "KEYCHOIR_LOG__FORMAT": "json",
                # The fuzzing server does not implement the endpoints that the quota poller requests.
                "KEYCHOIR_QUOTA_POLLING__ENABLED": "false",
            }
            log = pathlib.Path(directory, "log")
            with log.open("w") as stderr:
                child = subprocess.Popen([binary, "serve", "--listen", "127.0.0.1:0"], env=environment, stderr=stderr)
            try:
                port = await wait_for_port(child, log)
                printed = subprocess.run([binary, "env"], env=environment, capture_output=True, text=True, check=True)
                ca_file = re.search(r"^export NODE_EXTRA_CA_CERTS=(.*)$", printed.stdout, re.M).group(1)
                yield f"{scheme}://127.0.0.1:{port}", ssl.create_default_context(cafile=ca_file)
            finally:
                child.send_signal(signal.SIGTERM)
                code = await asyncio.to_thread(child.wait, 60)
            if code:
                raise SystemExit(f"keychoir ended with exit code {code}:\n{log.read_text()}")

    return through


async def wait_for_port(child, log):
    """Waits until the log of Keychoir contains its address. Returns the port."""
    started_at = time.monotonic()
    while time.monotonic() - started_at < START_TIMEOUT_SECONDS and child.poll() is None:
        match = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
        if match:
            return match.group(1)
        await asyncio.sleep(0.01)
    raise SystemExit(f"keychoir did not start:\n{log.read_text()}")


def verdict_of(result):
    """Returns the values that are compared: the verdicts on the messages and the close frame, and the received close
    frame."""
    behavior, close = result.behavior.value, result.behavior_close.value
    # Some cases, such as 7.1.6, permit any end of the session. The close frame may then be missing, even without
    # Keychoir, so it is not compared.
    if close == "INFORMATIONAL":
        return behavior, close, None, None
    return behavior, close, result.remote_close_code, result.remote_close_reason


def format_verdict(verdict):
    """Returns a verdict as the text of a table cell."""
    behavior, close, code, reason = verdict
    return f"{behavior}, close {close}" + (f" {code} {reason or ''}".rstrip() if code else "")


def print_differences(title, direct, proxied):
    """Prints the cases whose verdicts directly and through Keychoir differ. Returns their number."""
    direct_verdicts = {result.case_id: verdict_of(result) for result in direct}
    proxied_verdicts = {result.case_id: verdict_of(result) for result in proxied}
    format_case = lambda verdicts, case: format_verdict(verdicts[case]) if case in verdicts else "absent"
    differences = [
        (case, format_case(direct_verdicts, case), format_case(proxied_verdicts, case))
        for case in sorted(direct_verdicts | proxied_verdicts, key=lambda case: [int(part) for part in case.split(".")])
        if direct_verdicts.get(case) != proxied_verdicts.get(case)
    ]
    passed = sum(result.passed for result in direct)
    print(f"{title}: {len(direct_verdicts)} cases, {passed} pass directly, {len(differences)} differ", flush=True)
    for case, direct_verdict, proxied_verdict in differences:
        print(f"    {case:9}  directly: {direct_verdict:40}  through keychoir: {proxied_verdict}")
    return len(differences)


def count_wrong_credentials(results):
    """Returns the number of forwarded handshakes without the key of the pool or with the client credential."""
    requests = [result.http_request.lower() for result in results]
    return sum(CLIENT_TOKEN in request or f"xi-api-key: {KEY}" not in request for request in requests)


async def main(binary, cases):
    started_at = time.monotonic()
    through_http, through_https = through_keychoir(binary, "http"), through_keychoir(binary, "https")
    direct = await run_cases_against_echo_client(cases, connect_directly)
    over_ws = await run_cases_against_echo_client(cases, through_http)
    difference_count = print_differences("an echo client over ws", direct, over_ws)
    over_wss = await run_cases_against_echo_client(cases, through_https)
    difference_count += print_differences("an echo client over wss", direct, over_wss)
    wrong_credentials = count_wrong_credentials(over_ws) + count_wrong_credentials(over_wss)
    print(f"{wrong_credentials} handshakes were forwarded without the key of the pool or with the client credential")
    direct = await run_cases_against_echo_server(cases, connect_directly)
    proxied = await run_cases_against_echo_server(cases, through_http)
    difference_count += print_differences("an echo server", direct, proxied)
    print(f"{difference_count} differences in {time.monotonic() - started_at:.0f} s")
    return 1 if difference_count or wrong_credentials else 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    cases = None if "--all" in arguments else QUICK_CASES
    sys.exit(asyncio.run(main(next(argument for argument in arguments if argument != "--all"), cases)))
