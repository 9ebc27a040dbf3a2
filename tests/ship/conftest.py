"""Provides the pytest fixtures and functions of the tests in this directory. They run the static program as container
runtimes do: with another root directory, which is read-only, and as an unprivileged user. They also run a simulated
provider, a nameserver and a TLS server, and send requests for speech.

`KEYCHOIR_STATIC_BIN` is the path of the program. `KEYCHOIR_RELEASE=1` means that it is a released program, whose size
is checked as well. `KEYCHOIR_EMULATOR` is the path of a static emulator, such as `qemu-aarch64-static`, for a program
that was built for another processor. Tests whose tools or permissions are missing are skipped with the reason. With
`TESTS_SKIP_NOTHING=1`, they fail.
"""

import contextlib
import os
import pathlib
import queue
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import urllib.error
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = pathlib.Path(os.environ.get("KEYCHOIR_STATIC_BIN", ROOT / "target/ship/keychoir")).resolve()
EMULATOR = os.environ.get("KEYCHOIR_EMULATOR")
# The start of a command line that runs the program, on this machine and in a container.
PROGRAM = [EMULATOR, BINARY] if EMULATOR else [BINARY]
EMULATOR_IN_CONTAINER = ["/emulator"] if EMULATOR else []
IS_RELEASE = os.environ.get("KEYCHOIR_RELEASE") == "1"
SKIP_NOTHING = os.environ.get("TESTS_SKIP_NOTHING") == "1"
# The ID of the user and of the group in the images.
USER = 65532
KEYS = [f"sk_ship_{number:043d}" for number in range(2)]
CLIENT_TOKEN = "kc_token_of_the_containers_app"
# The host name of the provider.
PROVIDER = "provider.test"
# The type of a DNS query for an IPv4 address.
TYPE_A = 1
# The length of the header of a DNS query, which the name follows.
DNS_HEADER_BYTES = 12
SPEECH_PATH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM"
STEP_TIMEOUT_SECONDS = 30


def can_mount():
    """Returns whether this process may mount file systems."""
    command = ["unshare", "--mount", "--propagation", "private", "mount", "--bind", "/", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def needs(condition, reason):
    """Returns a marker that skips a test if `condition` is false. With TESTS_SKIP_NOTHING=1, the test is run."""
    return pytest.mark.skipif(not condition and not SKIP_NOTHING, reason=f"needs {reason}")


needs_root = needs(can_mount(), "the user root and the permission to mount")
needs_curl = needs(shutil.which("curl"), "curl")
needs_openssl = needs(shutil.which("openssl"), "openssl")


def run(*command, environment=None, check=True, timeout=120):
    """Runs a command with only PATH and `environment` as its variables. The command must succeed unless `check` is
    false. Returns its exit code and its output as text."""
    environment = {"PATH": os.environ["PATH"], **(environment or {})}
    completed = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert not check or completed.returncode == 0, f"{command} must succeed: {completed.stdout}{completed.stderr}"
    return completed


def free_port():
    """Returns a TCP port that no program uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Process:
    """A running program. A thread reads its output, so that the program never blocks on a full pipe."""

    def __init__(self, command, environment):
        self.lines, self.output = queue.Queue(), []
        self.child = subprocess.Popen(
            [str(word) for word in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.child.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, text):
        """Waits for a line of the output that contains `text`, and returns it."""
        while True:
            line = self.lines.get(timeout=STEP_TIMEOUT_SECONDS)
            assert line is not None, f"the program must print {text!r} before it ends: {self.output}"
            self.output.append(line)
            if text in line:
                return line

    def terminate(self):
        """Ends the program with SIGTERM, and returns its exit code."""
        self.child.terminate()
        return self.child.wait(STEP_TIMEOUT_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()


class Container:
    """A root directory and its mounts. A program runs in it as in a container that shares the network of this
    machine."""

    def __init__(self, root, state, secrets=None, shared=None, nameserver=None, has_devices=True):
        self.root, self.mounts = root, {"/var/lib/keychoir": state}
        if secrets:
            self.mounts["/run/secrets"] = secrets
        if shared:
            self.mounts["/run/keychoir"] = shared
        # Container runtimes create the mount points and some devices, and write the nameserver.
        for target in self.mounts:
            (root / target[1:]).mkdir(parents=True, exist_ok=True)
        if has_devices:
            (root / "dev").mkdir(exist_ok=True)
            for name in ["null", "random", "urandom"]:
                (root / "dev" / name).touch()
                self.mounts[f"/dev/{name}"] = f"/dev/{name}"
        if EMULATOR:
            (root / "emulator").touch()
            self.mounts["/emulator"] = EMULATOR
        if nameserver:
            (root / "etc").mkdir(exist_ok=True)
            (root / "etc/resolv.conf").write_text(f"nameserver {nameserver}\n")

    def command(self, *arguments):
        """Returns the command line that runs a program in the root as the user of the images, with a read-only root."""
        script = ["set -e", 'mount --bind "$0" "$0"', 'mount -o remount,bind,ro "$0"']
        for target, source in self.mounts.items():
            script.append(f'mount --bind "{source}" "$0{target}"')
        script.append(f'exec setpriv --no-new-privs chroot --userspec={USER}:{USER} --groups= "$0" "$@"')
        enter = ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script), self.root]
        return [*enter, *EMULATOR_IN_CONTAINER, *arguments]

    def run(self, *arguments, environment=None, check=False):
        return run(*self.command(*arguments), environment=environment, check=check)

    def start(self, *arguments, environment):
        # The programs that change the root directory, such as `unshare`, are found by PATH.
        return Process(self.command(*arguments), {"PATH": os.environ["PATH"], **environment})


def create_owned_folder(path, files=None):
    """Creates a folder that belongs to the user of the images, with files that only this user can read."""
    path.mkdir()
    for name, text in (files or {}).items():
        (path / name).write_text(text)
        (path / name).chmod(0o400)
        os.chown(path / name, USER, USER)
    os.chown(path, USER, USER)
    path.chmod(0o700)
    return path


@pytest.fixture
def state(tmp_path):
    return create_owned_folder(tmp_path / "state")


@pytest.fixture
def secrets(tmp_path):
    files = {"elevenlabs_api_keys": "\n".join(KEYS), "client_token": f"{CLIENT_TOKEN}\n"}
    return create_owned_folder(tmp_path / "secrets", files)


@pytest.fixture(scope="session")
def simulator():
    """Runs a simulated provider. Yields its port."""
    port = free_port()
    keys = [word for key in KEYS for word in ("--key", f"{key}=100000")]
    with Process([*PROGRAM, "simulate", "--listen", f"127.0.0.1:{port}", *keys], {}) as process:
        process.wait_for(str(port))
        yield port


@pytest.fixture(scope="session")
def nameserver():
    """Runs a DNS server on port 53 that knows only the name of the provider. Yields its address."""
    address = f"127.{os.getpid() % 250 + 1}.53.53"
    provider_name = b"".join(bytes([len(part)]) + part.encode() for part in PROVIDER.split(".")) + b"\0"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))

        def answer_queries():
            while True:
                try:
                    query, client = server.recvfrom(512)
                except OSError:
                    return
                end = query.index(b"\0", DNS_HEADER_BYTES) + 1
                name, (record_type,) = query[DNS_HEADER_BYTES:end], struct.unpack(">H", query[end : end + 2])
                is_known = name.lower() == provider_name
                # The name of the query, type A, class IN, 30 seconds, 4 bytes.
                answer = b"\xc0\x0c\0\x01\0\x01\0\0\0\x1e\0\x04" + socket.inet_aton("127.0.0.1")
                answers = answer if is_known and record_type == TYPE_A else b""
                # The codes are NOERROR and NXDOMAIN.
                flags = b"\x81\x80" if is_known else b"\x81\x83"
                counts = struct.pack(">HHHH", 1, 1 if answers else 0, 0, 0)
                question = query[DNS_HEADER_BYTES : end + 4]
                server.sendto(query[:2] + flags + counts + question + answers, client)

        threading.Thread(target=answer_queries, daemon=True).start()
        yield address


@contextlib.contextmanager
def tls_in_front_of(port, directory):
    """Runs a TLS server for the name of the provider, which relays the decrypted bytes to `port`. Yields its port. The
    certificate of its authority is in the file `ca.pem` of `directory`."""
    directory.mkdir()
    certificate = lambda name: directory / f"{name}.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    authority = ["-keyout", directory / "ca.key", "-out", certificate("ca")]
    run("openssl", "req", "-x509", *curve, "-subj", "/CN=ship", *authority)
    issuer = ["-CA", certificate("ca"), "-CAkey", directory / "ca.key"]
    extensions = ["-addext", f"subjectAltName=DNS:{PROVIDER}", "-addext", "basicConstraints=critical,CA:FALSE"]
    leaf = ["-keyout", directory / "leaf.key", "-out", certificate("leaf")]
    run("openssl", "req", "-x509", *curve, "-subj", f"/CN={PROVIDER}", *issuer, *extensions, *leaf)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate("leaf"), directory / "leaf.key")

    def relay(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def relay_connection(client):
        with contextlib.suppress(OSError):
            client = context.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=relay, args=(server, client), daemon=True).start()
            relay(client, server)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept_connections():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=relay_connection, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept_connections, daemon=True).start()
        yield listener.getsockname()[1]


def request_speech(port, token=CLIENT_TOKEN):
    """Requests speech from Keychoir on `port`. Returns the status, and the number of bytes of the body."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{SPEECH_PATH}",
        data=b'{"text": "Hello.", "model_id": "eleven_flash_v2_5"}',
        headers={"content-type": "application/json", "xi-api-key": token},
    )
    try:
        with urllib.request.urlopen(request, timeout=STEP_TIMEOUT_SECONDS) as response:
            return response.status, len(response.read())
    except urllib.error.HTTPError as error:
        return error.code, len(error.read())


def copy_program(folder):
    """Copies the program into a folder, without debugging information, which a released program does not have."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "keychoir"
    if IS_RELEASE:
        shutil.copy(BINARY, target)
    else:
        run("strip", "-o", target, BINARY)
    target.chmod(0o755)
    return target
