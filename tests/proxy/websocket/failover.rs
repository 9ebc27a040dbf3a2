//! Tests refused and broken sessions. Before the first audio, the proxy retries a refused session with another key.
//! After it, and if every key refuses, the client receives the refusal. Text that may have been spoken is not sent
//! again, and a broken connection to the provider ends without a close frame.

use std::time::Duration;

use keychoir::simulator::{Ledger, Plan};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::{has_audio, into_verdicts, normal_close, sessions, three_keys};
use crate::support::websocket::{
    AGENT, MULTI_STREAM_INPUT, Received, SCRIBE, STREAM_INPUT, handshake, open_session, within_timeout,
};
use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, THIRD_KEY, start_proxy, start_proxy_with};

#[tokio::test]
async fn a_refused_key_is_replaced_without_an_error_to_the_client() {
    for fault in [
        "invalid",
        "quota",
        "concurrency",
        "payment_issue",
        "early:quota",
        "early:invalid",
        "early:concurrency",
    ] {
        let proxy = start_proxy(three_keys()).await;
        proxy.set_fault(FIRST_KEY, fault);
        proxy.set_fault(SECOND_KEY, fault);
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        let (messages, end) = session.synthesize(&["Hello there. "]).await;
        assert!(has_audio(&messages), "{fault}: the messages must contain audio: {messages:?}");
        assert!(
            messages.iter().all(|message| message.get("error").is_none()),
            "{fault}: the client must receive no error: {messages:?}"
        );
        assert_eq!(end, normal_close(), "{fault}: the session must end normally");
        drop(session);
        assert_eq!(
            proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]),
            [1, 1, 1],
            "{fault}: each key must be tried once"
        );
        let verdicts = into_verdicts(proxy).await;
        assert_eq!(verdicts[2], "served", "the last attempt must be served: {verdicts:?}");
        assert_ne!(verdicts[0], "served", "the first attempt must be refused: {verdicts:?}");
    }
}

#[tokio::test]
async fn a_transcription_starts_with_the_first_working_key() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.set_fault(SECOND_KEY, "quota");
    let mut session = open_session(&proxy, SCRIBE).await;
    // Some client libraries do not wait for the session to start.
    session.send_json(
        &json!({"message_type": "input_audio_chunk", "audio_base_64": "AAAA".repeat(8_000), "commit": true,
        "sample_rate": 16_000}),
    )
    .await;
    assert_eq!(session.receive_json().await["message_type"], "session_started");
    let transcript = session.receive_json().await;
    assert!(
        transcript["message_type"].as_str().unwrap().contains("transcript"),
        "the client must receive a transcript: {transcript}"
    );
    session.send(Message::Close(None)).await;
    let (_, end) = session.receive_to_end().await;
    assert!(
        matches!(end, Received::Close(..) | Received::Disconnected),
        "the session must end after the close frame, not with {end:?}"
    );
    drop(session);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_refusal_of_every_key_is_relayed_unchanged() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.set_fault(SECOND_KEY, "invalid");
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    let (messages, end) = session.synthesize(&["Hello. "]).await;
    assert_eq!(messages, [json!({"message": "Invalid API key", "error": "invalid_api_key", "code": 1008})]);
    assert_eq!(end, Received::Close(1008, "Invalid API key".to_owned()));
    drop(session);
    let verdicts = into_verdicts(proxy).await;
    assert_eq!(verdicts, ["invalid_key", "invalid_key"]);
}

#[tokio::test]
async fn a_handshake_refusal_of_every_key_is_relayed() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    // The endpoint refuses this model for every key.
    let path = format!("{STREAM_INPUT}?model_id=eleven_v3");
    let Err((status, body)) = handshake(&proxy, &path, &[("xi-api-key", CLIENT_TOKEN)]).await else {
        panic!("the handshake must be refused")
    };
    assert_eq!(status, 403, "the handshake must be refused: {body}");
    proxy.set_fault(FIRST_KEY, "early:voice_not_found");
    proxy.set_fault(SECOND_KEY, "early:voice_not_found");
    let Err((status, body)) = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)]).await else {
        panic!("the handshake must be refused")
    };
    assert_eq!(status, 404);
    assert!(body.contains("voice_not_found"), "the refusal must be relayed: {body}");
    proxy.close().await;
}

/// After every account has refused a voice as unknown, only one account is tried until one of them serves
/// the voice.
#[tokio::test]
async fn a_voice_that_no_account_has_is_requested_once_with_every_account() {
    let proxy =
        start_proxy(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000), (THIRD_KEY, 100_000)]))
            .await;
    let synthesize_once = async || {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.synthesize(&["Hello. "]).await
    };
    for (is_refused, expected) in
        [(true, [1, 1, 1]), (true, [2, 1, 1]), (false, [3, 1, 1]), (true, [4, 2, 2])]
    {
        for key in [FIRST_KEY, SECOND_KEY, THIRD_KEY] {
            proxy.set_fault(key, if is_refused { "voice_not_found" } else { "pass" });
        }
        let (messages, _) = synthesize_once().await;
        assert_eq!(has_audio(&messages), !is_refused, "only a known voice must be spoken: {messages:?}");
        assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), expected);
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_refusal_after_the_first_audio_is_forwarded_and_recorded() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "after=1:quota");
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    let (messages, end) =
        session.synthesize(&["Hello there, this is long. ", "And more of it comes now. "]).await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
    assert_eq!(messages.last().unwrap()["error"], "quota_exceeded");
    assert!(matches!(end, Received::Close(1008, _)), "the refusal must be forwarded, not {end:?}");
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 0, 0]);
    assert_eq!(proxy.key_statuses().await, ["exhausted", "active", "active"]);
    drop(session);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn an_exhausted_key_fails_over_during_a_session() {
    // The first key has too few credits for the text, so the text is sent with the second key.
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 5), (SECOND_KEY, 100_000)])).await;
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    let (messages, _) = session.synthesize(&["Hello there, this is long. "]).await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
    let spoken_texts: Vec<String> = sessions(&proxy).into_iter().map(|(_, socket)| socket.spoken).collect();
    assert_eq!(spoken_texts, ["", "Hello there, this is long. "]);
    drop(session);
    proxy.close().await;
}

/// After a refusal with an unknown message, the session is retried with a second account. The refusal is
/// recorded, so the next sessions skip the first account.
#[tokio::test]
async fn an_unexplained_refusal_of_a_session_is_retried_with_another_account() {
    for fault in ["forbidden", "unauthorized", "early:forbidden"] {
        let proxy = start_proxy(three_keys()).await;
        proxy.set_fault(FIRST_KEY, fault);
        for _ in 0..3 {
            let mut session = open_session(&proxy, STREAM_INPUT).await;
            let (messages, end) = session.synthesize(&["Hello there. "]).await;
            assert!(has_audio(&messages), "{fault}: the messages must contain audio: {messages:?}");
            assert_eq!(end, normal_close(), "{fault}: the session must end normally");
        }
        assert_eq!(
            proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]),
            [1, 3, 0],
            "{fault}: the first account must be tried only once, and the second one must serve every session"
        );
    }
}

#[tokio::test]
async fn a_broken_provider_connection_does_not_end_the_session_cleanly() {
    for fault in ["after=1:cut", "after=1:reset"] {
        let proxy = start_proxy(three_keys()).await;
        proxy.set_fault(FIRST_KEY, fault);
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        let (_, end) =
            session.synthesize(&["Hello there, this is long. ", "And more of it comes now. "]).await;
        assert_eq!(end, Received::Disconnected, "{fault}: the connection must end without a close frame");
        drop(session);
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn possibly_spoken_text_is_not_sent_again() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "after=0:cut");
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    session.send_json(&json!({"text": "Hello there. "})).await;
    assert_eq!(session.receive().await, Received::Disconnected);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 0, 0]);
    drop(session);
    let verdicts = into_verdicts(proxy).await;
    assert_eq!(verdicts, ["no_response"]);
}

#[tokio::test]
async fn a_message_that_costs_nothing_is_sent_again_after_a_disconnect() {
    let proxy = start_proxy(three_keys()).await;
    proxy.simulator.queue_faults(FIRST_KEY, vec!["after=0:cut".parse().unwrap()]);
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    // Only the first message, which costs nothing, was sent when the connection broke.
    session.send_json(&json!({"text": " "})).await;
    let sockets = |ledger: &Ledger| ledger.requests.iter().filter(|request| request.socket.is_some()).count();
    within_timeout(proxy.simulator.wait_for_ledger(|ledger| sockets(ledger) == 2)).await;
    session.send_json(&json!({"text": "Hello there. "})).await;
    session.send_json(&json!({"text": ""})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
    assert_eq!(end, normal_close());
    drop(session);
    proxy.close().await;
}

#[tokio::test]
async fn an_agent_session_fails_over_with_its_subprotocol_and_starts_once() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.set_fault(SECOND_KEY, "quota");
    let headers = [("xi-api-key", CLIENT_TOKEN), ("sec-websocket-protocol", "convai")];
    let mut session = handshake(&proxy, AGENT, &headers).await.unwrap();
    assert_eq!(session.headers["sec-websocket-protocol"], "convai");
    // Some clients do not wait for the agent.
    session.send_json(&json!({"type": "conversation_initiation_client_data"})).await;
    session.send_json(&json!({"user_audio_chunk": "AAAA"})).await;
    let is_start = |message: &Value| message["type"] == "conversation_initiation_metadata";
    assert!(is_start(&session.receive_json().await));
    session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
    let mut message = session.receive_json().await;
    while message["type"] != "agent_response" {
        assert!(!is_start(&message), "the conversation must not start twice");
        message = session.receive_json().await;
    }
    session.close().await;
    drop(session);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_refused_context_does_not_end_the_other_contexts() {
    let proxy = start_proxy(three_keys()).await;
    // The error is sent in the middle of the session, without a close frame.
    let error = r#"{"message":"A voice was not found.","error":"voice_not_found","code":1008}"#;
    proxy.set_fault(FIRST_KEY, &format!("after=1:say={error}"));
    let mut session = open_session(&proxy, MULTI_STREAM_INPUT).await;
    let mut messages = Vec::new();
    session.send_json(&json!({"text": " ", "context_id": "a"})).await;
    for text in ["Hello. ", "And more. "] {
        session.send_json(&json!({"text": text, "context_id": "a", "flush": true})).await;
        messages.push(session.receive_json().await);
        while !has_audio(&messages[messages.len() - 1..]) {
            messages.push(session.receive_json().await);
        }
    }
    session.send_json(&json!({"close_socket": true})).await;
    let (_, end) = session.receive_to_end().await;
    assert!(
        messages.iter().any(|message| message["error"] == "voice_not_found"),
        "the refusal of the context must be forwarded: {messages:?}"
    );
    assert_eq!(end, normal_close());
    drop(session);
    let records = proxy.into_records().await;
    assert_eq!((records[0].verdict.as_str(), records[0].credits), ("served", 17));
}

#[tokio::test]
async fn a_workspace_at_its_concurrency_limit_is_not_tried_again() {
    let proxy =
        start_proxy_with(three_keys(), |config| config.pool.concurrency_cooldown = Duration::from_secs(600))
            .await;
    proxy.set_fault(FIRST_KEY, "concurrency");
    proxy.set_fault(SECOND_KEY, "concurrency");
    for _ in 0..3 {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        assert!(has_audio(&session.synthesize(&["Hello. "]).await.0));
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 1, 3]);
    proxy.close().await;
}
