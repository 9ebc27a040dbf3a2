"""Runs the static program as containers do: in a root of its own, as an unprivileged user, without writing to the root.

`KEYCHOIR_STATIC_BIN` names the program. With `KEYCHOIR_RELEASE=1` it is the released one, whose size is checked, too.
`KEYCHOIR_EMULATOR` names a static program that runs it, if it is built for another machine: `qemu-aarch64-static`.
Tests whose tools or permissions are missing are skipped with the reason. With `TESTS_SKIP_NOTHING=1` they fail.
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
# The first words of a command line that runs the program, here and in a container.
PROGRAM = [EMULATOR, BINARY] if EMULATOR else [BINARY]
EMULATOR_IN_CONTAINER = ["/emulator"] if EMULATOR else []
IS_RELEASE = os.environ.get("KEYCHOIR_RELEASE") == "1"
SKIP_NOTHING = os.environ.get("TESTS_SKIP_NOTHING") == "1"
# The user of the images.
USER = 65532
KEYS = [f"sk_ship_{number:043d}" for number in range(2)]
CLIENT_TOKEN = "kc_token_of_the_containers_app"
PROVIDER = "provider.test"
SPEECH = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM"
STEP_TIMEOUT = 30



def can_mount():
    command = ["unshare", "--mount", "--propagation", "private", "mount", "--bind", "/", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


def needs(condition, reason):
    return pytest.mark.skipif(not condition and not SKIP_NOTHING, reason=f"needs {reason}")


needs_root = needs(can_mount(), "the user root and the permission to mount")
needs_curl = needs(shutil.which("curl"), "curl")
needs_openssl = needs(shutil.which("openssl"), "openssl")


def run(*command, environment=None, check=True, timeout=120):
    """Runs a command in an empty environment, and returns its result with its output as text."""
    environment = {"PATH": os.environ["PATH"], **(environment or {})}
    result = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert not check or result.returncode == 0, f"{command} must succeed: {result.stdout}{result.stderr}"
    return result


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Process:
    """A running program. A thread reads its output, so that it never blocks on it."""

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
        """Returns the first line with `text`."""
        while True:
            line = self.lines.get(timeout=STEP_TIMEOUT)
            assert line is not None, f"the program must print {text!r} before it ends: {self.output}"
            self.output.append(line)
            if text in line:
                return line

    def terminate(self):
        """Ends the program with SIGTERM, and returns its exit code."""
        self.child.terminate()
        return self.child.wait(STEP_TIMEOUT)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()


class Container:
    """A root folder and the mounts with which a program runs in it, like a container on the network of the machine."""

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
        """The command line that runs the program of the root as the user of the images, with a read-only root."""
        script = ["set -e", 'mount --bind "$0" "$0"', 'mount -o remount,bind,ro "$0"']
        for target, source in self.mounts.items():
            script.append(f'mount --bind "{source}" "$0{target}"')
        script.append(f'exec setpriv --no-new-privs chroot --userspec={USER}:{USER} --groups= "$0" "$@"')
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(script), self.root, *EMULATOR_IN_CONTAINER, *arguments]

    def run(self, *arguments, environment=None, check=False):
        return run(*self.command(*arguments), environment=environment, check=check)

    def start(self, *arguments, environment):
        # The tools that enter the root are found by PATH, as the runtime's are.
        return Process(self.command(*arguments), {"PATH": os.environ["PATH"], **environment})


def owned_folder(path, files=None):
    """Creates a folder of the user of the images, with files that only this user can read."""
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
    return owned_folder(tmp_path / "state")


@pytest.fixture
def secrets(tmp_path):
    files = {"elevenlabs_api_keys": "\n".join(KEYS), "client_token": f"{CLIENT_TOKEN}\n"}
    return owned_folder(tmp_path / "secrets", files)


@pytest.fixture(scope="session")
def simulator():
    """The port of a simulated ElevenLabs."""
    port = free_port()
    keys = [word for key in KEYS for word in ("--key", f"{key}=100000")]
    with Process([*PROGRAM, "simulate", "--listen", f"127.0.0.1:{port}", *keys], {}) as process:
        process.wait_for(str(port))
        yield port


@pytest.fixture(scope="session")
def nameserver():
    """The address of a DNS server on port 53, which knows the name of the provider only."""
    address = f"127.{os.getpid() % 250 + 1}.53.53"
    question = b"".join(bytes([len(part)]) + part.encode() for part in PROVIDER.split(".")) + b"\0"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))

        def serve():
            while True:
                try:
                    query, client = server.recvfrom(512)
                except OSError:
                    return
                end = query.index(b"\0", 12) + 1
                name, (kind,) = query[12:end], struct.unpack(">H", query[end : end + 2])
                is_known = name.lower() == question
                answer = b"\xc0\x0c\0\x01\0\x01\0\0\0\x1e\0\x04" + socket.inet_aton("127.0.0.1")
                answers = answer if is_known and kind == 1 else b""
                flags = b"\x81\x80" if is_known else b"\x81\x83"
                counts = struct.pack(">HHHH", 1, 1 if answers else 0, 0, 0)
                server.sendto(query[:2] + flags + counts + query[12 : end + 4] + answers, client)

        threading.Thread(target=serve, daemon=True).start()
        yield address


@contextlib.contextmanager
def tls_in_front_of(port, directory):
    """A TLS server for the name of the provider. Yields its port. The file `ca.pem` is its authority."""
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

    def copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def handle(client):
        with contextlib.suppress(OSError):
            client = context.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=copy, args=(server, client), daemon=True).start()
            copy(client, server)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=handle, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


def speak(port, token=CLIENT_TOKEN):
    """Requests speech from a program on this machine. Returns the status and the number of bytes."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{SPEECH}",
        data=b'{"text": "Hello.", "model_id": "eleven_flash_v2_5"}',
        headers={"content-type": "application/json", "xi-api-key": token},
    )
    try:
        with urllib.request.urlopen(request, timeout=STEP_TIMEOUT) as response:
            return response.status, len(response.read())
    except urllib.error.HTTPError as error:
        return error.code, len(error.read())


def copy_program(folder):
    """Copies the program without debugging information, which the released one does not have either."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "keychoir"
    if IS_RELEASE:
        shutil.copy(BINARY, target)
    else:
        run("strip", "-o", target, BINARY)
    target.chmod(0o755)
    return target
