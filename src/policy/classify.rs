//! What an answer of the provider means: whose fault it is, and of what kind.
//!
//! The status alone does not say. 401 is a bad key, an empty account, a missing permission or an
//! unpaid bill; 403 and 402 are as ambiguous. The body says it, in one of five shapes, and in the
//! set of its `code`, `status`, `type` and message the most specific word wins. The plain statuses
//! are the fallback for bodies that say nothing.

mod body;

use std::time::Duration;

use http::StatusCode;

use super::permission::Permission;

pub use body::ErrorBody;

/// What an answer means for the key it was asked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not a refusal: 1xx, 2xx, 3xx.
    Served,
    /// The workspace has too few credits left for this request.
    WorkspaceQuota(Shortfall),
    /// The key's own cap is reached; other keys of its workspace may serve.
    KeyQuota(Shortfall),
    /// The provider does not know the key, or knows it as disabled.
    InvalidKey,
    /// The key is fine and may not do this; the permission when the message names one that is
    /// known.
    MissingPermission(Option<Permission>),
    /// The workspace's plan does not have this feature, or the workspace not this right.
    PlanFeature,
    /// The workspace is locked: unpaid, or terms not accepted.
    Billing,
    /// The workspace is suspected of abuse. The provider looks at addresses too, so others behind
    /// ours may be next.
    Abuse,
    /// Too many requests in a span of time; `Retry-After` when the provider said so.
    RateLimited(Option<Duration>),
    /// Too many requests at once in this workspace, with the maximum when the message names it.
    Concurrency {
        /// The workspace's maximum of parallel requests.
        maximum: Option<u32>,
    },
    /// The provider is overloaded or in maintenance, whatever the key.
    Busy,
    /// A refusal that does not say why: the key, its address list, the plan, the request or
    /// something on the way. Nobody can tell.
    Unexplained(Refusal),
    /// What was asked for is not in this workspace.
    NotFound,
    /// The request itself is wrong; no key would change that.
    RequestError,
    /// The provider failed, and may have done the work.
    ServerError,
    /// A refusal whose body could not be read, within bounds, to know of what kind.
    Unreadable,
}

/// The two numbers of a quota refusal, when the message carries them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shortfall {
    /// Credits that are left.
    pub remaining: Option<u64>,
    /// Credits that this request would cost.
    pub required: Option<u64>,
}

/// What a refusal without a reason says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 401, and no more.
    Unauthorized,
    /// 402, and no more.
    PaymentRequired,
    /// 403, and no more.
    Forbidden,
    /// Any of them, and nothing may be concluded: the answer to a `HEAD` cannot say more.
    Bodiless,
}

/// What an answer is about, which decides who is asked next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// Nothing is wrong.
    Nothing,
    /// The key or its workspace: another may serve.
    Key,
    /// The key, the plan or the request; one more workspace will tell.
    Unclear,
    /// The request: no key would change that.
    Request,
    /// The provider, which has refused the work.
    Refusing,
    /// The provider, which may have done the work.
    Failing,
}

impl Verdict {
    /// What it is about.
    #[must_use]
    pub fn concern(self) -> Concern {
        match self {
            Self::Served => Concern::Nothing,
            Self::WorkspaceQuota(_)
            | Self::KeyQuota(_)
            | Self::InvalidKey
            | Self::Billing
            | Self::RateLimited(_)
            | Self::Concurrency { .. } => Concern::Key,
            Self::MissingPermission(_) | Self::PlanFeature | Self::Abuse | Self::Unexplained(_) => {
                Concern::Unclear
            }
            // A refusal that cannot be read is relayed like the client's own mistake: it is the
            // client who can read it.
            Self::NotFound | Self::RequestError | Self::Unreadable => Concern::Request,
            Self::Busy => Concern::Refusing,
            Self::ServerError => Concern::Failing,
        }
    }

    /// What it means of the key when the same request was served with another key: then it was
    /// not the request. `None` when it still may be many things.
    #[must_use]
    pub fn by_contrast(self) -> Option<Self> {
        let Self::Unexplained(refusal) = self else { return None };
        match refusal {
            Refusal::Unauthorized => Some(Self::InvalidKey),
            Refusal::PaymentRequired => Some(Self::WorkspaceQuota(Shortfall::default())),
            Refusal::Forbidden | Refusal::Bodiless => None,
        }
    }

    /// The word for it in logs, records and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::WorkspaceQuota(_) => "workspace_quota",
            Self::KeyQuota(_) => "key_quota",
            Self::InvalidKey => "invalid_key",
            Self::MissingPermission(_) => "missing_permission",
            Self::PlanFeature => "plan_feature",
            Self::Billing => "billing",
            Self::Abuse => "abuse",
            Self::RateLimited(_) => "rate_limited",
            Self::Concurrency { .. } => "concurrency",
            Self::Busy => "busy",
            Self::Unexplained(Refusal::Unauthorized) => "unauthorized",
            Self::Unexplained(Refusal::PaymentRequired) => "payment_required",
            Self::Unexplained(Refusal::Forbidden) => "forbidden",
            Self::Unexplained(Refusal::Bodiless) => "unexplained",
            Self::NotFound => "not_found",
            Self::RequestError => "request_error",
            Self::ServerError => "server_error",
            Self::Unreadable => "unreadable",
        }
    }
}

/// Whether the body of an answer with this status must be read before it can be judged.
#[must_use]
pub fn is_body_needed(status: StatusCode) -> bool {
    // 400 is among them: a key has been called invalid, and a model missing, with a 400. And 404: a model
    // that is missing is missing for every account.
    matches!(status.as_u16(), 400 | 401 | 402 | 403 | 404 | 429)
}

/// Judges an answer. `body` is what its body says; `None` when it was not needed, or when there is
/// none to an answer like this (of `HEAD`). `retry_after` comes from its headers.
#[must_use]
pub fn classify(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    if !status.is_client_error() && !status.is_server_error() {
        return Verdict::Served;
    }
    // A 422 says nothing of the key: the provider checks the schema before it looks at the key.
    if is_body_needed(status)
        && let Some(verdict) = body.and_then(|body| by_words(status, body, retry_after))
    {
        return verdict;
    }
    by_status(status, body, retry_after)
}

/// What a refusal says that comes as a message or an end of a socket, where no status says more.
/// `None` when its words are not known.
#[must_use]
pub fn in_band(said: &ErrorBody) -> Option<Verdict> {
    by_words(StatusCode::OK, said, None)
}

/// The body's own words, most specific first.
fn by_words(status: StatusCode, body: &ErrorBody, retry_after: Option<Duration>) -> Option<Verdict> {
    let shortfall = || Shortfall {
        remaining: body.number_between("you have ", " credits remaining"),
        required: body.number_between("while ", " credits are required"),
    };
    if body.message_starts("this request exceeds your api key") {
        return Some(Verdict::KeyQuota(shortfall()));
    }
    if body.says("quota_exceeded")
        || body.says("insufficient_credits")
        || body.message_starts("this request exceeds your quota")
        || body.message_starts("you have exceeded your quota")
    {
        return Some(Verdict::WorkspaceQuota(shortfall()));
    }
    if body.says("too_many_concurrent_requests")
        || body.says("concurrent_limit_exceeded")
        || body.message_starts("too many concurrent requests")
    {
        let maximum = body.number_between("a maximum of ", " concurrent requests");
        return Some(Verdict::Concurrency { maximum: maximum.and_then(|n| u32::try_from(n).ok()) });
    }
    if body.says("system_busy") {
        return Some(Verdict::Busy);
    }
    if body.says("rate_limit_exceeded") {
        return Some(Verdict::RateLimited(retry_after));
    }
    if ["missing_permissions", "insufficient_permissions"].iter().any(|word| body.says(word)) {
        let name = body.text_between("missing the permission ", " to execute");
        return Some(Verdict::MissingPermission(name.and_then(Permission::parse)));
    }
    if body.says("detected_unusual_activity") || body.message_starts("unusual activity detected") {
        return Some(Verdict::Abuse);
    }
    if ["payment_issue", "unaccepted_terms"].iter().any(|word| body.says(word)) {
        return Some(Verdict::Billing);
    }
    if PLAN_FEATURE.iter().any(|word| body.says(word)) || body.any_word(|word| word.starts_with("only_for_"))
    {
        return Some(Verdict::PlanFeature);
    }
    if body.says("invalid_api_key") || body.message_starts("invalid api key") {
        return Some(Verdict::InvalidKey);
    }
    if body.says("model_not_found") {
        return Some(Verdict::RequestError);
    }
    if body.says("not_found") || body.any_word(|word| word.ends_with("_not_found")) {
        return Some(Verdict::NotFound);
    }
    // Documented with 400 and with 401: the client's own mistake is no reason to doubt a key.
    let is_mistake = REQUEST_ERROR.iter().any(|word| body.says(word));
    if status == StatusCode::BAD_REQUEST || is_mistake {
        return Some(Verdict::RequestError);
    }
    // What we present is a key in `xi-api-key`; whoever does not see one is not judging it.
    if NO_KEY_SEEN.iter().any(|word| body.says(word)) {
        return Some(Verdict::Unexplained(Refusal::Unauthorized));
    }
    None
}

const NO_KEY_SEEN: [&str; 4] =
    ["needs_authorization", "missing_api_key", "invalid_authorization_header", "authentication_required"];

const REQUEST_ERROR: [&str; 4] =
    ["validation_error", "max_character_limit_exceeded", "text_too_long", "invalid_parameters"];

const PLAN_FEATURE: [&str; 8] = [
    "paid_plan_required",
    "subscription_required",
    "feature_not_available",
    "can_not_use_instant_voice_cloning",
    "can_not_use_professional_voice_cloning",
    "voice_access_denied",
    "model_access_denied",
    "workspace_access_denied",
];

/// The plain statuses, for a body whose words are not known, and for none at all. An error body of
/// any kind comes from the provider, and its status means the key. Without one, it may be somebody
/// on the way who answers, the same to every key.
fn by_status(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    let says_something = body.is_some_and(|body| !body.is_empty());
    match status.as_u16() {
        401 | 402 | 403 | 429 if body.is_none() => Verdict::Unexplained(Refusal::Bodiless),
        401 if says_something => Verdict::InvalidKey,
        401 => Verdict::Unexplained(Refusal::Unauthorized),
        402 if says_something => Verdict::WorkspaceQuota(Shortfall::default()),
        402 => Verdict::Unexplained(Refusal::PaymentRequired),
        403 => Verdict::Unexplained(Refusal::Forbidden),
        404 => Verdict::NotFound,
        429 => Verdict::RateLimited(retry_after),
        503 => Verdict::Busy,
        500.. => Verdict::ServerError,
        _ => Verdict::RequestError,
    }
}

#[cfg(test)]
mod tests;
