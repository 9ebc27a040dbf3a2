//! Computes the state of a key or a workspace from the provider's refusals and its last quota poll. Also decides when
//! another poll can confirm or refute a refusal, and whether a served request refutes it.
//!
//! A refusal is evidence with a scope (the key, the workspace, or one of its concurrency groups), a strength (with
//! numbers, or with a message only) and a time. The database stores only the evidence, and the state is computed again
//! after a restart, so that a changed rule also applies to old evidence.
//!
//! Refusals about a feature, a permission, an endpoint or a single request are not evidence, because the key can serve
//! other requests. [`features`](crate::elevenlabs::features) interprets these refusals.

use std::sync::Arc;
use std::time::Duration;

use super::concurrency_group::ConcurrencyGroup;
use super::key_state::{Cooldown, CooldownReason};
use super::units::UnixMs;
use super::verdict::{Shortfall, Verdict};

/// The claim of a refusal about a key or a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimedFault {
    /// The remaining credits do not suffice for the request.
    Credits {
        /// The remaining and the required credits that the refusal reported, or `None` if it reported none.
        reported: Option<(u64, u64)>,
        /// The remaining credits, scaled to Keychoir's cost estimates, which are upper bounds.
        scaled_remaining: u64,
    },
    /// The concurrency group has sent too many requests in a span of time.
    RateLimited(ConcurrencyGroup),
    /// The account is locked, because a bill is unpaid or the terms are not accepted.
    Locked,
    /// The account is suspected of abuse.
    Suspected,
    /// The provider does not know the key.
    InvalidKey,
    /// The key belongs to another region of the provider.
    WrongHost,
}

impl ClaimedFault {
    /// Returns the claim of a verdict, or `None` if the verdict is not about the whole key or workspace.
    /// `estimate` is the estimated cost of the request, and `group` is its concurrency group.
    #[must_use]
    pub fn from_verdict(
        verdict: Verdict,
        estimate: Option<u64>,
        group: Option<ConcurrencyGroup>,
    ) -> Option<Self> {
        match verdict {
            Verdict::WorkspaceQuota(shortfall) | Verdict::KeyQuota(shortfall) => {
                Some(Self::credits(shortfall, estimate))
            }
            Verdict::RateLimited(_) => group.map(Self::RateLimited),
            Verdict::Billing => Some(Self::Locked),
            Verdict::Abuse => Some(Self::Suspected),
            Verdict::InvalidKey => Some(Self::InvalidKey),
            Verdict::WrongHost => Some(Self::WrongHost),
            Verdict::Served
            | Verdict::MissingPermission(_)
            | Verdict::PlanFeature(_)
            | Verdict::Slots
            | Verdict::Concurrency { .. }
            | Verdict::Busy
            | Verdict::Unexplained(_)
            | Verdict::NotFound
            | Verdict::RequestError
            | Verdict::ServerError
            | Verdict::Unreadable => None,
        }
    }

    fn credits(shortfall: Shortfall, estimate: Option<u64>) -> Self {
        let reported = shortfall.credits();
        let scaled_remaining = match (reported, estimate) {
            // On some plans, estimates exceed the provider's prices by a constant factor. An estimate of 0
            // is for a request that should cost no credits, so it has no factor.
            (Some((remaining, required)), Some(estimate)) if estimate > 0 => {
                let scaled = u128::from(remaining) * u128::from(estimate) / u128::from(required.max(1));
                u64::try_from(scaled).unwrap_or(u64::MAX)
            }
            (Some((remaining, _)), _) => remaining,
            (None, _) => 0,
        };
        Self::Credits { reported, scaled_remaining }
    }

    /// Whether the claim is about the key and not about its workspace. `is_key_quota` is true if a claim about
    /// credits is about the key's own quota.
    #[must_use]
    pub fn is_about_key(self, is_key_quota: bool) -> bool {
        match self {
            Self::Credits { .. } => is_key_quota,
            Self::InvalidKey | Self::WrongHost => true,
            Self::RateLimited(_) | Self::Locked | Self::Suspected => false,
        }
    }

    /// Whether `other` is a claim of the same kind, which replaces this claim if it is later.
    #[must_use]
    pub fn is_same_kind(self, other: Self) -> bool {
        match (self, other) {
            (Self::RateLimited(group), Self::RateLimited(other_group)) => group == other_group,
            _ => std::mem::discriminant(&self) == std::mem::discriminant(&other),
        }
    }

    /// Returns the identifier in the database and on the status page.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Credits { .. } => "credits",
            Self::RateLimited(_) => "rate_limited",
            Self::Locked => "locked",
            Self::Suspected => "suspected",
            Self::InvalidKey => "invalid_key",
            Self::WrongHost => "wrong_host",
        }
    }
}

/// The strength of a refusal as evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvidenceStrength {
    /// The refusal reports numbers: credits, or a time after which to retry.
    Numbers,
    /// The refusal contains only a known message.
    MessageOnly,
}

impl EvidenceStrength {
    /// Returns the identifier in the admin API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Numbers => "numbers",
            Self::MessageOnly => "message",
        }
    }
}

/// A refusal, as evidence about a key or a workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The claim of the refusal.
    pub claim: ClaimedFault,
    /// The time at which the refusal was received.
    pub at: UnixMs,
    /// The `Retry-After` of the refusal, if it has one.
    pub retry_after: Option<Duration>,
    /// Whether another account refused the same request with the same message. The refusal may then be about
    /// the request, so one request may probe a rate limited group despite a `Retry-After`.
    pub is_repeated_elsewhere: bool,
    /// The response with the refusal.
    pub source: RefusalSource,
}

/// The response from which evidence was recorded, for diagnostics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusalSource {
    /// The HTTP status, or `None` for a refusal on a WebSocket or of a poll.
    pub status: Option<u16>,
    /// The provider's message, without secrets.
    pub message: Arc<str>,
    /// The route of the request.
    pub route: Arc<str>,
    /// The identifier of the request, which is empty for a poll.
    pub request_id: Arc<str>,
}

impl Evidence {
    /// Returns the strength of the evidence.
    #[must_use]
    pub fn strength(&self) -> EvidenceStrength {
        let has_credits = matches!(self.claim, ClaimedFault::Credits { reported: Some(_), .. });
        if has_credits || self.retry_after.is_some() {
            EvidenceStrength::Numbers
        } else {
            EvidenceStrength::MessageOnly
        }
    }
}

/// A quota poll with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poll {
    /// The time at which the response was received.
    pub at: UnixMs,
    /// The result of the poll.
    pub result: PollResult,
}

/// The part of the result of a poll that can confirm or refute evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollResult {
    /// The quota of the workspace.
    Quota {
        /// Credits that may still be spent. `None` if the limit is unlimited or unknown.
        spendable: Option<u64>,
        /// Whether the latest invoice is paid. `None` if the provider does not report it.
        is_paid: Option<bool>,
    },
    /// The key is valid, but lacks the permission to read its quota.
    Unreadable,
    /// The provider refuses the key.
    Invalid,
}

/// The durations of the effects of evidence, unless a reported time or a poll determines the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cooldowns {
    /// Cooldown after a refusal with only a message. A poll or a probe may end it earlier.
    pub unproven: Duration,
    /// Cooldown after a rate limit without a `Retry-After`.
    pub rate_limited: Duration,
    /// Upper bound of a `Retry-After`.
    pub max_retry_after: Duration,
    /// Cooldown of an exhausted account whose reset date is unknown.
    pub exhausted: Duration,
    /// Cooldown of a locked account with an unpaid invoice, and of an account that is suspected of abuse.
    pub billing: Duration,
    /// Cooldown of a key that was refused as invalid or for its region, until a poll confirms the refusal.
    pub invalid_confirm: Duration,
    /// Cooldown of a key whose refusal as invalid or for its region was confirmed by a poll.
    pub invalid: Duration,
    /// Maximum delay until a poll includes credits that were spent.
    pub quota_lag: Duration,
}

impl Cooldowns {
    /// The values of the default configuration.
    pub const DEFAULT: Self = Self {
        unproven: Duration::from_secs(60),
        rate_limited: Duration::from_secs(60),
        max_retry_after: Duration::from_secs(300),
        exhausted: Duration::from_secs(3_600),
        billing: Duration::from_secs(3_600),
        invalid_confirm: Duration::from_secs(60),
        invalid: Duration::from_secs(24 * 3_600),
        quota_lag: Duration::from_secs(300),
    };
}

/// The effect of evidence on a key or a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvidenceEffect {
    /// The evidence has no effect, because it has expired or a poll has refuted it.
    Nothing,
    /// The key or workspace is in cooldown.
    Cooldown {
        /// The reason and the end.
        cooldown: Cooldown,
        /// Whether one request may probe the key before the end if no other key can serve, because the claim
        /// is unproven.
        may_probe: bool,
    },
    /// The concurrency group is in cooldown.
    GroupCooldown {
        /// The rate limited group.
        group: ConcurrencyGroup,
        /// The end of the cooldown.
        until: UnixMs,
        /// Whether one request may probe the group before the end.
        may_probe: bool,
    },
    /// Only requests whose estimated cost is within the limit may use the key.
    CostLimit {
        /// The maximum estimated cost: the remaining credits, scaled to Keychoir's cost estimates.
        max_cost: u64,
        /// The end of the limit.
        until: UnixMs,
    },
}

/// Evaluates `evidence` at `now`, after the last `poll`. `resets_at` is the time at which the credits are reset.
#[must_use]
pub fn evaluate(
    evidence: &Evidence,
    poll: Option<Poll>,
    resets_at: Option<UnixMs>,
    cooldowns: &Cooldowns,
    now: UnixMs,
) -> EvidenceEffect {
    let at = evidence.at;
    let later_poll = poll.filter(|poll| poll.at > at);
    let cooldown = |reason, until, may_probe| EvidenceEffect::Cooldown {
        cooldown: Cooldown { reason, until },
        may_probe,
    };
    let exhausted_until = || {
        let reset = resets_at.filter(|reset| *reset > at);
        reset.unwrap_or_else(|| at.plus(cooldowns.exhausted))
    };
    let effect = match evidence.claim {
        ClaimedFault::Credits { .. } if refutes_credits(evidence, later_poll, cooldowns) => {
            return EvidenceEffect::Nothing;
        }
        // Without a reset date, the end is only a guess, so one request may probe the key.
        ClaimedFault::Credits { reported: Some((0, _)), .. } => {
            cooldown(CooldownReason::Exhausted, exhausted_until(), resets_at.is_none())
        }
        ClaimedFault::Credits { reported: Some(_), scaled_remaining } => {
            EvidenceEffect::CostLimit { max_cost: scaled_remaining, until: exhausted_until() }
        }
        ClaimedFault::Credits { reported: None, .. } => {
            cooldown(CooldownReason::Exhausted, at.plus(cooldowns.unproven), true)
        }
        ClaimedFault::RateLimited(group) => {
            let delay = evidence.retry_after.unwrap_or(cooldowns.rate_limited).min(cooldowns.max_retry_after);
            let may_probe = evidence.retry_after.is_none() || evidence.is_repeated_elsewhere;
            EvidenceEffect::GroupCooldown { group, until: at.plus(delay), may_probe }
        }
        ClaimedFault::Locked => match later_poll.map(|poll| poll.result) {
            Some(PollResult::Quota { is_paid: Some(true), .. }) => return EvidenceEffect::Nothing,
            Some(PollResult::Quota { is_paid: Some(false), .. }) => {
                cooldown(CooldownReason::Billing, at.plus(cooldowns.billing), false)
            }
            Some(PollResult::Quota { is_paid: None, .. } | PollResult::Unreadable | PollResult::Invalid)
            | None => cooldown(CooldownReason::Billing, at.plus(cooldowns.unproven), true),
        },
        // Polls do not report suspected abuse, and many attempts would increase the suspicion, so the cooldown is long.
        ClaimedFault::Suspected => cooldown(CooldownReason::Billing, at.plus(cooldowns.billing), true),
        ClaimedFault::InvalidKey | ClaimedFault::WrongHost => {
            let is_wrong_host = evidence.claim == ClaimedFault::WrongHost;
            let reason = if is_wrong_host { CooldownReason::WrongHost } else { CooldownReason::Invalid };
            match later_poll {
                Some(Poll { result: PollResult::Quota { .. } | PollResult::Unreadable, .. }) => {
                    return EvidenceEffect::Nothing;
                }
                Some(Poll { result: PollResult::Invalid, at }) => {
                    cooldown(reason, at.plus(cooldowns.invalid), false)
                }
                None => cooldown(reason, at.plus(cooldowns.invalid_confirm), true),
            }
        }
    };
    let until = match effect {
        EvidenceEffect::Nothing => now,
        EvidenceEffect::Cooldown { cooldown, .. } => cooldown.until,
        EvidenceEffect::GroupCooldown { until, .. } | EvidenceEffect::CostLimit { until, .. } => until,
    };
    if until > now { effect } else { EvidenceEffect::Nothing }
}

/// Returns the longest cooldown that the evidence causes, without regard to polls. A rate limit of a group counts as a
/// cooldown. Returns `None` if no cooldown is active at `now`.
#[must_use]
pub fn longest_cooldown(
    evidence: &[Evidence],
    resets_at: Option<UnixMs>,
    cooldowns: &Cooldowns,
    now: UnixMs,
) -> Option<Cooldown> {
    let active_cooldowns =
        evidence.iter().filter_map(|evidence| match evaluate(evidence, None, resets_at, cooldowns, now) {
            EvidenceEffect::Cooldown { cooldown, .. } => Some(cooldown),
            EvidenceEffect::GroupCooldown { until, .. } => {
                Some(Cooldown { reason: CooldownReason::RateLimited, until })
            }
            EvidenceEffect::CostLimit { .. } | EvidenceEffect::Nothing => None,
        });
    active_cooldowns.reduce(Cooldown::latest)
}

/// Whether a poll refutes a claim about credits. Any later poll with credits refutes a refusal without numbers. Only a
/// poll at least `quota_lag` after the refusal refutes numbers, because an earlier poll may lag behind.
fn refutes_credits(evidence: &Evidence, later_poll: Option<Poll>, cooldowns: &Cooldowns) -> bool {
    let ClaimedFault::Credits { reported, .. } = evidence.claim else { return false };
    let Some(Poll { at, result: PollResult::Quota { spendable, .. } }) = later_poll else { return false };
    let has_credits = spendable != Some(0);
    let is_after_lag = at.since(evidence.at) >= cooldowns.quota_lag;
    match reported {
        None => has_credits,
        Some((0, _)) => has_credits && is_after_lag,
        // After the lag, the poll includes all spent credits.
        Some(_) => is_after_lag,
    }
}

/// Returns the time from which another poll can confirm or refute `evidence`. Returns `None` if the last poll has
/// already confirmed or refuted it, or if no poll can.
#[must_use]
pub fn decisive_poll_at(evidence: &Evidence, poll: Option<Poll>, cooldowns: &Cooldowns) -> Option<UnixMs> {
    let was_polled = poll.is_some_and(|poll| poll.at > evidence.at);
    let immediate_poll_at = (!was_polled).then_some(evidence.at);
    match evidence.claim {
        ClaimedFault::Credits { reported: Some(_), .. } => {
            let lag_end = evidence.at.plus(cooldowns.quota_lag);
            poll.is_none_or(|poll| poll.at < lag_end).then_some(lag_end)
        }
        ClaimedFault::Credits { reported: None, .. }
        | ClaimedFault::Locked
        | ClaimedFault::InvalidKey
        | ClaimedFault::WrongHost => immediate_poll_at,
        ClaimedFault::Suspected | ClaimedFault::RateLimited(_) => None,
    }
}

/// Whether a served request refutes `evidence`, because the request started after the refusal and is in its scope.
/// `is_charged` is true if the request cost credits, and `group` is the concurrency group of the request.
#[must_use]
pub fn is_refuted_by_service(
    evidence: &Evidence,
    started_at: UnixMs,
    is_charged: bool,
    group: Option<ConcurrencyGroup>,
) -> bool {
    let is_later = started_at >= evidence.at;
    match evidence.claim {
        // The served request may have been cheap, so it refutes only the claim that no credits are left.
        ClaimedFault::Credits { reported: Some((0, _)) | None, .. }
        | ClaimedFault::Locked
        | ClaimedFault::Suspected => is_later && is_charged,
        ClaimedFault::Credits { reported: Some(_), .. } => false,
        ClaimedFault::RateLimited(limited) => is_later && group == Some(limited),
        // The provider accepted the same key, even if the request started before the refusal.
        ClaimedFault::InvalidKey | ClaimedFault::WrongHost => true,
    }
}

#[cfg(test)]
mod tests;
