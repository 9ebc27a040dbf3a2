//! A verdict is the meaning of a provider's response for the request and for the key that was used.
//! Decisions about retries, evidence and restrictions take verdicts as input.
//!
//! [`elevenlabs::refusal`](crate::elevenlabs::refusal) makes a verdict from a response.

use std::time::Duration;

use super::outcome::Outcome;
use super::permission::Permission;

/// The meaning of a response for the request and for the key that was used.
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
    /// The provider is overloaded or in maintenance, for every key.
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
    /// Drops the figures when they belong to another quota than that of an account with `limit` credits
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

/// The part of a request that the words of a plan's refusal name.
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
    /// One of these statuses without a body, such as a response to `HEAD`: nothing can be concluded.
    Bodiless,
}

/// The part that a verdict is about: the key, its capabilities, the request or the provider. It decides
/// which key is tried next.
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
    /// The part that the verdict is about.
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

    /// The outcome of an attempt that ended with this verdict.
    #[must_use]
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Served => Outcome::Served,
            Self::WorkspaceQuota(_) => Outcome::WorkspaceQuota,
            Self::KeyQuota(_) => Outcome::KeyQuota,
            Self::InvalidKey => Outcome::InvalidKey,
            Self::WrongHost => Outcome::WrongHost,
            Self::MissingPermission(_) => Outcome::MissingPermission,
            Self::PlanFeature(_) => Outcome::PlanFeature,
            Self::Slots => Outcome::Slots,
            Self::Billing => Outcome::Billing,
            Self::Abuse => Outcome::Abuse,
            Self::RateLimited(_) => Outcome::RateLimited,
            Self::Concurrency { .. } => Outcome::Concurrency,
            Self::Busy => Outcome::Busy,
            Self::Unexplained(Refusal::Unauthorized) => Outcome::Unauthorized,
            Self::Unexplained(Refusal::PaymentRequired) => Outcome::PaymentRequired,
            Self::Unexplained(Refusal::Forbidden) => Outcome::Forbidden,
            Self::Unexplained(Refusal::TooMany(_)) => Outcome::TooManyRequests,
            Self::Unexplained(Refusal::Bodiless) => Outcome::Unexplained,
            Self::NotFound => Outcome::NotFound,
            Self::RequestError => Outcome::RequestError,
            Self::ServerError => Outcome::ServerError,
            Self::Unreadable => Outcome::Unreadable,
        }
    }

    /// The identifier in logs, usage records and metrics.
    #[must_use]
    pub fn word(self) -> &'static str {
        self.outcome().word()
    }
}
