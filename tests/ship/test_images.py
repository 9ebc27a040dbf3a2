"""Builds the images of `Dockerfile` and `Dockerfile.prebuilt` with buildah, which needs no daemon, and runs their
programs as container runtimes do. The tests check the files, the settings and the size of the images, that they contain
no secret of the builder, that the program serves requests as an unprivileged user, and that the app of the compose file
gets speech.

No registry is used. The tests make the base image of `Dockerfile` themselves, with the name of the real one. In it, a
script replaces cargo. The script checks its arguments, and copies the finished program instead of compiling it. `make
test-image-build` builds the image with the real cargo.
"""

import json
import os
import pathlib
import re
import shutil
import tarfile

import pytest
import yaml
from conftest import (
    CLIENT_TOKEN,
    EMULATOR,
    IS_RELEASE,
    PROVIDER,
    ROOT,
    SPEECH_PATH,
    USER,
    Container,
    copy_program,
    create_owned_folder,
    free_port,
    needs,
    needs_curl,
    needs_root,
    request_speech,
    run,
)

MAX_IMAGE_SIZE = 20 * 1000 * 1000
BUSYBOX = "/bin/busybox"
BASE_APPLETS = ["sh", "sed", "mkdir", "touch", "cp", "cat", "echo", "grep", "test"]

# A secret in the environment and in the folder from which an image is built, which no image must contain.
CANARY = "sk_canary_of_the_builder_0123456789abcdef"
BUILDER_ENVIRONMENT = {
    "ELEVENLABS_API_KEYS": CANARY,
    "ELEVENLABS_API_KEY": CANARY,
    "KEYCHOIR_ADMIN_TOKEN": CANARY,
    "KEYCHOIR_CLIENT_TOKEN_FILE": f"/run/secrets/{CANARY}",
}
CANARY_FILES = [
    ".env",
    ".cargo/credentials.toml",
    "keychoir.db",
    "keychoir.toml",
    "deploy/secrets/elevenlabs_api_keys",
    "target/debug/key",
]

# Replaces cargo. The first call must come before the sources are copied, so that the dependencies are a separate layer.
CARGO_STUB = """#!/bin/sh
set -eu
test "$*" = "build --locked --release --target x86_64-unknown-linux-gnu"
test "$RUSTFLAGS" = '@FLAGS@'
test "$CARGO_PROFILE_RELEASE_STRIP" = symbols
test ! -e .env
test ! -e .cargo/credentials.toml
grep -q LIBSQLITE3_FLAGS .cargo/config.toml
if grep -q '^.\\[test\\]\\|^.\\[bench\\]' Cargo.toml; then exit 1; fi
if test -e src/cli; then
    cat /calls | grep -q dependencies
    mkdir -p target/x86_64-unknown-linux-gnu/release
    cp /program target/x86_64-unknown-linux-gnu/release/keychoir
else
    test -s src/main.rs
    echo dependencies > /calls
fi
"""
# Replaces rustc, which is called only for the name of the target.
RUSTC_STUB = """#!/bin/sh
test "$*" = "--print host-tuple" && echo x86_64-unknown-linux-gnu
"""

pytestmark = [
    needs_root,
    needs(shutil.which("buildah") and pathlib.Path(BUSYBOX).exists(), "buildah and busybox-static"),
]


class Buildah:
    """Runs buildah with a separate storage of images, without a daemon, an overlay file system or namespaces."""

    def __init__(self, folder, timeout=120):
        self.folder, self.timeout = folder, timeout

    def __call__(self, *arguments, environment=None):
        folders = ["--root", self.folder / "storage", "--runroot", self.folder / "run"]
        environment = {"HOME": str(self.folder), "TMPDIR": str(self.folder), **(environment or {})}
        command = ["buildah", *folders, "--storage-driver", "vfs", *arguments]
        return run(*command, environment=environment, timeout=self.timeout).stdout

    def build(self, context, dockerfile, name, environment=None, *options):
        """Builds an image from the folder `context`."""
        # Only an image in the format `docker` can have a health check.
        settings = ["--format", "docker", "--isolation", "chroot", "--pull-never", "--layers"]
        files = ["--file", context / dockerfile, "--tag", name, context]
        self("build", *settings, *options, *files, environment=environment)
        return Image(self, name)


class Image:
    """A built image and its configuration."""

    def __init__(self, buildah, name):
        self.buildah, self.name = buildah, name
        document = json.loads(buildah("inspect", "--type", "image", name))
        self.config = document["Docker"]["config"]
        self.environment = dict(word.split("=", 1) for word in self.config["Env"])

    def copy_root(self, target):
        """Copies the files of the image into a folder."""
        container = self.buildah("from", "--pull-never", self.name).strip()
        source = pathlib.Path(self.buildah("mount", container).strip())
        run("cp", "-a", source, target)
        self.buildah("rm", container)
        return target

    def archive(self, path):
        """Writes the manifest, the configuration and the layers into one file. The layers are not compressed."""
        self.buildah("push", self.name, f"docker-archive:{path}:{self.name}:test")
        return path


def write_canaries(context):
    """Writes files with a secret, which the image must not contain, into the folder from which it is built."""
    for name in CANARY_FILES:
        path = context / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY)


@pytest.fixture(scope="session")
def buildah(tmp_path_factory):
    return Buildah(tmp_path_factory.mktemp("buildah"))


def make_base_image(buildah, folder):
    """Makes an image with the name of the base image of `Dockerfile`, a shell, the program, and a replacement of cargo.
    """
    for name in ["bin", "usr/bin", "tmp"]:
        (folder / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, folder / "bin/busybox")
    for applet in BASE_APPLETS:
        (folder / "bin" / applet).symlink_to("busybox")
    copy_program(folder / "copied").rename(folder / "program")
    (folder / "copied").rmdir()
    flags = re.search(r"^STATIC_FLAGS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    for name, text in [("cargo", CARGO_STUB.replace("@FLAGS@", flags)), ("rustc", RUSTC_STUB)]:
        (folder / "usr/bin" / name).write_text(text)
        (folder / "usr/bin" / name).chmod(0o755)
    name = re.search(r"^FROM (\S+) AS build$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    container = buildah("from", "scratch").strip()
    buildah("copy", container, folder, "/")
    buildah("commit", "--format", "docker", container, f"docker.io/library/{name}")
    buildah("rm", container)


@pytest.fixture(scope="session")
def source_image(buildah, tmp_path_factory):
    """Builds the image of `Dockerfile`."""
    make_base_image(buildah, tmp_path_factory.mktemp("base"))
    context = tmp_path_factory.mktemp("sources")
    (context / ".cargo").mkdir()
    for name in ["Dockerfile", ".dockerignore", ".cargo/config.toml", "Cargo.toml", "Cargo.lock"]:
        shutil.copy(ROOT / name, context / name)
    for name in ["src", "config"]:
        shutil.copytree(ROOT / name, context / name)
    write_canaries(context)
    arguments = ["--build-arg", "VERSION=1.2.3", "--build-arg", "REVISION=abcdef"]
    return buildah.build(context, "Dockerfile", "keychoir-source", BUILDER_ENVIRONMENT, *arguments)


@pytest.fixture(scope="session")
def prebuilt_image(buildah, tmp_path_factory):
    """Builds the image of `Dockerfile.prebuilt`."""
    context = tmp_path_factory.mktemp("prebuilt")
    for name in ["Dockerfile.prebuilt", ".dockerignore"]:
        shutil.copy(ROOT / name, context / name)
    (context / "dist/state").mkdir(parents=True)
    program = "dist/keychoir-aarch64-linux" if EMULATOR else "dist/keychoir-x86_64-linux"
    copy_program(context / "dist").rename(context / program)
    write_canaries(context)
    arguments = ["--build-arg", "VERSION=1.2.3", "--build-arg", "REVISION=abcdef"]
    if EMULATOR:
        arguments += ["--build-arg", f"PROGRAM={program}", "--platform", "linux/arm64"]
    return buildah.build(context, "Dockerfile.prebuilt", "keychoir-prebuilt", BUILDER_ENVIRONMENT, *arguments)


# For a program of another processor, only the image of the prebuilt program is tested.
@pytest.fixture(params=["prebuilt_image"] if EMULATOR else ["source_image", "prebuilt_image"])
def image(request):
    return request.getfixturevalue(request.param)


def files_below(folder):
    """Returns the relative paths of all files and folders in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_an_image_contains_the_program_and_an_empty_folder(image, tmp_path):
    root = image.copy_root(tmp_path / "root")
    assert files_below(root) == {"keychoir", "var", "var/lib", "var/lib/keychoir"}
    assert (root / "var/lib/keychoir").stat().st_uid == USER, "the user of the image must own its volume"
    assert (root / "keychoir").stat().st_mode & 0o7777 == 0o755


def test_an_image_has_the_settings_of_its_containers(image):
    config = image.config
    assert config["User"] == f"{USER}:{USER}"
    assert (config["Entrypoint"], config["Cmd"]) == (["/keychoir"], ["serve"])
    assert list(config["Volumes"]) == ["/var/lib/keychoir"] and list(config["ExposedPorts"]) == ["11011/tcp"]
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert config["Healthcheck"]["Test"] == ["CMD", "/keychoir", "healthcheck"]
    labels = config["Labels"]
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == "1.2.3" and labels[f"{prefix}revision"] == "abcdef"
    manifest = (ROOT / "Cargo.toml").read_text()
    for label, field in [("description", "description"), ("licenses", "license")]:
        assert f'{field} = "{labels[prefix + label]}"' in manifest, f"the label {label} must have the text of Cargo.toml"


def test_no_part_of_an_image_contains_a_secret_of_its_builder(image, tmp_path):
    archive = image.archive(tmp_path / "image.tar")
    assert CANARY.encode() not in archive.read_bytes()
    assert CANARY not in image.buildah("inspect", "--type", "image", image.name)
    with tarfile.open(archive) as tar:
        layers = json.load(tar.extractfile("manifest.json"))[0]["Layers"]
        # The search above finds a secret only in layers that are not compressed.
        assert layers and all(tar.extractfile(name).read(512)[257:262] == b"ustar" for name in layers)


@pytest.mark.skipif(not IS_RELEASE, reason="only the released program is small")
def test_a_released_image_is_small(image, tmp_path):
    assert image.archive(tmp_path / "image.tar").stat().st_size <= MAX_IMAGE_SIZE


def start_command(image):
    """Returns the command that a container of the image runs."""
    return [*image.config["Entrypoint"], *image.config["Cmd"]]


def test_an_image_serves_as_an_unprivileged_user_in_a_read_only_root(
    image, state, secrets, simulator, nameserver, tmp_path
):
    root = image.copy_root(tmp_path / "root")
    container = Container(root, state, secrets, nameserver=nameserver)
    files = files_below(root)
    port = free_port()
    environment = {
        **image.environment,
        # The container uses the network of this machine, where the port of the image may be in use.
        "KEYCHOIR_SERVER__LISTEN": f"0.0.0.0:{port}",
        "KEYCHOIR_UPSTREAM__BASE_URL": f"http://{PROVIDER}:{simulator}",
        "ELEVENLABS_API_KEYS_FILE": "/run/secrets/elevenlabs_api_keys",
        "KEYCHOIR_CLIENT_TOKEN_FILE": "/run/secrets/client_token",
    }
    health_check = image.config["Healthcheck"]["Test"][1:]
    with container.start(*start_command(image), environment=environment) as process:
        process.wait_for("Base URL")
        assert request_speech(port)[0] == 200 and request_speech(port, "another-token-0123456789")[0] == 401
        check = container.run(*health_check, environment=environment)
        assert (check.returncode, check.stdout) == (0, "ready\n"), f"the health check must succeed: {check.stderr}"
        status = pathlib.Path(f"/proc/{process.child.pid}/status").read_text()
        assert f"Uid:\t{USER}\t{USER}\t{USER}\t{USER}\n" in status
        assert "CapEff:\t0000000000000000\n" in status and "NoNewPrivs:\t1\n" in status
        # An operator runs a command in the running container.
        listed = container.run("/keychoir", "status", environment=environment)
        status_output = listed.stdout + listed.stderr
        assert listed.returncode == 0, f"`keychoir status` must succeed: {status_output}"
        assert "2 of 2 keys active" in listed.stdout, f"both keys must be active: {status_output}"
        assert process.terminate() == 0, "the stop signal must end the program"
    assert container.run(*health_check, environment=environment).returncode == 1
    mode_warnings = [line for line in process.output if "warn" in line.lower() and "mode 0" in line]
    assert not mode_warnings, f"the modes of the secrets must cause no warning: {mode_warnings}"
    assert files_below(root) == files, "the program must write only to the volume"
    assert (state / "keychoir.db").stat().st_uid == USER


def test_an_image_without_settings_prints_the_missing_settings(image, state, secrets, tmp_path):
    container = Container(image.copy_root(tmp_path / "root"), state, secrets)
    refused = container.run(*start_command(image), environment=image.environment)
    assert refused.returncode == 78
    for advice in [
        "no ElevenLabs API keys are configured",
        "ELEVENLABS_API_KEYS_FILE",
        "no client token is required",
        "KEYCHOIR_CLIENT_TOKEN_FILE",
        "127.0.0.1:11011, also in a container that shares the network of the app",
        "unix:/run/keychoir/keychoir.sock",
    ]:
        assert advice in refused.stderr, f"the message must contain {advice!r}: {refused.stderr}"
    assert "PANIC" not in refused.stderr.upper()


@needs_curl
def test_an_app_that_shares_a_unix_socket_needs_no_token(prebuilt_image, state, secrets, simulator, tmp_path):
    shared = create_owned_folder(tmp_path / "shared")
    container = Container(prebuilt_image.copy_root(tmp_path / "root"), state, secrets, shared)
    environment = {
        **prebuilt_image.environment,
        "KEYCHOIR_SERVER__LISTEN": "unix:/run/keychoir/keychoir.sock",
        "KEYCHOIR_UPSTREAM__BASE_URL": f"http://127.0.0.1:{simulator}",
        "ELEVENLABS_API_KEYS_FILE": "/run/secrets/elevenlabs_api_keys",
    }
    with container.start("/keychoir", "serve", environment=environment) as process:
        process.wait_for("Base URL")
        assert container.run("/keychoir", "healthcheck", environment=environment).stdout == "ready\n"
        models = run("curl", "--silent", "--unix-socket", shared / "keychoir.sock", "http://localhost/v1/models")
        assert "eleven_flash_v2_5" in models.stdout
        assert process.terminate() == 0


@needs_curl
def test_the_app_of_the_compose_file_gets_speech_through_the_image(prebuilt_image, state, secrets, simulator, tmp_path):
    services = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
    port = free_port()
    container = Container(prebuilt_image.copy_root(tmp_path / "root"), state, secrets)
    environment = {
        **prebuilt_image.environment,
        **services["keychoir"]["environment"],
        "KEYCHOIR_SERVER__LISTEN": f"0.0.0.0:{port}",
        "KEYCHOIR_UPSTREAM__BASE_URL": f"http://127.0.0.1:{simulator}",
    }
    # This machine does not know the host names of the services, and the secrets are in another folder.
    app = services["app"]
    base_url = app["environment"]["ELEVENLABS_BASE_URL"].replace("keychoir:11011", f"127.0.0.1:{port}")
    command = [word.replace("$$", "$").replace("/run/secrets", str(secrets)) for word in app["command"]]
    with container.start("/keychoir", "serve", environment=environment) as process:
        process.wait_for("Base URL")
        printed = run(*command, environment={"ELEVENLABS_BASE_URL": base_url}).stdout
        assert re.fullmatch(r"200 audio/mpeg [1-9][0-9]* bytes\n", printed), f"the app must get speech: {printed}"
    assert SPEECH_PATH in " ".join(command)
    assert CLIENT_TOKEN not in "".join(process.output)


def test_the_manifest_of_the_dependency_layer_is_accepted_by_cargo(tmp_path):
    text = (ROOT / "Dockerfile").read_text()
    prepare = re.search(r"^RUN (sed .*?) \\\n    && cargo build", text, re.MULTILINE | re.DOTALL)[1]
    for name in ["Cargo.toml", "Cargo.lock"]:
        shutil.copy(ROOT / name, tmp_path / name)
    run("sh", "-ec", f'cd "$0" && {prepare}', tmp_path)
    cargo = {name: os.environ[name] for name in ["HOME", "CARGO_HOME", "RUSTUP_HOME"] if name in os.environ}
    toolchain = re.search(r'channel = "(.*)"', (ROOT / "rust-toolchain.toml").read_text())[1]
    options = ["--locked", "--no-deps", "--format-version", "1", "--manifest-path", tmp_path / "Cargo.toml"]
    metadata = run("cargo", "metadata", *options, environment={**cargo, "RUSTUP_TOOLCHAIN": toolchain})
    (package,) = json.loads(metadata.stdout)["packages"]
    assert sorted(kind for target in package["targets"] for kind in target["kind"]) == ["bin", "lib"]
