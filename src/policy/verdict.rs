//! Defines the verdict: the classification of a response of the provider. Also defines what a verdict concerns, the
//! outcome that it is recorded as, the credits that a quota refusal reports, and the part of a request that a plan does
//! not allow.
//!
//! [`elevenlabs::refusal`](crate::elevenlabs::refusal) derives a verdict from a response. Decisions about retries,
//! evidence and restrictions depend only on the verdict.

use std::time::Duration;

use super::outcome::Outcome;
use super::permission::Permission;

/// The meaning of a response for the request, and for the key with which it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The response is not a refusal: 1xx, 2xx or 3xx.
    Served,
    /// The workspace has too few credits left for this request.
    WorkspaceQuota(Shortfall),
    /// The key's own quota is used up. Other keys of its workspace may serve.
    KeyQuota(Shortfall),
    /// The provider does not know the key, or has disabled it.
    InvalidKey,
    /// The key belongs to another region of the provider than the host to which it was sent.
    WrongHost,
    /// The key lacks a permission. Contains the permission if the message names a known permission.
    MissingPermission(Option<Permission>),
    /// The plan of the workspace lacks a feature, or the workspace lacks a right.
    PlanFeature(Subject),
    /// The workspace has the maximum number of voices, or of another resource, that its plan allows.
    Slots,
    /// The workspace is locked, because a bill is unpaid or the terms are not accepted.
    Billing,
    /// The workspace is suspected of abuse. The provider also rates client addresses, so other workspaces
    /// that are used from this address are at risk.
    Abuse,
    /// The provider received too many requests in a span of time. Contains the `Retry-After`, if any.
    RateLimited(Option<Duration>),
    /// The workspace has too many concurrent requests.
    Concurrency {
        /// The maximum number of concurrent requests, if the message contains it.
        maximum: Option<u32>,
    },
    /// The provider is overloaded or in maintenance, for every key.
    Busy,
    /// The reason of the refusal is unknown. The key, its address list, the plan, the request or an
    /// intermediary may be the cause.
    Unexplained(UnexplainedRefusal),
    /// The requested resource is not in this workspace.
    NotFound,
    /// The request is invalid with every key.
    RequestError,
    /// The provider failed, and may have processed the request.
    ServerError,
    /// The body of the refusal could not be read within the limits for classification.
    Unreadable,
}

/// The credits that the message of a quota refusal contains. A field is `None` if the message does not contain its
/// number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Shortfall {
    /// Remaining credits.
    pub remaining: Option<u64>,
    /// Credits that this request would cost.
    pub required: Option<u64>,
    /// The size of the quota in credits.
    pub quota: Option<u64>,
}

/// Other programs are assumed to spend at most the limit of an account divided by this number between two
/// polls. If more credits are missing, the refusal is ignored and a poll decides.
const UNOBSERVED_SPENDING_DIVISOR: u64 = 20;

impl Shortfall {
    /// Discards the credits if the message reports a quota that differs from the account's quota, which has
    /// `limit` credits and an `extension`.
    #[must_use]
    pub fn if_quota_matches(self, limit: Option<u64>, extension: u64) -> Self {
        match (self.quota, limit) {
            (Some(quota), Some(limit)) if quota != limit && quota != limit.saturating_add(extension) => {
                Self::default()
            }
            _ => self,
        }
    }

    /// Discards the credits if they contradict the account, which is known to have `left` credits of `limit`. They
    /// contradict it if `left` is enough for the request, and if more credits are missing than other programs are
    /// assumed to spend between two polls. If such credits were kept, one wrong refusal would disable the account for
    /// every client.
    #[must_use]
    pub fn unless_contradicted(self, left: u64, limit: u64) -> Self {
        match self.credits() {
            Some((remaining, required))
                if left >= required && left - remaining > limit / UNOBSERVED_SPENDING_DIVISOR =>
            {
                Self::default()
            }
            _ => self,
        }
    }

    /// Returns the remaining and the required credits, if both are known and the remaining credits do not suffice.
    /// Other numbers contradict the refusal.
    #[must_use]
    pub fn credits(self) -> Option<(u64, u64)> {
        self.remaining.zip(self.required).filter(|(remaining, required)| remaining < required)
    }
}

/// The part of a request that a plan does not allow, according to the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A voice of the library, or a voice that belongs to another account.
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
    /// The message does not name a known subject.
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

    /// Returns the identifier in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
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

    /// Parses an identifier from the database.
    #[must_use]
    pub fn parse(identifier: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|subject| subject.as_str() == identifier)
    }
}

/// The status of a refusal whose reason is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UnexplainedRefusal {
    /// A 401 response without a known message.
    Unauthorized,
    /// A 402 response without a known message.
    PaymentRequired,
    /// A 403 response without a known message.
    Forbidden,
    /// A 429 response without a known message. Contains the `Retry-After`, if any.
    TooMany(Option<Duration>),
    /// A response with the status of another variant and without a body, for example to a `HEAD` request. It permits no
    /// conclusion.
    Bodiless,
}

/// The party or thing to which a verdict applies: the key, its capabilities, the request or the provider. It determines
/// whether the request is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concern {
    /// The request was served.
    Nothing,
    /// The verdict is about the key or its workspace. Another key may serve.
    Key,
    /// The verdict is about the capabilities of the key, its plan or its workspace. A more capable key may serve.
    Capability,
    /// The verdict may be about the key, the plan or the request. An attempt in another workspace decides.
    Unclear,
    /// The verdict is about the request, which fails with every key, or its response cannot be classified.
    Request,
    /// The provider is overloaded, and did not process the request.
    Overload,
    /// The provider failed, and may have processed the request.
    Failure,
}

impl Verdict {
    /// Returns the concern of the verdict.
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
            Self::Busy => Concern::Overload,
            Self::ServerError => Concern::Failure,
        }
    }

    /// Whether the verdict keeps its meaning if another account refuses the same request with the same message,
    /// because it contains numbers of its account or has a narrower scope than the account. Any other verdict is then
    /// about the request.
    #[must_use]
    pub fn is_conclusive(self) -> bool {
        match self {
            Self::WorkspaceQuota(shortfall) | Self::KeyQuota(shortfall) => shortfall.credits().is_some(),
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

    /// Whether the verdict is about the credits, the bill or the key of its account, until a second account refuses
    /// the same request with the same message.
    #[must_use]
    pub fn concerns_account(self) -> bool {
        match self {
            Self::WorkspaceQuota(_) | Self::Billing | Self::Abuse | Self::InvalidKey | Self::WrongHost => {
                true
            }
            Self::Served
            | Self::KeyQuota(_)
            | Self::MissingPermission(_)
            | Self::PlanFeature(_)
            | Self::Slots
            | Self::RateLimited(_)
            | Self::Concurrency { .. }
            | Self::Busy
            | Self::Unexplained(_)
            | Self::NotFound
            | Self::RequestError
            | Self::ServerError
            | Self::Unreadable => false,
        }
    }

    /// Returns the outcome of an attempt that ended with this verdict.
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
            Self::Unexplained(UnexplainedRefusal::Unauthorized) => Outcome::Unauthorized,
            Self::Unexplained(UnexplainedRefusal::PaymentRequired) => Outcome::PaymentRequired,
            Self::Unexplained(UnexplainedRefusal::Forbidden) => Outcome::Forbidden,
            Self::Unexplained(UnexplainedRefusal::TooMany(_)) => Outcome::TooManyRequests,
            Self::Unexplained(UnexplainedRefusal::Bodiless) => Outcome::Unexplained,
            Self::NotFound => Outcome::NotFound,
            Self::RequestError => Outcome::RequestError,
            Self::ServerError => Outcome::ServerError,
            Self::Unreadable => Outcome::Unreadable,
        }
    }

    /// Returns the identifier in logs, usage records and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.outcome().as_str()
    }
}
