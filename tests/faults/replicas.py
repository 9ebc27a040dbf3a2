"""Tests three replicas of Keychoir under load while Redis is killed, stopped, flushed, slow or fails over, and while a
replica is killed, or stopped and started as for an upgrade.

No request may fail, and the usage records of all replicas together must contain every credit that the provider has
charged, apart from records that a killed replica had not yet written. After a fault, all replicas should share the pool
again within two seconds. A case fails only after more than five seconds, because a busy machine is slower. The script
also prints the median and the 99th percentile of the durations of each phase, and their ratios to the phase without a
fault. The exit code is 1 if a case fails. The script needs Python, the programs redis-server, redis-sentinel and
haproxy, and the built `keychoir` binary. Its second argument is the duration of a phase in seconds. With 10 seconds, it
takes about two minutes:

    python3 tests/faults/replicas.py target/release/keychoir 10
"""

import os
import sys
import time
from collections import Counter

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "deploy", "replicas", "demo"))

from accounting import LedgerReader, compare
from load import Load
from processes import Failure, Processes, wait_until
from redis_servers import RedisServer, Sentinels
from pool import Provider, Replica, start_haproxy
from slow_forwarder import SlowForwarder

CLIENT_COUNT = 12
# The keys with their credits and their plan, which permits enough concurrent requests.
KEYS = {f"sk_faults_key_number_{number}": "1000000000:tier=scale" for number in range(3)}
REPLICA_NAMES = ("one", "two", "three")
RESPONSE_DELAY = "30ms"
BASELINE_PHASE = "no fault"
WARM_UP_SECONDS = 2
# The delay of each direction, so that a round trip takes 300 ms.
SLOW_DELAY_SECONDS = 0.15
# The maximum time after a fault until all replicas share the pool again.
MAX_RECOVERY_SECONDS = 2
# The time by which a busy machine may exceed `MAX_RECOVERY_SECONDS`.
BUSY_MACHINE_SECONDS = 3

failed_case_count = 0


def report(case, is_ok, measured):
    """Prints the measurements of a case, and counts the case if it failed."""
    global failed_case_count
    failed_case_count += not is_ok
    print(f"{'ok' if is_ok else 'FAILED':>6}  {case}: {measured}", flush=True)


class ReplicaLoad:
    """Three replicas behind HAProxy, and clients that send requests to them. The load consists of phases with different
    faults, and each phase is reported."""

    def __init__(self, processes, binary, redis_url, phase_seconds):
        self.phase_seconds = phase_seconds
        provider = Provider(processes, binary, KEYS, RESPONSE_DELAY)
        self.replicas = {name: Replica(processes, binary, name, provider, redis_url) for name in REPLICA_NAMES}
        self.ledger = LedgerReader(provider)
        self.kills, self.recoveries = {}, {}
        self.wait_until_shared()
        self.load = Load([start_haproxy(processes, self.replicas.values())], CLIENT_COUNT)
        self.load.phase = "warm-up"
        self.load.start()
        self.run_phase("warm-up", WARM_UP_SECONDS)
        self.run_phase(BASELINE_PHASE)

    def wait_until_shared(self):
        """Waits until every replica is connected and reports all other replicas."""
        for replica in self.replicas.values():
            replica.wait_until_shared()
        for name, replica in self.replicas.items():
            reports_all = lambda: replica.readiness().get("replicas") == len(REPLICA_NAMES)
            wait_until(f"replica {name} to report {len(REPLICA_NAMES)} replicas", reports_all)

    def run_phase(self, name, seconds=None, every_second=lambda: None):
        """Counts the requests of the next `seconds` to the phase `name`, and calls `every_second` once per second."""
        self.load.phase = name
        end = time.monotonic() + (seconds or self.phase_seconds)
        while time.monotonic() < end:
            every_second()
            self.ledger.read()
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))

    def measure_recovery(self, name):
        """Waits until all replicas share the pool again. The duration is reported with the phase `name`."""
        started_at = time.monotonic()
        self.wait_until_shared()
        self.recoveries[name] = time.monotonic() - started_at
        self.run_phase("recovered", 1)

    def finish(self):
        """Stops the load and the replicas, and reports each phase and the comparison of the usage records with the
        ledger."""
        self.load.stop()
        for replica in self.replicas.values():
            replica.process.end()
        self.ledger.read()
        requests = self.load.requests
        phases = {}
        for request in requests:
            phases.setdefault(request.phase, []).append(request)
        for phase, phase_requests in phases.items():
            report_phase(phase, phase_requests, phases[BASELINE_PHASE], self.recoveries.get(phase))
        databases = {name: replica.database for name, replica in self.replicas.items()}
        comparison = compare(requests, databases, self.ledger, self.kills)
        measured = (
            f"{comparison.charged:,} credits charged, {comparison.recorded:,} recorded, "
            f"{comparison.unrecorded_credits:,} of {len(comparison.unrecorded)} requests lost in a kill"
        )
        problems = comparison.errors + self.ledger.violations
        report("usage records", not problems, "; ".join([measured, *problems[:10]]))


def quantile(requests, share):
    """Returns the duration in seconds that this share of the requests does not exceed."""
    durations = sorted(request.seconds for request in requests)
    return durations[int(len(durations) * share)]


def report_phase(phase, requests, baseline, recovery_seconds):
    """Reports a phase. It passes if no request failed and if the replicas shared the pool again in time after it.
    `baseline` contains the requests of the phase without a fault. `recovery_seconds` is None for a phase without a
    measured recovery."""
    failed = [request for request in requests if not request.is_served]
    causes = Counter(attempt.result for request in requests for attempt in request.attempts[:-1])
    retries = f"{sum(causes.values())} sent again" + (f" {dict(causes)}" if causes else "")
    measured = [f"{len(requests)} requests, {len(failed)} failed, {retries}"]
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        seconds = quantile(requests, share)
        measured.append(f"{name} {seconds * 1e3:.1f} ms ({seconds / quantile(baseline, share):.2f})")
    has_recovered = recovery_seconds is None or recovery_seconds <= MAX_RECOVERY_SECONDS + BUSY_MACHINE_SECONDS
    if recovery_seconds is not None:
        measured.append(f"shared again after {recovery_seconds:.2f} s (at most {MAX_RECOVERY_SECONDS})")
    for request in failed[:5]:
        measured.append(f"request {request.number}: {[attempt.result for attempt in request.attempts]}")
    report(phase, not failed and has_recovered, ", ".join(measured))


def test_redis_and_replica_faults(binary, phase_seconds):
    """Tests faults of a single Redis server and of single replicas."""
    with Processes() as processes:
        redis = RedisServer(processes)
        forwarder = SlowForwarder(redis.port)
        replica_load = ReplicaLoad(processes, binary, f"redis://127.0.0.1:{forwarder.port}", phase_seconds)

        redis.kill()
        replica_load.run_phase("Redis killed")
        redis.restart()
        replica_load.measure_recovery("Redis killed")

        redis.stop()
        replica_load.run_phase("Redis stopped")
        redis.resume()
        replica_load.measure_recovery("Redis stopped")

        replica_load.run_phase("Redis flushed every second", every_second=redis.flush)
        replica_load.measure_recovery("Redis flushed every second")

        forwarder.delay = SLOW_DELAY_SECONDS
        replica_load.run_phase("round trips of 300 ms")
        forwarder.delay = 0.0
        replica_load.measure_recovery("round trips of 300 ms")

        replica_load.load.phase = "replica killed"
        replica_load.kills["two"] = replica_load.replicas["two"].kill()
        replica_load.run_phase("replica killed")
        replica_load.replicas["two"].restart()
        replica_load.measure_recovery("replica killed")

        replica_load.load.phase = "replica stopped and started"
        replica_load.replicas["three"].process.end()
        replica_load.run_phase("replica stopped and started")
        replica_load.replicas["three"].restart()
        replica_load.measure_recovery("replica stopped and started")
        replica_load.finish()


def test_failover(binary, phase_seconds):
    """Tests a failover by sentinels."""
    with Processes() as processes:
        sentinels = Sentinels(processes)
        replica_load = ReplicaLoad(processes, binary, sentinels.url, phase_seconds)
        replica_load.load.phase = "failover"
        sentinels.fail_over()
        replica_load.run_phase("failover")
        replica_load.measure_recovery("failover")
        replica_load.finish()


def main(binary, phase_seconds):
    for case in (test_redis_and_replica_faults, test_failover):
        try:
            case(binary, phase_seconds)
        except Failure as failure:
            report(case.__name__, False, failure)
    print(f"{failed_case_count} cases failed")
    return min(failed_case_count, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
