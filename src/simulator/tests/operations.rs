//! Tests the operations of the table in `operations`: their required parts and permissions, costs, responses and
//! owners.

use super::*;
use crate::simulator::{KeyPlan, WorkspacePlan};
use serde_json::json;

const VOICE: &str = "21m00Tcm4TlvDq8ikWAM";

/// Creates a request whose form has the given `parts` and an upload of `bytes` bytes.
fn form_call(path: &str, parts: &[(&str, &str)], bytes: usize) -> SimulatorCall {
    let mut body = String::new();
    for (name, value) in parts {
        body.push_str(&format!("--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"));
    }
    body.push_str("--x\r\nContent-Disposition: form-data; name=\"audio\"; filename=\"a\"\r\n\r\n");
    body.push_str(&"a".repeat(bytes));
    body.push_str("\r\n--x--");
    post(path, body).header("content-type", "multipart/form-data; boundary=x")
}

fn charged_credits(simulator: &Simulator) -> u64 {
    simulator.ledger().totals.charged
}

#[tokio::test]
async fn a_changed_voice_is_as_long_as_the_upload_and_in_the_history() {
    let simulator = start_with_keys("sk=1000").await;
    for path in ["speech-to-speech", "voice-changer"] {
        let charged_before = charged_credits(&simulator);
        // Three seconds of audio and a header, at 1,000 credits per minute.
        let call = form_call(&format!("/v1/{path}/{VOICE}?output_format=pcm_16000"), &[], 50_000);
        let whole_response = call.key("sk").send_to(&simulator).await;
        assert_eq!((whole_response.status, whole_response.header("content-type")), (200, "audio/pcm"));
        assert_eq!(
            (whole_response.header("character-cost"), charged_credits(&simulator) - charged_before),
            ("67", 67)
        );
        assert_eq!(whole_response.body.len(), 4 * 32_000);
        let item = get(&format!("/v1/history/{}", whole_response.header("history-item-id")))
            .key("sk")
            .send_to(&simulator)
            .await;
        assert_eq!(item.json()["request_id"], whole_response.header("request-id"));
        let call = form_call(&format!("/v1/{path}/{VOICE}/stream?output_format=pcm_16000"), &[], 50_000);
        let stream = call.key("sk").send_to(&simulator).await;
        assert_eq!((stream.status, stream.header("transfer-encoding")), (200, "chunked"));
        assert_eq!(stream.body.len(), whole_response.body.len());
    }
    let unknown_voice =
        form_call("/v1/speech-to-speech/unknown-voice", &[], 10).key("sk").send_to(&simulator).await;
    assert_eq!(
        (unknown_voice.status, &unknown_voice.json()["detail"]["code"]),
        (404, &json!("voice_not_found"))
    );
}

#[tokio::test]
async fn an_operation_that_costs_credits_needs_its_parts_its_permission_and_its_credits() {
    let limited =
        KeyPlan { permissions: Some(vec!["text_to_speech".into()]), ..KeyPlan::new("limited", 100) };
    let simulator = start(Plan::with_keys([("poor", 0), ("rich", 100_000)]).with_key(limited)).await;
    let music = |path: &str| post(path, r#"{"prompt":"a tune"}"#);
    let calls: [(&str, &dyn Fn() -> SimulatorCall); 8] = [
        ("speech_to_speech", &|| form_call(&format!("/v1/speech-to-speech/{VOICE}"), &[], 9)),
        ("audio_isolation", &|| form_call("/v1/audio-isolation", &[], 9)),
        ("audio_isolation", &|| form_call("/v1/audio-isolation/stream", &[], 9)),
        ("dubbing_write", &|| form_call("/v1/dubbing", &[("target_lang", "de")], 9)),
        ("music_generation", &|| music("/v1/music")),
        ("music_generation", &|| music("/v1/music/stream")),
        ("music_generation", &|| music("/v1/music/detailed")),
        ("forced_alignment", &|| form_call("/v1/forced-alignment", &[("text", "a"), ("file", "b")], 9)),
    ];
    for (permission, call) in calls {
        let empty_reply =
            SimulatorCall { body: Bytes::from_static(b"{}"), ..call() }.key("rich").send_to(&simulator).await;
        assert_eq!(empty_reply.status, 422, "the operation with {permission} must require its parts");
        let refused_response = call().key("limited").send_to(&simulator).await.json();
        assert!(
            refused_response["detail"]["message"].as_str().unwrap().contains(permission),
            "the refusal must name {permission}: {refused_response}"
        );
        let poor_reply = call().key("poor").send_to(&simulator).await;
        assert_eq!(
            (poor_reply.status, &poor_reply.json()["detail"]["code"]),
            (401, &json!("quota_exceeded"))
        );
        let charged_before = charged_credits(&simulator);
        assert_eq!(
            call().key("rich").send_to(&simulator).await.status,
            200,
            "the operation with {permission} must be served"
        );
        assert!(
            charged_credits(&simulator) > charged_before,
            "the operation with {permission} must be charged"
        );
        // A scripted refusal also contains the cost.
        let needed_credits = format!("{} credits are required", charged_credits(&simulator) - charged_before);
        simulator.queue_faults("rich", vec!["quota".parse().unwrap()]);
        let refused_response = call().key("rich").send_to(&simulator).await;
        assert!(
            refused_response.text().contains(&needed_credits),
            "the refusal must contain {needed_credits:?}: {}",
            refused_response.text()
        );
    }
    assert_eq!(simulator.ledger().key("poor").unwrap().charged, 0);
}

#[tokio::test]
async fn a_dubbing_is_polled_by_its_own_workspace_until_it_is_done() {
    let simulator = start_with_keys("one=10000@a two=10000@b").await;
    let created = form_call("/v1/dubbing", &[("name", "A film"), ("target_lang", "de")], 16_000)
        .key("one")
        .send_to(&simulator)
        .await;
    let created_resource = created.json();
    assert_eq!(created_resource["expected_duration_sec"], 2);
    let id = created_resource["dubbing_id"].as_str().unwrap().to_owned();
    let read_path = |path: String, key: &'static str| get(&path).key(key).send_to(&simulator);
    let audio = |language: &str| format!("/v1/dubbing/{id}/audio/{language}");
    let dubbing_path = format!("/v1/dubbing/{id}");
    let early_reply = read_path(audio("de"), "one").await;
    assert_eq!((early_reply.status, &early_reply.json()["error"]), (425, &json!("dubbing_not_dubbed")));
    let mut statuses = Vec::new();
    for _ in 0..2 {
        let document = read_path(dubbing_path.clone(), "one").await.json();
        assert_eq!((&document["name"], &document["target_languages"]), (&json!("A film"), &json!(["de"])));
        statuses.push(document["status"].as_str().unwrap().to_owned());
    }
    assert_eq!(statuses, ["dubbing", "dubbed"]);
    let dubbed = read_path(audio("de"), "one").await;
    assert_eq!((dubbed.status, dubbed.header("content-type")), (200, "audio/mpeg"));
    let other_language = read_path(audio("fr"), "one").await;
    assert_eq!((other_language.status, &other_language.json()["error"]), (404, &json!("dubbing_not_found")));
    let list = read_path("/v1/dubbing".into(), "one").await.json();
    assert_eq!((&list["dubs"][0]["dubbing_id"], &list["has_more"]), (&json!(id), &json!(false)));

    let reply_to_other_key = read_path(dubbing_path.clone(), "two").await;
    assert_eq!(
        (reply_to_other_key.status, &reply_to_other_key.json()["detail"]["code"]),
        (404, &json!("dubbing_not_found"))
    );
    assert_eq!(read_path(audio("de"), "two").await.status, 404);
    assert_eq!(read_path("/v1/dubbing".into(), "two").await.json()["dubs"], json!([]));
    let delete_dubbing = |key: &'static str| {
        SimulatorCall { method: "DELETE", ..get(&dubbing_path) }.key(key).send_to(&simulator)
    };
    assert_eq!(delete_dubbing("two").await.status, 404);
    assert_eq!((delete_dubbing("one").await.status, delete_dubbing("one").await.status), (200, 404));
}

#[tokio::test]
async fn a_project_is_kept_by_its_own_workspace() {
    let simulator = start_with_keys("one=10@a two=10@b").await;
    assert_eq!(form_call("/v1/studio/projects", &[], 1).key("one").send_to(&simulator).await.status, 422);
    let created_resource = form_call("/v1/studio/projects", &[("name", "A book")], 1)
        .key("one")
        .send_to(&simulator)
        .await
        .json();
    let id = created_resource["project"]["project_id"].as_str().unwrap().to_owned();
    let path = format!("/v1/studio/projects/{id}");
    assert_eq!(get(&path).key("one").send_to(&simulator).await.json()["name"], "A book");
    let list = get("/v1/studio/projects").key("one").send_to(&simulator).await.json();
    assert_eq!(list["projects"][0]["project_id"], json!(id));
    let reply_to_other_key = get(&path).key("two").send_to(&simulator).await;
    assert_eq!(
        (reply_to_other_key.status, &reply_to_other_key.json()["detail"]["code"]),
        (404, &json!("project_not_found"))
    );
    // A dubbing with the same identifier does not exist.
    assert_eq!(get(&format!("/v1/dubbing/{id}")).key("one").send_to(&simulator).await.status, 404);
    assert_eq!(charged_credits(&simulator), 0);
}

#[tokio::test]
async fn the_headers_of_music_name_the_song_and_not_its_cost() {
    let simulator = start(
        Plan::with_keys([])
            .with_workspace(WorkspacePlan::of_tier("pro", 100_000, "pro"))
            .with_key(KeyPlan { workspace: Some("pro".into()), ..KeyPlan::new("sk", 0) }),
    )
    .await;
    let body = r#"{"prompt":"a tune","music_length_ms":6000}"#;
    let mut lengths = Vec::new();
    for path in ["/v1/music", "/v1/music/stream"] {
        let reply = post(&format!("{path}?output_format=pcm_8000"), body).key("sk").send_to(&simulator).await;
        assert_eq!((reply.status, reply.header("content-type")), (200, "audio/pcm"));
        assert_eq!((reply.header("song-id").len(), reply.header("character-cost")), (32, ""));
        lengths.push(reply.body.len());
    }
    assert_eq!(lengths, [6 * 16_000; 2]);
    assert_eq!(
        charged_credits(&simulator),
        600,
        "two songs of six seconds must cost fifty credits per second"
    );

    let detailed =
        post("/v1/music/detailed?output_format=pcm_8000", body).key("sk").send_to(&simulator).await;
    assert_eq!(detailed.header("content-type"), "multipart/mixed; boundary=simulated-song");
    let text = String::from_utf8_lossy(&detailed.body);
    let parts: Vec<&str> = text.split("--simulated-song").collect();
    assert_eq!((parts.len(), parts[0], parts[3]), (4, "", "--\r\n"));
    let (head, metadata) = parts[1].split_once("\r\n\r\n").unwrap();
    assert_eq!(head, "\r\nContent-Type: application/json");
    let metadata: Value = serde_json::from_str(metadata).unwrap();
    assert_eq!(metadata["composition_plan"]["sections"][0]["duration_ms"], 6_000);
    assert!(parts[2].starts_with("\r\nContent-Type: audio/pcm\r\n"));

    let plan = post("/v1/music/plan", body).key("sk").send_to(&simulator).await;
    assert_eq!((plan.status, &plan.json()["sections"][0]["duration_ms"]), (200, &json!(6_000)));
    let body_with_plan = json!({ "composition_plan": plan.json() }).to_string();
    assert_eq!(post("/v1/music", body_with_plan).key("sk").send_to(&simulator).await.status, 200);
}

#[tokio::test]
async fn an_alignment_contains_the_words_of_the_sent_text() {
    let simulator = start_with_keys("sk=100").await;
    let call = form_call("/v1/forced-alignment", &[("text", "hi you"), ("file", "sound")], 16_000);
    let reply = call.key("sk").send_to(&simulator).await;
    let document = reply.json();
    assert_eq!(reply.header("character-cost"), "2");
    let words: Vec<_> = document["words"].as_array().unwrap().iter().map(|word| &word["text"]).collect();
    assert_eq!(words, ["hi", "you"]);
    assert_eq!(document["characters"][5]["end"], 2.0);
}
