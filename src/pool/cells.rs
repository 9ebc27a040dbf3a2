//! State that many requests change at once, each piece in as few atomic words as it needs.

use std::sync::atomic::{AtomicI64, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::policy::budget::{Drift, Extension, Quota};
use crate::policy::standing::{Change, Park, ParkReason, Standing};
use crate::policy::units::UnixMs;

/// A park in one word, so that reason and end never belong to different parks: the reason in the
/// top byte (0: none), the end in milliseconds below it (enough for two million years).
#[derive(Debug, Default)]
pub(super) struct ParkCell(AtomicU64);

const UNTIL_BITS: u32 = 56;
const UNTIL_MASK: u64 = (1 << UNTIL_BITS) - 1;

impl ParkCell {
    pub(super) fn load(&self) -> Option<Park> {
        unpack(self.0.load(Ordering::Acquire))
    }

    /// Parks, unless a park with a later end holds.
    pub(super) fn join(&self, park: Park) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some(pack(unpack(word).map_or(park, |held| held.joined(park))))
        });
    }

    /// Ends the park if it has this reason.
    pub(super) fn pardon(&self, reason: ParkReason) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            unpack(word).filter(|held| held.reason == reason).map(|_| 0)
        });
    }
}

fn pack(park: Park) -> u64 {
    (u64::from(reason_code(park.reason)) << UNTIL_BITS) | park.until.0.min(UNTIL_MASK)
}

fn unpack(word: u64) -> Option<Park> {
    let reason = match word >> UNTIL_BITS {
        1 => ParkReason::RateLimited,
        2 => ParkReason::Exhausted,
        3 => ParkReason::Billing,
        4 => ParkReason::Invalid,
        _ => return None,
    };
    Some(Park { reason, until: UnixMs(word & UNTIL_MASK) })
}

fn reason_code(reason: ParkReason) -> u8 {
    match reason {
        ParkReason::RateLimited => 1,
        ParkReason::Exhausted => 2,
        ParkReason::Billing => 3,
        ParkReason::Invalid => 4,
    }
}

/// A quota. The count changes with every request; the rest only when the provider is asked.
#[derive(Debug)]
pub(super) struct QuotaCell {
    count: AtomicU64,
    /// [`UNKNOWN`] until told.
    limit: AtomicU64,
    /// 0: none; [`UNKNOWN`]: without end.
    extension: AtomicU64,
    /// 0: unknown.
    resets_at: AtomicU64,
    last_spent: AtomicU64,
    /// By how much the provider's figures of this period were above ours, all in all.
    drift: AtomicI64,
}

const UNKNOWN: u64 = u64::MAX;

impl Default for QuotaCell {
    fn default() -> Self {
        Self {
            count: AtomicU64::new(0),
            limit: AtomicU64::new(UNKNOWN),
            extension: AtomicU64::new(0),
            resets_at: AtomicU64::new(0),
            last_spent: AtomicU64::new(0),
            drift: AtomicI64::new(0),
        }
    }
}

impl QuotaCell {
    /// The quota as it stands at `now`; a period that has ended is closed on the way.
    pub(super) fn load(&self, now: UnixMs) -> Quota {
        let resets_at = self.resets_at.load(Ordering::Acquire);
        // Only the one who takes the date away begins the new count.
        if resets_at != 0
            && resets_at <= now.0
            && self.resets_at.compare_exchange(resets_at, 0, Ordering::AcqRel, Ordering::Acquire).is_ok()
        {
            self.count.store(0, Ordering::Release);
        }
        self.peek().at(now)
    }

    pub(super) fn spend(&self, credits: u64, now: UnixMs) {
        self.last_spent.fetch_max(now.0, Ordering::AcqRel);
        self.add(|count| count.saturating_add(credits));
    }

    /// Takes the provider's figures; returns whether they open a new period or a new limit.
    pub(super) fn adopt(&self, theirs: Quota, now: UnixMs, lag: Duration) -> bool {
        let before = self.peek();
        let idle = now.since(UnixMs(self.last_spent.load(Ordering::Acquire)));
        self.note(before.drift(theirs, idle, lag));
        self.add(|count| Quota { count, ..before }.adopt(theirs, idle, lag).count);
        self.set_terms(theirs);
        Quota { count: 0, ..before } != Quota { count: 0, ..theirs }
    }

    /// By how much the provider's figures of this period were above ours, all in all; below 0 when they
    /// were below.
    pub(super) fn drift(&self) -> i64 {
        self.drift.load(Ordering::Acquire)
    }

    fn note(&self, drift: Drift) {
        let credits = |credits| i64::try_from(credits).unwrap_or(i64::MAX);
        match drift {
            Drift::Fresh => self.drift.store(0, Ordering::Release),
            Drift::Within => {}
            Drift::Above(more) => {
                self.drift.fetch_add(credits(more), Ordering::AcqRel);
            }
            Drift::Below(fewer) => {
                self.drift.fetch_sub(credits(fewer), Ordering::AcqRel);
            }
        }
    }

    pub(super) fn restore(&self, quota: Quota) {
        self.count.store(quota.count, Ordering::Release);
        self.set_terms(quota);
    }

    fn set_terms(&self, quota: Quota) {
        let extension = match quota.extension {
            Extension::None => 0,
            Extension::Credits(more) => more.min(UNKNOWN - 1),
            Extension::Unlimited => UNKNOWN,
        };
        self.limit.store(quota.limit.map_or(UNKNOWN, |limit| limit.min(UNKNOWN - 1)), Ordering::Release);
        self.extension.store(extension, Ordering::Release);
        self.resets_at.store(quota.resets_at.map_or(0, |at| at.0), Ordering::Release);
    }

    fn add(&self, change: impl Fn(u64) -> u64) {
        let _ = self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| Some(change(count)));
    }

    fn peek(&self) -> Quota {
        let told = |word: u64, unknown: u64| (word != unknown).then_some(word);
        Quota {
            count: self.count.load(Ordering::Acquire),
            limit: told(self.limit.load(Ordering::Acquire), UNKNOWN),
            extension: match self.extension.load(Ordering::Acquire) {
                0 => Extension::None,
                UNKNOWN => Extension::Unlimited,
                more => Extension::Credits(more),
            },
            resets_at: told(self.resets_at.load(Ordering::Acquire), 0).map(UnixMs),
        }
    }
}

/// What was last said of a key, so that every change is told once, by whoever notices it first.
#[derive(Debug, Default)]
pub(super) struct Announced(AtomicU8);

const NEAR_LIMIT: u8 = 0x80;

impl Announced {
    /// The change since the last call, if there is one to tell.
    pub(super) fn update(&self, standing: Standing, quota: Quota, is_near: bool) -> Option<Change> {
        let code = match standing {
            Standing::Usable => 0,
            Standing::Resting { reason, .. } => reason_code(reason),
        };
        let word = code | if is_near { NEAR_LIMIT } else { 0 };
        let before = self.0.swap(word, Ordering::AcqRel);
        let was = before & !NEAR_LIMIT;
        match standing {
            Standing::Resting { reason, until } if was != code => Some(Change::Rests { reason, until }),
            Standing::Usable if was != code => Some(Change::Returns),
            Standing::Usable if is_near && before & NEAR_LIMIT == 0 => Some(Change::NearLimit(quota)),
            Standing::Usable | Standing::Resting { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_park_survives_its_packing() {
        for reason in
            [ParkReason::RateLimited, ParkReason::Exhausted, ParkReason::Billing, ParkReason::Invalid]
        {
            for until in [0, 1, 1_738_368_000_000, UNTIL_MASK] {
                let park = Park { reason, until: UnixMs(until) };
                assert_eq!(unpack(pack(park)), Some(park));
            }
        }
        assert_eq!(
            unpack(pack(Park { reason: ParkReason::Invalid, until: UnixMs(u64::MAX) })).unwrap().until.0,
            UNTIL_MASK
        );
        assert_eq!(unpack(0), None);
    }

    #[test]
    fn a_second_park_takes_the_later_deadline() {
        let cell = ParkCell::default();
        let park = |reason, until| Park { reason, until: UnixMs(until) };
        cell.join(park(ParkReason::Exhausted, 100));
        cell.join(park(ParkReason::RateLimited, 50));
        assert_eq!(cell.load(), Some(park(ParkReason::Exhausted, 100)));
        cell.join(park(ParkReason::RateLimited, 101));
        assert_eq!(cell.load(), Some(park(ParkReason::RateLimited, 101)));
    }

    #[test]
    fn only_the_reason_that_is_pardoned_ends() {
        let cell = ParkCell::default();
        let park = Park { reason: ParkReason::Exhausted, until: UnixMs(100) };
        cell.join(park);
        cell.pardon(ParkReason::Invalid);
        assert_eq!(cell.load(), Some(park));
        cell.pardon(ParkReason::Exhausted);
        assert_eq!(cell.load(), None);
    }

    #[test]
    fn a_quota_survives_its_cells() {
        let cell = QuotaCell::default();
        assert_eq!(cell.load(UnixMs(5)), Quota::default());
        for extension in [Extension::None, Extension::Credits(7), Extension::Unlimited] {
            let quota = Quota { count: 3, limit: Some(10), extension, resets_at: Some(UnixMs(100)) };
            cell.restore(quota);
            assert_eq!(cell.load(UnixMs(99)), quota);
        }
    }

    #[test]
    fn a_drift_adds_up_until_the_period_ends() {
        let cell = QuotaCell::default();
        let lag = Duration::from_millis(10);
        let theirs = |count, reset| Quota {
            count,
            limit: Some(100),
            resets_at: Some(UnixMs(reset)),
            ..Quota::default()
        };
        cell.adopt(theirs(7, 900), UnixMs(1), lag);
        assert_eq!(cell.drift(), 0, "what was spent before we came is no drift");
        cell.spend(10, UnixMs(2));
        cell.adopt(theirs(20, 900), UnixMs(3), lag);
        cell.adopt(theirs(20, 900), UnixMs(4), lag);
        assert_eq!(cell.drift(), 3, "three of them are not ours");
        cell.spend(5, UnixMs(5));
        cell.adopt(theirs(20, 900), UnixMs(14), lag);
        assert_eq!((cell.drift(), cell.load(UnixMs(14)).count), (3, 25), "it may lag");
        cell.adopt(theirs(24, 900), UnixMs(15), lag);
        assert_eq!((cell.drift(), cell.load(UnixMs(15)).count), (2, 24), "it has settled");
        cell.adopt(theirs(30, 9_000), UnixMs(16), lag);
        assert_eq!(cell.drift(), 0);
    }

    #[test]
    fn a_period_ends_once_and_what_is_spent_after_it_stays() {
        let cell = QuotaCell::default();
        cell.restore(Quota { count: 9, limit: Some(10), resets_at: Some(UnixMs(100)), ..Quota::default() });
        assert_eq!(cell.load(UnixMs(100)).count, 0);
        cell.spend(4, UnixMs(101));
        assert_eq!(cell.load(UnixMs(500)).count, 4);
    }

    #[test]
    fn every_change_is_told_once() {
        let said = Announced::default();
        let quota = Quota::default();
        let resting = Standing::Resting { reason: ParkReason::Exhausted, until: None };
        assert_eq!(said.update(Standing::Usable, quota, false), None);
        assert_eq!(said.update(Standing::Usable, quota, true), Some(Change::NearLimit(quota)));
        assert_eq!(said.update(Standing::Usable, quota, true), None);
        assert_eq!(
            said.update(resting, quota, true),
            Some(Change::Rests { reason: ParkReason::Exhausted, until: None })
        );
        assert_eq!(said.update(resting, quota, true), None);
        assert_eq!(said.update(Standing::Usable, quota, false), Some(Change::Returns));
    }
}
