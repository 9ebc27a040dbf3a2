//! A workspace: what owns credits, concurrency and resources. What is known of it, in atomics.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption, Guard};

use super::belonging::Belonging;
use super::cells::{ParkCell, QuietCell, QuotaCell, RoomCell, SpendingCell};
use super::owners::Identity;
use super::sync::{AtomicU32, AtomicU64, Ordering};
use crate::policy::budget::Quota;
use crate::policy::forecast::{Forecast, forecast};
use crate::policy::lane::Lane;
use crate::policy::standing::{Park, ParkReason};
use crate::policy::units::UnixMs;

/// A workspace: what owns credits, concurrency and resources.
#[repr(align(128))]
#[derive(Debug)]
pub struct Workspace {
    belonging: ArcSwap<Belonging>,
    identity: Identity,
    quota: QuotaCell,
    park: ParkCell,
    /// Until when it is too poor for a request that it was to serve; 0 when it is not.
    short_until: AtomicU64,
    /// Whether a look at its keys would find news.
    quiet: QuietCell,
    in_flight: AtomicU32,
    spending: SpendingCell,
    tier: ArcSwapOption<String>,
    rooms: [RoomCell; Lane::COUNT],
}

impl Workspace {
    /// One of which that is known; `identity` is what it will be known by for good.
    pub(super) fn new(belonging: Belonging, identity: Identity) -> Self {
        Self {
            belonging: ArcSwap::from_pointee(belonging),
            identity,
            quota: QuotaCell::default(),
            park: ParkCell::default(),
            short_until: AtomicU64::new(0),
            quiet: QuietCell::default(),
            in_flight: AtomicU32::new(0),
            spending: SpendingCell::default(),
            tier: ArcSwapOption::empty(),
            rooms: Default::default(),
        }
    }

    /// Which one it is, as far as is known now.
    #[must_use]
    pub fn belonging(&self) -> Guard<Arc<Belonging>> {
        self.belonging.load()
    }

    /// What it is known by beyond this run: what it owns is written down under it.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Its credits as they stand at `now`.
    #[must_use]
    pub fn quota(&self, now: UnixMs) -> Quota {
        self.quota.load(now)
    }

    /// Credits that requests under way may still spend.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.quota.reserved()
    }

    /// By how many credits the provider's figures of this period were above ours, all in all, since
    /// the start; below 0 when they were below.
    #[must_use]
    pub fn drift(&self) -> i64 {
        self.quota.drift()
    }

    /// What will become of its credits, at the rate they are spent at `now`.
    #[must_use]
    pub fn forecast(&self, now: UnixMs) -> Forecast {
        forecast(&self.quota(now), self.spent_per_day(now), now)
    }

    /// Credits a day, at the rate of the last hours.
    #[must_use]
    pub fn spent_per_day(&self, now: UnixMs) -> f64 {
        self.spending.load().per_day(now)
    }

    /// Its plan, when the provider has told.
    #[must_use]
    pub fn tier(&self) -> Option<Arc<String>> {
        self.tier.load_full()
    }

    /// Requests that hold a lease on one of its keys now.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Requests of a lane that run now, and how many may, as far as is known.
    #[must_use]
    pub fn running(&self, lane: Lane) -> (u32, Option<u32>) {
        let room = self.room(lane);
        (room.running(), room.known_max())
    }

    /// Its park, whether it still holds or not.
    #[must_use]
    pub fn parked(&self) -> Option<Park> {
        self.park.load()
    }

    /// The next moment at which it may stand in another way, if nothing happens.
    pub(super) fn next_change(&self, quota: &Quota, now: UnixMs) -> Option<UnixMs> {
        let park = self.park.load().map(|park| park.until);
        [park, self.short_until(), quota.resets_at].into_iter().flatten().filter(|at| *at > now).min()
    }

    /// It is too poor for a request that it was to serve, until its credits come back.
    pub(super) fn fall_short(&self, until: UnixMs) {
        self.short_until.store(until.0, Ordering::Release);
        self.quiet.disturb();
    }

    pub(super) fn short_until(&self) -> Option<UnixMs> {
        Some(UnixMs(self.short_until.load(Ordering::Acquire))).filter(|until| until.0 > 0)
    }

    pub(super) fn park(&self, park: Park) {
        self.park.join(park);
        self.quiet.disturb();
    }

    pub(super) fn quiet(&self) -> &QuietCell {
        &self.quiet
    }

    pub(super) fn rename(&self, belonging: Belonging) {
        self.belonging.store(Arc::new(belonging));
    }

    pub(super) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn pardon(&self, reason: ParkReason) {
        self.park.pardon(reason);
        self.quiet.disturb();
    }

    pub(super) fn cell(&self) -> &QuotaCell {
        &self.quota
    }

    pub(super) fn spending(&self) -> &SpendingCell {
        &self.spending
    }

    pub(super) fn room(&self, lane: Lane) -> &RoomCell {
        // A lane's number is below their count.
        &self.rooms[lane.index()]
    }

    pub(super) fn observe(&self, theirs: Quota, tier: Option<String>, now: UnixMs, lag: Duration) {
        // Figures lag: one that only repeats the old period does not undo a refusal.
        if self.quota.adopt(theirs, now, lag) {
            self.park.pardon(ParkReason::Exhausted);
            self.short_until.store(0, Ordering::Release);
        }
        if let Some(tier) = &tier {
            for (lane, room) in Lane::all().zip(&self.rooms) {
                room.plan(lane.plan_max(tier));
            }
        }
        self.tier.store(tier.map(Arc::new));
        self.quiet.disturb();
    }

    pub(super) fn restore(&self, quota: Quota, park: Option<Park>, now: UnixMs) {
        self.quota.restore(quota, now);
        if let Some(park) = park {
            self.park.join(park);
        }
        self.quiet.disturb();
    }
}
