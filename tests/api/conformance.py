"""Tests a running server against `docs/openapi.json` with schemathesis: generated requests, valid and invalid, must
get documented responses that match their schemas.

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
# A stream has no end.
STREAM = "/events"
# The client's own document, which the admin token does not open.
OWN = "/me"

START_TIMEOUT_SECONDS = 30
RUN_TIMEOUT_SECONDS = 300


@contextlib.contextmanager
def program(binary, arguments, stream, environment):
    """Runs Keychoir, and continues to read its output so that Keychoir never blocks on a full pipe."""
    child = subprocess.Popen([binary, *arguments], env=environment, text=True, **{stream: subprocess.PIPE})
    lines, found = getattr(child, stream), threading.Event()
    output = []

    def read():
        for line in lines:
            output.append(line)
            if "http://" in line:
                found.set()
        found.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not found.wait(START_TIMEOUT_SECONDS):
            sys.exit(f"Keychoir did not start: {output}")
        words = "".join(output).replace('"', " ").split()
        yield next((word for word in words if word.startswith("http://")), None)
    finally:
        child.terminate()
        child.wait(START_TIMEOUT_SECONDS)


def clean_environment(**variables):
    """Returns the environment without the variables of Keychoir and of proxies."""
    foreign = ("KEYCHOIR_", "ELEVENLABS_", "SSL_CERT_", "CREDENTIALS_DIRECTORY")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    return {**kept, **variables}


def run_schemathesis(folder, url, token, examples, *filters):
    command = [
        str(pathlib.Path(sys.executable).with_name("schemathesis")),
        "run",
        str(DOCUMENT),
        *("--url", url + API),
        *("--header", f"Authorization: Bearer {token}"),
        *("--phases", "examples,coverage,fuzzing,stateful"),
        *("--max-examples", str(examples)),
        *("--seed", "1"),
        # Names of clients and keys that exist are not generated, so most of the requested ones are not found.
        *("--warnings", "off"),
        # The API has rules that a schema cannot express, such as a name that exists. Wrong tokens would soon get 429.
        *("--exclude-checks", "positive_data_acceptance,ignored_auth"),
        *("--request-timeout", "10"),
        "--no-color",
        *filters,
    ]
    return subprocess.run(command, cwd=folder, env=clean_environment(), timeout=RUN_TIMEOUT_SECONDS).returncode


def main():
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    examples = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        keys = [argument for key in KEYS for argument in ("--key", f"{key}=1000000")]
        simulate = ["simulate", "--listen", "127.0.0.1:0", *keys]
        provider = running.enter_context(program(binary, simulate, "stdout", clean_environment()))
        config = pathlib.Path(folder, "keychoir.toml")
        config.write_text(f'[[clients]]\nname = "app"\ntoken = "{CLIENT_TOKEN}"\nquota = "1000 requests per day"\n')
        environment = clean_environment(
            ELEVENLABS_API_KEYS=",".join(KEYS),
            KEYCHOIR_ADMIN_TOKEN=ADMIN_TOKEN,
            KEYCHOIR_CONFIG=str(config),
            KEYCHOIR_STORAGE__PATH=str(pathlib.Path(folder, "keychoir.db")),
            KEYCHOIR_UPSTREAM__BASE_URL=provider,
            KEYCHOIR_LOG__FORMAT="json",
        )
        serve = ["serve", "--listen", "127.0.0.1:0"]
        url = running.enter_context(program(binary, serve, "stderr", environment))
        if url is None:
            sys.exit("Keychoir did not start")
        urllib.request.urlopen(f"{url}/livez", timeout=START_TIMEOUT_SECONDS).close()
        operators = ["--exclude-path", STREAM, "--exclude-path", OWN]
        codes = [
            run_schemathesis(folder, url, ADMIN_TOKEN, examples, *operators),
            run_schemathesis(folder, url, CLIENT_TOKEN, examples, "--include-path", OWN),
        ]
        urllib.request.urlopen(f"{url}/livez", timeout=START_TIMEOUT_SECONDS).close()
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
