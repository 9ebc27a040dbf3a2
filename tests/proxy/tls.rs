//! Tests TLS with clients: HTTP and HTTPS are served on one port, with HTTP/1.1, session resumption, timeouts and
//! `close_notify`. The local CA certifies only the names of this machine, a failed or slow handshake affects no other
//! connection, and TLS can be turned off. The submodules test the certificates and the command `keychoir env`.

mod certificates;
mod env;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use crate::support::program::{Program, keychoir_command};
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

/// The timeout of a step of a test. It is far longer than any step takes.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A TLS client that trusts only the given certificates.
struct Client {
    config: ClientConfig,
}

impl Client {
    /// Creates a client that trusts the certificates in the file `roots`, or none.
    fn with_roots(roots: Option<&Path>) -> Self {
        Self::with_versions(roots, &[&TLS12, &TLS13])
    }

    fn with_versions(roots: Option<&Path>, versions: &[&'static SupportedProtocolVersion]) -> Self {
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

    fn with_alpn_protocols(mut self, protocols: &[&str]) -> Self {
        self.config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
        self
    }

    /// Connects, and verifies that the certificate is valid for `name`.
    async fn connect(&self, address: SocketAddr, name: &str) -> io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(address).await?;
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let connecting = TlsConnector::from(Arc::new(self.config.clone())).connect(name, tcp);
        timeout(TEST_TIMEOUT, connecting).await.expect("the handshake must end within the timeout")
    }

    async fn get(&self, address: SocketAddr, path: &str) -> io::Result<String> {
        send_request(&mut self.connect(address, "localhost").await?, path).await
    }
}

/// Sends the last request of a connection. Returns the whole response.
async fn send_request(
    stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin),
    path: &str,
) -> io::Result<String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut response = Vec::new();
    // TLS authenticates the end of the stream, so an end without `close_notify` is an error.
    timeout(TEST_TIMEOUT, stream.read_to_end(&mut response))
        .await
        .expect("the response must end within the timeout")?;
    Ok(String::from_utf8(response).unwrap())
}

/// Sends bytes on a new connection. Returns the bytes that are received until it ends.
async fn exchange_raw(address: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut response = Vec::new();
    // A reset also ends the connection.
    let _ = timeout(TEST_TIMEOUT, stream.read_to_end(&mut response))
        .await
        .expect("the connection must end within the timeout");
    response
}

/// Starts a proxy with a local CA in a new temporary directory.
async fn start_https_proxy(change: impl FnOnce(&mut Config)) -> (TestProxy, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000)]), |config| {
        config.server.tls_directory = Some(directory.path().join("tls"));
        change(config);
    })
    .await;
    (proxy, directory)
}

fn ca_path(directory: &TempDir) -> PathBuf {
    directory.path().join("tls/ca.pem")
}

/// Returns a regular `ClientHello`.
fn client_hello() -> Vec<u8> {
    let name = ServerName::try_from("localhost").unwrap();
    let config = Arc::new(Client::with_roots(None).config);
    let mut connection = tokio_rustls::rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

/// A directory with the files of a proxy that runs as a separate process and has an unreachable provider.
struct ProgramDirectory {
    directory: TempDir,
}

impl ProgramDirectory {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces a file atomically, because the proxy may read it at the same time.
    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path("new"), text).unwrap();
        fs::rename(self.path("new"), self.path(name)).unwrap();
    }

    /// Returns the command `keychoir serve` with the given `database`.
    fn command(&self, database: &str) -> Command {
        let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
        command
            .env("ELEVENLABS_API_KEYS", FIRST_KEY)
            .env("KEYCHOIR_STORAGE__PATH", self.path(database))
            .env("KEYCHOIR_UPSTREAM__BASE_URL", "http://127.0.0.1:9")
            .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "0s")
            .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
            .env("KEYCHOIR_LOG__FORMAT", "json");
        command
    }

    /// Configures the certificate files of the directory in `command`.
    fn configure_certificate<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command
            .env("KEYCHOIR_SERVER__TLS__CERT", self.path("cert.pem"))
            .env("KEYCHOIR_SERVER__TLS__KEY", self.path("key.pem"))
    }

    /// Writes a new self-signed certificate and its key. Returns both.
    fn write_certificate(&self, name: &str) -> (String, String) {
        let certified_key = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let (cert, key) = (certified_key.cert.pem(), certified_key.signing_key.serialize_pem());
        self.write("cert.pem", &cert);
        self.write("key.pem", &key);
        (cert, key)
    }
}

fn start_program(command: &mut Command) -> (Program, SocketAddr) {
    let mut program = Program::start(command);
    let address = program.wait_for_address().parse().unwrap();
    (program, address)
}

async fn assert_https(address: SocketAddr, roots: &Path, name: &str) {
    let client = Client::with_roots(Some(roots));
    let mut stream = client.connect(address, name).await.unwrap();
    assert!(send_request(&mut stream, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
}

async fn assert_http(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    assert!(send_request(&mut stream, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn http_and_https_are_served_concurrently_on_one_port() {
    let (proxy, directory) = start_https_proxy(|_| {}).await;
    let client = Client::with_roots(Some(&ca_path(&directory)));
    let address = proxy.app.address();
    let request = |number: usize| {
        let client = &client;
        async move {
            let response = if number.is_multiple_of(2) {
                client.get(address, "/v1/voices").await
            } else {
                send_request(&mut TcpStream::connect(address).await.unwrap(), "/v1/voices").await
            };
            response.unwrap()
        }
    };
    let responses = timeout(TEST_TIMEOUT, join_all((0..40).map(request))).await.unwrap();
    let body = |response: &str| response.split_once("\r\n\r\n").unwrap().1.to_owned();
    assert!(responses.iter().all(|response| response.starts_with("HTTP/1.1 200 ")));
    assert!(responses.iter().all(|response| body(response) == body(&responses[0])));
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [40]);
    proxy.close().await;
}

#[tokio::test]
async fn the_local_ca_certifies_only_the_names_of_this_machine() {
    let (proxy, directory) = start_https_proxy(|config| {
        config.access.hosts = vec!["keys.localhost".into(), "keys.example".into()]
    })
    .await;
    let client = Client::with_roots(Some(&ca_path(&directory)));
    let address = proxy.app.address();
    for name in ["localhost", "127.0.0.1", "::1", "keys.localhost"] {
        client
            .connect(address, name)
            .await
            .unwrap_or_else(|error| panic!("the certificate must be valid for {name}: {error}"));
    }
    for name in ["keys.example", "api.elevenlabs.io", "10.0.0.1"] {
        let error = client.connect(address, name).await.unwrap_err().to_string();
        assert!(
            error.contains("not valid for name"),
            "{name}: the error must contain `not valid for name`: {error}"
        );
    }
    let error = Client::with_roots(None).connect(address, "localhost").await.unwrap_err().to_string();
    assert!(error.contains("UnknownIssuer"), "the error must contain `UnknownIssuer`: {error}");
    proxy.close().await;
}

#[tokio::test]
async fn only_http_1_1_is_negotiated() {
    let (proxy, directory) = start_https_proxy(|_| {}).await;
    let address = proxy.app.address();
    let client = Client::with_roots(Some(&ca_path(&directory))).with_alpn_protocols(&["h2", "http/1.1"]);
    let stream = client.connect(address, "localhost").await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1" as &[u8]));
    let client = Client::with_roots(Some(&ca_path(&directory))).with_alpn_protocols(&["h2"]);
    let error = client.connect(address, "localhost").await.unwrap_err().to_string();
    assert!(
        error.contains("NoApplicationProtocol"),
        "the error must contain `NoApplicationProtocol`: {error}"
    );
    drop(stream);
    proxy.close().await;
}

#[tokio::test]
async fn a_reconnecting_client_resumes_its_tls_session() {
    let (proxy, directory) = start_https_proxy(|_| {}).await;
    for version in [&TLS12, &TLS13] {
        let client = Client::with_versions(Some(&ca_path(&directory)), &[version]);
        for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let mut stream = client.connect(proxy.app.address(), "localhost").await.unwrap();
            assert!(send_request(&mut stream, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
            let negotiated = (stream.get_ref().1.protocol_version(), stream.get_ref().1.handshake_kind());
            assert_eq!(negotiated, (Some(version.version), Some(expected)));
        }
    }
    proxy.close().await;
}

#[tokio::test]
async fn an_incomplete_request_is_closed_at_its_timeout() {
    let (proxy, directory) = start_https_proxy(|config| {
        config.server.request_headers_timeout = Duration::from_secs(1);
    })
    .await;
    let address = proxy.app.address();
    let hello = client_hello();
    // These clients send nothing, the first byte of a `ClientHello`, half of it, or all of it. The next client
    // completes its handshake and sends no request.
    let prefixes = [&[] as &[u8], &hello[..1], &hello[..hello.len() / 2], &hello];
    join_all(prefixes.into_iter().map(|prefix| exchange_raw(address, prefix))).await;
    let mut idle =
        Client::with_roots(Some(&ca_path(&directory))).connect(address, "localhost").await.unwrap();
    // The proxy closes the connection without a `close_notify`.
    let result = timeout(TEST_TIMEOUT, idle.read(&mut [0])).await.unwrap();
    assert!(!result.is_ok_and(|count| count > 0), "the proxy must close the connection");
    assert!(proxy.get("/livez").await.status().is_success());
    proxy.close().await;
}

#[tokio::test]
async fn a_slow_client_is_served_without_delaying_other_clients() {
    let (proxy, directory) = start_https_proxy(|_| {}).await;
    let address = proxy.app.address();
    let mut slow_http = TcpStream::connect(address).await.unwrap();
    let slow_tls = TcpStream::connect(address).await.unwrap();
    // Requests on other connections are served in the meantime.
    let client = Client::with_roots(Some(&ca_path(&directory)));
    assert!(client.get(address, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    slow_http.write_all(b"G").await.unwrap();
    assert!(client.get(address, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    slow_http.write_all(b"ET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut response = String::new();
    timeout(TEST_TIMEOUT, slow_http.read_to_string(&mut response)).await.unwrap().unwrap();
    assert!(response.starts_with("HTTP/1.1 200 "), "the response must start with `HTTP/1.1 200`: {response}");
    let name = ServerName::try_from("localhost").unwrap();
    let mut slow_tls = TlsConnector::from(Arc::new(client.config)).connect(name, slow_tls).await.unwrap();
    assert!(send_request(&mut slow_tls, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    proxy.close().await;
}

#[tokio::test]
async fn invalid_bytes_end_only_their_own_connection() {
    let (proxy, directory) = start_https_proxy(|_| {}).await;
    let address = proxy.app.address();
    for first in [0x00, 0x15, 0x17, 0x80, 0xff, b'\r'] {
        let response = exchange_raw(address, &[first, 0x03, 0x01, b'\r', b'\n', b'\r', b'\n']).await;
        assert!(
            response.is_empty() || response.starts_with(b"HTTP/1.1 400 "),
            "{first:#x}: the client must receive an error or no response: {response:?}"
        );
    }
    let mut corrupted_hello = client_hello();
    corrupted_hello.iter_mut().skip(5).for_each(|byte| *byte ^= 0x5a);
    for bytes in [b"\x16GET / HTTP/1.1\r\n\r\n" as &[u8], b"\x16\x03\x01\xff\xff\x01", &corrupted_hello] {
        let response = exchange_raw(address, bytes).await;
        assert!(!response.starts_with(b"HTTP"), "the response must not be in plain text: {response:?}");
    }
    let client = Client::with_roots(Some(&ca_path(&directory)));
    assert!(client.get(address, "/livez").await.unwrap().starts_with("HTTP/1.1 200 "));
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0]);
    proxy.close().await;
}

#[tokio::test]
async fn open_connections_end_with_a_close_notify() {
    let (proxy, directory) = start_https_proxy(|_| {}).await;
    let client = Client::with_roots(Some(&ca_path(&directory)));
    let address = proxy.app.address();
    let mut idle = client.connect(address, "localhost").await.unwrap();
    let mut unused = client.connect(address, "localhost").await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut head = [0; 12];
    idle.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    let silent_stream = TcpStream::connect(address).await.unwrap();
    proxy.close().await;
    let mut remaining_bytes = Vec::new();
    timeout(TEST_TIMEOUT, idle.read_to_end(&mut remaining_bytes)).await.unwrap().unwrap();
    timeout(TEST_TIMEOUT, unused.read_to_end(&mut remaining_bytes)).await.unwrap().unwrap();
    drop(silent_stream);
}

#[tokio::test]
async fn a_tls_client_is_refused_if_tls_is_off() {
    let (proxy, directory) = start_https_proxy(|config| config.server.tls = TlsConfig::off()).await;
    let address = proxy.app.address();
    assert_eq!(proxy.app.https(&proxy.app.addresses()[0]), HttpsState::Off);
    assert_eq!(
        exchange_raw(address, &client_hello()).await,
        b"",
        "a TLS client must receive no bytes, because it cannot read an HTTP response"
    );
    assert!(proxy.get("/livez").await.status().is_success());
    assert!(!directory.path().join("tls").exists(), "an unneeded directory must not be created");
    proxy.close().await;
}
