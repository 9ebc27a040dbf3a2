//! Decides how much of one shared quota this replica may use, from its grant and the usage of the other replicas. A
//! grant is a part of the quota that only this replica may use for some time. Also creates the statements in which this
//! replica reports its usage, and applies the replies to them. Regular statements are sent at an interval, and other
//! statements when a request needs a larger grant. The caller passes the current time, and provides the lock and the
//! link to the other replicas.

use std::time::{Duration, Instant};

use super::period_counters::AmountRange;
use crate::policy::client_quota::{ClientQuota, QuotaExceeded, QuotaShortfall};
use crate::policy::units::UnixMs;
use crate::proxy::replica_link::{QuotaGrant, QuotaKey, QuotaReply, QuotaStatement};

/// Time for which a refusal by the other replicas is repeated without another lookup. It limits the lookups for a
/// client that continues to send requests after its quota is exhausted, and is about one interval of the regular
/// statements.
const REFUSAL_TTL: Duration = Duration::from_millis(100);

/// The amount that a replica wants to hold, as a multiple of its usage between two regular statements. Until the
/// usage reaches this multiple, requests need no lookup.
const HELD_INTERVALS: u64 = 4;

/// The part of a shared quota that a request may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GrantUse {
    /// The grant may be extended first, if it is insufficient.
    Extensible,
    /// Only the current grant is used.
    Current,
    /// If the lookup had no reply, the request may use this replica's share of the amount that remained at the last
    /// reply.
    Alone,
}

/// A reply that refused to extend the grant.
#[derive(Clone, Copy, Debug)]
struct GrantRefusal {
    /// The amount that was refused. Larger amounts are refused as well.
    needed: u64,
    valid_until: Instant,
}

/// The grant of this replica for one quota in one period, and the usage of all replicas.
#[derive(Clone, Copy, Debug)]
pub(super) struct SharedQuota {
    pub(super) quota: ClientQuota,
    pub(super) period_start: UnixMs,
    /// The end of the period, or `None` if it does not end.
    period_end: Option<UnixMs>,
    /// The amount that the grant allows this replica to use in the period, including the used amount.
    granted: u64,
    /// The end of the grant, or `None` if there is no grant.
    valid_until: Option<Instant>,
    used_by_others: u64,
    /// The usage of this replica in the last statement that received a reply.
    reported_use: u64,
    /// The time of the last reply, or `None` before the first reply.
    replied_at: Option<Instant>,
    refusal: Option<GrantRefusal>,
    /// See [`QuotaStatement::generation`].
    generation: u64,
    /// The usage of this replica at the last regular statement.
    regular_use: u64,
    /// The usage in the last two intervals between regular statements, the latest interval first.
    recent_use: [u64; 2],
}

impl SharedQuota {
    /// Creates the state of a quota in the period that contains `now`. `used` is the usage of this replica. The
    /// generation starts with the time, so that it is newer than the generations before a restart.
    pub(super) fn new(quota: ClientQuota, used: u64, now: UnixMs) -> Self {
        Self {
            quota,
            period_start: quota.period.start(now),
            period_end: quota.period.end(now),
            granted: 0,
            valid_until: None,
            used_by_others: 0,
            reported_use: used,
            replied_at: None,
            refusal: None,
            generation: now.0,
            regular_use: used,
            recent_use: [0; 2],
        }
    }

    /// Returns whether the period contains `now`. If the clock was set back, a later period still counts.
    pub(super) fn is_current(&self, now: UnixMs) -> bool {
        self.period_end.is_none_or(|end| now < end)
    }

    /// Returns whether the replica holds a grant at `now`.
    pub(super) fn is_granted(&self, now: Instant) -> bool {
        self.valid_until.is_some_and(|valid_until| now < valid_until)
    }

    /// Returns the time since the last reply, or `None` before the first reply.
    pub(super) fn reply_age(&self, now: Instant) -> Option<Duration> {
        self.replied_at.map(|replied_at| now.saturating_duration_since(replied_at))
    }

    /// Returns the amount that the other replicas have used or reserved, as the last reply reported.
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

    /// Returns the limit without replies: the usage at the last reply, and an equal share of the amount that remained
    /// then. It does not depend on the usage since then, so the replica never takes a share of a share.
    fn limit_alone(&self, replicas: u32) -> u64 {
        let remaining =
            self.quota.amount.saturating_sub(self.used_by_others).saturating_sub(self.reported_use);
        self.reported_use.saturating_add(remaining.div_ceil(u64::from(replicas.max(1))))
    }

    /// Returns whether an extension of the grant may help a request that needs `demand`, while `remaining` is left of
    /// the grant.
    pub(super) fn may_extend(&self, used: u64, remaining: u64, demand: AmountRange, now: Instant) -> bool {
        let is_refused = self
            .refusal
            .is_some_and(|refusal| refusal.needed <= demand.min.max(1) && now < refusal.valid_until);
        used < self.quota.amount
            && demand.amount_within(remaining).is_none_or(|amount| amount < demand.max)
            && !is_refused
    }

    /// Returns whether a running session may use more credits. A session is charged for its usage, so the
    /// total usage decides and not the grant.
    pub(super) fn may_spend(&self, used: u64, replicas: u32, now: Instant) -> bool {
        // The statements of a quota in use are sent regularly. If its grant has expired, there were no replies.
        let is_alone = self.replied_at.is_some() && !self.is_granted(now);
        let limit = match is_alone {
            true => self.limit_alone(replicas),
            false => self.quota.amount.saturating_sub(self.used_by_others),
        };
        used < limit
    }

    /// Returns the error for a request that needs `demand`. `remaining` is the amount that this replica may still use.
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
        let is_held_by_others =
            exceeded.shortfall.is_some_and(|shortfall| shortfall.remaining >= shortfall.needed);
        let own_shortfall = (remaining > 0).then_some(QuotaShortfall { remaining, needed: demand.min });
        QuotaExceeded {
            shortfall: if is_held_by_others { own_shortfall } else { exceeded.shortfall },
            ..exceeded
        }
    }

    /// Prepares a regular statement: gives up the part of the grant that this replica does not need soon, so that
    /// another replica can use it. Returns the amount in addition to `used` that the replica wants to hold: the usage
    /// of a few intervals, but only a part of the remaining amount. A replica without recent usage wants nothing. A
    /// replica without a grant wants only the amount that its requests wait for, because the usage of other replicas
    /// that it knows is old.
    pub(super) fn prepare_regular_statement(
        &mut self,
        used: u64,
        waiting: u64,
        replicas: u32,
        now: Instant,
    ) -> u64 {
        self.recent_use = [used.saturating_sub(self.regular_use), self.recent_use[0]];
        self.regular_use = used;
        let use_per_interval = self.recent_use[0].max(self.recent_use[1]);
        let remaining = self.quota.amount.saturating_sub(self.used_by_others).saturating_sub(used);
        // Half of an equal part, so that the rest remains available to requests at other replicas.
        let max_wanted = if self.is_granted(now) { remaining / (2 * u64::from(replicas.max(1))) } else { 0 };
        let wanted = max_wanted.min(use_per_interval.saturating_mul(HELD_INTERVALS)).max(waiting);
        let kept_amount = used.saturating_add(wanted);
        if kept_amount < self.granted {
            self.granted = kept_amount;
            self.generation += 1;
        }
        wanted
    }

    /// Changes the amount of the quota, and gives up the whole grant.
    pub(super) fn change_amount(&mut self, amount: u64) {
        self.quota.amount = amount;
        (self.granted, self.valid_until, self.refusal) = (0, None, None);
        self.generation += 1;
    }

    /// Returns the statement in which this replica reports its usage of the quota, and the amounts that it needs and
    /// wants.
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

    /// Applies the reply to `statement`.
    pub(super) fn apply_reply(&mut self, statement: &QuotaStatement, reply: QuotaReply, now: Instant) {
        let QuotaGrant { granted, used_by_others, valid_until } = match reply {
            QuotaReply::Granted(grant) => {
                if statement.needed > 0 {
                    self.refusal = None;
                }
                grant
            }
            QuotaReply::Denied(grant) => {
                self.refusal =
                    Some(GrantRefusal { needed: statement.needed, valid_until: now + REFUSAL_TTL });
                grant
            }
            QuotaReply::Unknown => return,
        };
        (self.used_by_others, self.reported_use, self.replied_at) =
            (used_by_others, statement.used, Some(now));
        // A reply to a statement from before the replica returned a part of its grant may contain that part.
        if statement.generation == self.generation {
            (self.granted, self.valid_until) = (granted, Some(valid_until));
        }
    }
}
