//! Tests the certificates of the local CA and of configured files: how proxies share and store the CA, malformed,
//! unusable and replaced files, changes by a reload, and that private keys are never logged.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{Client, ProgramDirectory, assert_http, assert_https, client_hello, exchange_raw, start_program};
use crate::support::program::{Program, run, stderr};

#[tokio::test]
async fn proxies_that_start_concurrently_share_one_local_ca() {
    let directory = ProgramDirectory::new();
    let start_as = |database: &str| {
        let mut command = directory.command(database);
        Program::start(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", directory.path("tls")))
    };
    let mut programs = [start_as("one.db"), start_as("two.db"), start_as("three.db")];
    for program in &mut programs {
        assert_https(program.wait_for_address().parse().unwrap(), &directory.path("tls/ca.pem"), "localhost")
            .await;
    }
    let ca = fs::read(directory.path("tls/ca.pem")).unwrap();
    let mut last = start_as("four.db");
    assert_https(last.wait_for_address().parse().unwrap(), &directory.path("tls/ca.pem"), "127.0.0.1").await;
    assert_eq!(fs::read(directory.path("tls/ca.pem")).unwrap(), ca);
    for program in programs.into_iter().chain([last]) {
        assert_eq!(program.terminate().0, Some(0));
    }
}

#[tokio::test]
async fn the_local_ca_is_stored_next_to_the_database_with_private_permissions() {
    let directory = ProgramDirectory::new();
    let (mut program, address) = start_program(&mut directory.command("state/keychoir.db"));
    let https = program.wait_for_event("server_https");
    assert!(
        https["message"].as_str().unwrap().contains("keychoir env"),
        "the event must name `keychoir env`: {https}"
    );
    assert_https(address, &directory.path("state/tls/ca.pem"), "localhost").await;
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&directory.path("state/tls")), 0o700);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory.path("state/tls")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(mode(&entry.path()), 0o600, "only the owner may read {entry:?}");
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(
        names,
        ["authority.pem", "ca.pem", "lock"],
        "neither a server key nor a partially written file may be stored"
    );
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test]
async fn a_malformed_local_ca_is_quarantined_and_reported() {
    let directory = ProgramDirectory::new();
    fs::create_dir(directory.path("tls")).unwrap();
    fs::write(directory.path("tls/authority.pem"), "not a CA").unwrap();
    let mut program = Program::start(&mut directory.command("keychoir.db"));
    let event = program.wait_for_event("ca_replaced");
    assert!(
        event["message"].as_str().unwrap().contains("authority.pem.broken-"),
        "the event must name the quarantined file: {event}"
    );
    let address = program.wait_for_address().parse().unwrap();
    assert_https(address, &directory.path("tls/ca.pem"), "localhost").await;
    let quarantined = fs::read_dir(directory.path("tls"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().contains("authority.pem.broken-"));
    assert_eq!(fs::read_to_string(quarantined.unwrap()).unwrap(), "not a CA");
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test]
async fn an_uncreatable_tls_directory_disables_https_but_not_the_proxy() {
    let directory = ProgramDirectory::new();
    fs::write(directory.path("file"), "").unwrap();
    let mut command = directory.command("keychoir.db");
    let mut program =
        Program::start(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", directory.path("file/tls")));
    let event = program.wait_for_event("https_off");
    for expected in ["file/tls", "server.tls_directory", "server.tls = \"off\""] {
        assert!(
            event["message"].as_str().unwrap().contains(expected),
            "the event must contain {expected:?}: {event}"
        );
    }
    let address = program.wait_for_address().parse().unwrap();
    assert_http(address).await;
    for _ in 0..3 {
        assert_eq!(exchange_raw(address, &client_hello()).await, b"");
    }
    let (code, log) = program.terminate();
    assert_eq!(code, Some(0));
    assert_eq!(log.matches("https_off").count(), 1, "the missing HTTPS must be logged once: {log}");
    assert_eq!(
        log.matches("a client connected over HTTPS, but there is no certificate").count(),
        1,
        "the refused clients must be logged once: {log}"
    );
    assert!(!log.contains("server_https"), "the log must not contain `server_https`: {log}");
}

#[tokio::test]
async fn a_configured_certificate_is_served_and_replaced_without_a_restart() {
    let directory = ProgramDirectory::new();
    directory.write_certificate("keys.example");
    let (mut program, address) =
        start_program(directory.configure_certificate(&mut directory.command("keychoir.db")));
    assert_https(address, &directory.path("cert.pem"), "keys.example").await;
    assert!(!directory.path("tls").exists(), "with a configured certificate, no local CA may be created");
    fs::rename(directory.path("cert.pem"), directory.path("first.pem")).unwrap();

    let (second_cert, second_key) = directory.write_certificate("keys.example");
    program.send_signal("HUP");
    program.wait_for_event("reloaded");
    assert_https(address, &directory.path("cert.pem"), "keys.example").await;
    let first_client = Client::with_roots(Some(&directory.path("first.pem")));
    assert!(
        first_client.connect(address, "keys.example").await.is_err(),
        "the first certificate must not be served after the reload"
    );

    // An invalid file is reported, and the last valid certificate is still served.
    directory.write("key.pem", "not a key");
    directory.write("good.pem", &second_cert);
    program.send_signal("HUP");
    program.wait_for_line(|line| line.contains("the file contains no private key").then_some(()));
    program.wait_for_event("reload_failed");
    assert_https(address, &directory.path("good.pem"), "keys.example").await;
    directory.write_certificate("other.example");
    directory.write("key.pem", &second_key);
    program.send_signal("HUP");
    program.wait_for_line(|line| line.contains("belongs to another certificate").then_some(()));
    program.wait_for_event("reload_failed");
    assert_https(address, &directory.path("good.pem"), "keys.example").await;
    assert_http(address).await;
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test]
async fn a_changed_certificate_is_reloaded_without_a_signal() {
    let directory = ProgramDirectory::new();
    directory.write_certificate("keys.example");
    let mut command = directory.command("keychoir.db");
    command.env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "20ms");
    let (mut program, address) = start_program(directory.configure_certificate(&mut command));
    assert_https(address, &directory.path("cert.pem"), "keys.example").await;
    directory.write_certificate("next.example");
    program.wait_for_event("reloaded");
    assert_https(address, &directory.path("cert.pem"), "next.example").await;
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn an_unusable_certificate_is_reported_before_the_start() {
    let directory = ProgramDirectory::new();
    let (cert, _) = directory.write_certificate("keys.example");
    directory.write_certificate("other.example");
    directory.write("cert.pem", cert);
    let output = run(directory.configure_certificate(&mut directory.command("keychoir.db")));
    assert_eq!(output.status.code(), Some(78));
    let stderr_text = stderr(&output);
    for expected in
        ["KEYCHOIR_SERVER__TLS__KEY: ", "belongs to another certificate", "= name the key of the certificate"]
    {
        assert!(stderr_text.contains(expected), "the error message must contain {expected:?}: {stderr_text}");
    }
}

#[tokio::test]
async fn https_is_added_removed_and_changed_by_a_reload() {
    let directory = ProgramDirectory::new();
    let config = directory.path("keychoir.toml");
    directory.write("keychoir.toml", "");
    directory.write_certificate("keys.example");
    let mut command = directory.command("keychoir.db");
    let (mut program, address) = start_program(command.args(["--config", config.to_str().unwrap()]));
    assert_https(address, &directory.path("tls/ca.pem"), "localhost").await;
    for (toml, roots, name) in [
        ("server.tls = \"off\"", None, ""),
        ("server.tls = { cert = \"cert.pem\", key = \"key.pem\" }", Some("cert.pem"), "keys.example"),
        ("server.tls = \"auto\"", Some("tls/ca.pem"), "localhost"),
    ] {
        directory.write("keychoir.toml", toml);
        program.send_signal("HUP");
        program.wait_for_event("reloaded");
        match roots {
            Some(roots) => assert_https(address, &directory.path(roots), name).await,
            None => assert_eq!(exchange_raw(address, &client_hello()).await, b""),
        }
        assert_http(address).await;
    }
    let (code, log) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(!log.contains("Only a restart"), "the log must not contain `Only a restart`: {log}");
}

#[tokio::test]
async fn private_keys_are_never_logged() {
    for is_configured in [false, true] {
        let directory = ProgramDirectory::new();
        directory.write_certificate("localhost");
        let mut command = directory.command("keychoir.db");
        command.env("KEYCHOIR_LOG__LEVEL", "trace");
        if is_configured {
            directory.configure_certificate(&mut command);
        }
        let (mut program, address) = start_program(&mut command);
        let (secret_file, roots) =
            if is_configured { ("key.pem", "cert.pem") } else { ("tls/authority.pem", "tls/ca.pem") };
        assert_https(address, &directory.path(roots), "localhost").await;
        assert!(Client::with_roots(None).connect(address, "localhost").await.is_err());
        exchange_raw(address, b"\x16\x03\x01\x00\x05hello").await;
        program.send_signal("HUP");
        program.wait_for_event("reloaded");
        let (code, log) = program.terminate();
        assert_eq!(code, Some(0));
        assert!(
            log.contains("a connection ended before its first request"),
            "the log must contain the refused handshake: {log}"
        );
        let text = fs::read_to_string(directory.path(secret_file)).unwrap();
        let (_, key) = text.split_once("-----BEGIN PRIVATE KEY-----\n").unwrap();
        let lines: Vec<_> = key.lines().take_while(|line| !line.starts_with('-')).collect();
        assert!(lines.len() >= 2);
        assert!(
            lines.iter().all(|line| !log.contains(line)),
            "the log must not contain the private key: {log}"
        );
    }
}
