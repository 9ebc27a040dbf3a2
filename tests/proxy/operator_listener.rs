//! Tests `admin.listen`, which serves the admin API and the pages for operators on a separate TCP address or Unix
//! socket. The listener for clients does not serve them, and the listener for operators forwards no requests. An
//! address that other machines can reach needs an admin token, also to read pages that are not public.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, bind_loopback, client_config};
use keychoir::admin::PublicPages;
use keychoir::app::{self, Address, AppConfig, DrainOutcome, Listener, ProgramListeners, RunningApp};
use keychoir::config::Config;
use keychoir::secret::{AdminTokenFingerprint, ApiKey};
use keychoir::simulator::{Plan, Simulator};
use tempfile::TempDir;

const ADMIN_TOKEN: &str = "kca_canary_of_the_admin_token_51d0";

/// Paths that only operators use.
const OPERATOR_PATHS: [&str; 6] = [
    "/api/keychoir/v1/overview",
    "/api/keychoir/v1/unknown",
    "/api/elevenlabs-status",
    "/api/keychoir-keys",
    "/metrics",
    "/",
];

/// A proxy with separate listeners for clients and for operators.
struct TwoListeners {
    app: RunningApp,
    simulator: Simulator,
    clients_url: String,
    operators_address: Address,
    directory: TempDir,
}

async fn start(operators: Vec<Listener>, change: impl FnOnce(&mut AppConfig)) -> TwoListeners {
    let simulator =
        Simulator::start(bind_loopback().await, Plan::with_keys([(FIRST_KEY, 1_000)])).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let keys = vec![ApiKey::new(FIRST_KEY).unwrap()];
    let mut config = Config::with_defaults(keys, simulator.base_url().parse().unwrap());
    config.storage.path = directory.path().join("keychoir.db");
    config.quota_polling.enabled = false;
    config.server.drain_idle_timeout = Duration::ZERO;
    config.clients = vec![client_config("app", CLIENT_TOKEN, Default::default())];
    let mut app_config = AppConfig::from_config(config).unwrap();
    app_config.admin_token = Some(AdminTokenFingerprint::new(ADMIN_TOKEN));
    change(&mut app_config);
    let clients = vec![bind_loopback().await.into()];
    let app = app::start(app_config, ProgramListeners { clients, operators }).unwrap();
    let clients_url = format!("http://{}", app.address());
    let operators_address = app.operator_addresses()[0].clone();
    TwoListeners { app, simulator, clients_url, operators_address, directory }
}

fn http_client() -> reqwest::Client {
    keychoir::upstream::http_client().unwrap().build().unwrap()
}

impl TwoListeners {
    async fn close(self) {
        assert_eq!(self.app.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
        assert_eq!(self.simulator.ledger().violations, Vec::<String>::new());
        drop(self.directory);
    }
}

/// Asserts that each of the two listeners serves its paths and refuses the paths of the other.
async fn check_paths(running: &TwoListeners, operators: &reqwest::Client, operators_url: &str) {
    let client = http_client();
    for path in OPERATOR_PATHS {
        let request = client.get(format!("{}{path}", running.clients_url)).bearer_auth(ADMIN_TOKEN);
        let refused_response = request.send().await.unwrap();
        assert_eq!((refused_response.status().as_u16(), path), (404, path));
        assert_eq!(
            refused_response.headers()["x-keychoir-error"],
            "served_elsewhere",
            "{path} must be served only for operators"
        );
        let request = operators.get(format!("{operators_url}{path}")).bearer_auth(ADMIN_TOKEN);
        let expected = if path.ends_with("unknown") { 404 } else { 200 };
        assert_eq!((request.send().await.unwrap().status().as_u16(), path), (expected, path));
    }
    for (client, url) in [(&client, &*running.clients_url), (operators, operators_url)] {
        for path in ["/livez", "/healthz", "/readyz"] {
            assert_eq!(
                client.get(format!("{url}{path}")).send().await.unwrap().status(),
                200,
                "{url}{path} must be served at both addresses"
            );
        }
        for path in ["/api/keychoir/v1/me", "/api/keychoir-usage"] {
            let request = client.get(format!("{url}{path}")).bearer_auth(CLIENT_TOKEN);
            assert_eq!(
                request.send().await.unwrap().status(),
                200,
                "a client must be able to read its own usage at every address"
            );
        }
    }
    let voices = |client: &reqwest::Client, url: &str| {
        client.get(format!("{url}/v1/voices")).header("xi-api-key", CLIENT_TOKEN).send()
    };
    assert_eq!(voices(&client, &running.clients_url).await.unwrap().status(), 200);
    let refused_response = voices(operators, operators_url).await.unwrap();
    assert_eq!(refused_response.status(), 404);
    assert_eq!(refused_response.headers()["x-keychoir-error"], "not_proxied");
    assert_eq!(running.simulator.ledger().requests.len(), 1, "only the client's request must be sent");
}

#[tokio::test]
async fn operators_have_a_separate_address() {
    let running = start(vec![bind_loopback().await.into()], |_| {}).await;
    let url = format!("http://{}", running.operators_address);
    check_paths(&running, &http_client(), &url).await;
    running.close().await;
}

#[tokio::test]
async fn operators_have_a_unix_socket_with_a_separate_mode() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("admin.sock");
    let running = start(vec![Listener::unix(&path, 0o600).unwrap()], |_| {}).await;
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let client = keychoir::upstream::http_client().unwrap().unix_socket(path.clone()).build().unwrap();
    check_paths(&running, &client, "http://localhost").await;
    drop(client);
    running.close().await;
    assert!(!path.exists(), "the socket must be removed at the end");
}

#[tokio::test]
async fn an_exposed_address_for_operators_needs_an_admin_token() {
    let keys = vec![ApiKey::new(SECOND_KEY).unwrap()];
    let mut config = Config::with_defaults(keys, "http://127.0.0.1:9".parse().unwrap());
    config.storage.ephemeral = true;
    let exposed = Listener::tcp("0.0.0.0:0".parse().unwrap()).unwrap();
    let listeners = ProgramListeners { clients: Vec::new(), operators: vec![exposed] };
    let error = app::start(AppConfig::from_config(config).unwrap(), listeners).unwrap_err();
    assert!(
        error.to_string().ends_with("is open to other machines, and there is no admin token"),
        "the error must name the missing admin token: {error}"
    );
}

/// Returns an address of this machine that is not a loopback address. No packet is sent.
fn external_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_loopback())
}

#[tokio::test]
async fn the_page_for_apps_names_the_address_of_clients() {
    let running = start(vec![bind_loopback().await.into()], |_| {}).await;
    let url = format!("http://{}", running.operators_address);
    let client = http_client();
    let code = client.post(format!("{url}/api/keychoir/v1/dashboard-codes")).bearer_auth(ADMIN_TOKEN);
    let code: serde_json::Value = code.send().await.unwrap().json().await.unwrap();
    let form = client.post(format!("{url}/_/login")).header("origin", &url);
    let form = form.header("content-type", "application/x-www-form-urlencoded");
    let session = form.body(format!("code={}", code["code"].as_str().unwrap())).send().await.unwrap();
    let cookie = session.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap().to_owned();
    let page = client.get(format!("{url}/_/connect")).header("cookie", cookie).send().await.unwrap();
    let page = page.text().await.unwrap();
    assert!(
        page.contains(&format!("base_url=&quot;{}&quot;", running.clients_url)),
        "the page must name the address of clients: {page}"
    );
    assert!(!page.contains(&url), "the page must not name the address of operators: {page}");
    running.close().await;
}

/// The test ends without a check on a machine without a network. The tests in `policy` check the decision itself.
#[tokio::test]
async fn other_machines_need_the_admin_token_for_pages_that_are_not_public() {
    let Some(address) = external_address() else { return };
    let listener = Listener::tcp((address, 0).into()).unwrap();
    let running = start(vec![listener], |app| {
        app.public_pages = PublicPages { status: false, metrics: true };
    })
    .await;
    let client = http_client();
    let get = |path: &str, token: Option<&str>| {
        let request = client.get(format!("http://{}{path}", running.operators_address));
        token.into_iter().fold(request, |request, token| request.bearer_auth(token)).send()
    };
    for path in ["/api/elevenlabs-status", "/api/keychoir-keys"] {
        for (token, status) in
            [(None, 401), (Some("wrong"), 401), (Some(CLIENT_TOKEN), 403), (Some(ADMIN_TOKEN), 200)]
        {
            let response = get(path, token).await.unwrap();
            assert_eq!(
                (response.status().as_u16(), path),
                (status, path),
                "the response to the token {token:?} must have the status {status}"
            );
            if status != 200 {
                assert!(
                    response.text().await.unwrap().contains("admin.public"),
                    "the error must contain `admin.public`"
                );
            }
        }
    }
    for path in ["/metrics", "/livez", "/readyz"] {
        assert_eq!(get(path, None).await.unwrap().status(), 200, "{path} must be public");
    }
    running.close().await;
}
