//! Canaries: keys, client tokens and texts that are searched in all output, with the log at TRACE,
//! over every path of a request.

use std::collections::HashMap;
use std::net::SocketAddr;

use crate::support::program::{Program, keychoir_command, read_all_files, run, stderr};
use crate::support::{CLIENT_TOKEN, VOICE_ID, bind_loopback};
use futures_util::SinkExt;
use keychoir::simulator::{Fault, Plan, Simulator};
use keychoir::tasks::{AbortOnDrop, Tasks};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_tungstenite::tungstenite::Message;

/// Two keys as long as real ones. The characters between their ends are never shown.
const FIRST_KEY: &str = "sk_canary000111122223333aaaabbbbccccddddeeeeffff0001";
const SECOND_KEY: &str = "sk_canary000444455556666aaaabbbbccccddddeeeeffff0002";
/// Supabase's keys, the newer and the older kind; the older one is a token of the role
/// service_role.
const SUPABASE_KEYS: [&str; 2] =
    ["sb_secret_canary77778888", "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.canary77778888"];
const TEXT: &str = "the text of a private message, canary 9c41";

/// The canaries by name, which must not occur anywhere.
fn canaries() -> HashMap<&'static str, Vec<u8>> {
    use sha2::{Digest, Sha256};
    // ElevenLabs signs its calls to a key owner's server with this digest.
    let digest = Sha256::digest(FIRST_KEY.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    HashMap::from([
        ("the middle of a key", FIRST_KEY[11..FIRST_KEY.len() - 5].into()),
        ("the middle of another key", SECOND_KEY[11..SECOND_KEY.len() - 5].into()),
        ("the plain digest of a key", hex[..32].into()),
        ("the plain digest of a key in capitals", hex[..32].to_uppercase().into()),
        ("the plain digest of a key in bytes", digest.to_vec()),
        ("a client's token", CLIENT_TOKEN.into()),
        ("a text", b"canary 9c41".into()),
        ("Supabase's key", b"canary77778888".into()),
    ])
}

#[track_caller]
fn assert_clean(place: &str, bytes: &[u8]) {
    for (name, canary) in canaries() {
        let found = bytes.windows(canary.len()).any(|window| window == canary);
        assert!(!found, "{name} is in {place}: {}", String::from_utf8_lossy(bytes));
    }
}

/// Every possible result of an attempt.
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

/// Further results of a session.
const SOCKET_FAULTS: [&str; 5] =
    ["after=1:quota", "after=1:cut", "after=0:reset", "close=1011/what", "cut=10"];

/// Sends a text and a token on a WebSocket and disconnects; returns whether it was accepted.
async fn talk_secrets(address: SocketAddr, path: &str) -> bool {
    let asked = crate::support::websocket::handshake_at(address, path, &[("xi-api-key", CLIENT_TOKEN)]).await;
    let mut session = match asked {
        Ok(session) => session,
        Err((_, body)) => {
            assert_clean("a refusal", body.as_bytes());
            return false;
        }
    };
    assert_clean("a header", format!("{:?}", session.headers).as_bytes());
    for message in [
        json!({"text": TEXT, "xi_api_key": CLIENT_TOKEN, "authorization": format!("Bearer {CLIENT_TOKEN}")}),
        json!({"inputs": [{"text": TEXT, "voice_id": VOICE_ID}], "voices": [VOICE_ID], "xi-api-key": CLIENT_TOKEN}),
        json!({"message_type": "input_audio_chunk", "audio_base_64": "AAAA", "commit": true}),
        json!({"text": "", "close_socket": true}),
    ] {
        // The provider may have disconnected meanwhile.
        let _ = session.stream.send(Message::text(message.to_string())).await;
    }
    session.close().await;
    true
}

/// A Supabase whose refusals contain the key in every part.
async fn indiscreet(key: &'static str) -> (String, AbortOnDrop) {
    let listener = bind_loopback().await;
    let url = format!("http://{}", listener.local_addr().unwrap());
    let serving = Tasks::new().spawn_guarded(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 64 * 1024];
            // The request is ignored.
            let _ = stream.read(&mut head).await;
            let body = json!({"code": key, "message": key, "details": key, "hint": key}).to_string();
            let length = body.len();
            let head = format!(
                "HTTP/1.1 401 {key}\r\nx-key: {key}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
            );
            let _ = stream.write_all((head + &body).as_bytes()).await;
        }
    });
    (url, serving)
}

/// With polling, the provider reports its reset dates, so an exhausted key stays so; without it,
/// every refusal occurs with both keys.
async fn check_form(form: &str, supabase_key: &'static str, is_watched: bool) {
    let (supabase, _serving) = indiscreet(supabase_key).await;
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan::of([(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)]).forbidding(CLIENT_TOKEN);
    let simulator = Simulator::start(bind_loopback().await, plan).await.unwrap();
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"))
        .env("KEYCHOIR_STORAGE__PATH", folder.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
        .env("SUPABASE_URL", supabase)
        .env("SUPABASE_SECRET_KEY", supabase_key)
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
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", is_watched.to_string())
        .env("KEYCHOIR_POOL__QUEUE_TIMEOUT", "50ms")
        .env("KEYCHOIR_LOG__LEVEL", "trace")
        .env("KEYCHOIR_LOG__FORMAT", form);
    let mut program = Program::start(&mut command);
    let url = program.wait_for_line(|line| {
        let (_, rest) = line.split_once("Server started at ")?;
        rest.split(['"', ' ']).next().map(str::to_owned)
    });
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let mut asked = 0;
    for fault in FAULTS {
        let fault: Fault = fault.parse().unwrap();
        simulator.always(FIRST_KEY, Some(fault.clone()));
        simulator.always(SECOND_KEY, Some(fault));
        let speech = format!("{url}/v1/text-to-speech/{VOICE_ID}?xi_api_key={CLIENT_TOKEN}&seed=1");
        let body = json!({"text": TEXT, "model_id": "eleven_multilingual_v2"});
        let requests = [
            client.post(&speech).header("xi-api-key", CLIENT_TOKEN).json(&body),
            client.get(format!("{url}/v1/user")).bearer_auth(CLIENT_TOKEN),
            client.get(format!("{url}/v1/{CLIENT_TOKEN}/x")).header("cookie", format!("a={CLIENT_TOKEN}")),
            client
                .post(format!("{url}/v1/workspaces/api-keys/disable"))
                .header("xi-api-key", CLIENT_TOKEN)
                .json(&body),
            client.get(format!("{url}/v1/voices")).header("x-request-id", "a name with spaces"),
            client.get(format!("{url}/api/elevenlabs-status")).header("xi-api-key", CLIENT_TOKEN),
            client.get(format!("{url}/metrics")),
            client.get(format!("{url}/api/keychoir-keys")),
            client.get(format!("{url}/readyz")),
        ];
        for request in requests {
            let Ok(answer) = request.send().await else { continue };
            asked += 1;
            assert_clean("a header", format!("{:?}", answer.headers()).as_bytes());
            let is_ours = answer.headers().contains_key("x-keychoir-error");
            let path = answer.url().path();
            let is_admin = path.starts_with("/api/") || ["/metrics", "/readyz"].contains(&path);
            // The provider's bodies may contain the client's own request; Keychoir's own bodies are
            // checked.
            if let (true, Ok(body)) = (is_ours || is_admin, answer.bytes().await) {
                assert_clean("an answer of ours", &body);
            }
        }
    }
    let address = url.trim_start_matches("http://").parse().unwrap();
    let mut talked = 0;
    for fault in FAULTS.into_iter().chain(SOCKET_FAULTS) {
        for key in [FIRST_KEY, SECOND_KEY] {
            simulator.always(key, Some(fault.parse().unwrap()));
        }
        for path in [
            crate::support::websocket::STREAM_INPUT,
            crate::support::websocket::MULTI_STREAM_INPUT,
            crate::support::websocket::DIALOGUE,
            crate::support::websocket::SCRIBE,
            crate::support::websocket::AGENT,
        ] {
            let path =
                format!("{path}{}xi_api_key={CLIENT_TOKEN}", if path.contains('?') { '&' } else { '?' });
            talked += usize::from(talk_secrets(address, &path).await);
        }
    }
    assert!(is_watched || talked > FAULTS.len(), "sockets were really opened: {talked}");
    let (code, said) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(asked > FAULTS.len() * 4, "the paths were really taken: {asked}");
    assert!(said.lines().count() > FAULTS.len() * 5, "the log really tells of them");
    assert!(said.contains("Supabase refuses the key"), "the mirror has met its refusal");
    assert_clean("the log", said.as_bytes());
    assert_clean("the books", &read_all_files(folder.path()));
    let books = folder.path().join("keychoir.db");
    for command in [&["usage", "--json", "--by", "key"][..], &["usage", "--csv"], &["keys", "list", "--json"]]
    {
        let mut command = keychoir_command(command);
        let output = run(command
            .env("KEYCHOIR_STORAGE__PATH", &books)
            .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}")));
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_clean("what a command prints", &[output.stdout, output.stderr].concat());
    }
    // The made-up path `/v1/<token>` reaches the provider, as it must; no other canary does.
    let violations = simulator.ledger().violations;
    assert!(violations.iter().all(|violation| violation.contains("the path")), "{violations:?}");
}

#[tokio::test]
async fn no_secret_comes_out_as_json() {
    check_form("json", SUPABASE_KEYS[0], true).await;
}

#[tokio::test]
async fn no_secret_comes_out_on_a_terminal() {
    check_form("terminal", SUPABASE_KEYS[1], false).await;
}

#[test]
fn no_secret_comes_out_of_a_broken_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keychoir.toml");
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
        assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
        assert_clean("the complaint", &output.stderr);
    }
    let output = run(keychoir_command(&["check"]).env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY}\u{1}")));
    assert_clean("the complaint", &output.stderr);
}
