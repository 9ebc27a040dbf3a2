//! What an answer of the provider means: whose fault it is, and of what kind.
//!
//! The status alone does not say. 401 is a bad key, an empty account, a missing permission or an
//! unpaid bill; 400, 402 and 403 are as ambiguous. The body says it, in one of several shapes, and in the
//! set of its `code`, `status`, `type` and message the most specific word wins (`words`). Where the
//! body says nothing that is known, the status is evidence about nothing but this request. Sockets are
//! judged by the same words, with the status that a code has over HTTP (`codes`).

mod body;
pub(in crate::policy) mod codes;
mod words;

use std::time::Duration;

use http::StatusCode;

use super::permission::Permission;

pub use body::ErrorBody;

/// What an answer means for the key it was asked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Not a refusal: 1xx, 2xx, 3xx.
    Served,
    /// The workspace has too few credits left for this request.
    WorkspaceQuota(Shortfall),
    /// The key's own cap is reached; other keys of its workspace may serve.
    KeyQuota(Shortfall),
    /// The provider does not know the key, or knows it as disabled.
    InvalidKey,
    /// The key belongs to another region of the provider than the host that was asked.
    WrongHost,
    /// The key is fine and may not do this; the permission when the message names one that is
    /// known.
    MissingPermission(Option<Permission>),
    /// The workspace's plan does not have this feature, or the workspace not this right.
    PlanFeature(Subject),
    /// The workspace has as many voices, or other things of a kind, as its plan allows.
    Slots,
    /// The workspace is locked: unpaid, or terms not accepted.
    Billing,
    /// The workspace is suspected of abuse. The provider looks at addresses too, so others behind
    /// ours may be next.
    Abuse,
    /// Too many requests in a span of time; `Retry-After` when the provider sent one.
    RateLimited(Option<Duration>),
    /// Too many requests at once in this workspace, with the maximum when the message names it.
    Concurrency {
        /// The workspace's maximum of parallel requests.
        maximum: Option<u32>,
    },
    /// The provider is overloaded or in maintenance, whatever the key.
    Busy,
    /// A refusal that does not say why in words that are known: the key, its address list, the plan,
    /// the request or something on the way may be the reason.
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

/// The numbers of a quota refusal, when the message carries them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shortfall {
    /// Credits that are left.
    pub remaining: Option<u64>,
    /// Credits that this request would cost.
    pub required: Option<u64>,
    /// Credits of the whole quota that it speaks of.
    pub quota: Option<u64>,
}

/// Other programs may spend one part in so many of an account's credits between two polls; when more are
/// missing, the figures are taken for words, and a poll decides.
const SPENT_UNSEEN_MAX: u64 = 20;

impl Shortfall {
    /// Without its numbers, when they are of another quota than that of an account of `limit` credits and
    /// `extension` more.
    #[must_use]
    pub fn of_account(self, limit: Option<u64>, extension: u64) -> Self {
        match (self.quota, limit) {
            (Some(quota), Some(limit)) if quota != limit && quota != limit.saturating_add(extension) => {
                Self::default()
            }
            _ => self,
        }
    }

    /// Without its numbers, when the account is known to have `left` credits of `limit`: they would pay for the
    /// request, and far more of them are missing than other programs spend between two polls. One request
    /// that is refused so would otherwise take the whole account from everybody.
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

    /// The two numbers, when both are there and say that the first does not suffice. Figures that
    /// contradict the refusal prove nothing.
    #[must_use]
    pub fn figures(self) -> Option<(u64, u64)> {
        self.remaining.zip(self.required).filter(|(remaining, required)| remaining < required)
    }
}

/// What of a request a plan's refusal is about, as far as its words say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A voice of the library, or one that belongs to another account.
    Voice,
    /// The model.
    Model,
    /// The output format.
    OutputFormat,
    /// Making a voice of recordings.
    Cloning,
    /// The characters of one request.
    TextLength,
    /// The workspace may not call this endpoint.
    Endpoint,
    /// The words name nothing that is known.
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

    /// The word for it in the database.
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

    /// The subject of that word.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|subject| subject.word() == word)
    }
}

/// What a refusal without a known reason says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// 401, and no more that is known.
    Unauthorized,
    /// 402, and no more that is known.
    PaymentRequired,
    /// 403, and no more that is known.
    Forbidden,
    /// 429, and no more that is known; `Retry-After` when there was one.
    TooMany(Option<Duration>),
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
    /// What the key, its plan or its workspace can do: one that can may serve.
    Capability,
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

    /// Whether it proves something of a key or its workspace whatever other accounts say: it carries
    /// figures of that account, or is about something narrower. The same words of a second account make
    /// all else the request's matter.
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

    /// The word for it in logs, records and metrics.
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

/// Whether the body of an answer with this status must be read before it can be judged.
#[must_use]
pub fn is_body_needed(status: StatusCode) -> bool {
    // 400 is among them: a key has been called invalid, a voice missing and a plan too small with a 400.
    // And 404: a model that is missing is missing for every account.
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
        && let Some(verdict) = body.and_then(|body| words::verdict(status, body, retry_after))
    {
        return verdict;
    }
    by_status(status, body, retry_after)
}

/// Judges a refusal whose body could not be read, within bounds, to know of what kind. With a status that
/// blames the account in most forms, one more workspace will tell.
#[must_use]
pub fn classify_unreadable(status: StatusCode, retry_after: Option<Duration>) -> Verdict {
    let verdict = by_status(status, Some(&ErrorBody::default()), retry_after);
    if matches!(verdict, Verdict::Unexplained(_)) { verdict } else { Verdict::Unreadable }
}

/// What a refusal says that comes as a message or an end of a socket, where no status says more: a code is
/// judged as with the status that it has over HTTP. `None` when its words are not known.
#[must_use]
pub fn in_band(said: &ErrorBody) -> Option<Verdict> {
    words::verdict(StatusCode::OK, said, None)
        .or_else(|| codes::status(said).map(|status| classify(status, Some(said), None)))
}

/// What a status alone means. It may come from anything on the way, the same to every key, so it is
/// evidence about this request and nothing else.
fn by_status(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    match status.as_u16() {
        401 | 402 | 403 | 429 if body.is_none() => Verdict::Unexplained(Refusal::Bodiless),
        401 => Verdict::Unexplained(Refusal::Unauthorized),
        402 => Verdict::Unexplained(Refusal::PaymentRequired),
        403 => Verdict::Unexplained(Refusal::Forbidden),
        429 => Verdict::Unexplained(Refusal::TooMany(retry_after)),
        503 => Verdict::Busy,
        500.. => Verdict::ServerError,
        // Among them a 404 that names nothing of an account: then there is no such endpoint.
        _ => Verdict::RequestError,
    }
}

#[cfg(test)]
mod tests;
