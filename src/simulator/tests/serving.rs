//! Tests the common operations: their audio, formats, costs and headers, the history, own voices, the subscription, the
//! reset of credits, and concurrent and sequential requests.

use super::*;
use crate::policy::units::UnixMs;
use crate::simulator::{KeyPlan, WorkspacePlan};

#[tokio::test]
async fn speech_costs_its_characters_and_reports_the_cost() {
    let simulator = start_with_keys("sk=1000").await;
    let reply = speech_call("Grüße 日本").key("sk").send_to(&simulator).await;
    assert_eq!((reply.status, reply.header("content-type")), (200, "audio/mpeg"));
    assert_eq!(reply.header("character-cost"), "8");
    for name in ["request-id", "history-item-id", "tts-latency-ms", "x-trace-id", "x-region"] {
        assert!(!reply.header(name).is_empty(), "the response must have the header {name}");
    }
    assert_eq!(reply.header("current-concurrent-requests"), "1");
    assert_eq!(reply.header("workspace-concurrent-requests"), "1");
    assert_eq!(reply.header("maximum-concurrent-requests"), "1000000");
    assert_eq!(reply.header("access-control-allow-origin"), "*");
    assert_eq!(reply.header("content-length"), reply.body.len().to_string());
    assert_eq!(simulator.ledger().key("sk").unwrap().remaining, 992);
}

#[tokio::test]
async fn flash_costs_half_the_price_rounded_up() {
    let simulator = start_with_keys("sk=1000").await;
    let body = r#"{"text":"12345","model_id":"eleven_flash_v2_5"}"#;
    assert_eq!(post(SPEECH_PATH, body).key("sk").send_to(&simulator).await.header("character-cost"), "3");
}

#[tokio::test]
async fn a_stream_is_chunked_and_has_the_same_audio() {
    let simulator = start_with_keys("sk=1000").await;
    let whole_response = speech_call("hello").key("sk").send_to(&simulator).await;
    let body = r#"{"text":"hello"}"#;
    let stream = post(&format!("{SPEECH_PATH}/stream"), body).key("sk").send_to(&simulator).await;
    assert_eq!(stream.body, whole_response.body);
    assert_eq!(stream.header("transfer-encoding"), "chunked");
    assert_eq!(stream.header("content-length"), "");
    // The number of received chunks depends on the connection.
    assert!(stream.chunk_count >= 1, "at least one chunk must arrive");
}

#[tokio::test]
async fn a_response_with_timestamps_has_the_same_audio_and_its_times() {
    let simulator = start_with_keys("sk=1000").await;
    let body = r#"{"text":"Hello, choir \"x\"!"}"#;
    let whole_response = post(SPEECH_PATH, body).key("sk").send_to(&simulator).await;
    let timed_response =
        post(&format!("{SPEECH_PATH}/with-timestamps"), body).key("sk").send_to(&simulator).await;
    assert_eq!(timed_response.header("content-type"), "application/json");
    assert_eq!(decode_base64(&timed_response.json()["audio_base64"]), whole_response.body);
    let stream =
        post(&format!("{SPEECH_PATH}/stream/with-timestamps"), body).key("sk").send_to(&simulator).await;
    let objects: Vec<Value> = stream.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects.len(), 2);
    let audio: Vec<u8> = objects.iter().flat_map(|object| decode_base64(&object["audio_base64"])).collect();
    assert_eq!(audio, whole_response.body);
    for alignment in ["alignment", "normalized_alignment"] {
        let characters =
            objects.iter().flat_map(|object| object[alignment]["characters"].as_array().unwrap());
        let text: String = characters.map(|character| character.as_str().unwrap()).collect();
        assert_eq!(text, "Hello, choir \"x\"!");
        let ends = &objects[1][alignment]["character_end_times_seconds"];
        assert_eq!(ends.as_array().unwrap().last().unwrap(), &Value::from(1.02));
        assert_eq!(timed_response.json()[alignment]["character_end_times_seconds"][16], 1.02);
    }
}

/// Decodes base64 without sharing code with the encoder.
fn decode_base64(text: &Value) -> Vec<u8> {
    let digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut bits = String::new();
    for digit in text.as_str().unwrap().trim_end_matches('=').chars() {
        bits.push_str(&format!("{:06b}", digits.find(digit).unwrap()));
    }
    bits.as_bytes()
        .chunks_exact(8)
        .map(|byte| u8::from_str_radix(std::str::from_utf8(byte).unwrap(), 2).unwrap())
        .collect()
}

#[tokio::test]
async fn the_query_decides_the_format() {
    let simulator = start_with_keys("sk=1000").await;
    for (name, media_type, bytes) in [
        ("pcm_16000", "audio/pcm", 9_600),
        ("wav_8000", "audio/wav", 4_844),
        ("ulaw_8000", "audio/basic", 2_400),
    ] {
        let path = format!("{SPEECH_PATH}?enable_logging=true&output_format={name}");
        let reply = post(&path, r#"{"text":"hello"}"#).key("sk").send_to(&simulator).await;
        assert_eq!(
            (reply.header("content-type"), reply.body.len()),
            (media_type, bytes),
            "{name} must have its type and length"
        );
    }
}

#[tokio::test]
async fn dialogue_costs_the_sum_of_its_inputs() {
    let simulator = start_with_keys("sk=1000").await;
    let inputs = serde_json::json!([
        { "text": "12345", "voice_id": "21m00Tcm4TlvDq8ikWAM" },
        { "text": "678", "voice_id": "JBFqnCBsd6RMkjVDRZzb" },
    ]);
    let body = serde_json::json!({ "inputs": inputs }).to_string();
    for path in ["/v1/text-to-dialogue", "/v1/text-to-dialogue/stream"] {
        let reply = post(path, body.clone()).key("sk").send_to(&simulator).await;
        assert_eq!((reply.status, reply.header("character-cost")), (200, "8"));
    }
}

#[tokio::test]
async fn effects_and_transcripts_have_their_own_prices() {
    let simulator = start_with_keys("sk=1000").await;
    let effect = |body: &'static str| post("/v1/sound-generation", body).key("sk").send_to(&simulator);
    assert_eq!(effect(r#"{"text":"rain"}"#).await.header("character-cost"), "100");
    let short_effect = effect(r#"{"text":"rain","duration_seconds":0.52}"#).await;
    assert_eq!(
        (short_effect.header("character-cost"), short_effect.header("content-type")),
        ("11", "audio/mpeg")
    );

    let form =
        format!("--x\r\nContent-Disposition: form-data; name=\"model_id\"\r\n\r\n{}", "s".repeat(40_000));
    let transcript = post("/v1/speech-to-text", form).key("sk").send_to(&simulator).await;
    assert_eq!(transcript.header("character-cost"), "3");
    assert_eq!(transcript.json()["text"], "The simulator hears you well.");
    assert_eq!(transcript.json()["words"].as_array().unwrap().len(), 9);
    assert_eq!(transcript.json()["words"][8]["end"], 3.0);
}

#[tokio::test]
async fn an_upload_above_the_maximum_of_a_stored_body_is_served() {
    let simulator = start_with_keys("sk=1000").await;
    let mut form = b"--x\r\nContent-Disposition: form-data; name=\"model_id\"\r\n\r\n".to_vec();
    form.resize(3_000_000, b'a');
    assert_eq!(
        post("/v1/speech-to-text", form).key("sk").send_to(&simulator).await.header("character-cost"),
        "188"
    );
    assert_eq!(simulator.ledger().requests[0].body_bytes, 3_000_000);
}

#[tokio::test]
async fn generated_speech_is_in_the_history_of_its_workspace() {
    let simulator = start_with_keys("a=1000@w b=1000@w c=1000").await;
    let first_reply = speech_call("one").key("a").send_to(&simulator).await;
    speech_call("two").key("b").send_to(&simulator).await;
    let page = get("/v1/history?page_size=1").key("a").send_to(&simulator).await.json();
    assert_eq!((&page["history"][0]["text"], &page["has_more"]), (&Value::from("two"), &Value::from(true)));
    let next_path =
        format!("/v1/history?start_after_history_item_id={}", page["last_history_item_id"].as_str().unwrap());
    let page = get(&next_path).key("b").send_to(&simulator).await.json();
    assert_eq!((&page["history"][0]["text"], &page["has_more"]), (&Value::from("one"), &Value::from(false)));
    assert_eq!(page["history"][0]["character_count_change_to"], 3);
    assert_eq!(page["history"][0]["request_id"], first_reply.header("request-id"));

    let path = format!("/v1/history/{}", first_reply.header("history-item-id"));
    assert_eq!(get(&format!("{path}/audio")).key("b").send_to(&simulator).await.body, first_reply.body);
    assert_eq!(get(&path).key("c").send_to(&simulator).await.status, 404);
    let delete = || SimulatorCall { method: "DELETE", ..get(&path) };
    assert_eq!(delete().key("a").send_to(&simulator).await.text(), r#"{"status":"ok"}"#);
    assert_eq!(delete().key("a").send_to(&simulator).await.status, 404);
}

#[tokio::test]
async fn an_own_voice_speaks_in_its_workspace_only() {
    let plan = Plan::with_keys([("other", 100)])
        .with_workspace(WorkspacePlan { voices: vec!["mine".into()], ..WorkspacePlan::new("w", 100) })
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("owner", 0) });
    let simulator = start(plan).await;
    let speak = |key| post("/v1/text-to-speech/mine", r#"{"text":"a"}"#).key(key).send_to(&simulator);
    assert_eq!(speak("owner").await.status, 200);
    assert_eq!(speak("other").await.status, 404);
    assert_eq!(get("/v1/voices/mine").key("owner").send_to(&simulator).await.json()["category"], "cloned");
    assert_eq!(get("/v2/voices").key("owner").send_to(&simulator).await.json()["total_count"], 4);
}

#[tokio::test]
async fn the_subscription_reports_the_used_credits_and_the_limit() {
    let simulator = start_with_keys("a=100@choir b=100@choir").await;
    speech_call("12345").key("a").send_to(&simulator).await;
    let subscription = get("/v1/user/subscription").key("b").send_to(&simulator).await.json();
    assert_eq!(
        (&subscription["character_count"], &subscription["character_limit"]),
        (&5.into(), &100.into())
    );
    let user = get("/v1/user").key("b").send_to(&simulator).await.json();
    assert_eq!(
        (&user["workspace_id"], &user["subscription"]["character_count"]),
        (&"choir".into(), &5.into())
    );
    assert_eq!(
        get("/v1/models").key("a").send_to(&simulator).await.json()[4]["model_rates"]["character_cost_multiplier"],
        0.5
    );
}

#[tokio::test]
async fn credits_are_reset_when_the_reset_date_has_passed() {
    let spent_workspace = WorkspacePlan { used: 100, reset: Some(UnixMs(1)), ..WorkspacePlan::new("w", 100) };
    let simulator = start(Plan::parse("a=100@w").unwrap().with_workspace(spent_workspace)).await;
    assert_eq!(speech_call(&"a".repeat(100)).key("a").send_to(&simulator).await.status, 200);
    let subscription = get("/v1/user/subscription").key("a").send_to(&simulator).await.json();
    assert!(subscription["next_character_count_reset_unix"].as_u64().unwrap() > 1_795_000_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_requests_are_served_up_to_the_credits() {
    let simulator = std::sync::Arc::new(start_with_keys("a=70@w b=70@w").await);
    let tasks = Tasks::new();
    let calls = (0..20).map(|index| {
        let simulator = simulator.clone();
        let key = if index % 2 == 0 { "a" } else { "b" };
        tasks.spawn(async move { speech_call("1234567").key(key).send_to(&simulator).await.status })
    });
    let mut served_count = 0;
    for call in calls.collect::<Vec<_>>() {
        served_count += u32::from(call.await.unwrap() == 200);
    }
    assert_eq!(served_count, 10);
    let ledger = simulator.ledger();
    assert_eq!((ledger.totals.served, ledger.totals.refused, ledger.totals.charged), (10, 10, 70));
    assert_eq!(ledger.workspace("w").unwrap().used, 70);
}

#[tokio::test]
async fn a_connection_serves_many_requests() {
    let simulator = start_with_keys("sk=1000").await;
    let stream = TcpStream::connect(simulator.address()).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    let _connection_task = Tasks::new().spawn_guarded(async move {
        let _ended = connection.await;
    });
    for key in ["sk", "unknown", "sk"] {
        let request = Request::post(SPEECH_PATH)
            .header("xi-api-key", key)
            .body(Full::<Bytes>::from(r#"{"text":"a"}"#))
            .unwrap();
        sender.ready().await.unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status() == 200, key == "sk");
        response.into_body().collect().await.unwrap();
    }
}
