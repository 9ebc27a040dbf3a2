//! Tests TLS connections to the provider: only a certificate of the CA in `upstream.ca_file` is trusted, and an invalid
//! CA file is reported. A response whose end is the end of the connection is complete only after a `close_notify`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test panics if an expectation fails"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use keychoir::app::{self, AppConfig, RunningApp};
use keychoir::config::Config;
use keychoir::secret::ApiKey;
use keychoir::tasks::{AbortOnDrop, Tasks};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;

/// How the provider ends a connection.
#[derive(Clone, Copy)]
enum ConnectionEnd {
    /// The provider sends a TLS `close_notify`.
    CloseNotify,
    /// The provider sends only a TCP FIN, which any intermediary could send.
    Fin,
}

/// A provider with a self-signed certificate.
struct Provider {
    url: String,
    ca_file: PathBuf,
    /// The heads of the requests that were received over TLS.
    heads: mpsc::UnboundedReceiver<String>,
    _server: AbortOnDrop,
    _directory: TempDir,
}

/// Starts a provider whose responses have no length and end with the connection.
async fn start_provider(connection_end: ConnectionEnd) -> Provider {
    let certificate = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, certificate.cert.pem()).unwrap();
    let key = PrivatePkcs8KeyDer::from(certificate.signing_key.serialize_der());
    let crypto_provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(crypto_provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key.into())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let (sender, heads) = mpsc::unbounded_channel();
    let server = Tasks::new().spawn_guarded(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let Ok(mut stream) = acceptor.accept(tcp).await else { continue };
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { break };
                head.push(byte);
            }
            sender.send(String::from_utf8_lossy(&head).into_owned()).unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nuntil the end").await.unwrap();
            match connection_end {
                ConnectionEnd::CloseNotify => stream.shutdown().await.unwrap(),
                ConnectionEnd::Fin => {
                    stream.flush().await.unwrap();
                    stream.into_inner().0.shutdown().await.unwrap();
                }
            }
        }
    });
    Provider { url, ca_file, heads, _server: server, _directory: directory }
}

/// Starts Keychoir in front of the provider, with `ca_file` as `upstream.ca_file`. Returns Keychoir, and a URL at which
/// it forwards requests to the provider.
async fn start_proxy(provider: &Provider, ca_file: Option<PathBuf>) -> (RunningApp, String) {
    let key = ApiKey::new("sk_key_of_the_tls_tests_0000000000001").unwrap();
    let mut config = Config::with_defaults(vec![key], provider.url.parse().unwrap());
    config.quota_polling.enabled = false;
    config.upstream.ca_file = ca_file;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let app = app::start(AppConfig::from_config(config).unwrap(), vec![listener.into()]).unwrap();
    let url = format!("http://{}/v1/voices", app.address());
    (app, url)
}

async fn get(url: String) -> reqwest::Response {
    keychoir::upstream::http_client().unwrap().build().unwrap().get(url).send().await.unwrap()
}

#[tokio::test]
async fn a_provider_is_trusted_if_its_ca_is_configured() {
    let mut provider = start_provider(ConnectionEnd::CloseNotify).await;
    let (app, url) = start_proxy(&provider, Some(provider.ca_file.clone())).await;
    let response = get(url).await;
    assert_eq!((response.status().as_u16(), response.text().await.unwrap().as_str()), (200, "until the end"));
    assert!(provider.heads.recv().await.unwrap().contains("xi-api-key: sk_key_of_the_tls_tests"));
    app.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn a_provider_with_an_untrusted_certificate_receives_no_request() {
    let mut provider = start_provider(ConnectionEnd::CloseNotify).await;
    let (app, url) = start_proxy(&provider, None).await;
    let response = get(url).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-keychoir-error"]),
        (502, &"upstream_unreachable".parse().unwrap())
    );
    assert!(provider.heads.try_recv().is_err(), "the provider must receive no request");
    assert_eq!(app.keys()[0].state, keychoir::policy::key_state::KeyState::Usable);
    app.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn a_response_without_a_close_notify_is_truncated() {
    let provider = start_provider(ConnectionEnd::Fin).await;
    let (app, url) = start_proxy(&provider, Some(provider.ca_file.clone())).await;
    let response = get(url).await;
    assert_eq!(response.status(), 200);
    assert!(
        response.bytes().await.is_err(),
        "a response that an intermediary could have truncated must not look complete"
    );
    app.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn an_invalid_ca_file_is_reported() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    let connector_error = |content: Option<&str>| {
        if let Some(content) = content {
            std::fs::write(&file, content).unwrap();
        }
        keychoir::upstream::TcpTlsConnector::new(Some(&file)).unwrap_err().to_string()
    };
    assert!(connector_error(None).contains("ca.pem cannot be read"));
    assert!(connector_error(Some("")).contains("ca.pem contains no certificate"));
    assert!(
        connector_error(Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
            .contains("is not a certificate authority")
    );
}
