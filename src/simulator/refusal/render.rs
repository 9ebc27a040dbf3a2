//! Renders the statuses and bodies of all refusals over HTTP byte for byte, and the additional headers of some. Also
//! renders the simulator's own refusal of content that a proxy must not forward.

use http::StatusCode;
use serde::Serialize;

use super::{HttpRefusal, RefusalKind, RefusalValues};

impl RefusalKind {
    /// Renders the refusal. `request_id` is also sent as `x-trace-id`.
    #[rustfmt::skip] // a table with one entry per refusal
    pub(in crate::simulator) fn render(&self, values: &RefusalValues, request_id: &str) -> HttpRefusal {
        let RefusalValues {
            requested_amount, credit_limit, remaining_credits, key_name, key_cap, remaining_cap, subject, max_count, ..
        } = values;
        let typed_refusal = |status, kind, code, legacy, message: &str| {
            typed_refusal(status, [kind, code, legacy], message, request_id)
        };
        match self {
            RefusalKind::Quota => typed_refusal(401, "invalid_request", "quota_exceeded", "quota_exceeded", &format!(
                "This request exceeds your quota of {credit_limit}. You have {remaining_credits} credits remaining, while {requested_amount} credits are required for this request.",
            )),
            RefusalKind::KeyCap => typed_refusal(401, "invalid_request", "quota_exceeded", "quota_exceeded", &format!(
                "This request exceeds your API key ({key_name}) quota of {key_cap}. You have {remaining_cap} credits remaining, while {requested_amount} credits are required for this request.",
            )),
            RefusalKind::InvalidKey =>
                typed_refusal(401, "authentication_error", "unauthorized", "invalid_api_key", "Invalid API key"),
            RefusalKind::InvalidKey400 =>
                typed_refusal(400, "authentication_error", "invalid_api_key", "invalid_api_key", "Invalid API key"),
            RefusalKind::NeedsAuthorization => typed_refusal(401, "authentication_error", "unauthorized", "needs_authorization",
                "Neither authorization header nor xi-api-key received, please provide one."),
            RefusalKind::MissingPermissions(permission) =>
                typed_refusal(401, "authentication_error", "unauthorized", "missing_permissions", &format!(
                    "The API key you used is missing the permission {permission} to execute this operation.",
                )),
            RefusalKind::UnusualActivity => legacy_refusal(401, "detected_unusual_activity",
                "Unusual activity detected. Free Tier usage disabled. If you are using proxy/VPN you might need to purchase a Paid Plan to not trigger our abuse detectors. Free Tier only works if users do not abuse it, for example by creating multiple free accounts."),
            RefusalKind::PaymentIssue => typed_refusal(401, "payment_required", "payment_issue", "payment_issue",
                "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage."),
            RefusalKind::InsufficientCredits =>
                typed_refusal(402, "payment_required", "insufficient_credits", "insufficient_credits",
                    "You do not have enough credits to complete this request."),
            RefusalKind::PaidPlanRequired => typed_refusal(402, "payment_required", "paid_plan_required", "paid_plan_required",
                "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice."),
            // WebSockets have a format of their own for this refusal (the Python SDK 2.78). The provider's format over
            // HTTP is unknown.
            RefusalKind::UnacceptedTerms => typed_refusal(403, "authorization_error", "unaccepted_terms", "unaccepted_terms",
                "You must accept the terms of service of this feature to use it."),
            RefusalKind::Forbidden => plain_refusal(403, "Forbidden"),
            RefusalKind::WorkspaceAccessDenied =>
                typed_refusal(403, "authorization_error", "workspace_access_denied", "workspace_access_denied",
                    "You do not have access to this workspace."),
            RefusalKind::SubscriptionRequired =>
                typed_refusal(403, "authorization_error", "subscription_required", "subscription_required",
                    "Your subscription does not include this feature. Please upgrade your subscription."),
            RefusalKind::QuotaForbidden => legacy_refusal(403, "quota_exceeded", &format!(
                "This request exceeds your quota of {credit_limit}. You have {remaining_credits} credits remaining, while {requested_amount} credits are required for this request.",
            )),
            RefusalKind::Concurrency => {
                let detail = Detail {
                    kind: "rate_limit_error",
                    code: "concurrent_limit_exceeded",
                    message: &format!(
                        "Too many concurrent requests. Your current subscription is associated with a maximum of {} concurrent requests (running in parallel). Please upgrade your subscription or contact sales if you'd like to increase this limit.",
                        values.max_concurrent,
                    ),
                    status: "too_many_concurrent_requests",
                    request_id,
                    param: None,
                    docs_url: Some("https://elevenlabs.io/docs/overview/models#concurrency-and-priority"),
                };
                json_refusal(429, &Wrapped { detail })
            }
            RefusalKind::RateLimit(retry_after) => {
                let mut refusal = typed_refusal(429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_exceeded",
                    "Rate limit exceeded. Please slow down your requests.");
                refusal.headers.extend(retry_after.map(|seconds| ("retry-after", seconds.to_string())));
                refusal
            }
            RefusalKind::SystemBusy => typed_refusal(429, "rate_limit_error", "system_busy", "system_busy",
                "Our services are experiencing high levels of traffic and cannot take your request. Please try again later."),
            RefusalKind::FieldMissing(field) => unprocessable_refusal("missing", Some(field), "Field required"),
            RefusalKind::NotAString(field) =>
                unprocessable_refusal("string_type", Some(field), "Input should be a valid string"),
            RefusalKind::MalformedJson => unprocessable_refusal("json_invalid", None, "JSON decode error"),
            RefusalKind::VoiceNotFound => typed_refusal(404, "not_found", "voice_not_found", "voice_not_found",
                &format!("A voice with voice ID '{subject}' was not found.")),
            RefusalKind::HistoryItemNotFound =>
                typed_refusal(404, "not_found", "history_item_not_found", "history_item_not_found",
                    &format!("History item with ID '{subject}' was not found.")),
            RefusalKind::AgentNotFound => typed_refusal(404, "not_found", "agent_not_found", "agent_not_found",
                &format!("An agent with ID '{subject}' was not found.")),
            RefusalKind::ConversationNotFound =>
                typed_refusal(404, "not_found", "conversation_not_found", "conversation_not_found",
                    &format!("A conversation with ID '{subject}' was not found.")),
            RefusalKind::InvalidCursor => typed_refusal(400, "validation_error", "invalid_cursor", "invalid_cursor",
                "The cursor is not valid."),
            // The text of the provider is unknown, but a 500 response was observed.
            RefusalKind::UnknownRequest => typed_refusal(400, "validation_error", "invalid_parameters", "invalid_parameters",
                &format!("A request with ID '{subject}' cannot be continued.")),
            RefusalKind::AnonymousWorkspace => typed_refusal(404, "not_found", "workspace_not_found", "workspace_not_found",
                "Workspace 1anonymous1 not found."),
            RefusalKind::ModelNotFound => typed_refusal(400, "not_found", "model_not_found", "model_not_found",
                &format!("A model with model ID '{subject}' was not found.")),
            RefusalKind::TextTooLong => typed_refusal(400, "validation_error", "text_too_long", "max_character_limit_exceeded",
                &format!("The text is too long for the model '{subject}': {requested_amount} characters, where {} are allowed.", values.exceeded_limit())),
            RefusalKind::EmptyText => typed_refusal(400, "validation_error", "empty_text", "empty_text",
                "The text must not be empty."),
            RefusalKind::InvalidOutputFormat =>
                typed_refusal(400, "validation_error", "invalid_output_format", "invalid_output_format", subject),
            RefusalKind::RequestTooLarge => typed_refusal(400, "invalid_request", "request_too_large", "request_too_large",
                &format!("The request body is larger than {max_count} bytes.")),
            RefusalKind::NotFound => plain_refusal(404, "Not Found"),
            RefusalKind::MethodNotAllowed(allowed) => {
                let mut refusal = plain_refusal(405, "Method Not Allowed");
                refusal.headers.push(("allow", (*allowed).to_owned()));
                refusal
            }
            RefusalKind::ServerError => json_refusal(500, &Crash {
                status: "internal_server_error",
                message: "Internal Server error. All such crashes are reported to us automatically.",
            }),
            RefusalKind::Maintenance => typed_refusal(503, "service_unavailable", "maintenance", "maintenance",
                "The service is undergoing maintenance. Please try again later."),
            RefusalKind::Fixed(fixed) => super::fixed::render(fixed, values, request_id),
            RefusalKind::Page(status) => HttpRefusal {
                headers: vec![("content-type", "text/html".to_owned())],
                body: "<!doctype html><title>Request blocked</title>".to_owned(),
                ..plain_refusal(*status, "")
            },
        }
    }
}

/// Creates the simulator's refusal of content that a proxy must not forward. The provider never sends the status 599,
/// so a proxy cannot confuse it with an ordinary refusal.
pub(in crate::simulator) fn violation(message: &str) -> HttpRefusal {
    legacy_refusal(599, "simulator_violation", message)
}

/// The current error format. The fields have the order of the provider's responses.
#[derive(Serialize)]
struct Detail<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    code: &'a str,
    message: &'a str,
    status: &'a str,
    request_id: &'a str,
    param: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    docs_url: Option<&'a str>,
}

/// A body whose `detail` is the error.
#[derive(Serialize)]
struct Wrapped<T> {
    detail: T,
}

/// The older error format, which some endpoints still send.
#[derive(Serialize)]
struct Legacy<'a> {
    status: &'a str,
    message: &'a str,
}

/// The error format of dubbing.
#[derive(Serialize)]
struct Unwrapped<'a> {
    error: &'a str,
    message: &'a str,
}

/// The error format of a crash, without `detail`.
#[derive(Serialize)]
struct Crash<'a> {
    status: &'a str,
    message: &'a str,
}

/// One entry of the 422 list. The provider's `input` repeats the request. Here it is empty, so that
/// no log contains text of a request.
#[derive(Serialize)]
struct Unprocessable<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    loc: Vec<&'a str>,
    msg: &'a str,
    input: serde_json::Map<String, serde_json::Value>,
}

/// Creates a refusal whose body is a JSON document.
pub(super) fn json_refusal(status: u16, body: &impl Serialize) -> HttpRefusal {
    HttpRefusal {
        status: StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        headers: Vec::new(),
        // Strings and numbers can always be serialized.
        body: serde_json::to_string(body).unwrap_or_default(),
    }
}

/// Creates an error in the current format, whose `type`, `code` and `status` are `names`.
pub(super) fn typed_refusal(status: u16, names: [&str; 3], message: &str, request_id: &str) -> HttpRefusal {
    let [kind, code, legacy] = names;
    let detail = Detail { kind, code, message, status: legacy, request_id, param: None, docs_url: None };
    json_refusal(status, &Wrapped { detail })
}

/// Creates an error in the older format.
pub(super) fn legacy_refusal(status: u16, name: &str, message: &str) -> HttpRefusal {
    json_refusal(status, &Wrapped { detail: Legacy { status: name, message } })
}

/// Creates an error without `detail`, as dubbing sends it.
pub(super) fn refusal_without_detail(status: u16, error: &str, message: &str) -> HttpRefusal {
    json_refusal(status, &Unwrapped { error, message })
}

/// Creates an error whose `detail` is a text.
pub(super) fn plain_refusal(status: u16, detail: &str) -> HttpRefusal {
    json_refusal(status, &Wrapped { detail })
}

/// Creates a 422 list with one entry about `field`, or about the whole body.
fn unprocessable_refusal(kind: &str, field: Option<&str>, msg: &str) -> HttpRefusal {
    let loc = std::iter::once("body").chain(field).collect();
    json_refusal(422, &Wrapped { detail: [Unprocessable { kind, loc, msg, input: serde_json::Map::new() }] })
}
