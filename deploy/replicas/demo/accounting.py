"""Compares the usage databases of all replicas with the provider's ledger, request by request. Reports the differences
and failed attempts that no killed replica explains. The demo and `tests/faults/replicas.py` use it."""

import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field

from load import CUT_OFF
from processes import Failure


class LedgerReader:
    """Collects the requests in the provider's ledger. The ledger contains only the last thousand requests, so it must
    be read often."""

    def __init__(self, provider):
        self._provider = provider
        self.requests, self.totals, self.keys, self.violations = [], {}, [], []

    def read(self):
        """Adds the requests since the last call."""
        ledger = self._provider.ledger()
        self.totals, listed = ledger["totals"], ledger["requests"]
        new_count = self.totals["requests"] - self.totals["in_flight"] - len(self.requests)
        if new_count > len(listed):
            raise Failure("the provider's ledger was not read often enough")
        self.requests += listed[len(listed) - new_count :]
        self.keys, self.violations = ledger["keys"], ledger["violations"]


@dataclass
class UnrecordedCharge:
    """A request whose charge is in no database, because the replica was killed before it wrote the record."""

    number: int
    credits: int
    # The seconds between the response and the kill, or `None` if there was no response.
    seconds_before_kill: "float | None"


@dataclass
class Comparison:
    """The charged and the recorded credits, and the differences between them."""

    charged: int
    recorded: int
    # The recorded credits by the name of the replica.
    by_replica: dict
    # The charges that a kill explains, as `UnrecordedCharge`.
    unrecorded: list = field(default_factory=list)
    # Sentences about the differences that no kill explains.
    errors: list = field(default_factory=list)

    @property
    def unrecorded_credits(self):
        return sum(request.credits for request in self.unrecorded)


def read_records(database):
    """Returns the request IDs and credits of all usage records in the database of a replica."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        return connection.execute("SELECT request_id, credits FROM attempts").fetchall()
    finally:
        connection.close()


def compare(requests, databases, ledger, kills):
    """Compares the requests of a load with the databases and the ledger. `databases` and `kills` are dictionaries whose
    keys are replica names."""
    charged, recorded = defaultdict(list), defaultdict(list)
    for request in ledger.requests:
        charged[request["body_sha256"]].append(request["charged"])
    by_replica = {}
    for name, database in databases.items():
        records = read_records(database)
        by_replica[name] = sum(credits for _, credits in records)
        for request_id, credits in records:
            recorded[request_id].append(credits)
    comparison = Comparison(ledger.totals["charged"], sum(by_replica.values()), by_replica)
    if sum(map(sum, charged.values())) != comparison.charged:
        comparison.errors.append("the provider's list of requests does not contain all charges")

    for request in requests:
        request_ids = [f"{request.number}-{retry}" for retry in range(len(request.attempts))]
        difference = sum(charged[request.digest]) - sum(sum(recorded[request_id]) for request_id in request_ids)
        if difference > 0 and (lost := find_lost_attempt(request, kills)):
            comparison.unrecorded.append(UnrecordedCharge(request.number, difference, lost.seconds_before_kill))
        elif difference != 0:
            recorded_credits = [recorded[request_id] for request_id in request_ids]
            comparison.errors.append(
                f"request {request.number}: charged {charged[request.digest]}, recorded {recorded_credits}, "
                f"attempts {request.attempts}"
            )
    check_order(requests, comparison, recorded, kills)
    if comparison.recorded + comparison.unrecorded_credits != comparison.charged:
        comparison.errors.append(
            f"{comparison.charged} credits charged, {comparison.recorded} recorded, "
            f"{comparison.unrecorded_credits} explained by a kill"
        )
    return comparison


@dataclass
class LostAttempt:
    """An attempt whose record a kill may have lost."""

    # The seconds between the response and the kill, or `None` if there was no complete response.
    seconds_before_kill: "float | None"


def was_in_flight(attempt, kill):
    """Returns whether an attempt without a complete response may have failed because of a kill."""
    overlaps_kill = attempt.started_at <= kill.ended_at and attempt.ended_at >= kill.started_at
    return attempt.result in ("502", CUT_OFF) and overlaps_kill


def describe_unexplained_failures(requests, kills):
    """Returns descriptions of the failed attempts that no kill explains."""
    return [
        f"request {request.number}: attempt {retry + 1} ended with {attempt.result}"
        for request in requests
        for retry, attempt in enumerate(request.attempts)
        if attempt.result != "200" and not any(was_in_flight(attempt, kill) for kill in kills.values())
    ]


def find_lost_attempt(request, kills):
    """Returns the attempt of a request whose record a kill may have lost: it was in flight at the kill and failed, or
    it was served by the killed replica before the kill."""
    for attempt in request.attempts:
        for name, kill in kills.items():
            if was_in_flight(attempt, kill):
                return LostAttempt(None)
            if attempt.replica == name and attempt.started_at <= kill.ended_at:
                return LostAttempt(max(0.0, kill.started_at - attempt.ended_at))
    return None


def check_order(requests, comparison, recorded, kills):
    """Adds an error if a record was lost although the record of a later response from the same replica to the same
    client was kept. A replica writes its records in order, so that a kill can lose only the last records."""
    unrecorded = {request.number for request in comparison.unrecorded if request.seconds_before_kill is not None}
    for name, kill in kills.items():
        lost_clients = {}
        for request in sorted(requests, key=lambda request: request.number):
            attempt = request.attempts[-1]
            if attempt.replica != name or attempt.started_at > kill.ended_at:
                continue
            if request.number in unrecorded:
                lost_clients[request.client] = request.number
            elif request.client in lost_clients:
                comparison.errors.append(
                    f"request {lost_clients[request.client]} has no record, although the later request {request.number} "
                    "has one"
                )
