//! Acquires, charges and releases leases. A [`Lease`] reserves a key for one attempt. If the request belongs to a
//! concurrency group, the lease also reserves a slot: one of the concurrent requests of the group. It also reserves
//! credits for the estimated cost, which no other request can then spend.

use std::sync::Arc;

use super::Pool;
use super::cells::{FinishedReservation, ReportedDecrease, ReportedRemaining};
use super::key::Key;
use super::wait_queue::KeyRequest;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::units::UnixMs;

/// A reserved key. Dropping the lease releases the key, regardless of the outcome of the request.
#[derive(Debug)]
pub struct Lease {
    pool: Arc<Pool>,
    key: Arc<Key>,
    group: Option<ConcurrencyGroup>,
    /// Credits that are still reserved. If a request was sent and its cost is unknown, the release
    /// charges all of them.
    reserved: u64,
    /// Whether these credits were also subtracted from each of [`remaining_reports`].
    is_subtracted: [bool; 2],
    reserved_at: UnixMs,
    /// Whether a request was sent with the key. The provider may have charged it.
    is_sent: bool,
    is_released: bool,
}

impl Lease {
    /// Reserves a slot and credits of `key` for `request`, or neither. With `overcommits`, the credits may exceed the
    /// remaining credits. Returns `None` when another request has taken the slot or the credits first.
    pub(super) fn try_acquire(
        pool: &Arc<Pool>,
        key: &Arc<Key>,
        request: &KeyRequest,
        overcommits: bool,
        now: UnixMs,
    ) -> Option<Self> {
        let workspace = key.workspace();
        if request.group.is_some_and(|group| !workspace.limiter(group).try_acquire()) {
            return None;
        }
        let reserved = request.estimate.unwrap_or(0);
        let reservation =
            if reserved == 0 { Some([false; 2]) } else { reserve_credits(key, reserved, overcommits, now) };
        let Some(is_subtracted) = reservation else {
            if let Some(group) = request.group {
                workspace.limiter(group).release();
            }
            return None;
        };
        key.add_in_flight();
        Some(Self {
            pool: Arc::clone(pool),
            key: Arc::clone(key),
            group: request.group,
            reserved,
            is_subtracted,
            reserved_at: now,
            is_sent: false,
            is_released: false,
        })
    }

    /// Returns the reserved key.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// Returns the time at which the key was reserved.
    #[must_use]
    pub fn reserved_at(&self) -> UnixMs {
        self.reserved_at
    }

    /// Marks the request as sent. From now on, the provider may charge it.
    pub fn mark_sent(&mut self) {
        self.is_sent = true;
    }

    /// Returns the credits that the lease still reserves.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Records the maximum number of concurrent requests that the provider reports for the
    /// concurrency group of the lease.
    pub fn record_concurrency_limit(&self, maximum: u32) {
        if let Some(group) = self.group
            && self.key.workspace().limiter(group).set_reported_max(maximum)
        {
            self.pool.dispatch_waiters_now();
        }
    }

    /// Releases the concurrency slot but keeps the key. A session does this while none of its requests is running.
    pub fn release_slot(&mut self) {
        if let Some(group) = self.group.take() {
            self.key.workspace().limiter(group).release();
            self.pool.dispatch_waiters_now();
        }
    }

    /// Whether the lease holds a concurrency slot.
    #[must_use]
    pub fn has_slot(&self) -> bool {
        self.group.is_some()
    }

    /// Releases the key before the lease is dropped. A second call has no effect.
    pub fn release(&mut self) {
        if std::mem::replace(&mut self.is_released, true) {
            return;
        }
        if self.reserved > 0 {
            // The provider has not reported a cost, so a request that was sent is charged its estimate.
            self.finish_reservation(if self.is_sent { self.reserved } else { 0 }, self.reserved_at);
        }
        if let Some(group) = self.group.take() {
            self.key.workspace().limiter(group).release();
        }
        self.key.remove_in_flight();
        self.pool.dispatch_waiters_now();
    }

    /// Charges the cost of the request, and returns the other reserved credits to the workspace.
    pub(super) fn charge(&mut self, spent: u64, now: UnixMs) {
        if self.finish_reservation(spent, now) {
            self.pool.dispatch_waiters(now);
        }
    }

    /// Charges `spent` credits and returns the other reserved credits to the workspace. Returns whether credits were
    /// charged or returned.
    fn finish_reservation(&mut self, spent: u64, now: UnixMs) -> bool {
        let finished = FinishedReservation { reserved: std::mem::take(&mut self.reserved), spent };
        if finished == (FinishedReservation { reserved: 0, spent: 0 }) {
            return false;
        }
        let workspace = self.key.workspace();
        workspace.quota_cell.finish_reservation(finished, now);
        workspace.spending.add(spent, now);
        for (report, is_subtracted) in remaining_reports(&self.key).into_iter().zip(self.is_subtracted) {
            if is_subtracted {
                report.finish_reservation(finished);
            }
        }
        true
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.release();
    }
}

/// Returns the reports of remaining credits that limit a request with `key`: the report about the key's own quota, and
/// the report about its workspace.
fn remaining_reports(key: &Key) -> [&ReportedRemaining; 2] {
    [&key.reported_remaining, &key.workspace().quota_cell.reported_remaining]
}

/// Reserves `credits` in all counters or in none. Returns for each of the [`remaining_reports`] whether the credits
/// were subtracted from it, or `None` if they were not reserved.
fn reserve_credits(key: &Key, credits: u64, overcommits: bool, now: UnixMs) -> Option<[bool; 2]> {
    let quota = &key.workspace().quota_cell;
    let reports = remaining_reports(key);
    let decreases = reports.map(|report| report.decrease(credits, now));
    let is_subtracted = decreases.map(|decrease| decrease == ReportedDecrease::Subtracted);
    let is_reported = is_subtracted.contains(&true);
    let is_reserved = match (decreases.contains(&ReportedDecrease::Insufficient), overcommits) {
        (true, _) => false,
        (false, true) => quota.overcommit(credits),
        // The remaining credits that the provider reports override the count of the pool.
        (false, false) => quota.reserve(credits, (!is_reported).then_some(key.kept_credits)),
    };
    if is_reserved {
        return Some(is_subtracted);
    }
    for (report, _) in reports.into_iter().zip(is_subtracted).filter(|(_, is_subtracted)| *is_subtracted) {
        report.finish_reservation(FinishedReservation { reserved: credits, spent: 0 });
    }
    None
}
