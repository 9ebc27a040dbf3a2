//! Tests of TLS: the modes and their layers, the errors and warnings about a certificate in files, and the directory of
//! the local CA.

use super::FakeMachine;
use crate::certificate::CaLocation;
use crate::config::TlsMode;

/// Returns a certificate and its private key.
fn certificate_and_key() -> (String, String) {
    let certified_key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    (certified_key.cert.pem(), certified_key.signing_key.serialize_pem())
}

#[test]
fn the_last_layer_determines_the_tls_mode() {
    let mode = |machine: &FakeMachine<'_>| machine.config().server.tls.mode();
    let (cert, key) = certificate_and_key();
    let files = FakeMachine::with_key().file("/etc/c.pem", &cert).file("/etc/k.pem", &key);
    assert_eq!(mode(&FakeMachine::with_key()), TlsMode::Auto);
    assert_eq!(mode(&FakeMachine::with_key().toml("server.tls = \"off\"")), TlsMode::Off);
    for toml in [
        "[server]\ntls = { cert = \"c.pem\", key = \"k.pem\" }",
        "[server.tls]\ncert = \"c.pem\"\nkey = \"/etc/k.pem\"",
        "server.tls.cert = \"c.pem\"\nserver.tls.key = \"k.pem\"",
    ] {
        let machine = files.clone().toml(toml);
        assert_eq!(mode(&machine), TlsMode::Files);
        assert!(machine.config().certificate.is_some());
        let off = machine.variable("KEYCHOIR_SERVER__TLS", "off");
        assert_eq!(mode(&off), TlsMode::Off);
        assert!(off.config().certificate.is_none());
    }
    let variables = files
        .variable("KEYCHOIR_SERVER__TLS__CERT", "/etc/c.pem")
        .variable("KEYCHOIR_SERVER__TLS__KEY", "/etc/k.pem")
        .toml("server.tls = \"off\"");
    assert_eq!(mode(&variables), TlsMode::Files);
    variables.variable("KEYCHOIR_SERVER__TLS", "auto").check_problems(
        "
KEYCHOIR_SERVER__TLS: environment variables set both server.tls and its files
    = remove this one to use the files, or KEYCHOIR_SERVER__TLS__CERT and __KEY
",
    );
}

#[test]
fn an_unknown_tls_mode_is_refused() {
    let advice = "write \"auto\", \"off\", or { cert = \"FILE\", key = \"FILE\" }";
    for (toml, marks, message, suggestion) in [
        ("true", "^^^^", "this is a boolean, but should be a string or a table", "\"auto\""),
        ("false", "^^^^^", "this is a boolean, but should be a string or a table", "\"off\""),
        ("\"on\"", "^^^^", "`on` is not a TLS mode", "auto"),
        ("\"atuo\"", "^^^^^^", "`atuo` is not a TLS mode", "auto"),
    ] {
        FakeMachine::with_key().toml(&format!("[server]\ntls = {toml}\n")).check_problems(&format!(
            "/etc/k.toml:2:7: {message}\n  2 | tls = {toml}\n    |       {marks}\n    = {advice}\n    = did you mean `{suggestion}`?"
        ));
    }
    FakeMachine::with_key()
        .variable("KEYCHOIR_SERVER__TLS", "c.pem")
        .check_problems(&format!("KEYCHOIR_SERVER__TLS: `c.pem` is not a TLS mode\n    = {advice}"));
    FakeMachine::with_key()
        .toml("[server.tls]\ncrt = \"a\"\n[server]\ntls_directory = 3\ncert = \"a\"\n")
        .check_problems(
            r#"
/etc/k.toml:2:1: unknown setting `crt` in [server.tls]
  2 | crt = "a"
    | ^^^
    = did you mean `cert`?
/etc/k.toml:4:17: this is a number, but should be a string
  4 | tls_directory = 3
    |                 ^
    = write it in quotes
/etc/k.toml:5:1: unknown setting `cert` in [server]
  5 | cert = "a"
    | ^^^^
"#,
        );
    FakeMachine::with_key().toml("server.tls = {}").check_problems(
        "/etc/k.toml:1:14: this table is empty\n  1 | server.tls = {}\n    |              ^^",
    );
}

#[test]
fn an_invalid_tls_file_is_reported() {
    let (cert, key) = certificate_and_key();
    let (_, other_key) = certificate_and_key();
    let check_files = |cert_file: &str, key_file: &str, expected: &str| {
        FakeMachine::with_key()
            .file("/etc/c.pem", cert_file)
            .file("/etc/k.pem", key_file)
            .toml("[server.tls]\ncert = \"c.pem\"\nkey = \"k.pem\"\n")
            .check_problems(expected);
    };
    let at_cert =
        |message: &str| format!("/etc/k.toml:2:8: {message}\n  2 | cert = \"c.pem\"\n    |        ^^^^^^^\n");
    let at_key = |message: &str| format!("/etc/k.toml:3:7: {message}\n  3 | key = ***\n    |       ^^^\n");
    check_files(
        "",
        &key,
        &(at_cert("the file contains no certificate")
            + "    = write the path of a PEM file: -----BEGIN CERTIFICATE-----"),
    );
    let swap_advice =
        "    = `cert` names the file with the certificates, `key` the file with the private key";
    check_files(&key, &key, &(at_cert("the file contains a private key, but no certificate") + swap_advice));
    check_files(&cert, &cert, &(at_key("the file contains a certificate, but no private key") + swap_advice));
    check_files(
        &cert,
        &other_key,
        &(at_key("the private key belongs to another certificate")
            + "    = name the key of the certificate; the server's certificate comes first in its file"),
    );
    check_files(
        &cert,
        "nothing",
        &(at_key("the file contains no private key")
            + "    = write the path of a PEM file: -----BEGIN PRIVATE KEY-----"),
    );
    FakeMachine::with_key().toml("server.tls = { cert = \"c.pem\" }").check_problems(
        r#"
/etc/k.toml:1:23: the certificate has no private key
  1 | server.tls = { cert = "c.pem" }
    |                       ^^^^^^^
    = add key = "FILE"
/etc/k.toml:1:23: `/etc/c.pem` cannot be read: it does not exist
  1 | server.tls = { cert = "c.pem" }
    |                       ^^^^^^^
"#,
    );
    FakeMachine::with_key().variable("KEYCHOIR_SERVER__TLS__KEY", "/latin1.toml").check_problems(
        "
KEYCHOIR_SERVER__TLS__KEY: the private key has no certificate
    = set KEYCHOIR_SERVER__TLS__CERT=FILE
KEYCHOIR_SERVER__TLS__KEY: `/latin1.toml` cannot be read: it is not UTF-8 text (line 3, column 7)
    = write the path of a PEM file; openssl x509 -inform der converts a DER file
",
    );
    // An invalid setting is reported once, and not as missing in addition.
    FakeMachine::with_key()
        .file("/etc/c.pem", &cert)
        .toml("server.tls = { cert = \"c.pem\", key = 3 }")
        .check_problems(
            "
/etc/k.toml:1:38: this is a number, but should be a string
  1 | server.tls = ***
    |                ^
    = write it in quotes
",
        );
}

#[test]
fn a_certificate_outside_its_validity_period_causes_a_warning() {
    let certificate_with = |from, until| {
        let mut params = rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap();
        (params.not_before, params.not_after) = (from, until);
        let key = rcgen::KeyPair::generate().unwrap();
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    };
    let day = rcgen::date_time_ymd;
    for ((cert, key), expected) in [
        (certificate_with(day(2026, 1, 1), day(2028, 1, 1)), None),
        (
            certificate_with(day(2026, 1, 1), day(2027, 1, 1)),
            Some("/etc/k.toml:2:8: this certificate expired at 2027-01-01T00:00:00Z: clients refuse it"),
        ),
        (
            certificate_with(day(2028, 1, 1), day(2029, 1, 1)),
            Some(
                "/etc/k.toml:2:8: this certificate is not valid before 2028-01-01T00:00:00Z: clients refuse it",
            ),
        ),
    ] {
        let machine = FakeMachine::with_key()
            .file("/etc/c.pem", &cert)
            .file("/etc/k.pem", &key)
            .toml("[server.tls]\ncert = \"c.pem\"\nkey = \"k.pem\"\n");
        machine.check_warnings(expected.as_slice());
        assert!(machine.config().certificate.is_some());
    }
}

#[test]
fn the_local_ca_is_in_the_directory_of_the_usage_database() {
    let location = |machine: &FakeMachine<'_>| machine.config().ca_location();
    let directory = |path: &str| CaLocation::Directory(path.into());
    let machine = FakeMachine::with_key();
    assert_eq!(location(&machine), directory("/home/me/.local/state/keychoir/tls"));
    assert_eq!(
        location(&machine.clone().variable("KEYCHOIR_STORAGE__PATH", "/var/k.db")),
        directory("/var/tls")
    );
    let ephemeral = machine.variable("KEYCHOIR_STORAGE__EPHEMERAL", "true");
    assert_eq!(location(&ephemeral), CaLocation::Memory);
    assert_eq!(location(&ephemeral.toml("server.tls_directory = \"t\"")), directory("/etc/t"));
}
