//! Tests Keychoir behind forward proxies. Client requests, checks of keys, quota polls and the mirror's HTTP client use
//! them, also with TLS and with a host name that only the forward proxy can resolve. A failing forward proxy is not
//! tried with every key: a key with another route (forward proxy or base URL) serves the request, or the error is
//! reported.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test panics if an expectation fails"
)]

mod forward_proxies;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use keychoir::app::{self, AppConfig, RunningApp};
use keychoir::config::{Config, KeyConfig};
use keychoir::policy::key_state::KeyState;
use keychoir::secret::{AdminTokenFingerprint, ApiKey};
use keychoir::simulator::{Fault, Plan, Simulator};
use keychoir::tasks::{AbortOnDrop, Tasks};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Message};

use forward_proxies::{
    ForwardProxyProcess, PASSWORD, STEP_TIMEOUT, USER, bind_loopback, start_scripted_forward_proxy,
    within_timeout,
};

const FIRST_KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
const SECOND_KEY: &str = "sk_key_number_two_000000000000000000000000000000002";
const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM";

/// Keychoir with two keys by default, in front of a simulator.
struct TestProxy {
    app: RunningApp,
    simulator: Simulator,
    url: String,
    client: reqwest::Client,
    _directory: TempDir,
}

fn start_app(config: Config) -> (RunningApp, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let app = app::start(AppConfig::from_config(config).unwrap(), vec![listener.into()]).unwrap();
    let url = format!("http://{}", app.address());
    (app, url)
}

/// Starts Keychoir with `forward_proxy_url` as `upstream.proxy`, and with the other settings that `change` sets.
async fn start_keychoir(forward_proxy_url: &str, change: impl FnOnce(&mut Config)) -> TestProxy {
    let plan = Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)]);
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let keys = [FIRST_KEY, SECOND_KEY].map(|key| ApiKey::new(key).unwrap());
    let mut config = Config::with_defaults(keys.to_vec(), simulator.base_url().parse().unwrap());
    let directory = tempfile::tempdir().unwrap();
    config.retry.spill_directory = directory.path().to_owned();
    config.retry.min_disk_free_percent = 0;
    config.server.drain_idle_timeout = Duration::ZERO;
    config.quota_polling.enabled = false;
    config.upstream.proxy = forward_proxy_url.parse().unwrap();
    change(&mut config);
    let (app, url) = start_app(config);
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    TestProxy { app, simulator, url, client, _directory: directory }
}

impl TestProxy {
    async fn post(&self, path: &str, body: Vec<u8>) -> reqwest::Response {
        let request = self.client.post(format!("{}{path}", self.url)).header("xi-api-key", "any");
        within_timeout(request.header("content-type", "application/json").body(body).send()).await.unwrap()
    }

    async fn request_speech(&self, path: &str) -> reqwest::Response {
        let body = json!({"text": "Hello there.", "model_id": "eleven_multilingual_v2"});
        self.post(path, body.to_string().into_bytes()).await
    }

    /// Returns the keys of the requests that the provider received, in order.
    fn request_keys(&self) -> Vec<String> {
        self.simulator.ledger().requests.into_iter().filter_map(|request| request.key).collect()
    }

    async fn stop(self) {
        self.app.drain(Duration::from_secs(10)).await;
        assert_eq!(self.simulator.ledger().violations, Vec::<String>::new());
        self.simulator.stop().await;
    }
}

/// Runs a text-to-speech session, and returns its messages.
async fn synthesize(address: SocketAddr) -> Vec<Value> {
    let uri = format!("ws://{address}{SPEECH_PATH}/stream-input");
    let request = ClientRequestBuilder::new(uri.parse().unwrap()).with_header("xi-api-key", "any");
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut session, _) = within_timeout(client_async(request, stream)).await.unwrap();
    for text in [" ", "Hello there. ", ""] {
        let message = Message::text(json!({"text": text}).to_string());
        within_timeout(session.send(message)).await.unwrap();
    }
    let mut messages = Vec::new();
    while let Some(Ok(message)) = within_timeout(session.next()).await {
        if let Message::Text(text) = message {
            messages.push(serde_json::from_str(&text).unwrap());
        }
    }
    messages
}

/// Checks a request, a stream, an upload that is retried with a second key after a refusal, and a WebSocket session.
async fn check_all_kinds_of_requests(proxy: TestProxy) {
    let speech = proxy.request_speech(SPEECH_PATH).await;
    assert_eq!(speech.status(), 200);
    assert!(!speech.bytes().await.unwrap().is_empty());
    let stream = proxy.request_speech(&format!("{SPEECH_PATH}/stream")).await;
    assert_eq!(stream.status(), 200);
    assert!(!stream.bytes().await.unwrap().is_empty());

    proxy.simulator.set_fault(FIRST_KEY, Some("quota".parse::<Fault>().unwrap()));
    let body: Vec<u8> = (0..3_000_000_u32).map(|index| u8::try_from(index % 251).unwrap()).collect();
    let upload = proxy.post("/v1/simulator/echo", body.clone()).await;
    assert_eq!(upload.status(), 200, "the upload must be served: {}", upload.text().await.unwrap());
    proxy.simulator.set_fault(FIRST_KEY, None);
    let requests = proxy.simulator.ledger().requests;
    let [.., refused, served] = requests.as_slice() else {
        panic!("the provider must receive two requests: {requests:?}")
    };
    assert_eq!([&refused.key, &served.key].map(|key| key.as_deref()), [Some(FIRST_KEY), Some(SECOND_KEY)]);
    assert_eq!(served.body_bytes, body.len() as u64);

    let messages = synthesize(proxy.app.address()).await;
    assert!(
        messages.iter().any(|message| message["audio"].is_string()),
        "a message must have audio: {messages:?}"
    );
    assert_eq!(messages.last().unwrap()["isFinal"], true);
    proxy.stop().await;
}

#[tokio::test]
async fn all_kinds_of_requests_pass_through_a_connect_proxy() {
    for requires_credentials in [false, true] {
        let forward = ForwardProxyProcess::start_tinyproxy(requires_credentials).await;
        let proxy = start_keychoir(&forward.url, |_| {}).await;
        let target = proxy.simulator.base_url().replace("http://", "CONNECT ");
        check_all_kinds_of_requests(proxy).await;
        let log = std::fs::read_to_string(&forward.log).unwrap();
        assert!(log.contains(&target), "the forward proxy must open a tunnel to the provider: {log}");
        assert!(
            !log.contains(FIRST_KEY) && !log.contains(SECOND_KEY),
            "the forward proxy must receive no key: {log}"
        );
    }
}

#[tokio::test]
async fn all_kinds_of_requests_pass_through_a_socks_proxy() {
    for requires_credentials in [false, true] {
        let forward = ForwardProxyProcess::start_microsocks(requires_credentials).await;
        check_all_kinds_of_requests(start_keychoir(&forward.url, |_| {}).await).await;
    }
}

/// Checks that Keychoir responds with 502 and `code` if the forward proxy at `forward_proxy_url` fails. The provider
/// must receive no request, and the state of the keys must not change.
async fn check_forward_proxy_failure(forward_proxy_url: &str, code: &str) {
    let proxy = start_keychoir(forward_proxy_url, |_| {}).await;
    let response = proxy.request_speech(SPEECH_PATH).await;
    assert_eq!(response.status(), 502, "the request through {forward_proxy_url} must fail");
    assert_eq!(
        response.headers()["x-keychoir-error"],
        code,
        "{forward_proxy_url} must cause the error {code}"
    );
    let body = response.text().await.unwrap();
    assert!(
        !body.contains(USER) && !body.contains(PASSWORD) && !body.contains("127.0.0.1"),
        "the response must contain neither the credentials nor the address of the forward proxy: {body}"
    );
    assert_eq!(proxy.request_keys(), [""; 0]);
    assert!(proxy.app.keys().iter().all(|key| key.state == KeyState::Usable), "all keys must stay usable");
    proxy.stop().await;
}

#[tokio::test]
async fn missing_and_wrong_credentials_of_a_forward_proxy_are_reported() {
    for forward in
        [ForwardProxyProcess::start_tinyproxy(true).await, ForwardProxyProcess::start_microsocks(true).await]
    {
        check_forward_proxy_failure(&forward.url_with_wrong_password(), "proxy_authentication_failed").await;
        check_forward_proxy_failure(&forward.url_without_credentials(), "proxy_authentication_failed").await;
    }
}

#[tokio::test]
async fn an_unreachable_forward_proxy_makes_the_provider_unreachable() {
    let closed_address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for scheme in ["http", "https", "socks5h"] {
        check_forward_proxy_failure(
            &format!("{scheme}://{USER}:{PASSWORD}@{closed_address}"),
            "upstream_unreachable",
        )
        .await;
    }
}

const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

#[tokio::test]
async fn a_host_name_that_only_the_forward_proxy_can_resolve_is_reached() {
    let plan = Plan::with_keys([(FIRST_KEY, 100_000)]);
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let forward = start_scripted_forward_proxy(ESTABLISHED, Some(simulator.address())).await;
    let proxy = start_keychoir(&forward.url, |config| {
        config.upstream.base_url = "http://provider.invalid".parse().unwrap();
    })
    .await;
    for _ in 0..3 {
        let response = proxy.request_speech(SPEECH_PATH).await;
        assert_eq!(response.status(), 200);
        response.bytes().await.unwrap();
    }
    assert_eq!(simulator.ledger().requests.len(), 3);
    assert!(forward.connections.load(Ordering::SeqCst) < 3, "several requests must use the same tunnel");
    proxy.stop().await;
}

#[tokio::test]
async fn a_failing_forward_proxy_is_not_tried_with_every_key() {
    for (response, code, expected_connections) in [
        (
            &b"HTTP/1.1 407 No\r\nproxy-authenticate: Basic realm=x\r\n\r\n"[..],
            "proxy_authentication_failed",
            1,
        ),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "upstream_unreachable", 2),
        (b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "upstream_unreachable", 2),
        (b"garbage\r\n\r\n", "upstream_unreachable", 2),
    ] {
        let forward = start_scripted_forward_proxy(response, None).await;
        check_forward_proxy_failure(&forward.url, code).await;
        assert_eq!(forward.connections.load(Ordering::SeqCst), expected_connections);
    }
}

#[tokio::test]
async fn keys_may_have_their_own_forward_proxies() {
    let plan = Plan::with_keys([(FIRST_KEY, 100_000)]);
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let own_proxy = start_scripted_forward_proxy(ESTABLISHED, Some(simulator.address())).await;
    let unused_proxy = start_scripted_forward_proxy(b"HTTP/1.1 502 Bad Gateway\r\n\r\n", None).await;
    let key = KeyConfig { proxy: own_proxy.url.parse().unwrap(), ..ApiKey::new(FIRST_KEY).unwrap().into() };
    let proxy = start_keychoir(&unused_proxy.url, |config| config.keys = vec![key]).await;
    assert_eq!(proxy.request_speech(SPEECH_PATH).await.status(), 200);
    assert_eq!(
        (own_proxy.connections.load(Ordering::SeqCst), unused_proxy.connections.load(Ordering::SeqCst)),
        (1, 0)
    );
    let direct = KeyConfig { proxy: "direct".parse().unwrap(), ..ApiKey::new(FIRST_KEY).unwrap().into() };
    let proxy = start_keychoir(&unused_proxy.url, |config| config.keys = vec![direct]).await;
    assert_eq!(proxy.request_speech(SPEECH_PATH).await.status(), 200);
    assert_eq!(unused_proxy.connections.load(Ordering::SeqCst), 0);
}

/// Starts Keychoir with `forward_proxy_url` as `upstream.proxy` and with the keys `first` and `second`. Checks that the
/// second key serves requests and a WebSocket session.
async fn check_served_by_second_key(forward_proxy_url: &str, first: KeyConfig, second: KeyConfig) {
    let proxy = start_keychoir(forward_proxy_url, |config| config.keys = vec![first, second]).await;
    for _ in 0..3 {
        let response = proxy.request_speech(SPEECH_PATH).await;
        assert_eq!(response.status(), 200, "the second key must serve: {}", response.text().await.unwrap());
        response.bytes().await.unwrap();
    }
    assert_eq!(proxy.request_keys(), [SECOND_KEY; 3]);
    let messages = synthesize(proxy.app.address()).await;
    assert_eq!(messages.last().unwrap()["isFinal"], true);
    proxy.stop().await;
}

#[tokio::test]
async fn a_key_whose_route_fails_is_replaced_by_one_with_another_route() {
    let forward = ForwardProxyProcess::start_tinyproxy(true).await;
    let wrong_password = forward.url_with_wrong_password();
    let closed_address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (closed_url, closed_proxy) =
        (format!("http://{closed_address}"), format!("socks5h://{closed_address}"));
    let key_config = |key: &str| KeyConfig::from(ApiKey::new(key).unwrap());
    let through = |key: &str, proxy: &str| KeyConfig { proxy: proxy.parse().unwrap(), ..key_config(key) };
    for failing_route in [&wrong_password, &closed_proxy] {
        check_served_by_second_key("", through(FIRST_KEY, failing_route), key_config(SECOND_KEY)).await;
        check_served_by_second_key(failing_route, key_config(FIRST_KEY), through(SECOND_KEY, "direct")).await;
        check_served_by_second_key(failing_route, key_config(FIRST_KEY), through(SECOND_KEY, &forward.url))
            .await;
    }
    let unreachable = KeyConfig { base_url: Some(closed_url.parse().unwrap()), ..key_config(FIRST_KEY) };
    check_served_by_second_key("", unreachable, key_config(SECOND_KEY)).await;
}

#[tokio::test]
async fn a_failing_forward_proxy_is_tried_at_most_twice_for_each_host() {
    for (response, max_connections) in [
        (&b"HTTP/1.1 407 No\r\nproxy-authenticate: Basic realm=x\r\n\r\n"[..], 1),
        // The forward proxy may fail for only one of the two hosts, so both are tried, each at most twice.
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", 4),
    ] {
        let forward = start_scripted_forward_proxy(response, None).await;
        let other_host = KeyConfig {
            base_url: Some("http://provider.invalid".parse().unwrap()),
            ..ApiKey::new(SECOND_KEY).unwrap().into()
        };
        let proxy = start_keychoir(&forward.url, |config| {
            config.keys = vec![ApiKey::new(FIRST_KEY).unwrap().into(), other_host];
        })
        .await;
        assert_eq!(proxy.request_speech(SPEECH_PATH).await.status(), 502);
        let connections = forward.connections.load(Ordering::SeqCst);
        assert!(
            (1..=max_connections).contains(&connections),
            "1 to {max_connections} connections must be opened, not {connections}"
        );
        proxy.stop().await;
    }
}

#[tokio::test]
async fn a_check_of_a_key_reports_the_refusal_of_its_forward_proxy() {
    let forward = ForwardProxyProcess::start_tinyproxy(true).await;
    let token = "kca_token_of_the_test";
    let proxy = start_keychoir(&forward.url_with_wrong_password(), |config| {
        config.admin_token = Some(AdminTokenFingerprint::new(token));
    })
    .await;
    let id = &ApiKey::new(FIRST_KEY).unwrap().fingerprint().to_string()[..12];
    let url = format!("{}/api/keychoir/v1/keys/{id}/check", proxy.url);
    let response = within_timeout(proxy.client.post(url).bearer_auth(token).send()).await.unwrap();
    let document: Value = response.json().await.unwrap();
    assert_eq!(document["outcome"], "no_response");
    let reason = document["reason"].as_str().unwrap();
    assert!(
        reason.contains("refuses the configured user and password"),
        "the reason must name the refusal: {reason}"
    );
    assert!(
        !reason.contains(USER) && !reason.contains("wrong"),
        "the reason must contain no credentials: {reason}"
    );
    proxy.stop().await;
}

#[tokio::test]
async fn the_quota_poller_uses_the_forward_proxy() {
    let forward = ForwardProxyProcess::start_tinyproxy(true).await;
    let mut proxy = start_keychoir(&forward.url, |config| config.quota_polling.enabled = true).await;
    assert!(proxy.app.wait_for_first_poll(STEP_TIMEOUT).await);
    assert!(std::fs::read_to_string(&forward.log).unwrap().contains("CONNECT 127.0.0.1:"));
    assert!(!proxy.request_keys().is_empty());
    proxy.stop().await;
}

/// Returns a TLS acceptor for `localhost`, and the file with its self-signed certificate.
fn tls_acceptor(directory: &TempDir) -> (TlsAcceptor, PathBuf) {
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let ca_file = directory.path().join("ca.pem");
    std::fs::write(&ca_file, certified.cert.pem()).unwrap();
    let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
    let crypto_provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(crypto_provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certified.cert.der().clone()], key.into())
        .unwrap();
    (TlsAcceptor::from(Arc::new(config)), ca_file)
}

/// Starts a task that accepts TLS connections and relays the decrypted bytes to `target`. Returns the port, and a guard
/// that ends the task when it is dropped.
async fn start_tls_terminator(acceptor: TlsAcceptor, target: SocketAddr) -> (u16, AbortOnDrop) {
    let listener = bind_loopback().await;
    let port = listener.local_addr().unwrap().port();
    let task = Tasks::new().spawn_guarded(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            Tasks::new().spawn(async move {
                let Ok(mut stream) = acceptor.accept(tcp).await else { return };
                let mut plain = TcpStream::connect(target).await.unwrap();
                let _ = copy_bidirectional(&mut stream, &mut plain).await;
            });
        }
    });
    (port, task)
}

#[tokio::test]
async fn tls_connections_to_the_provider_pass_through_http_and_https_proxies() {
    let directory = tempfile::tempdir().unwrap();
    let (acceptor, ca_file) = tls_acceptor(&directory);
    let simulator =
        Simulator::start(bind_loopback().await, Plan::with_keys([(FIRST_KEY, 100_000)])).await.unwrap();
    let (provider_port, _provider) = start_tls_terminator(acceptor.clone(), simulator.address()).await;
    let forward = ForwardProxyProcess::start_tinyproxy(true).await;
    let proxy_port: u16 = forward.url.rsplit(':').next().unwrap().parse().unwrap();
    let (tls_proxy_port, _tls_proxy) =
        start_tls_terminator(acceptor, SocketAddr::from(([127, 0, 0, 1], proxy_port))).await;
    let over_tls = format!("https://{USER}:{PASSWORD}@localhost:{tls_proxy_port}");
    for url in [forward.url.as_str(), &over_tls] {
        let proxy = start_keychoir(url, |config| {
            config.upstream.base_url = format!("https://localhost:{provider_port}").parse().unwrap();
            config.upstream.ca_file = Some(ca_file.clone());
        })
        .await;
        assert_eq!(proxy.request_speech(SPEECH_PATH).await.status(), 200);
        let messages = synthesize(proxy.app.address()).await;
        assert_eq!(messages.last().unwrap()["isFinal"], true);
        // Without the CA file, neither the provider's certificate nor the forward proxy's is trusted.
        let untrusted = start_keychoir(url, |config| {
            config.upstream.base_url = format!("https://localhost:{provider_port}").parse().unwrap();
        })
        .await;
        assert_eq!(untrusted.request_speech(SPEECH_PATH).await.status(), 502);
    }
    let log = std::fs::read_to_string(&forward.log).unwrap();
    assert!(
        log.contains(&format!("CONNECT localhost:{provider_port}")),
        "the forward proxy must open a tunnel to the provider: {log}"
    );
}

#[tokio::test]
async fn the_http_client_of_the_mirror_uses_the_forward_proxy() {
    let listener = bind_loopback().await;
    let target = listener.local_addr().unwrap();
    let _server = Tasks::new().spawn_guarded(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { break };
                head.push(byte);
            }
            let _ = stream.write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").await;
        }
    });
    for forward in
        [ForwardProxyProcess::start_tinyproxy(true).await, ForwardProxyProcess::start_microsocks(true).await]
    {
        let proxy_route = |url: &str| {
            let mut config = Config::default();
            config.supabase.proxy = url.parse().unwrap();
            let supabase = "https://p.supabase.co".parse().unwrap();
            config.proxy_routes().for_mirror(&supabase, &config.supabase.proxy).unwrap()
        };
        let send = async |url: &str| {
            let client = keychoir::upstream::http_client_through(Some(&proxy_route(url)), None).unwrap();
            let request = client.build().unwrap().get(format!("http://{target}/")).send();
            within_timeout(request).await.map(|response| response.status().as_u16())
        };
        assert_eq!(send(&forward.url).await.unwrap(), 204);
        assert_ne!(send(&forward.url_with_wrong_password()).await.ok(), Some(204));
    }
}
