//! WebSocket sessions through the whole program, in front of the simulator's WebSockets.

use std::path::Path;
use std::time::Duration;

use keychoir::app::DrainOutcome;
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::{KeyPlan, Ledger, Plan, RequestSummary, SocketSummary, WorkspacePlan};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};

use crate::support::websocket::{
    AGENT, DIALOGUE, MULTI_STREAM_INPUT, Received, SCRIBE, STREAM_INPUT, WebSocketClient, handshake,
    open_session, within_timeout,
};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, VOICE_ID, start_proxy, start_proxy_with,
};

/// A path that the simulator echoes on.
const ECHO: &str = "/v1/something/new";

fn three_keys() -> Plan {
    Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000), (THIRD_KEY, 100_000)])
}

fn has_sound(messages: &[Value]) -> bool {
    messages.iter().any(|message| message["audio"].as_str().is_some_and(|sound| !sound.is_empty()))
}

fn well_closed() -> Received {
    Received::Close(1000, String::new())
}

/// The sessions that the provider received, in their order.
fn sessions(proxy: &TestProxy) -> Vec<(RequestSummary, SocketSummary)> {
    let requests = proxy.simulator.ledger().requests;
    requests
        .into_iter()
        .filter_map(|request| request.socket.clone().map(|socket| (request, socket)))
        .collect()
}

#[tokio::test]
async fn a_text_is_spoken_and_charged_by_its_characters() {
    let proxy = start_proxy(three_keys()).await;
    let path = format!("{STREAM_INPUT}?model_id=eleven_flash_v2_5");
    let mut session = open_session(&proxy, &path).await;
    let (messages, end) = session.synthesize(&["Hello there. ", "How are you? "]).await;
    assert!(has_sound(&messages), "{messages:?}");
    assert_eq!(messages.last().unwrap()["isFinal"], true);
    assert_eq!(end, well_closed());
    drop(session);
    let [(_, socket)] = sessions(&proxy).try_into().unwrap();
    assert_eq!(socket.spoken, "Hello there. How are you? ");
    assert_eq!((socket.extensions, socket.payer.as_deref()), (None, Some(FIRST_KEY)));
    let records = proxy.into_records().await;
    let [record] = records.as_slice() else { panic!("{records:?}") };
    assert_eq!((record.status, record.verdict.as_str()), (Some(101), "served"));
    // 26 characters at half a credit.
    assert_eq!((record.credits, record.credits_from.as_str()), (13, "estimate"));
    assert_eq!(record.route, "/v1/text-to-speech/{id}/stream-input");
}

#[tokio::test]
async fn a_refused_key_is_replaced_unseen() {
    for shape in [
        "invalid",
        "quota",
        "concurrency",
        "payment_issue",
        "early:quota",
        "early:invalid",
        "early:concurrency",
    ] {
        let proxy = start_proxy(three_keys()).await;
        proxy.set_fault(FIRST_KEY, shape);
        proxy.set_fault(SECOND_KEY, shape);
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        let (messages, end) = session.synthesize(&["Hello there. "]).await;
        assert!(has_sound(&messages), "{shape}: {messages:?}");
        assert!(messages.iter().all(|message| message.get("error").is_none()), "{shape}: {messages:?}");
        assert_eq!(end, well_closed(), "{shape}");
        drop(session);
        assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 1, 1], "{shape}");
        let verdicts: Vec<String> =
            proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
        assert_eq!(verdicts[2], "served", "{verdicts:?}");
        assert_ne!(verdicts[0], "served", "{verdicts:?}");
    }
}

#[tokio::test]
async fn a_transcription_begins_with_the_working_key() {
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
    let second = session.receive_json().await;
    assert!(second["message_type"].as_str().unwrap().contains("transcript"), "{second}");
    session.send(Message::Close(None)).await;
    let (_, end) = session.receive_to_end().await;
    assert!(matches!(end, Received::Close(..) | Received::Disconnected), "{end:?}");
    drop(session);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_refusal_that_every_key_gets_is_relayed_unchanged() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.set_fault(SECOND_KEY, "invalid");
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    let (messages, end) = session.synthesize(&["Hello. "]).await;
    assert_eq!(messages, [json!({"message": "Invalid API key", "error": "invalid_api_key", "code": 1008})]);
    assert_eq!(end, Received::Close(1008, "Invalid API key".to_owned()));
    drop(session);
    let verdicts: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
    assert_eq!(verdicts, ["invalid_key", "invalid_key"]);
}

#[tokio::test]
async fn a_handshake_that_every_key_is_refused_is_relayed() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    // This model is not available on this WebSocket, whatever the key.
    let path = format!("{STREAM_INPUT}?model_id=eleven_v3");
    let Err((status, body)) = handshake(&proxy, &path, &[("xi-api-key", CLIENT_TOKEN)]).await else {
        panic!("it was opened")
    };
    assert_eq!(status, 403, "{body}");
    proxy.set_fault(FIRST_KEY, "early:voice_not_found");
    proxy.set_fault(SECOND_KEY, "early:voice_not_found");
    let Err((status, body)) = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)]).await else {
        panic!("it was opened")
    };
    assert_eq!(status, 404);
    assert!(body.contains("voice_not_found"), "{body}");
    proxy.close().await;
}

/// A12, on WebSockets: for a voice that no account has, only one account is tried for a while.
#[tokio::test]
async fn a_voice_that_no_account_has_is_searched_once_on_sockets() {
    let proxy =
        start_proxy(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000), (THIRD_KEY, 100_000)])).await;
    let speak = async || {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.synthesize(&["Hello. "]).await
    };
    for (refused, expected) in [(true, [1, 1, 1]), (true, [2, 1, 1]), (false, [3, 1, 1]), (true, [4, 2, 2])] {
        for key in [FIRST_KEY, SECOND_KEY, THIRD_KEY] {
            proxy.set_fault(key, if refused { "voice_not_found" } else { "pass" });
        }
        let (messages, _) = speak().await;
        assert_eq!(has_sound(&messages), !refused, "{messages:?}");
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
    assert!(has_sound(&messages), "{messages:?}");
    assert_eq!(messages.last().unwrap()["error"], "quota_exceeded");
    assert!(matches!(end, Received::Close(1008, _)), "{end:?}");
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 0, 0]);
    assert_eq!(proxy.key_statuses().await, ["exhausted", "active", "active"]);
    drop(session);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn an_exhausted_key_fails_over_during_a_session() {
    // The first key cannot pay for the text, so it is not tried.
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 5), (SECOND_KEY, 100_000)])).await;
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    let (messages, _) = session.synthesize(&["Hello there, this is long. "]).await;
    assert!(has_sound(&messages), "{messages:?}");
    let paid: Vec<String> = sessions(&proxy).into_iter().map(|(_, socket)| socket.spoken).collect();
    assert_eq!(paid, ["", "Hello there, this is long. "]);
    drop(session);
    proxy.close().await;
}

#[tokio::test]
async fn every_context_may_bring_a_credential_and_none_arrives() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, MULTI_STREAM_INPUT).await;
    for context in ["a", "b"] {
        let opening = format!(
            r#"{{ "\u0078i_api_key" : "{CLIENT_TOKEN}", "text":" ","context_id":"{context}","authorization":"{CLIENT_TOKEN}"}}"#
        );
        // In frames that split the credential's name and value.
        let bytes = opening.as_bytes();
        let data = |at: usize| if at == 0 { OpCode::Data(Data::Text) } else { OpCode::Data(Data::Continue) };
        let pieces: Vec<&[u8]> = bytes.chunks(7).collect();
        for (at, piece) in pieces.iter().enumerate() {
            let frame = Frame::message(piece.to_vec(), data(at), at + 1 == pieces.len());
            session.send(Message::Frame(frame)).await;
        }
        session
            .send_json(
                &json!({"text": "Hello. ", "context_id": context, "xi-api-key": CLIENT_TOKEN, "flush": true}),
            )
            .await;
    }
    for _ in 0..2 {
        let message = session.receive_json().await;
        assert!(message["contextId"].is_string(), "{message}");
    }
    session.send_json(&json!({"close_socket": true})).await;
    let (_, end) = session.receive_to_end().await;
    assert_eq!(end, well_closed());
    drop(session);
    let (ledger, _folder) = proxy.close().await;
    let session = ledger.requests.iter().find_map(|request| request.socket.as_ref()).unwrap();
    assert_eq!(session.messages.len(), 5);
    assert_eq!(
        serde_json::from_str::<Value>(&session.messages[0]).unwrap(),
        json!({"text": " ", "context_id": "a"})
    );
}

#[tokio::test]
async fn messages_of_an_unknown_protocol_are_forwarded_unchanged() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, ECHO).await;
    let large = "x".repeat(3_000_000);
    for text in ["plain", "[1]", r#"{ "a" : "\u0041" }"#, &large] {
        session.send(Message::text(text)).await;
        let heard =
            within_timeout(futures_util::StreamExt::next(&mut session.stream)).await.unwrap().unwrap();
        assert_eq!(heard.into_text().unwrap(), text);
    }
    let bytes: Vec<u8> = (0..100_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    session.send(Message::binary(bytes.clone())).await;
    assert_eq!(session.receive().await, Received::Binary(bytes));
    let close = CloseFrame { code: CloseCode::from(4321), reason: "own words".into() };
    session.send(Message::Close(Some(close))).await;
    assert_eq!(session.receive().await, Received::Close(4321, "own words".to_owned()));
    drop(session);
    proxy.close().await;
}

#[tokio::test]
async fn a_large_object_keeps_all_but_its_credential() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, ECHO).await;
    let text = format!(r#"{{"sound":"{}","xi_api_key":"{CLIENT_TOKEN}","end":1}}"#, "A".repeat(2_000_000));
    session.send(Message::text(text)).await;
    let echoed = session.receive_json().await;
    assert_eq!(echoed["sound"].as_str().unwrap().len(), 2_000_000);
    assert_eq!((&echoed["end"], echoed.get("xi_api_key")), (&json!(1), None));
    drop(session);
    proxy.close().await;
}

#[tokio::test]
async fn an_echoed_key_is_redacted() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, ECHO).await;
    session.send(Message::text(format!("it is {FIRST_KEY}!"))).await;
    let Some(Ok(Message::Text(echoed))) =
        within_timeout(futures_util::StreamExt::next(&mut session.stream)).await
    else {
        panic!("no echo")
    };
    assert_eq!(echoed.len(), FIRST_KEY.len() + 7);
    assert!(echoed.starts_with("it is sk_key_numb...") && echoed.ends_with("00001!"), "{echoed}");
    drop(session);
    proxy.close().await;
}

#[tokio::test]
async fn origin_and_subprotocols_are_forwarded_without_a_token() {
    let proxy =
        start_proxy_with(three_keys(), |config| config.access.origins = vec!["https://app.example".into()])
            .await;
    let bearer = format!("bearer.{CLIENT_TOKEN}");
    let headers = [
        ("sec-websocket-protocol", "convai"),
        ("sec-websocket-protocol", &*bearer),
        ("origin", "https://app.example"),
    ];
    let session = handshake(&proxy, "/v1/convai/conversation?agent_id=a", &headers).await.unwrap();
    assert_eq!(session.headers["sec-websocket-protocol"], "convai");
    let [(_, socket)] = sessions(&proxy).try_into().unwrap();
    assert_eq!(socket.protocols, ["convai"]);
    assert_eq!(socket.origin.as_deref(), Some("https://app.example"));
    let foreign_origin = handshake(&proxy, ECHO, &[("origin", "https://evil.example")]).await;
    assert_eq!(foreign_origin.err().unwrap().0, 403);
    drop(session);
    proxy.close().await;
}

/// The client of the tests, with a required token.
fn with_token(config: &mut Config) {
    config.clients = vec![ClientConfig {
        name: "app".to_owned(),
        token: TokenFingerprint::new(CLIENT_TOKEN),
        rules: Rules::default(),
    }];
}

#[tokio::test]
async fn a_token_may_be_presented_in_any_position_of_a_handshake() {
    let proxy = start_proxy_with(three_keys(), with_token).await;
    let in_query = format!("{STREAM_INPUT}?xi_api_key={CLIENT_TOKEN}");
    for (path, headers) in [
        (STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)] as &[(&str, &str)]),
        (&in_query, &[]),
        // The token in its first message only.
        (STREAM_INPUT, &[]),
    ] {
        let mut session = handshake(&proxy, path, headers).await.expect("an open socket");
        let (messages, end) = session.synthesize(&["Hello. "]).await;
        assert!(has_sound(&messages), "{messages:?}");
        assert_eq!(end, well_closed());
    }
    let clients: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.client).collect();
    assert_eq!(clients, ["app"; 3]);
}

#[tokio::test]
async fn a_client_without_a_valid_token_gets_no_session() {
    let proxy = start_proxy_with(three_keys(), |config| {
        with_token(config);
        config.websocket.auth_message_timeout = Duration::from_millis(50);
    })
    .await;
    let wrong = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", "wrong")]).await;
    assert_eq!(wrong.err().unwrap().0, 401);
    // If no message can carry the token, it is required in the handshake.
    assert_eq!(handshake(&proxy, SCRIBE, &[]).await.err().unwrap().0, 401);
    for first in [Some(json!({"text": " ", "xi_api_key": "wrong"})), Some(json!({"text": "hello "})), None] {
        let mut session = handshake(&proxy, STREAM_INPUT, &[]).await.unwrap();
        if let Some(first) = first {
            session.send_json(&first).await;
        }
        let (messages, end) = session.receive_to_end().await;
        let [message] = messages.as_slice() else { panic!("{messages:?}") };
        assert!(message["error"].as_str().unwrap().starts_with("client_token_"), "{message}");
        assert!(matches!(end, Received::Close(1008, _)), "{end:?}");
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [0, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn an_own_key_is_sent_unchanged_and_not_read_from_messages() {
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)]), |config| {
        config.access.bring_your_own_key = true;
        config.keys.truncate(1);
    })
    .await;
    let mut session = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", SECOND_KEY)]).await.unwrap();
    session.send_json(&json!({"text": " ", "xi_api_key": SECOND_KEY})).await;
    session.send_json(&json!({"text": "Hello. "})).await;
    session.send_json(&json!({"text": ""})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_sound(&messages));
    assert_eq!(end, well_closed());
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 1]);
    drop(session);
    proxy.close_unchecked().await;
}

/// Keys of workspaces with this concurrency limit.
fn narrow(keys: &[&str], maximum: u32) -> Plan {
    keys.iter().fold(Plan::of([]), |plan, key| {
        let workspace = WorkspacePlan { concurrency_max: Some(maximum), ..WorkspacePlan::new(key, 100_000) };
        let key = KeyPlan { workspace: Some((*key).to_owned()), ..KeyPlan::new(key, 100_000) };
        plan.with_workspace(workspace).with_key(key)
    })
}

#[tokio::test]
async fn idle_sessions_take_no_slot_and_speaking_ones_wait_for_one() {
    let proxy = start_proxy_with(narrow(&[FIRST_KEY], 1), |config| {
        config.websocket.speech_idle_timeout = Duration::from_millis(20)
    })
    .await;
    let mut sessions = Vec::new();
    for _ in 0..4 {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        sessions.push(session);
    }
    // The concurrency limit is learned from a refusal; after that, no session is refused.
    let spoken = crate::support::join_all(sessions.into_iter().map(|mut session| async move {
        session.send_json(&json!({"text": "Hello there. ", "try_trigger_generation": true})).await;
        session.send_json(&json!({"text": ""})).await;
        session.receive_to_end().await
    }))
    .await;
    for (messages, end) in spoken {
        assert!(has_sound(&messages), "{messages:?} {end:?}");
        assert_eq!(end, well_closed());
    }
    proxy.close_unchecked().await;
}

/// A denial in unknown words: the session is tried with a second account, and the refusal of the
/// first is recorded for the next sessions.
#[tokio::test]
async fn an_unexplained_refusal_of_a_session_is_retried_with_another_account() {
    for shape in ["forbidden", "unauthorized", "early:forbidden"] {
        let proxy = start_proxy(three_keys()).await;
        proxy.set_fault(FIRST_KEY, shape);
        for _ in 0..3 {
            let mut session = open_session(&proxy, STREAM_INPUT).await;
            let (messages, end) = session.synthesize(&["Hello there. "]).await;
            assert!(has_sound(&messages), "{shape}: {messages:?}");
            assert_eq!(end, well_closed(), "{shape}");
        }
        assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 3, 0], "{shape}");
    }
}

#[tokio::test]
async fn a_token_of_the_provider_is_used_with_the_account_that_issued_it() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    // Another key serves, though the first one is not at fault.
    proxy.set_fault(FIRST_KEY, "forbidden");
    let minted = proxy.post("/v1/single-use-token/tts_websocket", &json!({})).await;
    let token: Value = minted.json().await.unwrap();
    let token = token["token"].as_str().unwrap().to_owned();
    proxy.simulator.always(FIRST_KEY, None);
    for path in [format!("{STREAM_INPUT}?single_use_token={token}")] {
        let mut session = open_session(&proxy, &path).await;
        let (messages, end) = session.synthesize(&["Hello. "]).await;
        assert!(has_sound(&messages), "{messages:?} {end:?}");
        let (request, socket) = sessions(&proxy).pop().unwrap();
        assert!(request.path_and_query.contains("single_use_token="));
        assert_eq!((request.key.as_deref(), socket.payer.as_deref()), (Some(SECOND_KEY), Some(SECOND_KEY)));
    }
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn the_program_ends_sessions_when_the_grace_is_over() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, ECHO).await;
    session.send(Message::text("hello")).await;
    within_timeout(futures_util::StreamExt::next(&mut session.stream)).await.unwrap().unwrap();
    let TestProxy { simulator, app, .. } = proxy;
    let (drained, end) = tokio::join!(app.drain(Duration::from_millis(100)), session.receive());
    assert_eq!(end, Received::Close(1012, "Keychoir restarts. Connect again.".to_owned()));
    assert_eq!(drained, DrainOutcome::Aborted);
    let ended = |socket: &SocketSummary| socket.close_received.as_ref().map(|close| close.code);
    let ledger = within_timeout(simulator.until(|ledger| ledger.totals.sockets_open == 0)).await;
    let session = ledger.requests.iter().find_map(|request| request.socket.as_ref()).unwrap();
    assert_eq!(ended(session), Some(1001));
}

#[tokio::test]
async fn a_session_that_waits_at_the_drain_timeout_gets_a_close_frame() {
    let unknown = start_proxy_with(three_keys(), with_token).await;
    let silent = handshake(&unknown, STREAM_INPUT, &[]).await.unwrap();
    // The only slot is taken, and the text waits for it.
    let busy = start_proxy(narrow(&[FIRST_KEY], 1)).await;
    busy.set_fault(FIRST_KEY, "slow_body=600000");
    let _held = busy.request_speech(200).await;
    let mut waiting = open_session(&busy, STREAM_INPUT).await;
    waiting.send_json(&json!({"text": "Hello. ", "flush": true})).await;
    crate::support::wait_until(|| busy.app.waiting() == 1).await;
    for (proxy, mut session, code) in [(unknown, silent, 1008), (busy, waiting, 1012)] {
        let (drained, (_, end)) =
            tokio::join!(proxy.app.drain(Duration::from_millis(50)), session.receive_to_end());
        assert!(matches!(end, Received::Close(said, _) if said == code), "{end:?}");
        assert_eq!(drained, DrainOutcome::Aborted);
    }
}

#[tokio::test]
async fn an_idle_session_ends() {
    for (lifetime, word) in [(0, "idle"), (150, "max_duration")] {
        let proxy = start_proxy_with(three_keys(), |config| {
            config.websocket.idle_timeout = Duration::from_millis(if lifetime == 0 { 100 } else { 0 });
            config.websocket.max_session_duration = Duration::from_millis(lifetime);
        })
        .await;
        let mut session = open_session(&proxy, ECHO).await;
        assert!(matches!(session.receive().await, Received::Close(1001, _)));
        drop(session);
        let records = proxy.into_records().await;
        assert_eq!(records[0].verdict, word);
    }
}

#[tokio::test]
async fn a_quota_of_credits_ends_a_running_session() {
    let quota = ClientQuota { amount: 40, unit: QuotaUnit::Credits, period: Period::Day };
    let proxy = start_proxy_with(three_keys(), |config| {
        with_token(config);
        config.clients[0].rules.quota = Some(quota);
    })
    .await;
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    session.send_json(&json!({"text": " "})).await;
    for text in ["Sixteen so far. ", "This one takes the rest."] {
        session.send_json(&json!({"text": text, "flush": true})).await;
        assert!(has_sound(&[session.receive_json().await]), "{text}");
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
async fn a_client_that_leaves_takes_the_session_with_it() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    session.send_json(&json!({"text": " "})).await;
    session.send_json(&json!({"text": "Hello there. ", "flush": true})).await;
    assert!(has_sound(&[session.receive_json().await]));
    drop(session);
    within_timeout(proxy.simulator.until(|ledger| ledger.totals.sockets_open == 0)).await;
    let records = proxy.into_records().await;
    assert_eq!(records[0].verdict, "client_closed");
}

#[tokio::test]
async fn a_broken_provider_connection_is_no_clean_end() {
    for fault in ["after=1:cut", "after=1:reset"] {
        let proxy = start_proxy(three_keys()).await;
        proxy.set_fault(FIRST_KEY, fault);
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        let (_, end) =
            session.synthesize(&["Hello there, this is long. ", "And more of it comes now. "]).await;
        assert_eq!(end, Received::Disconnected, "{fault}");
        drop(session);
        let folder = proxy.close_unchecked().await;
        drop(folder);
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
    let verdicts: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
    assert_eq!(verdicts, ["no_response"]);
}

#[tokio::test]
async fn a_free_message_is_sent_once_more() {
    let proxy = start_proxy(three_keys()).await;
    proxy.simulator.script(FIRST_KEY, vec!["after=0:cut".parse().unwrap()]);
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    // Only the opening message was sent when the connection broke.
    session.send_json(&json!({"text": " "})).await;
    let sockets = |ledger: &Ledger| ledger.requests.iter().filter(|request| request.socket.is_some()).count();
    within_timeout(proxy.simulator.until(|ledger| sockets(ledger) == 2)).await;
    session.send_json(&json!({"text": "Hello there. "})).await;
    session.send_json(&json!({"text": ""})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_sound(&messages), "{messages:?}");
    assert_eq!(end, well_closed());
    drop(session);
    proxy.close().await;
}

#[tokio::test]
async fn dialogue_is_charged_by_its_lines() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, &format!("{DIALOGUE}?model_id=eleven_v3")).await;
    session.send_json(&json!({"voices": [VOICE_ID], "xi_api_key": CLIENT_TOKEN})).await;
    session
        .send_json(&json!({"inputs": [{"text": "Hello.", "voice_id": VOICE_ID}, {"text": "Yes?", "voice_id": VOICE_ID}]}))
        .await;
    session.send_json(&json!({"close_socket": true})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_sound(&messages), "{messages:?}");
    assert_eq!(end, well_closed());
    drop(session);
    let records = proxy.into_records().await;
    assert_eq!((records[0].credits, records[0].credits_from.as_str()), (10, "estimate"));
}

/// One number of the usage records.
fn figure(books: &Path, sql: &str) -> i64 {
    rusqlite::Connection::open(books).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn a_transcription_is_recorded_by_its_seconds() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, SCRIBE).await;
    assert_eq!(session.receive_json().await["message_type"], "session_started");
    // One and a half seconds of 16-bit samples.
    let sound = "AAAA".repeat(16_000);
    session.send_json(&json!({"message_type": "input_audio_chunk", "audio_base_64": sound, "commit": true, "sample_rate": 16_000}))
        .await;
    let heard = session.receive_json().await;
    assert!(heard["message_type"].as_str().unwrap().contains("transcript"), "{heard}");
    session.close().await;
    drop(session);
    let metrics = proxy.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("keychoir_websocket_sessions_total{protocol=\"transcription\"} 1"), "{metrics}");
    let folder = proxy.close_unchecked().await;
    let books = folder.path().join("keychoir.db");
    assert_eq!(figure(&books, "SELECT audio_ms FROM attempts WHERE status = 101"), 1_500);
}

#[tokio::test]
async fn the_cost_of_a_conversation_is_polled_afterwards() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "quota");
    let mut session = open_session(&proxy, AGENT).await;
    session.send_json(&json!({"type": "conversation_initiation_client_data"})).await;
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
    proxy.simulator.always(FIRST_KEY, None);
    session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
    while session.receive_json().await["type"] != "agent_response" {}
    session.close().await;
    drop(session);
    // The cost is requested with the key of the session: other accounts do not have the
    // conversation.
    let is_asked = |request: &RequestSummary| {
        request.path_and_query.starts_with("/v1/convai/conversations/") && request.status == Some(200)
    };
    let ledger = within_timeout(proxy.simulator.until(|ledger| ledger.requests.iter().any(is_asked))).await;
    let asked = ledger.requests.iter().find(|request| is_asked(request)).unwrap();
    assert_eq!(asked.key.as_deref(), Some(SECOND_KEY));
    let charged = ledger.keys.iter().find(|key| key.key == SECOND_KEY).unwrap().charged;
    assert!(charged > 0);
    let metric = format!("keychoir_credits_total {charged}\n");
    while !proxy.get("/metrics").await.text().await.unwrap().contains(&metric) {
        tokio::task::yield_now().await;
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_conversation_belongs_to_the_account_that_served_it() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "quota");
    let mut session = open_session(&proxy, AGENT).await;
    let first = session.receive_json().await;
    let id = first["conversation_initiation_metadata_event"]["conversation_id"].as_str().unwrap().to_owned();
    session.close().await;
    drop(session);
    proxy.simulator.always(FIRST_KEY, None);
    let told = proxy.get(&format!("/v1/convai/conversations/{id}")).await;
    assert_eq!(told.status(), 200);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn an_agent_session_fails_over_with_its_subprotocol_and_begins_once() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.set_fault(SECOND_KEY, "quota");
    let headers = [("xi-api-key", CLIENT_TOKEN), ("sec-websocket-protocol", "convai")];
    let mut session = handshake(&proxy, AGENT, &headers).await.unwrap();
    assert_eq!(session.headers["sec-websocket-protocol"], "convai");
    // Some clients do not wait for the agent.
    session.send_json(&json!({"type": "conversation_initiation_client_data"})).await;
    session.send_json(&json!({"user_audio_chunk": "AAAA"})).await;
    let begins = |message: &Value| message["type"] == "conversation_initiation_metadata";
    assert!(begins(&session.receive_json().await));
    session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
    let mut heard = session.receive_json().await;
    while heard["type"] != "agent_response" {
        assert!(!begins(&heard));
        heard = session.receive_json().await;
    }
    session.close().await;
    drop(session);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_signed_url_names_the_proxy_where_it_is_configured() {
    for base in [None, Some("wss://localhost:11011")] {
        let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)]), |config| {
            config.websocket.signed_url_base = base.unwrap_or_default().parse().unwrap();
        })
        .await;
        // Another key serves, though the first one is not at fault.
        proxy.set_fault(FIRST_KEY, "forbidden");
        let answer = proxy.get("/v1/convai/conversation/get-signed-url?agent_id=agent_public").await;
        let answer: Value = answer.json().await.unwrap();
        let url = answer["signed_url"].as_str().unwrap();
        assert_eq!(url.starts_with("wss://localhost:11011/v1/convai/conversation?"), base.is_some(), "{url}");
        proxy.simulator.always(FIRST_KEY, None);
        // A session with the signed URL goes to the account that has signed it.
        let path = &url[url.find("/v1/").unwrap()..];
        let mut session = handshake(&proxy, path, &[]).await.unwrap();
        assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
        let (request, _) = sessions(&proxy).pop().unwrap();
        assert_eq!(request.key.as_deref(), Some(SECOND_KEY));
        drop(session);
        proxy.close_unchecked().await;
    }
}

#[tokio::test]
async fn a_resource_in_the_first_message_binds_the_session() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])).await;
    // Another key serves, though the first one is not at fault.
    proxy.set_fault(FIRST_KEY, "forbidden");
    let minted = proxy.post("/v1/single-use-token/tts_websocket", &json!({})).await;
    let token: Value = minted.json().await.unwrap();
    proxy.simulator.always(FIRST_KEY, None);
    let mut session = open_session(&proxy, &format!("{DIALOGUE}?model_id=eleven_v3")).await;
    session.send_json(&json!({"voices": [VOICE_ID], "single_use_token": token["token"]})).await;
    session.send_json(&json!({"inputs": [{"text": "Hello.", "voice_id": VOICE_ID}]})).await;
    session.send_json(&json!({"close_socket": true})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_sound(&messages), "{messages:?}");
    assert_eq!(end, well_closed());
    drop(session);
    let keys: Vec<_> =
        sessions(&proxy).into_iter().map(|(request, socket)| (request.key, socket.messages.len())).collect();
    assert_eq!(keys, [(Some(FIRST_KEY.to_owned()), 0), (Some(SECOND_KEY.to_owned()), 3)]);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_session_counts_for_its_client_when_it_was_served() {
    let quota = ClientQuota { amount: 2, unit: QuotaUnit::Requests, period: Period::Total };
    let proxy = start_proxy_with(three_keys(), |config| {
        with_token(config);
        config.clients[0].rules.quota = Some(quota);
        config.clients[0].rules.max_concurrent = Some(1);
    })
    .await;
    let token = [("xi-api-key", CLIENT_TOKEN)];
    // A session without text counts as no request.
    open_session(&proxy, STREAM_INPUT).await.close().await;
    let open = within_timeout(knock_when_free(&proxy)).await;
    assert_eq!(handshake(&proxy, STREAM_INPUT, &token).await.err().unwrap().0, 429, "one at a time");
    drop(open);
    for _ in 0..2 {
        let mut session = within_timeout(knock_when_free(&proxy)).await;
        assert!(has_sound(&session.synthesize(&["Hello. "]).await.0));
    }
    let refused = loop {
        match handshake(&proxy, STREAM_INPUT, &token).await {
            // The end of the last session may not have been processed yet.
            Err((429, _)) => tokio::task::yield_now().await,
            Err(refused) => break refused,
            Ok(_) => panic!("the allowance is used"),
        }
    };
    assert_eq!(refused.0, 402, "{}", refused.1);
    proxy.close().await;
}

/// A WebSocket for a client with a limit of one, once the end of the previous one was processed.
async fn knock_when_free(proxy: &TestProxy) -> WebSocketClient {
    loop {
        match handshake(proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)]).await {
            Ok(session) => return session,
            Err((429, _)) => tokio::task::yield_now().await,
            Err(refused) => panic!("{refused:?}"),
        }
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_stops_the_provider() {
    let proxy = start_proxy(three_keys()).await;
    let session = open_session(&proxy, ECHO).await;
    let (mut sink, mut stream) = futures_util::StreamExt::split(session.stream);
    const PIECE: usize = 256 * 1024;
    let mut sent = 0_usize;
    // Unread echoes fill the buffers of the system, and then the flow stops.
    let flood = async {
        loop {
            futures_util::SinkExt::send(&mut sink, Message::binary(vec![7; PIECE])).await.unwrap();
            sent += 1;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(2), flood).await.is_err());
    let held = sent * PIECE;
    assert!(held < 64 * 1024 * 1024, "{held} bytes were taken and not read");
    // No message is lost.
    for _ in 0..sent {
        let Some(Ok(Message::Binary(echo))) =
            within_timeout(futures_util::StreamExt::next(&mut stream)).await
        else {
            panic!("an echo is missing")
        };
        assert_eq!(echo.len(), PIECE);
    }
    drop((sink, stream));
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn another_protocol_is_not_spoken_and_the_request_is_served() {
    let proxy = start_proxy(three_keys()).await;
    let request = proxy.client.get(format!("{}/v1/voices", proxy.url)).header("xi-api-key", CLIENT_TOKEN);
    let answer = request.header("connection", "upgrade").header("upgrade", "h2c").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn one_context_that_is_refused_does_not_end_the_others() {
    let proxy = start_proxy(three_keys()).await;
    // In the middle of the session, and without a close.
    let error = r#"{"message":"A voice was not found.","error":"voice_not_found","code":1008}"#;
    proxy.set_fault(FIRST_KEY, &format!("after=1:say={error}"));
    let mut session = open_session(&proxy, MULTI_STREAM_INPUT).await;
    let mut heard = Vec::new();
    session.send_json(&json!({"text": " ", "context_id": "a"})).await;
    for text in ["Hello. ", "And more. "] {
        session.send_json(&json!({"text": text, "context_id": "a", "flush": true})).await;
        heard.push(session.receive_json().await);
        while !has_sound(&heard[heard.len() - 1..]) {
            heard.push(session.receive_json().await);
        }
    }
    session.send_json(&json!({"close_socket": true})).await;
    let (_, end) = session.receive_to_end().await;
    assert!(heard.iter().any(|message| message["error"] == "voice_not_found"), "{heard:?}");
    assert_eq!(end, well_closed());
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
        assert!(has_sound(&session.synthesize(&["Hello. "]).await.0));
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [1, 1, 3]);
    proxy.close().await;
}

#[tokio::test]
async fn an_idle_speech_session_releases_its_slot() {
    let proxy = start_proxy_with(narrow(&[FIRST_KEY], 1), |config| {
        config.websocket.speech_idle_timeout = Duration::from_millis(20)
    })
    .await;
    let mut sessions = Vec::new();
    // Each stays open after it has spoken, with a concurrency limit of one.
    for _ in 0..3 {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "Hello there. ", "flush": true})).await;
        assert!(has_sound(&[session.receive_json().await]));
        sessions.push(session);
    }
    drop(sessions);
    proxy.close().await;
}
