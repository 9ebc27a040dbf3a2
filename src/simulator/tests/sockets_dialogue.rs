//! Tests dialogue sessions: turns, buffered lines (texts with their voices), contexts, refusals, a key in the first
//! message, and the timeout.

use super::sockets::*;
use super::*;
use crate::simulator::{Fault, RefusalKind};
use serde_json::json;

/// The path of a dialogue session without contexts.
const DIALOGUE: &str = "/v1/text-to-dialogue/stream-input?output_format=ulaw_8000";
/// The path of a dialogue session with contexts.
const MULTI_CONTEXT: &str = "/v1/text-to-dialogue/multi-stream-input?output_format=ulaw_8000";
/// The identifiers of two public voices.
const RACHEL: &str = "21m00Tcm4TlvDq8ikWAM";
const GEORGE: &str = "JBFqnCBsd6RMkjVDRZzb";

/// Creates a line of a voice.
fn line(voice: &str, text: &str) -> Value {
    json!({ "voice_id": voice, "text": text })
}

#[tokio::test]
async fn lines_become_turns() {
    let simulator = start_with_keys("sk=1000").await;
    let mut client = connect(&simulator, &format!("{DIALOGUE}&sync_alignment=true"), "sk").await;
    client.send_json(json!({ "voices": [RACHEL, GEORGE] })).await;
    client.send_json(json!({ "keep_alive": true })).await;
    client.send_json(json!({ "inputs": [line(RACHEL, "Hello.")] })).await;
    let mut second_line = line(GEORGE, "Good day.");
    second_line["new_turn"] = true.into();
    client.send_json(json!({ "inputs": [second_line] })).await;
    let audio = client.receive_json().await;
    assert_eq!(audio["alignment"]["chars"].as_array().unwrap().len(), 6);
    assert_eq!(audio["alignment"]["char_start_times_ms"][0], 0);
    assert!(audio["audio"].as_str().unwrap().len() > 100 && audio.get("context_id").is_none());
    assert_eq!(client.receive_text().await, r#"{"is_final_audio_for_turn":true}"#);
    client.send_json(json!({ "close_socket": true })).await;
    let (messages, close) = client.receive_all().await;
    assert_eq!(messages[1..], [json!({ "is_final_audio_for_turn": true }), json!({ "is_final": true })]);
    assert_eq!(close, (1_000, String::new()));
    let (request, socket) = ended_session(&simulator).await;
    assert_eq!((socket.spoken.as_str(), request.charged), ("Hello.Good day.", 15));
}

#[tokio::test]
async fn lines_are_buffered_until_there_are_enough() {
    let simulator = start_with_keys("sk=1000").await;
    for (length, segments) in [(119, 3), (120, 4)] {
        let mut client = connect(&simulator, DIALOGUE, "sk").await;
        client.send_json(json!({ "voices": [RACHEL], "inputs": [line(RACHEL, &"x".repeat(length))] })).await;
        client.send_json(json!({ "inputs": [line(RACHEL, "x")], "flush": true })).await;
        client.send_json(json!({ "close_socket": true })).await;
        let (messages, _) = client.receive_all().await;
        let last = &messages[messages.len() - 2..];
        assert_eq!(last, [json!({ "is_final_audio_for_turn": true }), json!({ "is_final": true })]);
        // A segment contains fifty characters. The text of both lines has three segments, unless the first line is
        // spoken before the second one arrives.
        assert_eq!(messages.len() - 2, segments, "{length} characters must have these segments");
    }
}

#[tokio::test]
async fn contexts_are_separate() {
    let simulator = start_with_keys("sk=1000").await;
    let mut client = connect(&simulator, MULTI_CONTEXT, "sk").await;
    for id in ["a", "b"] {
        client.send_json(json!({ "context_id": id, "voices": [RACHEL], "inputs": [line(RACHEL, id)] })).await;
    }
    client.send_json(json!({ "context_id": "b", "close_context": true })).await;
    assert_eq!(client.receive_json().await["context_id"], "b");
    assert_eq!(client.receive_json().await, json!({ "is_final_audio_for_turn": true, "context_id": "b" }));
    assert_eq!(client.receive_json().await, json!({ "is_final": true, "context_id": "b" }));
    client.send_json(json!({ "close_socket": true })).await;
    let (messages, close) = client.receive_all().await;
    assert!(
        messages.iter().all(|message| message["context_id"] == "a"),
        "the messages must be about the open context: {messages:?}"
    );
    assert_eq!((messages.len(), close.0), (3, 1_000));
}

#[tokio::test]
async fn a_refusal_names_the_wrong_parameter() {
    let simulator = start_with_keys("sk=1000").await;
    let check_refusal = async |path: &str, messages: &[Value], error: &str, param: Value| {
        let mut client = connect(&simulator, path, "sk").await;
        for message in messages {
            client.send_json(message.clone()).await;
        }
        let refusal = client.receive_json().await;
        assert_eq!(
            (refusal["error"].as_str(), &refusal["param"]),
            (Some(error), &param),
            "the parameter must be named: {refusal}"
        );
        assert_eq!(refusal["code"], 1_008);
        assert_eq!(client.receive_close().await.0, 1_008);
    };
    let voices = json!({ "voices": [RACHEL] });
    check_refusal(DIALOGUE, &[json!({})], "missing_required_field", json!("voices")).await;
    check_refusal(
        DIALOGUE,
        &[json!({ "voices": vec![RACHEL; 11] })],
        "missing_required_field",
        json!("voices"),
    )
    .await;
    check_refusal(DIALOGUE, &[json!({ "voices": ["unknown-voice"] })], "voice_not_found", Value::Null).await;
    check_refusal(DIALOGUE, &[voices.clone(), voices.clone()], "invalid_parameters", json!("voices")).await;
    let unknown_voice = json!({ "inputs": [line(GEORGE, "x")] });
    check_refusal(DIALOGUE, &[voices.clone(), unknown_voice], "invalid_voice_id", json!("inputs")).await;
    check_refusal(
        MULTI_CONTEXT,
        std::slice::from_ref(&voices),
        "missing_required_field",
        json!("context_id"),
    )
    .await;
    let conversational_path = format!("{DIALOGUE}&model_id=eleven_v3_conversational");
    check_refusal(
        &conversational_path,
        &[json!({ "voices": [RACHEL, GEORGE] })],
        "missing_required_field",
        json!("voices"),
    )
    .await;
    let other_path = format!("{DIALOGUE}&model_id=eleven_flash_v2_5");
    check_refusal(&other_path, std::slice::from_ref(&voices), "unsupported_model", json!("model_id")).await;
    let contexts: Vec<Value> =
        (0..6).map(|id| json!({ "context_id": id.to_string(), "voices": [RACHEL] })).collect();
    check_refusal(MULTI_CONTEXT, &contexts, "max_active_conversations", Value::Null).await;
}

#[tokio::test]
async fn refusals_have_a_param_and_a_key_may_come_with_the_first_message() {
    let simulator = start_with_keys("sk=1000").await;
    let mut client = connect(&simulator, DIALOGUE, "other").await;
    client.send_json(json!({ "voices": [RACHEL] })).await;
    let invalid_key = r#"{"message":"Invalid API key","error":"invalid_api_key","code":1008,"param":null}"#;
    assert_eq!(client.receive_text().await, invalid_key);
    assert_eq!(client.receive_close().await, (1_008, "Invalid API key".to_owned()));
    let mut client = try_connect(&simulator, DIALOGUE, &[]).await.unwrap();
    client
        .send_json(
            json!({ "voices": [RACHEL], "xi_api_key": "sk", "inputs": [line(RACHEL, "x")], "flush": true }),
        )
        .await;
    assert!(client.receive_json().await["audio"].is_string());
    simulator.queue_faults("sk", vec![Fault::Refuse(RefusalKind::Concurrency)]);
    let mut client = connect(&simulator, DIALOGUE, "sk").await;
    client.send_json(json!({ "voices": [RACHEL] })).await;
    assert_eq!(client.receive_json().await["error"], "too_many_concurrent_requests");
}

#[tokio::test]
async fn an_idle_dialogue_is_ended() {
    let simulator =
        start(Plan { websocket_timeout_second: Duration::from_millis(1), ..Plan::parse("sk=100").unwrap() })
            .await;
    let mut client = connect(&simulator, DIALOGUE, "sk").await;
    client.send_json(json!({ "voices": [RACHEL] })).await;
    assert_eq!(client.receive_json().await["error"], "input_timeout_exceeded");
    assert_eq!(client.receive_close().await.0, 1_008);
}
