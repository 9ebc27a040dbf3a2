//! Evidence from refusals about a key or a workspace, and the key state that follows from it at a given
//! moment.
//!
//! A refusal is evidence: it has a scope (the key, the workspace, or a concurrency group of the
//! workspace), a strength (with figures, or only in known words) and a time. Key state is computed here
//! from the evidence and the last poll of the provider. Only evidence is stored, so that an improved rule
//! also applies to old evidence.
//!
//! Refusals about a feature, a permission, an endpoint or a single request are not evidence, because the
//! key can serve other requests. See [`features`](crate::elevenlabs::features).

use std::sync::Arc;
use std::time::Duration;

use super::concurrency_group::ConcurrencyGroup;
use super::key_state::{Cooldown, CooldownReason};
use super::units::UnixMs;
use super::verdict::{Shortfall, Verdict};

/// The claim of a refusal about a key or workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimedFault {
    /// The credits do not suffice.
    Credits {
        /// The remaining and the required credits; `None` when the refusal had no figures.
        figures: Option<(u64, u64)>,
        /// The remaining credits in the units of our own estimates, which are upper bounds.
        left_by_estimate: u64,
    },
    /// Too many requests of a concurrency group in a span of time.
    RateLimited(ConcurrencyGroup),
    /// The account is locked: an unpaid bill, or terms not accepted.
    Locked,
    /// The account is suspected of abuse.
    Suspected,
    /// The provider does not know the key.
    InvalidKey,
    /// The key belongs to another region.
    WrongHost,
}

impl ClaimedFault {
    /// The claim of a verdict about its key or workspace; `None` for a verdict about something narrower.
    /// `estimate` is the expected cost of the request, `group` its concurrency group.
    #[must_use]
    pub fn of(verdict: Verdict, estimate: Option<u64>, group: Option<ConcurrencyGroup>) -> Option<Self> {
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
        let figures = shortfall.figures();
        let left_by_estimate = match (figures, estimate) {
            // On some plans our estimates exceed the provider's prices by a constant factor. An estimate
            // of 0 is one of a request that should be free, from which no factor can be computed.
            (Some((left, required)), Some(estimate)) if estimate > 0 => {
                let scaled = u128::from(left) * u128::from(estimate) / u128::from(required.max(1));
                u64::try_from(scaled).unwrap_or(u64::MAX)
            }
            (Some((left, _)), _) => left,
            (None, _) => 0,
        };
        Self::Credits { figures, left_by_estimate }
    }

    /// Whether the claim is about the key and not about its workspace; `is_cap` tells a key's own cap
    /// from the workspace's credits.
    #[must_use]
    pub fn is_of_key(self, is_cap: bool) -> bool {
        match self {
            Self::Credits { .. } => is_cap,
            Self::InvalidKey | Self::WrongHost => true,
            Self::RateLimited(_) | Self::Locked | Self::Suspected => false,
        }
    }

    /// Whether both are the same claim, so that the later one replaces the earlier one.
    #[must_use]
    pub fn is_same(self, other: Self) -> bool {
        match (self, other) {
            (Self::RateLimited(one), Self::RateLimited(other)) => one == other,
            _ => std::mem::discriminant(&self) == std::mem::discriminant(&other),
        }
    }

    /// The identifier of the claim in the database and in status pages.
    #[must_use]
    pub fn word(self) -> &'static str {
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
pub enum Strength {
    /// The refusal has figures, or a time after which to retry.
    Figures,
    /// The refusal has known words only.
    Words,
}

impl Strength {
    /// The identifier of the strength in status pages.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Figures => "figures",
            Self::Words => "words",
        }
    }
}

/// A refusal, as evidence about a key or a workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The claim, with its figures.
    pub claim: ClaimedFault,
    /// When the refusal was received.
    pub at: UnixMs,
    /// The time that the provider named in `Retry-After`.
    pub named_span: Option<Duration>,
    /// Whether another account has refused the same request in the same words: the refusal may be about
    /// the request, and one request may probe the key.
    pub is_agreed: bool,
    /// The response that it was taken from.
    pub source: RefusalSource,
}

/// The response that evidence was taken from, for diagnosis.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusalSource {
    /// The status of the response; `None` when the refusal came on a WebSocket.
    pub status: Option<u16>,
    /// The provider's words, without secrets.
    pub words: Arc<str>,
    /// The route of the request.
    pub route: Arc<str>,
    /// The identifier of the request.
    pub request_id: Arc<str>,
}

impl Evidence {
    /// The strength of the evidence.
    #[must_use]
    pub fn strength(&self) -> Strength {
        let has_figures = matches!(self.claim, ClaimedFault::Credits { figures: Some(_), .. });
        if has_figures || self.named_span.is_some() { Strength::Figures } else { Strength::Words }
    }
}

/// The result of the last poll with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poll {
    /// When the response to the poll was received.
    pub at: UnixMs,
    /// The meaning of the response.
    pub result: PollResult,
}

/// The part of a poll's response that can confirm or refute evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollResult {
    /// The workspace's figures.
    Figures {
        /// Credits that may still be spent; `None` when there is no limit, or none is known.
        left: Option<u64>,
        /// Whether the latest invoice is paid; `None` when the provider does not report it.
        is_paid: Option<bool>,
    },
    /// The key is valid, but may not read its quota.
    Unreadable,
    /// The key itself is refused.
    Invalid,
}

/// How long evidence holds, where neither a figure nor a poll decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cooldowns {
    /// After a refusal in words without figures: until a poll or one request decides.
    pub unproven: Duration,
    /// After a rate limit without a `Retry-After`.
    pub rate_limited: Duration,
    /// Upper bound of a `Retry-After`.
    pub max_retry_after: Duration,
    /// For an exhausted account whose reset date is unknown.
    pub exhausted: Duration,
    /// For a locked account.
    pub billing: Duration,
    /// For a key that was refused as invalid, until a poll confirms it.
    pub invalid_confirm: Duration,
    /// For a key that a poll confirmed to be invalid, or that belongs to another region.
    pub invalid: Duration,
    /// How long the provider's figures may lag behind the spending.
    pub quota_lag: Duration,
}

impl Cooldowns {
    /// The defaults of the configuration.
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

/// The key state that follows from evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// No effect: the evidence has expired, or a newer or stronger fact has refuted it.
    Nothing,
    /// The key or workspace is in cooldown.
    Cooldown {
        /// Its reason and its end.
        cooldown: Cooldown,
        /// Whether one request may probe it before the end when no other key can serve: the words alone
        /// do not prove the claim.
        is_probable: bool,
    },
    /// The concurrency group is in cooldown.
    GroupCooldown {
        /// The rate limited group.
        group: ConcurrencyGroup,
        /// The end of the cooldown.
        until: UnixMs,
        /// Whether one request may probe the group before the end.
        is_probable: bool,
    },
    /// Requests that cost more than this do not use the key. Cheaper ones do.
    Short {
        /// The remaining credits, in the units of our estimates.
        left: u64,
        /// The end of this limit.
        until: UnixMs,
    },
}

/// The meaning of `evidence` at `now`, after the last `poll`, for an account whose credits are reset at
/// `resets_at`.
#[must_use]
pub fn meaning(
    evidence: &Evidence,
    poll: Option<Poll>,
    resets_at: Option<UnixMs>,
    cooldowns: &Cooldowns,
    now: UnixMs,
) -> Meaning {
    let at = evidence.at;
    let later_poll = poll.filter(|poll| poll.at > at);
    let cooldown =
        |reason, until, is_probable| Meaning::Cooldown { cooldown: Cooldown { reason, until }, is_probable };
    let exhausted_until = || {
        let reset = resets_at.filter(|reset| *reset > at);
        reset.unwrap_or_else(|| at.plus(cooldowns.exhausted))
    };
    let meaning = match evidence.claim {
        ClaimedFault::Credits { .. } if refutes_credits(evidence, later_poll, cooldowns) => {
            return Meaning::Nothing;
        }
        // Without a reset date the end is estimated, so one request may probe the key.
        ClaimedFault::Credits { figures: Some((0, _)), .. } => {
            cooldown(CooldownReason::Exhausted, exhausted_until(), resets_at.is_none())
        }
        ClaimedFault::Credits { figures: Some(_), left_by_estimate } => {
            Meaning::Short { left: left_by_estimate, until: exhausted_until() }
        }
        ClaimedFault::Credits { figures: None, .. } => {
            cooldown(CooldownReason::Exhausted, at.plus(cooldowns.unproven), true)
        }
        ClaimedFault::RateLimited(group) => {
            let span = evidence.named_span.unwrap_or(cooldowns.rate_limited).min(cooldowns.max_retry_after);
            let is_probable = evidence.named_span.is_none() || evidence.is_agreed;
            Meaning::GroupCooldown { group, until: at.plus(span), is_probable }
        }
        ClaimedFault::Locked => match later_poll.map(|poll| poll.result) {
            Some(PollResult::Figures { is_paid: Some(true), .. }) => return Meaning::Nothing,
            Some(PollResult::Figures { is_paid: Some(false), .. }) => {
                cooldown(CooldownReason::Billing, at.plus(cooldowns.billing), false)
            }
            Some(
                PollResult::Figures { is_paid: None, .. } | PollResult::Unreadable | PollResult::Invalid,
            )
            | None => cooldown(CooldownReason::Billing, at.plus(cooldowns.unproven), true),
        },
        // No poll reports suspected abuse, and repeated attempts increase the suspicion.
        ClaimedFault::Suspected => cooldown(CooldownReason::Billing, at.plus(cooldowns.billing), true),
        ClaimedFault::InvalidKey | ClaimedFault::WrongHost => {
            let is_wrong_host = evidence.claim == ClaimedFault::WrongHost;
            let reason = if is_wrong_host { CooldownReason::WrongHost } else { CooldownReason::Invalid };
            match later_poll {
                Some(Poll { result: PollResult::Figures { .. } | PollResult::Unreadable, .. }) => {
                    return Meaning::Nothing;
                }
                Some(Poll { result: PollResult::Invalid, at }) => {
                    cooldown(reason, at.plus(cooldowns.invalid), false)
                }
                None => cooldown(reason, at.plus(cooldowns.invalid_confirm), true),
            }
        }
    };
    let until = match meaning {
        Meaning::Nothing => now,
        Meaning::Cooldown { cooldown, .. } => cooldown.until,
        Meaning::GroupCooldown { until, .. } | Meaning::Short { until, .. } => until,
    };
    if until > now { meaning } else { Meaning::Nothing }
}

/// The cooldown that follows from all of this evidence, without a poll; a rate limit of a group counts as
/// a cooldown.
#[must_use]
pub fn cooldown(
    evidence: &[Evidence],
    resets_at: Option<UnixMs>,
    cooldowns: &Cooldowns,
    now: UnixMs,
) -> Option<Cooldown> {
    let cooldowns_of_evidence =
        evidence.iter().filter_map(|evidence| match meaning(evidence, None, resets_at, cooldowns, now) {
            Meaning::Cooldown { cooldown, .. } => Some(cooldown),
            Meaning::GroupCooldown { until, .. } => {
                Some(Cooldown { reason: CooldownReason::RateLimited, until })
            }
            Meaning::Short { .. } | Meaning::Nothing => None,
        });
    cooldowns_of_evidence.reduce(Cooldown::joined)
}

/// Whether a poll refutes a claim about credits. Figures of a refusal are newer than those of a poll as
/// long as polls lag; any figure of a poll refutes words without figures.
fn refutes_credits(evidence: &Evidence, later_poll: Option<Poll>, cooldowns: &Cooldowns) -> bool {
    let ClaimedFault::Credits { figures, .. } = evidence.claim else { return false };
    let Some(Poll { at, result: PollResult::Figures { left, .. } }) = later_poll else { return false };
    let has_credits = left != Some(0);
    let is_settled = at.since(evidence.at) >= cooldowns.quota_lag;
    match figures {
        None => has_credits,
        Some((0, _)) => has_credits && is_settled,
        // By then the figure of the poll includes all spent credits.
        Some(_) => is_settled,
    }
}

/// When the next poll can confirm or refute `evidence` that the last poll could not; `None` when no poll
/// can.
#[must_use]
pub fn poll_decides_at(evidence: &Evidence, poll: Option<Poll>, cooldowns: &Cooldowns) -> Option<UnixMs> {
    let was_polled = poll.is_some_and(|poll| poll.at > evidence.at);
    let immediately = (!was_polled).then_some(evidence.at);
    match evidence.claim {
        ClaimedFault::Credits { figures: Some(_), .. } => {
            let settled_at = evidence.at.plus(cooldowns.quota_lag);
            poll.is_none_or(|poll| poll.at < settled_at).then_some(settled_at)
        }
        ClaimedFault::Credits { figures: None, .. }
        | ClaimedFault::Locked
        | ClaimedFault::InvalidKey
        | ClaimedFault::WrongHost => immediately,
        ClaimedFault::Suspected | ClaimedFault::RateLimited(_) => None,
    }
}

/// Whether a served request refutes `evidence`: it began after the refusal, and is in its scope.
/// `is_charged` says whether it cost credits, `group` is its concurrency group.
#[must_use]
pub fn is_refuted_by_service(
    evidence: &Evidence,
    began_at: UnixMs,
    is_charged: bool,
    group: Option<ConcurrencyGroup>,
) -> bool {
    let is_later = began_at >= evidence.at;
    match evidence.claim {
        // The served request may have cost little, so it refutes only that no credits are left.
        ClaimedFault::Credits { figures: Some((0, _)) | None, .. }
        | ClaimedFault::Locked
        | ClaimedFault::Suspected => is_later && is_charged,
        ClaimedFault::Credits { figures: Some(_), .. } => false,
        ClaimedFault::RateLimited(limited) => is_later && group == Some(limited),
        // Requests in flight at the time of the refusal were accepted with the same key.
        ClaimedFault::InvalidKey | ClaimedFault::WrongHost => true,
    }
}

#[cfg(test)]
mod tests;
