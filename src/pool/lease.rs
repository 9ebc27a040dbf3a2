//! A reservation of a key for one attempt: a slot in its concurrency group, and credits that no other
//! request can spend meanwhile.

use std::sync::Arc;

use super::Pool;
use super::cells::{ReportedDecrease, ReportedRemaining, SettledReservation};
use super::key::Key;
use super::wait_queue::KeyRequest;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::units::UnixMs;

/// A reserved key. Dropping it releases the key, whatever the outcome of the request.
#[derive(Debug)]
pub struct Lease {
    pool: Arc<Pool>,
    key: Arc<Key>,
    group: Option<ConcurrencyGroup>,
    /// Credits still reserved. On release, all of them are charged when a request was sent and its cost
    /// is unknown.
    reserved: u64,
    /// Whether these credits were also subtracted from the balance that ElevenLabs reported last: for the
    /// key's cap, and for the workspace.
    reported: [bool; 2],
    since: UnixMs,
    /// Whether a request was sent with the key, which may have been charged.
    is_used: bool,
    is_released: bool,
}

impl Lease {
    /// Reserves a slot and credits of `key` for `request`, or neither. `None` when another request
    /// took them first.
    pub(super) fn take(
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
        let taken =
            if reserved == 0 { Some([false; 2]) } else { take_credits(key, reserved, overcommits, now) };
        let Some(reported) = taken else {
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
            reported,
            since: now,
            is_used: false,
            is_released: false,
        })
    }

    /// The reserved key.
    #[must_use]
    pub fn key(&self) -> &Arc<Key> {
        &self.key
    }

    /// The time at which the key was reserved.
    #[must_use]
    pub fn since(&self) -> UnixMs {
        self.since
    }

    /// Marks that the request is sent: from now on it may be charged.
    pub fn begin(&mut self) {
        self.is_used = true;
    }

    /// Credits that the lease still reserves.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Records the maximum of concurrent requests that the provider reports for this concurrency
    /// group.
    pub fn record_concurrency_limit(&self, maximum: u32) {
        if let Some(group) = self.group {
            let limiter = self.key.workspace().limiter(group);
            if limiter.set_reported_max(maximum) {
                self.pool.dispatch_waiters_now();
            }
        }
    }

    /// Releases the concurrency slot, because no request runs now, and keeps the key.
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

    /// Releases the key before the lease is dropped.
    pub fn release(&mut self) {
        if std::mem::replace(&mut self.is_released, true) {
            return;
        }
        if self.reserved > 0 {
            // No cost was reported: a request that was sent is charged its estimate.
            self.charge(if self.is_used { self.reserved } else { 0 }, self.since);
        }
        if let Some(group) = self.group.take() {
            self.key.workspace().limiter(group).release();
        }
        self.key.remove_in_flight();
        self.pool.dispatch_waiters_now();
    }

    /// Charges the cost of the request. Credits reserved beyond that are free for others.
    pub(super) fn settle(&mut self, spent: u64, now: UnixMs) {
        if self.charge(spent, now) {
            self.pool.dispatch_waiters(now);
        }
    }

    /// Returns whether credits were charged or returned.
    fn charge(&mut self, spent: u64, now: UnixMs) -> bool {
        let settled = SettledReservation { reserved: std::mem::take(&mut self.reserved), spent };
        if settled == (SettledReservation { reserved: 0, spent: 0 }) {
            return false;
        }
        let workspace = self.key.workspace();
        workspace.cell().settle(settled, now);
        workspace.spending().add(spent, now);
        for (cell, is_taken) in reports(&self.key).into_iter().zip(self.reported) {
            if is_taken {
                cell.settle(settled);
            }
        }
        true
    }
}

/// The provider's reports of the remaining credits: of the key's cap, and of its workspace.
fn reports(key: &Key) -> [&ReportedRemaining; 2] {
    [key.reported(), key.workspace().cell().reported()]
}

/// Takes `credits` from all counters or from none. Returns for each of the provider's reports
/// whether credits were taken from it.
fn take_credits(key: &Key, credits: u64, overcommits: bool, now: UnixMs) -> Option<[bool; 2]> {
    let quota = key.workspace().cell();
    let cells = reports(key);
    let taken = cells.map(|cell| cell.take(credits, now));
    let is_taken = taken.map(|taken| taken == ReportedDecrease::Taken);
    let is_reported = is_taken.contains(&true);
    let is_reserved = match (taken.contains(&ReportedDecrease::TooFew), overcommits) {
        (true, _) => false,
        (false, true) => quota.overcommit(credits),
        // The provider's report of the remaining credits overrides our own count.
        (false, false) => quota.reserve(credits, (!is_reported).then(|| key.kept_credits())),
    };
    if is_reserved {
        return Some(is_taken);
    }
    for (cell, _) in cells.into_iter().zip(is_taken).filter(|(_, is_taken)| *is_taken) {
        cell.settle(SettledReservation { reserved: credits, spent: 0 });
    }
    None
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.release();
    }
}
