//! Lists the provider's refusals and the values in their texts, and parses and prints their names in faults. `render`
//! creates the status, body and headers of each over HTTP, and `fixed` the refusals with a fixed text.
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

pub(super) use self::fixed::{RefusalFamily, find_fixed, fixed_refusal};
pub(super) use self::render::violation;

/// A refusal of the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// 401: the workspace has fewer credits left than the request costs.
    Quota,
    /// 401: the key's cap is reached. The workspace may have credits left.
    KeyCap,
    /// 401: the key or the token does not exist.
    InvalidKey,
    /// 400: the key does not exist. The provider sends this response as well (captured).
    InvalidKey400,
    /// 401: the request contains no key.
    NeedsAuthorization,
    /// 401: the key is valid and lacks the permission.
    MissingPermissions(Cow<'static, str>),
    /// 401: the abuse detection has disabled the free account.
    UnusualActivity,
    /// 401: the last invoice is unpaid.
    PaymentIssue,
    /// 402: the workspace has no credits left, in the format of the documentation.
    InsufficientCredits,
    /// 402: only paid plans include the feature.
    PaidPlanRequired,
    /// 403: the workspace has not accepted the terms of a feature.
    UnacceptedTerms,
    /// 403: the refusal contains no reason.
    Forbidden,
    /// 403: the key has no access to this workspace.
    WorkspaceAccessDenied,
    /// 403: the subscription does not include the feature.
    SubscriptionRequired,
    /// 403: the workspace has no credits left, in the plain format that some integrations describe.
    QuotaForbidden,
    /// 429: too many concurrent requests in the workspace. The message contains the maximum. The
    /// response has no `Retry-After`.
    Concurrency,
    /// 429: too many requests. With a number, the response contains a `Retry-After` in seconds.
    RateLimit(Option<u32>),
    /// 429: the service is overloaded, for all keys.
    SystemBusy,
    /// 422: a required field is missing from the body, the form or the query.
    FieldMissing(Cow<'static, str>),
    /// 422: a field is not a string, or the token type in the path is unknown.
    NotAString(Cow<'static, str>),
    /// 422: the body or the WebSocket message is not a JSON object.
    MalformedJson,
    /// 404: the voice does not exist in this workspace.
    VoiceNotFound,
    /// 400: the cursor is invalid or belongs to another workspace.
    InvalidCursor,
    /// 400: the request to continue does not exist in this workspace.
    UnknownRequest,
    /// 404: the history item does not exist in this workspace.
    HistoryItemNotFound,
    /// 404: the agent does not exist, or belongs to another workspace.
    AgentNotFound,
    /// 404: the conversation does not exist in this workspace.
    ConversationNotFound,
    /// 404: the request for the list of models contains no key.
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
    /// 405: the method is wrong. The value is the allowed method.
    MethodNotAllowed(&'static str),
    /// 500: the refusal contains no details.
    ServerError,
    /// 503: the service is closed for maintenance.
    Maintenance,
    /// An HTML page with this status, as an intermediary sends it.
    Page(u16),
    /// A refusal with a fixed text from the table.
    Fixed(&'static Example),
}

/// The values that the texts of refusals contain. A text contains only some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RefusalValues {
    /// Credits that the request costs, or its number of characters if its text is too long.
    pub(super) requested_amount: u64,
    /// Credits of the workspace per period.
    pub(super) credit_limit: u64,
    /// Remaining credits of the workspace.
    pub(super) remaining_credits: u64,
    /// The name of the key in the settings of the workspace. It is never the key itself.
    pub(super) key_name: String,
    /// Credits that the key may use per period.
    pub(super) key_cap: u64,
    /// Remaining credits of the cap.
    pub(super) remaining_cap: u64,
    /// Maximum number of concurrent requests.
    pub(super) max_concurrent: u32,
    /// The ID of the requested voice, model or other object, or the whole message about an unknown audio format.
    pub(super) subject: String,
    /// The maximum number of voices, characters or bytes.
    pub(super) max_count: u64,
    /// The ID of the requested model.
    pub(super) model: String,
    /// The requested audio format.
    pub(super) format: String,
}

impl RefusalValues {
    /// Returns the limit that a refusal contains: the maximum, but always less than the requested amount.
    fn exceeded_limit(&self) -> u64 {
        self.max_count.min(self.requested_amount.saturating_sub(1))
    }
}

/// A refusal as it is sent over HTTP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HttpRefusal {
    pub(super) status: StatusCode,
    /// Headers in addition to the common headers.
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: String,
}

/// The names of refusals in faults, in the order of `RefusalKind`. A value in the table is the default value of its
/// refusal.
pub(super) const NAMED_REFUSALS: [(&str, RefusalKind); 25] = [
    ("quota", RefusalKind::Quota),
    ("key_cap", RefusalKind::KeyCap),
    ("invalid", RefusalKind::InvalidKey),
    ("invalid_400", RefusalKind::InvalidKey400),
    ("needs_authorization", RefusalKind::NeedsAuthorization),
    ("missing_permissions", RefusalKind::MissingPermissions(Cow::Borrowed("text_to_speech"))),
    ("unusual_activity", RefusalKind::UnusualActivity),
    ("payment_issue", RefusalKind::PaymentIssue),
    ("insufficient_credits", RefusalKind::InsufficientCredits),
    ("paid_plan_required", RefusalKind::PaidPlanRequired),
    ("unaccepted_terms", RefusalKind::UnacceptedTerms),
    ("forbidden", RefusalKind::Forbidden),
    ("workspace_access_denied", RefusalKind::WorkspaceAccessDenied),
    ("subscription_required", RefusalKind::SubscriptionRequired),
    ("quota_403", RefusalKind::QuotaForbidden),
    ("concurrency", RefusalKind::Concurrency),
    ("rate_limit", RefusalKind::RateLimit(None)),
    ("system_busy", RefusalKind::SystemBusy),
    ("unprocessable", RefusalKind::FieldMissing(Cow::Borrowed("text"))),
    ("voice_not_found", RefusalKind::VoiceNotFound),
    ("model_not_found", RefusalKind::ModelNotFound),
    ("text_too_long", RefusalKind::TextTooLong),
    ("server_error", RefusalKind::ServerError),
    ("maintenance", RefusalKind::Maintenance),
    ("page", RefusalKind::Page(403)),
];

impl FromStr for RefusalKind {
    type Err = UnknownRefusal;

    /// Parses the name of a refusal. `missing_permissions=NAME`, `rate_limit=SECONDS`,
    /// `unprocessable=FIELD` and `page=STATUS` may have a value.
    fn from_str(text: &str) -> Result<Self, UnknownRefusal> {
        let (name, value) = text.split_once('=').map_or((text, None), |(name, value)| (name, Some(value)));
        let unknown = || UnknownRefusal(text.to_owned());
        let named_refusal =
            NAMED_REFUSALS.into_iter().find(|(known_name, _)| *known_name == name).map(|(_, kind)| kind);
        let kind = named_refusal.or_else(|| find_fixed(name)).ok_or_else(unknown)?;
        Ok(match (kind, value) {
            (kind, None) => kind,
            (RefusalKind::MissingPermissions(_), Some(value)) => {
                RefusalKind::MissingPermissions(value.to_owned().into())
            }
            (RefusalKind::FieldMissing(_), Some(value)) => RefusalKind::FieldMissing(value.to_owned().into()),
            (RefusalKind::RateLimit(_), Some(value)) => {
                RefusalKind::RateLimit(Some(value.trim_end_matches('s').parse().map_err(|_| unknown())?))
            }
            (RefusalKind::Page(_), Some(value)) => {
                let status = value.parse().ok().filter(|status| (400..600).contains(status));
                RefusalKind::Page(status.ok_or_else(unknown)?)
            }
            (_, Some(_)) => return Err(unknown()),
        })
    }
}

impl fmt::Display for RefusalKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let RefusalKind::Fixed(fixed) = self {
            return f.write_str(fixed.name);
        }
        let is_same = |known: &RefusalKind| std::mem::discriminant(known) == std::mem::discriminant(self);
        let name =
            NAMED_REFUSALS.iter().find(|(_, known)| is_same(known)).map_or("unnamed", |(name, _)| name);
        f.write_str(name)?;
        if let RefusalKind::MissingPermissions(value) | RefusalKind::FieldMissing(value) = self {
            write!(f, "={value}")?;
        } else if let RefusalKind::RateLimit(Some(seconds)) = self {
            write!(f, "={seconds}")?;
        } else if let RefusalKind::Page(status) = self {
            write!(f, "={status}")?;
        }
        Ok(())
    }
}

/// The error for an unknown name of a refusal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a refusal: the names are {names}", names = refusal_names())]
pub struct UnknownRefusal(String);

/// Returns the names of all refusals and of their optional values, for the error message.
fn refusal_names() -> String {
    const VALUE_NAMES: [(&str, &str); 4] = [
        ("missing_permissions", "NAME"),
        ("rate_limit", "SECONDS"),
        ("unprocessable", "FIELD"),
        ("page", "STATUS"),
    ];
    let named = NAMED_REFUSALS.iter().map(|(name, _)| {
        match VALUE_NAMES.iter().find(|(valued_name, _)| valued_name == name) {
            Some((_, value)) => format!("{name}[={value}]"),
            None => (*name).to_owned(),
        }
    });
    named.chain(examples().map(|example| example.name.to_owned())).collect::<Vec<_>>().join(", ")
}
