//! Refusals on WebSockets through the whole program: the texts of HTTP in messages and closes.

use keychoir::simulator::Plan;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::support::websocket::{AGENT, Received, SCRIBE, STREAM_INPUT, open_session};
use crate::support::{FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, start_proxy};

const FOUR: &str = "sk_key_number_four_00000000000000000000000000000004";
const KEYS: [&str; 4] = [FIRST_KEY, SECOND_KEY, THIRD_KEY, FOUR];

/// A pool of that many accounts, the first of which have a fault.
async fn accounts(count: usize, refusing: usize, fault: &str) -> TestProxy {
    let proxy = start_proxy(Plan::of(KEYS[..count].iter().map(|key| (*key, 100_000)))).await;
    KEYS[..refusing].iter().for_each(|key| proxy.set_fault(key, fault));
    proxy
}

/// A message, immediately followed by a close without a reason.
fn last(code: u16, message: &Value) -> String {
    format!("last={code}/{message}")
}

/// The number of sessions that each account was tried for.
fn asked(proxy: &TestProxy, count: usize) -> Vec<usize> {
    proxy.request_counts(&KEYS[..count])
}

/// Speaks a text; returns whether audio and no error was received.
async fn speak(proxy: &TestProxy) -> bool {
    let mut session = open_session(proxy, STREAM_INPUT).await;
    let (messages, _) = session.synthesize(&["Hello. "]).await;
    let has_sound =
        messages.iter().any(|message| message["audio"].as_str().is_some_and(|sound| !sound.is_empty()));
    has_sound && messages.iter().all(|message| message.get("error").is_none())
}

/// Opens a session of transcription or of an agent; returns the kind of the first message.
async fn open(proxy: &TestProxy, path: &str) -> String {
    let mut session = open_session(proxy, path).await;
    let first = match session.receive().await {
        Received::Text(message) => {
            let kind = message.get("message_type").or(message.get("type"));
            kind.and_then(Value::as_str).unwrap_or("untyped").to_owned()
        }
        Received::Close(code, reason) => format!("{code} {reason}"),
        Received::Binary(_) | Received::Disconnected => panic!("no message"),
    };
    session.send(Message::Close(None)).await;
    session.receive_to_end().await;
    first
}

const MISSING: &str =
    "The API key you used is missing the permission text_to_speech to execute this operation.";
const LIBRARY: &str =
    "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice.";
const UNPAID: &str =
    "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage.";

#[tokio::test]
async fn a_close_with_an_http_message_is_classified_by_the_message() {
    for (sentence, verdict) in
        [(MISSING, "missing_permission"), (LIBRARY, "plan_feature"), (UNPAID, "billing")]
    {
        let proxy = accounts(4, 3, &format!("close=1008/{sentence}")).await;
        assert!(speak(&proxy).await, "{sentence}");
        assert_eq!(asked(&proxy, 4), [1, 1, 1, 1], "{sentence}");
        assert!(speak(&proxy).await, "{sentence}");
        assert_eq!(asked(&proxy, 4), [1, 1, 1, 2], "{sentence}");
        let verdicts: Vec<String> =
            proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
        assert_eq!(verdicts, [verdict, verdict, verdict, "served", "served"]);
    }
}

/// A `message_type` that is less specific than the sentence beside it.
#[tokio::test]
async fn an_auth_error_about_a_permission_takes_no_key() {
    let sentence = MISSING.replace("text_to_speech", "speech_to_text");
    let message = json!({"message_type": "auth_error", "error": sentence});
    let proxy = accounts(4, 3, &last(1000, &message)).await;
    for expected in [[1, 1, 1, 1], [1, 1, 1, 2]] {
        assert_eq!(open(&proxy, SCRIBE).await, "session_started");
        assert_eq!(asked(&proxy, 4), expected);
        assert_eq!(proxy.key_statuses().await, ["active"; 4]);
    }
    proxy.close_unchecked().await;
}

/// A text that does not blame the key: two accounts are tried, the next session reaches the third,
/// and all stay active.
#[tokio::test]
async fn an_unexplained_auth_error_takes_no_key() {
    let message = json!({"message_type": "auth_error", "error": "Something new."});
    let proxy = accounts(3, 2, &last(1000, &message)).await;
    assert_eq!(open(&proxy, SCRIBE).await, "auth_error");
    assert_eq!(asked(&proxy, 3), [1, 1, 0]);
    assert_eq!(open(&proxy, SCRIBE).await, "session_started");
    assert_eq!(asked(&proxy, 3), [1, 1, 1]);
    assert_eq!(proxy.key_statuses().await, ["active"; 3]);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn an_http_code_refuses_a_transcription_before_its_start() {
    for code in [
        "subscription_required",
        "paid_plan_required",
        "feature_not_available",
        "forbidden",
        "missing_permissions",
        "invalid_api_key",
        "concurrent_limit_exceeded",
        "workspace_access_denied",
        "detected_unusual_activity",
        "payment_required",
        // An unknown text: the close shows that it is a refusal.
        "gizmo",
    ] {
        let proxy = accounts(2, 1, &last(1008, &json!({"message_type": code, "error": "x"}))).await;
        for expected in [[1, 1], [1, 2]] {
            assert_eq!(open(&proxy, SCRIBE).await, "session_started", "{code}");
            // An account with a full concurrency limit is tried again a moment later.
            if code != "concurrent_limit_exceeded" {
                assert_eq!(asked(&proxy, 2), expected, "{code}");
            }
        }
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn an_http_error_of_an_agent_socket_fails_over() {
    for message in [
        json!({"detail": {"status": "missing_permissions", "message": MISSING}}),
        json!({"type": "error", "error": "subscription_required", "message": "x"}),
        json!({"type": "error", "error_event": {"code": 1008, "error_type": "workspace_access_denied", "message": "x"}}),
    ] {
        let proxy = accounts(3, 2, &last(1008, &message)).await;
        for expected in [[1, 1, 1], [1, 1, 2]] {
            assert_eq!(open(&proxy, AGENT).await, "conversation_initiation_metadata", "{message}");
            assert_eq!(asked(&proxy, 3), expected, "{message}");
        }
        proxy.close_unchecked().await;
    }
}

/// A limit of one account is recorded once another has served.
#[tokio::test]
async fn a_session_goes_last_to_an_account_without_resources_for_a_while() {
    for kind in ["resource_exhausted", "queue_overflow"] {
        let fault = last(1000, &json!({"message_type": kind, "error": "x"}));
        let proxy = accounts(2, 1, &fault).await;
        for expected in [[1, 1], [1, 2], [1, 3]] {
            assert_eq!(open(&proxy, SCRIBE).await, "session_started", "{kind}");
            assert_eq!(asked(&proxy, 2), expected, "{kind}");
        }
        proxy.close_unchecked().await;
        // Two equal refusals end a session, and the next one reaches a third account.
        let proxy = accounts(3, 2, &fault).await;
        assert_eq!(open(&proxy, SCRIBE).await, kind);
        assert_eq!(asked(&proxy, 3), [1, 1, 0], "{kind}");
        for expected in [[1, 1, 1], [1, 1, 2]] {
            assert_eq!(open(&proxy, SCRIBE).await, "session_started", "{kind}");
            assert_eq!(asked(&proxy, 3), expected, "{kind}");
        }
        assert_eq!(proxy.key_statuses().await, ["active"; 3]);
        proxy.close_unchecked().await;
    }
}

/// An error in unknown words without a close is no refusal: it is forwarded to the client with the
/// messages after it.
#[tokio::test]
async fn an_unknown_error_without_a_close_is_forwarded() {
    let message = json!({"message_type": "gizmo", "error": "Gizmo."});
    let proxy = accounts(2, 1, &format!("say={message}")).await;
    let mut session = open_session(&proxy, SCRIBE).await;
    assert_eq!(session.receive_json().await, message);
    assert_eq!(session.receive_json().await["message_type"], "session_started");
    session.send(Message::Close(None)).await;
    session.receive_to_end().await;
    drop(session);
    assert_eq!(asked(&proxy, 2), [1, 0]);
    proxy.close_unchecked().await;
}
