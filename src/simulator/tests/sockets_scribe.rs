//! Tests transcription sessions: the configuration, transcripts, commits, cost, slots and refusals.

use super::sockets::*;
use super::*;
use crate::simulator::{KeyPlan, WorkspacePlan};
use serde_json::json;

/// The path of a transcription session.
const SCRIBE: &str = "/v1/speech-to-text/realtime";

/// Creates a message with `bytes` bytes of silence. The number must be a multiple of three.
fn audio_message(bytes: usize) -> Value {
    assert_eq!(bytes % 3, 0, "the bytes must need no padding");
    json!({
        "message_type": "input_audio_chunk",
        "audio_base_64": "A".repeat(bytes / 3 * 4),
        "commit": false,
        "sample_rate": 8_000,
    })
}

/// Creates a message that also commits the segment.
fn commit_message(bytes: usize) -> Value {
    let mut message = audio_message(bytes);
    message["commit"] = true.into();
    message
}

#[tokio::test]
async fn the_simulator_sends_first_and_reports_the_configuration() {
    let simulator = start_with_keys("sk=100").await;
    let path = format!("{SCRIBE}?model_id=scribe_v2_realtime&audio_format=ulaw_8000&keyterms=b&keyterms=a");
    let mut client = connect(&simulator, &path, "sk").await;
    let start_message = client.receive_json().await;
    assert_eq!(start_message["message_type"], "session_started");
    assert_eq!(start_message["session_id"].as_str().unwrap().len(), 32);
    let config = &start_message["config"];
    assert_eq!((&config["sample_rate"], &config["audio_format"]), (&json!(8_000), &json!("ulaw_8000")));
    assert_eq!((&config["commit_strategy"], &config["keyterms"]), (&json!("manual"), &json!(["b", "a"])));
}

#[tokio::test]
async fn audio_becomes_text_and_every_started_second_costs_a_credit() {
    let simulator = start_with_keys("sk=100").await;
    let path = format!("{SCRIBE}?audio_format=ulaw_8000&include_timestamps=true");
    let mut client = connect(&simulator, &path, "sk").await;
    client.receive_json().await;
    client.send_json(audio_message(7_998)).await;
    let partial = json!({ "message_type": "partial_transcript", "text": "The simulator hears you well." });
    assert_eq!(client.receive_json().await, partial);
    assert_eq!(simulator.ledger().totals.charged, 1);
    client.send_json(audio_message(3)).await;
    client.receive_json().await;
    assert_eq!(simulator.ledger().totals.charged, 2);
    client.send_json(commit_message(0)).await;
    let committed =
        json!({ "message_type": "committed_transcript", "text": "The simulator hears you well." });
    assert_eq!(client.receive_json().await, committed);
    let timed_transcript = client.receive_json().await;
    assert_eq!(timed_transcript["message_type"], "committed_transcript_with_timestamps");
    assert_eq!(timed_transcript["words"].as_array().unwrap().len(), 5);
    // A new segment does not contain earlier words.
    client.send_json(commit_message(900)).await;
    assert_eq!(client.receive_json().await["text"], "The simulator");
    client.close(1_000, "User ended conversation").await;
    let (request, socket) = ended_session(&simulator).await;
    assert_eq!((request.charged, socket.text_messages), (2, 4));
    assert_eq!(simulator.ledger().key("sk").unwrap().remaining, 98);
}

#[tokio::test]
async fn the_language_comes_with_a_second_transcript_without_words() {
    let simulator = start_with_keys("sk=100").await;
    let path = format!("{SCRIBE}?audio_format=ulaw_8000&include_language_detection=true");
    let mut client = connect(&simulator, &path, "sk").await;
    assert_eq!(client.receive_json().await["config"]["include_language_detection"], json!(true));
    client.send_json(commit_message(900)).await;
    assert_eq!(client.receive_json().await["message_type"], "partial_transcript");
    assert_eq!(client.receive_json().await["message_type"], "committed_transcript");
    let detected = json!({
        "message_type": "committed_transcript_with_timestamps",
        "text": "The simulator",
        "language_code": "en",
        "words": null,
    });
    assert_eq!(client.receive_json().await, detected);
}

#[tokio::test]
async fn two_seconds_of_audio_are_committed_if_the_client_requests_it() {
    let simulator = start_with_keys("sk=100").await;
    let mut client =
        connect(&simulator, &format!("{SCRIBE}?audio_format=ulaw_8000&commit_strategy=vad"), "sk").await;
    client.receive_json().await;
    client.send_json(audio_message(15_999)).await;
    assert_eq!(client.receive_json().await["message_type"], "partial_transcript");
    client.send_json(audio_message(3)).await;
    assert_eq!(client.receive_json().await["message_type"], "partial_transcript");
    assert_eq!(client.receive_json().await["message_type"], "committed_transcript");
}

#[tokio::test]
async fn credits_run_out_before_or_during_a_session() {
    let simulator = start_with_keys("sk=1").await;
    let mut client = connect(&simulator, &format!("{SCRIBE}?audio_format=ulaw_8000"), "sk").await;
    client.receive_json().await;
    client.send_json(audio_message(8_001)).await;
    let refusal = r#"{"message_type":"quota_exceeded","error":"You have exceeded your quota."}"#;
    assert_eq!(client.receive_text().await, refusal);
    assert_eq!(client.receive_close().await, (1_000, String::new()));
    assert_eq!(simulator.ledger().totals.charged, 0, "a refused second must not be charged");

    let simulator = start_with_keys("sk=0").await;
    let mut client = connect(&simulator, SCRIBE, "sk").await;
    assert_eq!(client.receive_text().await, refusal);
    assert_eq!(client.receive_close().await.0, 1_000);
}

#[tokio::test]
async fn a_session_holds_its_slot_from_the_first_message_to_the_last() {
    let plan = Plan::with_keys([])
        .with_workspace(WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("w", 100) })
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) });
    let simulator = start(plan).await;
    let mut first_client = connect(&simulator, SCRIBE, "sk").await;
    first_client.receive_json().await;
    let mut second_client = connect(&simulator, SCRIBE, "sk").await;
    assert_eq!(second_client.receive_json().await["message_type"], "rate_limited");
    assert_eq!(second_client.receive_close().await.0, 1_000);
    drop(first_client);
    wait_until(&simulator, |ledger| ledger.workspaces[0].running == 0).await;
    let mut third_client = connect(&simulator, SCRIBE, "sk").await;
    assert_eq!(third_client.receive_json().await["message_type"], "session_started");
}

#[tokio::test]
async fn invalid_audio_is_refused() {
    let simulator = start_with_keys("sk=100").await;
    let check_refusal = async |path: &str, message: Value, expected: &str| {
        let mut client = connect(&simulator, path, "sk").await;
        let first_message = client.receive_json().await;
        let refusal = if first_message["message_type"] == "session_started" {
            client.send_json(message).await;
            client.receive_json().await
        } else {
            first_message
        };
        assert_eq!(refusal["message_type"], expected);
        assert_eq!(client.receive_close().await.0, 1_000);
    };
    let invalid_base64 = json!({ "message_type": "input_audio_chunk", "audio_base_64": "A" });
    check_refusal(SCRIBE, invalid_base64, "input_error").await;
    check_refusal(SCRIBE, json!({ "audio_base_64": "AAAA" }), "input_error").await;
    check_refusal(SCRIBE, json!([]), "input_error").await;
    check_refusal(&format!("{SCRIBE}?audio_format=mp3"), json!({}), "invalid_request").await;
}
