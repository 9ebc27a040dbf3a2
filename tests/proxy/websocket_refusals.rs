//! Tests that refusals on WebSockets are classified by the codes and messages of HTTP refusals, which their messages
//! and close reasons contain. An error with an unknown code is a refusal only if a close frame follows. Refused
//! sessions use another account, and no key becomes unusable without a reason in the message.

use keychoir::simulator::Plan;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::support::websocket::{AGENT, Received, SCRIBE, STREAM_INPUT, open_session};
use crate::support::{FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, start_proxy};

const FOURTH_KEY: &str = "sk_key_number_four_00000000000000000000000000000004";
const KEYS: [&str; 4] = [FIRST_KEY, SECOND_KEY, THIRD_KEY, FOURTH_KEY];

/// Starts a proxy with `count` accounts. The first `refusing_count` accounts have the fault.
async fn start_proxy_with_refusals(count: usize, refusing_count: usize, fault: &str) -> TestProxy {
    let proxy = start_proxy(Plan::with_keys(KEYS[..count].iter().map(|key| (*key, 100_000)))).await;
    KEYS[..refusing_count].iter().for_each(|key| proxy.set_fault(key, fault));
    proxy
}

/// Returns a fault that sends this message, immediately followed by a close frame without a reason.
fn message_and_close(code: u16, message: &Value) -> String {
    format!("last={code}/{message}")
}

/// Returns the number of sessions that were opened with each of the first `count` accounts.
fn session_counts(proxy: &TestProxy, count: usize) -> Vec<usize> {
    proxy.request_counts(&KEYS[..count])
}

/// Opens a session and sends a text. Returns whether the client received audio and no error.
async fn is_speech_served(proxy: &TestProxy) -> bool {
    let mut session = open_session(proxy, STREAM_INPUT).await;
    let (messages, _) = session.synthesize(&["Hello. "]).await;
    let has_audio =
        messages.iter().any(|message| message["audio"].as_str().is_some_and(|audio| !audio.is_empty()));
    has_audio && messages.iter().all(|message| message.get("error").is_none())
}

/// Opens a session of a transcription or an agent. Returns the type of the first message, or the code and the
/// reason of a close frame.
async fn open_and_receive_kind(proxy: &TestProxy, path: &str) -> String {
    let mut session = open_session(proxy, path).await;
    let kind_or_close = match session.receive().await {
        Received::Text(message) => {
            let kind = message.get("message_type").or(message.get("type"));
            kind.and_then(Value::as_str).unwrap_or("untyped").to_owned()
        }
        Received::Close(code, reason) => format!("{code} {reason}"),
        Received::Binary(_) | Received::Disconnected => {
            panic!("the session must send a message or a close frame")
        }
    };
    session.send(Message::Close(None)).await;
    session.receive_to_end().await;
    kind_or_close
}

const MISSING_PERMISSION: &str =
    "The API key you used is missing the permission text_to_speech to execute this operation.";
const LIBRARY_VOICE: &str =
    "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice.";
const UNPAID_INVOICE: &str =
    "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage.";

#[tokio::test]
async fn a_close_with_an_http_message_is_classified_by_the_message() {
    for (message, verdict) in [
        (MISSING_PERMISSION, "missing_permission"),
        (LIBRARY_VOICE, "plan_feature"),
        (UNPAID_INVOICE, "billing"),
    ] {
        let proxy = start_proxy_with_refusals(4, 3, &format!("close=1008/{message}")).await;
        assert!(is_speech_served(&proxy).await, "{message}: speech must be served");
        assert_eq!(session_counts(&proxy, 4), [1, 1, 1, 1], "{message}: each account must be tried once");
        assert!(is_speech_served(&proxy).await, "{message}: speech must be served again");
        assert_eq!(
            session_counts(&proxy, 4),
            [1, 1, 1, 2],
            "{message}: only the last account must be tried again"
        );
        let verdicts: Vec<String> =
            proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
        assert_eq!(verdicts, [verdict, verdict, verdict, "served", "served"]);
    }
}

/// The error message is more specific than the `message_type`.
#[tokio::test]
async fn an_auth_error_about_a_permission_makes_no_key_unusable() {
    let message = MISSING_PERMISSION.replace("text_to_speech", "speech_to_text");
    let message = json!({"message_type": "auth_error", "error": message});
    let proxy = start_proxy_with_refusals(4, 3, &message_and_close(1000, &message)).await;
    for expected in [[1, 1, 1, 1], [1, 1, 1, 2]] {
        assert_eq!(open_and_receive_kind(&proxy, SCRIBE).await, "session_started");
        assert_eq!(session_counts(&proxy, 4), expected);
        assert_eq!(proxy.key_statuses().await, ["active"; 4]);
    }
    proxy.close_unchecked().await;
}

/// The message does not attribute the error to the key. Two accounts are tried, the next session uses the third
/// account, and all keys stay active.
#[tokio::test]
async fn an_unexplained_auth_error_makes_no_key_unusable() {
    let message = json!({"message_type": "auth_error", "error": "Something new."});
    let proxy = start_proxy_with_refusals(3, 2, &message_and_close(1000, &message)).await;
    assert_eq!(open_and_receive_kind(&proxy, SCRIBE).await, "auth_error");
    assert_eq!(session_counts(&proxy, 3), [1, 1, 0]);
    assert_eq!(open_and_receive_kind(&proxy, SCRIBE).await, "session_started");
    assert_eq!(session_counts(&proxy, 3), [1, 1, 1]);
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
        // The code is unknown, and only the close frame shows that it is a refusal.
        "gizmo",
    ] {
        let proxy = start_proxy_with_refusals(
            2,
            1,
            &message_and_close(1008, &json!({"message_type": code, "error": "x"})),
        )
        .await;
        for expected in [[1, 1], [1, 2]] {
            assert_eq!(
                open_and_receive_kind(&proxy, SCRIBE).await,
                "session_started",
                "{code}: the session must start"
            );
            // An account at its concurrency limit is tried again after a short cooldown.
            if code != "concurrent_limit_exceeded" {
                assert_eq!(
                    session_counts(&proxy, 2),
                    expected,
                    "{code}: the numbers of sessions with each key must be {expected:?}"
                );
            }
        }
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn an_http_error_of_an_agent_socket_fails_over() {
    for message in [
        json!({"detail": {"status": "missing_permissions", "message": MISSING_PERMISSION}}),
        json!({"type": "error", "error": "subscription_required", "message": "x"}),
        json!({"type": "error", "error_event": {"code": 1008, "error_type": "workspace_access_denied", "message": "x"}}),
    ] {
        let proxy = start_proxy_with_refusals(3, 2, &message_and_close(1008, &message)).await;
        for expected in [[1, 1, 1], [1, 1, 2]] {
            assert_eq!(
                open_and_receive_kind(&proxy, AGENT).await,
                "conversation_initiation_metadata",
                "{message}: the conversation must start"
            );
            assert_eq!(
                session_counts(&proxy, 3),
                expected,
                "{message}: the accounts that refused must not be tried again"
            );
        }
        proxy.close_unchecked().await;
    }
}

/// If another account serves the session, the refusal is recorded for the account that refused it.
#[tokio::test]
async fn an_account_without_resources_is_tried_last() {
    for kind in ["resource_exhausted", "queue_overflow"] {
        let fault = message_and_close(1000, &json!({"message_type": kind, "error": "x"}));
        let proxy = start_proxy_with_refusals(2, 1, &fault).await;
        for expected in [[1, 1], [1, 2], [1, 3]] {
            assert_eq!(
                open_and_receive_kind(&proxy, SCRIBE).await,
                "session_started",
                "{kind}: the session must start"
            );
            assert_eq!(
                session_counts(&proxy, 2),
                expected,
                "{kind}: the numbers of sessions with each key must be {expected:?}"
            );
        }
        proxy.close_unchecked().await;
        // Two equal refusals end a session, and the next session uses the third account.
        let proxy = start_proxy_with_refusals(3, 2, &fault).await;
        assert_eq!(open_and_receive_kind(&proxy, SCRIBE).await, kind);
        assert_eq!(session_counts(&proxy, 3), [1, 1, 0], "{kind}: two equal refusals must end the session");
        for expected in [[1, 1, 1], [1, 1, 2]] {
            assert_eq!(
                open_and_receive_kind(&proxy, SCRIBE).await,
                "session_started",
                "{kind}: the session must start"
            );
            assert_eq!(
                session_counts(&proxy, 3),
                expected,
                "{kind}: the numbers of sessions with each key must be {expected:?}"
            );
        }
        assert_eq!(proxy.key_statuses().await, ["active"; 3]);
        proxy.close_unchecked().await;
    }
}

/// An unknown error without a close frame is not a refusal, so it is forwarded to the client with the
/// messages after it.
#[tokio::test]
async fn an_unknown_error_without_a_close_frame_is_forwarded() {
    let message = json!({"message_type": "gizmo", "error": "Gizmo."});
    let proxy = start_proxy_with_refusals(2, 1, &format!("say={message}")).await;
    let mut session = open_session(&proxy, SCRIBE).await;
    assert_eq!(session.receive_json().await, message);
    assert_eq!(session.receive_json().await["message_type"], "session_started");
    session.send(Message::Close(None)).await;
    session.receive_to_end().await;
    drop(session);
    assert_eq!(session_counts(&proxy, 2), [1, 0]);
    proxy.close_unchecked().await;
}
