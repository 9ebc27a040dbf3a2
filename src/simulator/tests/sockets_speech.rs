//! Tests speech sessions: buffered text, cost, caps, refusals, contexts, timeouts and slots.

use super::sockets::*;
use super::*;
use crate::simulator::{Fault, KeyPlan, WorkspacePlan};
use serde_json::json;

/// The path of a speech session with contexts.
const MULTI_CONTEXT: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/multi-stream-input";

/// Creates a message whose text is spoken immediately.
fn flush_message(text: &str) -> Value {
    json!({ "text": text, "flush": true })
}

/// Returns the characters in the alignments of messages.
#[track_caller]
fn text_of(messages: &[Value]) -> String {
    let chars = messages.iter().filter_map(|message| message["alignment"]["chars"].as_array()).flatten();
    chars.map(|character| character.as_str().unwrap()).collect()
}

#[tokio::test]
async fn text_becomes_audio_and_costs_its_characters() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect(&simulator, &format!("{SPEECH}?output_format=pcm_16000"), "sk").await;
    client.send_json(json!({ "text": " ", "voice_settings": { "stability": 0.5 } })).await;
    client.send_json(json!({ "text": "Grüße 日本 " })).await;
    client.send_json(json!({ "text": "" })).await;
    let audio = client.receive_json().await;
    let starts = audio["alignment"]["charStartTimesMs"].as_array().unwrap();
    assert_eq!((starts.len(), &starts[0]), (9, &json!(0)));
    assert_eq!(audio["alignment"]["charDurationsMs"].as_array().unwrap().len(), 9);
    assert_eq!((&audio["isFinal"], &audio["alignment"]), (&Value::Null, &audio["normalizedAlignment"]));
    assert!(audio.get("contextId").is_none());
    assert!(audio["audio"].as_str().unwrap().len() > 1_000);
    assert_eq!(
        client.receive_text().await,
        r#"{"audio":null,"isFinal":true,"normalizedAlignment":null,"alignment":null}"#
    );
    assert_eq!(client.receive_close().await, (1_000, String::new()));
    let (request, socket) = ended_session(&simulator).await;
    assert_eq!((socket.spoken.as_str(), request.charged), ("Grüße 日本 ", 9));
    assert_eq!((socket.payer.as_deref(), socket.refused), (Some("sk"), None));
    let ledger = simulator.ledger();
    assert_eq!((ledger.totals.charged, ledger.key("sk").unwrap().charged), (9, 9));
    assert_eq!((ledger.key("sk").unwrap().remaining, ledger.workspaces[0].running), (91, 0));
}

/// Returns whether a new session speaks a message immediately, by the text that remains for the end of the session.
async fn speaks_immediately(simulator: &Simulator, query: &str, message: Value) -> bool {
    let mut client = connect(simulator, &format!("{SPEECH}?output_format=ulaw_8000{query}"), "sk").await;
    let text = message["text"].as_str().unwrap().to_owned();
    client.send_json(message).await;
    client.send_json(json!({ "text": "!" })).await;
    client.send_json(json!({ "text": "" })).await;
    let (messages, _) = client.receive_all().await;
    assert_eq!(text_of(&messages), format!("{text}!"));
    // The remaining text is only the last character if the message was spoken immediately.
    text_of(&messages[messages.len() - 2..]) == "!"
}

#[tokio::test]
async fn text_is_buffered_until_there_is_enough() {
    let simulator = start_with_keys("sk=1_000_000").await;
    let text = |length: usize| "x".repeat(length);
    for (query, message, expected) in [
        ("", json!({ "text": text(119) }), false),
        ("", json!({ "text": text(120) }), true),
        ("", json!({ "text": text(1), "flush": true }), true),
        ("", json!({ "text": text(49), "try_trigger_generation": true }), false),
        ("", json!({ "text": text(50), "try_trigger_generation": true }), true),
        ("&auto_mode=true", json!({ "text": text(1) }), true),
        ("", json!({ "text": text(59), "generation_config": { "chunk_length_schedule": [60] } }), false),
        ("", json!({ "text": text(60), "generation_config": { "chunk_length_schedule": [60.0] } }), true),
        ("", json!({ "text": text(49), "generation_config": { "chunk_length_schedule": [1] } }), false),
        ("", json!({ "text": text(50), "generation_config": { "chunk_length_schedule": [1] } }), true),
    ] {
        assert_eq!(
            speaks_immediately(&simulator, query, message.clone()).await,
            expected,
            "whether this message is spoken immediately must be as expected: {query} {message}"
        );
    }
}

#[tokio::test]
async fn a_cheaper_model_is_rounded_over_the_whole_session() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect(&simulator, &format!("{SPEECH}?model_id=eleven_flash_v2_5"), "sk").await;
    for _ in 0..3 {
        client.send_json(flush_message("x")).await;
        client.receive_json().await;
    }
    client.send_json(json!({ "text": "" })).await;
    client.receive_all().await;
    assert_eq!(ended_session(&simulator).await.0.charged, 2);
}

#[tokio::test]
async fn credits_can_run_out_in_the_middle_of_a_sentence() {
    // A message contains fifty characters, so 149 credits suffice for two messages and not for the third.
    for (credits, message_count) in [("149", 2), ("150", 3)] {
        let simulator = start_with_keys(&format!("sk={credits}")).await;
        let mut client = connect(&simulator, &format!("{SPEECH}?output_format=ulaw_8000"), "sk").await;
        client.send_json(flush_message(&"x".repeat(150))).await;
        for _ in 0..message_count {
            assert!(client.receive_json().await["audio"].is_string());
        }
        if message_count == 3 {
            client.send_json(json!({ "text": "" })).await;
            assert_eq!(client.receive_all().await.1.0, 1_000);
            continue;
        }
        let message = "This request exceeds your quota of 149. You have 49 credits remaining, while 50 credits are \
            required for this request.";
        assert_eq!(
            client.receive_text().await,
            format!(r#"{{"message":"{message}","error":"quota_exceeded","code":1008}}"#)
        );
        assert_eq!(client.receive_close().await, (1_008, message.to_owned()));
        let (request, socket) = ended_session(&simulator).await;
        assert_eq!((request.charged, socket.spoken.len()), (100, 100));
        assert_eq!(socket.refused.as_deref(), Some("quota"));
        assert_eq!(simulator.ledger().key("sk").unwrap().remaining, 49);
    }
}

#[tokio::test]
async fn a_cap_applies_to_its_key_on_websockets() {
    let simulator = start_with_keys("a=100@w:cap=5 b=100@w").await;
    let mut client = connect(&simulator, SPEECH, "a").await;
    client.send_json(flush_message("123456")).await;
    let refusal = client.receive_json().await;
    assert_eq!(refusal["error"], "quota_exceeded");
    assert!(
        refusal["message"]
            .as_str()
            .unwrap()
            .starts_with("This request exceeds your API key (key 1) quota of 5.")
    );
    let mut client = connect(&simulator, SPEECH, "b").await;
    client.send_json(flush_message("123456")).await;
    assert!(client.receive_json().await["audio"].is_string());
}

#[tokio::test]
async fn an_idle_session_ends_after_its_timeout() {
    let simulator =
        start(Plan { websocket_timeout_second: Duration::from_millis(1), ..Plan::parse("sk=100").unwrap() })
            .await;
    for (query, seconds) in [("", 20), ("?inactivity_timeout=7", 7), ("?inactivity_timeout=9999", 180)] {
        let mut client = connect(&simulator, &format!("{SPEECH}{query}"), "sk").await;
        client.send_json(json!({ "text": " " })).await;
        let message = format!(
            r#"Have not received a new text input within the timeout of {seconds} seconds. Streaming input terminated. Please make sure to either feed the input in the timely manner, or to send the end of input text (empty string "") when done."#
        );
        let refusal = client.receive_json().await;
        assert_eq!(refusal, json!({ "message": message, "error": "input_timeout_exceeded", "code": 1_008 }));
        let (code, reason) = client.receive_close().await;
        // The close reason is truncated like the captured ones.
        assert_eq!((code, reason.as_str()), (1_008, &message[..120]));
        assert_eq!(ended_session(&simulator).await.1.refused.as_deref(), Some("input_timeout_exceeded"));
    }
}

#[tokio::test]
async fn an_invalid_speech_session_is_refused() {
    let simulator = start_with_keys("sk=100").await;
    let check_refusal = async |path: &str, message: &str, error: &str| {
        let mut client = connect(&simulator, path, "sk").await;
        client.send(message.into()).await;
        let refusal = client.receive_json().await;
        assert_eq!(
            (refusal["error"].as_str(), refusal["code"].as_u64()),
            (Some(error), Some(1_008)),
            "the session must be refused: {path}"
        );
        assert_eq!(client.receive_close().await.0, 1_008);
    };
    check_refusal("/v1/text-to-speech/unknown-voice/stream-input", r#"{"text":"a"}"#, "voice_not_found")
        .await;
    check_refusal(&format!("{SPEECH}?model_id=none"), r#"{"text":"a"}"#, "model_not_found").await;
    check_refusal(&format!("{SPEECH}?output_format=none"), r#"{"text":"a"}"#, "invalid_output_format").await;
    check_refusal(SPEECH, "no JSON", "json_invalid").await;
    check_refusal(SPEECH, "[]", "json_invalid").await;
    assert_eq!(simulator.ledger().totals.charged, 0);
}

#[tokio::test]
async fn each_context_is_buffered_and_ended_separately() {
    let simulator = start_with_keys("sk=1000").await;
    let mut client = connect(&simulator, &format!("{MULTI_CONTEXT}?output_format=ulaw_8000"), "sk").await;
    client.send_json(json!({ "text": "one ", "context_id": "a" })).await;
    client.send_json(json!({ "text": "two ", "contextId": "b", "flush": true })).await;
    let message = client.receive_json().await;
    assert_eq!(
        (message["contextId"].as_str(), text_of(std::slice::from_ref(&message))),
        (Some("b"), "two ".to_owned())
    );
    // An empty text keeps a context open.
    client.send_json(json!({ "text": "", "context_id": "a" })).await;
    client.send_json(json!({ "context_id": "a", "flush": true })).await;
    let message = client.receive_json().await;
    assert_eq!(
        (message["contextId"].as_str(), text_of(std::slice::from_ref(&message))),
        (Some("a"), "one ".to_owned())
    );
    // The collected text of a closed context is not spoken.
    client.send_json(json!({ "text": "lost ", "context_id": "a" })).await;
    client.send_json(json!({ "context_id": "a", "close_context": true })).await;
    let last = r#"{"audio":null,"isFinal":true,"normalizedAlignment":null,"alignment":null,"contextId":"a"}"#;
    assert_eq!(client.receive_text().await, last);
    client.send_json(json!({ "text": "three " })).await;
    client.send_json(json!({ "close_socket": true })).await;
    let (messages, close) = client.receive_all().await;
    let ids: Vec<_> = messages.iter().map(|message| message["contextId"].as_str().unwrap()).collect();
    assert_eq!((ids, close.0), (vec!["b", "default", "default"], 1_000));
    assert_eq!(ended_session(&simulator).await.1.spoken, "two one three ");
    assert_eq!(simulator.ledger().totals.charged, 14);
}

#[tokio::test]
async fn five_contexts_may_be_open_and_no_sixth() {
    let simulator = start_with_keys("sk=1000").await;
    let mut client = connect(&simulator, MULTI_CONTEXT, "sk").await;
    for id in ["1", "2", "3", "4", "5"] {
        client.send_json(json!({ "text": " ", "context_id": id })).await;
    }
    client.send_json(json!({ "context_id": "1", "close_context": true })).await;
    client.receive_json().await;
    client.send_json(json!({ "text": " ", "context_id": "6" })).await;
    client.send_json(json!({ "text": " ", "context_id": "7" })).await;
    assert_eq!(
        client.receive_text().await,
        r#"{"message":"Maximum simultaneous contexts per WebSocket connection exceeded (5). Please close an existing context before opening a new one.","error":"max_active_conversations","code":1008}"#
    );
    assert_eq!(client.receive_close().await.0, 1_008);
}

#[tokio::test]
async fn a_slot_is_held_while_a_session_speaks_and_not_while_it_waits() {
    let plan = Plan::with_keys([])
        .with_workspace(WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("w", 1_000) })
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) });
    let simulator = start(plan).await;
    let path = format!("{SPEECH}?output_format=ulaw_8000");
    // Both sessions are open and idle, and neither holds a slot.
    let mut first_client = connect(&simulator, &path, "sk").await;
    first_client.send_json(flush_message("one")).await;
    first_client.receive_json().await;
    let mut second_client = connect(&simulator, &path, "sk").await;
    second_client.send_json(flush_message("two")).await;
    second_client.receive_json().await;

    simulator.queue_faults("sk", vec![Fault::SlowBody { ms: 600_000 }]);
    let mut slow_client = connect(&simulator, &path, "sk").await;
    slow_client.send_json(flush_message(&"x".repeat(51))).await;
    slow_client.receive_json().await;
    assert_eq!(simulator.ledger().workspaces[0].running, 1);
    second_client.send_json(flush_message("two")).await;
    let (messages, close) = second_client.receive_all().await;
    assert_eq!(messages, [] as [Value; 0], "no message may precede the close frame of this refusal");
    let text = "Too many concurrent requests. Your current subscription is associated with a maximum of 1 \
        concurrent requests (running i";
    assert_eq!(close, (1_008, text.to_owned()));
    // A client that disconnects during speech releases its slot.
    drop(slow_client);
    wait_until(&simulator, |ledger| ledger.workspaces[0].running == 0).await;
    first_client.send_json(flush_message("one")).await;
    first_client.receive_json().await;
    assert_eq!(simulator.ledger().workspaces[0].peak_running, 1);
}

/// The slot must be released with the last segment and not later. Otherwise alternating sessions would be
/// refused at random.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alternating_sessions_never_exceed_the_limit() {
    let plan = Plan::with_keys([])
        .with_workspace(WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("w", 1_000_000) })
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) });
    let simulator = start(plan).await;
    let path = format!("{SPEECH}?output_format=ulaw_8000");
    let mut clients = [connect(&simulator, &path, "sk").await, connect(&simulator, &path, "sk").await];
    for turn in 0..200 {
        let client = &mut clients[turn % 2];
        client.send_json(flush_message("x")).await;
        assert!(client.receive_json().await["audio"].is_string(), "turn {turn} must be spoken");
    }
    assert_eq!(simulator.ledger().workspaces[0].peak_running, 1);
}
