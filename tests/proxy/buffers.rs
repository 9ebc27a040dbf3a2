//! Tests the memory budget that the buffers of all sessions and uploads share. A session that needs more is closed or
//! continues without its buffered messages, an upload that needs more is buffered on disk, and all buffers are released
//! at the end.

use keychoir::config::Config;
use keychoir::policy::websocket_frame::{FrameHeader, Opcode};
use keychoir::simulator::Plan;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

use crate::support::websocket::{
    Received, SCRIBE, STREAM_INPUT, WebSocketClient, open_session, within_timeout,
};
use crate::support::{FIRST_KEY, SECOND_KEY, SPEECH_PATH, TestProxy, start_proxy_with};

const KIBIBYTE: usize = 1024;
const BUDGET_EXHAUSTED: &str = "Keychoir has no memory left for this session. Try again later.";

fn disable_memory_buffers(config: &mut Config) {
    config.retry.buffer_size = 0;
    config.retry.max_total_buffer_size = 0;
}

/// Returns the value of a metric without labels.
async fn metric_value(proxy: &TestProxy, name: &str) -> u64 {
    let page = proxy.get("/metrics").await.text().await.unwrap();
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap();
    line.parse().unwrap()
}

/// Waits until all buffers are released. A client may receive the end of its session before this.
async fn wait_until_buffers_are_released(proxy: &TestProxy) {
    within_timeout(async { while metric_value(proxy, "keychoir_buffer_memory_bytes").await > 0 {} }).await;
}

/// Opens a WebSocket and sends all but the last byte of a message of `bytes`.
async fn send_incomplete_message(proxy: &TestProxy, bytes: usize) -> WebSocketClient {
    let mut session = open_session(proxy, STREAM_INPUT).await;
    let mut frame = Vec::new();
    let header = FrameHeader {
        is_final: true,
        reserved: 0,
        opcode: Opcode::Text,
        mask: Some([0; 4]),
        length: bytes as u64,
    };
    header.encode(&mut frame);
    frame.resize(frame.len() + bytes - 1, b' ');
    // The proxy may close the connection before it has received all bytes.
    let _ = within_timeout(session.stream.get_mut().write_all(&frame)).await;
    session
}

#[tokio::test]
async fn a_session_beyond_the_buffer_budget_is_closed() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000)]), disable_memory_buffers).await;
    let (messages, _) = open_session(&proxy, STREAM_INPUT).await.synthesize(&["A small message."]).await;
    assert!(
        messages.iter().any(|message| message["audio"].is_string()),
        "the messages must contain audio: {messages:?}"
    );
    let mut session = send_incomplete_message(&proxy, 250 * KIBIBYTE).await;
    assert_eq!(session.receive().await, Received::Close(1013, BUDGET_EXHAUSTED.to_owned()));
    drop(session);
    let records = proxy.into_records().await;
    assert_eq!(records.last().map(|record| record.verdict.as_str()), Some("buffers_full"));
}

#[tokio::test]
async fn buffered_messages_beyond_the_budget_are_released_and_the_session_continues() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 100_000)]), disable_memory_buffers).await;
    let mut session = open_session(&proxy, SCRIBE).await;
    // Each message has more bytes than a session may buffer outside the budget.
    let audio_chunk =
        json!({"message_type": "input_audio_chunk", "audio_base_64": "A".repeat(40 * KIBIBYTE)});
    for _ in 0..4 {
        session.send(Message::text(audio_chunk.to_string())).await;
    }
    session
        .send_json(&json!({"message_type": "input_audio_chunk", "audio_base_64": "", "commit": true}))
        .await;
    assert!(matches!(session.receive().await, Received::Text(_)));
    session.close().await;
    wait_until_buffers_are_released(&proxy).await;
}

#[tokio::test]
async fn many_sessions_stay_within_the_buffer_budget() {
    const SESSION_COUNT: usize = 60;
    let budget = 2 * KIBIBYTE * KIBIBYTE;
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 10_000_000)]), |config| {
        config.retry.max_total_buffer_size = budget;
    })
    .await;
    let mut sessions = Vec::new();
    for _ in 0..SESSION_COUNT {
        sessions.push(send_incomplete_message(&proxy, 200 * KIBIBYTE).await);
        assert!(
            metric_value(&proxy, "keychoir_buffer_memory_bytes").await <= budget as u64,
            "the buffers must stay within their budget"
        );
    }
    assert_eq!(metric_value(&proxy, "keychoir_buffer_memory_max_bytes").await, budget as u64);
    // The first sessions have buffers and continue, and the last sessions are closed.
    let last_session = sessions.last_mut().unwrap();
    assert_eq!(last_session.receive().await, Received::Close(1013, BUDGET_EXHAUSTED.to_owned()));
    sessions.truncate(1);
    within_timeout(sessions[0].stream.get_mut().write_all(b" ")).await.unwrap();
    sessions.clear();
    wait_until_buffers_are_released(&proxy).await;
    let (messages, _) = open_session(&proxy, STREAM_INPUT).await.synthesize(&["A small message."]).await;
    assert!(
        messages.iter().any(|message| message["audio"].is_string()),
        "the messages must contain audio: {messages:?}"
    );
}

#[tokio::test]
async fn an_upload_beyond_the_buffer_budget_is_retried_from_disk() {
    let proxy = start_proxy_with(
        Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)]),
        disable_memory_buffers,
    )
    .await;
    proxy.set_fault(FIRST_KEY, "quota");
    let body = json!({"text": "Hello", "model_id": "eleven_flash_v2_5", "note": "a".repeat(300 * KIBIBYTE)});
    assert_eq!(proxy.post(SPEECH_PATH, &body).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [1, 1]);
    assert_eq!(metric_value(&proxy, "keychoir_buffer_disk_bytes").await, 0);
    proxy.close().await;
}
