//! Tests that no response, event, recorded change or log line of Keychoir contains a key or a token.

use std::fs;
use std::time::Duration;

use crate::environment::recorded_actions;
use crate::support::program::{Program, keychoir_command};
use http::StatusCode;
use keychoir::secret::{ApiKey, Fingerprint};
use keychoir::simulator::{Fault, Plan, Simulator};
use reqwest::Method;
use serde_json::{Value, json};

const FIRST_KEY: &str = "sk_canary_first_000000000000000000000000000000000001";
const SECOND_KEY: &str = "sk_canary_second_00000000000000000000000000000000002";
const ADMIN_TOKEN: &str = "kca_canary_of_the_admin_token_51d0";
const FILE_TOKEN: &str = "canary-of-a-token-in-the-file-88aa";
const WRONG_TOKEN: &str = "canary-of-a-wrong-token-77bb";

/// The running program, with the text of all responses that a client has received from it.
struct ObservedProgram {
    address: String,
    client: reqwest::Client,
    /// The request and the text of each response.
    responses: Vec<(String, String)>,
    issued_tokens: Vec<String>,
}

impl ObservedProgram {
    /// Sends a request to the admin API. Returns the document. A token in the document is moved to `issued_tokens`.
    async fn send(&mut self, method: Method, path: &str, token: &str, body: Option<Value>) -> Value {
        let url = format!("http://{}/api/keychoir/v1/{path}", self.address);
        let request = self.client.request(method.clone(), url).bearer_auth(token);
        let request = body.iter().fold(request, |request, body| request.json(body));
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status(), format!("{:?}", response.headers()));
        let mut document: Value = response.json().await.unwrap_or_default();
        if let Some(token) = document.as_object_mut().and_then(|members| members.remove("token")) {
            assert!([StatusCode::OK, StatusCode::CREATED].contains(&status));
            self.issued_tokens.push(token.as_str().unwrap().to_owned());
        }
        // The rest of the path may contain a secret of the request, so it is not recorded.
        let source = format!("{method} {}", path.split('/').next().unwrap_or_default());
        self.responses.push((source, format!("{status} {headers} {document}")));
        document
    }

    async fn send_change(&mut self, method: Method, path: &str, body: Value) -> Value {
        self.send(method, path, ADMIN_TOKEN, Some(body)).await
    }

    async fn read_all_documents(&mut self) {
        let id = &Fingerprint::new(FIRST_KEY).to_string()[..12];
        for path in
            ["overview", "keys", &format!("keys/{id}"), "clients", "clients/phone", "config", "changes"]
        {
            self.send(Method::GET, path, ADMIN_TOKEN, None).await;
        }
        for by in ["day", "hour", "key", "client", "model", "route"] {
            self.send(Method::GET, &format!("usage?by={by}"), ADMIN_TOKEN, None).await;
        }
        self.send(Method::GET, "attempts", ADMIN_TOKEN, None).await;
        for path in ["/api/elevenlabs-status", "/api/keychoir-keys", "/metrics", "/readyz"] {
            let request = self.client.get(format!("http://{}{path}", self.address)).bearer_auth(ADMIN_TOKEN);
            self.responses.push((path.to_owned(), request.send().await.unwrap().text().await.unwrap()));
        }
    }

    async fn request_speech(&mut self, token: &str) {
        let url = format!("http://{}/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM", self.address);
        let body = json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
        let response = self.client.post(url).header("xi-api-key", token).json(&body).send().await.unwrap();
        let (status, headers) = (response.status(), format!("{:?}", response.headers()));
        response.bytes().await.unwrap();
        self.responses.push(("speech".to_owned(), format!("{status} {headers}")));
    }
}

/// Sends changes with a secret in a wrong member or in the path, and asserts that they are refused.
async fn send_refused_changes(observed: &mut ObservedProgram, [first_token, second_token]: [&str; 2]) {
    for (path, body) in [
        ("keys", json!({"name": SECOND_KEY, "key": SECOND_KEY})),
        ("keys", json!({"name": "again", "key": SECOND_KEY})),
        ("keys", json!({"name": "again", "key": format!("{FIRST_KEY} "), "workspace": SECOND_KEY})),
        ("keys", json!({"name": "again", "key": SECOND_KEY, SECOND_KEY: 1})),
        ("keys", json!({"name": "again", "key": format!("{SECOND_KEY}9"), "base_url": FIRST_KEY})),
        ("clients", json!({"name": SECOND_KEY})),
        ("clients", json!({"name": "tablet", "quota": first_token, "paths": [FIRST_KEY]})),
        ("clients", json!({"name": "tablet", "keys": [SECOND_KEY], "workspaces": [second_token]})),
        (SECOND_KEY, json!({})),
        (&*format!("keys/{SECOND_KEY}/pause"), json!({"reason": "x"})),
        (&*format!("clients/{FILE_TOKEN}/rotate"), json!({})),
        (&*format!("reload?{FIRST_KEY}={FIRST_KEY}"), json!({})),
    ] {
        let document = observed.send_change(Method::POST, path, body).await;
        assert!(document["detail"]["code"].is_string(), "this change must be refused: {document}");
    }
}

/// Asserts that no text contains a secret. Each text has a name.
#[track_caller]
fn assert_no_secret(texts: &[(&str, &str)], secrets: &[&str]) {
    for secret in secrets {
        for (source, text) in texts {
            let position = text.find(*secret);
            let context = position.map(|position| &text[position.saturating_sub(200)..]);
            assert!(
                position.is_none(),
                "{source} must not contain {secret}: {:.300}",
                context.unwrap_or_default()
            );
        }
    }
}

/// Reads and returns the events until their text contains `end`.
async fn read_events(mut response: reqwest::Response, end: &str) -> String {
    let mut events = String::new();
    let reading = async {
        while !events.contains(end) {
            let chunk = response.chunk().await.unwrap().expect("the stream must be open");
            events.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    };
    tokio::time::timeout(Duration::from_secs(60), reading)
        .await
        .expect("the events must contain the end within the timeout");
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_response_event_change_or_log_line_contains_a_key_or_token() {
    let plan = Plan::with_keys([(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)]);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let simulator = Simulator::start(listener, plan).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let config_path = directory.path().join("keychoir.toml");
    let config = format!("[[clients]]\nname = \"desk\"\ntoken = \"{FILE_TOKEN}\"\n");
    fs::write(&config_path, &config).unwrap();
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", FIRST_KEY)
        .env("KEYCHOIR_CONFIG", &config_path)
        .env("KEYCHOIR_ADMIN_TOKEN", ADMIN_TOKEN)
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "0s")
        .env("KEYCHOIR_LOG__LEVEL", "trace")
        .env("KEYCHOIR_LOG__FORMAT", "json");
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address();
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let stream = client.get(format!("http://{address}/api/keychoir/v1/events")).bearer_auth(ADMIN_TOKEN);
    let stream = stream.send().await.unwrap();
    assert_eq!(stream.status(), 200);
    let events = keychoir::tasks::Tasks::new().spawn(read_events(stream, "\"action\":\"key_removed\""));
    let mut observed = ObservedProgram { address, client, responses: Vec::new(), issued_tokens: Vec::new() };

    let second = Fingerprint::new(SECOND_KEY).to_string()[..12].to_owned();
    let key = |path: &str| format!("keys/{second}/{path}");
    observed.send_change(Method::POST, "keys", json!({"name": "spare", "key": SECOND_KEY})).await;
    observed.send_change(Method::POST, &key("check"), json!({})).await;
    observed.send_change(Method::POST, "clients", json!({"name": "phone", "expires": "30d"})).await;
    observed.send_change(Method::PATCH, "clients/phone", json!({"quota": "5 requests per day"})).await;
    observed.send_change(Method::PATCH, "clients/desk", json!({"max_concurrent": 3})).await;
    observed.send_change(Method::POST, "clients/phone/rotate", json!({"grace": "1h"})).await;
    let [first_token, second_token] = observed.issued_tokens.clone().try_into().unwrap();
    // The provider repeats a refused key in its response.
    simulator.set_fault(FIRST_KEY, Some("invalid".parse::<Fault>().unwrap()));
    for token in [&first_token, &second_token, FILE_TOKEN, WRONG_TOKEN, ADMIN_TOKEN] {
        observed.request_speech(token).await;
        observed.send(Method::GET, "me", token, None).await;
        observed.send(Method::GET, "keys", token, None).await;
    }
    observed.send_change(Method::POST, &key("pause"), json!({"until": "2h", "reason": "billing"})).await;
    observed.read_all_documents().await;
    observed.send_change(Method::POST, &key("resume"), json!({})).await;
    send_refused_changes(&mut observed, [&first_token, &second_token]).await;
    // The file has a mistake next to a token.
    fs::write(&config_path, format!("{config}quota = \"{first_token}\"\n")).unwrap();
    assert!(observed.send_change(Method::POST, "reload", json!({})).await["detail"].is_object());
    fs::write(&config_path, format!("{config}rate_limit = \"60 per minute\"\n")).unwrap();
    assert!(observed.send_change(Method::POST, "reload", json!({})).await["generation"].is_u64());
    observed.send_change(Method::DELETE, "clients/phone", json!({})).await;
    let refused_change = observed.send_change(Method::DELETE, "clients/desk", json!({})).await;
    assert_eq!(refused_change["detail"]["code"], "last_client");
    observed.send_change(Method::DELETE, &format!("keys/{second}"), json!({})).await;
    observed.read_all_documents().await;

    let changes = observed.send(Method::GET, "changes", ADMIN_TOKEN, None).await;
    let expected = [
        "key_added",
        "client_added",
        "client_changed",
        "client_changed",
        "client_rotated",
        "key_paused",
        "key_resumed",
        "reloaded",
        "client_revoked",
        "key_removed",
    ];
    assert_eq!(recorded_actions(&changes), expected, "every change must be recorded");
    let events = events.await.unwrap();
    for name in ["overview", "key", "request", "change"] {
        assert!(events.contains(&format!("event: {name}\n")), "the events must contain an event `{name}`");
    }
    assert!(events.contains(ApiKey::new(SECOND_KEY).unwrap().short().as_str()));
    let (code, log) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(log.contains("\"level\":\"debug\""), "the log must contain its finest levels");

    let responses = observed.responses.iter().map(|(source, text)| (&**source, &**text));
    let texts: Vec<(&str, &str)> = responses.chain([("events", &*events), ("log", &*log)]).collect();
    let secrets = [
        &FIRST_KEY[12..48],
        &SECOND_KEY[12..48],
        ADMIN_TOKEN,
        FILE_TOKEN,
        WRONG_TOKEN,
        &*first_token,
        &*second_token,
    ];
    assert_no_secret(&texts, &secrets);
}
