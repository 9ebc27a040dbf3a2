//! Divides the credits of a workspace between replicas, on the side of one replica. Makes the statements about the
//! credits that the replica uses and needs, and applies the grants of `grants.lua`.
//!
//! The charges of a replica are a sum that only grows. The count of a workspace is its base plus the charges of all
//! replicas. The base contains the use that the provider reports and no replica has charged. A grant is the amount up
//! to which a replica may charge and reserve credits until its lease ends. `grants.lua` computes the grants.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::credit_statement::{CreditGrant, CreditStatement};
use super::replica_use::ReplicaUse;
use crate::pool::{CreditShare, CreditUse};

/// The lease of a grant: the time after a statement for which Redis reserves the grant for the replica.
pub(super) const GRANT_LEASE: Duration = Duration::from_secs(10);
/// The time before the end of a lease at which a replica stops using its grant, because the clock of Redis may run
/// faster than the clock of the replica.
pub(super) const LEASE_MARGIN: Duration = Duration::from_secs(1);
/// The time without charged, reserved or queued credits after which a replica keeps only a small grant.
const IDLE_AFTER: Duration = Duration::from_secs(30);

/// The stamp of a base that is restored from a database. Each base that results from a poll has a higher stamp.
const RESTORED_STAMP: u64 = 1;

/// The credits of a workspace, as this replica knows them: the charges of all replicas, the base and the grant.
#[derive(Debug)]
pub(super) struct Credits {
    /// The charges of this replica that [`CreditUse::charged_here`] does not contain: those of earlier processes, and
    /// those before the pool replaced the workspace. `None` until Redis has returned them.
    used_before: Option<u64>,
    /// The number of this process, which is higher than the numbers of its earlier processes.
    run: u64,
    /// The charges of earlier processes of this replica.
    used_by_earlier: u64,
    /// [`CreditUse::charged_here`] at the last statement.
    charged: i64,
    /// The known charges of each other replica. The amounts only grow.
    uses: BTreeMap<String, ReplicaUse>,
    /// The sum of the charges of all other replicas. `uses` may be older, because Redis returns the charges of each
    /// replica only to the first replica that sends a statement after they have changed.
    used_by_others: u64,
    /// The last [`CreditGrant::epoch`], or 0 if Redis must return the charges of each replica.
    epoch: u64,
    /// The replicas whose `uses` Redis has lost in part.
    lost_uses: Vec<String>,
    /// The last applied [`CreditUse::foreign`], which is the count minus the charges of this process. If the pool has
    /// another amount, this replica has changed it, for example by a poll. `None` if the next statement must contain
    /// a base.
    foreign: Option<i64>,
    /// The last known base.
    base: i64,
    /// The time at which the base was received, in milliseconds by the clock of Redis.
    base_stamp: u64,
    /// Whether Redis has lost the base.
    is_base_lost: bool,
    /// Whether the last reply contained unknown charges of an earlier process. Such a reply is not applied.
    is_restored_late: bool,
    /// The [`CreditUse::foreign`] that was restored from the database, if Redis did not know the workspace.
    restored_foreign: Option<i64>,
    /// The last time at which credits were charged, reserved or queued.
    last_used: Instant,
    /// The end of the grant, or `None` without a grant.
    lease_end: Option<Instant>,
    /// The last applied [`CreditShare::granted`], or `None` while the credits are not divided.
    bound: Option<i64>,
    /// The credits that were left for all replicas together at the last reply.
    left: u64,
    /// The amount up to which Redis reserves credits for this replica.
    held_at_redis: u64,
    /// Whether this replica may exceed the credits that are left.
    may_exceed: bool,
    /// Whether the grant in the last reply was too small for each of the queued requests.
    is_waiting: bool,
}

/// The use and the demand of credits that a statement contains.
#[derive(Clone, Copy, Debug)]
pub(super) struct CreditSituation {
    pub(super) usage: CreditUse,
    /// The maximum of the count.
    pub(super) limit: u64,
    /// The credits that queued requests need in addition, by their estimated costs.
    pub(super) queued: u64,
    /// The estimated cost of the cheapest queued request.
    pub(super) least: u64,
    /// Whether this process has received the result of a poll.
    pub(super) is_polled: bool,
    /// The time of the last poll, or of this statement if there was no poll since the last statement, in milliseconds
    /// by the clock of Redis.
    pub(super) base_time: u64,
    pub(super) instant: Instant,
}

impl Credits {
    pub(super) fn new(instant: Instant) -> Self {
        Self {
            used_before: None,
            run: 0,
            used_by_earlier: 0,
            charged: 0,
            uses: BTreeMap::new(),
            used_by_others: 0,
            epoch: 0,
            lost_uses: Vec::new(),
            foreign: None,
            base: 0,
            base_stamp: 0,
            is_base_lost: false,
            is_restored_late: false,
            restored_foreign: None,
            last_used: instant,
            lease_end: None,
            bound: None,
            left: 0,
            held_at_redis: 0,
            may_exceed: false,
            is_waiting: false,
        }
    }

    /// Returns the statement for the next beat.
    pub(super) fn make_statement(&mut self, situation: CreditSituation) -> CreditStatement {
        let CreditSituation { usage, limit, queued, least, is_polled, base_time, instant } = situation;
        if usage.charged_here != self.charged || usage.reserved > 0 || queued > 0 {
            self.last_used = instant;
        }
        if usage.charged_here < self.charged {
            // The pool has replaced the workspace, and counts its charges from zero.
            let former_charges = u64::try_from(self.charged).unwrap_or(0);
            self.used_before = self.used_before.map(|used| used.saturating_add(former_charges));
        }
        self.charged = usage.charged_here;
        let base = self.used_before.and_then(|used_before| {
            if self.foreign == Some(usage.foreign) {
                return self.is_base_lost.then_some((self.base, self.base_stamp));
            }
            let shared_use = used_before.saturating_add(self.used_by_others);
            let is_restored = !is_polled && self.restored_foreign == Some(usage.foreign);
            let stamp = if is_restored { RESTORED_STAMP } else { base_time.max(self.base_stamp) };
            Some((usage.foreign.saturating_sub_unsigned(shared_use), stamp))
        });
        let committed = usage.charged_here.saturating_add_unsigned(usage.reserved);
        let held = self.bound.map_or(committed, |bound| bound.max(committed));
        let with_earlier = |amount: i64| self.used_before.unwrap_or(0).saturating_add_signed(amount);
        let used = self.used_before.map(|_| with_earlier(usage.charged_here));
        CreditStatement {
            used,
            run: self.run,
            used_before: self.used_by_earlier,
            reserved: usage.reserved,
            queued,
            least,
            held: with_earlier(held),
            limit,
            base,
            is_idle: instant.saturating_duration_since(self.last_used) >= IDLE_AFTER,
            used_by_others: self.used_by_others,
            epoch: self.epoch,
        }
    }

    /// Requests the charges of each replica with the next statement. Redis may have lost a part of them, for example
    /// after a failover.
    pub(super) fn request_uses(&mut self) {
        self.epoch = 0;
    }

    /// Returns the charges that Redis has lost in part, in the format of `grants.lua`: `replica used run before` for
    /// each replica.
    pub(super) fn lost_use_argument(&self) -> String {
        let parts = self.lost_uses.iter().filter_map(|replica| {
            let used = self.uses.get(replica)?;
            Some(format!("{replica} {used}"))
        });
        parts.collect::<Vec<_>>().join(" ")
    }

    /// Whether a request of this cost, or of 1 credit if the cost is `None`, may start. It may start if the credits are
    /// not divided or the grant is large enough. It may also start if this replica may exceed the credits that are
    /// left, and has reserved none.
    pub(super) fn can_start(&self, usage: CreditUse, cost: Option<u64>) -> bool {
        let committed = usage.charged_here.saturating_add_unsigned(usage.reserved);
        let Some(bound) = self.bound else { return true };
        let available = u64::try_from(bound.saturating_sub(committed)).unwrap_or(0);
        available >= cost.unwrap_or(1) || (self.may_exceed && usage.reserved == 0)
    }

    /// Whether this replica may exceed the credits that are left.
    pub(super) fn may_exceed(&self) -> bool {
        self.may_exceed
    }

    /// Whether the grant in the last reply was too small for each of the queued requests.
    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// Whether `statement` returns credits, because Redis reserves more for this replica than the statement holds.
    pub(super) fn are_returned_by(&self, statement: CreditStatement) -> bool {
        statement.held < self.held_at_redis
    }

    /// Applies the reply to a statement that was sent at `sent_at`. `shared_now` is the time of Redis in the reply.
    /// Returns the new share of this replica, or `None` if it does not change because another statement must follow.
    pub(super) fn apply_grant(
        &mut self,
        statement: CreditStatement,
        grant: &CreditGrant,
        usage: CreditUse,
        sent_at: Instant,
        shared_now: u64,
    ) -> Option<CreditShare> {
        self.left = grant.left;
        self.held_at_redis = grant.granted.max(statement.held);
        self.record_uses(grant);
        let is_earlier = grant.run > self.run;
        if is_earlier || self.used_before.is_none() {
            // The number is the time of the reply, except that it must exceed the number of the earlier process if the
            // clock of Redis was set back.
            self.run = shared_now.max(grant.run + 1);
        }
        let Some(used_before) = self.used_before else {
            self.restore(grant, usage);
            return None;
        };
        if is_earlier || grant.used_before > self.used_by_earlier {
            // Redis had lost the charges of an earlier process of this replica, and another replica has restored
            // them.
            let restored_charges = grant.used_before.saturating_sub(self.used_by_earlier);
            self.used_by_earlier += restored_charges;
            self.used_before = Some(used_before.saturating_add(restored_charges));
            self.is_restored_late = true;
            return None;
        }
        self.is_restored_late = false;
        self.record_base(grant);
        let is_base_superseded = statement.base.is_none() && self.foreign != Some(usage.foreign);
        if is_base_superseded {
            // A poll has changed the count after the statement was made. The next statement contains the change.
            return None;
        }
        let foreign =
            self.base.saturating_add_unsigned(used_before).saturating_add_unsigned(self.used_by_others);
        self.foreign = Some(foreign);
        self.lease_end = Some(sent_at + GRANT_LEASE - LEASE_MARGIN);
        let has_lost_data = self.has_redis_lost_data();
        // While Redis lacks charges of other replicas, its grant may be too large.
        let granted = if has_lost_data { grant.granted.min(statement.held) } else { grant.granted };
        self.bound = Some(granted.cast_signed().saturating_sub_unsigned(used_before));
        self.may_exceed = grant.may_exceed && !has_lost_data;
        self.is_waiting = statement.queued > 0 && !self.can_start(usage, Some(statement.least));
        Some(CreditShare { foreign, granted: self.bound, may_overcommit: self.may_exceed })
    }

    /// Records the charges of other replicas, and the replicas whose charges Redis has lost in part. Each replica
    /// restores all charges that it knows, including those of replicas that have ended.
    fn record_uses(&mut self, grant: &CreditGrant) {
        self.lost_uses.clear();
        self.epoch = grant.epoch;
        let Some(uses) = &grant.uses else {
            self.used_by_others = grant.used_by_others;
            return;
        };
        for (replica, use_at_redis) in uses {
            let known_use = self.uses.entry(replica.clone()).or_default();
            *known_use = known_use.merged(*use_at_redis);
        }
        let used_at_redis: BTreeMap<&str, u64> =
            uses.iter().map(|(replica, use_at_redis)| (replica.as_str(), use_at_redis.used)).collect();
        let is_lost = |(replica, known_use): &(&String, &ReplicaUse)| {
            used_at_redis.get(replica.as_str()) < Some(&known_use.used)
        };
        self.lost_uses = self.uses.iter().filter(is_lost).map(|(replica, _)| replica.clone()).collect();
        self.used_by_others = self.uses.values().map(|known_use| known_use.used).sum();
    }

    /// Records the base, unless this replica knows a newer base, which Redis has lost.
    fn record_base(&mut self, grant: &CreditGrant) {
        self.is_base_lost = (grant.base_stamp, grant.base) < (self.base_stamp, self.base);
        if !self.is_base_lost {
            (self.base, self.base_stamp) = (grant.base, grant.base_stamp);
        }
    }

    /// Whether another statement must follow at once, because Redis lacks data that this replica restores, or this
    /// replica has just received charges of its earlier processes.
    pub(super) fn is_incomplete(&self) -> bool {
        self.is_restored_late || self.has_redis_lost_data()
    }

    /// Whether Redis lacks the base or charges that this replica knows.
    fn has_redis_lost_data(&self) -> bool {
        self.is_base_lost || !self.lost_uses.is_empty()
    }

    /// Continues the statements of an earlier process of this replica. The count in the database of this replica may be
    /// higher than the count at Redis. That process has charged the difference and ended before it reported it.
    fn restore(&mut self, grant: &CreditGrant, usage: CreditUse) {
        let count = usage.charged_here.saturating_add(usage.foreign);
        let reported_charges = grant.last_reported_use.unwrap_or(0);
        let count_at_redis = grant
            .base
            .saturating_add_unsigned(reported_charges)
            .saturating_add_unsigned(grant.used_by_others)
            .saturating_add(usage.charged_here);
        let is_known = grant.base_stamp > 0 || grant.last_reported_use.is_some() || grant.used_by_others > 0;
        let unreported_charges = if is_known && grant.last_reported_use.is_some() {
            u64::try_from(count.saturating_sub(count_at_redis)).unwrap_or(0)
        } else {
            0
        };
        self.used_by_earlier = reported_charges.saturating_add(unreported_charges);
        self.used_before = Some(self.used_by_earlier);
        (self.base, self.base_stamp) = (grant.base, grant.base_stamp);
        // If Redis does not know the workspace, the next statement makes the count of this replica the base. Otherwise,
        // this replica uses the base of Redis.
        self.foreign = is_known.then_some(usage.foreign);
        self.restored_foreign = (!is_known).then_some(usage.foreign);
        self.charged = usage.charged_here;
    }

    /// Returns a share without a bound, for a workspace with unlimited credits. Returns `None` if the last share has no
    /// bound either.
    pub(super) fn stop_dividing(&mut self, usage: CreditUse) -> Option<CreditShare> {
        self.bound.take()?;
        (self.lease_end, self.may_exceed, self.is_waiting) = (None, false, false);
        Some(CreditShare { foreign: usage.foreign, granted: None, may_overcommit: true })
    }

    /// Returns the share of this replica without a grant: one of `replicas` equal parts of the credits that are left.
    /// `count_left` is the number of credits that are left by the count of this replica. Returns `None` while a grant
    /// is valid, and if the share does not change.
    pub(super) fn fall_back(
        &mut self,
        usage: CreditUse,
        replicas: u32,
        count_left: u64,
        instant: Instant,
    ) -> Option<CreditShare> {
        let has_ended = self.lease_end.is_none_or(|end| end <= instant);
        let has_changed = self.foreign != Some(usage.foreign);
        if !has_ended || (self.lease_end.is_none() && !has_changed) {
            return None;
        }
        self.lease_end = None;
        self.foreign = Some(usage.foreign);
        self.left = self.left.min(count_left);
        let part = if has_changed { count_left } else { self.left } / u64::from(replicas.max(1));
        let committed = usage.charged_here.saturating_add_unsigned(usage.reserved);
        self.bound = Some(committed.saturating_add_unsigned(part));
        (self.may_exceed, self.is_waiting) = (true, false);
        Some(CreditShare { foreign: usage.foreign, granted: self.bound, may_overcommit: true })
    }
}

#[cfg(test)]
impl Credits {
    /// Returns the sum of the charges of this replica.
    pub(super) fn used(&self, usage: CreditUse) -> Option<u64> {
        self.used_before.map(|before| before.saturating_add_signed(usage.charged_here))
    }

    /// Returns the known charges of another replica.
    pub(super) fn used_by(&self, replica: &str) -> u64 {
        self.uses.get(replica).map_or(0, |known_use| known_use.used)
    }

    /// Returns the amount up to which this process may use credits, and the credits that were left at the last reply.
    pub(super) fn bound_and_left(&self) -> (Option<i64>, u64) {
        (self.bound, self.left)
    }
}
