//! TLS with clients: http and https on one port, with a certificate of the local CA or a configured
//! one; a failed handshake only affects its own connection.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::support::program::{Program, keychoir_command, run, stderr};
use crate::support::{FIRST_KEY, TestProxy, join_all, start_proxy_with};
use keychoir::app::HttpsState;
use keychoir::config::{Config, TlsConfig};
use keychoir::simulator::Plan;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion, crypto};

const WAIT_MAX: Duration = Duration::from_secs(30);

/// A client that trusts only the certificates in `roots`.
struct Client {
    config: ClientConfig,
}

impl Client {
    fn trusting(roots: Option<&Path>) -> Self {
        Self::speaking(roots, &[&TLS12, &TLS13])
    }

    fn speaking(roots: Option<&Path>, versions: &[&'static SupportedProtocolVersion]) -> Self {
        let mut store = RootCertStore::empty();
        if let Some(path) = roots {
            for certificate in CertificateDer::pem_file_iter(path).unwrap() {
                store.add(certificate.unwrap()).unwrap();
            }
        }
        let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(store)
            .with_no_client_auth();
        Self { config }
    }

    fn offering(mut self, protocols: &[&str]) -> Self {
        self.config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        self
    }

    async fn connect(&self, address: SocketAddr, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(address).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let connecting = TlsConnector::from(Arc::new(self.config.clone())).connect(name, tcp);
        timeout(WAIT_MAX, connecting).await.expect("a handshake that hangs")
    }

    async fn get(&self, address: SocketAddr, path: &str) -> io::Result<String> {
        ask(&mut self.connect(address, "localhost").await?, path).await
    }
}

/// The whole response to the last request of a connection.
async fn ask(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin), path: &str) -> io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    // TLS authenticates the end: one without `close_notify` is an error here.
    timeout(WAIT_MAX, stream.read_to_end(&mut answer)).await.expect("an answer that hangs")?;
    Ok(String::from_utf8(answer).unwrap())
}

/// Sends bytes and reads to the end of the connection.
async fn raw(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut answer = Vec::new();
    // A reset is an end, too.
    let _ = timeout(WAIT_MAX, stream.read_to_end(&mut answer)).await.expect("a connection that hangs");
    answer
}

/// A proxy with a CA in a folder of its own.
async fn https_house(change: impl FnOnce(&mut Config)) -> (TestProxy, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 100_000)]), |config| {
        config.server.tls_directory = Some(folder.path().join("tls"));
        change(config);
    })
    .await;
    (proxy, folder)
}

fn ca(folder: &TempDir) -> PathBuf {
    folder.path().join("tls/ca.pem")
}

#[tokio::test(flavor = "multi_thread")]
async fn http_and_https_are_spoken_on_one_port_at_once() {
    let (proxy, folder) = https_house(|_| {}).await;
    let client = Client::trusting(Some(&ca(&folder)));
    let address = proxy.app.address();
    let both = |number: usize| {
        let client = &client;
        async move {
            let answer = if number.is_multiple_of(2) {
                client.get(address, "/v1/voices").await
            } else {
                ask(&mut TcpStream::connect(address).await.unwrap(), "/v1/voices").await
            };
            answer.unwrap()
        }
    };
    let answers = timeout(WAIT_MAX, join_all((0..40).map(both))).await.unwrap();
    let body = |answer: &str| answer.split_once("\r\n\r\n").unwrap().1.to_owned();
    let all_same = answers.iter().all(|answer| body(answer) == body(&answers[0]));
    assert!(answers.iter().all(|answer| answer.starts_with("HTTP/1.1 200 ")) && all_same);
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [40]);
    proxy.close().await;
}

#[tokio::test]
async fn the_authority_certifies_every_name_of_this_machine() {
    let (proxy, folder) =
        https_house(|config| config.access.hosts = vec!["keys.localhost".into(), "keys.example".into()])
            .await;
    let client = Client::trusting(Some(&ca(&folder)));
    let address = proxy.app.address();
    for name in ["localhost", "127.0.0.1", "::1", "keys.localhost"] {
        client.connect(address, name).await.unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for name in ["keys.example", "api.elevenlabs.io", "10.0.0.1"] {
        let error = client.connect(address, name).await.unwrap_err().to_string();
        assert!(error.contains("not valid for name"), "{name}: {error}");
    }
    let error = Client::trusting(None).connect(address, "localhost").await.unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer"), "{error}");
    proxy.close().await;
}

#[tokio::test]
async fn only_http_1_1_is_agreed_on() {
    let (proxy, folder) = https_house(|_| {}).await;
    let address = proxy.app.address();
    let client = Client::trusting(Some(&ca(&folder))).offering(&["h2", "http/1.1"]);
    let stream = client.connect(address, "localhost").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1" as &[u8]));
    let client = Client::trusting(Some(&ca(&folder))).offering(&["h2"]);
    let error = client.connect(address, "localhost").await.unwrap_err().to_string();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
    drop(stream);
    proxy.close().await;
}

#[tokio::test]
async fn a_reconnecting_client_resumes_its_tls_session() {
    let (proxy, folder) = https_house(|_| {}).await;
    for version in [&TLS12, &TLS13] {
        let client = Client::speaking(Some(&ca(&folder)), &[version]);
        for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let mut stream = client.connect(proxy.app.address(), "localhost").await.unwrap();
            assert!(ask(&mut stream, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
            let seen = (stream.get_ref().1.protocol_version(), stream.get_ref().1.handshake_kind());
            assert_eq!(seen, (Some(version.version), Some(expected)));
        }
    }
    proxy.close().await;
}

/// The regular beginning of a handshake.
fn client_hello() -> Vec<u8> {
    let name = ServerName::try_from("localhost").unwrap();
    let config = Arc::new(Client::trusting(None).config);
    let mut connection = tokio_rustls::rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

#[tokio::test]
async fn an_incomplete_request_is_closed_at_its_timeout() {
    let (proxy, folder) = https_house(|config| {
        config.server.request_headers_timeout = Duration::from_secs(1);
    })
    .await;
    let address = proxy.app.address();
    let hello = client_hello();
    // No byte; the first byte; half of the first message; all of it; and a finished handshake
    // without a request.
    let sent = [&[] as &[u8], &hello[..1], &hello[..hello.len() / 2], &hello];
    join_all(sent.into_iter().map(|sent| raw(address, sent))).await;
    let mut silent = Client::trusting(Some(&ca(&folder))).connect(address, "localhost").await.unwrap();
    // It is cut without a `close_notify`.
    let ended = timeout(WAIT_MAX, silent.read(&mut [0])).await.unwrap();
    assert!(ended.is_err() || ended.is_ok_and(|count| count == 0));
    assert!(proxy.get("/livez").await.status().is_success());
    proxy.close().await;
}

#[tokio::test]
async fn a_slow_client_delays_no_other_and_is_served() {
    let (proxy, folder) = https_house(|_| {}).await;
    let address = proxy.app.address();
    let mut plain = TcpStream::connect(address).await.unwrap();
    let slow = TcpStream::connect(address).await.unwrap();
    // Other connections are served meanwhile.
    let client = Client::trusting(Some(&ca(&folder)));
    assert!(client.get(address, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    plain.write_all(b"G").await.unwrap();
    assert!(client.get(address, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    plain.write_all(b"ET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(WAIT_MAX, plain.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let name = ServerName::try_from("localhost").unwrap();
    let mut slow = TlsConnector::from(Arc::new(client.config)).connect(name, slow).await.unwrap();
    assert!(ask(&mut slow, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    proxy.close().await;
}

#[tokio::test]
async fn garbage_ends_its_connection_and_nothing_else() {
    let (proxy, folder) = https_house(|_| {}).await;
    let address = proxy.app.address();
    for first in [0x00, 0x15, 0x17, 0x80, 0xff, b'\r'] {
        let answer = raw(address, &[first, 0x03, 0x01, b'\r', b'\n', b'\r', b'\n']).await;
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400 "), "{first:#x}: {answer:?}");
    }
    let mut broken = client_hello();
    broken.iter_mut().skip(5).for_each(|byte| *byte ^= 0x5a);
    for sent in [b"\x16GET / HTTP/1.1\r\n\r\n" as &[u8], b"\x16\x03\x01\xff\xff\x01", &broken] {
        let answer = raw(address, sent).await;
        assert!(!answer.starts_with(b"HTTP"), "nothing in plain text: {answer:?}");
    }
    let client = Client::trusting(Some(&ca(&folder)));
    assert!(client.get(address, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    proxy.close().await;
}

#[tokio::test]
async fn an_open_connection_ends_with_a_close_notify() {
    let (proxy, folder) = https_house(|_| {}).await;
    let client = Client::trusting(Some(&ca(&folder)));
    let address = proxy.app.address();
    let (mut asked, mut fresh) = (
        client.connect(address, "localhost").await.unwrap(),
        client.connect(address, "localhost").await.unwrap(),
    );
    asked.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut head = [0; 12];
    asked.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    let unspoken = TcpStream::connect(address).await.unwrap();
    proxy.close().await;
    let mut rest = Vec::new();
    timeout(WAIT_MAX, asked.read_to_end(&mut rest)).await.unwrap().unwrap();
    timeout(WAIT_MAX, fresh.read_to_end(&mut rest)).await.unwrap().unwrap();
    drop(unspoken);
}

#[tokio::test]
async fn a_tls_client_is_refused_where_tls_is_off() {
    let (proxy, folder) = https_house(|config| config.server.tls = TlsConfig::off()).await;
    let address = proxy.app.address();
    assert_eq!(proxy.app.https(&proxy.app.addresses()[0]), HttpsState::Off);
    assert_eq!(raw(address, &client_hello()).await, b"", "and not with words that it cannot read");
    assert!(proxy.get("/livez").await.status().is_success());
    assert!(!folder.path().join("tls").exists(), "nothing is made that is not needed");
    proxy.close().await;
}

/// A folder for a program of its own, whose provider is not reachable.
struct Stage {
    folder: TempDir,
}

impl Stage {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path("new"), text).unwrap();
        fs::rename(self.path("new"), self.path(name)).unwrap();
    }

    fn command(&self, books: &str) -> Command {
        let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
        command
            .env("ELEVENLABS_API_KEYS", FIRST_KEY)
            .env("KEYCHOIR_STORAGE__PATH", self.path(books))
            .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
            .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "0s")
            .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
            .env("KEYCHOIR_LOG__FORMAT", "json");
        command
    }

    /// Configures a certificate by its files in this folder.
    fn with_files<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command
            .env("KEYCHOIR_SERVER__TLS__CERT", self.path("cert.pem"))
            .env("KEYCHOIR_SERVER__TLS__KEY", self.path("key.pem"))
    }

    /// Writes a new self-signed certificate and its key.
    fn certify(&self, name: &str) -> (String, String) {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let (cert, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        self.write("cert.pem", &cert);
        self.write("key.pem", &key);
        (cert, key)
    }
}

fn start(command: &mut Command) -> (Program, SocketAddr) {
    let mut program = Program::start(command);
    let address = program.wait_for_address().parse().unwrap();
    (program, address)
}

async fn assert_https(address: SocketAddr, roots: &Path, name: &str) {
    let client = Client::trusting(Some(roots));
    let mut stream = client.connect(address, name).await.unwrap();
    assert!(ask(&mut stream, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
}

async fn assert_http(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    assert!(ask(&mut stream, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn programs_that_start_together_share_one_authority() {
    let stage = Stage::new();
    let start_as = |books: &str| {
        let mut command = stage.command(books);
        Program::start(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", stage.path("tls")))
    };
    let mut programs = [start_as("one.db"), start_as("two.db"), start_as("three.db")];
    for program in &mut programs {
        assert_https(program.wait_for_address().parse().unwrap(), &stage.path("tls/ca.pem"), "localhost")
            .await;
    }
    let ca = fs::read(stage.path("tls/ca.pem")).unwrap();
    let mut later = start_as("four.db");
    assert_https(later.wait_for_address().parse().unwrap(), &stage.path("tls/ca.pem"), "127.0.0.1").await;
    assert_eq!(fs::read(stage.path("tls/ca.pem")).unwrap(), ca);
    for program in programs.into_iter().chain([later]) {
        assert_eq!(program.terminate().0, Some(0));
    }
}

#[tokio::test]
async fn the_authority_is_beside_the_database_and_private() {
    let stage = Stage::new();
    let (mut program, address) = start(&mut stage.command("state/keychoir.db"));
    let https = program.wait_for_event("server_https");
    assert!(https["message"].as_str().unwrap().contains("keychoir env"), "{https}");
    assert_https(address, &stage.path("state/tls/ca.pem"), "localhost").await;
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&stage.path("state/tls")), 0o700);
    let mut names = Vec::new();
    for entry in fs::read_dir(stage.path("state/tls")).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(mode(&entry.path()), 0o600, "{entry:?}");
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["authority.pem", "ca.pem", "lock"], "no key of a server, and nothing half-written");
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test]
async fn a_broken_authority_is_kept_and_reported() {
    let stage = Stage::new();
    fs::create_dir(stage.path("tls")).unwrap();
    fs::write(stage.path("tls/authority.pem"), "precious, perhaps").unwrap();
    let (program, address) = {
        let mut program = Program::start(&mut stage.command("keychoir.db"));
        let told = program.wait_for_event("ca_replaced");
        assert!(told["message"].as_str().unwrap().contains("authority.pem.broken-"), "{told}");
        let address = program.wait_for_address().parse().unwrap();
        (program, address)
    };
    assert_https(address, &stage.path("tls/ca.pem"), "localhost").await;
    let kept = fs::read_dir(stage.path("tls"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_str().unwrap().contains("authority.pem.broken-"));
    assert_eq!(fs::read_to_string(kept.unwrap()).unwrap(), "precious, perhaps");
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test]
async fn a_folder_that_cannot_be_made_costs_https_and_not_the_start() {
    let stage = Stage::new();
    fs::write(stage.path("file"), "").unwrap();
    let mut command = stage.command("keychoir.db");
    let mut program = Program::start(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", stage.path("file/tls")));
    let told = program.wait_for_event("https_off");
    for words in ["file/tls", "server.tls_directory", "server.tls = \"off\""] {
        assert!(told["message"].as_str().unwrap().contains(words), "{told}");
    }
    let address = program.wait_for_address().parse().unwrap();
    assert_http(address).await;
    for _ in 0..3 {
        assert_eq!(raw(address, &client_hello()).await, b"");
    }
    let (code, said) = program.terminate();
    assert_eq!(code, Some(0));
    assert_eq!(said.matches("https_off").count(), 1, "{said}");
    assert_eq!(
        said.matches("a client connected with https, but there is no certificate").count(),
        1,
        "{said}"
    );
    assert!(!said.contains("server_https"), "{said}");
}

#[tokio::test]
async fn a_configured_certificate_is_served_and_replaced_without_a_restart() {
    let stage = Stage::new();
    stage.certify("keys.example");
    let (mut program, address) = start(stage.with_files(&mut stage.command("keychoir.db")));
    assert_https(address, &stage.path("cert.pem"), "keys.example").await;
    assert!(!stage.path("tls").exists(), "no authority is made that nobody needs");
    fs::rename(stage.path("cert.pem"), stage.path("first.pem")).unwrap();

    let (second, key) = stage.certify("keys.example");
    program.send_signal("HUP");
    program.wait_for_event("reloaded");
    assert_https(address, &stage.path("cert.pem"), "keys.example").await;
    let old = Client::trusting(Some(&stage.path("first.pem")));
    assert!(old.connect(address, "keys.example").await.is_err(), "the old one is shown no more");

    // A mistake changes nothing and is reported with its place.
    stage.write("key.pem", "no key at all");
    stage.write("good.pem", &second);
    program.send_signal("HUP");
    program.wait_for_line(|line| line.contains("the file contains no private key").then_some(()));
    program.wait_for_event("reload_failed");
    assert_https(address, &stage.path("good.pem"), "keys.example").await;
    stage.certify("other.example");
    stage.write("key.pem", &key);
    program.send_signal("HUP");
    program.wait_for_line(|line| line.contains("belongs to another certificate").then_some(()));
    program.wait_for_event("reload_failed");
    assert_https(address, &stage.path("good.pem"), "keys.example").await;
    assert_http(address).await;
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test]
async fn a_certificate_that_changes_is_noticed_without_a_signal() {
    let stage = Stage::new();
    stage.certify("keys.example");
    let mut command = stage.command("keychoir.db");
    command.env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "20ms");
    let (mut program, address) = start(stage.with_files(&mut command));
    assert_https(address, &stage.path("cert.pem"), "keys.example").await;
    stage.certify("next.example");
    program.wait_for_event("reloaded");
    assert_https(address, &stage.path("cert.pem"), "next.example").await;
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn an_unusable_certificate_is_named_before_the_start() {
    let stage = Stage::new();
    let (cert, _) = stage.certify("keys.example");
    stage.certify("other.example");
    stage.write("cert.pem", cert);
    let output = run(stage.with_files(&mut stage.command("keychoir.db")));
    assert_eq!(output.status.code(), Some(78));
    let said = stderr(&output);
    for words in
        ["KEYCHOIR_SERVER__TLS__KEY: ", "belongs to another certificate", "= name the key of the certificate"]
    {
        assert!(said.contains(words), "{said}");
    }
}

#[tokio::test]
async fn https_is_added_removed_and_changed_by_a_reload() {
    let stage = Stage::new();
    let config = stage.path("keychoir.toml");
    stage.write("keychoir.toml", "");
    stage.certify("keys.example");
    let mut command = stage.command("keychoir.db");
    let (mut program, address) = start(command.args(["--config", config.to_str().unwrap()]));
    assert_https(address, &stage.path("tls/ca.pem"), "localhost").await;
    for (toml, roots, name) in [
        ("server.tls = \"off\"", None, ""),
        ("server.tls = { cert = \"cert.pem\", key = \"key.pem\" }", Some("cert.pem"), "keys.example"),
        ("server.tls = \"auto\"", Some("tls/ca.pem"), "localhost"),
    ] {
        stage.write("keychoir.toml", toml);
        program.send_signal("HUP");
        program.wait_for_event("reloaded");
        match roots {
            Some(roots) => assert_https(address, &stage.path(roots), name).await,
            None => assert_eq!(raw(address, &client_hello()).await, b""),
        }
        assert_http(address).await;
    }
    let (code, said) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(!said.contains("Only a restart"), "{said}");
}

#[tokio::test]
async fn no_private_key_is_ever_logged() {
    for is_given in [false, true] {
        let stage = Stage::new();
        stage.certify("localhost");
        let mut command = stage.command("keychoir.db");
        command.env("KEYCHOIR_LOG__LEVEL", "trace");
        if is_given {
            stage.with_files(&mut command);
        }
        let (mut program, address) = start(&mut command);
        let (secret, roots) =
            if is_given { ("key.pem", "cert.pem") } else { ("tls/authority.pem", "tls/ca.pem") };
        assert_https(address, &stage.path(roots), "localhost").await;
        assert!(Client::trusting(None).connect(address, "localhost").await.is_err());
        raw(address, b"\x16\x03\x01\x00\x05hello").await;
        program.send_signal("HUP");
        program.wait_for_event("reloaded");
        let (code, said) = program.terminate();
        assert_eq!(code, Some(0));
        assert!(said.contains("a connection ended before its first request"), "the log tells much: {said}");
        let text = fs::read_to_string(stage.path(secret)).unwrap();
        let (_, key) = text.split_once("-----BEGIN PRIVATE KEY-----\n").unwrap();
        let lines: Vec<_> = key.lines().take_while(|line| !line.starts_with('-')).collect();
        assert!(lines.len() >= 2);
        assert!(lines.iter().all(|line| !said.contains(line)), "{said}");
    }
}

/// `env` before a CA exists, with a home folder of its own.
fn env(home: &Path, arguments: &[&str]) -> Command {
    let mut command = keychoir_command(&[&["env"], arguments].concat());
    command.env("HOME", home);
    command
}

#[track_caller]
fn printed(command: &mut Command) -> String {
    let output = run(command);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn env_prints_the_variables_before_the_first_start() {
    let stage = Stage::new();
    let home = stage.path("it's home");
    let root = rcgen::generate_simple_self_signed(["root.example".to_owned()]).unwrap().cert.pem();
    stage.write("roots.pem", &root);
    let roots = stage.path("roots.pem");
    let printed_first = printed(env(&home, &[]).env("SSL_CERT_FILE", &roots));
    let state = home.join(".local/state/keychoir/tls").display().to_string();
    let quoted = state.replace('\'', r"'\''");
    let expected = format!(
        "# For a shell: eval \"$(keychoir env)\"

# The address of Keychoir, for an SDK's base_url (Python) or baseUrl (JavaScript); https:// works as well.
export ELEVENLABS_BASE_URL=http://127.0.0.1:11011

# https with Python and OpenSSL: Keychoir's authority and all authorities of {}, because this variable replaces the trusted ones.
export SSL_CERT_FILE='{quoted}/bundle.pem'

# https with Node: Keychoir's authority, in addition to those that Node trusts.
export NODE_EXTRA_CA_CERTS='{quoted}/ca.pem'
",
        roots.display()
    );
    assert_eq!(printed_first, expected);
    let bundle = fs::read_to_string(format!("{state}/bundle.pem")).unwrap();
    let ca = fs::read_to_string(format!("{state}/ca.pem")).unwrap();
    assert!(bundle.contains(&ca) && bundle.ends_with(&root) && !bundle.contains("PRIVATE"));

    // A shell that has evaluated it gets the same output again.
    let script =
        "eval \"$(\"$0\" env)\" && \"$0\" env && test -r \"$SSL_CERT_FILE\" -a -r \"$NODE_EXTRA_CA_CERTS\"";
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", script, env!("CARGO_BIN_EXE_keychoir")]).env_clear().env("HOME", &home);
    assert_eq!(printed(shell.env("SSL_CERT_FILE", &roots)), expected);
}

#[test]
fn env_names_what_is_missing() {
    let stage = Stage::new();
    let home = stage.path("home");
    stage.certify("keys.example");
    let variables = |more: &[(&str, &str)]| {
        let mut command = env(&home, &[]);
        command.envs(more.iter().copied());
        printed(&mut command)
    };
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| stage.path(name).to_str().unwrap().to_owned());
    for (more, words, is_known) in [
        (&[("KEYCHOIR_SERVER__TLS", "off")] as &[_], "# https is disabled (server.tls).", true),
        (
            &[("KEYCHOIR_STORAGE__EPHEMERAL", "true")],
            "# https cannot be trusted: its authority is kept only in memory",
            true,
        ),
        (
            &[("KEYCHOIR_SERVER__TLS__CERT", &*cert), ("KEYCHOIR_SERVER__TLS__KEY", &*key)],
            "# https uses the certificate of server.tls",
            true,
        ),
        (&[("KEYCHOIR_SERVER__LISTEN", "unix:/run/k.sock")], "# https is not available", false),
    ] {
        let said = variables(more);
        assert!(said.contains(words), "{said}");
        assert_eq!(said.contains("export ELEVENLABS_BASE_URL=http://127.0.0.1:11011\n"), is_known, "{said}");
        assert!(!said.contains("export SSL_CERT_FILE") && !said.contains("export NODE"), "{said}");
    }
    assert!(!home.exists(), "nothing is made that is not needed");
    let said = variables(&[("KEYCHOIR_SERVER__LISTEN", "127.0.0.1:0"), ("NODE_EXTRA_CA_CERTS", "/corp.pem")]);
    assert!(said.contains("names no fixed port") && !said.contains("BASE_URL"), "{said}");
    assert!(
        said.contains("# It was /corp.pem: to trust both, put them into one file.\nexport NODE"),
        "{said}"
    );
    // The other roots in the bundle are kept.
    let root = rcgen::generate_simple_self_signed(["root.example".to_owned()]).unwrap().cert.pem();
    stage.write("roots.pem", root);
    let roots = stage.path("roots.pem").to_str().unwrap().to_owned();
    let said = variables(&[("SSL_CERT_FILE", &roots), ("NODE_EXTRA_CA_CERTS", &roots)]);
    assert!(said.contains("/tls/bundle.pem\n\n# https with Node: the same file,"), "{said}");
    assert_eq!(said.matches("/tls/bundle.pem\n").count(), 2, "{said}");
    // Without readable roots the default trust is not replaced.
    fs::write(stage.path("roots.pem"), "no certificates").unwrap();
    let said = variables(&[("SSL_CERT_FILE", stage.path("roots.pem").to_str().unwrap())]);
    assert!(
        said.contains("roots.pem contains no certificates") && !said.contains("export SSL_CERT_FILE"),
        "{said}"
    );
}

#[test]
fn env_fails_without_an_authority() {
    let stage = Stage::new();
    fs::write(stage.path("file"), "").unwrap();
    let mut command = env(&stage.path("home"), &[]);
    let output = run(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", stage.path("file/tls")));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("file/tls"), "{}", stderr(&output));
    assert!(String::from_utf8(output.stdout).unwrap().contains("export ELEVENLABS_BASE_URL="));
}

#[test]
fn env_reports_a_broken_authority() {
    let stage = Stage::new();
    stage.write("authority.pem", "precious, perhaps");
    let mut command = env(&stage.path("home"), &[]);
    let output = run(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", stage.folder.path()));
    assert_eq!(output.status.code(), Some(0));
    assert!(stderr(&output).contains("was malformed. It is kept as"), "{}", stderr(&output));
}

#[tokio::test]
async fn the_authority_made_by_env_is_served() {
    let stage = Stage::new();
    let folder = stage.path("tls");
    printed(env(&stage.path("home"), &[]).env("KEYCHOIR_SERVER__TLS_DIRECTORY", &folder));
    let ca = fs::read(folder.join("ca.pem")).unwrap();
    let mut command = stage.command("keychoir.db");
    let (program, address) = start(command.env("KEYCHOIR_SERVER__TLS_DIRECTORY", &folder));
    assert_https(address, &folder.join("ca.pem"), "localhost").await;
    assert_eq!(fs::read(folder.join("ca.pem")).unwrap(), ca);
    assert_eq!(program.terminate().0, Some(0));
}
