"""Tests the static program. A released one is small and contains no symbols. Each contains the certificate authorities
of the web and names no dynamic loader. Name resolution, also of a name that does not exist, the verification of
certificates and the health check work in a root directory without other programs and libraries."""

import struct

import pytest
from conftest import (
    BINARY,
    CLIENT_TOKEN,
    IS_RELEASE,
    PROVIDER,
    Container,
    copy_program,
    free_port,
    needs_openssl,
    needs_root,
    request_speech,
    run,
    tls_in_front_of,
)

MAX_PROGRAM_BYTES = 15 * 1000 * 1000
# The type of the program header that names a dynamic loader.
PT_INTERP = 3
# The released program reads random bytes by a system call. The debug build reads them from a device, because its
# dependencies, unlike the program itself, are not built for static linking.
HAS_DEVICES = not IS_RELEASE
# The names of some certificate authorities that web browsers trust.
WEB_AUTHORITIES = [b"ISRG Root X1", b"DigiCert Global Root G2", b"GTS Root R1"]


@pytest.fixture
def empty_root(tmp_path):
    """Returns a root directory that contains only the program."""
    root = tmp_path / "root"
    copy_program(root)
    return root


def settings(port, upstream):
    """Returns the environment variables of a program that listens on `port`."""
    return {
        "KEYCHOIR_SERVER__LISTEN": f"127.0.0.1:{port}",
        "KEYCHOIR_STORAGE__PATH": "/var/lib/keychoir/keychoir.db",
        "KEYCHOIR_UPSTREAM__BASE_URL": upstream,
        "ELEVENLABS_API_KEYS_FILE": "/run/secrets/elevenlabs_api_keys",
        "KEYCHOIR_CLIENT_TOKEN_FILE": "/run/secrets/client_token",
    }


def test_the_program_names_no_dynamic_loader():
    content = BINARY.read_bytes()
    (start,) = struct.unpack_from("<Q", content, 32)
    size, count = struct.unpack_from("<HH", content, 54)
    kinds = [struct.unpack_from("<I", content, start + index * size)[0] for index in range(count)]
    assert PT_INTERP not in kinds, "a static program must name no dynamic loader"


@pytest.mark.skipif(not IS_RELEASE, reason="only the released program is small")
def test_the_released_program_is_small():
    assert BINARY.stat().st_size <= MAX_PROGRAM_BYTES
    sections = run("readelf", "--sections", "--wide", BINARY).stdout
    assert ".text" in sections, "the program must contain code"
    for section in (".symtab", ".debug_info"):
        assert section not in sections, f"the program must not contain the section {section}"


def test_the_program_contains_the_certificate_authorities_of_the_web():
    content = BINARY.read_bytes()
    missing = [name for name in WEB_AUTHORITIES if name not in content]
    assert not missing, f"the program must contain the certificate authorities {missing}"


@needs_root
def test_names_are_resolved_over_the_network_in_an_empty_root(empty_root, state, secrets, simulator, nameserver):
    port = free_port()
    container = Container(empty_root, state, secrets, nameserver=nameserver, has_devices=HAS_DEVICES)
    environment = settings(port, f"http://{PROVIDER}:{simulator}")
    with container.start("/keychoir", environment=environment) as process:
        process.wait_for("Base URL")
        status, size = request_speech(port)
        assert status == 200 and size > 0
        assert request_speech(port, "another-token-0123456789")[0] == 401
        assert process.terminate() == 0


@needs_root
def test_a_name_that_does_not_exist_is_reported_in_an_empty_root(empty_root, state, secrets, nameserver):
    port = free_port()
    container = Container(empty_root, state, secrets, nameserver=nameserver, has_devices=HAS_DEVICES)
    environment = settings(port, "http://unknown.test:1")
    with container.start("/keychoir", environment=environment) as process:
        process.wait_for("Base URL")
        assert request_speech(port)[0] == 502


@needs_root
@needs_openssl
def test_certificates_are_verified_in_an_empty_root(
    empty_root, state, secrets, simulator, nameserver, tmp_path
):
    with tls_in_front_of(simulator, tmp_path / "tls") as tls_port:
        (empty_root / "ca.pem").write_bytes((tmp_path / "tls/ca.pem").read_bytes())
        container = Container(empty_root, state, secrets, nameserver=nameserver, has_devices=HAS_DEVICES)
        for ca_file, expected in [(None, 502), ("/ca.pem", 200)]:
            port = free_port()
            environment = settings(port, f"https://{PROVIDER}:{tls_port}")
            if ca_file:
                environment["KEYCHOIR_UPSTREAM__CA_FILE"] = ca_file
            with container.start("/keychoir", environment=environment) as process:
                process.wait_for("Base URL")
                assert request_speech(port)[0] == expected, f"the status must be {expected} with the CA file {ca_file}"
                assert process.terminate() == 0


@needs_root
def test_the_health_check_works_in_an_empty_root(empty_root, state, secrets):
    port = free_port()
    container = Container(empty_root, state, secrets, has_devices=HAS_DEVICES)
    environment = settings(port, "http://127.0.0.1:9")
    assert container.run("/keychoir", "healthcheck", environment=environment).returncode == 1
    with container.start("/keychoir", environment=environment) as process:
        process.wait_for("Base URL")
        assert container.run("/keychoir", "healthcheck", environment=environment).returncode == 0
    assert CLIENT_TOKEN not in "".join(process.output)
