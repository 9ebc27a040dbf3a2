//! Tests the refusals of sessions: their texts in the format of each WebSocket, and the keys and tokens that a session
//! accepts.

use super::sockets::*;
use super::*;
use crate::simulator::{Billing, Fault, KeyPlan, RefusalKind, WorkspacePlan};
use serde_json::json;

/// The path of a transcription session.
const SCRIBE: &str = "/v1/speech-to-text/realtime";

/// Checks that a session with the given `headers` is refused with the message `text` and a close frame.
async fn check_refused_session(
    simulator: &Simulator,
    path: &str,
    headers: &[(&str, &str)],
    text: &str,
    close: (u16, &str),
) {
    let mut client = try_connect(simulator, path, headers).await.expect("the handshake must be accepted");
    if path.starts_with(SPEECH) {
        client.send_json(json!({ "text": " " })).await;
    }
    assert_eq!(client.receive_text().await, text, "{path} must have this refusal");
    assert_eq!(
        client.receive_close().await,
        (close.0, close.1.to_owned()),
        "{path} must have this close frame"
    );
    let (request, socket) = ended_session(simulator).await;
    assert_eq!((request.status, request.charged), (Some(101), 0));
    assert_eq!(socket.close_sent.unwrap().code, close.0);
    assert_eq!(socket.close_received.unwrap().code, close.0);
}

/// The refusal of a key on the transcription WebSocket.
const AUTH_ERROR: &str =
    r#"{"message_type":"auth_error","error":"You must be authenticated to use this endpoint."}"#;

#[tokio::test]
async fn a_wrong_or_missing_key_is_refused_in_the_session() {
    let simulator = start_with_keys("sk=100").await;
    let invalid_key = r#"{"message":"Invalid API key","error":"invalid_api_key","code":1008}"#;
    check_refused_session(
        &simulator,
        SPEECH,
        &[("xi-api-key", "other")],
        invalid_key,
        (1_008, "Invalid API key"),
    )
    .await;
    let no_credential =
        "None of the authentication methods (xi-api-key, authorization header, single-use token) were found.";
    let text = format!(r#"{{"message":"{no_credential}","error":"authentication_required","code":1008}}"#);
    check_refused_session(&simulator, SPEECH, &[], &text, (1_008, no_credential)).await;
    for headers in [&[("xi-api-key", "other")][..], &[]] {
        check_refused_session(&simulator, SCRIBE, headers, AUTH_ERROR, (1_000, "")).await;
    }
    assert_eq!(simulator.ledger().violations, [] as [String; 0]);
}

#[tokio::test]
async fn a_refusal_follows_the_first_message_where_the_client_sends_first() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect(&simulator, SPEECH, "other").await;
    // A refusal would arrive before the pong.
    client.send(tokio_tungstenite::tungstenite::Message::Ping(vec![1].into())).await;
    assert!(client.next().await.unwrap().unwrap().is_pong());
    client.send_json(json!({ "text": " " })).await;
    assert_eq!(client.receive_json().await["error"], "invalid_api_key");
}

#[tokio::test]
async fn the_state_of_an_account_is_refused_in_each_format() {
    let workspace_with = |billing| {
        let workspace = WorkspacePlan { billing, ..WorkspacePlan::new("w", 100) };
        let key = KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) };
        Plan::with_keys([]).with_workspace(workspace).with_key(key)
    };
    let headers = &[("xi-api-key", "sk")];
    let payment_issue = "Your subscription has a failed or incomplete payment. Complete the latest invoice to \
        continue usage.";
    let simulator = start(workspace_with(Billing::PastDue)).await;
    let text = format!(r#"{{"message":"{payment_issue}","error":"payment_issue","code":1008}}"#);
    check_refused_session(&simulator, SPEECH, headers, &text, (1_008, payment_issue)).await;
    let text = format!(r#"{{"message_type":"error","error":"{payment_issue}"}}"#);
    check_refused_session(&simulator, SCRIBE, headers, &text, (1_000, "")).await;

    let simulator = start(workspace_with(Billing::FreeDisabled)).await;
    let mut client = connect(&simulator, SPEECH, "sk").await;
    client.send_json(json!({ "text": " " })).await;
    assert_eq!(client.receive_json().await["error"], "detected_unusual_activity");
    let (code, reason) = client.receive_close().await;
    assert_eq!((code, reason.len()), (1_008, 120));

    let key = KeyPlan { permissions: Some(vec!["user_read".into()]), ..KeyPlan::new("sk", 100) };
    let simulator = start(Plan::with_keys([]).with_key(key)).await;
    let missing_permission =
        "The API key you used is missing the permission text_to_speech to execute this operation.";
    let text = format!(r#"{{"message":"{missing_permission}","error":"missing_permissions","code":1008}}"#);
    check_refused_session(&simulator, SPEECH, headers, &text, (1_008, missing_permission)).await;
    check_refused_session(&simulator, SCRIBE, headers, AUTH_ERROR, (1_000, "")).await;
}

#[tokio::test]
async fn a_refusal_can_be_scripted_by_its_name() {
    let simulator = start_with_keys("sk=100").await;
    let headers = &[("xi-api-key", "sk")];
    let terms = "You must accept the terms of service of this feature to use it.";
    for (kind, path, text, close) in [
        (
            RefusalKind::InvalidKey,
            SPEECH,
            r#"{"message":"Invalid API key","error":"invalid_api_key","code":1008}"#.to_owned(),
            (1_008, "Invalid API key"),
        ),
        (
            RefusalKind::ServerError,
            SPEECH,
            r#"{"message":"We are sorry, something went wrong. You are not charged for this request.","error":"something_went_wrong","code":1008}"#.to_owned(),
            (1_008, "We are sorry, something went wrong. You are not charged for this request."),
        ),
        (
            RefusalKind::Quota,
            SCRIBE,
            r#"{"message_type":"quota_exceeded","error":"You have exceeded your quota."}"#.to_owned(),
            (1_000, ""),
        ),
        (
            RefusalKind::UnacceptedTerms,
            SCRIBE,
            format!(r#"{{"message_type":"unaccepted_terms","error":"{terms}"}}"#),
            (1_000, ""),
        ),
    ] {
        simulator.queue_faults("sk", vec![Fault::Refuse(kind.clone())]);
        check_refused_session(&simulator, path, headers, &text, close).await;
        assert_eq!(ended_session(&simulator).await.1.refused, Some(kind.to_string()));
    }
    let wrong_host = "Invalid API key: The API key used is for a data residency stack, however this server is a \
        global server. Please check you are calling the correct API URL.";
    let format = "Output format 'pcm_44100' is only available on the Pro tier and above.";
    let speech_error = |error, message| format!(r#"{{"message":"{message}","error":"{error}","code":1008}}"#);
    let scribe_error = |kind, error| format!(r#"{{"message_type":"{kind}","error":"{error}"}}"#);
    for (name, path, text, close) in [
        ("wrong_host", SPEECH, speech_error("invalid_api_key", wrong_host), (1_008, &wrong_host[..120])),
        ("wrong_host", SCRIBE, scribe_error("auth_error", wrong_host), (1_000, "")),
        (
            "output_format_not_allowed",
            SPEECH,
            speech_error("output_format_not_allowed", format),
            (1_008, format),
        ),
        ("quota_words", SCRIBE, scribe_error("quota_exceeded", "You have exceeded your quota."), (1_000, "")),
    ] {
        simulator.set_route_fault("sk", path, Some(name.parse().unwrap()));
        check_refused_session(&simulator, path, headers, &text, close).await;
        simulator.set_route_fault("sk", path, None);
    }
    // The next session is served again.
    let mut client = connect(&simulator, SCRIBE, "sk").await;
    assert_eq!(client.receive_json().await["message_type"], "session_started");
}

#[tokio::test]
async fn a_key_may_come_with_the_first_message_when_the_head_has_none() {
    let simulator = start_with_keys("sk=100 other=100").await;
    for name in ["xi_api_key", "xi-api-key"] {
        let mut client = try_connect(&simulator, SPEECH, &[]).await.unwrap();
        client.send_json(json!({ "text": " ", name: "sk" })).await;
        client.send_json(json!({ "text": "a", "flush": true })).await;
        assert!(client.receive_json().await["audio"].is_string());
        client.close(1_000, "").await;
        let (request, socket) = ended_session(&simulator).await;
        assert_eq!((request.key, socket.payer.as_deref()), (None, Some("sk")));
        assert_eq!(socket.messages, ["withheld", r#"{"flush":true,"text":"a"}"#]);
    }
    assert_eq!(simulator.ledger().key("sk").unwrap().charged, 2);
    // The script of the key in the first message applies after this message.
    simulator.queue_faults("sk", vec![Fault::Refuse(RefusalKind::PaymentIssue)]);
    let mut client = try_connect(&simulator, SPEECH, &[]).await.unwrap();
    client.send_json(json!({ "text": " ", "xi_api_key": "sk" })).await;
    assert_eq!(client.receive_json().await["error"], "payment_issue");
    assert_eq!(simulator.ledger().violations, [] as [String; 0]);
}

#[tokio::test]
async fn a_token_is_consumed_and_takes_precedence_over_a_key() {
    let simulator = start_with_keys("a=100 b=100").await;
    let issue_token = async |token_type: &str| {
        let reply =
            post(&format!("/v1/single-use-token/{token_type}"), "").key("a").send_to(&simulator).await;
        reply.json()["token"].as_str().unwrap().to_owned()
    };
    let token = issue_token("tts_websocket").await;
    assert!(token.starts_with("sutkn_"));
    let path = format!("{SPEECH}?single_use_token={token}");
    let mut client = connect(&simulator, &path, "b").await;
    client.send_json(json!({ "text": "a", "flush": true })).await;
    assert!(client.receive_json().await["audio"].is_string());
    drop(client);
    assert_eq!(ended_session(&simulator).await.1.payer.as_deref(), Some("a"));
    assert_eq!(
        (simulator.ledger().key("a").unwrap().charged, simulator.ledger().key("b").unwrap().charged),
        (1, 0)
    );
    let mut client = connect(&simulator, &path, "b").await;
    client.send_json(json!({ "text": "a", "flush": true })).await;
    assert_eq!(client.receive_json().await["error"], "invalid_api_key");

    // A token in the first message is valid. A token of a different type is invalid.
    let token = issue_token("tts_websocket").await;
    let mut client = try_connect(&simulator, SPEECH, &[]).await.unwrap();
    client.send_json(json!({ "text": "a", "flush": true, "single_use_token": token })).await;
    assert!(client.receive_json().await["audio"].is_string());
    let token = issue_token("batch_scribe").await;
    let mut client = try_connect(&simulator, &format!("{SCRIBE}?token={token}"), &[]).await.unwrap();
    assert_eq!(client.receive_text().await, AUTH_ERROR);
    let form = "--x\r\nContent-Disposition: form-data; name=\"model_id\"\r\n\r\nscribe_v2\r\n--x--";
    let transcribe = || post(&format!("/v1/speech-to-text?token={token}"), form);
    assert_eq!(
        (transcribe().send_to(&simulator).await.status, transcribe().send_to(&simulator).await.status),
        (200, 401)
    );
    let token = issue_token("realtime_scribe").await;
    let mut client = try_connect(&simulator, &format!("{SCRIBE}?token={token}"), &[]).await.unwrap();
    assert_eq!(client.receive_json().await["message_type"], "session_started");

    // The script of the key that requested a token applies to the session.
    let token = issue_token("realtime_scribe").await;
    simulator.queue_faults("a", vec![Fault::Refuse(RefusalKind::Quota)]);
    let mut client = try_connect(&simulator, &format!("{SCRIBE}?token={token}"), &[]).await.unwrap();
    assert_eq!(client.receive_json().await["message_type"], "quota_exceeded");
    assert_eq!(post("/v1/single-use-token/other", "").key("a").send_to(&simulator).await.status, 422);
    assert_eq!(post("/v1/single-use-token/tts_websocket", "").send_to(&simulator).await.status, 401);
}
