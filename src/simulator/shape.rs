//! The catalogue of the provider's refusals, with status, body and headers. All error bodies of the
//! provider are created here: `render` contains the bodies, and `fixed` the refusals with a fixed
//! text.
//!
//! Sources: the error table of the provider's documentation (types and codes), its OpenAPI document
//! (the 422 list), and captured responses of August and September 2026 (all responses with numbers,
//! and those that differ from the table).

mod fixed;
mod render;

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use http::StatusCode;

use crate::elevenlabs::refusal::{Example, examples};

pub(super) use self::fixed::{Family, fixed, fixed_refusal};
pub(super) use self::render::violation;

/// A refusal of the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Shape {
    /// 401: the workspace has fewer credits left than the request costs.
    Quota,
    /// 401: the key's cap is reached; the workspace may have credits left.
    KeyCap,
    /// 401: the key does not exist.
    InvalidKey,
    /// 400: the key does not exist, in another captured form.
    InvalidKey400,
    /// 401: the request has no key.
    NeedsAuthorization,
    /// 401: the key is valid and lacks the permission.
    MissingPermissions(Cow<'static, str>),
    /// 401: the abuse detection has disabled a free account.
    UnusualActivity,
    /// 401: the last invoice is unpaid.
    PaymentIssue,
    /// 402: the workspace has no credits left, in the form of the documentation.
    InsufficientCredits,
    /// 402: only paid plans include the feature.
    PaidPlanRequired,
    /// 403: the workspace has not accepted the terms of a feature.
    UnacceptedTerms,
    /// 403 without a reason.
    Forbidden,
    /// 403: the key has no access to this workspace.
    WorkspaceAccessDenied,
    /// 403: the subscription does not include the feature.
    SubscriptionRequired,
    /// 403: the workspace has no credits left, in the plain form that some integrations describe.
    QuotaForbidden,
    /// 429: too many concurrent requests in the workspace. The message contains the maximum, and
    /// there is no `Retry-After`.
    Concurrency,
    /// 429: too many requests. With a number, the response has a `Retry-After` in seconds.
    RateLimit(Option<u32>),
    /// 429: the service is overloaded, for all keys.
    SystemBusy,
    /// 422: a required field is missing from the body.
    FieldMissing(Cow<'static, str>),
    /// 422: a field is not a string.
    NotAString(Cow<'static, str>),
    /// 422: the body is not JSON.
    MalformedJson,
    /// 404: the voice does not exist in this workspace.
    VoiceNotFound,
    /// 400: the cursor is invalid or belongs to another workspace.
    InvalidCursor,
    /// 400: the request to continue does not exist in this workspace.
    UnknownRequest,
    /// 404: the history item does not exist in this workspace.
    HistoryItemNotFound,
    /// 404: the agent does not exist in this workspace.
    AgentNotFound,
    /// 404: the conversation does not exist in this workspace.
    ConversationNotFound,
    /// 404: the response of the model list to a request without a key.
    AnonymousWorkspace,
    /// 400: the model does not exist.
    ModelNotFound,
    /// 400: the text is longer than the model's maximum.
    TextTooLong,
    /// 400: the text is empty.
    EmptyText,
    /// 400: the audio format is unknown.
    InvalidOutputFormat,
    /// 400: the JSON body is larger than the maximum.
    RequestTooLarge,
    /// 404: the path is unknown.
    NotFound,
    /// 405: the method is wrong. Contains the allowed method.
    MethodNotAllowed(&'static str),
    /// 500 without details.
    ServerError,
    /// 503: the service is closed for maintenance.
    Maintenance,
    /// An HTML page with this status, as an intermediary sends it.
    Page(u16),
    /// A refusal with a fixed text from the table.
    Fixed(&'static Example),
}

/// The numbers and names in the text of a refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Credits that the request needs.
    pub(super) needed: u64,
    /// Credits of the workspace per period.
    pub(super) limit: u64,
    /// Remaining credits of the workspace.
    pub(super) remaining: u64,
    /// The key's name in the settings of the workspace; never the key.
    pub(super) key_name: String,
    /// The cap of the key.
    pub(super) cap: u64,
    /// The remaining credits of the cap.
    pub(super) cap_remaining: u64,
    /// Maximum concurrent requests.
    pub(super) concurrency_max: u32,
    /// The requested voice, model, item or format.
    pub(super) subject: String,
    /// The maximum of a countable object.
    pub(super) bound: u64,
    /// The requested model.
    pub(super) model: String,
    /// The requested audio format.
    pub(super) format: String,
}

impl Facts {
    /// The limit in a refusal, which must be below the needed amount.
    fn exceeded(&self) -> u64 {
        self.bound.min(self.needed.saturating_sub(1))
    }
}

/// A refusal as it is sent over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    /// Headers in addition to the common ones.
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: String,
}

/// The names of refusals for faults, in the order of the catalogue. Refusals with a value have a
/// default here.
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

    /// Parses a name of the catalogue; `missing_permissions=NAME`, `rate_limit=SECONDS`,
    /// `unprocessable=FIELD` and `page=STATUS` have a value.
    fn from_str(text: &str) -> Result<Self, UnknownShape> {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text, None),
        };
        let unknown = || UnknownShape(text.to_owned());
        let named = NAMED.into_iter().find(|(known, _)| *known == name).map(|(_, shape)| shape);
        let shape = named.or_else(|| fixed(name)).ok_or_else(unknown)?;
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
        if let Shape::Fixed(fixed) = self {
            return f.write_str(fixed.name);
        }
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

/// The error for an unknown name of a refusal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no refusal: the names are {names}", names = names())]
pub struct UnknownShape(String);

/// All names of the catalogue, with their values.
fn names() -> String {
    const VALUES: [(&str, &str); 4] = [
        ("missing_permissions", "NAME"),
        ("rate_limit", "SECONDS"),
        ("unprocessable", "FIELD"),
        ("page", "STATUS"),
    ];
    let named = NAMED.iter().map(|(name, _)| match VALUES.iter().find(|(known, _)| known == name) {
        Some((_, value)) => format!("{name}[={value}]"),
        None => (*name).to_owned(),
    });
    named.chain(examples().map(|example| example.name.to_owned())).collect::<Vec<_>>().join(", ")
}
