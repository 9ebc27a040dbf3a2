//! The known words and sentences of the provider's refusals and their meaning, over HTTP and on
//! WebSockets, in whichever member or close reason they appear.
//!
//! A sentence counts as much as its code, because a close frame has nothing else.
//!
//! Sources: the table of errors in the provider's documentation (types and codes, 2026), captured
//! responses of 2023 to 2026 in public issues (named where a form differs from the table).

use std::time::Duration;

use http::StatusCode;

use super::ErrorBody;
use crate::policy::permission::Permission;
use crate::policy::verdict::{Refusal, Shortfall, Subject, Verdict};

/// The meaning of the body's words, most specific first; `None` when none is known.
pub(super) fn verdict(
    status: StatusCode,
    body: &ErrorBody,
    retry_after: Option<Duration>,
) -> Option<Verdict> {
    about_credits(body)
        .or_else(|| about_load(body, retry_after))
        .or_else(|| about_key(body))
        .or_else(|| about_account(body))
        .or_else(|| about_plan(status, body))
        .or_else(|| about_payment(status, body))
        .or_else(|| about_request(status, body))
        .or_else(|| about_nothing(body))
}

fn says_any(body: &ErrorBody, words: &[&str]) -> bool {
    words.iter().any(|word| body.says(word))
}

/// Credits of the key's own cap, or of the workspace.
fn about_credits(body: &ErrorBody) -> Option<Verdict> {
    let shortfall = Shortfall {
        quota: body.number_between("your quota of ", "."),
        remaining: body.number_between("you have ", " c"),
        required: body.number_between("while ", " c"),
    };
    if body.message_starts("this request exceeds your api key") {
        return Some(Verdict::KeyQuota(shortfall));
    }
    let is_quota = says_any(body, &["quota_exceeded", "insufficient_credits"])
        || body.message_starts("this request exceeds your quota")
        || body.message_starts("you have exceeded your quota")
        || body.message_starts("you do not have enough credits");
    if !is_quota {
        return None;
    }
    // A quota of something other than credits: the account can serve every other request.
    if shortfall.figures().is_none() && is_about_slots(body) {
        return Some(Verdict::Slots);
    }
    Some(Verdict::WorkspaceQuota(shortfall))
}

fn is_about_slots(body: &ErrorBody) -> bool {
    ["slot", "custom voice", "voice limit", "number of voices", "amount of voices", "maximum amount of"]
        .iter()
        .any(|word| body.message_has(word))
}

/// Too many requests at once, or in a span of time.
fn about_load(body: &ErrorBody, retry_after: Option<Duration>) -> Option<Verdict> {
    if says_any(body, &["too_many_concurrent_requests", "concurrent_limit_exceeded"])
        || body.message_starts("too many concurrent requests")
    {
        let maximum = body.number_between("a maximum of ", " concurrent requests");
        return Some(Verdict::Concurrency { maximum: maximum.and_then(|n| u32::try_from(n).ok()) });
    }
    if body.says("system_busy") || body.message_starts("our services are experiencing high levels of traffic")
    {
        return Some(Verdict::Busy);
    }
    let is_rate = says_any(body, &["rate_limit_exceeded", "rate_limited", "too_many_requests"])
        || body.message_starts("too many requests")
        || body.message_starts("rate limit");
    is_rate.then_some(Verdict::RateLimited(retry_after))
}

/// The key itself.
fn about_key(body: &ErrorBody) -> Option<Verdict> {
    // The message begins with "Invalid API key", but is about the host (elevenlabs-mcp#72).
    if body.message_has("data residency") || body.message_has("calling the correct api url") {
        return Some(Verdict::WrongHost);
    }
    const MISSING: &str = "is missing the permission ";
    if says_any(body, &["missing_permissions", "insufficient_permissions"]) || body.message_has(MISSING) {
        let name = body.word_behind(MISSING);
        return Some(Verdict::MissingPermission(name.and_then(Permission::parse)));
    }
    // The second form is that of live transcription, captured with a bad key. The code alone is
    // ambiguous: a key without the permission gets it, too.
    let is_invalid = body.says("invalid_api_key")
        || body.message_starts("invalid api key")
        || (body.says("auth_error") && body.message_starts(NOT_AUTHENTICATED));
    is_invalid.then_some(Verdict::InvalidKey)
}

const NOT_AUTHENTICATED: &str = "you must be authenticated";

/// The account of the key: suspected of abuse, or unpaid.
fn about_account(body: &ErrorBody) -> Option<Verdict> {
    if body.says("detected_unusual_activity") || body.message_starts("unusual activity detected") {
        return Some(Verdict::Abuse);
    }
    let is_locked = says_any(body, &["payment_issue", "unaccepted_terms"])
        || body.message_has("failed or incomplete payment");
    is_locked.then_some(Verdict::Billing)
}

/// A feature that the plan lacks, or a limit of the plan.
fn about_plan(status: StatusCode, body: &ErrorBody) -> Option<Verdict> {
    // `voice_limit_reached` with a 400 (mulmocast-app#1466).
    if body.any_word(|word| word.ends_with("_limit_reached"))
        || (body.message_starts("you have reached your ") && is_about_slots(body))
    {
        return Some(Verdict::Slots);
    }
    // Free and paid accounts have different limits (elevenlabs-python#107).
    if says_any(body, &["max_character_limit_exceeded", "text_too_long"])
        || body.message_has("exceeds the character limit")
    {
        return Some(Verdict::PlanFeature(Subject::TextLength));
    }
    if says_any(body, &["workspace_access_denied", "invalid_workspace_type"])
        || body.message_starts("you do not have access to this workspace")
        || body.message_starts("operation not supported on legacy workspace")
    {
        return Some(Verdict::PlanFeature(Subject::Endpoint));
    }
    let named = [
        ("voice_access_denied", Subject::Voice),
        ("model_access_denied", Subject::Model),
        ("output_format_not_allowed", Subject::OutputFormat),
    ];
    if let Some((_, subject)) = named.iter().find(|(word, _)| body.says(word)) {
        return Some(Verdict::PlanFeature(*subject));
    }
    let is_plan = says_any(body, &PLAN)
        || body.any_word(|word| word.starts_with("only_for_") || word.starts_with("can_not_use_"))
        || is_about_plan(status, body);
    // A client error of any status may contain it: 400 and 401 are the older forms.
    (is_plan && status != StatusCode::NOT_FOUND).then(|| Verdict::PlanFeature(subject(body)))
}

const PLAN: [&str; 5] = [
    "paid_plan_required",
    "subscription_required",
    "feature_not_available",
    "free_users_not_allowed",
    "upgrade_required",
];

/// Whether a sentence says that the plan lacks the requested feature. Refusals for concurrency and for
/// used-up credits also advise to upgrade.
fn is_about_plan(status: StatusCode, body: &ErrorBody) -> bool {
    let is_other = || ["credit", "quota", "too many"].iter().any(|word| body.message_has(word));
    status != StatusCode::TOO_MANY_REQUESTS
        && PLAN_SENTENCES.iter().any(|part| body.message_has(part))
        && !is_other()
}

/// Sources: captured responses; the refusals of plans that public issues quote.
const PLAN_SENTENCES: [&str; 11] = [
    "free users cannot ",
    "free users can not ",
    "free users are not allowed ",
    "upgrade your subscription",
    "upgrade your plan",
    "your subscription does not include ",
    "your subscription has no access ",
    "not available on your ",
    "is only available on the ",
    "you need to be on the ",
    "you do not have access to the model ",
];

/// The part of the request that the message names.
fn subject(body: &ErrorBody) -> Subject {
    let has = |word: &str| body.message_has(word) || body.any_word(|said| said.contains(word));
    if has("clon") {
        Subject::Cloning
    } else if has("format") || has("kbps") || has("khz") || has("bitrate") {
        Subject::OutputFormat
    } else if has("librar") || has("voice") {
        Subject::Voice
    } else if has("model") {
        Subject::Model
    } else {
        Subject::Unnamed
    }
}

/// A payment is required, for a plan or for credits. The word alone does not say which; a message about a
/// plan has been sent with all credits left (OWASP/Nest#3859).
fn about_payment(status: StatusCode, body: &ErrorBody) -> Option<Verdict> {
    let is_payment =
        body.says("payment_required") || (status == StatusCode::PAYMENT_REQUIRED && body.message_has("pay"));
    if !is_payment {
        return None;
    }
    let plan = ["plan", "upgrade", "subscri", "tier", "feature", "librar", "free user", "paid user"];
    if plan.iter().any(|word| body.message_has(word)) {
        return Some(Verdict::PlanFeature(subject(body)));
    }
    Some(Verdict::WorkspaceQuota(Shortfall::default()))
}

/// The request: the resource it names does not exist, or the request is wrong.
fn about_request(status: StatusCode, body: &ErrorBody) -> Option<Verdict> {
    if says_any(body, &["model_not_found", "model_does_not_exist"]) {
        return Some(Verdict::RequestError);
    }
    // `voice_does_not_exist` with a 400 (elevenlabs-python#293), `voice_not_found` with a 400 (groq-voice#1).
    let is_thing = |word: &str| word.ends_with("_not_found") || word.ends_with("_does_not_exist");
    let is_missing = || {
        let words = [" was not found", " does not exist", " not found", " could not be found", " not exist"];
        let may = matches!(status.as_u16(), 200 | 400 | 404) || body.says("not_found");
        may && words.iter().any(|word| body.message_has(word)) && !body.message_has("url was not found")
    };
    if body.any_word(is_thing) || is_missing() {
        return Some(Verdict::NotFound);
    }
    // Documented with 400 and with 401: an error of the client is no evidence about a key.
    let is_mistake = says_any(body, &["validation_error", "invalid_parameters"]);
    (status == StatusCode::BAD_REQUEST || is_mistake).then_some(Verdict::RequestError)
}

/// Requests to the provider always carry a key in `xi-api-key`; a server that sees none does not judge
/// it.
fn about_nothing(body: &ErrorBody) -> Option<Verdict> {
    let words =
        ["needs_authorization", "missing_api_key", "invalid_authorization_header", "authentication_required"];
    let is_keyless = says_any(body, &words) || body.message_starts(NOT_AUTHENTICATED);
    is_keyless.then_some(Verdict::Unexplained(Refusal::Unauthorized))
}
