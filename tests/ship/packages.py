"""Tests the packages in a directory: what is in them, and that the Debian package serves.

    python packages.py DIST

The Debian package is installed into a root of its own (debootstrap, chroot), which needs root. systemd does not run
there, so the service is started as its unit says: with its command, user, directories and credential. It serves a
request from the simulator, is upgraded with a database that an earlier version has left, is removed and purged.
The RPM package is read and not installed. Checks whose programs are missing are skipped (report.py). The Homebrew formula and the Nix flake are only parsed.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import urllib.request

import report

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIST = pathlib.Path(sys.argv[1]).resolve()
VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
# The database of 0.1.0, with the schema before the current one.
EARLIER_DATABASE = ROOT / "tests/ship/packages.schema-14.sql"
EARLIER_SCHEMA = 14
KEY = "sk_packages_key_number_0"
ADDRESS = "127.0.0.1:11911"
START_TIMEOUT_SECONDS = 60
COMMAND_TIMEOUT_SECONDS = 600


def run(*command, **options):
    """Runs a command and returns its output. Fails with the output of both streams."""
    options.setdefault("timeout", COMMAND_TIMEOUT_SECONDS)
    ended = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert ended.returncode == 0, f"{command} must succeed, and ends with {ended.returncode}:\n{ended.stdout}"
    return ended.stdout


def only(pattern):
    found = sorted(DIST.glob(pattern))
    assert len(found) == 1, f"{DIST} must have one {pattern}, and has {found}"
    return found[0]


class DebianRoot:
    """A Debian system in a directory, into which packages are installed."""

    def __init__(self, directory):
        self.path = pathlib.Path(directory)
        suite = dict(line.split("=", 1) for line in open("/etc/os-release").read().splitlines() if "=" in line)
        run("debootstrap", "--variant=minbase", "--include=systemd,init-system-helpers", suite["VERSION_CODENAME"], self.path)

    def run(self, *command):
        return run("chroot", self.path, *command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"})

    def install(self, package):
        shutil.copy(package, self.path / "package.deb")
        return self.run("dpkg", "--install", "/package.deb")

    def owner_and_mode(self, path):
        return self.run("stat", "--format=%U %a", path).strip()

    def unit(self):
        """The settings of the installed service, where the last one of a name counts, and its environment."""
        settings, environment = {}, {}
        for line in (self.path / "usr/lib/systemd/system/keychoir.service").read_text().splitlines():
            name, separator, value = line.partition("=")
            if name == "Environment":
                environment |= dict(pair.split("=", 1) for pair in value.split())
            elif separator:
                settings[name] = value
        return settings, environment

    @contextlib.contextmanager
    def service(self, upstream):
        """Runs the service as systemd would, until the block ends."""
        settings, environment = self.unit()
        state = pathlib.Path("/var/lib", settings["StateDirectory"])
        self.run("install", "-d", "-o", settings["User"], "-g", settings["Group"], "-m", settings["StateDirectoryMode"], state)
        name, source = settings["LoadCredential"].split(":")
        credentials = pathlib.Path("/run/credentials/keychoir.service")
        self.run("install", "-d", "-o", settings["User"], "-m", "500", credentials)
        self.run("install", "-o", settings["User"], "-m", "400", source, credentials / name)
        environment |= {
            "PATH": "/usr/sbin:/usr/bin",
            "STATE_DIRECTORY": str(state),
            "CREDENTIALS_DIRECTORY": str(credentials),
            "KEYCHOIR_SERVER__LISTEN": ADDRESS,
            "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
            # The attempts of the earlier database are kept, however old they are.
            "KEYCHOIR_STORAGE__ATTEMPTS_RETENTION": "0s",
        }
        user = f"--userspec={settings['User']}:{settings['Group']}"
        command = ["chroot", user, str(self.path), *settings["ExecStart"].split()]
        with start(command, "stderr", r"Server started at", environment):
            yield


@contextlib.contextmanager
def start(command, stream, pattern, environment):
    """Starts a program, waits for the line of `stream` that matches, and yields the match. Stops it with SIGTERM."""
    log = tempfile.NamedTemporaryFile("w+")
    child = subprocess.Popen(command, env=environment, text=True, **{stream: subprocess.PIPE})
    try:
        lines = []
        for line in getattr(child, stream):
            lines.append(line)
            match = re.search(pattern, line)
            if match:
                break
        else:
            raise AssertionError(f"{command} must start, and ends with {child.wait()}:\n{''.join(lines)}")
        # What it prints from now on needs a reader.
        reader = subprocess.Popen(["cat"], stdin=getattr(child, stream), stdout=log)
        yield match
    finally:
        child.terminate()
        assert child.wait(timeout=START_TIMEOUT_SECONDS) == 0, "the program must end with 0 after SIGTERM"
        reader.wait(timeout=START_TIMEOUT_SECONDS)
        log.close()


def request_speech():
    request = urllib.request.Request(
        f"http://{ADDRESS}/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM",
        data=json.dumps({"text": "Packed.", "model_id": "eleven_multilingual_v2"}).encode(),
        headers={"content-type": "application/json", "xi-api-key": "anything"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.status, len(response.read())


def earlier_package(package, directory):
    """Repacks the package with a lower version."""
    tree = pathlib.Path(directory, "tree")
    run("dpkg-deb", "--raw-extract", package, tree)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*$", "Version: 0.1.0-1", control.read_text()))
    earlier = pathlib.Path(directory, "keychoir_0.1.0-1.deb")
    run("dpkg-deb", "--build", "--root-owner-group", tree, earlier)
    return earlier


def needs_programs(*names):
    for name in names:
        report.need(shutil.which(name), f"the program {name}")


def lintian_finds_nothing_in_the_debian_package():
    needs_programs("lintian")
    run("lintian", "--fail-on", "error,warning", "--allow-root", "--tag-display-limit", "0", only("*.deb"))


def the_debian_package_serves_is_upgraded_removed_and_purged():
    needs_programs("debootstrap")
    report.need(os.geteuid() == 0, "the user root")
    package = only("*.deb")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        root = DebianRoot(pathlib.Path(directory, "root"))

        # Installed.
        output = root.install(earlier_package(package, directory))
        assert "systemctl enable --now keychoir.socket" in output, f"the installation must name the next step:\n{output}"
        assert root.run("keychoir", "--version").strip() == f"keychoir {VERSION}"
        assert root.owner_and_mode("/etc/keychoir/elevenlabs_api_keys") == "root 600"
        assert root.run("getent", "passwd", "keychoir").split(":")[5] == "/var/lib/keychoir"
        for name in ("man/man1/keychoir.1.gz", "bash-completion/completions/keychoir", "zsh/vendor-completions/_keychoir"):
            assert (root.path / "usr/share" / name).is_file(), f"the package must have {name}"
        units = root.run("systemd-analyze", "verify", "--man=no", "keychoir.service", "keychoir.socket")
        unexpected = [line for line in units.splitlines() if "keychoir" in line and "notify-reload" not in line]
        assert not unexpected, f"systemd must accept the units: {unexpected}"

        # Serving.
        simulator = [root.path / "usr/bin/keychoir", "simulate", "--listen", "127.0.0.1:0", "--key", f"{KEY}=100000"]
        upstream = stack.enter_context(start([str(part) for part in simulator], "stdout", r"http://\S+", dict(os.environ))).group(0)
        keys = root.path / "etc/keychoir/elevenlabs_api_keys"
        keys.write_text(f"{KEY}\n")
        with root.service(upstream):
            status, size = request_speech()
            assert status == 200 and size > 1000, "the service must return speech"
        assert root.owner_and_mode("/var/lib/keychoir/keychoir.db") == "keychoir 600"

        # Upgraded, with the database of an earlier version and a configuration file that the operator has changed.
        database = root.path / "var/lib/keychoir/keychoir.db"
        for file in database.parent.glob("keychoir.db*"):
            file.unlink()
        with contextlib.closing(sqlite3.connect(database)) as connection:
            connection.executescript(EARLIER_DATABASE.read_text())
            attempts = connection.execute("SELECT count(*) FROM attempts").fetchone()[0]
        assert attempts > 0, "the earlier database must have attempts"
        root.run("chown", "keychoir:keychoir", "/var/lib/keychoir/keychoir.db")
        settings = root.path / "etc/keychoir/keychoir.toml"
        settings.write_text(settings.read_text() + "\n# Changed by the operator.\n")
        root.install(package)
        assert settings.read_text().endswith("# Changed by the operator.\n"), "an upgrade must keep the settings"
        assert keys.read_text() == f"{KEY}\n", "an upgrade must keep the keys"
        with root.service(upstream):
            assert request_speech()[0] == 200
        with contextlib.closing(sqlite3.connect(database)) as connection:
            schema = connection.execute("PRAGMA user_version").fetchone()[0]
            assert schema > EARLIER_SCHEMA, f"the database must be upgraded, and has schema {schema}"
            counted = connection.execute("SELECT count(*) FROM attempts").fetchone()[0]
            assert counted == attempts + 1, f"{attempts} earlier attempts and a new one must be there, not {counted}"
        assert database.with_name(f"keychoir.db.before-{EARLIER_SCHEMA}").exists(), "the upgrade must leave a copy"

        # Removed, and purged.
        root.run("dpkg", "--remove", "keychoir")
        assert not (root.path / "usr/bin/keychoir").exists()
        assert database.exists() and keys.exists(), "a removal must keep the state and the keys"
        root.run("dpkg", "--purge", "keychoir")
        for path in ("var/lib/keychoir", "etc/keychoir", "usr/share/doc/keychoir"):
            assert not (root.path / path).exists(), f"a purge must remove /{path}"
        left = root.run("find", "/etc", "/usr", "/var/lib", "-xdev", "-path", "*keychoir*").split()
        left = [path for path in left if not path.startswith("/var/lib/dpkg/")]
        assert not left, f"a purge must remove {left}"


def the_rpm_package_has_the_files_and_their_kinds():
    needs_programs("rpm")
    package = only("*.rpm")

    def query(*options):
        return run("rpm", "-qp", "--nosignature", *options, package)

    assert query("--qf", "%{NAME} %{VERSION} %{LICENSE}") == f"keychoir {VERSION} MIT OR Apache-2.0"
    files = query("--list").split()
    for path in (
        "/usr/bin/keychoir",
        "/usr/lib/systemd/system/keychoir.service",
        "/usr/lib/systemd/system/keychoir.socket",
        "/usr/lib/sysusers.d/keychoir.conf",
        "/usr/share/man/man1/keychoir.1",
        "/usr/share/bash-completion/completions/keychoir",
    ):
        assert any(file in (path, f"{path}.gz") for file in files), f"the RPM package must have {path}, not only {files}"
    assert query("--configfiles").split() == ["/etc/keychoir/keychoir.toml"]
    assert "systemd" in query("--requires").split()
    scripts = query("--scripts")
    for name in ("preinstall", "postinstall", "preuninstall", "postuninstall"):
        assert f"{name} scriptlet" in scripts, f"the RPM package must have the script {name}"


def the_checksums_are_those_of_the_files():
    run("sha256sum", "--check", "--strict", "SHA256SUMS", cwd=DIST)
    named = {line.split("  ")[1] for line in (DIST / "SHA256SUMS").read_text().splitlines()}
    files = {file.name for pattern in ("*.deb", "*.rpm", "*.tar.gz") for file in DIST.glob(pattern)}
    assert files <= named, f"SHA256SUMS must name {files - named}"


def the_tarball_has_the_program_and_its_files():
    with tempfile.TemporaryDirectory() as directory:
        for tarball in DIST.glob("*.tar.gz"):
            with tarfile.open(tarball) as archive:
                assert all(member.uid == member.gid == 0 for member in archive), "the owner must be fixed"
                archive.extractall(directory, filter="data")
            folder = pathlib.Path(directory, tarball.name.removesuffix(".tar.gz"))
            for name in ("LICENSE-MIT", "config/keychoir.toml", "systemd/keychoir.service", "man/keychoir.1"):
                assert (folder / name).is_file(), f"{tarball.name} must have {name}"
            if os.uname().machine in tarball.name:
                assert run(folder / "keychoir", "--version").strip() == f"keychoir {VERSION}"


def the_homebrew_formula_is_ruby_with_the_version_and_checksums():
    run(ROOT / "deploy/packages/formula", "owner/keychoir")
    formula = ROOT / "dist/keychoir.rb"
    text = formula.read_text()
    assert f'version "{VERSION}"' in text and "@" not in re.sub(r"#.*", "", text), "every placeholder must be replaced"
    needs_programs("ruby")
    run("ruby", "-c", formula)


def the_nix_flake_is_an_expression():
    needs_programs("nix-instantiate")
    run("nix-instantiate", "--parse", ROOT / "deploy/packages/flake.nix")


CHECKS = [
    the_checksums_are_those_of_the_files,
    the_tarball_has_the_program_and_its_files,
    the_rpm_package_has_the_files_and_their_kinds,
    the_homebrew_formula_is_ruby_with_the_version_and_checksums,
    the_nix_flake_is_an_expression,
    lintian_finds_nothing_in_the_debian_package,
    the_debian_package_serves_is_upgraded_removed_and_purged,
]

if __name__ == "__main__":
    report.run(CHECKS)
