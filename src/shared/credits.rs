//! This replica's part of the credits of a workspace.
//!
//! Each replica states what it has charged in all, which only grows. The count of a workspace is the base, which the
//! provider reports, plus the charges of all replicas. A grant is the amount up to which a replica may charge and
//! reserve credits until its lease ends. `grants.lua` computes both.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use redis::Value;

use super::replica_use::ReplicaUse;
use super::reply::{UnexpectedReply, amount, integer, text, tuple};
use crate::pool::{CreditShare, CreditUse};

/// The lease of a grant at Redis.
pub(super) const GRANT_LEASE: Duration = Duration::from_secs(10);
/// The time before the end of a lease at which a replica stops using its grant, because clocks and messages differ.
pub(super) const LEASE_MARGIN: Duration = Duration::from_secs(1);
/// The time without use after which a replica asks only for a small grant.
const IDLE_AFTER: Duration = Duration::from_secs(30);

/// The time of a base that is restored from a database. Every polled base is newer.
const RESTORED_STAMP: u64 = 1;

/// What this replica states about the credits of a workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CreditStatement {
    /// Credits that this replica has charged in all. `None` before its earlier statement is known.
    pub(super) used: Option<u64>,
    /// The number of this process. 0 before the earlier statement is known.
    pub(super) run: u64,
    /// The part of `used` that earlier processes of this replica have charged.
    pub(super) used_before: u64,
    /// Credits that requests in flight have reserved.
    pub(super) reserved: u64,
    /// Credits that queued requests need in addition.
    pub(super) queued: u64,
    /// The least of `queued` with which one of the requests can start.
    pub(super) least: u64,
    /// Up to which amount this replica may use more, until the reply.
    pub(super) held: u64,
    /// The maximum of the count.
    pub(super) limit: u64,
    /// A changed base, and the shared time at which it was learned.
    pub(super) base: Option<(i64, u64)>,
    /// Whether the replica has not used the workspace recently.
    pub(super) is_idle: bool,
    /// The sum of what other replicas have used, as far as this one knows.
    pub(super) used_by_others: u64,
}

impl CreditStatement {
    /// Returns the credits that the requests of this replica may cost.
    pub(super) fn needed(self) -> u64 {
        self.reserved.saturating_add(self.queued)
    }

    /// Whether the replica holds more than its requests in flight need.
    pub(super) fn has_unused(self) -> bool {
        self.used.is_some_and(|used| self.held > used.saturating_add(self.reserved))
    }

    /// Returns the statement of a replica that leaves: it needs nothing and holds nothing that it has not used.
    pub(super) fn without_need(self) -> Self {
        let used = self.used.unwrap_or(0);
        Self { reserved: 0, queued: 0, least: 0, held: used, limit: 0, ..self }
    }

    /// Whether another statement would lead to the same reply.
    pub(super) fn is_same(self, other: Self) -> bool {
        let without_base = |statement| Self { base: None, held: 0, used_by_others: 0, ..statement };
        self.base.is_some() == other.base.is_some() && without_base(self) == without_base(other)
    }
}

/// The reply to a [`CreditStatement`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CreditGrant {
    granted: u64,
    used_by_others: u64,
    base: i64,
    base_stamp: u64,
    may_exceed: bool,
    /// What this replica had stated before.
    stated_before: Option<u64>,
    /// What is left for all replicas together.
    left: u64,
    /// Whether others hold more than they need of what this replica waits for.
    pub(super) is_unmet: bool,
    /// What each of the other replicas has used, unless `used_by_others` is the amount of the statement.
    uses: Vec<(String, ReplicaUse)>,
    /// What Redis knows of this replica.
    run: u64,
    used_before: u64,
}

impl CreditGrant {
    pub(super) fn from_value(value: &Value) -> Result<Self, UnexpectedReply> {
        let [granted, others, base, stamp, may_exceed, before, left, unmet, uses, run, used_before] =
            tuple(value)?;
        let mut words = text(uses)?.split_ascii_whitespace();
        let mut known_uses = Vec::new();
        while let Some(replica) = words.next() {
            known_uses.push((replica.to_owned(), ReplicaUse::parse(&mut words).ok_or(UnexpectedReply)?));
        }
        Ok(Self {
            granted: amount(granted)?,
            used_by_others: amount(others)?,
            base: integer(base)?,
            base_stamp: amount(stamp)?,
            may_exceed: integer(may_exceed)? == 1,
            stated_before: u64::try_from(integer(before)?).ok(),
            left: amount(left)?,
            is_unmet: integer(unmet)? == 1,
            uses: known_uses,
            run: amount(run)?,
            used_before: amount(used_before)?,
        })
    }
}
/// The state of the credits of a workspace at this replica.
#[derive(Debug)]
pub(super) struct Credits {
    /// What this replica had charged before this process, or before the pool forgot its count. `None` until Redis has
    /// returned it.
    used_before: Option<u64>,
    /// The number of this process, which is higher than those of earlier processes of this replica.
    run: u64,
    /// What earlier processes of this replica have charged.
    used_by_earlier: u64,
    /// [`CreditUse::charged_here`] at the last statement.
    charged: i64,
    /// What each of the other replicas has used, as far as this one knows. The amounts only grow.
    uses: BTreeMap<String, ReplicaUse>,
    /// The sum of `uses`.
    used_by_others: u64,
    /// The replicas of which Redis has lost a part of `uses`.
    lost_uses: Vec<String>,
    /// [`CreditUse::foreign`] as it was last applied. Another value is a change by this replica.
    foreign: Option<i64>,
    /// The last known base, and the shared time at which it was learned.
    base: i64,
    base_stamp: u64,
    /// Whether Redis has lost the base.
    is_base_lost: bool,
    /// Whether the last reply contained charges of an earlier process that were unknown, so that it has not been applied.
    is_restored_late: bool,
    /// [`CreditUse::foreign`] as the database has restored it, if Redis did not know the workspace.
    restored_foreign: Option<i64>,
    last_used: Instant,
    /// The end of the grant, or `None` without one.
    lease_end: Option<Instant>,
    /// [`CreditShare::granted`] as it was last applied, or `None` while the credits are not divided.
    bound: Option<i64>,
    left: u64,
    /// Up to which amount Redis counts the credits as those of this replica.
    held_at_redis: u64,
    /// Whether this replica may exceed what is left.
    may_exceed: bool,
    /// Whether the last reply contained too little for any of the queued requests.
    is_waiting: bool,
}

/// A use of credits, and the circumstances under which it is stated.
#[derive(Clone, Copy, Debug)]
pub(super) struct CreditSituation {
    pub(super) usage: CreditUse,
    /// The maximum of the count.
    pub(super) limit: u64,
    /// The estimated cost of the queued requests, and of the cheapest one.
    pub(super) queued: u64,
    pub(super) least: u64,
    /// Whether this process knows the result of a poll.
    pub(super) is_polled: bool,
    /// The shared time of the last poll, or of the statement if there was none since the last one.
    pub(super) learned_at: u64,
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

    /// Returns the statement of the next beat.
    pub(super) fn statement(&mut self, situation: CreditSituation) -> CreditStatement {
        let CreditSituation { usage, limit, queued, least, is_polled, learned_at, instant } = situation;
        if usage.charged_here != self.charged || usage.reserved > 0 || queued > 0 {
            self.last_used = instant;
        }
        if usage.charged_here < self.charged {
            // The pool has replaced the workspace, and counts from zero again.
            let lost = u64::try_from(self.charged).unwrap_or(0);
            self.used_before = self.used_before.map(|used| used.saturating_add(lost));
        }
        self.charged = usage.charged_here;
        let base = self.used_before.and_then(|used_before| {
            if self.foreign == Some(usage.foreign) {
                return self.is_base_lost.then_some((self.base, self.base_stamp));
            }
            let shared = used_before.saturating_add(self.used_by_others);
            let is_restored = !is_polled && self.restored_foreign == Some(usage.foreign);
            let stamp = if is_restored { RESTORED_STAMP } else { learned_at.max(self.base_stamp) };
            Some((usage.foreign.saturating_sub_unsigned(shared), stamp))
        });
        let committed = usage.charged_here.saturating_add_unsigned(usage.reserved);
        let held = self.bound.map_or(committed, |bound| bound.max(committed));
        let in_all = |amount: i64| self.used_before.unwrap_or(0).saturating_add_signed(amount);
        let used = self.used_before.map(|_| in_all(usage.charged_here));
        CreditStatement {
            used,
            run: self.run,
            used_before: self.used_by_earlier,
            reserved: usage.reserved,
            queued,
            least,
            held: in_all(held),
            limit,
            base,
            is_idle: instant.saturating_duration_since(self.last_used) >= IDLE_AFTER,
            used_by_others: self.used_by_others,
        }
    }

    /// Returns "replica used run before" for each replica of which Redis has lost a part.
    pub(super) fn lost_uses(&self) -> String {
        let lost = self.lost_uses.iter().filter_map(|replica| {
            let used = self.uses.get(replica)?;
            Some(format!("{replica} {used}"))
        });
        lost.collect::<Vec<_>>().join(" ")
    }

    /// Whether a request of this cost can start, or any request if it is `None`, as far as credits are concerned.
    pub(super) fn can_start(&self, usage: CreditUse, cost: Option<u64>) -> bool {
        let committed = usage.charged_here.saturating_add_unsigned(usage.reserved);
        let Some(bound) = self.bound else { return true };
        let room = u64::try_from(bound.saturating_sub(committed)).unwrap_or(0);
        room >= cost.unwrap_or(1) || (self.may_exceed && usage.reserved == 0)
    }

    /// Whether this replica may exceed what is left.
    pub(super) fn may_exceed(&self) -> bool {
        self.may_exceed
    }

    /// Whether the last reply contained too little for any of the queued requests.
    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// Whether Redis counts more credits as those of this replica than `statement` says.
    pub(super) fn returns(&self, statement: CreditStatement) -> bool {
        statement.held < self.held_at_redis
    }

    /// Applies the reply to a statement that was sent at `sent`. Returns the share of this replica.
    pub(super) fn apply(
        &mut self,
        statement: CreditStatement,
        grant: &CreditGrant,
        usage: CreditUse,
        sent: Instant,
        shared_now: u64,
    ) -> Option<CreditShare> {
        self.left = grant.left;
        self.held_at_redis = grant.granted.max(statement.held);
        self.record_uses(grant);
        let is_earlier = grant.run > self.run;
        if is_earlier || self.used_before.is_none() {
            // Usually the time of the first reply. It is not if the clock of Redis was set back.
            self.run = shared_now.max(grant.run + 1);
        }
        let Some(used_before) = self.used_before else {
            self.restore(grant, usage);
            return None;
        };
        if is_earlier || grant.used_before > self.used_by_earlier {
            // Redis had lost what an earlier process of this replica had stated, and another replica has restored it.
            let late = grant.used_before.saturating_sub(self.used_by_earlier);
            self.used_by_earlier += late;
            self.used_before = Some(used_before.saturating_add(late));
            self.is_restored_late = true;
            return None;
        }
        self.is_restored_late = false;
        self.learn_base(grant);
        let is_base_superseded = statement.base.is_none() && self.foreign != Some(usage.foreign);
        if is_base_superseded {
            // A poll has changed the count while the statement was on its way. The next statement contains it.
            return None;
        }
        let foreign =
            self.base.saturating_add_unsigned(used_before).saturating_add_unsigned(self.used_by_others);
        self.foreign = Some(foreign);
        self.lease_end = Some(sent + GRANT_LEASE - LEASE_MARGIN);
        let is_behind = self.has_redis_lost();
        // Redis grants too much while it has lost what others have used.
        let granted = if is_behind { grant.granted.min(statement.held) } else { grant.granted };
        self.bound = Some(granted.cast_signed().saturating_sub_unsigned(used_before));
        self.may_exceed = grant.may_exceed && !is_behind;
        self.is_waiting = statement.queued > 0 && !self.can_start(usage, Some(statement.least));
        Some(CreditShare { foreign, granted: self.bound, may_overcommit: self.may_exceed })
    }

    /// Records what other replicas have used, and of which of them Redis has lost a part. Each replica restores all that
    /// it knows, so that nothing is lost with a replica that has ended.
    fn record_uses(&mut self, grant: &CreditGrant) {
        self.lost_uses.clear();
        if grant.used_by_others == self.used_by_others {
            return;
        }
        for (replica, used) in &grant.uses {
            let known = self.uses.entry(replica.clone()).or_default();
            *known = known.merged(*used);
        }
        let stated: BTreeMap<&str, u64> =
            grant.uses.iter().map(|(replica, stated)| (replica.as_str(), stated.used)).collect();
        let is_lost =
            |(replica, known): &(&String, &ReplicaUse)| stated.get(replica.as_str()) < Some(&known.used);
        self.lost_uses = self.uses.iter().filter(is_lost).map(|(replica, _)| replica.clone()).collect();
        self.used_by_others = self.uses.values().map(|known| known.used).sum();
    }

    /// Records the base, unless Redis has an older one than this replica, because it has lost the newer one.
    fn learn_base(&mut self, grant: &CreditGrant) {
        self.is_base_lost = (grant.base_stamp, grant.base) < (self.base_stamp, self.base);
        if !self.is_base_lost {
            (self.base, self.base_stamp) = (grant.base, grant.base_stamp);
        }
    }

    /// Whether another statement must follow at once, because Redis or this replica has lost what the other one knows.
    pub(super) fn is_incomplete(&self) -> bool {
        self.is_restored_late || self.has_redis_lost()
    }

    fn has_redis_lost(&self) -> bool {
        self.is_base_lost || !self.lost_uses.is_empty()
    }

    /// Continues the statements of an earlier process of this replica. Credits that are counted here and not at Redis
    /// were charged by that process and never stated, because it ended before its next beat.
    fn restore(&mut self, grant: &CreditGrant, usage: CreditUse) {
        let count = usage.charged_here.saturating_add(usage.foreign);
        let stated = grant.stated_before.unwrap_or(0);
        let shared_count = grant
            .base
            .saturating_add_unsigned(stated)
            .saturating_add_unsigned(grant.used_by_others)
            .saturating_add(usage.charged_here);
        let is_known = grant.base_stamp > 0 || grant.stated_before.is_some() || grant.used_by_others > 0;
        let unstated = if is_known && grant.stated_before.is_some() {
            u64::try_from(count.saturating_sub(shared_count)).unwrap_or(0)
        } else {
            0
        };
        self.used_by_earlier = stated.saturating_add(unstated);
        self.used_before = Some(self.used_by_earlier);
        (self.base, self.base_stamp) = (grant.base, grant.base_stamp);
        // A count that Redis does not have becomes the base. Otherwise, the one of Redis applies.
        self.foreign = is_known.then_some(usage.foreign);
        self.restored_foreign = (!is_known).then_some(usage.foreign);
        self.charged = usage.charged_here;
    }

    /// Returns the share of this replica after its grant has ended without a new one: of what was left, a part for
    /// each of the `replicas`. Returns `None` while the grant lasts.
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
    /// Returns what this replica has used in all.
    pub(super) fn used(&self, usage: CreditUse) -> Option<u64> {
        self.used_before.map(|before| before.saturating_add_signed(usage.charged_here))
    }

    /// Returns what another replica has used, as far as this one knows.
    pub(super) fn used_by(&self, replica: &str) -> u64 {
        self.uses.get(replica).map_or(0, |known| known.used)
    }

    /// Returns up to which amount this process may use credits, and what was left at the last reply.
    pub(super) fn bound(&self) -> (Option<i64>, u64) {
        (self.bound, self.left)
    }
}
