//! Lists the provider's refusals in a table: one row per meaning and wording, the most specific first. HTTP,
//! WebSockets and the simulator use this table.
//!
//! To add a wording, add its code or message to a row, or add a row. Also add an example, which the simulator can then
//! send. The tests below check that the row of an example is the first that matches it. A test of the simulator checks
//! that an example has the same verdict in speech and dialogue sessions, and `tests/proxy/refusal_matrix.rs` checks
//! that its own table contains a line for each example. Add a code to `codes.rs` only if no row matches it: on a
//! WebSocket, the error is then classified by the status of the code.
//!
//! Messages are matched like codes, because a close frame may contain only a message.
//!
//! Sources: the table of errors in the provider's documentation (types and codes, 2026), and captured responses of 2023
//! to 2026 in public issues. An issue is named where its response differs from that table.

use std::time::Duration;

use http::StatusCode;

use super::ErrorBody;
use super::row::{
    BodyFormat, BodyPattern, EMPTY_PATTERN, Example, MISSING_PERMISSION, RefusalMeaning, RefusalRow, codes,
    example, message_parts, message_prefixes, row,
};
use crate::policy::verdict::{Subject, Verdict};

/// Returns the verdict of the first row that matches, or `None` if no row matches.
pub(super) fn find_verdict(
    status: StatusCode,
    body: &ErrorBody,
    retry_after: Option<Duration>,
) -> Option<Verdict> {
    ROWS.iter().find_map(|row| row.verdict(status, body, retry_after))
}

/// Returns an iterator over all examples of refusals.
pub(crate) fn examples() -> impl Iterator<Item = &'static Example> {
    ROWS.iter().flat_map(|row| row.examples).chain(STATUS_EXAMPLES)
}

/// Returns the meaning of the row of an example, or `None` for an example that is classified by its status.
pub(crate) fn meaning_of_example(example: &Example) -> Option<RefusalMeaning> {
    ROWS.iter().find(|row| row.examples.contains(example)).map(|row| row.meaning)
}

/// The start of a message that reports missing credentials. Live transcription also sends it for a bad key.
const NOT_AUTHENTICATED_MESSAGE: &str = "you must be authenticated";
/// The refusal of a library voice, which two examples send with different codes.
const LIBRARY_VOICE_MESSAGE: &str =
    "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice.";

/// Words of messages about the maximum number of voices or other objects of a workspace, which depends on the plan.
const SLOT_WORDS: BodyPattern = message_parts(&[
    "slot",
    "custom voice",
    "voice limit",
    "number of voices",
    "amount of voices",
    "maximum amount of",
]);
/// Codes and messages about exhausted credits.
const OUT_OF_CREDITS: BodyPattern =
    codes(&["quota_exceeded", "insufficient_credits"]).or_message_prefixes(&[
        "this request exceeds your quota",
        "you have exceeded your quota",
        "you do not have enough credits",
    ]);
/// The code for a payment that is required for credits or for a plan.
const PAYMENT_REQUIRED: BodyPattern = codes(&["payment_required"]);
/// A word of messages about a payment.
const PAYMENT_WORD: BodyPattern = message_parts(&["pay"]);
/// Words of messages about a plan.
const PLAN_WORDS: BodyPattern =
    message_parts(&["plan", "upgrade", "subscri", "tier", "feature", "librar", "free user", "paid user"]);

#[rustfmt::skip] // The parts of a row and of an example have few lines.
static ROWS: &[RefusalRow] = &[
    // The credits that are left to the key or to the workspace are not enough.
    row(message_prefixes(&["this request exceeds your api key"]), RefusalMeaning::KeyQuota)
        .examples(&[
            example("key_cap_words", 401, BodyFormat::Legacy("quota_exceeded"),
                "This request exceeds your API key (production) quota of {limit}. You have 0 credits remaining, \
                while {more} credits are required for this request."),
        ]),
    // The quota counts voices or other objects instead of credits, so the account can serve every other request.
    row(OUT_OF_CREDITS, RefusalMeaning::SlotsWithoutCredits)
        .and(SLOT_WORDS)
        .examples(&[
            example("quota_slots", 401, BodyFormat::Typed(["invalid_request", "quota_exceeded", "quota_exceeded"]),
                "You have reached your quota of custom voices ({bound} / {bound}). Please delete a voice or upgrade \
                your subscription."),
        ]),
    row(OUT_OF_CREDITS, RefusalMeaning::WorkspaceQuota)
        .examples(&[
            example("quota_short", 401, BodyFormat::Typed(["invalid_request", "quota_exceeded", "quota_exceeded"]),
                "This request exceeds your quota of {limit}. You have {short} credits remaining, while {more} \
                credits are required for this request."),
            example("quota_words", 401, BodyFormat::Legacy("quota_exceeded"), "This request exceeds your quota."),
            // Source of both numbers of credits in a 402 response: Yaroslavlazarenko/elevenlabs-proxy.
            example("quota_402", 402, BodyFormat::Typed(["payment_required", "quota_exceeded", "quota_exceeded"]),
                "This request exceeds your quota of {limit}. You have {remaining} credits remaining, while {needed} \
                credits are required for this request."),
        ]),

    // The workspace has sent too many concurrent requests, or too many in a span of time.
    row(codes(&["too_many_concurrent_requests", "concurrent_limit_exceeded"])
            .or_message_prefixes(&["too many concurrent requests"]), RefusalMeaning::Concurrency)
        .examples(&[
            example("concurrency_words", 429, BodyFormat::Legacy("too_many_concurrent_requests"),
                "Too many concurrent requests."),
        ]),
    row(codes(&["system_busy"])
            .or_message_prefixes(&["our services are experiencing high levels of traffic"]), RefusalMeaning::Busy)
        .examples(&[
            example("busy_words", 429, BodyFormat::Legacy("system_busy"),
                "Our services are experiencing high levels of traffic."),
        ]),
    row(codes(&["rate_limit_exceeded", "rate_limited", "too_many_requests"])
            .or_message_prefixes(&["too many requests", "rate limit"]), RefusalMeaning::RateLimited)
        .examples(&[
            example("rate_limit_words", 429, BodyFormat::Legacy("too_many_requests"), "Too many requests."),
        ]),

    // The key is not accepted. The message of the first row starts with "Invalid API key", but is about the host.
    // Sources: elevenlabs-mcp#72, and dograh#269 for the reason of a close frame.
    row(message_parts(&["data residency", "calling the correct api url"]), RefusalMeaning::WrongHost)
        .examples(&[
            example("wrong_host", 401, BodyFormat::Typed(["authentication_error", "unauthorized", "invalid_api_key"]),
                "Invalid API key: The API key used is for a data residency stack, however this server is a global \
                server. Please check you are calling the correct API URL."),
        ]),
    row(codes(&["missing_permissions", "insufficient_permissions"])
            .or_message_parts(&[MISSING_PERMISSION]), RefusalMeaning::MissingPermission)
        .examples(&[
            example("missing_permissions_403", 403,
                BodyFormat::Typed(["authorization_error", "insufficient_permissions", "missing_permissions"]),
                "The API key you used is missing the permission text_to_speech to execute this operation."),
        ]),
    row(codes(&["invalid_api_key"])
            .or_message_prefixes(&["invalid api key"]), RefusalMeaning::InvalidKey)
        .examples(&[
            example("invalid_words", 401, BodyFormat::Legacy("invalid_api_key"), "Invalid API key"),
        ]),
    // Live transcription sends this code and message for a bad key (captured). The code alone is ambiguous, because
    // the provider also sends it for a key without the permission.
    row(codes(&["auth_error"]), RefusalMeaning::InvalidKey)
        .and(message_prefixes(&[NOT_AUTHENTICATED_MESSAGE]))
        .examples(&[
            example("auth_error", 401, BodyFormat::Unwrapped("auth_error"),
                "You must be authenticated to use this endpoint."),
        ]),

    // The account of the key is suspected of abuse, or its invoice is unpaid.
    row(codes(&["detected_unusual_activity"])
            .or_message_prefixes(&["unusual activity detected"]), RefusalMeaning::Abuse)
        .examples(&[
            example("unusual_activity_words", 401, BodyFormat::Bare,
                "Unusual activity detected. Free Tier usage disabled."),
        ]),
    row(codes(&["payment_issue", "unaccepted_terms"])
            .or_message_parts(&["failed or incomplete payment"]), RefusalMeaning::Billing)
        .examples(&[
            example("payment_issue_words", 401, BodyFormat::Bare,
                "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage."),
        ]),

    // A limit of the plan is reached. Source of `voice_limit_reached` in a 400 response: mulmocast-app#1466.
    row(codes(&["*_limit_reached"]), RefusalMeaning::Slots)
        .examples(&[
            example("voice_limit_reached", 400, BodyFormat::Legacy("voice_limit_reached"),
                "You have reached your maximum amount of custom voices ({bound} / {bound}). You can upgrade your \
                subscription to increase your custom voice limit."),
        ]),
    row(message_prefixes(&["you have reached your "]), RefusalMeaning::Slots)
        .and(SLOT_WORDS)
        .examples(&[
            example("voice_limit_words", 400, BodyFormat::Bare,
                "You have reached your maximum amount of custom voices ({bound} / {bound})."),
        ]),
    // Free and paid accounts have different limits (elevenlabs-python#107).
    row(codes(&["max_character_limit_exceeded", "text_too_long"])
            .or_message_parts(&["exceeds the character limit"]), RefusalMeaning::PlanFeature(Some(Subject::TextLength)))
        .examples(&[
            example("max_character_limit_exceeded", 400, BodyFormat::Legacy("max_character_limit_exceeded"),
                "This request's text has {needed} characters and exceeds the character limit of {exceeded} \
                characters for your subscription."),
        ]),
    // Source: elevenlabs-js#233.
    row(codes(&["workspace_access_denied", "invalid_workspace_type"])
            .or_message_prefixes(&[
                "you do not have access to this workspace", "operation not supported on legacy workspace",
            ]), RefusalMeaning::PlanFeature(Some(Subject::Endpoint)))
        .examples(&[
            example("invalid_workspace_type", 400, BodyFormat::Legacy("invalid_workspace_type"),
                "Operation not supported on legacy workspace"),
        ]),

    // The plan lacks a feature.
    row(codes(&["voice_access_denied"]), RefusalMeaning::PlanFeature(Some(Subject::Voice)))
        .examples(&[
            example("voice_access_denied", 403,
                BodyFormat::Typed(["authorization_error", "voice_access_denied", "voice_access_denied"]),
                "You do not have access to this voice."),
        ]),
    row(codes(&["model_access_denied"]), RefusalMeaning::PlanFeature(Some(Subject::Model)))
        .examples(&[
            example("model_access_denied", 403,
                BodyFormat::Typed(["authorization_error", "model_access_denied", "model_access_denied"]),
                "You do not have access to the model '{model}'. Please upgrade your subscription."),
        ]),
    row(codes(&["output_format_not_allowed"]), RefusalMeaning::PlanFeature(Some(Subject::OutputFormat)))
        .examples(&[
            example("output_format_not_allowed", 403,
                BodyFormat::Typed(["authorization_error", "subscription_required", "output_format_not_allowed"]),
                "Output format '{format}' is only available on the {plan} tier and above."),
        ]),
    // A client error with any status may have these codes. The statuses 400 and 401 are older.
    row(codes(&[
            "paid_plan_required", "subscription_required", "feature_not_available", "free_users_not_allowed",
            "upgrade_required", "only_for_*", "can_not_use_*",
        ]), RefusalMeaning::PlanFeature(None))
        .except_statuses(&[404])
        .examples(&[
            // Source of the value of `status`: dograh#290 of May 2026.
            example("library_voice", 402,
                BodyFormat::Typed(["payment_required", "paid_plan_required", "payment_required"]),
                LIBRARY_VOICE_MESSAGE),
            example("free_users_not_allowed", 400, BodyFormat::Legacy("free_users_not_allowed"),
                "You need to be on the creator tier or above to use this voice."),
            example("feature_not_available", 403,
                BodyFormat::Typed(["authorization_error", "feature_not_available", "feature_not_available"]),
                "This feature is not available on your subscription."),
            example("only_for_creator", 403, BodyFormat::Legacy("only_for_creator+"),
                "This feature is only available on the creator tier and above."),
            example("cloning_not_allowed", 400,
                BodyFormat::Typed(["payment_required", "paid_plan_required", "can_not_use_instant_voice_cloning"]),
                "Your subscription does not include instant voice cloning. Please upgrade your plan."),
            example("cloning_not_allowed_402", 402,
                BodyFormat::Typed(["payment_required", "paid_plan_required", "can_not_use_instant_voice_cloning"]),
                "Your subscription does not include instant voice cloning. Please upgrade your plan."),
            // Source: pipedream#10319.
            example("cloning_not_allowed_old", 400, BodyFormat::Legacy("can_not_use_instant_voice_cloning"),
                "Your subscription has no access to use instant voice cloning, please upgrade."),
            example("professional_cloning_not_allowed", 403,
                BodyFormat::Typed([
                    "authorization_error", "subscription_required", "can_not_use_professional_voice_cloning",
                ]),
                "Your subscription does not include professional voice cloning. Please upgrade your plan."),
        ]),
    // Sources: captured responses, and the refusals of plans that public issues quote. Refusals for
    // concurrency and for used-up credits are excluded, because they also advise to upgrade.
    row(message_parts(&[
            "free users cannot ", "free users can not ", "free users are not allowed ", "upgrade your subscription",
            "upgrade your plan", "your subscription does not include ", "your subscription has no access ",
            "not available on your ", "is only available on the ", "you need to be on the ",
            "you do not have access to the model ",
        ]), RefusalMeaning::PlanFeature(None))
        .except_statuses(&[404, 429])
        .without(message_parts(&["credit", "quota", "too many"]))
        .examples(&[
            // Source: OWASP/Nest#3859.
            example("payment_required_plan", 402, BodyFormat::Legacy("payment_required"), LIBRARY_VOICE_MESSAGE),
            example("plan_words", 403, BodyFormat::Bare, "This voice is not available on your plan."),
        ]),

    // A payment is required, for a plan or for credits. The code alone is ambiguous: the provider has sent it
    // with a message about a plan to an account with all its credits (OWASP/Nest#3859).
    row(PAYMENT_REQUIRED, RefusalMeaning::PlanFeature(None))
        .and(PLAN_WORDS)
        .examples(&[
            example("payment_required_plan_words", 402, BodyFormat::Legacy("payment_required"),
                "Your tier lacks this feature."),
        ]),
    row(PAYMENT_WORD, RefusalMeaning::PlanFeature(None))
        .only_statuses(&[402])
        .and(PLAN_WORDS)
        .examples(&[
            example("pay_for_plan_words", 402, BodyFormat::Bare, "You must pay for a higher tier."),
        ]),
    row(PAYMENT_REQUIRED, RefusalMeaning::WorkspaceQuota)
        .examples(&[
            example("payment_required_words", 402, BodyFormat::Legacy("payment_required"), "Payment required."),
        ]),
    row(PAYMENT_WORD, RefusalMeaning::WorkspaceQuota)
        .only_statuses(&[402])
        .examples(&[
            example("pay_words", 402, BodyFormat::Bare, "Please pay."),
        ]),

    // The request names a resource that does not exist, or is invalid.
    row(codes(&["model_not_found", "model_does_not_exist"]), RefusalMeaning::RequestError)
        .examples(&[
            example("model_not_found_404", 404, BodyFormat::Typed(["not_found", "model_not_found", "model_not_found"]),
                "A model with model ID '{model}' was not found."),
        ]),
    // Sources of the older messages: groq-voice#1, elevenlabs-python#293 and #163.
    row(codes(&["*_not_found", "*_does_not_exist"]), RefusalMeaning::NotFound)
        .examples(&[
            example("voice_not_found_400", 400, BodyFormat::Legacy("voice_not_found"),
                "A voice for the voice_id {subject} was not found."),
            example("voice_does_not_exist", 400, BodyFormat::Legacy("voice_does_not_exist"),
                "A voice with voice_id {subject} does not exist."),
            example("dubbing_not_found", 404,
                BodyFormat::Typed(["not_found", "dubbing_not_found", "dubbing_not_found"]),
                "A dubbing with ID '{subject}' was not found."),
            example("project_not_found", 404,
                BodyFormat::Typed(["not_found", "project_not_found", "project_not_found"]),
                "A project with ID '{subject}' was not found."),
            // Source: the OpenAPI document, for the audio of a dubbing.
            example("dubbing_language_not_found", 404, BodyFormat::Unwrapped("dubbing_not_found"),
                "There is no dubbing for language {subject}."),
        ]),
    row(MISSING_RESOURCE, RefusalMeaning::NotFound)
        .only_statuses(&[200, 400, 404])
        .without(message_parts(&["url was not found"]))
        .examples(&[
            example("missing_words", 404, BodyFormat::Bare, "Voice {subject} does not exist."),
        ]),
    row(codes(&["not_found"]), RefusalMeaning::NotFound)
        .and(MISSING_RESOURCE)
        .without(message_parts(&["url was not found"]))
        .examples(&[
            example("not_found_403", 403, BodyFormat::Legacy("not_found"), "Voice {subject} was not found."),
        ]),
    // These codes are documented with the statuses 400 and 401. An error of the client is not evidence about
    // a key.
    row(codes(&["validation_error", "invalid_parameters"]), RefusalMeaning::RequestError)
        .examples(&[
            example("invalid_parameters", 401,
                BodyFormat::Typed(["validation_error", "invalid_parameters", "invalid_parameters"]),
                "A parameter is invalid."),
        ]),
    row(EMPTY_PATTERN, RefusalMeaning::RequestError)
        .only_statuses(&[400])
        .examples(&[
            example("invalid_uid", 400, BodyFormat::Legacy("invalid_uid"),
                "An invalid ID has been received: '{subject}'. Make sure to provide a correct one."),
        ]),

    // Requests to the provider always have a key in `xi-api-key`. A server that reports a missing key has not
    // checked the key.
    row(codes(&["needs_authorization", "missing_api_key", "invalid_authorization_header", "authentication_required"])
            .or_message_prefixes(&[NOT_AUTHENTICATED_MESSAGE]), RefusalMeaning::Unauthorized)
        .examples(&[
            example("authentication_required", 401, BodyFormat::Legacy("authentication_required"),
                "You must be authenticated."),
        ]),
];

/// Texts of messages about a resource that does not exist.
const MISSING_RESOURCE: BodyPattern =
    message_parts(&[" was not found", " does not exist", " not found", " could not be found", " not exist"]);

/// Examples that no row matches. They are classified by their status.
#[rustfmt::skip]
static STATUS_EXAMPLES: &[Example] = &[
    example("unauthorized", 401, BodyFormat::Bare, "Unauthorized"),
    example("sign_in_required", 401,
        BodyFormat::Typed(["authentication_error", "sign_in_required", "sign_in_required"]),
        "You must be signed in to use this feature."),
    example("dubbing_not_dubbed", 425, BodyFormat::Unwrapped("dubbing_not_dubbed"), "Dubbing has not finished yet."),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the parsed body of an example, with the placeholders in its message.
    fn body_of(example: &Example) -> ErrorBody {
        let message = example.message;
        let json = match example.body {
            BodyFormat::Typed([error_type, code, status]) => {
                serde_json::json!({"detail": {"type": error_type, "code": code, "status": status, "message": message}})
            }
            BodyFormat::Legacy(status) => {
                serde_json::json!({"detail": {"status": status, "message": message}})
            }
            BodyFormat::Bare => serde_json::json!({"detail": message}),
            BodyFormat::Unwrapped(error) => serde_json::json!({"error": error, "message": message}),
        };
        ErrorBody::parse(json.to_string().as_bytes())
    }

    /// Returns the number of the first row that matches an example.
    fn row_of(example: &Example) -> Option<usize> {
        let status = StatusCode::from_u16(example.status).unwrap();
        ROWS.iter().position(|row| row.verdict(status, &body_of(example), None).is_some())
    }

    #[test]
    fn every_row_is_the_first_that_matches_its_examples() {
        for (number, row) in ROWS.iter().enumerate() {
            assert!(!row.examples.is_empty(), "row {number} must have an example: {row:?}");
            for example in row.examples {
                assert_eq!(
                    row_of(example),
                    Some(number),
                    "row {number} must be the first that matches {}",
                    example.name
                );
            }
        }
        for example in STATUS_EXAMPLES {
            assert_eq!(row_of(example), None, "no row must match {}", example.name);
        }
    }

    #[test]
    fn patterns_are_lower_case_and_names_of_examples_are_unique() {
        for pattern in ROWS.iter().flat_map(|row| [&row.pattern, &row.and_pattern, &row.excluded_pattern]) {
            for text in pattern.codes.iter().chain(pattern.message_prefixes).chain(pattern.message_parts) {
                assert_eq!(*text, text.to_lowercase());
            }
        }
        let mut names: Vec<&str> = examples().map(|example| example.name).collect();
        let example_count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), example_count, "the names of the examples must be unique");
    }
}
