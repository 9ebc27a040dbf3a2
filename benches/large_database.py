"""Creates a usage database with 10 million attempts of 1,000 keys, and measures how long the pages of the dashboard and
the documents of the admin API take with it.

Keychoir creates the schema, and this script fills it with 3.3 GB in two minutes. `--directory` keeps the database, so
that later runs take seconds. Before the measurement, the script removes the file from the cache of the system, so that
the first reads are from the disk. The exit code is 1 if the first read of a path or the median of its reads takes
longer than MAX_READ_MS, or if a read fails. The script also ends with an error if the sums in the database are wrong
or are not computed within MAX_SUM_SECONDS. With `--keep-running`,
Keychoir and its simulator run until Ctrl-C. The script needs only Python and the built program:

    python3 benches/large_database.py target/release/keychoir [--directory DIRECTORY] [--attempts NUMBER]
        [--clients-per-key NUMBER] [--keep-running] [--paths PATH ...]
"""

import argparse
import contextlib
import hashlib
import http.client
import json
import os
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
import urllib.parse

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests", "faults"))
from proxy_process import start_program

KEYS = 1_000
CLIENTS = 20
# Keychoir deletes attempts after 30 days, the default of `storage.attempts_retention`.
DAYS = 29
HOUR_MS = 3_600_000
MAX_READ_MS = 100
MAX_SUM_SECONDS = 120
# The number of reads of each path.
READS = 20
API = "/api/keychoir/v1"
PAGES = [f"/_/{name}" for name in ("", "keys", "live", "usage", "clients", "connect", "system")]
# The paths that are measured. The times are inserted later.
PATHS = [
    *PAGES,
    "/api/elevenlabs-status",
    "/api/keychoir-keys",
    "/metrics",
    f"{API}/overview",
    f"{API}/keys",
    f"{API}/clients",
    f"{API}/attempts",
    f"{API}/changes",
    *(f"{API}/usage?by={dimension}&since={{day_ago}}" for dimension in ("hour", "key", "client", "model", "route")),
    *(f"/_/usage?by={dimension}" for dimension in ("key", "model", "route")),
    *(f"{API}/usage?by={dimension}&since={{month_ago}}" for dimension in ("key", "model", "route")),
]

# Inserts the attempts with the numbers from `first` up to but not including `end`.
INSERT_ATTEMPTS = """
WITH RECURSIVE numbers(n) AS (SELECT :first UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :end),
rows AS (
    SELECT n, :start + (n * :duration) / :total AS at, n % :keys AS key, n % 40 = 0 AS is_refused, n % 40 = 1 AS is_retry,
        n % 3 AS kind, 20 + n % 400 AS amount
    FROM numbers)
INSERT INTO attempts (id, request_id, number, started_at_ms, client, key_hash, method, route, model, status, verdict,
    request_bytes, response_bytes, characters, credits_reserved, credits, credits_from, first_byte_ms, total_ms, user, region)
SELECT printf('%08x-%04x-7%03x-8%03x-%012x', at >> 16, at & 0xffff, n & 0xfff, (n >> 12) & 0xfff, n),
    printf('%08x-%04x-7000-9000-%012x', at >> 16, at & 0xffff, n - is_retry), 1 + is_retry, at,
    printf('app-%d', (key + n / :keys % :clients_per_key) % :clients), (SELECT key_hash FROM pool_keys WHERE position = key),
    'POST', iif(kind = 2, '/v1/text-to-speech/{id}/stream', '/v1/text-to-speech/{id}'),
    iif(kind = 1, 'eleven_v3', 'eleven_flash_v2_5'), iif(is_refused, 429, 200), iif(is_refused, 'rate_limited', 'served'),
    200 + amount, iif(is_refused, 120, amount * 1500), amount, amount, iif(is_refused, 0, amount),
    iif(is_refused, 'free', 'answer'), 80 + n % 300, 200 + n % 3000, iif(n % 5 = 0, printf('%016x', n % 500), NULL), 'global'
FROM rows
"""
# The sums of an hour, in the order of the columns.
SUMS = """count(*), sum(status < 400), sum(request_bytes), sum(response_bytes), sum(characters), sum(credits), 0,
    sum(status < 400), sum(credits) FROM attempts WHERE id >= :first AND id < :end"""
# Inserts the sums of an hour by key, client, route and model.
INSERT_HOURS = f"""
INSERT INTO hours SELECT :hour, key_hash, client, route, model, {SUMS} GROUP BY key_hash, client, route, model
"""
# Inserts the sums of an hour by client, user and region.
INSERT_USER_HOURS = f"""
INSERT INTO user_hours SELECT :hour, client, iif(credits > 0, coalesce(user, ''), ''), region, {SUMS} GROUP BY 2, 3, 4
"""


def api_key(position):
    return f"sk_large_database_key_{position:028d}"


def key_hash(position):
    """Returns the fingerprint of a key, as Keychoir computes it."""
    return hashlib.sha256(b"keychoir:key:1:" + api_key(position).encode()).hexdigest()


@contextlib.contextmanager
def start_keychoir(binary, directory):
    """Starts the simulator with all keys, and Keychoir with the database in the directory. Yields the port of Keychoir.
    """
    keys = os.path.join(directory, "keys")
    with open(keys, "w") as file:
        file.write(",".join(map(api_key, range(KEYS))))
    os.chmod(keys, 0o600)
    key_arguments = [argument for position in range(KEYS) for argument in ("--key", f"{api_key(position)}=1000000000")]
    simulator, upstream = start_program(
        [binary, "simulate", "--listen", "127.0.0.1:0", *key_arguments], "stdout", r"(http://\S+)"
    )
    try:
        keychoir, port = start_program(
            [binary, "serve", "--listen", "127.0.0.1:0"],
            "stderr",
            r"Server started at http://127\.0\.0\.1:(\d+)",
            **{
                "ELEVENLABS_API_KEYS_FILE": keys,
                "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
                "KEYCHOIR_STORAGE__PATH": os.path.join(directory, "keychoir.db"),
                "KEYCHOIR_LOG__FORMAT": "json",
                "KEYCHOIR_LOG__LEVEL": "error,keychoir::cli=info",
            },
        )
        try:
            yield int(port)
        finally:
            stop(keychoir)
    finally:
        stop(simulator)


def stop(process):
    process.send_signal(signal.SIGTERM)
    process.wait(60)


def hours_of(start_ms, duration_ms):
    """Returns the starts of the hours of a period."""
    first = start_ms - start_ms % HOUR_MS
    return range(first, start_ms + duration_ms, HOUR_MS)


def first_id(at_ms):
    """Returns the start of the ID of an attempt at this time. Attempts are sorted by their IDs."""
    return f"{at_ms >> 16:08x}-{at_ms & 0xFFFF:04x}"


def fill_database(path, attempts, clients_per_key):
    """Inserts the attempts and their hourly sums, hour by hour, so that both are in the order of their primary keys.
    Returns the number of rows of hourly sums."""
    duration = DAYS * 24 * HOUR_MS
    start_ms = int(time.time() * 1_000) - duration
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        # The journal is off, because an interrupted run creates the file again.
        database.executescript(
            """ PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -200000; PRAGMA locking_mode =
            EXCLUSIVE; CREATE TEMP TABLE pool_keys (position INTEGER PRIMARY KEY, key_hash TEXT NOT NULL); BEGIN;
            """
        )
        database.executemany("INSERT INTO pool_keys VALUES (?, ?)", ((key, key_hash(key)) for key in range(KEYS)))
        fixed = {
            "start": start_ms,
            "duration": duration,
            "total": attempts,
            "keys": KEYS,
            "clients": CLIENTS,
            "clients_per_key": clients_per_key,
        }
        first = 0
        for hour in hours_of(start_ms, duration):
            # The number of the first attempt in the next hour.
            end = min(attempts, -(-(hour + HOUR_MS - start_ms) * attempts // duration))
            if end > first:
                database.execute(INSERT_ATTEMPTS, {**fixed, "first": first, "end": end})
                limits = {"hour": hour, "first": first_id(hour), "end": first_id(hour + HOUR_MS)}
                database.execute(INSERT_HOURS, limits)
                database.execute(INSERT_USER_HOURS, limits)
            first = end
        database.execute("COMMIT")
        counts = database.execute(
            "SELECT (SELECT count(*) FROM attempts), (SELECT sum(attempts) FROM hours),"
            " (SELECT sum(attempts) FROM user_hours), (SELECT count(*) FROM hours)"
        ).fetchone()
        # Keychoir uses the write-ahead log.
        database.execute("PRAGMA journal_mode = WAL")
    if counts[:3] != (attempts, attempts, attempts):
        raise SystemExit(f"the attempts and their sums differ: {counts}")
    return counts[3]


def create_database(binary, directory, attempts, clients_per_key):
    """Creates the database, unless a complete one with the same parameters exists."""
    path = os.path.join(directory, "keychoir.db")
    completion_mark = os.path.join(directory, f"complete-{attempts}-{clients_per_key}")
    if os.path.exists(completion_mark):
        return
    for name in os.listdir(directory):
        if name.startswith(("keychoir.db", "complete-")):
            os.remove(os.path.join(directory, name))
    with start_keychoir(binary, directory):
        pass
    started_at = time.monotonic()
    hour_rows = fill_database(path, attempts, clients_per_key)
    open(completion_mark, "w").close()
    size = os.path.getsize(path) / 1e9
    seconds = time.monotonic() - started_at
    print(f"{attempts:,} attempts, {hour_rows:,} hourly sums, {size:.1f} GB in {seconds:.0f} s", flush=True)


def sum_days(program, directory):
    """Runs Keychoir until it has added the hours to the sums by day, which it does in the background."""
    path = os.path.join(directory, "keychoir.db")
    started_at, hour = time.monotonic(), int(time.time() * 1_000) // HOUR_MS * HOUR_MS
    count_missing = (
        "SELECT count(DISTINCT hours.hour_ms) FROM hours, next_hour_of_days AS next "
        "WHERE hours.hour_ms >= next.hour_ms AND hours.hour_ms < ?"
    )
    connect = lambda: sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with start_keychoir(program, directory), contextlib.closing(connect()) as database:
        count = hours_left = database.execute(count_missing, [hour]).fetchone()[0]
        while hours_left > 0:
            if time.monotonic() - started_at > MAX_SUM_SECONDS:
                raise SystemExit(f"{hours_left} hours are not summed by day after {MAX_SUM_SECONDS} s")
            time.sleep(0.2)
            hours_left = database.execute(count_missing, [hour]).fetchone()[0]
    if count > 0:
        print(f"{count} hours summed by day in {time.monotonic() - started_at:.1f} s", flush=True)


def sign_in(port, admin_token):
    """Returns the cookie of a session of the dashboard."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", f"{API}/dashboard-codes", headers={"authorization": f"Bearer {admin_token}"})
        form = urllib.parse.urlencode({"code": json.load(connection.getresponse())["code"]})
        headers = {"content-type": "application/x-www-form-urlencoded", "origin": f"http://127.0.0.1:{port}"}
        connection.request("POST", "/_/login", form, headers)
        return connection.getresponse().headers["set-cookie"].partition(";")[0]


def read(port, path, headers):
    """Returns the milliseconds of a read, its status and the size of its body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        started_at = time.monotonic()
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        size = len(response.read())
        return (time.monotonic() - started_at) * 1_000, response.status, size


def measure_path(port, path, headers):
    """Prints the times of the reads of a path. Returns whether all reads succeeded within the limit."""
    reads = [read(port, path, headers) for _ in range(READS)]
    times = sorted(milliseconds for milliseconds, _, _ in reads)
    median, statuses = statistics.median(times), {status for _, status, _ in reads}
    is_ok = statuses == {200} and max(reads[0][0], median) <= MAX_READ_MS
    print(
        f"{'ok' if is_ok else 'FAILED':>6}  {path}: status {statuses}, {reads[-1][2] / 1e3:.0f} kB,"
        f" first {reads[0][0]:.1f} ms, median {median:.1f} ms, max {times[-1]:.1f} ms",
        flush=True,
    )
    return is_ok


def drop_from_cache(path):
    """Removes a file from the cache of the system."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_benchmark(options, directory):
    """Creates the database and measures all paths. Returns the exit code."""
    create_database(options.program, directory, options.attempts, options.clients_per_key)
    sum_days(options.program, directory)
    drop_from_cache(os.path.join(directory, "keychoir.db"))
    ago = lambda days: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * 24 * 3_600))
    times = {"day_ago": ago(1), "month_ago": ago(28)}
    with start_keychoir(options.program, directory) as port:
        with open(os.path.join(directory, "admin_token")) as file:
            token = file.read().strip()
        headers = {"authorization": f"Bearer {token}", "cookie": sign_in(port, token)}
        paths = [path.format(**times) for path in options.paths or PATHS]
        outcomes = [measure_path(port, path, headers) for path in paths]
        if options.keep_running:
            token_file = f"{directory}/admin_token"
            print(f"http://127.0.0.1:{port}, the admin token is in {token_file}, Ctrl-C ends the program", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return 0 if all(outcomes) else 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--paths", nargs="+", metavar="PATH", help="measure these instead of all pages and reads")
    parser.add_argument("--directory", help="keep the database here; by default it is deleted at the end")
    parser.add_argument("--attempts", type=int, default=10_000_000)
    parser.add_argument("--clients-per-key", type=int, default=1, help="with more clients, there are more hourly sums")
    parser.add_argument("--keep-running", action="store_true")
    options = parser.parse_args()
    options.program = os.path.abspath(options.program)
    if options.directory:
        os.makedirs(options.directory, exist_ok=True)
        return run_benchmark(options, os.path.abspath(options.directory))
    with tempfile.TemporaryDirectory() as directory:
        return run_benchmark(options, directory)


if __name__ == "__main__":
    sys.exit(main())
