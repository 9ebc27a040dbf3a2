//! Tests WebSocket sessions between a client, the whole proxy and the simulator: authentication, forwarded messages and
//! headers, the removal of credentials and keys from messages, and charges. The submodules test affinity, failover and
//! limits.

mod affinity;
mod failover;
mod limits;

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;
use keychoir::config::{ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::{Plan, RequestSummary, SocketSummary};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};

use crate::support::websocket::{
    AGENT, DIALOGUE, MULTI_STREAM_INPUT, Received, SCRIBE, STREAM_INPUT, handshake, open_session,
    within_timeout,
};
use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, VOICE_ID, start_proxy, start_proxy_with,
};

/// A path on which the simulator echoes every message.
const ECHO: &str = "/v1/something/new";

fn three_keys() -> Plan {
    Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000), (THIRD_KEY, 100_000)])
}

/// Returns whether any of the messages contains audio.
fn has_audio(messages: &[Value]) -> bool {
    messages.iter().any(|message| message["audio"].as_str().is_some_and(|audio| !audio.is_empty()))
}

fn normal_close() -> Received {
    Received::Close(1000, String::new())
}

/// Returns the WebSocket sessions that the provider received, each with its handshake request, in order.
fn sessions(proxy: &TestProxy) -> Vec<(RequestSummary, SocketSummary)> {
    let requests = proxy.simulator.ledger().requests;
    requests
        .into_iter()
        .filter_map(|request| request.socket.clone().map(|socket| (request, socket)))
        .collect()
}

/// Stops the proxy and returns the verdicts of its attempts.
async fn into_verdicts(proxy: TestProxy) -> Vec<String> {
    proxy.into_records().await.into_iter().map(|record| record.verdict).collect()
}

#[tokio::test]
async fn a_session_is_charged_by_the_characters_of_its_text() {
    let proxy = start_proxy(three_keys()).await;
    let path = format!("{STREAM_INPUT}?model_id=eleven_flash_v2_5");
    let mut session = open_session(&proxy, &path).await;
    let (messages, end) = session.synthesize(&["Hello there. ", "How are you? "]).await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
    assert_eq!(messages.last().unwrap()["isFinal"], true);
    assert_eq!(end, normal_close());
    drop(session);
    let [(_, socket)] = sessions(&proxy).try_into().unwrap();
    assert_eq!(socket.spoken, "Hello there. How are you? ");
    assert_eq!((socket.extensions, socket.payer.as_deref()), (None, Some(FIRST_KEY)));
    let records = proxy.into_records().await;
    let [record] = records.as_slice() else { panic!("the session must have one record: {records:?}") };
    assert_eq!((record.status, record.verdict.as_str()), (Some(101), "served"));
    // The text has 26 characters, each of which costs half a credit.
    assert_eq!((record.credits, record.credits_from.as_str()), (13, "estimate"));
    assert_eq!(record.route, "/v1/text-to-speech/{id}/stream-input");
}

#[tokio::test]
async fn credentials_of_every_context_are_removed() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, MULTI_STREAM_INPUT).await;
    for context in ["a", "b"] {
        let first_message = format!(
            r#"{{ "\u0078i_api_key" : "{CLIENT_TOKEN}", "text":" ","context_id":"{context}","authorization":"{CLIENT_TOKEN}"}}"#
        );
        // The frames split the credential's name and value.
        let bytes = first_message.as_bytes();
        let opcode = |index: usize| OpCode::Data(if index == 0 { Data::Text } else { Data::Continue });
        let fragments: Vec<&[u8]> = bytes.chunks(7).collect();
        for (index, fragment) in fragments.iter().enumerate() {
            let frame = Frame::message(fragment.to_vec(), opcode(index), index + 1 == fragments.len());
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
        assert!(message["contextId"].is_string(), "the message must name its context: {message}");
    }
    session.send_json(&json!({"close_socket": true})).await;
    let (_, end) = session.receive_to_end().await;
    assert_eq!(end, normal_close());
    drop(session);
    let (ledger, _directory) = proxy.close().await;
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
        let echo = within_timeout(session.stream.next()).await.unwrap().unwrap();
        assert_eq!(echo.into_text().unwrap(), text);
    }
    let bytes: Vec<u8> = (0..100_000_u32).map(|index| index.to_le_bytes()[0]).collect();
    session.send(Message::binary(bytes.clone())).await;
    assert_eq!(session.receive().await, Received::Binary(bytes));
    let close = CloseFrame { code: CloseCode::from(4321), reason: "a client's reason".into() };
    session.send(Message::Close(Some(close))).await;
    assert_eq!(session.receive().await, Received::Close(4321, "a client's reason".to_owned()));
    drop(session);
    proxy.close().await;
}

#[tokio::test]
async fn only_the_credential_of_a_large_message_is_removed() {
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
    let Some(Ok(Message::Text(echoed))) = within_timeout(session.stream.next()).await else {
        panic!("the simulator must send an echo")
    };
    assert_eq!(echoed.len(), FIRST_KEY.len() + 7);
    assert!(
        echoed.starts_with("it is sk_key_numb...") && echoed.ends_with("00001!"),
        "the key must be redacted: {echoed}"
    );
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

/// Configures the client `app`, so that requests need the token of the test clients.
fn require_token(config: &mut Config) {
    config.clients =
        vec![ClientConfig::new("app".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), Rules::default())];
}

#[tokio::test]
async fn a_token_may_be_in_a_header_the_query_or_the_first_message() {
    let proxy = start_proxy_with(three_keys(), require_token).await;
    let in_query = format!("{STREAM_INPUT}?xi_api_key={CLIENT_TOKEN}");
    for (path, headers) in [
        (STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)] as &[(&str, &str)]),
        (&in_query, &[]),
        // Without a token in the handshake, the first message contains the token.
        (STREAM_INPUT, &[]),
    ] {
        let mut session = handshake(&proxy, path, headers).await.expect("the handshake must be accepted");
        let (messages, end) = session.synthesize(&["Hello. "]).await;
        assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
        assert_eq!(end, normal_close());
    }
    let clients: Vec<String> = proxy.into_records().await.into_iter().map(|record| record.client).collect();
    assert_eq!(clients, ["app"; 3]);
}

#[tokio::test]
async fn a_client_without_a_valid_token_gets_no_session() {
    let proxy = start_proxy_with(three_keys(), |config| {
        require_token(config);
        config.websocket.auth_message_timeout = Duration::from_millis(50);
    })
    .await;
    let refusal = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", "wrong")]).await;
    assert_eq!(refusal.err().unwrap().0, 401);
    // The handshake of a transcription must carry the token, because its messages cannot.
    assert_eq!(handshake(&proxy, SCRIBE, &[]).await.err().unwrap().0, 401);
    for first_message in
        [Some(json!({"text": " ", "xi_api_key": "wrong"})), Some(json!({"text": "hello "})), None]
    {
        let mut session = handshake(&proxy, STREAM_INPUT, &[]).await.unwrap();
        if let Some(first_message) = first_message {
            session.send_json(&first_message).await;
        }
        let (messages, end) = session.receive_to_end().await;
        let [message] = messages.as_slice() else {
            panic!("the client must receive one message: {messages:?}")
        };
        assert!(
            message["error"].as_str().unwrap().starts_with("client_token_"),
            "the message must name the problem of the token: {message}"
        );
        assert!(
            matches!(end, Received::Close(1008, _)),
            "the session must be closed as unauthorized, not with {end:?}"
        );
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]), [0, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_client_key_is_forwarded_unchanged_and_not_read_from_messages() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)]), |config| {
        config.access.bring_your_own_key = true;
        config.keys.truncate(1);
    })
    .await;
    let mut session = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", SECOND_KEY)]).await.unwrap();
    session.send_json(&json!({"text": " ", "xi_api_key": SECOND_KEY})).await;
    session.send_json(&json!({"text": "Hello. "})).await;
    session.send_json(&json!({"text": ""})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
    assert_eq!(end, normal_close());
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 1]);
    drop(session);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_dialogue_is_charged_by_the_characters_of_its_lines() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, &format!("{DIALOGUE}?model_id=eleven_v3")).await;
    session.send_json(&json!({"voices": [VOICE_ID], "xi_api_key": CLIENT_TOKEN})).await;
    session
        .send_json(&json!({"inputs": [{"text": "Hello.", "voice_id": VOICE_ID}, {"text": "Yes?", "voice_id": VOICE_ID}]}))
        .await;
    session.send_json(&json!({"close_socket": true})).await;
    let (messages, end) = session.receive_to_end().await;
    assert!(has_audio(&messages), "the messages must contain audio: {messages:?}");
    assert_eq!(end, normal_close());
    drop(session);
    let records = proxy.into_records().await;
    assert_eq!((records[0].credits, records[0].credits_from.as_str()), (10, "estimate"));
}

/// Returns the single number that the SQL query returns.
fn query_number(database: &Path, sql: &str) -> i64 {
    rusqlite::Connection::open(database).unwrap().query_row(sql, [], |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn a_transcription_is_recorded_by_its_seconds() {
    let proxy = start_proxy(three_keys()).await;
    let mut session = open_session(&proxy, SCRIBE).await;
    assert_eq!(session.receive_json().await["message_type"], "session_started");
    // The audio has 16-bit samples and lasts one and a half seconds.
    let audio = "AAAA".repeat(16_000);
    session.send_json(&json!({"message_type": "input_audio_chunk", "audio_base_64": audio, "commit": true, "sample_rate": 16_000}))
        .await;
    let transcript = session.receive_json().await;
    assert!(
        transcript["message_type"].as_str().unwrap().contains("transcript"),
        "the client must receive a transcript: {transcript}"
    );
    session.close().await;
    drop(session);
    let metrics = proxy.get("/metrics").await.text().await.unwrap();
    assert!(
        metrics.contains("keychoir_websocket_sessions_total{protocol=\"transcription\"} 1"),
        "the transcription must be counted: {metrics}"
    );
    let directory = proxy.close_unchecked().await;
    let database = directory.path().join("keychoir.db");
    assert_eq!(query_number(&database, "SELECT audio_ms FROM attempts WHERE status = 101"), 1_500);
}

#[tokio::test]
async fn the_cost_of_a_conversation_is_polled_afterwards() {
    let proxy = start_proxy(three_keys()).await;
    proxy.set_fault(FIRST_KEY, "quota");
    let mut session = open_session(&proxy, AGENT).await;
    session.send_json(&json!({"type": "conversation_initiation_client_data"})).await;
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
    proxy.simulator.set_fault(FIRST_KEY, None);
    session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
    while session.receive_json().await["type"] != "agent_response" {}
    session.close().await;
    drop(session);
    // The cost is requested with the key of the session, because other accounts do not have the conversation.
    let is_cost_request = |request: &RequestSummary| {
        request.path_and_query.starts_with("/v1/convai/conversations/") && request.status == Some(200)
    };
    let ledger =
        within_timeout(proxy.simulator.wait_for_ledger(|ledger| ledger.requests.iter().any(is_cost_request)))
            .await;
    let request = ledger.requests.iter().find(|request| is_cost_request(request)).unwrap();
    assert_eq!(request.key.as_deref(), Some(SECOND_KEY));
    let charged_credits = ledger.keys.iter().find(|key| key.key == SECOND_KEY).unwrap().charged;
    assert!(charged_credits > 0);
    let metric = format!("keychoir_credits_total {charged_credits}\n");
    while !proxy.get("/metrics").await.text().await.unwrap().contains(&metric) {
        tokio::task::yield_now().await;
    }
    proxy.close().await;
}

#[tokio::test]
async fn an_upgrade_to_another_protocol_is_ignored_and_the_request_is_served() {
    let proxy = start_proxy(three_keys()).await;
    let request = proxy.client.get(format!("{}/v1/voices", proxy.url)).header("xi-api-key", CLIENT_TOKEN);
    let response = request.header("connection", "upgrade").header("upgrade", "h2c").send().await.unwrap();
    assert_eq!(response.status(), 200);
    proxy.close().await;
}
