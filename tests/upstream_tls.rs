//! TLS with the provider: untrusted certificates are refused, and an end counts only if it is
//! authenticated.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
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

/// How a provider ends its connection.
#[derive(Clone, Copy)]
enum End {
    /// With a TLS `close_notify`.
    Signed,
    /// With a TCP FIN, which any intermediary can send.
    Unsigned,
}

/// A provider with an untrusted certificate.
struct Provider {
    url: String,
    ca_file: PathBuf,
    /// The first bytes of every request received over TLS.
    heads: mpsc::UnboundedReceiver<String>,
    _serving: AbortOnDrop,
    _folder: TempDir,
}

async fn provider(end: End) -> Provider {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, made.cert.pem()).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let (sender, heads) = mpsc::unbounded_channel();
    let serving = Tasks::new().spawn_guarded(async move {
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
            match end {
                End::Signed => stream.shutdown().await.unwrap(),
                End::Unsigned => {
                    stream.flush().await.unwrap();
                    stream.into_inner().0.shutdown().await.unwrap();
                }
            }
        }
    });
    Provider { url, ca_file, heads, _serving: serving, _folder: folder }
}

async fn keychoir(provider: &Provider, trusts: bool) -> (RunningApp, String) {
    let key = ApiKey::new("sk_key_of_the_tls_tests_0000000000001").unwrap();
    let mut config = Config::with_defaults(vec![key], provider.url.parse().unwrap());
    config.quota_polling.enabled = false;
    config.upstream.ca_file = trusts.then(|| provider.ca_file.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let running = app::start(AppConfig::from_config(config).unwrap(), vec![listener.into()]).unwrap();
    let url = format!("http://{}/v1/voices", running.address());
    (running, url)
}

async fn get(url: String) -> reqwest::Response {
    keychoir::upstream::http_client().unwrap().build().unwrap().get(url).send().await.unwrap()
}

#[tokio::test]
async fn a_provider_with_an_authority_of_its_own_is_trusted_when_it_is_named() {
    let mut provider = provider(End::Signed).await;
    let (running, url) = keychoir(&provider, true).await;
    let answer = get(url).await;
    assert_eq!((answer.status().as_u16(), answer.text().await.unwrap().as_str()), (200, "until the end"));
    assert!(provider.heads.recv().await.unwrap().contains("xi-api-key: sk_key_of_the_tls_tests"));
    running.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn a_provider_that_nobody_vouches_for_gets_nothing() {
    let mut provider = provider(End::Signed).await;
    let (running, url) = keychoir(&provider, false).await;
    let answer = get(url).await;
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["x-keychoir-error"]),
        (502, &"upstream_unreachable".parse().unwrap())
    );
    assert!(provider.heads.try_recv().is_err(), "no request, and none in plain text");
    assert_eq!(running.keys()[0].state, keychoir::policy::key_state::KeyState::Usable);
    running.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn an_end_that_is_not_signed_is_no_end() {
    let provider = provider(End::Unsigned).await;
    let (running, url) = keychoir(&provider, true).await;
    let answer = get(url).await;
    assert_eq!(answer.status(), 200);
    assert!(answer.bytes().await.is_err(), "anyone on the way could have cut it");
    running.drain(Duration::from_secs(10)).await;
}

#[tokio::test]
async fn a_file_that_is_no_authority_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.pem");
    let start = |text: Option<&str>| {
        let _ = text.map(|text| std::fs::write(&file, text).unwrap());
        keychoir::upstream::TcpTlsConnector::new(Some(&file)).unwrap_err().to_string()
    };
    assert!(start(None).contains("ca.pem cannot be read"));
    assert!(start(Some("")).contains("ca.pem has no certificate"));
    assert!(
        start(Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))
            .contains("no authority")
    );
}
