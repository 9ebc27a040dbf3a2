//! Tests the refusals over HTTP: their order, their exact status and body, and the numbers in their texts. Operations
//! cause some of them, and scripted faults cause the others.

use super::*;
use crate::simulator::{Billing, KeyPlan, WorkspacePlan};

/// Compares the status, the headers and the whole body of a refusal. `$ID` in the expected body stands for the trace
/// ID.
#[track_caller]
fn check_refusal(reply: &SimulatorReply, status: u16, body: &str) {
    let id = reply.header("x-trace-id");
    assert_eq!(id.len(), 32);
    assert_eq!(reply.text(), body.replace("$ID", id));
    assert_eq!(reply.status, status);
    assert_eq!(reply.header("content-type"), "application/json");
    assert_eq!(reply.header("x-region"), "us-central1");
    assert_eq!(reply.header("character-cost"), "");
}

/// Creates the expected body in the current format.
fn typed_body(kind: &str, code: &str, message: &str, status: &str) -> String {
    format!(
        r#"{{"detail":{{"type":"{kind}","code":"{code}","message":"{message}","status":"{status}","request_id":"$ID","param":null}}}}"#
    )
}

/// Creates a plan with one workspace and its key `sk`.
fn plan_with_workspace(plan: WorkspacePlan) -> Plan {
    let key = KeyPlan { workspace: Some(plan.name.clone()), ..KeyPlan::new("sk", 0) };
    Plan { workspaces: vec![plan], keys: vec![key], ..Plan::with_keys([]) }
}

#[tokio::test]
async fn a_quota_refusal_reports_the_remaining_and_the_needed_credits() {
    let simulator = start_with_keys("sk=10").await;
    assert_eq!(speech_call("1234567").key("sk").send_to(&simulator).await.status, 200);
    check_refusal(
        &speech_call("1234").key("sk").send_to(&simulator).await,
        401,
        &typed_body(
            "invalid_request",
            "quota_exceeded",
            "This request exceeds your quota of 10. You have 3 credits remaining, while 4 credits are required for this request.",
            "quota_exceeded",
        ),
    );
    assert_eq!(speech_call("123").key("sk").send_to(&simulator).await.status, 200);
}

#[tokio::test]
async fn the_refusal_of_a_cap_contains_the_name_of_the_key_and_not_the_key() {
    let simulator = start_with_keys("sk=1000:cap=5").await;
    check_refusal(
        &speech_call("123456").key("sk").send_to(&simulator).await,
        401,
        &typed_body(
            "invalid_request",
            "quota_exceeded",
            "This request exceeds your API key (key 1) quota of 5. You have 5 credits remaining, while 6 credits are required for this request.",
            "quota_exceeded",
        ),
    );
    let subscription = get("/v1/user/subscription").key("sk").send_to(&simulator).await.json();
    assert_eq!(subscription["character_count"], 0, "the subscription must not report the cap");
}

#[tokio::test]
async fn a_wrong_missing_or_limited_key_is_refused() {
    let key = KeyPlan { permissions: Some(vec!["text_to_speech".into()]), ..KeyPlan::new("sk", 100) };
    let simulator = start(Plan { keys: vec![key], ..Plan::default() }).await;
    let key_refusal = |message, status| typed_body("authentication_error", "unauthorized", message, status);
    check_refusal(
        &speech_call("a").key("other").send_to(&simulator).await,
        401,
        &key_refusal("Invalid API key", "invalid_api_key"),
    );
    let no_key = "Neither authorization header nor xi-api-key received, please provide one.";
    check_refusal(
        &speech_call("a").send_to(&simulator).await,
        401,
        &key_refusal(no_key, "needs_authorization"),
    );
    let missing_permission =
        "The API key you used is missing the permission user_read to execute this operation.";
    check_refusal(
        &get("/v1/user/subscription").key("sk").send_to(&simulator).await,
        401,
        &key_refusal(missing_permission, "missing_permissions"),
    );
    assert_eq!(speech_call("a").key("sk").send_to(&simulator).await.status, 200);
}

#[tokio::test]
async fn a_request_without_a_key_lists_public_voices_and_no_models() {
    let simulator = start_with_keys("sk=10").await;
    let message = "Workspace 1anonymous1 not found.";
    let expected = typed_body("not_found", "workspace_not_found", message, "workspace_not_found");
    check_refusal(&get("/v1/models").send_to(&simulator).await, 404, &expected);
    assert_eq!(get("/v1/voices").send_to(&simulator).await.json()["voices"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn an_unpaid_bill_refuses_operations_and_allows_reading() {
    let simulator = start(plan_with_workspace(WorkspacePlan {
        billing: Billing::PastDue,
        ..WorkspacePlan::new("w", 10)
    }))
    .await;
    check_refusal(
        &speech_call("a").key("sk").send_to(&simulator).await,
        401,
        &typed_body(
            "payment_required",
            "payment_issue",
            "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage.",
            "payment_issue",
        ),
    );
    let subscription = get("/v1/user/subscription").key("sk").send_to(&simulator).await;
    assert_eq!((subscription.status, &subscription.json()["status"]), (200, &Value::from("past_due")));
}

#[tokio::test]
async fn a_disabled_free_account_is_refused_in_the_old_format() {
    let plan = WorkspacePlan { billing: Billing::FreeDisabled, ..WorkspacePlan::new("w", 10) };
    check_refusal(
        &speech_call("a").key("sk").send_to(&start(plan_with_workspace(plan)).await).await,
        401,
        r#"{"detail":{"status":"detected_unusual_activity","message":"Unusual activity detected. Free Tier usage disabled. If you are using proxy/VPN you might need to purchase a Paid Plan to not trigger our abuse detectors. Free Tier only works if users do not abuse it, for example by creating multiple free accounts."}}"#,
    );
}

#[tokio::test]
async fn the_schema_is_checked_before_the_key() {
    let simulator = start_with_keys("sk=10").await;
    let missing_text =
        r#"{"detail":[{"type":"missing","loc":["body","text"],"msg":"Field required","input":{}}]}"#;
    for key in ["sk", "other"] {
        check_refusal(&post(SPEECH_PATH, "{}").key(key).send_to(&simulator).await, 422, missing_text);
        check_refusal(&post(SPEECH_PATH, "").key(key).send_to(&simulator).await, 422, missing_text);
    }
    check_refusal(
        &post(SPEECH_PATH, "{").send_to(&simulator).await,
        422,
        r#"{"detail":[{"type":"json_invalid","loc":["body"],"msg":"JSON decode error","input":{}}]}"#,
    );
    check_refusal(
        &post(SPEECH_PATH, r#"{"text":5}"#).send_to(&simulator).await,
        422,
        r#"{"detail":[{"type":"string_type","loc":["body","text"],"msg":"Input should be a valid string","input":{}}]}"#,
    );
    check_refusal(
        &post("/v1/speech-to-text", "x").send_to(&simulator).await,
        422,
        r#"{"detail":[{"type":"missing","loc":["body","model_id"],"msg":"Field required","input":{}}]}"#,
    );
}

#[tokio::test]
async fn a_requested_object_must_exist() {
    let simulator = start_with_keys("sk=100000").await;
    let no_voice = "A voice with voice ID 'unknown-voice' was not found.";
    check_refusal(
        &post("/v1/text-to-speech/unknown-voice", r#"{"text":"a"}"#).key("sk").send_to(&simulator).await,
        404,
        &typed_body("not_found", "voice_not_found", no_voice, "voice_not_found"),
    );
    let no_model = "A model with model ID 'm' was not found.";
    check_refusal(
        &post(SPEECH_PATH, r#"{"text":"a","model_id":"m"}"#).key("sk").send_to(&simulator).await,
        400,
        &typed_body("not_found", "model_not_found", no_model, "model_not_found"),
    );
    check_refusal(
        &speech_call("").key("sk").send_to(&simulator).await,
        400,
        &typed_body("validation_error", "empty_text", "The text must not be empty.", "empty_text"),
    );
    check_refusal(
        &speech_call(&"a".repeat(10_001)).key("sk").send_to(&simulator).await,
        400,
        &typed_body(
            "validation_error",
            "text_too_long",
            "The text is too long for the model 'eleven_multilingual_v2': 10001 characters, where 10000 are allowed.",
            "max_character_limit_exceeded",
        ),
    );
    let opus = post(&format!("{SPEECH_PATH}?output_format=opus_48000_32"), r#"{"text":"a"}"#)
        .key("sk")
        .send_to(&simulator)
        .await;
    assert_eq!((opus.status, &opus.json()["detail"]["code"]), (400, &Value::from("invalid_output_format")));
    assert!(opus.text().contains("'opus_48000_32' is not supported. Supported formats: mp3_22050_32, "));
    check_refusal(
        &get("/v1/history/none").key("sk").send_to(&simulator).await,
        404,
        &typed_body(
            "not_found",
            "history_item_not_found",
            "History item with ID 'none' was not found.",
            "history_item_not_found",
        ),
    );
    assert_eq!(simulator.ledger().totals.charged, 0, "a refusal must not be charged");
}

#[tokio::test]
async fn a_json_body_above_the_maximum_is_refused() {
    let simulator = start_with_keys("sk=10").await;
    let body = format!(r#"{{"text":"{}"}}"#, "a".repeat(1_048_576));
    check_refusal(
        &post(SPEECH_PATH, body).key("sk").send_to(&simulator).await,
        400,
        &typed_body(
            "invalid_request",
            "request_too_large",
            "The request body is larger than 1048576 bytes.",
            "request_too_large",
        ),
    );
}

#[tokio::test]
async fn the_refusal_of_an_unknown_path_or_method_has_only_a_text() {
    let simulator = start_with_keys("sk=10").await;
    check_refusal(&get("/v1/nothing").key("sk").send_to(&simulator).await, 404, r#"{"detail":"Not Found"}"#);
    let reply = get(SPEECH_PATH).key("sk").send_to(&simulator).await;
    check_refusal(&reply, 405, r#"{"detail":"Method Not Allowed"}"#);
    assert_eq!(reply.header("allow"), "POST");
}

/// Faults cause the refusals, with a key of 100 credits and a text of 4 characters.
#[tokio::test]
async fn a_scripted_refusal_has_its_exact_text() {
    let rate_refusal = |code, message| typed_body("rate_limit_error", code, message, code);
    let authorization_refusal = |code, message| typed_body("authorization_error", code, message, code);
    let payment_refusal = |code, message| typed_body("payment_required", code, message, code);
    let quota = "This request exceeds your quota of 100. You have 0 credits remaining, while 4 credits are required \
        for this request.";
    let cases = [
        ("quota", 401, typed_body("invalid_request", "quota_exceeded", quota, "quota_exceeded")),
        ("key_cap", 401, typed_body("invalid_request", "quota_exceeded", &quota.replace("your quota", "your API key (key 1) quota"), "quota_exceeded")),
        ("invalid_400", 400, typed_body("authentication_error", "invalid_api_key", "Invalid API key", "invalid_api_key")),
        ("insufficient_credits", 402, payment_refusal("insufficient_credits", "You do not have enough credits to complete this request.")),
        ("paid_plan_required", 402, payment_refusal("paid_plan_required", "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice.")),
        ("forbidden", 403, r#"{"detail":"Forbidden"}"#.to_owned()),
        ("workspace_access_denied", 403, authorization_refusal("workspace_access_denied", "You do not have access to this workspace.")),
        ("subscription_required", 403, authorization_refusal("subscription_required", "Your subscription does not include this feature. Please upgrade your subscription.")),
        ("quota_403", 403, format!(r#"{{"detail":{{"status":"quota_exceeded","message":"{quota}"}}}}"#)),
        ("rate_limit", 429, rate_refusal("rate_limit_exceeded", "Rate limit exceeded. Please slow down your requests.")),
        ("system_busy", 429, rate_refusal("system_busy", "Our services are experiencing high levels of traffic and cannot take your request. Please try again later.")),
        ("server_error", 500, r#"{"status":"internal_server_error","message":"Internal Server error. All such crashes are reported to us automatically."}"#.to_owned()),
        ("maintenance", 503, typed_body("service_unavailable", "maintenance", "The service is undergoing maintenance. Please try again later.", "maintenance")),
        ("voice_not_found", 404, typed_body("not_found", "voice_not_found", "A voice with voice ID '21m00Tcm4TlvDq8ikWAM' was not found.", "voice_not_found")),
        ("concurrency", 429, r#"{"detail":{"type":"rate_limit_error","code":"concurrent_limit_exceeded","message":"Too many concurrent requests. Your current subscription is associated with a maximum of 1 concurrent requests (running in parallel). Please upgrade your subscription or contact sales if you'd like to increase this limit.","status":"too_many_concurrent_requests","request_id":"$ID","param":null,"docs_url":"https://elevenlabs.io/docs/overview/models#concurrency-and-priority"}}"#.to_owned()),
    ];
    let simulator = start_with_keys("sk=100").await;
    for (name, status, body) in cases {
        simulator.queue_faults("sk", vec![name.parse().unwrap()]);
        let reply = speech_call("1234").key("sk").send_to(&simulator).await;
        check_refusal(&reply, status, &body);
        assert_eq!(reply.header("retry-after"), "", "{name} must have no retry time");
    }
    simulator.queue_faults("sk", vec!["rate_limit=7".parse().unwrap()]);
    assert_eq!(speech_call("1234").key("sk").send_to(&simulator).await.header("retry-after"), "7");
    assert_eq!(simulator.ledger().totals.charged, 0);
}

/// Faults cause the refusals of the table, with a key of 100 credits and a text of 4 characters in a format of the plan
/// Pro.
#[tokio::test]
async fn a_refusal_of_the_table_has_its_exact_text() {
    let old_format =
        |status, message: &str| format!(r#"{{"detail":{{"status":"{status}","message":"{message}"}}}}"#);
    let quota_message = |remaining, needed| {
        format!(
            "This request exceeds your quota of 100. You have {remaining} credits remaining, while {needed} credits are required for this request."
        )
    };
    let authorization_refusal =
        |code, status, message: &str| typed_body("authorization_error", code, message, status);
    let library = "Free users cannot use library voices via the API. Please upgrade your subscription to use this \
        voice.";
    let no_cloning = typed_body(
        "payment_required",
        "paid_plan_required",
        "Your subscription does not include instant voice cloning. Please upgrade your plan.",
        "can_not_use_instant_voice_cloning",
    );
    let wrong_host = "Invalid API key: The API key used is for a data residency stack, however this server is a \
        global server. Please check you are calling the correct API URL.";
    let cases = [
        ("quota_short", 401, typed_body("invalid_request", "quota_exceeded", &quota_message(3, 4), "quota_exceeded")),
        ("quota_words", 401, old_format("quota_exceeded", "This request exceeds your quota.")),
        ("quota_402", 402, typed_body("payment_required", "quota_exceeded", &quota_message(0, 4), "quota_exceeded")),
        (
            "quota_slots",
            401,
            typed_body(
                "invalid_request",
                "quota_exceeded",
                "You have reached your quota of custom voices (10 / 10). Please delete a voice or upgrade your subscription.",
                "quota_exceeded",
            ),
        ),
        ("wrong_host", 401, typed_body("authentication_error", "unauthorized", wrong_host, "invalid_api_key")),
        ("unauthorized", 401, r#"{"detail":"Unauthorized"}"#.to_owned()),
        (
            "sign_in_required",
            401,
            typed_body(
                "authentication_error",
                "sign_in_required",
                "You must be signed in to use this feature.",
                "sign_in_required",
            ),
        ),
        ("library_voice", 402, typed_body("payment_required", "paid_plan_required", library, "payment_required")),
        ("payment_required_plan", 402, old_format("payment_required", library)),
        (
            "free_users_not_allowed",
            400,
            old_format("free_users_not_allowed", "You need to be on the creator tier or above to use this voice."),
        ),
        (
            "output_format_not_allowed",
            403,
            authorization_refusal(
                "subscription_required",
                "output_format_not_allowed",
                "Output format 'wav_44100' is only available on the Pro tier and above.",
            ),
        ),
        (
            "model_access_denied",
            403,
            authorization_refusal(
                "model_access_denied",
                "model_access_denied",
                "You do not have access to the model 'eleven_v3'. Please upgrade your subscription.",
            ),
        ),
        (
            "feature_not_available",
            403,
            authorization_refusal(
                "feature_not_available",
                "feature_not_available",
                "This feature is not available on your subscription.",
            ),
        ),
        (
            "only_for_creator",
            403,
            old_format("only_for_creator+", "This feature is only available on the creator tier and above."),
        ),
        ("cloning_not_allowed", 400, no_cloning.clone()),
        ("cloning_not_allowed_402", 402, no_cloning),
        (
            "cloning_not_allowed_old",
            400,
            old_format(
                "can_not_use_instant_voice_cloning",
                "Your subscription has no access to use instant voice cloning, please upgrade.",
            ),
        ),
        (
            "professional_cloning_not_allowed",
            403,
            authorization_refusal(
                "subscription_required",
                "can_not_use_professional_voice_cloning",
                "Your subscription does not include professional voice cloning. Please upgrade your plan.",
            ),
        ),
        (
            "voice_limit_reached",
            400,
            old_format(
                "voice_limit_reached",
                "You have reached your maximum amount of custom voices (10 / 10). You can upgrade your subscription to increase your custom voice limit.",
            ),
        ),
        (
            "invalid_workspace_type",
            400,
            old_format("invalid_workspace_type", "Operation not supported on legacy workspace"),
        ),
        (
            "max_character_limit_exceeded",
            400,
            old_format(
                "max_character_limit_exceeded",
                "This request's text has 4 characters and exceeds the character limit of 3 characters for your subscription.",
            ),
        ),
        (
            "voice_not_found_400",
            400,
            old_format("voice_not_found", "A voice for the voice_id 21m00Tcm4TlvDq8ikWAM was not found."),
        ),
        (
            "voice_does_not_exist",
            400,
            old_format("voice_does_not_exist", "A voice with voice_id 21m00Tcm4TlvDq8ikWAM does not exist."),
        ),
        (
            "invalid_uid",
            400,
            old_format(
                "invalid_uid",
                "An invalid ID has been received: '21m00Tcm4TlvDq8ikWAM'. Make sure to provide a correct one.",
            ),
        ),
        (
            "model_not_found_404",
            404,
            typed_body(
                "not_found",
                "model_not_found",
                "A model with model ID 'eleven_v3' was not found.",
                "model_not_found",
            ),
        ),
        ("dubbing_not_found", 404, typed_body("not_found", "dubbing_not_found", "A dubbing with ID '21m00Tcm4TlvDq8ikWAM' was not found.", "dubbing_not_found")),
        ("project_not_found", 404, typed_body("not_found", "project_not_found", "A project with ID '21m00Tcm4TlvDq8ikWAM' was not found.", "project_not_found")),
        ("dubbing_language_not_found", 404, r#"{"error":"dubbing_not_found","message":"There is no dubbing for language 21m00Tcm4TlvDq8ikWAM."}"#.to_owned()),
        ("dubbing_not_dubbed", 425, r#"{"error":"dubbing_not_dubbed","message":"Dubbing has not finished yet."}"#.to_owned()),
    ];
    let simulator = start_with_keys("sk=100").await;
    for (name, status, body) in cases {
        simulator.queue_faults("sk", vec![name.parse().unwrap()]);
        let call = post(&format!("{SPEECH_PATH}?output_format=wav_44100"), r#"{"text":"1234"}"#);
        check_refusal(&call.key("sk").send_to(&simulator).await, status, &body);
    }
    assert_eq!(simulator.ledger().totals.charged, 0);
}

/// The numbers must be consistent even if the refusal is sent before the body is read.
#[tokio::test]
async fn the_numbers_of_a_scripted_refusal_are_consistent() {
    let simulator = start_with_keys("sk=20000").await;
    for (fault, expected) in [
        ("quota", "of 20000. You have 0 credits remaining, while 400 credits"),
        ("early:quota", "of 20000. You have 0 credits remaining, while 1 credits"),
        ("quota_403", "of 20000. You have 0 credits remaining, while 400 credits"),
        ("key_cap", "of 20000. You have 0 credits remaining, while 400 credits"),
        ("quota_short", "of 20000. You have 399 credits remaining, while 400 credits"),
        ("early:quota_short", "of 20000. You have 1 credits remaining, while 2 credits"),
    ] {
        simulator.queue_faults("sk", vec![fault.parse().unwrap()]);
        let reply = speech_call(&"a".repeat(400)).key("sk").send_to(&simulator).await;
        assert!(reply.text().contains(expected), "{fault} must contain {expected:?}: {}", reply.text());
    }
}
