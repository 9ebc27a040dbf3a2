//! Classifies a response of the provider: whose fault it is, and of what kind.
//!
//! The status alone is ambiguous. 401 is a bad key, an empty account, a missing permission or an unpaid
//! bill; 400, 402 and 403 are as ambiguous. The body decides: of its `code`, `status`, `type` and
//! message, in one of several shapes, the most specific known word wins (`words`). Where the body has no
//! known word, the status is evidence about this request only. WebSocket errors are classified by the
//! same words, with the status that a code has over HTTP (`codes`).

mod body;
pub(in crate::policy) mod codes;
mod words;

use std::time::Duration;

use http::StatusCode;

use super::permission::Permission;

pub use body::ErrorBody;

/// What a response means for the key that was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Not a refusal: 1xx, 2xx, 3xx.
    Served,
    /// The workspace has too few credits left for this request.
    WorkspaceQuota(Shortfall),
    /// The key's own cap is reached; other keys of its workspace may serve.
    KeyQuota(Shortfall),
    /// The provider does not know the key, or has disabled it.
    InvalidKey,
    /// The key belongs to another region of the provider than the host that was used.
    WrongHost,
    /// The key is valid, but lacks the permission for this request; with the permission when the message
    /// names a known one.
    MissingPermission(Option<Permission>),
    /// The workspace's plan lacks this feature, or the workspace lacks this right.
    PlanFeature(Subject),
    /// The workspace holds as many voices, or other resources of a kind, as its plan allows.
    Slots,
    /// The workspace is locked: an unpaid bill, or terms not accepted.
    Billing,
    /// The workspace is suspected of abuse. The provider also judges client addresses, so other
    /// workspaces used from ours may be next.
    Abuse,
    /// Too many requests in a span of time, with the `Retry-After` if the provider sent one.
    RateLimited(Option<Duration>),
    /// Too many concurrent requests in this workspace.
    Concurrency {
        /// The workspace's maximum of concurrent requests, when the message names it.
        maximum: Option<u32>,
    },
    /// The provider is overloaded or in maintenance, whatever the key.
    Busy,
    /// A refusal without a known reason: the key, its address list, the plan, the request or an
    /// intermediary may be the cause.
    Unexplained(Refusal),
    /// The requested resource is not in this workspace.
    NotFound,
    /// The request itself is wrong; no key would change that.
    RequestError,
    /// The provider failed, and may have done the work.
    ServerError,
    /// A refusal whose body could not be read within the bounds to classify it.
    Unreadable,
}

/// The figures of a quota refusal, when the message contains them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shortfall {
    /// Remaining credits.
    pub remaining: Option<u64>,
    /// Credits that this request would cost.
    pub required: Option<u64>,
    /// The size of the quota in credits.
    pub quota: Option<u64>,
}

/// Other programs may spend at most one part in this many of an account's credits between two polls. When
/// more credits are missing, the figures are ignored and a poll decides.
const SPENT_UNSEEN_MAX: u64 = 20;

impl Shortfall {
    /// Drops the figures when they are about another quota than that of an account with `limit` credits
    /// and an `extension`.
    #[must_use]
    pub fn of_account(self, limit: Option<u64>, extension: u64) -> Self {
        match (self.quota, limit) {
            (Some(quota), Some(limit)) if quota != limit && quota != limit.saturating_add(extension) => {
                Self::default()
            }
            _ => self,
        }
    }

    /// Drops the figures when the account is known to have `left` credits of `limit`, which would pay for
    /// the request, and far more of them are missing than other programs spend between two polls.
    /// Otherwise one wrong refusal would disable the whole account for every client.
    #[must_use]
    pub fn unless_contradicted(self, left: u64, limit: u64) -> Self {
        match self.figures() {
            Some((remaining, required))
                if left >= required && left - remaining > limit / SPENT_UNSEEN_MAX =>
            {
                Self::default()
            }
            _ => self,
        }
    }

    /// Remaining and required credits, when both are known and the first is below the second. Figures
    /// that contradict the refusal prove nothing.
    #[must_use]
    pub fn figures(self) -> Option<(u64, u64)> {
        self.remaining.zip(self.required).filter(|(remaining, required)| remaining < required)
    }
}

/// The part of a request that a plan's refusal is about, as far as its words say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A voice of the library, or one that belongs to another account.
    Voice,
    /// The model.
    Model,
    /// The output format.
    OutputFormat,
    /// Cloning a voice from recordings.
    Cloning,
    /// The number of characters in one request.
    TextLength,
    /// The workspace may not call this endpoint.
    Endpoint,
    /// The words name no known subject.
    Unnamed,
}

impl Subject {
    const ALL: [Self; 7] = [
        Self::Voice,
        Self::Model,
        Self::OutputFormat,
        Self::Cloning,
        Self::TextLength,
        Self::Endpoint,
        Self::Unnamed,
    ];

    /// The identifier in the database.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Voice => "voice",
            Self::Model => "model",
            Self::OutputFormat => "output_format",
            Self::Cloning => "cloning",
            Self::TextLength => "text_length",
            Self::Endpoint => "endpoint",
            Self::Unnamed => "unnamed",
        }
    }

    /// Parses the identifier of the database.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|subject| subject.word() == word)
    }
}

/// The form of a refusal without a known reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// 401 without known words.
    Unauthorized,
    /// 402 without known words.
    PaymentRequired,
    /// 403 without known words.
    Forbidden,
    /// 429 without known words; with the `Retry-After` if there was one.
    TooMany(Option<Duration>),
    /// Any of them, without a conclusion: a response to `HEAD` has no body.
    Bodiless,
}

/// What a response is about, which decides which key is tried next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// The request was served.
    Nothing,
    /// The key or its workspace: another one may serve.
    Key,
    /// The capabilities of the key, its plan or its workspace: a more capable one may serve.
    Capability,
    /// The key, the plan or the request: an attempt in one more workspace decides.
    Unclear,
    /// The request: no key would change that.
    Request,
    /// The provider, which has refused the work.
    Refusing,
    /// The provider, which may have done the work.
    Failing,
}

impl Verdict {
    /// What the verdict is about.
    #[must_use]
    pub fn concern(self) -> Concern {
        match self {
            Self::Served => Concern::Nothing,
            Self::WorkspaceQuota(_)
            | Self::KeyQuota(_)
            | Self::InvalidKey
            | Self::WrongHost
            | Self::Billing
            | Self::RateLimited(_)
            | Self::Concurrency { .. } => Concern::Key,
            Self::MissingPermission(_) | Self::PlanFeature(_) | Self::Slots | Self::Abuse => {
                Concern::Capability
            }
            Self::Unexplained(_) => Concern::Unclear,
            Self::NotFound | Self::RequestError | Self::Unreadable => Concern::Request,
            Self::Busy => Concern::Refusing,
            Self::ServerError => Concern::Failing,
        }
    }

    /// Whether it proves something about a key or its workspace regardless of other accounts: it contains
    /// figures of that account, or is about something narrower. Any other verdict is about the request
    /// when a second account returns the same words.
    #[must_use]
    pub fn proves_itself(self) -> bool {
        match self {
            Self::WorkspaceQuota(shortfall) | Self::KeyQuota(shortfall) => shortfall.figures().is_some(),
            Self::InvalidKey
            | Self::WrongHost
            | Self::Billing
            | Self::Abuse
            | Self::RateLimited(_)
            | Self::Unexplained(_) => false,
            Self::Served
            | Self::MissingPermission(_)
            | Self::PlanFeature(_)
            | Self::Slots
            | Self::Concurrency { .. }
            | Self::Busy
            | Self::NotFound
            | Self::RequestError
            | Self::ServerError
            | Self::Unreadable => true,
        }
    }

    /// The identifier in logs, usage records and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Served => "served",
            Self::WorkspaceQuota(_) => "workspace_quota",
            Self::KeyQuota(_) => "key_quota",
            Self::InvalidKey => "invalid_key",
            Self::WrongHost => "wrong_host",
            Self::MissingPermission(_) => "missing_permission",
            Self::PlanFeature(_) => "plan_feature",
            Self::Slots => "slots",
            Self::Billing => "billing",
            Self::Abuse => "abuse",
            Self::RateLimited(_) => "rate_limited",
            Self::Concurrency { .. } => "concurrency",
            Self::Busy => "busy",
            Self::Unexplained(Refusal::Unauthorized) => "unauthorized",
            Self::Unexplained(Refusal::PaymentRequired) => "payment_required",
            Self::Unexplained(Refusal::Forbidden) => "forbidden",
            Self::Unexplained(Refusal::TooMany(_)) => "too_many_requests",
            Self::Unexplained(Refusal::Bodiless) => "unexplained",
            Self::NotFound => "not_found",
            Self::RequestError => "request_error",
            Self::ServerError => "server_error",
            Self::Unreadable => "unreadable",
        }
    }
}

/// Whether the body of a response with this status must be read to classify it.
#[must_use]
pub fn is_body_needed(status: StatusCode) -> bool {
    // 400 is included: a key has been called invalid, a voice missing and a plan too small with a 400.
    // 404 too: a missing model is missing for every account.
    matches!(status.as_u16(), 400 | 401 | 402 | 403 | 404 | 429)
}

/// Classifies a response. `body` is its parsed body; `None` when it was not needed, or when the response
/// has none (to `HEAD`). `retry_after` comes from its headers.
#[must_use]
pub fn classify(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    if !status.is_client_error() && !status.is_server_error() {
        return Verdict::Served;
    }
    // A 422 says nothing about the key: the provider validates the schema before it checks the key.
    if is_body_needed(status)
        && let Some(verdict) = body.and_then(|body| words::verdict(status, body, retry_after))
    {
        return verdict;
    }
    by_status(status, body, retry_after)
}

/// Classifies a refusal whose body could not be read within the bounds. With a status that blames the
/// account in most forms, one more workspace is tried.
#[must_use]
pub fn classify_unreadable(status: StatusCode, retry_after: Option<Duration>) -> Verdict {
    let verdict = by_status(status, Some(&ErrorBody::default()), retry_after);
    if matches!(verdict, Verdict::Unexplained(_)) { verdict } else { Verdict::Unreadable }
}

/// Classifies a refusal in a WebSocket message or close frame, which has no status: a code is classified
/// with the status that it has over HTTP. `None` when its words are not known.
#[must_use]
pub fn in_band(said: &ErrorBody) -> Option<Verdict> {
    words::verdict(StatusCode::OK, said, None)
        .or_else(|| codes::status(said).map(|status| classify(status, Some(said), None)))
}

/// Classifies by status alone. Any intermediary may send it, the same for every key, so it is evidence
/// about this request only.
fn by_status(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    match status.as_u16() {
        401 | 402 | 403 | 429 if body.is_none() => Verdict::Unexplained(Refusal::Bodiless),
        401 => Verdict::Unexplained(Refusal::Unauthorized),
        402 => Verdict::Unexplained(Refusal::PaymentRequired),
        403 => Verdict::Unexplained(Refusal::Forbidden),
        429 => Verdict::Unexplained(Refusal::TooMany(retry_after)),
        503 => Verdict::Busy,
        500.. => Verdict::ServerError,
        // This includes a 404 that names no resource of an account: then the endpoint does not exist.
        _ => Verdict::RequestError,
    }
}

#[cfg(test)]
mod tests;
