//! Divides a concurrency limit between replicas, on the side of one replica. Makes the statements about the slots that
//! the replica uses and demands, and applies the grants of `slots.lua`. A slot permits one concurrent request. The
//! limit belongs to a subject, which is a concurrency group of a workspace, or a client.

use std::time::{Duration, Instant};

use redis::Value;

use super::credits::LEASE_MARGIN;
use super::reply::{UnexpectedReply, parse_amount, parse_integer, parse_tuple};
use super::scripts::{SLOTS, ScriptCall};
use crate::pool::SlotUse;

/// The lease of granted slots: the time after a statement for which Redis reserves them for the replica.
pub(super) const SLOT_LEASE: Duration = Duration::from_secs(5);
/// The time without running or queued requests after which a replica returns its slots.
const IDLE_AFTER: Duration = Duration::from_secs(30);
/// The interval at which slots that cannot be divided equally go to other replicas.
pub(super) const ROTATION_INTERVAL: Duration = Duration::from_secs(2);

/// A statement of this replica to `slots.lua`: the slots of a subject that the replica holds and demands, and the
/// maximum of the subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotStatement {
    /// The slots that this replica uses, or may use until the reply arrives.
    pub(super) held: u32,
    /// The slots that this replica could use. The value 0 returns all slots that are not in use.
    pub(super) demand: u32,
    /// Whether this replica has no credits, and therefore demands only the slots in use.
    pub(super) lacks_credits: bool,
    /// The maximum number of slots of all replicas together, or 0 if it is unknown.
    pub(super) max: u32,
    /// The time at which the maximum was received, in milliseconds by the clock of Redis.
    pub(super) max_stamp: u64,
}

/// Returns the call of `slots.lua` with `statements`. `keys` contains the Redis key of each statement's subject, in the
/// same order.
pub(super) fn slots_call<'a>(
    replica: &str,
    keys: Vec<String>,
    statements: impl IntoIterator<Item = &'a SlotStatement>,
) -> ScriptCall {
    let mut arguments = vec![
        replica.to_owned(),
        SLOT_LEASE.as_millis().to_string(),
        ROTATION_INTERVAL.as_millis().to_string(),
    ];
    for SlotStatement { held, demand, max, max_stamp, .. } in statements {
        arguments.extend([held.to_string(), demand.to_string(), max.to_string(), max_stamp.to_string()]);
    }
    ScriptCall { script: SLOTS, keys, arguments }
}

/// The reply of `slots.lua` to a [`SlotStatement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotGrant {
    /// The slots that this replica may use.
    granted: u32,
    /// The newest maximum that Redis knows, or 0 if it is unknown.
    max: u32,
    /// The time at which the maximum was received, in milliseconds by the clock of Redis.
    max_stamp: u64,
    /// The number of replicas that demand slots of the subject.
    pub(super) active_replicas: u32,
    /// Whether other replicas hold slots that this replica demands and is entitled to.
    pub(super) is_demand_unmet: bool,
    /// Whether this replica has less than an equal part, because other replicas have not yet returned theirs.
    is_partial: bool,
}

impl SlotGrant {
    pub(super) fn from_value(value: &Value) -> Result<Self, UnexpectedReply> {
        let [granted, max, max_stamp, active_replicas, is_demand_unmet, is_partial] = parse_tuple(value)?;
        let saturating_u32 =
            |value| parse_amount(value).map(|amount| u32::try_from(amount).unwrap_or(u32::MAX));
        Ok(Self {
            granted: saturating_u32(granted)?,
            max: saturating_u32(max)?,
            max_stamp: parse_amount(max_stamp)?,
            active_replicas: saturating_u32(active_replicas)?,
            is_demand_unmet: parse_integer(is_demand_unmet)? == 1,
            is_partial: parse_integer(is_partial)? == 1,
        })
    }
}

/// A share of the slots that differs from the last share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NewShare {
    /// The slots that this replica may use, or `None` if the slots are not divided.
    pub(super) slots: Option<u32>,
}

/// The changes that the pool must apply after a reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SlotChange {
    /// The new share of this replica, or `None` if it does not change.
    pub(super) share: Option<NewShare>,
    /// A newer maximum, which another replica has reported.
    pub(super) max: Option<u32>,
}

/// The demand of this replica for slots of a subject.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SlotDemand {
    /// The number of queued requests that need a slot.
    pub(super) queued: u32,
    /// Whether this replica has no credits, and therefore cannot use another slot.
    pub(super) lacks_credits: bool,
}

/// The rule for the share of a replica without a current grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fallback {
    /// One slot, until the next reply contains a grant.
    OneSlot,
    /// The maximum divided by the number of replicas, but at least one slot.
    EqualPart,
    /// An equal part, which also replaces a current grant of fewer slots. A replica that is alone uses this rule,
    /// because its grant cannot grow without Redis, and its requests would wait until the lease ends.
    AtLeastEqualPart,
}

/// The slots of a subject at this replica: its share, the lease of the share, and the last statement.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// The last time at which a request was running or queued. `None` before the first request, and after this replica
    /// has returned its slots.
    last_used: Option<Instant>,
    /// The end of the lease of the granted share, or `None` without a grant.
    lease_end: Option<Instant>,
    /// The newest maximum that this replica knows.
    max: Option<u32>,
    /// The time at which the maximum was received, in milliseconds by the clock of Redis.
    max_stamp: u64,
    /// The last share, or `None` if the slots are not divided.
    share: Option<u32>,
    /// The last statement that Redis has received. `None` if its reply granted only a part, so that the next beat
    /// demands the rest.
    last_statement: Option<SlotStatement>,
}

impl Slots {
    /// Returns the statement for the next beat, or `None` if this replica has returned its slots and needs none.
    pub(super) fn make_statement(
        &mut self,
        usage: SlotUse,
        SlotDemand { queued, lacks_credits }: SlotDemand,
        shared_now: u64,
        instant: Instant,
    ) -> Option<SlotStatement> {
        if usage.max != self.max {
            self.max = usage.max;
            self.max_stamp = shared_now;
        }
        if usage.count.peak > 0 || queued > 0 {
            self.last_used = Some(instant);
        }
        let last_used = self.last_used?;
        let is_idle = instant.saturating_duration_since(last_used) >= IDLE_AFTER;
        if is_idle {
            self.last_used = None;
        }
        let peak = usage.count.peak.max(1);
        let is_saturated = self.share.is_some_and(|share| peak >= share);
        let headroom = if is_saturated { (peak / 2).max(1) } else { 0 };
        let demand = match (is_idle, lacks_credits) {
            (true, _) => 0,
            // Without credits, this replica cannot use further slots, which other replicas may need.
            (false, true) => usage.count.running,
            (false, false) => peak.saturating_add(queued).saturating_add(headroom),
        };
        Some(SlotStatement {
            held: usage.count.running.max(self.share.unwrap_or(0)),
            demand,
            lacks_credits: lacks_credits && !is_idle,
            max: usage.max.unwrap_or(0),
            max_stamp: self.max_stamp,
        })
    }

    /// Whether Redis must receive a statement, because it differs from the last statement or demands the rest of a
    /// partial grant.
    pub(super) fn is_changed(&self, statement: SlotStatement) -> bool {
        self.last_statement != Some(statement)
    }

    /// Applies the reply to a statement that was sent at `sent_at`. Returns the changes for the pool.
    pub(super) fn apply_grant(
        &mut self,
        statement: SlotStatement,
        grant: SlotGrant,
        sent_at: Instant,
    ) -> SlotChange {
        self.last_statement = (!grant.is_partial).then_some(statement);
        let mut change = SlotChange::default();
        if grant.max_stamp > self.max_stamp && grant.max > 0 && self.max != Some(grant.max) {
            self.max = Some(grant.max);
            self.max_stamp = grant.max_stamp;
            change.max = Some(grant.max);
        }
        if (statement.demand == 0 && !statement.lacks_credits) || grant.max == 0 {
            self.lease_end = None;
            return change;
        }
        self.lease_end = Some(sent_at + SLOT_LEASE - LEASE_MARGIN);
        change.share = self.set_share(Some(grant.granted));
        change
    }

    /// Changes the share by the rule `fallback` if there is no current grant, or if the rule replaces the grant.
    /// Returns the new share, or `None` if it does not change.
    pub(super) fn fall_back(
        &mut self,
        replicas: u32,
        fallback: Fallback,
        instant: Instant,
    ) -> Option<NewShare> {
        let share = match (self.max, replicas) {
            (None, _) | (_, 0 | 1) => None,
            (Some(max), _) => Some(match fallback {
                Fallback::EqualPart | Fallback::AtLeastEqualPart => (max / replicas).max(1),
                Fallback::OneSlot => 1,
            }),
        };
        let has_grant = self.lease_end.is_some_and(|end| end > instant);
        let is_replaced = fallback == Fallback::AtLeastEqualPart && self.share < share;
        if has_grant && !is_replaced {
            return None;
        }
        self.lease_end = None;
        self.set_share(share)
    }

    /// Returns the last share, or `None` if the slots are not divided.
    pub(super) fn share(&self) -> Option<u32> {
        self.share
    }

    /// Records a share. Returns it if it differs from the last share.
    fn set_share(&mut self, slots: Option<u32>) -> Option<NewShare> {
        if self.share == slots {
            return None;
        }
        self.share = slots;
        Some(NewShare { slots })
    }
}

#[cfg(test)]
impl Slots {
    /// Whether Redis has granted the current share.
    pub(super) fn has_grant(&self) -> bool {
        self.lease_end.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::pool::RunningCount;

    const MAX: u32 = 12;
    const USAGE: SlotUse = SlotUse { count: RunningCount { running: 1, peak: 1 }, max: Some(MAX) };

    /// Returns a grant of Redis for one of three replicas.
    fn grant(granted: u32, is_partial: bool) -> SlotGrant {
        SlotGrant { granted, max: MAX, max_stamp: 1, active_replicas: 3, is_demand_unmet: false, is_partial }
    }

    /// Returns slots with the grant of Redis, and the statement that Redis has received.
    fn granted_slots(grant: SlotGrant, instant: Instant) -> (Slots, SlotStatement) {
        let mut slots = Slots::default();
        let statement = slots.make_statement(USAGE, SlotDemand::default(), 1, instant).unwrap();
        slots.apply_grant(statement, grant, instant);
        (slots, statement)
    }

    #[test]
    fn a_partial_grant_is_demanded_again_until_it_is_complete() {
        let (mut slots, statement) = granted_slots(grant(1, true), clock::instant());
        assert!(slots.is_changed(statement), "the rest of a partial grant must be demanded");
        slots.apply_grant(statement, grant(4, false), clock::instant());
        assert!(!slots.is_changed(statement), "a complete grant must not be demanded again");
    }

    #[test]
    fn a_replica_that_is_alone_uses_at_least_an_equal_part() {
        let instant = clock::instant();
        for (granted, expected) in [(0, Some(4)), (3, Some(4)), (4, None), (12, None)] {
            let (mut slots, _) = granted_slots(grant(granted, false), instant);
            let share = slots.fall_back(3, Fallback::AtLeastEqualPart, instant);
            assert_eq!(
                share,
                expected.map(|slots| NewShare { slots: Some(slots) }),
                "the fallback share must be an equal part after a grant of fewer than 4 of {MAX} slots"
            );
        }
    }

    #[test]
    fn a_connected_replica_keeps_a_small_grant_until_its_lease_ends() {
        let instant = clock::instant();
        let (mut slots, _) = granted_slots(grant(0, false), instant);
        for fallback in [Fallback::OneSlot, Fallback::EqualPart] {
            assert_eq!(
                slots.fall_back(3, fallback, instant),
                None,
                "the grant must last until its lease ends"
            );
        }
        let lease_end = instant + SLOT_LEASE - LEASE_MARGIN;
        assert_eq!(
            slots.fall_back(3, Fallback::OneSlot, lease_end),
            Some(NewShare { slots: Some(1) }),
            "the share after the lease must be one slot"
        );
    }
}
