"""Tests the packages in the directory DIST: their checksums and contents, and a Debian package from its installation to
its purge.

    python packages.py DIST

The Debian package is installed into a root directory that debootstrap creates, which needs the user root. systemd does
not run there, so the script starts the service with the command, user, directories and credential of its unit. The
service serves a request through the simulator. Then the package is upgraded, with the database of an earlier version,
removed and purged. lintian checks the Debian package. The RPM package is read and not installed. The Homebrew formula
is generated and parsed, and the Nix flake is parsed. `report.py` prints the outcomes, sets the exit code and skips the
checks whose programs are missing.
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
# The database of version 0.1.0, with an earlier schema.
EARLIER_DATABASE = ROOT / "tests/ship/packages.schema-14.sql"
EARLIER_SCHEMA = 14
KEY = "sk_packages_key_number_0"
ADDRESS = "127.0.0.1:11911"
START_TIMEOUT_SECONDS = 60
COMMAND_TIMEOUT_SECONDS = 600


def run(*command, **options):
    """Runs a command, which must succeed. Returns its output."""
    options.setdefault("timeout", COMMAND_TIMEOUT_SECONDS)
    completed = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    code, output = completed.returncode, completed.stdout
    assert code == 0, f"{command} must succeed, and ends with {code}:\n{output}"
    return completed.stdout


def find_only(pattern):
    """Returns the only file in DIST that matches the pattern."""
    found = sorted(DIST.glob(pattern))
    assert len(found) == 1, f"{DIST} must have one {pattern}, and has {found}"
    return found[0]


class DebianRoot:
    """A Debian system in a directory, into which packages are installed."""

    def __init__(self, directory):
        self.path = pathlib.Path(directory)
        os_release = dict(line.split("=", 1) for line in open("/etc/os-release").read().splitlines() if "=" in line)
        options = ["--variant=minbase", "--include=systemd,init-system-helpers"]
        run("debootstrap", *options, os_release["VERSION_CODENAME"], self.path)

    def run(self, *command):
        return run("chroot", self.path, *command, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"})

    def install(self, package):
        shutil.copy(package, self.path / "package.deb")
        return self.run("dpkg", "--install", "/package.deb")

    def owner_and_mode(self, path):
        return self.run("stat", "--format=%U %a", path).strip()

    def read_unit(self):
        """Returns the settings of the installed service and its environment. The last setting of a name counts."""
        settings, environment = {}, {}
        for line in (self.path / "usr/lib/systemd/system/keychoir.service").read_text().splitlines():
            name, separator, setting = line.partition("=")
            if name == "Environment":
                environment |= dict(pair.split("=", 1) for pair in setting.split())
            elif separator:
                settings[name] = setting
        return settings, environment

    @contextlib.contextmanager
    def run_service(self, upstream):
        """Runs the service with the settings of its unit, until the block ends."""
        settings, environment = self.read_unit()
        state = pathlib.Path("/var/lib", settings["StateDirectory"])
        owner = ["-o", settings["User"], "-g", settings["Group"]]
        self.run("install", "-d", *owner, "-m", settings["StateDirectoryMode"], state)
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
        with start_program(command, "stderr", r"Server started at", environment):
            yield


@contextlib.contextmanager
def start_program(command, stream, pattern, environment):
    """Starts a program, waits for a line of `stream` that matches `pattern`, and yields the match. Ends the program
    with SIGTERM."""
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
        # The further output must be read, so that the program never blocks on a full pipe.
        reader = subprocess.Popen(["cat"], stdin=getattr(child, stream), stdout=log)
        yield match
    finally:
        child.terminate()
        assert child.wait(timeout=START_TIMEOUT_SECONDS) == 0, "the program must end with 0 after SIGTERM"
        reader.wait(timeout=START_TIMEOUT_SECONDS)
        log.close()


def request_speech():
    """Requests speech from the service. Returns the status, and the number of bytes of the body."""
    request = urllib.request.Request(
        f"http://{ADDRESS}/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM",
        data=json.dumps({"text": "Packed.", "model_id": "eleven_multilingual_v2"}).encode(),
        headers={"content-type": "application/json", "xi-api-key": "anything"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.status, len(response.read())


def build_earlier_package(package, directory):
    """Repacks the package with a lower version. Returns the path of the new package."""
    tree = pathlib.Path(directory, "tree")
    run("dpkg-deb", "--raw-extract", package, tree)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"(?m)^Version: .*$", "Version: 0.1.0-1", control.read_text()))
    earlier_package = pathlib.Path(directory, "keychoir_0.1.0-1.deb")
    run("dpkg-deb", "--build", "--root-owner-group", tree, earlier_package)
    return earlier_package


def need_programs(*names):
    """Skips the running check if a program is missing."""
    for name in names:
        report.need(shutil.which(name), f"the program {name}")


def lintian_finds_nothing_in_the_debian_package():
    need_programs("lintian")
    run("lintian", "--fail-on", "error,warning", "--allow-root", "--tag-display-limit", "0", find_only("*.deb"))


def the_debian_package_serves_is_upgraded_removed_and_purged():
    need_programs("debootstrap")
    report.need(os.geteuid() == 0, "the user root")
    package = find_only("*.deb")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        root = DebianRoot(pathlib.Path(directory, "root"))

        # The package is installed.
        output = root.install(build_earlier_package(package, directory))
        next_step = "systemctl enable --now keychoir.socket"
        assert next_step in output, f"the installation must print the next step:\n{output}"
        assert root.run("keychoir", "--version").strip() == f"keychoir {VERSION}"
        assert root.owner_and_mode("/etc/keychoir/elevenlabs_api_keys") == "root 600"
        assert root.run("getent", "passwd", "keychoir").split(":")[5] == "/var/lib/keychoir"
        for name in ("man/man1/keychoir.1.gz", "bash-completion/completions/keychoir", "zsh/vendor-completions/_keychoir"):
            assert (root.path / "usr/share" / name).is_file(), f"the package must have {name}"
        units = root.run("systemd-analyze", "verify", "--man=no", "keychoir.service", "keychoir.socket")
        unexpected = [line for line in units.splitlines() if "keychoir" in line and "notify-reload" not in line]
        assert not unexpected, f"systemd must accept the units: {unexpected}"

        # The service serves a request.
        simulator = [root.path / "usr/bin/keychoir", "simulate", "--listen", "127.0.0.1:0", "--key", f"{KEY}=100000"]
        command = [str(part) for part in simulator]
        upstream = stack.enter_context(start_program(command, "stdout", r"http://\S+", dict(os.environ))).group(0)
        keys = root.path / "etc/keychoir/elevenlabs_api_keys"
        keys.write_text(f"{KEY}\n")
        with root.run_service(upstream):
            status, size = request_speech()
            assert status == 200 and size > 1000, "the service must return speech"
        assert root.owner_and_mode("/var/lib/keychoir/keychoir.db") == "keychoir 600"

        # The package is upgraded, with the database of an earlier version and a configuration file that the operator
        # has changed.
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
        with root.run_service(upstream):
            assert request_speech()[0] == 200, "the upgraded service must return speech"
        with contextlib.closing(sqlite3.connect(database)) as connection:
            schema = connection.execute("PRAGMA user_version").fetchone()[0]
            assert schema > EARLIER_SCHEMA, f"the schema must be above {EARLIER_SCHEMA}, and is {schema}"
            new_count = connection.execute("SELECT count(*) FROM attempts").fetchone()[0]
            assert new_count == attempts + 1, f"{attempts} earlier attempts and a new one must exist, not {new_count}"
        assert database.with_name(f"keychoir.db.before-{EARLIER_SCHEMA}").exists(), "the upgrade must leave a copy"

        # The package is removed and purged.
        root.run("dpkg", "--remove", "keychoir")
        assert not (root.path / "usr/bin/keychoir").exists(), "a removal must remove the program"
        assert database.exists() and keys.exists(), "a removal must keep the state and the keys"
        root.run("dpkg", "--purge", "keychoir")
        for path in ("var/lib/keychoir", "etc/keychoir", "usr/share/doc/keychoir"):
            assert not (root.path / path).exists(), f"a purge must remove /{path}"
        remaining = root.run("find", "/etc", "/usr", "/var/lib", "-xdev", "-path", "*keychoir*").split()
        remaining = [path for path in remaining if not path.startswith("/var/lib/dpkg/")]
        assert not remaining, f"a purge must remove {remaining}"


def the_rpm_package_contains_its_files_and_scripts():
    need_programs("rpm")
    package = find_only("*.rpm")

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


def the_tarball_contains_the_program_and_its_files():
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


def the_homebrew_formula_contains_the_version_and_checksums():
    run(ROOT / "deploy/packages/formula", "owner/keychoir")
    formula = ROOT / "dist/keychoir.rb"
    text = formula.read_text()
    assert f'version "{VERSION}"' in text and "@" not in re.sub(r"#.*", "", text), "every placeholder must be replaced"
    need_programs("ruby")
    run("ruby", "-c", formula)


def the_nix_flake_can_be_parsed():
    need_programs("nix-instantiate")
    run("nix-instantiate", "--parse", ROOT / "deploy/packages/flake.nix")


CHECKS = [
    the_checksums_are_those_of_the_files,
    the_tarball_contains_the_program_and_its_files,
    the_rpm_package_contains_its_files_and_scripts,
    the_homebrew_formula_contains_the_version_and_checksums,
    the_nix_flake_can_be_parsed,
    lintian_finds_nothing_in_the_debian_package,
    the_debian_package_serves_is_upgraded_removed_and_purged,
]

if __name__ == "__main__":
    report.run_checks(CHECKS)
