//! Divides the concurrent requests of a subject, on the side of one replica: states the slots that the replica uses
//! and demands, and applies the grants of `slots.lua`. A subject is a concurrency group of a workspace, or a client.

use std::time::{Duration, Instant};

use redis::Value;

use super::credits::LEASE_MARGIN;
use super::reply::{UnexpectedReply, amount, integer, tuple};
use super::scripts::{SLOTS, ScriptCall};
use crate::pool::SlotUse;

/// The lease of granted slots: the time after a statement for which Redis reserves them for the replica.
pub(super) const SLOT_LEASE: Duration = Duration::from_secs(5);
/// The time without use after which a replica returns its slots.
const IDLE_AFTER: Duration = Duration::from_secs(30);
/// The interval at which slots that cannot be divided equally go to other replicas.
pub(super) const ROTATION: Duration = Duration::from_secs(2);
/// The slots that a replica may use before its first statement.
const LOAN: u32 = 1;

/// The statement of this replica about a subject.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotStatement {
    /// The slots that this replica uses or may use until the reply.
    pub(super) held: u32,
    /// The slots that the replica could use; 0 returns all slots that are not in use.
    pub(super) demand: u32,
    /// Whether the replica demands only the slots in use, because it has no credits.
    pub(super) is_blocked: bool,
    /// The maximum of all replicas together; 0 if unknown.
    pub(super) max: u32,
    /// The shared time at which the maximum was received.
    pub(super) max_stamp: u64,
}

/// Returns the call that states the concurrent requests of these subjects. `keys` are their keys, in the same order.
pub(super) fn slots_call<'a>(
    replica: &str,
    keys: Vec<String>,
    statements: impl IntoIterator<Item = &'a SlotStatement>,
) -> ScriptCall {
    let mut arguments =
        vec![replica.to_owned(), SLOT_LEASE.as_millis().to_string(), ROTATION.as_millis().to_string()];
    for SlotStatement { held, demand, max, max_stamp, .. } in statements {
        arguments.extend([held.to_string(), demand.to_string(), max.to_string(), max_stamp.to_string()]);
    }
    ScriptCall { script: SLOTS, keys, arguments }
}

/// The reply to a [`SlotStatement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SlotGrant {
    granted: u32,
    max: u32,
    max_stamp: u64,
    /// The number of replicas that use the subject.
    pub(super) active_replicas: u32,
    /// Whether other replicas hold slots that this replica demands and is entitled to.
    pub(super) is_unmet: bool,
}

impl SlotGrant {
    pub(super) fn from_value(value: &Value) -> Result<Self, UnexpectedReply> {
        let [granted, max, stamp, active, unmet] = tuple(value)?;
        let count = |value| amount(value).map(|count| u32::try_from(count).unwrap_or(u32::MAX));
        Ok(Self {
            granted: count(granted)?,
            max: count(max)?,
            max_stamp: amount(stamp)?,
            active_replicas: count(active)?,
            is_unmet: integer(unmet)? == 1,
        })
    }
}

/// The changes that a reply causes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct SlotChange {
    /// The new share of this replica; `None` if it stays.
    pub(super) share: Option<Option<u32>>,
    /// A maximum that another replica has received from the provider.
    pub(super) max: Option<u32>,
}

/// The demand of queued requests for slots, and whether credits prevent it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct SlotDemand {
    /// The number of queued requests.
    pub(super) queued: u32,
    /// Whether the replica has no credits, so that it can use no further slot.
    pub(super) is_blocked: bool,
}

/// The share of a replica without a current grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fallback {
    /// One slot until the next reply, because Redis responds.
    Loan,
    /// The maximum divided by the number of replicas.
    EqualPart,
}

/// The state of a subject at this replica.
#[derive(Debug, Default)]
pub(super) struct Slots {
    last_used: Option<Instant>,
    lease_end: Option<Instant>,
    /// The last maximum that this replica knows, and the shared time at which it was received.
    max: Option<u32>,
    max_stamp: u64,
    /// The share that was applied last.
    share: Option<u32>,
    /// The last statement that Redis has received.
    last_statement: Option<SlotStatement>,
}

impl Slots {
    /// Returns the statement of the next beat, or `None` if there is nothing to state.
    pub(super) fn statement(
        &mut self,
        usage: SlotUse,
        SlotDemand { queued, is_blocked }: SlotDemand,
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
        let demand = match (is_idle, is_blocked) {
            (true, _) => 0,
            // Other replicas have the credits, and need the slots.
            (false, true) => usage.count.running,
            (false, false) => peak.saturating_add(queued).saturating_add(headroom),
        };
        Some(SlotStatement {
            held: usage.count.running.max(self.share.unwrap_or(0)),
            demand,
            is_blocked: is_blocked && !is_idle,
            max: usage.max.unwrap_or(0),
            max_stamp: self.max_stamp,
        })
    }

    /// Whether a statement differs from the last statement that Redis has received.
    pub(super) fn is_changed(&self, statement: SlotStatement) -> bool {
        self.last_statement != Some(statement)
    }

    /// Applies the reply to a statement that was sent at `sent_at`.
    pub(super) fn apply(
        &mut self,
        statement: SlotStatement,
        grant: SlotGrant,
        sent_at: Instant,
    ) -> SlotChange {
        self.last_statement = Some(statement);
        let mut change = SlotChange::default();
        if grant.max_stamp > self.max_stamp && grant.max > 0 && self.max != Some(grant.max) {
            self.max = Some(grant.max);
            self.max_stamp = grant.max_stamp;
            change.max = Some(grant.max);
        }
        if (statement.demand == 0 && !statement.is_blocked) || grant.max == 0 {
            self.lease_end = None;
            return change;
        }
        self.lease_end = Some(sent_at + SLOT_LEASE - LEASE_MARGIN);
        change.share = self.set_share(Some(grant.granted));
        change
    }

    /// Applies the fallback share if there is no current grant. Returns the share if it changes.
    pub(super) fn fall_back(
        &mut self,
        replicas: u32,
        fallback: Fallback,
        instant: Instant,
    ) -> Option<Option<u32>> {
        if self.lease_end.is_some_and(|end| end > instant) {
            return None;
        }
        self.lease_end = None;
        let share = match (self.max, replicas) {
            (None, _) | (_, 0 | 1) => None,
            (Some(max), _) => Some(match fallback {
                Fallback::EqualPart => (max / replicas).max(1),
                Fallback::Loan => LOAN,
            }),
        };
        self.set_share(share)
    }

    /// Returns the share that was applied last; `None` if the subject is not divided.
    pub(super) fn share(&self) -> Option<u32> {
        self.share
    }

    fn set_share(&mut self, share: Option<u32>) -> Option<Option<u32>> {
        if self.share == share {
            return None;
        }
        self.share = share;
        Some(share)
    }
}

#[cfg(test)]
impl Slots {
    /// Whether the share is a grant of Redis.
    pub(super) fn has_grant(&self) -> bool {
        self.lease_end.is_some()
    }
}
