//! What this replica knows about one quota that the pool shares: its grant, and the use of the other replicas. All
//! decisions are pure, with the time as an argument.

use std::time::{Duration, Instant};

use super::period_counters::AmountRange;
use crate::policy::client_quota::{ClientQuota, QuotaExceeded, QuotaShortfall};
use crate::policy::units::UnixMs;
use crate::proxy::replica_link::{QuotaAnswer, QuotaGrant, QuotaKey, QuotaStatement};

/// Time for which a refusal by the other replicas is repeated without another question. It bounds the questions of a
/// client that goes on after its quota is used up, and is about one interval of the regular statements.
const REFUSAL_TTL: Duration = Duration::from_millis(100);

/// The number of intervals between regular statements for whose use a replica holds a grant. A sudden increase to this
/// multiple needs no question.
const HELD_INTERVALS: u64 = 4;

/// How a request may use a shared quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GrantUse {
    /// The grant may be extended first, if it is insufficient.
    Extensible,
    /// Only the current grant is used.
    Current,
    /// There was no answer, so the request may use this replica's share of the amount that remained at the last answer.
    Alone,
}

/// The refusal of a question.
#[derive(Clone, Copy, Debug)]
struct GrantRefusal {
    /// The smallest amount that was refused.
    needed: u64,
    valid_until: Instant,
}

/// The state of one quota in one period.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedQuota {
    pub(super) quota: ClientQuota,
    pub(super) period_start: UnixMs,
    granted: u64,
    valid_until: Option<Instant>,
    used_by_others: u64,
    /// The use by this replica that the last answered statement contained.
    stated_use: u64,
    answered_at: Option<Instant>,
    refusal: Option<GrantRefusal>,
    generation: u64,
    /// The use by this replica at the last regular statement.
    regular_use: u64,
    /// The use between the last three regular statements.
    recent_use: [u64; 2],
}

impl SharedQuota {
    /// Creates the state of a quota of which this replica has used `used`. The generation starts with the time, so
    /// that it is newer than those before a restart.
    pub(super) fn new(quota: ClientQuota, period_start: UnixMs, used: u64, now: UnixMs) -> Self {
        Self {
            quota,
            period_start,
            granted: 0,
            valid_until: None,
            used_by_others: 0,
            stated_use: used,
            answered_at: None,
            refusal: None,
            generation: now.0,
            regular_use: used,
            recent_use: [0; 2],
        }
    }

    /// Whether the replica holds a grant at `now`.
    pub(super) fn is_granted(&self, now: Instant) -> bool {
        self.valid_until.is_some_and(|valid_until| now < valid_until)
    }

    /// Returns the time since the last answer, or `None` before the first one.
    pub(super) fn answer_age(&self, now: Instant) -> Option<Duration> {
        self.answered_at.map(|answered_at| now.saturating_duration_since(answered_at))
    }

    pub(super) fn used_by_others(&self) -> u64 {
        self.used_by_others
    }

    /// Returns the amount up to which this replica may use the quota in the period.
    pub(super) fn limit(&self, grant_use: GrantUse, replicas: u32, now: Instant) -> u64 {
        let granted = if self.is_granted(now) { self.granted } else { 0 };
        let limit = match grant_use {
            GrantUse::Extensible | GrantUse::Current => granted,
            GrantUse::Alone => granted.max(self.limit_alone(replicas)),
        };
        limit.min(self.quota.amount)
    }

    /// Returns the limit without answers: the use at the last answer, and an equal share of the amount that remained then. It
    /// does not depend on the use since then, so the replica never takes a share of a share.
    fn limit_alone(&self, replicas: u32) -> u64 {
        let remaining = self.quota.amount.saturating_sub(self.used_by_others).saturating_sub(self.stated_use);
        self.stated_use.saturating_add(remaining.div_ceil(u64::from(replicas.max(1))))
    }

    /// Whether a question may help a request that needs `demand`, if the replica may use `remaining`.
    pub(super) fn may_extend(&self, used: u64, remaining: u64, demand: AmountRange, now: Instant) -> bool {
        let is_refused = self
            .refusal
            .is_some_and(|refusal| refusal.needed <= demand.min.max(1) && now < refusal.valid_until);
        used < self.quota.amount
            && demand.amount_within(remaining).is_none_or(|amount| amount < demand.max)
            && !is_refused
    }

    /// Returns whether a running session may use more credits. A session is charged for what it has used, so the
    /// total use decides and not the grant.
    pub(super) fn may_spend(&self, used: u64, replicas: u32, now: Instant) -> bool {
        // A quota in use is stated regularly. If its grant has expired, there were no answers.
        let is_alone = self.answered_at.is_some() && !self.is_granted(now);
        let limit = match is_alone {
            true => self.limit_alone(replicas),
            false => self.quota.amount.saturating_sub(self.used_by_others),
        };
        used < limit
    }

    /// Returns the error for a request that needs `demand`, if this replica may use `remaining`.
    pub(super) fn exceeded(
        &self,
        used: u64,
        remaining: u64,
        demand: AmountRange,
        now: UnixMs,
    ) -> QuotaExceeded {
        let total = used.saturating_add(self.used_by_others);
        let exceeded = self.quota.exceeded(total, demand.min, now);
        // The grants of other replicas may hold the rest.
        let is_held = exceeded.shortfall.is_some_and(|shortfall| shortfall.remaining >= shortfall.needed);
        let held = (remaining > 0).then_some(QuotaShortfall { remaining, needed: demand.min });
        QuotaExceeded { shortfall: if is_held { held } else { exceeded.shortfall }, ..exceeded }
    }

    /// Prepares a regular statement: gives back the part of the grant that this replica does not need soon, so that it
    /// does not hold what another replica needs. Returns the amount in addition to `used` that the replica wants to
    /// hold: the use of a few intervals, but only a part of the remaining amount. A replica without recent use wants nothing.
    /// A replica without a grant wants only what its requests wait for, because its knowledge of the others is old.
    pub(super) fn prepare_regular(&mut self, used: u64, waiting: u64, replicas: u32, now: Instant) -> u64 {
        self.recent_use = [used.saturating_sub(self.regular_use), self.recent_use[0]];
        self.regular_use = used;
        let pace = self.recent_use[0].max(self.recent_use[1]);
        let remaining = self.quota.amount.saturating_sub(self.used_by_others).saturating_sub(used);
        let part = if self.is_granted(now) { remaining / (2 * u64::from(replicas.max(1))) } else { 0 };
        let wanted = part.min(pace.saturating_mul(HELD_INTERVALS)).max(waiting);
        let kept = used.saturating_add(wanted);
        if kept < self.granted {
            self.granted = kept;
            self.generation += 1;
        }
        wanted
    }

    /// Gives back the whole grant, because the amount of the quota has changed.
    pub(super) fn change_amount(&mut self, amount: u64) {
        self.quota.amount = amount;
        (self.granted, self.valid_until, self.refusal) = (0, None, None);
        self.generation += 1;
    }

    /// Returns the statement of the use of this quota.
    pub(super) fn statement(
        &self,
        key: QuotaKey,
        used: u64,
        needed: u64,
        wanted: u64,
        now: Instant,
    ) -> QuotaStatement {
        let held = if self.is_granted(now) { self.granted.max(used) } else { used };
        QuotaStatement {
            key,
            limit: self.quota.amount,
            used,
            held,
            generation: self.generation,
            needed,
            wanted: wanted.max(needed),
        }
    }

    /// Applies the answer to `statement`.
    pub(super) fn apply(&mut self, statement: &QuotaStatement, answer: QuotaAnswer, now: Instant) {
        let QuotaGrant { granted, used_by_others, valid_until } = match answer {
            QuotaAnswer::Granted(grant) => {
                if statement.needed > 0 {
                    self.refusal = None;
                }
                grant
            }
            QuotaAnswer::Denied(grant) => {
                self.refusal =
                    Some(GrantRefusal { needed: statement.needed, valid_until: now + REFUSAL_TTL });
                grant
            }
            QuotaAnswer::Unknown => return,
        };
        (self.used_by_others, self.stated_use, self.answered_at) =
            (used_by_others, statement.used, Some(now));
        // The answer to a statement before the replica gave back a part of its grant may contain that part.
        if statement.generation == self.generation {
            (self.granted, self.valid_until) = (granted, Some(valid_until));
        }
    }
}
