//! Tests the limits of sessions: concurrency slots, client quotas, the idle timeout and the maximum duration, the drain
//! at shutdown, and backpressure. Also tests that a session ends when its client disconnects.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use keychoir::app::DrainOutcome;
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use keychoir::simulator::{KeyPlan, Plan, WorkspacePlan};
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;

use super::{ECHO, has_audio, normal_close, require_token, sessions, three_keys};
use crate::support::websocket::{
    Received, STREAM_INPUT, WebSocketClient, handshake, open_session, within_timeout,
};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, TestProxy, join_all, start_proxy, start_proxy_with, wait_until,
};

/// Returns a plan in which each key has a separate workspace with the concurrency limit `maximum`.
fn plan_with_concurrency(keys: &[&str], maximum: u32) -> Plan {
    keys.iter().fold(Plan::with_keys([]), |plan, key| {
        let workspace = WorkspacePlan { max_concurrent: Some(maximum), ..WorkspacePlan::new(key, 100_000) };
        let key = KeyPlan { workspace: Some((*key).to_owned()), ..KeyPlan::new(key, 100_000) };
        plan.with_workspace(workspace).with_key(key)
    })
}

#[tokio::test]
async fn idle_sessions_hold_no_slot_and_sessions_with_text_wait_for_one() {
    let proxy = start_proxy_with(plan_with_concurrency(&[FIRST_KEY], 1), |config| {
        config.websocket.speech_idle_timeout = Duration::from_millis(20)
    })
    .await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        sessions.push(session);
    }
    // The first refusal reports the concurrency limit. After that, sessions wait and are not refused.
    let results = join_all(sessions.into_iter().map(|mut session| async move {
        session.send_json(&json!({"text": "Hello there. ", "try_trigger_generation": true})).await;
        session.send_json(&json!({"text": ""})).await;
        session.receive_to_end().await
    }))
    .await;
    for (messages, end) in results {
        assert!(has_audio(&messages), "the messages must contain audio: {messages:?} {end:?}");
        assert_eq!(end, normal_close());
    }
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn open_sessions_are_closed_at_the_drain_timeout() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, ECHO).await;
    session.send(Message::text("hello")).await;
    within_timeout(session.stream.next()).await.unwrap().unwrap();
    let TestProxy { simulator, app, .. } = proxy;
    let (drained, end) = tokio::join!(app.drain(Duration::from_millis(100)), session.receive());
    assert_eq!(end, Received::Close(1012, "Keychoir is restarting. Connect again.".to_owned()));
    assert_eq!(drained, DrainOutcome::Aborted);
    let ledger = within_timeout(simulator.wait_for_ledger(|ledger| ledger.totals.sockets_open == 0)).await;
    let socket = ledger.requests.iter().find_map(|request| request.socket.as_ref()).unwrap();
    assert_eq!(socket.close_received.as_ref().map(|close| close.code), Some(1001));
}

#[tokio::test]
async fn a_session_that_waits_at_the_drain_timeout_receives_a_close_frame() {
    let unauthenticated_proxy = start_proxy_with(three_keys(), require_token).await;
    let unauthenticated = handshake(&unauthenticated_proxy, STREAM_INPUT, &[]).await.unwrap();
    // The only slot is in use, and the text waits for it.
    let busy_proxy = start_proxy(plan_with_concurrency(&[FIRST_KEY], 1)).await;
    busy_proxy.set_fault(FIRST_KEY, "slow_body=600000");
    let _open_response = busy_proxy.request_speech(200).await;
    let mut waiting = open_session(&busy_proxy, STREAM_INPUT).await;
    waiting.send_json(&json!({"text": "Hello. ", "flush": true})).await;
    wait_until(|| busy_proxy.app.queued_requests() == 1).await;
    for (proxy, mut session, code) in
        [(unauthenticated_proxy, unauthenticated, 1008), (busy_proxy, waiting, 1012)]
    {
        let (drained, (_, end)) =
            tokio::join!(proxy.app.drain(Duration::from_millis(50)), session.receive_to_end());
        assert!(
            matches!(end, Received::Close(received, _) if received == code),
            "the session must be closed with {code}, not with {end:?}"
        );
        assert_eq!(drained, DrainOutcome::Aborted);
    }
}

#[tokio::test]
async fn a_session_ends_at_its_idle_timeout_and_its_maximum_duration() {
    for (max_duration_ms, verdict) in [(0, "idle"), (150, "max_duration")] {
        let proxy = start_proxy_with(three_keys(), |config| {
            config.websocket.idle_timeout = Duration::from_millis(if max_duration_ms == 0 { 100 } else { 0 });
            config.websocket.max_session_duration = Duration::from_millis(max_duration_ms);
        })
        .await;
        let mut session = open_session(&proxy, ECHO).await;
        assert!(matches!(session.receive().await, Received::Close(1001, _)));
        drop(session);
        let records = proxy.into_records().await;
        assert_eq!(records[0].verdict, verdict);
    }
}

#[tokio::test]
async fn a_quota_of_credits_ends_a_running_session() {
    let quota = ClientQuota { amount: 40, unit: QuotaUnit::Credits, period: Period::Day };
    let proxy = start_proxy_with(three_keys(), |config| {
        require_token(config);
        config.clients[0].rules.quota = Some(quota);
    })
    .await;
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    session.send_json(&json!({"text": " "})).await;
    for text in ["Sixteen so far. ", "This one takes the rest."] {
        session.send_json(&json!({"text": text, "flush": true})).await;
        assert!(has_audio(&[session.receive_json().await]), "the text must be spoken: {text}");
    }
    session.send_json(&json!({"text": "This is too much. ", "flush": true})).await;
    let (messages, end) = session.receive_to_end().await;
    assert_eq!(messages.last().unwrap()["error"], "client_quota_exceeded");
    assert_eq!(end, Received::Close(1008, "This client has used its quota of credits.".to_owned()));
    drop(session);
    let (_, socket) = &sessions(&proxy)[0];
    assert_eq!(socket.spoken, "Sixteen so far. This one takes the rest.");
    let records = proxy.into_records().await;
    assert_eq!((records[0].verdict.as_str(), records[0].credits), ("client_quota_exceeded", 40));
}

#[tokio::test]
async fn the_session_ends_when_the_client_disconnects() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    session.send_json(&json!({"text": " "})).await;
    session.send_json(&json!({"text": "Hello there. ", "flush": true})).await;
    assert!(has_audio(&[session.receive_json().await]));
    drop(session);
    within_timeout(proxy.simulator.wait_for_ledger(|ledger| ledger.totals.sockets_open == 0)).await;
    let records = proxy.into_records().await;
    assert_eq!(records[0].verdict, "client_closed");
}

#[tokio::test]
async fn only_served_sessions_count_towards_the_quota_of_the_client() {
    let quota = ClientQuota { amount: 2, unit: QuotaUnit::Requests, period: Period::Total };
    let proxy = start_proxy_with(three_keys(), |config| {
        require_token(config);
        config.clients[0].rules.quota = Some(quota);
        config.clients[0].rules.max_concurrent = Some(1);
    })
    .await;
    let token = [("xi-api-key", CLIENT_TOKEN)];
    // A session without text does not count.
    open_session(&proxy, STREAM_INPUT).await.close().await;
    let first_session = within_timeout(open_when_admitted(&proxy)).await;
    assert_eq!(
        handshake(&proxy, STREAM_INPUT, &token).await.err().unwrap().0,
        429,
        "only one session may be open"
    );
    drop(first_session);
    for _ in 0..2 {
        let mut session = within_timeout(open_when_admitted(&proxy)).await;
        assert!(has_audio(&session.synthesize(&["Hello. "]).await.0));
    }
    let refusal = loop {
        match handshake(&proxy, STREAM_INPUT, &token).await {
            // The end of the last session may not have been processed yet.
            Err((429, _)) => tokio::task::yield_now().await,
            Err(refusal) => break refusal,
            Ok(_) => panic!("the quota is exhausted, so the handshake must be refused"),
        }
    };
    assert_eq!(refusal.0, 402, "the quota must refuse the session: {}", refusal.1);
    proxy.close().await;
}

/// Opens a session, and retries while the end of the client's previous session is not processed.
async fn open_when_admitted(proxy: &TestProxy) -> WebSocketClient {
    loop {
        match handshake(proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)]).await {
            Ok(session) => return session,
            Err((429, _)) => tokio::task::yield_now().await,
            Err(refusal) => panic!("the handshake must be accepted: {refusal:?}"),
        }
    }
}

#[tokio::test]
async fn backpressure_of_a_client_that_does_not_read_reaches_the_provider() {
    let proxy = start_proxy(three_keys()).await;
    let session = open_session(&proxy, ECHO).await;
    let (mut sink, mut stream) = session.stream.split();
    const MESSAGE_BYTES: usize = 256 * 1024;
    let mut sent_messages = 0_usize;
    // Unread echoes fill the socket buffers, and then the proxy stops reading.
    let flood = async {
        loop {
            sink.send(Message::binary(vec![7; MESSAGE_BYTES])).await.unwrap();
            sent_messages += 1;
        }
    };
    let is_blocked = tokio::time::timeout(Duration::from_secs(2), flood).await.is_err();
    assert!(is_blocked, "the proxy must stop reading from the client");
    let buffered_bytes = sent_messages * MESSAGE_BYTES;
    assert!(
        buffered_bytes < 64 * 1024 * 1024,
        "the proxy must not accept {buffered_bytes} bytes while their echoes are not read"
    );
    // The proxy has lost none of the messages.
    for _ in 0..sent_messages {
        let Some(Ok(Message::Binary(echo))) = within_timeout(stream.next()).await else {
            panic!("every message must be echoed")
        };
        assert_eq!(echo.len(), MESSAGE_BYTES);
    }
    drop((sink, stream));
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn an_idle_speech_session_releases_its_slot() {
    let proxy = start_proxy_with(plan_with_concurrency(&[FIRST_KEY], 1), |config| {
        config.websocket.speech_idle_timeout = Duration::from_millis(20)
    })
    .await;
    let mut sessions = Vec::new();
    // Each session stays open after its speech, with a concurrency limit of one.
    for _ in 0..3 {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "Hello there. ", "flush": true})).await;
        assert!(has_audio(&[session.receive_json().await]));
        sessions.push(session);
    }
    drop(sessions);
    proxy.close().await;
}
