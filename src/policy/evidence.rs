//! What refusals prove of a key or a workspace, and what that means at a moment.
//!
//! A refusal is evidence: it has a scope (the key, the workspace, or one concurrency group of that), a
//! strength (with figures, or in words that are known) and a time. What follows from it is computed here
//! from the evidence and the last poll of the provider, and only evidence is stored: a better rule
//! changes what old evidence means.
//!
//! Refusals about anything narrower (a feature, a permission, an endpoint, one request) are not here:
//! they say nothing of a key as such. See [`features`](super::features).

use std::sync::Arc;
use std::time::Duration;

use super::classify::{Shortfall, Verdict};
use super::concurrency_group::ConcurrencyGroup;
use super::key_state::{Cooldown, CooldownReason};
use super::units::UnixMs;

/// What a refusal claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimedFault {
    /// Credits do not suffice.
    Credits {
        /// What was left and what the request needed; `None` when the words had no figures.
        figures: Option<(u64, u64)>,
        /// What was left in the numbers of our own estimates, which are upper bounds.
        left_by_estimate: u64,
    },
    /// Too many requests of a concurrency group in a span of time.
    RateLimited(ConcurrencyGroup),
    /// The account is locked: unpaid, or terms not accepted.
    Locked,
    /// The account is suspected of abuse.
    Suspected,
    /// The provider does not know the key.
    InvalidKey,
    /// The key belongs to another region.
    WrongHost,
}

impl ClaimedFault {
    /// What a verdict claims of its key or workspace; `None` for one that is about something narrower.
    /// `estimate` is what the request was expected to cost, `lane` its concurrency group.
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
            // Our estimates are larger than the provider's prices on some plans, by the same factor.
            // An estimate of nothing is that of a request that should be free, and measures nothing.
            (Some((left, required)), Some(estimate)) if estimate > 0 => {
                let scaled = u128::from(left) * u128::from(estimate) / u128::from(required.max(1));
                u64::try_from(scaled).unwrap_or(u64::MAX)
            }
            (Some((left, _)), _) => left,
            (None, _) => 0,
        };
        Self::Credits { figures, left_by_estimate }
    }

    /// Whether it is about the key, and not about its workspace; `is_cap` tells a key's own cap from
    /// the workspace's credits.
    #[must_use]
    pub fn is_of_key(self, is_cap: bool) -> bool {
        match self {
            Self::Credits { .. } => is_cap,
            Self::InvalidKey | Self::WrongHost => true,
            Self::RateLimited(_) | Self::Locked | Self::Suspected => false,
        }
    }

    /// Whether both are about the same, so that the later one takes the other's place.
    #[must_use]
    pub fn is_same(self, other: Self) -> bool {
        match (self, other) {
            (Self::RateLimited(one), Self::RateLimited(other)) => one == other,
            _ => std::mem::discriminant(&self) == std::mem::discriminant(&other),
        }
    }

    /// The word for it where evidence is stored and shown.
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

/// How much a refusal proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strength {
    /// It names figures, or the span after which to come back.
    Figures,
    /// It has words that are known, and no more.
    Words,
}

impl Strength {
    /// The word for it where evidence is shown.
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
    /// What it claims.
    pub claim: ClaimedFault,
    /// When it came.
    pub at: UnixMs,
    /// The span that the provider named in `Retry-After`.
    pub named_span: Option<Duration>,
    /// Whether another account has refused the same request in the same words: then it may be about the
    /// request, and one request may try again.
    pub is_agreed: bool,
    /// Where it was met.
    pub source: Source,
}

/// Where evidence was met, for people who ask why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// The status of the answer; `None` when it came on a socket.
    pub status: Option<u16>,
    /// The provider's words, without anything secret.
    pub words: Arc<str>,
    /// The route of the request.
    pub route: Arc<str>,
    /// The request.
    pub request_id: Arc<str>,
}

impl Evidence {
    /// How much it proves.
    #[must_use]
    pub fn strength(&self) -> Strength {
        let has_figures = matches!(self.claim, ClaimedFault::Credits { figures: Some(_), .. });
        if has_figures || self.named_span.is_some() { Strength::Figures } else { Strength::Words }
    }
}

/// What the provider said when it was last polled with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Poll {
    /// When it answered.
    pub at: UnixMs,
    /// What.
    pub result: PollResult,
}

/// The result of a poll, as far as evidence is weighed by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollResult {
    /// The workspace's figures.
    Figures {
        /// Credits that may still be spent; `None` when there is no limit, or none is known.
        left: Option<u64>,
        /// Whether the provider says that the bill is paid, or that it is not.
        is_paid: Option<bool>,
    },
    /// The key is good and may not read them.
    Unreadable,
    /// The key is refused as such.
    Invalid,
}

/// How long evidence holds, where nothing else says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cooldowns {
    /// After a refusal in words without figures: until the poll, or one request, tells more.
    pub unproven: Duration,
    /// After a rate limit that names no span.
    pub rate_limited: Duration,
    /// The longest span that the provider can name.
    pub max_retry_after: Duration,
    /// Of a spent account whose reset date is unknown.
    pub exhausted: Duration,
    /// Of a locked account.
    pub billing: Duration,
    /// Of a key that is refused as such, until the poll confirms it.
    pub invalid_confirm: Duration,
    /// Of a key that the poll confirmed to be invalid, or that is at the wrong host.
    pub invalid: Duration,
    /// How long the provider's figures may lag behind what was spent.
    pub quota_lag: Duration,
}

impl Cooldowns {
    /// Those of a configuration that names none.
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

/// What evidence means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meaning {
    /// Nothing any more: it is over, or something newer or stronger has refuted it.
    Nothing,
    /// The key or workspace is not asked.
    Rest {
        /// Why, and until when.
        cooldown: Cooldown,
        /// Whether one request may try it before, when nothing else can serve: the words alone do not
        /// prove that it cannot.
        is_probable: bool,
    },
    /// The concurrency group is not asked.
    GroupRest {
        /// Which.
        group: ConcurrencyGroup,
        /// Until when.
        until: UnixMs,
        /// As above.
        is_probable: bool,
    },
    /// Requests that cost more than this are not asked with it. Smaller ones are.
    Short {
        /// What is left, in the numbers of our estimates.
        left: u64,
        /// Until when that holds.
        until: UnixMs,
    },
}

/// What `evidence` means at `now`, after the last `poll`, for an account whose credits come back at
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
    let later = poll.filter(|poll| poll.at > at);
    let rest =
        |reason, until, is_probable| Meaning::Rest { cooldown: Cooldown { reason, until }, is_probable };
    let spent_until = || {
        let reset = resets_at.filter(|reset| *reset > at);
        reset.unwrap_or_else(|| at.plus(cooldowns.exhausted))
    };
    let meant = match evidence.claim {
        ClaimedFault::Credits { .. } if refutes_credits(evidence, later, cooldowns) => {
            return Meaning::Nothing;
        }
        // Without a date the end is a guess, which one request may find to be wrong.
        ClaimedFault::Credits { figures: Some((0, _)), .. } => {
            rest(CooldownReason::Exhausted, spent_until(), resets_at.is_none())
        }
        ClaimedFault::Credits { figures: Some(_), left_by_estimate } => {
            Meaning::Short { left: left_by_estimate, until: spent_until() }
        }
        ClaimedFault::Credits { figures: None, .. } => {
            rest(CooldownReason::Exhausted, at.plus(cooldowns.unproven), true)
        }
        ClaimedFault::RateLimited(group) => {
            let span = evidence.named_span.unwrap_or(cooldowns.rate_limited).min(cooldowns.max_retry_after);
            let is_probable = evidence.named_span.is_none() || evidence.is_agreed;
            Meaning::GroupRest { group, until: at.plus(span), is_probable }
        }
        ClaimedFault::Locked => match later.map(|poll| poll.result) {
            Some(PollResult::Figures { is_paid: Some(true), .. }) => return Meaning::Nothing,
            Some(PollResult::Figures { is_paid: Some(false), .. }) => {
                rest(CooldownReason::Billing, at.plus(cooldowns.billing), false)
            }
            Some(
                PollResult::Figures { is_paid: None, .. } | PollResult::Unreadable | PollResult::Invalid,
            )
            | None => rest(CooldownReason::Billing, at.plus(cooldowns.unproven), true),
        },
        // No poll tells of it. Asking again and again makes it worse.
        ClaimedFault::Suspected => rest(CooldownReason::Billing, at.plus(cooldowns.billing), true),
        ClaimedFault::InvalidKey | ClaimedFault::WrongHost => {
            let is_wrong_host = evidence.claim == ClaimedFault::WrongHost;
            let reason = if is_wrong_host { CooldownReason::WrongHost } else { CooldownReason::Invalid };
            match later {
                Some(Poll { result: PollResult::Figures { .. } | PollResult::Unreadable, .. }) => {
                    return Meaning::Nothing;
                }
                Some(Poll { result: PollResult::Invalid, at }) => {
                    rest(reason, at.plus(cooldowns.invalid), false)
                }
                None => rest(reason, at.plus(cooldowns.invalid_confirm), true),
            }
        }
    };
    let until = match meant {
        Meaning::Nothing => now,
        Meaning::Rest { cooldown, .. } => cooldown.until,
        Meaning::GroupRest { until, .. } | Meaning::Short { until, .. } => until,
    };
    if until > now { meant } else { Meaning::Nothing }
}

/// The rest that follows from all of this evidence, without a poll; a group that is rate limited is one.
#[must_use]
pub fn rest(
    evidence: &[Evidence],
    resets_at: Option<UnixMs>,
    cooldowns: &Cooldowns,
    now: UnixMs,
) -> Option<Cooldown> {
    let rests = evidence.iter().filter_map(|known| match meaning(known, None, resets_at, cooldowns, now) {
        Meaning::Rest { cooldown, .. } => Some(cooldown),
        Meaning::GroupRest { until, .. } => Some(Cooldown { reason: CooldownReason::RateLimited, until }),
        Meaning::Short { .. } | Meaning::Nothing => None,
    });
    rests.reduce(Cooldown::joined)
}

/// Whether a poll refutes a claim about credits. Figures of a refusal are newer than those of a poll
/// for as long as polls lag; words without figures yield to any figure.
fn refutes_credits(evidence: &Evidence, later: Option<Poll>, cooldowns: &Cooldowns) -> bool {
    let ClaimedFault::Credits { figures, .. } = evidence.claim else { return false };
    let Some(Poll { at, result: PollResult::Figures { left, .. } }) = later else { return false };
    let has_credits = left != Some(0);
    let is_settled = at.since(evidence.at) >= cooldowns.quota_lag;
    match figures {
        None => has_credits,
        Some((0, _)) => has_credits && is_settled,
        // What is left is in the poll's own figure by then.
        Some(_) => is_settled,
    }
}

/// When a poll can decide over `evidence` that the last one could not; `None` when a poll has nothing
/// to decide.
#[must_use]
pub fn poll_decides_at(evidence: &Evidence, poll: Option<Poll>, cooldowns: &Cooldowns) -> Option<UnixMs> {
    let was_polled = poll.is_some_and(|poll| poll.at > evidence.at);
    let at_once = (!was_polled).then_some(evidence.at);
    match evidence.claim {
        ClaimedFault::Credits { figures: Some(_), .. } => {
            let settled_at = evidence.at.plus(cooldowns.quota_lag);
            poll.is_none_or(|poll| poll.at < settled_at).then_some(settled_at)
        }
        ClaimedFault::Credits { figures: None, .. }
        | ClaimedFault::Locked
        | ClaimedFault::InvalidKey
        | ClaimedFault::WrongHost => at_once,
        ClaimedFault::Suspected | ClaimedFault::RateLimited(_) => None,
    }
}

/// Whether a request that was served refutes `evidence`: one that began after it, in its scope.
/// `is_charged` says whether it cost credits, `lane` is its concurrency group.
#[must_use]
pub fn is_refuted_by_service(
    evidence: &Evidence,
    began_at: UnixMs,
    is_charged: bool,
    group: Option<ConcurrencyGroup>,
) -> bool {
    let is_later = began_at >= evidence.at;
    match evidence.claim {
        // What was served may have been small: only that nothing is left is refuted.
        ClaimedFault::Credits { figures: Some((0, _)) | None, .. }
        | ClaimedFault::Locked
        | ClaimedFault::Suspected => is_later && is_charged,
        ClaimedFault::Credits { figures: Some(_), .. } => false,
        ClaimedFault::RateLimited(limited) => is_later && group == Some(limited),
        // Requests that were under way when it was refused were let in with it all the same.
        ClaimedFault::InvalidKey | ClaimedFault::WrongHost => true,
    }
}

#[cfg(test)]
mod tests;
