"""Runs two replicas of Keychoir between HAProxy and a simulated ElevenLabs, with one Redis server, and kills a replica
under load.

The demo needs Python, redis-server, haproxy, and the built `keychoir` binary:

    python3 deploy/replicas/demo/demo.py target/release/keychoir

The exit code is 0 if no request failed, the provider reports no violation, and each credit that it has charged is
recorded or was lost because of the kill. Otherwise it is 1, and 130 after Ctrl-C.
"""

import argparse
import socket
import sys
import time
from collections import Counter

from accounting import LedgerReader, compare, describe_unexplained_failures
from load import CUT_OFF, Load
from processes import Failure, Processes, redis_answers, wait_until
from pool import Provider, Replica, start_haproxy

CLIENTS = 8
# The first two keys are exhausted during the demo.
KEYS = {"sk_demo_key_number_one": 2_000, "sk_demo_key_number_two": 2_000, "sk_demo_key_number_three": 1_000_000}
RESPONSE_DELAY = "100ms"
LOAD_TIMEOUT_SECONDS = 120


def parse_arguments():
    parser = argparse.ArgumentParser(description="Kills one of two replicas of Keychoir under load.")
    parser.add_argument("binary", help="the built keychoir binary, such as target/release/keychoir")
    requests_help = "the minimum number of requests (default: %(default)s)"
    parser.add_argument("--requests", type=int, default=450, help=requests_help)
    return parser.parse_args()


def start_redis(processes):
    """Starts a Redis server that listens only on a Unix socket and writes no data to the disk. Returns its URL."""
    path = processes.path("redis.sock")
    arguments = ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--dir", processes.directory]
    redis = processes.start("redis", arguments)

    def is_ready():
        if redis.has_exited():
            raise Failure(f"the Redis server exited:\n{redis.read_output()}")
        return redis_answers(socket.AF_UNIX, path)

    wait_until("a response of the Redis server", is_ready)
    return f"unix:{path}"


def run_demo(processes, binary, request_count):
    """Runs the demo. Returns whether it succeeded."""
    redis_url = start_redis(processes)
    provider = Provider(processes, binary, KEYS, RESPONSE_DELAY)
    replicas = {name: Replica(processes, binary, name, provider, redis_url) for name in ("one", "two")}
    for replica in replicas.values():
        replica.wait_until_shared()
    port = start_haproxy(processes, replicas.values())
    ledger, load, kills = LedgerReader(provider), Load([port], CLIENTS), {}
    started_at = time.monotonic()

    def print_step(text):
        print(f"{time.monotonic() - started_at:5.1f} s  {text}", flush=True)

    def wait_for_requests(count):
        def are_completed():
            ledger.read()
            return load.completed_count() >= count

        wait_until(f"the completion of {count} requests", are_completed, LOAD_TIMEOUT_SECONDS)

    print("2 replicas of Keychoir, 1 Redis server, HAProxy in front of them, and a simulated ElevenLabs upstream of them\n")
    load.start()
    print_step(f"{CLIENTS} clients send requests to HAProxy")
    wait_for_requests(request_count // 3)
    kills["two"] = replicas["two"].kill()
    print_step("replica two is killed (SIGKILL)")
    wait_for_requests(request_count * 2 // 3)
    restarted_at = time.monotonic()
    replicas["two"].restart()
    print_step("replica two is started again")

    def has_served_again():
        last_attempts = (request.attempts[-1] for request in list(load.requests))
        return any(attempt.replica == "two" and attempt.started_at > restarted_at for attempt in last_attempts)

    wait_until("a request that the restarted replica serves", has_served_again)
    print_step("HAProxy sends requests to replica two again")
    wait_for_requests(request_count)
    load.stop()
    print_step("the clients have stopped\n")
    for replica in replicas.values():
        if replica.process.end() != 0:
            raise Failure(f"replica {replica.name} exited with an error:\n{replica.process.read_output()}")
    ledger.read()
    databases = {name: replica.database for name, replica in replicas.items()}
    comparison = compare(load.requests, databases, ledger, kills)
    comparison.errors += describe_unexplained_failures(load.requests, kills)
    return print_summary(load.requests, comparison, ledger, kills["two"].ended_at)


def format_count(number, noun):
    """Returns the number and the noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_summary(requests, comparison, ledger, killed_at):
    """Prints the results. Returns whether no request failed and all charges are accounted for."""
    failed = [request for request in requests if not request.is_served]
    request_count = format_count(len(requests), "request")
    print(f"requests  {request_count}, {len(requests) - len(failed):,} served, {len(failed)} failed")
    results = Counter(attempt.result for request in requests for attempt in request.attempts)
    cut_off_count = results.pop(CUT_OFF, 0)
    del results["200"]
    causes = ", ".join(f"{number} times {result}" for result, number in results.items())
    retry_count = format_count(sum(results.values()), "attempt")
    print(f"retries   {retry_count} sent again by the client, as the official SDKs do ({causes or 'none'})")
    if results:
        print("          They were in flight at replica two when it was killed. HAProxy does not send them again, because")
        print("          ElevenLabs may have charged them. For the app, each is one call that took longer.")
    if cut_off_count:
        responses = format_count(cut_off_count, "response")
        print(f"          {responses} cut off by the kill. No SDK repeats these, so the app has requested them again.")
    served = Counter(request.attempts[-1].replica for request in requests if request.is_served)
    last_attempts = [request.attempts[-1] for request in requests]
    before_kill = sum(attempt.replica == "two" and attempt.started_at <= killed_at for attempt in last_attempts)
    print(
        f"replicas  one served {served['one']:,}, two served {served['two']:,} "
        f"({before_kill:,} before the kill, {served['two'] - before_kill:,} after its restart)"
    )
    exhausted_count = sum(key["remaining"] < 100 for key in ledger.keys)
    refused_attempts = format_count(ledger.totals["refused"], "attempt")
    print(
        f"keys      {exhausted_count} of {len(ledger.keys)} exhausted; "
        f"{refused_attempts} refused by the provider, and sent with another key"
    )
    credits_by_replica = " + ".join(f"{credits:,} ({name})" for name, credits in comparison.by_replica.items())
    print(f"credits   {comparison.charged:,} charged by the provider")
    print(f"          {comparison.recorded:,} recorded by both replicas: {credits_by_replica}")
    in_flight = [request for request in comparison.unrecorded if request.seconds_before_kill is None]
    served_last = [request for request in comparison.unrecorded if request.seconds_before_kill is not None]
    unrecorded_line = (
        f"          {comparison.unrecorded_credits:,} charged without a record, because of the kill: "
        f"{format_count(len(in_flight), 'request')} in flight"
    )
    if served_last:
        oldest = max(request.seconds_before_kill for request in served_last)
        unrecorded_line += f", {format_count(len(served_last), 'request')} served in the last {oldest * 1e3:.0f} ms"
    print(unrecorded_line)
    problems = list(comparison.errors)
    for request in failed:
        problems.append(f"request {request.number} failed: {[attempt.result for attempt in request.attempts]}")
    problems += [f"the provider reports a violation: {violation}" for violation in ledger.violations]
    for problem in problems[:20]:
        print(f"problem   {problem}")
    print("\nFAILED" if problems else "\n0 failed requests, and every credit is accounted for")
    return not problems


def main():
    arguments = parse_arguments()
    try:
        with Processes() as processes:
            return 0 if run_demo(processes, arguments.binary, arguments.requests) else 1
    except Failure as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
