//! Tests features that depend on the plan of a workspace: voices of the library, the wording of refusals, formats,
//! models, clones, the form in which the subscription reports the credits, and the region.

use super::sockets::{SPEECH, connect};
use super::*;
use crate::simulator::{KeyPlan, RefusalWording, ReportedLimit, WorkspacePlan};
use serde_json::json;

/// The path for speech with the voice of the library.
const LIBRARY: &str = "/v1/text-to-speech/HuLbOdhRlvQQN8oPP0AJ";

/// Creates a plan with a workspace for each tier, and a key with the name of the tier.
fn plan_with_tiers<const N: usize>(names: [&str; N]) -> Plan {
    names.into_iter().fold(Plan::with_keys([]), |plan, name| {
        plan_with_workspace(plan, WorkspacePlan::of_tier(name, 100_000, name))
    })
}

/// Adds a workspace to the plan, and a key with the name of the workspace.
fn plan_with_workspace(plan: Plan, workspace: WorkspacePlan) -> Plan {
    let key = KeyPlan { workspace: Some(workspace.name.clone()), ..KeyPlan::new(&workspace.name, 0) };
    plan.with_workspace(workspace).with_key(key)
}

/// Creates a request for a voice clone.
fn clone_call() -> SimulatorCall {
    post("/v1/voices/add", "--x\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nMine\r\n--x--")
}

/// Returns the status, and the most specific name of the refusal.
fn status_and_name(reply: &SimulatorReply) -> (u16, String) {
    let name = if reply.status < 400 { Value::Null } else { reply.json()["detail"]["status"].clone() };
    (reply.status, name.as_str().unwrap_or_default().to_owned())
}

#[tokio::test]
async fn the_library_is_for_paid_plans() {
    let simulator = start_with_keys("free=100:tier=free starter=100:tier=starter").await;
    let request_speech = |key: &'static str| post(LIBRARY, r#"{"text":"a"}"#).key(key).send_to(&simulator);
    assert_eq!(status_and_name(&request_speech("free").await), (402, "payment_required".into()));
    assert_eq!(request_speech("starter").await.status, 200);
    assert_eq!(get("/v1/shared-voices").key("free").send_to(&simulator).await.json()["total_count"], 1);
    let add_voice = |key: &'static str| {
        post("/v1/voices/add/owner/HuLbOdhRlvQQN8oPP0AJ", r#"{"new_name":"Mine"}"#)
            .key(key)
            .send_to(&simulator)
    };
    assert_eq!(status_and_name(&add_voice("free").await), (402, "payment_required".into()));
    assert_eq!(add_voice("starter").await.json()["voice_id"], "HuLbOdhRlvQQN8oPP0AJ");
    let unknown_voice = post("/v1/voices/add/owner/unknown-voice", r#"{"new_name":"Mine"}"#)
        .key("starter")
        .send_to(&simulator)
        .await;
    assert_eq!(unknown_voice.status, 404);
    assert_eq!(simulator.ledger().totals.charged, 1);
}

#[tokio::test]
async fn a_workspace_refuses_in_its_own_wording() {
    for (wording, library, cloning, length_code) in [
        (
            RefusalWording::Current,
            (402, "payment_required"),
            (400, "can_not_use_instant_voice_cloning"),
            "text_too_long",
        ),
        (
            RefusalWording::Old400,
            (400, "free_users_not_allowed"),
            (400, "can_not_use_instant_voice_cloning"),
            "",
        ),
        (RefusalWording::Old402, (402, "payment_required"), (402, "can_not_use_instant_voice_cloning"), ""),
    ] {
        let free_plan = WorkspacePlan { wording, ..WorkspacePlan::of_tier("free", 100_000, "free") };
        let simulator = start(plan_with_workspace(Plan::with_keys([]), free_plan)).await;
        let reply = post(LIBRARY, r#"{"text":"a"}"#).key("free").send_to(&simulator).await;
        assert_eq!(status_and_name(&reply), (library.0, library.1.into()));
        assert_eq!(
            status_and_name(&clone_call().key("free").send_to(&simulator).await),
            (cloning.0, cloning.1.into())
        );
        let long = speech_call(&"a".repeat(2_501)).key("free").send_to(&simulator).await;
        assert_eq!(status_and_name(&long), (400, "max_character_limit_exceeded".into()));
        assert_eq!(long.json()["detail"]["code"].as_str().unwrap_or_default(), length_code);
        let refusal = long.text();
        assert!(
            refusal.contains("2501 characters") && refusal.contains("2500"),
            "the refusal must contain the length and the maximum: {refusal}"
        );
    }
}

#[tokio::test]
async fn a_format_needs_its_plan_over_http_and_on_a_socket() {
    let tier_names = ["free", "starter", "creator", "pro", "scale"];
    let simulator = start(plan_with_tiers(tier_names)).await;
    for (format, min_tier, plan) in [
        ("mp3_44100_128", "free", ""),
        ("pcm_24000", "free", ""),
        ("wav_48000", "free", ""),
        ("mp3_44100_192", "creator", "Creator"),
        ("pcm_44100", "pro", "Pro"),
        ("wav_44100", "pro", "Pro"),
    ] {
        let first_tier = tier_names.iter().position(|tier| *tier == min_tier).unwrap();
        for (rank, key) in tier_names.into_iter().enumerate() {
            let call = post(&format!("{SPEECH_PATH}?output_format={format}"), r#"{"text":"a"}"#);
            let reply = call.key(key).send_to(&simulator).await;
            if rank >= first_tier {
                assert_eq!(reply.status, 200, "{key} must include {format}");
                continue;
            }
            let message = format!("Output format '{format}' is only available on the {plan} tier and above.");
            assert_eq!(
                status_and_name(&reply),
                (403, "output_format_not_allowed".into()),
                "{key} must not include {format}"
            );
            assert_eq!(reply.json()["detail"]["message"], message);
            let mut client = connect(&simulator, &format!("{SPEECH}?output_format={format}"), key).await;
            client.send_json(json!({ "text": " " })).await;
            let refusal = json!({ "message": message, "error": "output_format_not_allowed", "code": 1_008 });
            assert_eq!(client.receive_json().await, refusal);
            assert_eq!(client.receive_close().await, (1_008, message));
        }
    }
}

#[tokio::test]
async fn a_denied_model_is_still_listed() {
    let denied =
        WorkspacePlan { denied_models: vec!["eleven_v4".into()], ..WorkspacePlan::new("narrow", 100_000) };
    let simulator = start(plan_with_workspace(plan_with_tiers(["pro"]), denied)).await;
    let request_speech = |key: &'static str| {
        post(SPEECH_PATH, r#"{"text":"a","model_id":"eleven_v4"}"#).key(key).send_to(&simulator)
    };
    assert_eq!(status_and_name(&request_speech("narrow").await), (403, "model_access_denied".into()));
    assert_eq!(request_speech("pro").await.status, 200);
    for (key, expected) in [("narrow", true), ("pro", false)] {
        let models = get("/v1/models").key(key).send_to(&simulator).await.json();
        let model = models.as_array().unwrap().iter().find(|model| model["model_id"] == "eleven_v4").unwrap();
        assert_eq!(model["requires_alpha_access"], expected);
        assert_eq!(model["max_characters_request_free_user"], 2_500);
        assert_eq!(model["max_characters_request_subscribed_user"], 10_000);
    }
}

#[tokio::test]
async fn a_clone_takes_a_slot_until_it_is_removed() {
    let narrow = WorkspacePlan { voice_limit: Some(1), ..WorkspacePlan::new("narrow", 100) };
    let simulator = start(plan_with_workspace(plan_with_tiers(["free", "pro"]), narrow)).await;
    let slots = async |key: &str| {
        let subscription = get("/v1/user/subscription").key(key).send_to(&simulator).await.json();
        ["voice_slots_used", "voice_limit", "voice_add_edit_counter"]
            .map(|name| subscription[name].as_u64().unwrap())
    };
    assert_eq!(slots("narrow").await, [0, 1, 0]);
    let voice =
        clone_call().key("narrow").send_to(&simulator).await.json()["voice_id"].as_str().unwrap().to_owned();
    assert_eq!(slots("narrow").await, [1, 1, 1]);
    let full = clone_call().key("narrow").send_to(&simulator).await;
    assert_eq!(status_and_name(&full), (400, "voice_limit_reached".into()));
    assert!(full.text().contains("(1 / 1)"), "the refusal must contain the slots: {}", full.text());
    assert_eq!(clone_call().key("pro").send_to(&simulator).await.status, 200);
    assert_eq!(slots("pro").await, [1, 160, 1]);
    let removal = SimulatorCall { method: "DELETE", ..get(&format!("/v1/voices/{voice}")) };
    assert_eq!(removal.key("narrow").send_to(&simulator).await.status, 200);
    assert_eq!(slots("narrow").await, [0, 1, 1]);
    assert_eq!(clone_call().key("narrow").send_to(&simulator).await.status, 200);
    assert_eq!(
        status_and_name(&clone_call().key("free").send_to(&simulator).await),
        (400, "can_not_use_instant_voice_cloning".into())
    );
}

#[tokio::test]
async fn a_professional_voice_has_separate_slots() {
    let simulator = start(plan_with_tiers(["starter", "creator"])).await;
    let create_voice =
        |key: &'static str, body: &'static str| post("/v1/voices/pvc", body).key(key).send_to(&simulator);
    let body = r#"{"name":"Mine","language":"en"}"#;
    assert_eq!(
        status_and_name(&create_voice("starter", body).await),
        (403, "can_not_use_professional_voice_cloning".into())
    );
    assert_eq!(create_voice("creator", r#"{"name":"Mine"}"#).await.status, 422);
    let voice = create_voice("creator", body).await.json()["voice_id"].as_str().unwrap().to_owned();
    let speech = post(&format!("/v1/text-to-speech/{voice}"), r#"{"text":"a"}"#);
    assert_eq!(speech.key("creator").send_to(&simulator).await.status, 200);
    assert_eq!(status_and_name(&create_voice("creator", body).await), (400, "voice_limit_reached".into()));
    for (key, expected) in [("starter", (false, 0, 0, 0)), ("creator", (true, 1, 1, 0))] {
        let subscription = get("/v1/user/subscription").key(key).send_to(&simulator).await.json();
        let number = |name: &str| subscription[name].as_u64().unwrap();
        let can_clone = subscription["can_use_professional_voice_cloning"].as_bool().unwrap();
        let used_slots = number("professional_voice_slots_used");
        let reported_slots =
            (can_clone, number("professional_voice_limit"), used_slots, number("voice_slots_used"));
        assert_eq!(reported_slots, expected, "the slots of {key} must be reported");
    }
}

#[tokio::test]
async fn the_credits_of_a_pay_as_you_go_workspace_are_not_reported() {
    for (reported_limit, expected) in
        [(ReportedLimit::Zero, Value::from(0)), (ReportedLimit::Absent, Value::Null)]
    {
        let simulator = if reported_limit == ReportedLimit::Zero {
            start_with_keys("payg=8:tier=payg").await
        } else {
            start(plan_with_workspace(
                Plan::with_keys([]),
                WorkspacePlan::pay_as_you_go("payg", 8, reported_limit),
            ))
            .await
        };
        assert_eq!(speech_call("hello").key("payg").send_to(&simulator).await.status, 200);
        let subscription = get("/v1/user/subscription").key("payg").send_to(&simulator).await.json();
        let user = get("/v1/user").key("payg").send_to(&simulator).await.json();
        for subscription in [&subscription, &user["subscription"]] {
            assert_eq!(
                (&subscription["tier"], &subscription["character_count"]),
                (&json!("payg"), &json!(5))
            );
            assert_eq!(subscription["character_limit"], expected);
            assert_eq!(subscription.get("character_limit").is_some(), reported_limit == ReportedLimit::Zero);
            assert_eq!(subscription["next_character_count_reset_unix"], Value::Null);
        }
        // The credits of these workspaces can also run out.
        let refused_reply = speech_call("hello").key("payg").send_to(&simulator).await;
        assert_eq!(status_and_name(&refused_reply), (401, "quota_exceeded".into()));
    }
}

#[tokio::test]
async fn a_key_of_another_region_is_refused_with_that_reason() {
    let global_simulator = start(Plan::with_keys([("sk", 100)]).with_other_region_key("eu")).await;
    let message = "Invalid API key: The API key used is for a data residency stack, however this server is a global \
        server. Please check you are calling the correct API URL.";
    for call in [speech_call("a"), get("/v1/user/subscription"), get("/v1/models"), get("/v1/voices")] {
        let reply = call.key("eu").send_to(&global_simulator).await;
        assert_eq!((reply.status, &reply.json()["detail"]["message"]), (401, &json!(message)));
        assert_eq!(reply.header("x-region"), "us-central1");
    }
    let mut client = connect(&global_simulator, SPEECH, "eu").await;
    client.send_json(json!({ "text": " " })).await;
    assert_eq!(
        client.receive_json().await,
        json!({ "message": message, "error": "invalid_api_key", "code": 1_008 })
    );
    assert_eq!(client.receive_close().await, (1_008, message[..120].to_owned()));
    let ledger = global_simulator.ledger();
    assert_eq!((ledger.requests[0].key.as_deref(), ledger.totals.charged), (Some("elsewhere"), 0));

    let residency_simulator =
        start(Plan { region: "eu-west".into(), ..Plan::with_keys([("eu", 100)]) }).await;
    let reply = speech_call("a").key("eu").send_to(&residency_simulator).await;
    assert_eq!((reply.status, reply.header("x-region")), (200, "eu-west"));
    let reply = speech_call("a").key("sk").send_to(&residency_simulator).await;
    assert_eq!((reply.status, &reply.json()["detail"]["message"]), (401, &json!("Invalid API key")));
}

#[tokio::test]
async fn a_key_cannot_belong_to_two_regions() {
    let error = Plan::with_keys([("sk", 1)]).with_other_region_key("sk").validate().unwrap_err();
    assert_eq!(error.to_string(), "key 1 is also a key of another region");
}
