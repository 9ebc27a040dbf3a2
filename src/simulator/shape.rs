//! The catalogue of the provider's refusals, each with its status, its body and its headers. One
//! entry reads like one response on the wire; no other code of the simulator writes an error body
//! of the provider. The shapes and their names are here, their bodies in `render`, and those with a
//! fixed text in `fixed`.
//!
//! Sources: the error table of the provider's documentation (types and codes), its OpenAPI
//! document (the 422 list) and captured answers of August and September 2026 (everything with real
//! numbers, and every place where the wire differs from the table).

mod fixed;
mod render;

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use http::StatusCode;

use crate::elevenlabs::refusal::{Example, examples};

pub(super) use self::fixed::{Family, fixed, said};
pub(super) use self::render::violation;

/// A refusal.
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
    /// 401: the key is valid, but lacks the permission.
    MissingPermissions(Cow<'static, str>),
    /// 401: a free account that the abuse detection has closed.
    UnusualActivity,
    /// 401: the last invoice is unpaid.
    PaymentIssue,
    /// 402: out of credits, in the form of the documentation.
    InsufficientCredits,
    /// 402: a feature of paid plans.
    PaidPlanRequired,
    /// 403: the workspace has not accepted the terms of a feature.
    UnacceptedTerms,
    /// 403 without a reason.
    Forbidden,
    /// 403: no access to this workspace.
    WorkspaceAccessDenied,
    /// 403: not included in this subscription.
    SubscriptionRequired,
    /// 403: out of credits, in the plain form that some integrations describe.
    QuotaForbidden,
    /// 429: too many concurrent requests in the workspace. Names the maximum, and no time to retry.
    Concurrency,
    /// 429: too many requests, with `Retry-After` in seconds if there is a number.
    RateLimit(Option<u32>),
    /// 429: the service is busy, whatever the key.
    SystemBusy,
    /// 422: a required field is missing from the body.
    FieldMissing(Cow<'static, str>),
    /// 422: a field is not the string it should be.
    NotAString(Cow<'static, str>),
    /// 422: the body is not JSON.
    MalformedJson,
    /// 404: no such voice in this workspace.
    VoiceNotFound,
    /// 400: an invalid cursor, or one of another workspace.
    InvalidCursor,
    /// 400: the earlier request that speech is to continue is not one of this workspace.
    UnknownRequest,
    /// 404: no such history item in this workspace.
    HistoryItemNotFound,
    /// 404: no such agent in this workspace.
    AgentNotFound,
    /// 404: no such conversation in this workspace.
    ConversationNotFound,
    /// 404: the refusal of the model list for a request without a key.
    AnonymousWorkspace,
    /// 400: no such model.
    ModelNotFound,
    /// 400: more characters than the model's maximum.
    TextTooLong,
    /// 400: an empty text.
    EmptyText,
    /// 400: an unknown audio format.
    InvalidOutputFormat,
    /// 400: a JSON body above the maximum size.
    RequestTooLarge,
    /// 404: no such path.
    NotFound,
    /// 405: a wrong method; contains the allowed one.
    MethodNotAllowed(&'static str),
    /// 500 without details.
    ServerError,
    /// 503: closed for maintenance.
    Maintenance,
    /// An HTML page with this status, from an intermediary.
    Page(u16),
    /// A refusal of the table with a fixed text.
    Fixed(&'static Example),
}

/// The numbers and names in a refusal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Facts {
    /// Credits this request needs.
    pub(super) needed: u64,
    /// Credits of the workspace per period.
    pub(super) limit: u64,
    /// Credits of the workspace that are left.
    pub(super) remaining: u64,
    /// The key's name in the workspace's settings; never its value.
    pub(super) key_name: String,
    /// The key's own cap.
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
    /// The limit, for a refusal that claims that it was exceeded.
    fn exceeded(&self) -> u64 {
        self.bound.min(self.needed.saturating_sub(1))
    }
}

/// A refusal as it goes on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    /// Headers beyond the common ones.
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: String,
}

/// The names of shapes in faults, in the order of the catalogue. Shapes with a value have a
/// default.
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

/// The name is not in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no refusal: the names are {names}", names = names())]
pub struct UnknownShape(String);

/// Every name of the catalogue, each with the value it takes.
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
