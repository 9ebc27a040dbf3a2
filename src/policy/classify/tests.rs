use super::*;
use crate::policy::permission::Permission;

const QUOTA: &str = "This request exceeds your quota of 10000. You have 0 credits remaining, while 43 credits are required for this request.";
const CAP: &str = "This request exceeds your API key (production) quota of 5. You have 5 credits remaining, while 1727 credits are required for this request.";
const BUSY: &str = "Too many concurrent requests. Your current subscription is associated with a maximum of 4 concurrent requests (running in parallel).";

const FORBIDDEN: Verdict = Verdict::Unexplained(Refusal::Forbidden);

/// A body of the current shape.
fn detail(kind: &str, code: &str, status: &str, message: &str) -> String {
    format!(
        r#"{{"detail":{{"type":"{kind}","code":"{code}","status":"{status}","message":"{message}","request_id":"r"}}}}"#
    )
}

#[track_caller]
fn check(status: u16, body: &str, expected: Verdict) {
    let body = ErrorBody::read(body.as_bytes());
    assert_eq!(classify(StatusCode::from_u16(status).unwrap(), Some(&body), None), expected);
}

fn shortfall(remaining: u64, required: u64) -> Shortfall {
    Shortfall { remaining: Some(remaining), required: Some(required) }
}

#[test]
fn an_empty_account_answers_401_with_two_numbers() {
    let expected = Verdict::WorkspaceQuota(shortfall(0, 43));
    check(401, &detail("invalid_request", "quota_exceeded", "quota_exceeded", QUOTA), expected);
    check(401, &format!(r#"{{"detail":{{"status":"quota_exceeded","message":"{QUOTA}"}}}}"#), expected);
    check(401, &format!(r#"{{"detail":{{"message":"{QUOTA}"}}}}"#), expected);
    check(403, &detail("", "quota_exceeded", "", QUOTA), expected);
}

#[test]
fn numbers_that_are_missing_or_absurd_are_unknown() {
    let unknown = Verdict::WorkspaceQuota(Shortfall::default());
    check(401, &detail("", "quota_exceeded", "", "You have spent it all."), unknown);
    check(
        401,
        &detail(
            "",
            "quota_exceeded",
            "",
            "You have 99999999999999999999999 credits remaining, while x credits are required",
        ),
        unknown,
    );
    check(
        401,
        &detail(
            "",
            "quota_exceeded",
            "",
            "You have 1,234 credits remaining, while 5,000 credits are required",
        ),
        Verdict::WorkspaceQuota(shortfall(1234, 5000)),
    );
}

#[test]
fn a_key_at_its_own_cap_is_not_an_empty_workspace() {
    check(
        401,
        &detail("invalid_request", "quota_exceeded", "quota_exceeded", CAP),
        Verdict::KeyQuota(shortfall(5, 1727)),
    );
}

#[test]
fn payment_required_is_quota_unless_the_plan_is_what_is_missing() {
    for body in [r#"{"detail":"Payment required"}"#, &detail("payment_required", "", "", "Pay.")] {
        check(402, body, Verdict::WorkspaceQuota(Shortfall::default()));
    }
    check(
        402,
        &detail("payment_required", "insufficient_credits", "", "No."),
        Verdict::WorkspaceQuota(Shortfall::default()),
    );
    check(
        402,
        &detail("payment_required", "paid_plan_required", "", "Free users cannot"),
        Verdict::PlanFeature,
    );
    check(
        400,
        r#"{"detail":{"status":"can_not_use_instant_voice_cloning","message":"x"}}"#,
        Verdict::PlanFeature,
    );
}

#[test]
fn an_invalid_key_is_invalid_with_401_and_with_400() {
    check(
        401,
        &detail("authentication_error", "unauthorized", "invalid_api_key", "Invalid API key"),
        Verdict::InvalidKey,
    );
    check(
        400,
        &detail("authentication_error", "invalid_api_key", "", "Invalid API key"),
        Verdict::InvalidKey,
    );
    check(401, r#"{"detail":"Unauthorized"}"#, Verdict::InvalidKey);
}

#[test]
fn a_missing_permission_is_not_an_invalid_key() {
    let message = "The API key you used is missing the permission user_read to execute this operation.";
    check(
        401,
        &detail("authentication_error", "unauthorized", "missing_permissions", message),
        Verdict::MissingPermission(Permission::parse("user_read")),
    );
    check(
        403,
        &detail("authorization_error", "insufficient_permissions", "", "No."),
        Verdict::MissingPermission(None),
    );
}

#[test]
fn the_clients_own_mistake_is_no_reason_to_doubt_a_key() {
    for status in [400, 401] {
        for word in ["max_character_limit_exceeded", "text_too_long", "invalid_parameters"] {
            check(status, &detail("", "", word, "No."), Verdict::RequestError);
        }
        check(status, &detail("validation_error", "invalid_voice_id", "", "No."), Verdict::RequestError);
        check(
            status,
            &detail("", "", "voice_not_found", "A voice with that ID was not found."),
            Verdict::NotFound,
        );
    }
}

#[test]
fn who_does_not_see_our_key_does_not_judge_it() {
    let verdict = Verdict::Unexplained(Refusal::Unauthorized);
    check(
        401,
        &detail("", "", "needs_authorization", "Neither authorization header nor xi-api-key"),
        verdict,
    );
    check(401, &detail("authentication_error", "missing_api_key", "", "No."), verdict);
    check(
        401,
        &detail("authentication_error", "unauthorized", "invalid_authorization_header", "No."),
        verdict,
    );
}

#[test]
fn a_locked_account_is_billing() {
    check(401, &detail("", "", "detected_unusual_activity", "Unusual activity detected."), Verdict::Abuse);
    check(401, &detail("payment_required", "payment_issue", "", "Past due."), Verdict::Billing);
}

#[test]
fn a_403_is_a_plan_feature_a_quota_or_ambiguous() {
    check(403, &detail("authorization_error", "subscription_required", "", ""), Verdict::PlanFeature);
    check(403, &detail("authorization_error", "feature_not_available", "", ""), Verdict::PlanFeature);
    check(403, r#"{"detail":{"status":"only_for_creator+","message":""}}"#, Verdict::PlanFeature);
    check(403, &detail("authorization_error", "forbidden", "", "Forbidden"), FORBIDDEN);
    check(403, "", FORBIDDEN);
    check(403, r#"{"error":"permission_denied","message":"no"}"#, FORBIDDEN);
}

#[test]
fn a_429_is_concurrency_overload_or_a_rate() {
    let concurrency = Verdict::Concurrency { maximum: Some(4) };
    check(
        429,
        &detail("rate_limit_error", "concurrent_limit_exceeded", "too_many_concurrent_requests", BUSY),
        concurrency,
    );
    check(
        429,
        &detail("rate_limit_error", "concurrent_limit_exceeded", "", ""),
        Verdict::Concurrency { maximum: None },
    );
    check(429, &detail("rate_limit_error", "system_busy", "", ""), Verdict::Busy);
    check(429, &detail("rate_limit_error", "rate_limit_exceeded", "", ""), Verdict::RateLimited(None));
    check(429, "", Verdict::RateLimited(None));
}

#[test]
fn a_rate_limit_carries_the_time_the_provider_gave() {
    let after = Some(Duration::from_secs(7));
    let verdict = classify(StatusCode::TOO_MANY_REQUESTS, Some(&ErrorBody::default()), after);
    assert_eq!(verdict, Verdict::RateLimited(after));
}

#[test]
fn a_schema_error_says_nothing_of_the_key() {
    check(
        422,
        r#"{"detail":[{"type":"missing","loc":["body","text"],"msg":"Field required"}]}"#,
        Verdict::RequestError,
    );
    check(422, &detail("", "invalid_api_key", "", "Invalid API key"), Verdict::RequestError);
}

#[test]
fn the_clients_own_mistakes_are_request_errors() {
    check(400, &detail("validation_error", "text_too_long", "", ""), Verdict::RequestError);
    check(400, r#"{"error":"invalid_request","message":"x"}"#, Verdict::RequestError);
    check(409, "", Verdict::RequestError);
    check(405, r#"{"detail":"Method Not Allowed"}"#, Verdict::RequestError);
}

#[test]
fn what_is_not_there_is_not_found_with_404_and_with_400() {
    check(404, r#"{"detail":"Not Found"}"#, Verdict::NotFound);
    check(400, &detail("", "", "voice_not_found", "A voice with that id was not found"), Verdict::NotFound);
    check(404, &detail("", "", "voice_not_found", "A voice with that id was not found"), Verdict::NotFound);
}

#[test]
fn a_model_that_is_not_there_is_the_requests_mistake() {
    for status in [400, 404] {
        check(status, &detail("not_found", "model_not_found", "", "A model"), Verdict::RequestError);
    }
}

#[test]
fn the_providers_own_trouble_is_not_the_keys() {
    check(
        500,
        r#"{"status":"internal_server_error","message":"Internal Server error."}"#,
        Verdict::ServerError,
    );
    check(502, "", Verdict::ServerError);
    check(503, &detail("service_unavailable", "maintenance", "", ""), Verdict::Busy);
}

#[test]
fn what_is_not_an_error_is_served() {
    for status in [200, 202, 204, 206, 301, 304] {
        check(status, &detail("", "quota_exceeded", "", QUOTA), Verdict::Served);
    }
}

#[test]
fn a_refusal_without_a_word_of_the_provider_is_unexplained() {
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
        check(401, body, Verdict::Unexplained(Refusal::Unauthorized));
        check(402, body, Verdict::Unexplained(Refusal::PaymentRequired));
        check(403, body, FORBIDDEN);
        check(429, body, Verdict::RateLimited(None));
    }
}

#[test]
fn an_answer_that_has_no_body_cannot_say_why() {
    for status in [401, 402, 403, 429] {
        let verdict = classify(StatusCode::from_u16(status).unwrap(), None, None);
        assert_eq!(verdict, Verdict::Unexplained(Refusal::Bodiless));
        assert_eq!(verdict.by_contrast(), None);
    }
}

#[test]
fn what_another_key_was_served_is_the_keys_own_matter() {
    let quota = Verdict::WorkspaceQuota(Shortfall::default());
    for (verdict, meaning) in [
        (Verdict::Unexplained(Refusal::Unauthorized), Some(Verdict::InvalidKey)),
        (Verdict::Unexplained(Refusal::PaymentRequired), Some(quota)),
        (FORBIDDEN, None),
        (Verdict::MissingPermission(None), None),
    ] {
        assert_eq!(verdict.by_contrast(), meaning);
    }
}
