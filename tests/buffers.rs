//! The shared buffer budget, with the whole program: the behaviour of its users when it is
//! exhausted, and the release of all of it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

mod house;
mod talk;

use keychoir::config::Config;
use keychoir::policy::frame::{Head, Opcode};
use keychoir::simulator::Plan;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

use house::{House, ONE, SPEECH, TWO, house_with};
use talk::{Heard, SCRIBE, STREAM_INPUT, Talk, dial, in_time};

const KIBI: usize = 1024;
const NO_MEMORY: &str = "Keychoir has no memory left for this session. Try again later.";

fn no_memory(config: &mut Config) {
    config.retry.buffer_size = 0;
    config.retry.max_total_buffer_size = 0;
}

async fn metric(house: &House, name: &str) -> u64 {
    let page = house.get("/metrics").await.text().await.unwrap();
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).unwrap();
    line.parse().unwrap()
}

/// Waits until all buffers are released: the client sees the end before the session is dropped.
async fn all_is_given_back(house: &House) {
    in_time(async { while metric(house, "keychoir_buffer_memory_bytes").await > 0 {} }).await;
}

/// Opens a WebSocket and sends all but the last byte of a message of `bytes`.
async fn half_said(house: &House, bytes: usize) -> Talk {
    let mut talk = dial(house, STREAM_INPUT).await;
    let mut frame = Vec::new();
    let head =
        Head { is_final: true, reserved: 0, opcode: Opcode::Text, mask: Some([0; 4]), length: bytes as u64 };
    head.write(&mut frame);
    frame.resize(frame.len() + bytes - 1, b' ');
    // The connection may be closed before all of it was sent.
    let _ = in_time(talk.stream.get_mut().write_all(&frame)).await;
    talk
}

#[tokio::test]
async fn a_session_that_needs_memory_where_none_is_left_is_closed() {
    let house = house_with(Plan::of([(ONE, 100_000)]), no_memory).await;
    let (messages, _) = dial(&house, STREAM_INPUT).await.speak(&["What is small is said."]).await;
    assert!(messages.iter().any(|message| message["audio"].is_string()), "{messages:?}");
    let mut talk = half_said(&house, 250 * KIBI).await;
    assert_eq!(talk.hear().await, Heard::Close(1013, NO_MEMORY.to_owned()));
    drop(talk);
    let records = house.records().await;
    assert_eq!(records.last().map(|record| record.verdict.as_str()), Some("buffers_full"));
}

#[tokio::test]
async fn opening_messages_that_find_no_memory_are_let_go_and_the_session_goes_on() {
    let house = house_with(Plan::of([(ONE, 100_000)]), no_memory).await;
    let mut talk = dial(&house, SCRIBE).await;
    // Two seconds of silence per message, which exceed the free allowance.
    let sound = json!({"message_type": "input_audio_chunk", "audio_base_64": "A".repeat(40 * KIBI)});
    for _ in 0..4 {
        talk.send(Message::text(sound.to_string())).await;
    }
    talk.say(&json!({"message_type": "input_audio_chunk", "audio_base_64": "", "commit": true})).await;
    assert!(matches!(talk.hear().await, Heard::Text(_)));
    talk.leave().await;
    all_is_given_back(&house).await;
}

#[tokio::test]
async fn many_sessions_take_no_more_than_there_is() {
    const SESSIONS: usize = 60;
    let total = 2 * KIBI * KIBI;
    let house = house_with(Plan::of([(ONE, 10_000_000)]), |config| {
        config.retry.max_total_buffer_size = total;
    })
    .await;
    let mut talks = Vec::new();
    for _ in 0..SESSIONS {
        talks.push(half_said(&house, 200 * KIBI).await);
        assert!(metric(&house, "keychoir_buffer_memory_bytes").await <= total as u64);
    }
    assert_eq!(metric(&house, "keychoir_buffer_memory_max_bytes").await, total as u64);
    // The first sessions have their memory and go on; the last are refused.
    let last = talks.last_mut().unwrap();
    assert_eq!(last.hear().await, Heard::Close(1013, NO_MEMORY.to_owned()));
    talks.truncate(1);
    in_time(talks[0].stream.get_mut().write_all(b" ")).await.unwrap();
    talks.clear();
    all_is_given_back(&house).await;
    let (messages, _) = dial(&house, STREAM_INPUT).await.speak(&["And all is well."]).await;
    assert!(messages.iter().any(|message| message["audio"].is_string()), "{messages:?}");
}

#[tokio::test]
async fn an_upload_that_finds_no_memory_is_sent_again_from_the_disk() {
    let house = house_with(Plan::of([(ONE, 100_000), (TWO, 100_000)]), no_memory).await;
    house.always(ONE, "quota");
    let body = json!({"text": "Hello", "model_id": "eleven_flash_v2_5", "note": "a".repeat(300 * KIBI)});
    assert_eq!(house.post(SPEECH, &body).await.status(), 200);
    assert_eq!(house.hits(&[ONE, TWO]), [1, 1]);
    assert_eq!(metric(&house, "keychoir_buffer_disk_bytes").await, 0);
    house.close().await;
}
