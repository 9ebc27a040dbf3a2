//! Tests that Keychoir never writes secrets. Requests and WebSocket sessions with canary keys, client tokens, user ids
//! and texts meet every fault of a list, with the log level `trace`. No log, header, page, error, file or command
//! output of Keychoir may contain a canary, and neither may the error about a malformed configuration.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use crate::support::program::{Program, keychoir_command, read_all_files, run, stderr};
use crate::support::websocket::{AGENT, DIALOGUE, MULTI_STREAM_INPUT, SCRIBE, STREAM_INPUT, handshake_at};
use crate::support::{CLIENT_TOKEN, VOICE_ID, bind_loopback};
use futures_util::SinkExt;
use keychoir::simulator::{Fault, Plan, Simulator};
use keychoir::tasks::{AbortOnDrop, Tasks};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;

/// Two keys with the length of real keys. Their short forms contain only the start and the end.
const FIRST_KEY: &str = "sk_canary000111122223333aaaabbbbccccddddeeeeffff0001";
const SECOND_KEY: &str = "sk_canary000444455556666aaaabbbbccccddddeeeeffff0002";
/// A Supabase key of the newer kind, and one of the older kind, a token of the role `service_role`.
const SUPABASE_KEYS: [&str; 2] =
    ["sb_secret_canary77778888", "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.canary77778888"];
/// The id of an end user.
const USER_ID: &str = "user-canary-5b1d@example.com";
const PRIVATE_TEXT: &str = "the text of a private message, canary 9c41";

/// Returns the bytes that Keychoir must not write, by description.
fn canaries() -> HashMap<&'static str, Vec<u8>> {
    use sha2::{Digest, Sha256};
    // ElevenLabs signs its webhook calls to the server of a key's owner with this digest.
    let digest = Sha256::digest(FIRST_KEY.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    HashMap::from([
        ("the middle of a key", FIRST_KEY[11..FIRST_KEY.len() - 5].into()),
        ("the middle of another key", SECOND_KEY[11..SECOND_KEY.len() - 5].into()),
        ("the plain digest of a key", hex[..32].into()),
        ("the plain digest of a key in uppercase", hex[..32].to_uppercase().into()),
        ("the plain digest of a key in bytes", digest.to_vec()),
        ("a client's token", CLIENT_TOKEN.into()),
        ("the id of a user", b"user-canary-5b1d".into()),
        ("a text", b"canary 9c41".into()),
        ("Supabase's key", b"canary77778888".into()),
    ])
}

#[track_caller]
fn assert_no_canary(location: &str, bytes: &[u8]) {
    for (name, canary) in canaries() {
        let is_present = bytes.windows(canary.len()).any(|window| window == canary);
        assert!(!is_present, "{name} must not be in {location}: {}", String::from_utf8_lossy(bytes));
    }
}

/// Faults that produce the possible outcomes of an attempt.
const FAULTS: [&str; 27] = [
    "pass",
    "quota",
    "key_cap",
    "invalid",
    "invalid_400",
    "needs_authorization",
    "missing_permissions",
    "unusual_activity",
    "payment_issue",
    "insufficient_credits",
    "paid_plan_required",
    "forbidden",
    "quota_403",
    "concurrency",
    "rate_limit",
    "system_busy",
    "unprocessable",
    "voice_not_found",
    "server_error",
    "maintenance",
    "gzip:quota",
    "early:quota",
    "cut=100",
    "close",
    "close_unread",
    "huge",
    "garbled",
];

/// Further faults, which only WebSocket sessions have.
const SOCKET_FAULTS: [&str; 5] =
    ["after=1:quota", "after=1:cut", "after=0:reset", "close=1011/what", "cut=10"];

/// Sends a text and a token on a WebSocket. Returns whether the handshake was accepted.
async fn send_secrets_on_websocket(address: SocketAddr, path: &str) -> bool {
    let handshake = handshake_at(address, path, &[("xi-api-key", CLIENT_TOKEN)]).await;
    let mut session = match handshake {
        Ok(session) => session,
        Err((_, body)) => {
            assert_no_canary("the refusal of a handshake", body.as_bytes());
            return false;
        }
    };
    assert_no_canary("a header", format!("{:?}", session.headers).as_bytes());
    for message in [
        json!({"text": PRIVATE_TEXT, "xi_api_key": CLIENT_TOKEN, "authorization": format!("Bearer {CLIENT_TOKEN}")}),
        json!({"inputs": [{"text": PRIVATE_TEXT, "voice_id": VOICE_ID}], "voices": [VOICE_ID], "xi-api-key": CLIENT_TOKEN}),
        json!({"message_type": "input_audio_chunk", "audio_base_64": "AAAA", "commit": true}),
        json!({"text": "", "close_socket": true}),
    ] {
        // The session may have ended after a fault.
        let _ = session.stream.send(Message::text(message.to_string())).await;
    }
    session.close().await;
    true
}

/// Starts a Supabase whose refusals contain its key in every part. Returns its URL.
async fn start_leaking_supabase(key: &'static str) -> (String, AbortOnDrop) {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server_task = Tasks::new().spawn_guarded(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 64 * 1024];
            // The content of the request is irrelevant.
            let _ = stream.read(&mut head).await;
            let body = json!({"code": key, "message": key, "details": key, "hint": key}).to_string();
            let length = body.len();
            let head = format!(
                "HTTP/1.1 401 {key}\r\nx-key: {key}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
            );
            let _ = stream.write_all((head + &body).as_bytes()).await;
        }
    });
    (url, server_task)
}

/// Returns a command that runs Keychoir with both keys, short cooldowns and the log level `trace`.
fn serve_command(database: &Path, upstream: &str) -> Command {
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"))
        .env("KEYCHOIR_STORAGE__PATH", database)
        .env("KEYCHOIR_UPSTREAM__BASE_URL", upstream)
        .env("KEYCHOIR_SUPABASE__EVENTS", "true")
        .env("KEYCHOIR_SUPABASE__INTERVAL", "100ms")
        .env("KEYCHOIR_SUPABASE__SETUP_ERROR_DELAY", "1ms")
        .env("KEYCHOIR_POOL__INVALID_CONFIRM_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__INVALID_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__EXHAUSTED_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__BILLING_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__RATE_LIMITED_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__CONCURRENCY_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__FEATURE_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__ENDPOINT_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__UNPROVEN_COOLDOWN", "1ms")
        .env("KEYCHOIR_POOL__QUEUE_TIMEOUT", "50ms")
        .env("KEYCHOIR_LOG__LEVEL", "trace");
    command
}

/// Sends requests of every kind with each of [`FAULTS`], and asserts that no header and no body of the proxy contains a
/// canary. Returns the number of responses.
async fn send_requests_with_every_fault(simulator: &Simulator, url: &str) -> usize {
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let mut response_count = 0;
    for fault in FAULTS {
        let fault: Fault = fault.parse().unwrap();
        simulator.set_fault(FIRST_KEY, Some(fault.clone()));
        simulator.set_fault(SECOND_KEY, Some(fault));
        let speech = format!("{url}/v1/text-to-speech/{VOICE_ID}?xi_api_key={CLIENT_TOKEN}&seed=1");
        let body = json!({"text": PRIVATE_TEXT, "model_id": "eleven_multilingual_v2"});
        let requests = [
            client
                .post(&speech)
                .header("xi-api-key", CLIENT_TOKEN)
                .header("x-keychoir-user", USER_ID)
                .json(&body),
            client.get(format!("{url}/v1/user")).bearer_auth(CLIENT_TOKEN),
            client.get(format!("{url}/v1/{CLIENT_TOKEN}/x")).header("cookie", format!("a={CLIENT_TOKEN}")),
            client
                .post(format!("{url}/v1/workspaces/api-keys/disable"))
                .header("xi-api-key", CLIENT_TOKEN)
                .json(&body),
            client.get(format!("{url}/v1/voices")).header("x-request-id", "a name with spaces"),
            client.get(format!("{url}/v1/voices?x-keychoir-user={USER_ID}")),
            client.get(format!("{url}/v1/voices")).header("x-keychoir-user", USER_ID.repeat(20)),
            client.get(format!("{url}/api/elevenlabs-status")).header("xi-api-key", CLIENT_TOKEN),
            client.get(format!("{url}/metrics")),
            client.get(format!("{url}/api/keychoir-keys")),
            client.get(format!("{url}/readyz")),
        ];
        for request in requests {
            let Ok(response) = request.send().await else { continue };
            response_count += 1;
            assert_no_canary("a header", format!("{:?}", response.headers()).as_bytes());
            let is_proxy_error = response.headers().contains_key("x-keychoir-error");
            let path = response.url().path();
            let is_admin = path.starts_with("/api/") || ["/metrics", "/readyz"].contains(&path);
            // A body of the provider may contain the client's request, so only bodies of the proxy are checked.
            if let (true, Ok(body)) = (is_proxy_error || is_admin, response.bytes().await) {
                assert_no_canary("a response of the proxy", &body);
            }
        }
    }
    response_count
}

/// Sends secrets in WebSocket sessions with each of [`FAULTS`] and [`SOCKET_FAULTS`]. Returns the number of accepted
/// handshakes.
async fn open_sessions_with_every_fault(simulator: &Simulator, url: &str) -> usize {
    let address = url.trim_start_matches("http://").parse().unwrap();
    let mut session_count = 0;
    for fault in FAULTS.into_iter().chain(SOCKET_FAULTS) {
        for key in [FIRST_KEY, SECOND_KEY] {
            simulator.set_fault(key, Some(fault.parse().unwrap()));
        }
        for path in [STREAM_INPUT, MULTI_STREAM_INPUT, DIALOGUE, SCRIBE, AGENT] {
            let path = format!(
                "{path}{}xi_api_key={CLIENT_TOKEN}&x-keychoir-user={USER_ID}",
                if path.contains('?') { '&' } else { '?' }
            );
            session_count += usize::from(send_secrets_on_websocket(address, &path).await);
        }
    }
    session_count
}

/// Runs every fault with the log format `log_format`, and asserts that no output contains a canary. With polling, the
/// provider reports reset dates, so exhausted keys stay exhausted. Without polling, both keys receive every refusal.
async fn check_log_format(log_format: &str, supabase_key: &'static str, has_polling: bool) {
    let (supabase_url, _server_task) = start_leaking_supabase(supabase_key).await;
    let directory = tempfile::tempdir().unwrap();
    let plan = Plan::with_keys([(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)]);
    let plan = plan.with_forbidden_text(CLIENT_TOKEN).with_forbidden_text(USER_ID);
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let database = directory.path().join("keychoir.db");
    let mut command = serve_command(&database, &simulator.base_url());
    command
        .env("SUPABASE_URL", supabase_url)
        .env("SUPABASE_SECRET_KEY", supabase_key)
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", has_polling.to_string())
        .env("KEYCHOIR_LOG__FORMAT", log_format);
    let mut program = Program::start(&mut command);
    let url = program.wait_for_line(|line| {
        let (_, rest) = line.split_once("Server started at ")?;
        rest.split(['"', ' ']).next().map(str::to_owned)
    });
    let response_count = send_requests_with_every_fault(&simulator, &url).await;
    let session_count = open_sessions_with_every_fault(&simulator, &url).await;
    assert!(
        has_polling || session_count > FAULTS.len(),
        "more than {} WebSockets must be opened, and {session_count} were opened",
        FAULTS.len()
    );
    let (code, log) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(
        response_count > FAULTS.len() * 4,
        "most requests must receive a response, and {response_count} have received one"
    );
    assert!(log.lines().count() > FAULTS.len() * 5, "the log must contain the requests");
    assert!(log.contains("Supabase refuses the key"), "the mirror must have received a refusal");
    assert_no_canary("the log", log.as_bytes());
    assert_no_canary("the database", &read_all_files(directory.path()));
    for command in [&["usage", "--json", "--by", "key"][..], &["usage", "--csv"], &["keys", "list", "--json"]]
    {
        let mut command = keychoir_command(command);
        let output = run(command
            .env("KEYCHOIR_STORAGE__PATH", &database)
            .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}")));
        assert_eq!(output.status.code(), Some(0), "the command must succeed: {}", stderr(&output));
        assert_no_canary("the output of a command", &[output.stdout, output.stderr].concat());
    }
    // The path `/v1/<token>` is forwarded unchanged, and nothing else that is forwarded may contain a canary.
    let violations = simulator.ledger().violations;
    assert!(
        violations.iter().all(|violation| violation.contains("the path")),
        "only the path may contain a secret: {violations:?}"
    );
}

#[tokio::test]
async fn the_json_log_contains_no_secret() {
    check_log_format("json", SUPABASE_KEYS[0], true).await;
}

#[tokio::test]
async fn the_terminal_log_contains_no_secret() {
    check_log_format("terminal", SUPABASE_KEYS[1], false).await;
}

#[test]
fn the_error_about_a_malformed_configuration_contains_no_secret() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("keychoir.toml");
    for toml in [
        format!("[[keys]]\nkey = \"{FIRST_KEY}\nname = \"x\""),
        format!("[[keys]]\nkey = {FIRST_KEY}"),
        format!("[[keys]]\nkeyy = \"{FIRST_KEY}\""),
        format!("keys = \"{FIRST_KEY}\""),
        format!("[pool]\nkeys = [\"{FIRST_KEY}\"]"),
        format!("[[clients]]\nname = \"x\"\ntoken = {CLIENT_TOKEN}"),
        format!("[upstream]\nbase_url = \"https://{FIRST_KEY}@api.elevenlabs.io\""),
        FIRST_KEY.to_owned(),
    ] {
        std::fs::write(&file, &toml).unwrap();
        let mut command = keychoir_command(&["check", "--config", file.to_str().unwrap()]);
        let output = run(command.env("ELEVENLABS_API_KEYS", SECOND_KEY));
        assert_eq!(output.status.code(), Some(78), "the configuration must be refused: {}", stderr(&output));
        assert_no_canary("the error message", &output.stderr);
    }
    let output = run(keychoir_command(&["check"]).env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY}\u{1}")));
    assert_no_canary("the error message", &output.stderr);
}
