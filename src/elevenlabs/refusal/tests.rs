//! Tests the classification of responses by captured and documented statuses, codes and messages, over HTTP and without
//! a status. Also tests the numbers of credits in a refusal, and the summary of a body.

use super::*;
use crate::policy::permission::Permission;
use crate::policy::verdict::{Shortfall, Subject};

const QUOTA_MESSAGE: &str = "This request exceeds your quota of 10000. You have 0 credits remaining, \
    while 43 credits are required for this request.";
const KEY_CAP_MESSAGE: &str = "This request exceeds your API key (production) quota of 5. You have 5 \
    credits remaining, while 1727 credits are required for this request.";
const CONCURRENCY_MESSAGE: &str = "Too many concurrent requests. Your current subscription is associated \
    with a maximum of 4 concurrent requests (running in parallel).";

const FORBIDDEN: Verdict = Verdict::Unexplained(UnexplainedRefusal::Forbidden);

/// Returns a body in the current format.
fn error_body(error_type: &str, code: &str, status: &str, message: &str) -> String {
    format!(
        r#"{{"detail":{{"type":"{error_type}","code":"{code}","status":"{status}","message":"{message}","request_id":"r"}}}}"#
    )
}

/// Compares the verdict of a response with the expected one.
#[track_caller]
fn check_verdict(status: u16, body: &str, expected: Verdict) {
    let body = ErrorBody::parse(body.as_bytes());
    assert_eq!(classify(StatusCode::from_u16(status).unwrap(), Some(&body), None), expected);
}

/// Returns a shortfall of credits without a quota.
fn shortfall(remaining: u64, required: u64) -> Shortfall {
    Shortfall { remaining: Some(remaining), required: Some(required), ..Shortfall::default() }
}

#[test]
fn an_account_without_credits_is_refused_with_the_numbers_of_credits() {
    let expected = Verdict::WorkspaceQuota(Shortfall { quota: Some(10_000), ..shortfall(0, 43) });
    check_verdict(
        401,
        &error_body("invalid_request", "quota_exceeded", "quota_exceeded", QUOTA_MESSAGE),
        expected,
    );
    check_verdict(
        401,
        &format!(r#"{{"detail":{{"status":"quota_exceeded","message":"{QUOTA_MESSAGE}"}}}}"#),
        expected,
    );
    check_verdict(401, &format!(r#"{{"detail":{{"message":"{QUOTA_MESSAGE}"}}}}"#), expected);
    check_verdict(403, &error_body("", "quota_exceeded", "", QUOTA_MESSAGE), expected);
}

#[test]
fn missing_or_malformed_numbers_are_unknown() {
    let unknown = Verdict::WorkspaceQuota(Shortfall::default());
    check_verdict(401, &error_body("", "quota_exceeded", "", "You have spent it all."), unknown);
    check_verdict(
        401,
        &error_body(
            "",
            "quota_exceeded",
            "",
            "You have 99999999999999999999999 credits remaining, while x credits are required",
        ),
        unknown,
    );
    check_verdict(
        401,
        &error_body(
            "",
            "quota_exceeded",
            "",
            "You have 1,234 credits remaining, while 5,000 credits are required",
        ),
        Verdict::WorkspaceQuota(shortfall(1234, 5000)),
    );
}

#[test]
fn a_key_at_its_limit_is_not_a_workspace_without_credits() {
    check_verdict(
        401,
        &error_body("invalid_request", "quota_exceeded", "quota_exceeded", KEY_CAP_MESSAGE),
        Verdict::KeyQuota(shortfall(5, 1727)),
    );
}

#[test]
fn payment_required_is_a_quota_unless_the_message_names_the_plan() {
    for body in [r#"{"detail":"Payment required"}"#, &error_body("payment_required", "", "", "Pay.")] {
        check_verdict(402, body, Verdict::WorkspaceQuota(Shortfall::default()));
    }
    let plan_feature = Verdict::PlanFeature;
    for (message, subject) in [
        ("This feature needs payment.", Subject::Unnamed),
        ("Free users cannot use library voices via the API.", Subject::Voice),
        ("Upgrade your plan to use this model.", Subject::Model),
        ("Your subscription does not allow this output format.", Subject::OutputFormat),
    ] {
        check_verdict(402, &error_body("x", "payment_required", "", message), plan_feature(subject));
        check_verdict(402, &error_body("", "", "payment_required", message), plan_feature(subject));
    }
    check_verdict(
        402,
        &error_body("payment_required", "insufficient_credits", "", "No."),
        Verdict::WorkspaceQuota(Shortfall::default()),
    );
    check_verdict(
        402,
        &error_body("payment_required", "paid_plan_required", "", "Free users cannot"),
        plan_feature(Subject::Unnamed),
    );
    check_verdict(
        400,
        r#"{"detail":{"status":"can_not_use_instant_voice_cloning","message":"x"}}"#,
        plan_feature(Subject::Cloning),
    );
}

#[test]
fn an_invalid_key_is_recognized_with_status_401_and_400() {
    check_verdict(
        401,
        &error_body("authentication_error", "unauthorized", "invalid_api_key", "Invalid API key"),
        Verdict::InvalidKey,
    );
    check_verdict(
        400,
        &error_body("authentication_error", "invalid_api_key", "", "Invalid API key"),
        Verdict::InvalidKey,
    );
}

#[test]
fn only_a_code_or_message_about_the_key_makes_it_invalid() {
    let unexplained = Verdict::Unexplained(UnexplainedRefusal::Unauthorized);
    for body in [
        r#"{"detail":"Unauthorized"}"#,
        &error_body("authentication_error", "sign_in_required", "", "Sign in."),
        &error_body("authentication_error", "unauthorized", "", "No."),
        &error_body("", "something_new", "", "Something new."),
    ] {
        check_verdict(401, body, unexplained);
    }
    check_verdict(
        402,
        &error_body("", "something_new", "", "Something new."),
        Verdict::Unexplained(UnexplainedRefusal::PaymentRequired),
    );
    check_verdict(403, &error_body("", "something_new", "", "Something new."), FORBIDDEN);
    check_verdict(
        429,
        &error_body("", "something_new", "", "Something new."),
        Verdict::Unexplained(UnexplainedRefusal::TooMany(None)),
    );
}

#[test]
fn a_key_of_another_region_is_not_invalid() {
    let message = "Invalid API key: The API key used is for a data residency stack, however this server \
        is a global server. Please check you are calling the correct API URL.";
    check_verdict(
        401,
        &error_body("authentication_error", "unauthorized", "invalid_api_key", message),
        Verdict::WrongHost,
    );
    assert_eq!(classify_without_status(&ErrorBody::from_close_reason(message)), Some(Verdict::WrongHost));
}

#[test]
fn a_quota_of_slots_is_not_a_quota_of_credits() {
    for message in [
        "You have reached your maximum amount of custom voices (10 / 10). You can upgrade your subscription.",
        "Your quota of voice slots is used up.",
    ] {
        check_verdict(401, &error_body("", "quota_exceeded", "", message), Verdict::Slots);
        check_verdict(400, &error_body("", "", "voice_limit_reached", message), Verdict::Slots);
    }
}

#[test]
fn a_refusal_of_a_plan_may_have_status_400_or_403() {
    let plan_feature = Verdict::PlanFeature;
    for (code, message, expected) in [
        (
            "free_users_not_allowed",
            "Free users are not allowed to use this voice.",
            plan_feature(Subject::Voice),
        ),
        ("max_character_limit_exceeded", "Too long.", plan_feature(Subject::TextLength)),
        ("invalid_workspace_type", "No.", plan_feature(Subject::Endpoint)),
        ("output_format_not_allowed", "No.", plan_feature(Subject::OutputFormat)),
        ("model_access_denied", "No.", plan_feature(Subject::Model)),
        ("voice_access_denied", "No.", plan_feature(Subject::Voice)),
        ("workspace_access_denied", "No.", plan_feature(Subject::Endpoint)),
    ] {
        for status in [400, 403] {
            check_verdict(status, &error_body("", "", code, message), expected);
        }
    }
}

#[test]
fn numbers_that_contradict_the_refusal_prove_nothing() {
    assert_eq!(shortfall(0, 43).credits(), Some((0, 43)));
    let is_proven = |quota, limit, extension| {
        Shortfall { quota, ..shortfall(0, 43) }.if_quota_matches(limit, extension).credits().is_some()
    };
    assert!(is_proven(Some(10_000), Some(10_000), 0) && is_proven(Some(12_000), Some(10_000), 2_000));
    assert!(is_proven(None, Some(10_000), 0) && is_proven(Some(10), None, 0));
    assert!(!is_proven(Some(10), Some(10_000), 0), "numbers of another quota must not be used");
    for (remaining, required) in [(43, 43), (20_000, 400)] {
        assert_eq!(shortfall(remaining, required).credits(), None);
    }
    let contradictory = Verdict::WorkspaceQuota(shortfall(20_000, 400));
    assert!(!contradictory.is_conclusive() && Verdict::WorkspaceQuota(shortfall(0, 1)).is_conclusive());
    assert!(!Verdict::InvalidKey.is_conclusive() && Verdict::Slots.is_conclusive());
}

#[test]
fn a_missing_permission_is_not_an_invalid_key() {
    let message = "The API key you used is missing the permission user_read to execute this operation.";
    check_verdict(
        401,
        &error_body("authentication_error", "unauthorized", "missing_permissions", message),
        Verdict::MissingPermission(Permission::parse("user_read")),
    );
    check_verdict(
        403,
        &error_body("authorization_error", "insufficient_permissions", "", "No."),
        Verdict::MissingPermission(None),
    );
}

#[test]
fn a_request_error_is_not_evidence_about_a_key() {
    for status in [400, 401] {
        check_verdict(status, &error_body("", "", "invalid_parameters", "No."), Verdict::RequestError);
        check_verdict(
            status,
            &error_body("validation_error", "invalid_voice_id", "", "No."),
            Verdict::RequestError,
        );
        check_verdict(
            status,
            &error_body("", "", "voice_not_found", "A voice with that ID was not found."),
            Verdict::NotFound,
        );
    }
}

#[test]
fn a_refusal_for_a_missing_key_is_not_evidence_about_the_key() {
    let verdict = Verdict::Unexplained(UnexplainedRefusal::Unauthorized);
    check_verdict(
        401,
        &error_body("", "", "needs_authorization", "Neither authorization header nor xi-api-key"),
        verdict,
    );
    check_verdict(401, &error_body("authentication_error", "missing_api_key", "", "No."), verdict);
    check_verdict(
        401,
        &error_body("authentication_error", "unauthorized", "invalid_authorization_header", "No."),
        verdict,
    );
}

#[test]
fn a_locked_account_is_abuse_or_billing() {
    check_verdict(
        401,
        &error_body("", "", "detected_unusual_activity", "Unusual activity detected."),
        Verdict::Abuse,
    );
    check_verdict(401, &error_body("payment_required", "payment_issue", "", "Past due."), Verdict::Billing);
}

#[test]
fn a_403_response_is_about_a_plan_or_ambiguous() {
    let plan_feature = Verdict::PlanFeature(Subject::Unnamed);
    check_verdict(403, &error_body("authorization_error", "subscription_required", "", ""), plan_feature);
    check_verdict(403, &error_body("authorization_error", "feature_not_available", "", ""), plan_feature);
    check_verdict(403, r#"{"detail":{"status":"only_for_creator+","message":""}}"#, plan_feature);
    check_verdict(403, &error_body("authorization_error", "forbidden", "", "Forbidden"), FORBIDDEN);
    check_verdict(403, "", FORBIDDEN);
    check_verdict(403, r#"{"error":"permission_denied","message":"no"}"#, FORBIDDEN);
}

#[test]
fn a_429_response_is_about_concurrency_overload_or_a_rate_limit() {
    let concurrency = Verdict::Concurrency { maximum: Some(4) };
    check_verdict(
        429,
        &error_body(
            "rate_limit_error",
            "concurrent_limit_exceeded",
            "too_many_concurrent_requests",
            CONCURRENCY_MESSAGE,
        ),
        concurrency,
    );
    check_verdict(
        429,
        &error_body("rate_limit_error", "concurrent_limit_exceeded", "", ""),
        Verdict::Concurrency { maximum: None },
    );
    check_verdict(429, &error_body("rate_limit_error", "system_busy", "", ""), Verdict::Busy);
    check_verdict(
        429,
        &error_body("rate_limit_error", "rate_limit_exceeded", "", ""),
        Verdict::RateLimited(None),
    );
    check_verdict(429, r#"{"detail":"Too many requests"}"#, Verdict::RateLimited(None));
    check_verdict(429, "", Verdict::Unexplained(UnexplainedRefusal::TooMany(None)));
    check_verdict(429, "error code: 1015", Verdict::Unexplained(UnexplainedRefusal::TooMany(None)));
}

#[test]
fn the_verdict_of_a_rate_limit_contains_the_retry_after_of_the_provider() {
    let retry_after = Some(Duration::from_secs(7));
    let verdict = classify(StatusCode::TOO_MANY_REQUESTS, Some(&ErrorBody::default()), retry_after);
    assert_eq!(verdict, Verdict::Unexplained(UnexplainedRefusal::TooMany(retry_after)));
    let body = ErrorBody::from_close_reason("rate_limit_exceeded");
    assert_eq!(
        classify(StatusCode::TOO_MANY_REQUESTS, Some(&body), retry_after),
        Verdict::RateLimited(retry_after)
    );
}

#[test]
fn an_unreadable_body_is_classified_by_its_status() {
    for (status, expected) in [
        (401, Verdict::Unexplained(UnexplainedRefusal::Unauthorized)),
        (402, Verdict::Unexplained(UnexplainedRefusal::PaymentRequired)),
        (403, Verdict::Unexplained(UnexplainedRefusal::Forbidden)),
        (429, Verdict::Unexplained(UnexplainedRefusal::TooMany(None))),
        (400, Verdict::Unreadable),
        (404, Verdict::Unreadable),
    ] {
        assert_eq!(
            classify_unreadable(StatusCode::from_u16(status).unwrap(), None),
            expected,
            "a {status} response with an unreadable body must have the expected verdict"
        );
    }
}

#[test]
fn a_schema_error_is_not_evidence_about_the_key() {
    check_verdict(
        422,
        r#"{"detail":[{"type":"missing","loc":["body","text"],"msg":"Field required"}]}"#,
        Verdict::RequestError,
    );
    check_verdict(422, &error_body("", "invalid_api_key", "", "Invalid API key"), Verdict::RequestError);
}

#[test]
fn errors_of_the_client_are_request_errors() {
    check_verdict(400, &error_body("validation_error", "empty_text", "", ""), Verdict::RequestError);
    check_verdict(400, r#"{"error":"invalid_request","message":"x"}"#, Verdict::RequestError);
    check_verdict(409, "", Verdict::RequestError);
    check_verdict(405, r#"{"detail":"Method Not Allowed"}"#, Verdict::RequestError);
}

#[test]
fn a_missing_resource_is_not_found_with_status_404_and_400() {
    // A 404 response that names no resource is about the endpoint, which is the same for all accounts.
    for body in [
        r#"{"detail":"Not Found"}"#,
        "",
        "<html>",
        r#"{"detail":{"status":"not_found","message":"Not Found"}}"#,
    ] {
        check_verdict(404, body, Verdict::RequestError);
    }
    for code in ["voice_does_not_exist", "history_item_not_found", "dubbing_not_found"] {
        check_verdict(400, &error_body("", "", code, "No."), Verdict::NotFound);
    }
    check_verdict(
        400,
        r#"{"detail":{"message":"A voice with voice_id x does not exist."}}"#,
        Verdict::NotFound,
    );
    check_verdict(
        404,
        r#"{"error":"transcript_not_found","message":"No transcript was found."}"#,
        Verdict::NotFound,
    );
    check_verdict(
        400,
        &error_body("", "", "voice_not_found", "A voice with that id was not found"),
        Verdict::NotFound,
    );
    check_verdict(
        404,
        &error_body("", "", "voice_not_found", "A voice with that id was not found"),
        Verdict::NotFound,
    );
}

#[test]
fn a_missing_model_is_a_request_error() {
    for status in [400, 404] {
        check_verdict(
            status,
            &error_body("not_found", "model_not_found", "", "A model"),
            Verdict::RequestError,
        );
    }
}

#[test]
fn a_failure_of_the_provider_is_not_evidence_about_the_key() {
    check_verdict(
        500,
        r#"{"status":"internal_server_error","message":"Internal Server error."}"#,
        Verdict::ServerError,
    );
    check_verdict(502, "", Verdict::ServerError);
    check_verdict(503, &error_body("service_unavailable", "maintenance", "", ""), Verdict::Busy);
}

#[test]
fn a_response_without_an_error_status_is_served() {
    for status in [200, 202, 204, 206, 301, 304] {
        check_verdict(status, &error_body("", "quota_exceeded", "", QUOTA_MESSAGE), Verdict::Served);
    }
}

#[test]
fn a_refusal_with_an_unknown_body_is_unexplained() {
    for body in [
        "",
        "<html>",
        "null",
        "[]",
        "1",
        r#"{"detail":null}"#,
        r#"{"detail":7}"#,
        r#"{"detail":{"code":7}}"#,
        "\u{0}",
    ] {
        check_verdict(401, body, Verdict::Unexplained(UnexplainedRefusal::Unauthorized));
        check_verdict(402, body, Verdict::Unexplained(UnexplainedRefusal::PaymentRequired));
        check_verdict(403, body, FORBIDDEN);
        check_verdict(429, body, Verdict::Unexplained(UnexplainedRefusal::TooMany(None)));
    }
}

#[test]
fn a_refusal_without_a_body_is_unexplained() {
    for status in [401, 402, 403, 429] {
        let verdict = classify(StatusCode::from_u16(status).unwrap(), None, None);
        assert_eq!(verdict, Verdict::Unexplained(UnexplainedRefusal::Bodiless));
    }
}

#[test]
fn a_summary_is_short_and_has_the_most_specific_code() {
    let body =
        ErrorBody::parse(error_body("payment_required", "paid_plan_required", "", "Free\\nusers").as_bytes());
    assert_eq!(body.summary(4), "paid_plan_required: free");
    assert_eq!(ErrorBody::parse(b"<html>").summary(9), "");
}

/// The test also covers a type without a known code.
#[test]
fn a_code_has_the_same_verdict_on_a_websocket_and_over_http() {
    for row in codes::DOCUMENTED_CODES.iter().chain(codes::OLDER_CODES) {
        let status = StatusCode::from_u16(row.status).unwrap();
        for code in row.codes {
            let body = ErrorBody::parse(error_body(row.error_type, code, "", "x").as_bytes());
            let expected = classify(status, Some(&body), None);
            assert_eq!(
                classify_without_status(&ErrorBody::from_close_reason(code)),
                Some(expected),
                "{code} must have the same verdict without a status"
            );
        }
        if !row.error_type.is_empty() {
            let body = ErrorBody::parse(error_body(row.error_type, "", "", "x").as_bytes());
            assert_eq!(
                classify_without_status(&body),
                Some(classify(status, Some(&body), None)),
                "the type {} must have the same verdict without a status",
                row.error_type
            );
        }
    }
}

/// The test covers responses with several statuses, and close frames, which have no status.
#[test]
fn a_known_message_is_classified_without_its_code() {
    let plan_feature = Verdict::PlanFeature;
    let missing_permission = Verdict::MissingPermission(Permission::parse("text_to_speech"));
    for (message, expected) in [
        (
            "The API key you used is missing the permission text_to_speech to execute this operation.",
            missing_permission,
        ),
        // The message is truncated to the maximum length of a close reason.
        ("The API key you used is missing the permission text_to_speech", missing_permission),
        (
            "Free users cannot use library voices via the API. Please upgrade your subscription.",
            plan_feature(Subject::Voice),
        ),
        (
            "Your subscription does not include this feature. Please upgrade your subscription.",
            plan_feature(Subject::Unnamed),
        ),
        (
            "Output format 'pcm_44100' is only available on the Pro tier and above.",
            plan_feature(Subject::OutputFormat),
        ),
        ("You do not have access to the model 'eleven_v3'.", plan_feature(Subject::Model)),
        ("Operation not supported on legacy workspace", plan_feature(Subject::Endpoint)),
        ("You do not have access to this workspace.", plan_feature(Subject::Endpoint)),
        (
            "This request's text has 9 characters and exceeds the character limit of 8 characters for your \
            subscription.",
            plan_feature(Subject::TextLength),
        ),
        (
            "You have reached your maximum amount of custom voices (3 / 3). You can upgrade your subscription.",
            Verdict::Slots,
        ),
        (
            "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage.",
            Verdict::Billing,
        ),
        (
            "You do not have enough credits to complete this request.",
            Verdict::WorkspaceQuota(Shortfall::default()),
        ),
        ("Unusual activity detected. Free Tier usage disabled.", Verdict::Abuse),
    ] {
        assert_eq!(
            classify_without_status(&ErrorBody::from_close_reason(message)),
            Some(expected),
            "the message {message:?} must have the expected verdict"
        );
        for status in [401, 403] {
            check_verdict(status, &error_body("", "", "", message), expected);
        }
    }
    let busy_message = "Our services are experiencing high levels of traffic and cannot take your request.";
    assert_eq!(classify_without_status(&ErrorBody::from_close_reason(busy_message)), Some(Verdict::Busy));
    check_verdict(429, &error_body("", "", "", busy_message), Verdict::Busy);
}

#[test]
fn advice_to_upgrade_because_of_credits_or_a_rate_is_not_a_refusal_of_the_plan() {
    let unexplained = Verdict::Unexplained(UnexplainedRefusal::Unauthorized);
    check_verdict(
        401,
        &error_body("", "", "", "Your credits are used up. Please upgrade your plan."),
        unexplained,
    );
    let too_many = Verdict::Unexplained(UnexplainedRefusal::TooMany(None));
    check_verdict(429, &error_body("", "", "", "Slow down, or upgrade your plan."), too_many);
}
