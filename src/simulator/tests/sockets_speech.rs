use super::sockets::*;
use super::*;
use crate::simulator::{Fault, KeyPlan, WorkspacePlan};
use serde_json::json;

const MULTI: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/multi-stream-input";

fn spoken_to(text: &str) -> Value {
    json!({ "text": text, "flush": true })
}

#[track_caller]
fn text_of(messages: &[Value]) -> String {
    let chars = messages.iter().filter_map(|message| message["alignment"]["chars"].as_array()).flatten();
    chars.map(|character| character.as_str().unwrap()).collect()
}

#[tokio::test]
async fn text_becomes_audio_and_costs_its_characters() {
    let sim = start_with("sk=100").await;
    let mut client = dial(&sim, &format!("{SPEECH}?output_format=pcm_16000"), "sk").await;
    client.say(json!({ "text": " ", "voice_settings": { "stability": 0.5 } })).await;
    client.say(json!({ "text": "Grüße 日本 " })).await;
    client.say(json!({ "text": "" })).await;
    let audio = client.hear().await;
    let starts = audio["alignment"]["charStartTimesMs"].as_array().unwrap();
    assert_eq!((starts.len(), &starts[0]), (9, &json!(0)));
    assert_eq!(audio["alignment"]["charDurationsMs"].as_array().unwrap().len(), 9);
    assert_eq!((&audio["isFinal"], &audio["alignment"]), (&Value::Null, &audio["normalizedAlignment"]));
    assert!(audio.get("contextId").is_none());
    assert!(audio["audio"].as_str().unwrap().len() > 1_000);
    assert_eq!(
        client.hear_text().await,
        r#"{"audio":null,"isFinal":true,"normalizedAlignment":null,"alignment":null}"#
    );
    assert_eq!(client.hear_close().await, (1_000, String::new()));
    let (request, socket) = ended(&sim).await;
    assert_eq!((socket.spoken.as_str(), request.charged), ("Grüße 日本 ", 9));
    assert_eq!((socket.payer.as_deref(), socket.refused), (Some("sk"), None));
    let ledger = sim.ledger();
    assert_eq!((ledger.totals.charged, ledger.key("sk").unwrap().charged), (9, 9));
    assert_eq!((ledger.key("sk").unwrap().remaining, ledger.workspaces[0].running), (91, 0));
}

/// Whether that message makes a new session speak at once, derived from the text left for a flush.
async fn speaks_at_once(sim: &Simulator, query: &str, message: Value) -> bool {
    let mut client = dial(sim, &format!("{SPEECH}?output_format=ulaw_8000{query}"), "sk").await;
    let text = message["text"].as_str().unwrap().to_owned();
    client.say(message).await;
    client.say(json!({ "text": "!" })).await;
    client.say(json!({ "text": "" })).await;
    let (messages, _) = client.hear_all().await;
    assert_eq!(text_of(&messages), format!("{text}!"));
    // The remaining text comes alone: with the last character if nothing was spoken before.
    text_of(&messages[messages.len() - 2..]) == "!"
}

#[tokio::test]
async fn text_gathers_until_there_is_enough_of_it() {
    let sim = start_with("sk=1_000_000").await;
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
        assert_eq!(speaks_at_once(&sim, query, message.clone()).await, expected, "{query} {message}");
    }
}

#[tokio::test]
async fn a_cheaper_model_is_rounded_over_the_whole_session() {
    let sim = start_with("sk=100").await;
    let mut client = dial(&sim, &format!("{SPEECH}?model_id=eleven_flash_v2_5"), "sk").await;
    for _ in 0..3 {
        client.say(spoken_to("x")).await;
        client.hear().await;
    }
    client.say(json!({ "text": "" })).await;
    client.hear_all().await;
    assert_eq!(ended(&sim).await.0.charged, 2);
}

#[tokio::test]
async fn credits_can_run_out_in_the_middle_of_a_sentence() {
    // Fifty characters at a time: two pieces can be paid, the third cannot.
    for (credits, pieces) in [("149", 2), ("150", 3)] {
        let sim = start_with(&format!("sk={credits}")).await;
        let mut client = dial(&sim, &format!("{SPEECH}?output_format=ulaw_8000"), "sk").await;
        client.say(spoken_to(&"x".repeat(150))).await;
        for _ in 0..pieces {
            assert!(client.hear().await["audio"].is_string());
        }
        if pieces == 3 {
            client.say(json!({ "text": "" })).await;
            assert_eq!(client.hear_all().await.1.0, 1_000);
            continue;
        }
        let message = "This request exceeds your quota of 149. You have 49 credits remaining, while 50 credits are required for this request.";
        assert_eq!(
            client.hear_text().await,
            format!(r#"{{"message":"{message}","error":"quota_exceeded","code":1008}}"#)
        );
        assert_eq!(client.hear_close().await, (1_008, message.to_owned()));
        let (request, socket) = ended(&sim).await;
        assert_eq!((request.charged, socket.spoken.len()), (100, 100));
        assert_eq!(socket.refused.as_deref(), Some("quota"));
        assert_eq!(sim.ledger().key("sk").unwrap().remaining, 49);
    }
}

#[tokio::test]
async fn a_cap_binds_its_key_on_sockets_too() {
    let sim = start_with("a=100@w:cap=5 b=100@w").await;
    let mut client = dial(&sim, SPEECH, "a").await;
    client.say(spoken_to("123456")).await;
    let refused = client.hear().await;
    assert_eq!(refused["error"], "quota_exceeded");
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .starts_with("This request exceeds your API key (key 1) quota of 5.")
    );
    let mut client = dial(&sim, SPEECH, "b").await;
    client.say(spoken_to("123456")).await;
    assert!(client.hear().await["audio"].is_string());
}

#[tokio::test]
async fn silence_ends_a_session_after_as_long_as_was_asked_for() {
    let sim = start(Plan { socket_second: Duration::from_millis(1), ..Plan::parse("sk=100").unwrap() }).await;
    for (query, seconds) in [("", 20), ("?inactivity_timeout=7", 7), ("?inactivity_timeout=9999", 180)] {
        let mut client = dial(&sim, &format!("{SPEECH}{query}"), "sk").await;
        client.say(json!({ "text": " " })).await;
        let message = format!(
            r#"Have not received a new text input within the timeout of {seconds} seconds. Streaming input terminated. Please make sure to either feed the input in the timely manner, or to send the end of input text (empty string "") when done."#
        );
        let heard = client.hear().await;
        assert_eq!(heard, json!({ "message": message, "error": "input_timeout_exceeded", "code": 1_008 }));
        let (code, reason) = client.hear_close().await;
        // Reasons are cut, as those that were captured.
        assert_eq!((code, reason.as_str()), (1_008, &message[..120]));
        assert_eq!(ended(&sim).await.1.refused.as_deref(), Some("input_timeout_exceeded"));
    }
}

#[tokio::test]
async fn what_cannot_be_spoken_is_refused() {
    let sim = start_with("sk=100").await;
    let check = async |path: &str, message: &str, error: &str| {
        let mut client = dial(&sim, path, "sk").await;
        client.send(message.into()).await;
        let refused = client.hear().await;
        assert_eq!(
            (refused["error"].as_str(), refused["code"].as_u64()),
            (Some(error), Some(1_008)),
            "{path}"
        );
        assert_eq!(client.hear_close().await.0, 1_008);
    };
    check("/v1/text-to-speech/nobody/stream-input", r#"{"text":"a"}"#, "voice_not_found").await;
    check(&format!("{SPEECH}?model_id=none"), r#"{"text":"a"}"#, "model_not_found").await;
    check(&format!("{SPEECH}?output_format=none"), r#"{"text":"a"}"#, "invalid_output_format").await;
    check(SPEECH, "no JSON", "json_invalid").await;
    check(SPEECH, "[]", "json_invalid").await;
    assert_eq!(sim.ledger().totals.charged, 0);
}

#[tokio::test]
async fn contexts_gather_and_end_each_on_its_own() {
    let sim = start_with("sk=1000").await;
    let mut client = dial(&sim, &format!("{MULTI}?output_format=ulaw_8000"), "sk").await;
    client.say(json!({ "text": "one ", "context_id": "a" })).await;
    client.say(json!({ "text": "two ", "contextId": "b", "flush": true })).await;
    let heard = client.hear().await;
    assert_eq!(
        (heard["contextId"].as_str(), text_of(std::slice::from_ref(&heard))),
        (Some("b"), "two ".to_owned())
    );
    // An empty text keeps a context alive and ends nothing.
    client.say(json!({ "text": "", "context_id": "a" })).await;
    client.say(json!({ "context_id": "a", "flush": true })).await;
    let heard = client.hear().await;
    assert_eq!(
        (heard["contextId"].as_str(), text_of(std::slice::from_ref(&heard))),
        (Some("a"), "one ".to_owned())
    );
    // Text collected when a context is closed is not spoken.
    client.say(json!({ "text": "lost ", "context_id": "a" })).await;
    client.say(json!({ "context_id": "a", "close_context": true })).await;
    let last = r#"{"audio":null,"isFinal":true,"normalizedAlignment":null,"alignment":null,"contextId":"a"}"#;
    assert_eq!(client.hear_text().await, last);
    client.say(json!({ "text": "three " })).await;
    client.say(json!({ "close_socket": true })).await;
    let (messages, close) = client.hear_all().await;
    let ids: Vec<_> = messages.iter().map(|message| message["contextId"].as_str().unwrap()).collect();
    assert_eq!((ids, close.0), (vec!["b", "default", "default"], 1_000));
    assert_eq!(ended(&sim).await.1.spoken, "two one three ");
    assert_eq!(sim.ledger().totals.charged, 14);
}

#[tokio::test]
async fn five_contexts_may_be_open_and_no_sixth() {
    let sim = start_with("sk=1000").await;
    let mut client = dial(&sim, MULTI, "sk").await;
    for id in ["1", "2", "3", "4", "5"] {
        client.say(json!({ "text": " ", "context_id": id })).await;
    }
    client.say(json!({ "context_id": "1", "close_context": true })).await;
    client.hear().await;
    client.say(json!({ "text": " ", "context_id": "6" })).await;
    client.say(json!({ "text": " ", "context_id": "7" })).await;
    assert_eq!(
        client.hear_text().await,
        r#"{"message":"Maximum simultaneous contexts per WebSocket connection exceeded (5). Please close an existing context before opening a new one.","error":"max_active_conversations","code":1008}"#
    );
    assert_eq!(client.hear_close().await.0, 1_008);
}

#[tokio::test]
async fn a_place_is_taken_while_a_session_speaks_and_not_while_it_waits() {
    let plan = Plan::of([])
        .with_workspace(WorkspacePlan { concurrency_max: Some(1), ..WorkspacePlan::new("w", 1_000) })
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) });
    let sim = start(plan).await;
    let path = format!("{SPEECH}?output_format=ulaw_8000");
    // Both are open and idle: neither holds a slot.
    let mut one = dial(&sim, &path, "sk").await;
    one.say(spoken_to("one")).await;
    one.hear().await;
    let mut two = dial(&sim, &path, "sk").await;
    two.say(spoken_to("two")).await;
    two.hear().await;

    sim.script("sk", vec![Fault::SlowBody { ms: 600_000 }]);
    let mut slow = dial(&sim, &path, "sk").await;
    slow.say(spoken_to(&"x".repeat(51))).await;
    slow.hear().await;
    assert_eq!(sim.ledger().workspaces[0].running, 1);
    two.say(spoken_to("two")).await;
    let (messages, close) = two.hear_all().await;
    assert_eq!(messages, [] as [Value; 0], "this refusal is a close and nothing before it");
    let text = "Too many concurrent requests. Your current subscription is associated with a maximum of 1 concurrent requests (running i";
    assert_eq!(close, (1_008, text.to_owned()));
    // A client that disconnects in the middle releases its slot.
    drop(slow);
    until(&sim, |ledger| ledger.workspaces[0].running == 0).await;
    one.say(spoken_to("one")).await;
    one.hear().await;
    assert_eq!(sim.ledger().workspaces[0].running_max, 1);
}

/// The slot must be free with the last piece and not some time later, or sequential clients would
/// be refused by chance.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_after_the_other_is_never_too_many() {
    let plan = Plan::of([])
        .with_workspace(WorkspacePlan { concurrency_max: Some(1), ..WorkspacePlan::new("w", 1_000_000) })
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) });
    let sim = start(plan).await;
    let path = format!("{SPEECH}?output_format=ulaw_8000");
    let mut clients = [dial(&sim, &path, "sk").await, dial(&sim, &path, "sk").await];
    for turn in 0..200 {
        let client = &mut clients[turn % 2];
        client.say(spoken_to("x")).await;
        assert!(client.hear().await["audio"].is_string(), "turn {turn}");
    }
    assert_eq!(sim.ledger().workspaces[0].running_max, 1);
}
