//! The catalogue of refusals: every way the provider says no, with its status, its body and its
//! headers. One entry reads like one answer on the wire; nothing else in the simulator writes an
//! error body of the provider's.
//!
//! Sources: the error table of the provider's documentation (types and codes), its OpenAPI
//! document (the 422 list) and captured answers of August and September 2026 (everything with real
//! numbers, and every place where the wire differs from the table).

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use http::StatusCode;
use serde::Serialize;

/// A way to say no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 401: the workspace has fewer credits left than the request costs.
    Quota,
    /// 401: the key's own cap is reached; the workspace may have plenty.
    KeyCap,
    /// 401: no such key.
    InvalidKey,
    /// 400: no such key, as another capture has it.
    InvalidKey400,
    /// 401: no key at all.
    NeedsAuthorization,
    /// 401: the key works, but not for this.
    MissingPermissions(Cow<'static, str>),
    /// 401: a free account that the abuse detection has closed.
    UnusualActivity,
    /// 401: the last invoice is unpaid.
    PaymentIssue,
    /// 402: out of credits, as the documentation has it.
    InsufficientCredits,
    /// 402: a feature of paid plans.
    PaidPlanRequired,
    /// 403: the workspace has not accepted the terms of a feature.
    UnacceptedTerms,
    /// 403 without a reason.
    Forbidden,
    /// 403: not this workspace.
    WorkspaceAccessDenied,
    /// 403: not with this subscription.
    SubscriptionRequired,
    /// 403: out of credits, in the plain form that some integrations describe.
    QuotaForbidden,
    /// 429: too many at once for the workspace. Says the maximum, and not when to come back.
    Concurrency,
    /// 429: too many, with `Retry-After` in seconds if there is a number.
    RateLimit(Option<u32>),
    /// 429: the service is busy, no matter which key asks.
    SystemBusy,
    /// 422: a required field is missing from the body.
    FieldMissing(Cow<'static, str>),
    /// 422: a field is not the string it should be.
    NotAString(Cow<'static, str>),
    /// 422: the body is not JSON.
    MalformedJson,
    /// 404: no such voice, or not in this workspace.
    VoiceNotFound,
    /// 400: a list that does not go on there, or not in this workspace.
    InvalidCursor,
    /// 400: an earlier request that speech is to continue, and that this workspace has not made.
    UnknownRequest,
    /// 404: no such history item, or not in this workspace.
    HistoryItemNotFound,
    /// 404: no such agent, or not in this workspace.
    AgentNotFound,
    /// 404: no such conversation, or not in this workspace.
    ConversationNotFound,
    /// 404: what the model list says to someone without a key.
    AnonymousWorkspace,
    /// 400: no such model.
    ModelNotFound,
    /// 400: more characters than the model takes.
    TextTooLong,
    /// 400: nothing to say.
    EmptyText,
    /// 400: an audio format that there is not.
    InvalidOutputFormat,
    /// 400: a JSON body beyond every bound.
    RequestTooLarge,
    /// 404: no such path.
    NotFound,
    /// 405: not with this method; the one that works.
    MethodNotAllowed(&'static str),
    /// 500, bare.
    ServerError,
    /// 503: closed for maintenance.
    Maintenance,
    /// A page for people, with this status, from somebody on the way to the provider.
    Page(u16),
}

/// The numbers and names that a refusal tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Credits this request needs.
    pub(super) needed: u64,
    /// Credits of the workspace per period.
    pub(super) limit: u64,
    /// Credits of the workspace that are left.
    pub(super) remaining: u64,
    /// What the key is called in the workspace's settings; never its value.
    pub(super) key_name: String,
    /// The key's own cap.
    pub(super) cap: u64,
    /// What is left of it.
    pub(super) cap_remaining: u64,
    /// Requests that may run at once.
    pub(super) concurrency_max: u32,
    /// The voice, model, item or format that was asked for.
    pub(super) subject: String,
    /// How many of something there may be.
    pub(super) bound: u64,
}

/// A refusal as it goes on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    /// Headers beyond those of every error.
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: String,
}

impl Shape {
    /// The answer, byte for byte. `request_id` is also sent as `x-trace-id`.
    #[rustfmt::skip] // a table, one answer to an entry
    pub(super) fn render(&self, facts: &Facts, request_id: &str) -> Refusal {
        let Facts { needed, limit, remaining, key_name, cap, cap_remaining, subject, bound, .. } = facts;
        let typed = |status, kind, code, legacy, message: &str| {
            let detail = Detail { kind, code, message, status: legacy, request_id, param: None, docs_url: None };
            refusal(status, &Wrapped { detail })
        };
        match self {
            Shape::Quota => typed(401, "invalid_request", "quota_exceeded", "quota_exceeded", &format!(
                "This request exceeds your quota of {limit}. You have {remaining} credits remaining, while {needed} credits are required for this request.",
            )),
            Shape::KeyCap => typed(401, "invalid_request", "quota_exceeded", "quota_exceeded", &format!(
                "This request exceeds your API key ({key_name}) quota of {cap}. You have {cap_remaining} credits remaining, while {needed} credits are required for this request.",
            )),
            Shape::InvalidKey =>
                typed(401, "authentication_error", "unauthorized", "invalid_api_key", "Invalid API key"),
            Shape::InvalidKey400 =>
                typed(400, "authentication_error", "invalid_api_key", "invalid_api_key", "Invalid API key"),
            Shape::NeedsAuthorization => typed(401, "authentication_error", "unauthorized", "needs_authorization",
                "Neither authorization header nor xi-api-key received, please provide one."),
            Shape::MissingPermissions(permission) =>
                typed(401, "authentication_error", "unauthorized", "missing_permissions", &format!(
                    "The API key you used is missing the permission {permission} to execute this operation.",
                )),
            Shape::UnusualActivity => legacy(401, "detected_unusual_activity",
                "Unusual activity detected. Free Tier usage disabled. If you are using proxy/VPN you might need to purchase a Paid Plan to not trigger our abuse detectors. Free Tier only works if users do not abuse it, for example by creating multiple free accounts."),
            Shape::PaymentIssue => typed(401, "payment_required", "payment_issue", "payment_issue",
                "Your subscription has a failed or incomplete payment. Complete the latest invoice to continue usage."),
            Shape::InsufficientCredits =>
                typed(402, "payment_required", "insufficient_credits", "insufficient_credits",
                    "You do not have enough credits to complete this request."),
            Shape::PaidPlanRequired => typed(402, "payment_required", "paid_plan_required", "paid_plan_required",
                "Free users cannot use library voices via the API. Please upgrade your subscription to use this voice."),
            // Sockets have a form of their own for it (the Python SDK 2.78); what HTTP says is not known.
            Shape::UnacceptedTerms => typed(403, "authorization_error", "unaccepted_terms", "unaccepted_terms",
                "You must accept the terms of service of this feature to use it."),
            Shape::Forbidden => bare(403, "Forbidden"),
            Shape::WorkspaceAccessDenied =>
                typed(403, "authorization_error", "workspace_access_denied", "workspace_access_denied",
                    "You do not have access to this workspace."),
            Shape::SubscriptionRequired =>
                typed(403, "authorization_error", "subscription_required", "subscription_required",
                    "Your subscription does not include this feature. Please upgrade your subscription."),
            Shape::QuotaForbidden => legacy(403, "quota_exceeded", &format!(
                "This request exceeds your quota of {limit}. You have {remaining} credits remaining, while {needed} credits are required for this request.",
            )),
            Shape::Concurrency => {
                let detail = Detail {
                    kind: "rate_limit_error",
                    code: "concurrent_limit_exceeded",
                    message: &format!(
                        "Too many concurrent requests. Your current subscription is associated with a maximum of {} concurrent requests (running in parallel). Please upgrade your subscription or contact sales if you'd like to increase this limit.",
                        facts.concurrency_max,
                    ),
                    status: "too_many_concurrent_requests",
                    request_id,
                    param: None,
                    docs_url: Some("https://elevenlabs.io/docs/overview/models#concurrency-and-priority"),
                };
                refusal(429, &Wrapped { detail })
            }
            Shape::RateLimit(retry_after) => {
                let mut refusal = typed(429, "rate_limit_error", "rate_limit_exceeded", "rate_limit_exceeded",
                    "Rate limit exceeded. Please slow down your requests.");
                refusal.headers.extend(retry_after.map(|seconds| ("retry-after", seconds.to_string())));
                refusal
            }
            Shape::SystemBusy => typed(429, "rate_limit_error", "system_busy", "system_busy",
                "Our services are experiencing high levels of traffic and cannot take your request. Please try again later."),
            Shape::FieldMissing(field) => unprocessable("missing", Some(field), "Field required"),
            Shape::NotAString(field) =>
                unprocessable("string_type", Some(field), "Input should be a valid string"),
            Shape::MalformedJson => unprocessable("json_invalid", None, "JSON decode error"),
            Shape::VoiceNotFound => typed(404, "not_found", "voice_not_found", "voice_not_found",
                &format!("A voice with voice ID '{subject}' was not found.")),
            Shape::HistoryItemNotFound =>
                typed(404, "not_found", "history_item_not_found", "history_item_not_found",
                    &format!("History item with ID '{subject}' was not found.")),
            Shape::AgentNotFound => typed(404, "not_found", "agent_not_found", "agent_not_found",
                &format!("An agent with ID '{subject}' was not found.")),
            Shape::ConversationNotFound =>
                typed(404, "not_found", "conversation_not_found", "conversation_not_found",
                    &format!("A conversation with ID '{subject}' was not found.")),
            Shape::InvalidCursor => typed(400, "validation_error", "invalid_cursor", "invalid_cursor",
                "The cursor is not valid."),
            // The provider's own words are not known; a 500 has been seen.
            Shape::UnknownRequest => typed(400, "validation_error", "invalid_parameters", "invalid_parameters",
                &format!("A request with ID '{subject}' cannot be continued.")),
            Shape::AnonymousWorkspace => typed(404, "not_found", "workspace_not_found", "workspace_not_found",
                "Workspace 1anonymous1 not found."),
            Shape::ModelNotFound => typed(400, "not_found", "model_not_found", "model_not_found",
                &format!("A model with model ID '{subject}' was not found.")),
            Shape::TextTooLong => typed(400, "validation_error", "text_too_long", "max_character_limit_exceeded",
                &format!("The text is too long for the model '{subject}': {needed} characters, where {bound} are allowed.")),
            Shape::EmptyText => typed(400, "validation_error", "empty_text", "empty_text",
                "The text must not be empty."),
            Shape::InvalidOutputFormat =>
                typed(400, "validation_error", "invalid_output_format", "invalid_output_format", subject),
            Shape::RequestTooLarge => typed(400, "invalid_request", "request_too_large", "request_too_large",
                &format!("The request body is larger than {bound} bytes.")),
            Shape::NotFound => bare(404, "Not Found"),
            Shape::MethodNotAllowed(allowed) => {
                let mut refusal = bare(405, "Method Not Allowed");
                refusal.headers.push(("allow", (*allowed).to_owned()));
                refusal
            }
            Shape::ServerError => refusal(500, &Crash {
                status: "internal_server_error",
                message: "Internal Server error. All such crashes are reported to us automatically.",
            }),
            Shape::Maintenance => typed(503, "service_unavailable", "maintenance", "maintenance",
                "The service is undergoing maintenance. Please try again later."),
            Shape::Page(status) => Refusal {
                headers: vec![("content-type", "text/html".to_owned())],
                body: "<!doctype html><title>Request blocked</title>".to_owned(),
                ..bare(*status, "")
            },
        }
    }
}

/// What the simulator itself has to say: something arrived that must not leave a proxy. The status
/// is one that no provider sends, so that no classification takes it for an ordinary refusal.
pub(super) fn violation(message: &str) -> Refusal {
    legacy(599, "simulator_violation", message)
}

/// The body of today's errors. The order of the fields is that of the wire.
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

#[derive(Serialize)]
struct Wrapped<T> {
    detail: T,
}

/// The body of the errors of years ago, still sent here and there.
#[derive(Serialize)]
struct Legacy<'a> {
    status: &'a str,
    message: &'a str,
}

/// The body of a crash: nothing is wrapped in `detail`.
#[derive(Serialize)]
struct Crash<'a> {
    status: &'a str,
    message: &'a str,
}

/// One entry of the 422 list. The provider's `input` repeats what was sent; here it stays empty,
/// because an error that repeats a text ends in a log.
#[derive(Serialize)]
struct Unprocessable<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    loc: Vec<&'a str>,
    msg: &'a str,
    input: serde_json::Map<String, serde_json::Value>,
}

fn refusal(status: u16, body: &impl Serialize) -> Refusal {
    Refusal {
        status: StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        headers: Vec::new(),
        // Strings and numbers always serialize; were they ever not to, an empty body says enough.
        body: serde_json::to_string(body).unwrap_or_default(),
    }
}

fn legacy(status: u16, name: &str, message: &str) -> Refusal {
    refusal(status, &Wrapped { detail: Legacy { status: name, message } })
}

fn bare(status: u16, detail: &str) -> Refusal {
    refusal(status, &Wrapped { detail })
}

fn unprocessable(kind: &str, field: Option<&str>, msg: &str) -> Refusal {
    let loc = std::iter::once("body").chain(field).collect();
    refusal(422, &Wrapped { detail: [Unprocessable { kind, loc, msg, input: serde_json::Map::new() }] })
}

/// The names by which a fault asks for a shape, in the order of the catalogue. Those that need a
/// value have a usual one.
pub(super) const NAMED: [(&str, Shape); 25] = [
    ("quota", Shape::Quota),
    ("key_cap", Shape::KeyCap),
    ("invalid", Shape::InvalidKey),
    ("invalid_400", Shape::InvalidKey400),
    ("needs_authorization", Shape::NeedsAuthorization),
    ("missing_permissions", Shape::MissingPermissions(Cow::Borrowed("text_to_speech"))),
    ("unusual_activity", Shape::UnusualActivity),
    ("payment_issue", Shape::PaymentIssue),
    ("insufficient_credits", Shape::InsufficientCredits),
    ("paid_plan_required", Shape::PaidPlanRequired),
    ("unaccepted_terms", Shape::UnacceptedTerms),
    ("forbidden", Shape::Forbidden),
    ("workspace_access_denied", Shape::WorkspaceAccessDenied),
    ("subscription_required", Shape::SubscriptionRequired),
    ("quota_403", Shape::QuotaForbidden),
    ("concurrency", Shape::Concurrency),
    ("rate_limit", Shape::RateLimit(None)),
    ("system_busy", Shape::SystemBusy),
    ("unprocessable", Shape::FieldMissing(Cow::Borrowed("text"))),
    ("voice_not_found", Shape::VoiceNotFound),
    ("model_not_found", Shape::ModelNotFound),
    ("text_too_long", Shape::TextTooLong),
    ("server_error", Shape::ServerError),
    ("maintenance", Shape::Maintenance),
    ("page", Shape::Page(403)),
];

impl FromStr for Shape {
    type Err = UnknownShape;

    /// Reads one of the names of the catalogue; `missing_permissions=NAME`, `rate_limit=SECONDS`,
    /// `unprocessable=FIELD` and `page=STATUS` take a value.
    fn from_str(text: &str) -> Result<Self, UnknownShape> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let unknown = || UnknownShape(text.to_owned());
        let shape = NAMED.into_iter().find(|(known, _)| *known == name).ok_or_else(unknown)?.1;
        Ok(match (shape, value) {
            (shape, None) => shape,
            (Shape::MissingPermissions(_), Some(value)) => Shape::MissingPermissions(value.to_owned().into()),
            (Shape::FieldMissing(_), Some(value)) => Shape::FieldMissing(value.to_owned().into()),
            (Shape::RateLimit(_), Some(value)) => {
                Shape::RateLimit(Some(value.trim_end_matches('s').parse().map_err(|_| unknown())?))
            }
            (Shape::Page(_), Some(value)) => {
                let status = value.parse().ok().filter(|status| (400..600).contains(status));
                Shape::Page(status.ok_or_else(unknown)?)
            }
            (_, Some(_)) => return Err(unknown()),
        })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let same_kind = |known: &Shape| std::mem::discriminant(known) == std::mem::discriminant(self);
        let name = NAMED.iter().find(|(_, known)| same_kind(known)).map_or("unnamed", |(name, _)| name);
        f.write_str(name)?;
        if let Shape::MissingPermissions(value) | Shape::FieldMissing(value) = self {
            write!(f, "={value}")?;
        }
        if let Shape::RateLimit(Some(seconds)) = self {
            write!(f, "={seconds}")?;
        }
        if let Shape::Page(status) = self {
            write!(f, "={status}")?;
        }
        Ok(())
    }
}

/// A name that is not in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no refusal: the names are quota, key_cap, invalid, invalid_400, needs_authorization, missing_permissions[=NAME], unusual_activity, payment_issue, insufficient_credits, paid_plan_required, unaccepted_terms, forbidden, workspace_access_denied, subscription_required, quota_403, concurrency, rate_limit[=SECONDS], system_busy, unprocessable[=FIELD], voice_not_found, model_not_found, text_too_long, server_error, maintenance, page[=STATUS]"
)]
pub struct UnknownShape(String);
