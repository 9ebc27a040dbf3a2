//! Tests the quotas of a client with WebSocket sessions: a quota of credits ends a session beyond it and limits
//! concurrent sessions, a quota of requests does not end a session, and a refused session is refunded.

use super::*;

fn credit_quota(amount: u64) -> Rules {
    let quota = ClientQuota { amount, unit: QuotaUnit::Credits, period: Period::Day };
    Rules { quota: Some(quota), ..Rules::default() }
}

#[tokio::test]
async fn a_quota_of_credits_ends_sessions_beyond_it() {
    // The duration of the session uses up the remaining credits. A minute costs 800 credits with an agent and
    // 65 credits with a transcription.
    for (path, quota, characters) in [(AGENT, 1_000, 900), (SCRIBE, 20, 18)] {
        let proxy = start_proxy_with(two_keys(), |config| {
            configure_client(config, credit_quota(quota));
            config.websocket.quota_check_interval = Duration::from_millis(10);
        })
        .await;
        let mut session = open_session(&proxy, path).await;
        let first = session.receive_json().await;
        assert!(first.get("error").is_none(), "the session must start without an error: {first}");
        // Another request of the same client uses most of the quota.
        assert_eq!(proxy.request_speech(characters).await.status(), 200);
        let (messages, end) = session.receive_to_end().await;
        let last = messages.last().unwrap();
        assert_eq!((&last["error"], &last["code"]), (&json!("client_quota_exceeded"), &json!(1008)));
        assert_close_code(&end, 1008, path);
        drop(session);
        let verdicts = recorded_verdicts(proxy).await;
        assert!(
            verdicts.contains(&"client_quota_exceeded".to_owned()),
            "the session must be recorded with its refusal: {verdicts:?}"
        );
    }
}

#[tokio::test]
async fn a_quota_of_requests_does_not_end_a_session() {
    let quota = ClientQuota { amount: 2, unit: QuotaUnit::Requests, period: Period::Day };
    let proxy = start_proxy_with(two_keys(), |config| {
        configure_client(config, Rules { quota: Some(quota), ..Rules::default() });
        config.websocket.quota_check_interval = Duration::from_millis(1);
    })
    .await;
    let mut session = open_session(&proxy, AGENT).await;
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    assert_eq!(proxy.request_speech(30).await.status(), 402);
    for _ in 0..20 {
        session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
        while session.receive_json().await["type"] != "agent_response" {}
    }
    session.close().await;
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn concurrent_sessions_do_not_use_the_same_credits() {
    let proxy = start_proxy_with(two_keys(), |config| configure_client(config, credit_quota(20))).await;
    // The first session has not received audio when the second session is opened.
    proxy.set_fault(FIRST_KEY, "stall=600000");
    let mut first = open_session(&proxy, STREAM_INPUT).await;
    first.send_json(&json!({"text": "These are twenty. ok"})).await;
    let has_sent_text = |ledger: &keychoir::simulator::Ledger| {
        ledger
            .requests
            .iter()
            .filter_map(|request| request.socket.as_ref())
            .any(|socket| socket.message_bytes > 0)
    };
    within_timeout(proxy.simulator.wait_for_ledger(has_sent_text)).await;
    let refusal = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)]).await;
    assert_eq!(refusal.err().unwrap().0, 402);
    drop(first);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_refused_request_does_not_count_against_a_quota() {
    let proxy = start_proxy_with(two_keys(), |config| configure_client(config, credit_quota(40))).await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.set_fault(SECOND_KEY, "invalid");
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    let (_, end) = session.synthesize(&["This is more than twenty characters. "]).await;
    assert_close_code(&end, 1008, "no key is usable");
    drop(session);
    proxy.simulator.set_fault(FIRST_KEY, None);
    proxy.simulator.set_fault(SECOND_KEY, None);
    // Shortly after the close of a session, its usage record is written, and then its reservation is refunded.
    let refund = async { while proxy.request_speech(5).await.status() == 402 {} };
    tokio::time::timeout(Duration::from_secs(20), refund)
        .await
        .expect("the session must refund its reservation within the timeout");
}

#[tokio::test]
async fn text_in_padded_and_binary_messages_counts_against_the_quota() {
    let message = json!({"text": "x".repeat(40), "pad": " ".repeat(300_000)}).to_string();
    for message in [Message::text(message.clone()), Message::binary(message.clone().into_bytes())] {
        let proxy = start_proxy_with(two_keys(), |config| configure_client(config, credit_quota(40))).await;
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "This is more than twenty characters. ", "flush": true})).await;
        assert!(session.receive_json().await["audio"].is_string());
        session.send(message).await;
        let (messages, end) = session.receive_to_end().await;
        assert_close_code(&end, 1008, "the quota is exceeded");
        assert_eq!(messages.last().unwrap()["error"], "client_quota_exceeded");
        drop(session);
        let records = proxy.into_records().await;
        assert_eq!(records[0].credits, "This is more than twenty characters. ".len() as i64);
    }
}
