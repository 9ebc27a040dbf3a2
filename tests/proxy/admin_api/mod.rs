//! Tests the admin API of a running proxy. A task of the test replaces the control task of the program: it records each
//! change that the API sends, makes none of them, and responds with a receipt or an error. The submodules test access
//! rules, changes, events, single keys, the OpenAPI document and the documents that can be read.

mod access;
mod changes;
mod events;
mod keys;
mod openapi;
mod reads;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, TestProxy, start_proxy_with_app};
use keychoir::admin::control::{Change, ChangeReceipt, ClientToken, ControlError, ControlSender};
use keychoir::config::{ClientConfig, Config, PausedKeyConfig};
use keychoir::policy::units::UnixMs;
use keychoir::secret::{AdminTokenFingerprint, Fingerprint, TokenFingerprint};
use keychoir::simulator::Plan;
use keychoir::tasks::Tasks;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::Value;

pub(crate) const ADMIN_TOKEN: &str = "kca_canary_of_the_admin_token_51d0";
const PREFIX: &str = "/api/keychoir/v1";

/// The changes that the task of the test has received, each formatted with its actor.
#[derive(Clone, Default)]
pub(crate) struct ReceivedChanges(Arc<Mutex<Vec<String>>>);

impl ReceivedChanges {
    /// Returns the changes since the last call.
    pub(crate) fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// Starts the task that receives the changes. The generation starts at 7.
fn start_control() -> (ControlSender, ReceivedChanges) {
    let (sender, mut requests, generation) = ControlSender::channel();
    generation.store(7, Ordering::Release);
    let received_changes = ReceivedChanges::default();
    let changes = received_changes.clone();
    Tasks::new().spawn(async move {
        while let Some(request) = requests.recv().await {
            let result = respond_to_change(&request.change, request.expected_generation, &generation);
            changes.0.lock().unwrap().push(format!("{:?} {:?}", request.change, request.origin.actor));
            let _ = request.respond.send(result);
        }
    });
    (sender, received_changes)
}

/// Returns the response to a change: a receipt with the next generation, or an error. The error is `Stale` if the
/// expected generation is not the current one, and depends otherwise on the kind of change and the name in it.
fn respond_to_change(
    change: &Change,
    expected_generation: Option<u64>,
    generation: &AtomicU64,
) -> Result<ChangeReceipt, ControlError> {
    let current = generation.load(Ordering::Acquire);
    if expected_generation.is_some_and(|expected| expected != current) {
        return Err(ControlError::Stale { current });
    }
    let (mut key_id, mut token) = (None, None);
    match change {
        Change::AddKey(key) => key_id = Some(key.key.fingerprint().to_string()[..12].to_owned()),
        Change::RemoveKey { .. } => {
            return Err(ControlError::NotManaged("the key is configured in the environment".to_owned()));
        }
        Change::PauseKey { key, .. } | Change::ResumeKey { key } => key_id = Some(key.clone()),
        Change::AddClient { name, .. } if name == "app" => {
            return Err(ControlError::AlreadyExists("a client of that name exists".to_owned()));
        }
        Change::AddClient { .. } | Change::RotateClient { .. } => {
            token = Some(ClientToken::new("a-new-token".to_owned()));
        }
        Change::RevokeClient { name } if name == "unknown" => {
            return Err(ControlError::NotFound("no client has that name".to_owned()));
        }
        Change::SetClient { .. } | Change::RevokeClient { .. } | Change::Reload => {}
    }
    generation.store(current + 1, Ordering::Release);
    Ok(ChangeReceipt { generation: current + 1, key_id, token, warnings: Vec::new() })
}

/// Starts a proxy with an admin token, the client `app`, and two keys.
async fn start_admin_proxy() -> (TestProxy, ReceivedChanges) {
    start_admin_proxy_with(|_| {}).await
}

/// Starts a proxy like [`start_admin_proxy`], after `change` has changed its configuration.
pub(crate) async fn start_admin_proxy_with(change: impl FnOnce(&mut Config)) -> (TestProxy, ReceivedChanges) {
    let (control, received) = start_control();
    let client = ClientConfig::new("app".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), Default::default());
    let plan = Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)]);
    let proxy = start_proxy_with_app(
        tempfile::tempdir().unwrap(),
        plan,
        |config| {
            config.clients = vec![client];
            change(config);
        },
        |app| {
            app.control = Some(control);
            app.admin_token = Some(AdminTokenFingerprint::new(ADMIN_TOKEN));
        },
    )
    .await;
    (proxy, received)
}

/// Reloads the configuration so that exactly these keys are paused.
pub(crate) fn set_paused(proxy: &TestProxy, keys: &[&str]) {
    let pause = |key: &&str| PausedKeyConfig {
        fingerprint: Fingerprint::new(key),
        since: UnixMs(1_700_000_000_000),
        until: None,
        reason: Some("billing dispute".into()),
    };
    proxy.reload(
        |config| config.paused_keys = keys.iter().map(pause).collect(),
        |app| app.admin_token = Some(AdminTokenFingerprint::new(ADMIN_TOKEN)),
    );
}

/// Returns a request to the admin API without a token.
fn admin_request(proxy: &TestProxy, method: Method, path: &str) -> RequestBuilder {
    proxy.client.request(method, format!("{}{PREFIX}/{path}", proxy.url))
}

/// Sends a request with the admin token.
pub(crate) async fn send(proxy: &TestProxy, method: Method, path: &str, body: Option<&Value>) -> Response {
    let request = admin_request(proxy, method, path).bearer_auth(ADMIN_TOKEN);
    let request = match body {
        Some(body) => request.json(body),
        None => request,
    };
    request.send().await.unwrap()
}

/// Returns the document at a path of the admin API.
async fn read_document(proxy: &TestProxy, path: &str) -> Value {
    let response = send(proxy, Method::GET, path, None).await;
    assert_eq!(response.status(), 200, "{path}: the document must be readable");
    response.json().await.unwrap()
}

/// Asserts the status and the code of an error, and returns its message.
#[track_caller]
fn assert_error(response: Response, status: u16, code: &str) -> impl Future<Output = String> {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers()["x-keychoir-error"], code);
    async {
        let body: Value = response.json().await.unwrap();
        body["detail"]["message"].as_str().unwrap().to_owned()
    }
}

/// Returns the id by which the admin API identifies a key.
pub(crate) fn key_id(key: &str) -> String {
    Fingerprint::new(key).to_string()[..12].to_owned()
}
