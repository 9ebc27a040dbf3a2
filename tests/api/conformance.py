"""Tests the admin API of a running Keychoir against `docs/openapi.json` with schemathesis. Schemathesis generates valid
and invalid requests, and each of them must get a documented response that matches its schema. The stream of events is
not tested. The script exits with 0 if all responses match, and otherwise with the exit code of schemathesis or 1.

    python conformance.py KEYCHOIR [EXAMPLES]

`EXAMPLES` is the maximum number of generated requests for each operation.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs/openapi.json"
API = "/api/keychoir/v1"
ADMIN_TOKEN = "kca_conformance_0123456789"
CLIENT_TOKEN = "conformance-client-token"
KEYS = [f"sk_conformance_{number:036d}" for number in range(2)]
# The stream of events, which has no end and is not tested.
EVENTS_PATH = "/events"
# The document that a client reads about itself. It requires a client token instead of the admin token.
OWN_PATH = "/me"

START_TIMEOUT_SECONDS = 30
RUN_TIMEOUT_SECONDS = 300


@contextlib.contextmanager
def start_program(binary, arguments, stream, environment):
    """Runs a command of Keychoir. Yields the first URL in its output, or None if there is none. A thread reads the
    output, so that the command never blocks on a full pipe."""
    child = subprocess.Popen([binary, *arguments], env=environment, text=True, **{stream: subprocess.PIPE})
    lines, has_url_or_ended = getattr(child, stream), threading.Event()
    output = []

    def read_output():
        for line in lines:
            output.append(line)
            if "http://" in line:
                has_url_or_ended.set()
        has_url_or_ended.set()

    threading.Thread(target=read_output, daemon=True).start()
    try:
        if not has_url_or_ended.wait(START_TIMEOUT_SECONDS):
            sys.exit(f"Keychoir did not start: {output}")
        words = "".join(output).replace('"', " ").split()
        yield next((word for word in words if word.startswith("http://")), None)
    finally:
        child.terminate()
        child.wait(START_TIMEOUT_SECONDS)


def clean_environment(**variables):
    """Returns the environment without the variables that configure Keychoir or a proxy, and with `variables`."""
    removed_prefixes = ("KEYCHOIR_", "ELEVENLABS_", "SSL_CERT_", "CREDENTIALS_DIRECTORY")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(removed_prefixes) and not name.lower().endswith("_proxy")
    }
    return {**kept, **variables}


def run_schemathesis(directory, url, token, examples, *filters):
    """Tests the operations that `filters` select. Returns the exit code."""
    command = [
        str(pathlib.Path(sys.executable).with_name("schemathesis")),
        "run",
        str(DOCUMENT),
        *("--url", url + API),
        *("--header", f"Authorization: Bearer {token}"),
        *("--phases", "examples,coverage,fuzzing,stateful"),
        *("--max-examples", str(examples)),
        *("--seed", "1"),
        # The generated names of clients and keys mostly do not exist, which would cause warnings about the status 404.
        *("--warnings", "off"),
        # Some rules of the API cannot be expressed by a schema, such as that a name must exist. Requests with wrong
        # tokens would soon be refused with 429.
        *("--exclude-checks", "positive_data_acceptance,ignored_auth"),
        *("--request-timeout", "10"),
        "--no-color",
        *filters,
    ]
    return subprocess.run(command, cwd=directory, env=clean_environment(), timeout=RUN_TIMEOUT_SECONDS).returncode


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    examples = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as running:
        keys = [argument for key in KEYS for argument in ("--key", f"{key}=1000000")]
        simulate = ["simulate", "--listen", "127.0.0.1:0", *keys]
        provider = running.enter_context(start_program(binary, simulate, "stdout", clean_environment()))
        config = pathlib.Path(directory, "keychoir.toml")
        config.write_text(f'[[clients]]\nname = "app"\ntoken = "{CLIENT_TOKEN}"\nquota = "1000 requests per day"\n')
        environment = clean_environment(
            ELEVENLABS_API_KEYS=",".join(KEYS),
            KEYCHOIR_ADMIN_TOKEN=ADMIN_TOKEN,
            KEYCHOIR_CONFIG=str(config),
            KEYCHOIR_STORAGE__PATH=str(pathlib.Path(directory, "keychoir.db")),
            KEYCHOIR_UPSTREAM__BASE_URL=provider,
            KEYCHOIR_LOG__FORMAT="json",
        )
        serve = ["serve", "--listen", "127.0.0.1:0"]
        url = running.enter_context(start_program(binary, serve, "stderr", environment))
        if url is None:
            sys.exit("Keychoir did not start")
        urllib.request.urlopen(f"{url}/livez", timeout=START_TIMEOUT_SECONDS).close()
        operator_filters = ["--exclude-path", EVENTS_PATH, "--exclude-path", OWN_PATH]
        exit_codes = [
            run_schemathesis(directory, url, ADMIN_TOKEN, examples, *operator_filters),
            run_schemathesis(directory, url, CLIENT_TOKEN, examples, "--include-path", OWN_PATH),
        ]
        urllib.request.urlopen(f"{url}/livez", timeout=START_TIMEOUT_SECONDS).close()
    sys.exit(max(exit_codes))


if __name__ == "__main__":
    main()
