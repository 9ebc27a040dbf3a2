//! A workspace's credits: what is spent, what requests under way have reserved, and how far both
//! may go together.
//!
//! One word holds the sum of both, so that the last credits are given to one request and never to
//! two: reserving is one compare-and-swap against the ceiling. What is spent and what is reserved have
//! a word each beside it, for those who read; every change is added to the sum as a difference, so
//! that changes may meet in any order.

use std::time::Duration;

use super::super::sync::{AtomicI64, AtomicU64, Ordering};
use crate::policy::budget::{Drift, Extension, Quota};
use crate::policy::standing::{Park, ParkReason};
use crate::policy::units::UnixMs;

const UNKNOWN: u64 = u64::MAX;

/// The credits of a workspace. The sum changes with every request; the rest only when the provider
/// is asked.
#[derive(Debug)]
pub(in crate::pool) struct QuotaCell {
    /// Spent and reserved. Differences wrap, so for a moment it may be below zero.
    committed: AtomicU64,
    /// Of that, what is spent.
    spent: AtomicU64,
    /// Of that, what requests under way may still spend.
    reserved: AtomicU64,
    /// [`UNKNOWN`] until told.
    limit: AtomicU64,
    /// 0: none; [`UNKNOWN`]: without end.
    extension: AtomicU64,
    /// 0: unknown.
    resets_at: AtomicU64,
    last_spent: AtomicU64,
    /// By how much the provider's figures of this period were above ours, all in all.
    drift: AtomicI64,
    told: ToldCell,
}

/// What became of a reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) struct Paid {
    /// Credits that were reserved.
    pub(in crate::pool) reserved: u64,
    /// Credits that were spent.
    pub(in crate::pool) spent: u64,
}

impl Default for QuotaCell {
    fn default() -> Self {
        Self {
            committed: AtomicU64::new(0),
            spent: AtomicU64::new(0),
            reserved: AtomicU64::new(0),
            limit: AtomicU64::new(UNKNOWN),
            extension: AtomicU64::new(0),
            resets_at: AtomicU64::new(0),
            last_spent: AtomicU64::new(0),
            drift: AtomicI64::new(0),
            told: ToldCell::default(),
        }
    }
}

impl QuotaCell {
    /// The quota as it stands at `now`; a period that has ended is closed on the way.
    pub(in crate::pool) fn load(&self, now: UnixMs) -> Quota {
        let resets_at = self.resets_at.load(Ordering::Acquire);
        // Only the one who takes the date away begins the new count.
        if resets_at != 0
            && resets_at <= now.0
            && self.resets_at.compare_exchange(resets_at, 0, Ordering::AcqRel, Ordering::Acquire).is_ok()
        {
            // What is under way is charged in the new period.
            self.count_anew(|_| 0);
            self.told.forget();
        }
        self.peek().at(now)
    }

    /// Credits that requests under way may still spend.
    pub(in crate::pool) fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Acquire)
    }

    /// What the provider said is left when it last refused.
    pub(in crate::pool) fn told(&self) -> &ToldCell {
        &self.told
    }

    /// Whether `credits` more fit, with `kept` left over.
    pub(in crate::pool) fn fits(&self, credits: u64, kept: u64) -> bool {
        let sum = not_below_zero(self.committed.load(Ordering::Acquire)).saturating_add(credits);
        self.ceiling().is_none_or(|ceiling| sum <= ceiling.saturating_sub(kept))
    }

    /// Reserves `credits`, if they fit with `kept` left over, or at any rate when that is `None`.
    /// `false` when they do not fit: nothing has changed then.
    pub(in crate::pool) fn reserve(&self, credits: u64, kept: Option<u64>) -> bool {
        let ceiling = kept.and_then(|kept| Some(self.ceiling()?.saturating_sub(kept)));
        self.reserve_if(credits, |sum, _| ceiling.is_none_or(|ceiling| sum <= ceiling))
    }

    /// Reserves `credits` although they may not fit, if nobody else has reserved any.
    pub(in crate::pool) fn stretch(&self, credits: u64) -> bool {
        self.reserve_if(credits, |_, others| others == 0)
    }

    fn reserve_if(&self, credits: u64, may: impl Fn(u64, u64) -> bool) -> bool {
        let others = self.reserved.fetch_add(credits, Ordering::AcqRel);
        let added = self.committed.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            let sum = not_below_zero(word).saturating_add(credits);
            may(sum, others).then(|| word.wrapping_add(credits))
        });
        if added.is_err() {
            self.reserved.fetch_sub(credits, Ordering::AcqRel);
        }
        added.is_ok()
    }

    /// Ends a reservation.
    pub(in crate::pool) fn settle(&self, paid: Paid, now: UnixMs) {
        if paid.spent > 0 {
            self.last_spent.fetch_max(now.0, Ordering::AcqRel);
        }
        self.committed.fetch_add(paid.spent.wrapping_sub(paid.reserved), Ordering::AcqRel);
        self.spent.fetch_add(paid.spent, Ordering::AcqRel);
        self.reserved.fetch_sub(paid.reserved, Ordering::AcqRel);
    }

    /// Takes the provider's figures; returns whether they open a new period or a new limit.
    pub(in crate::pool) fn adopt(&self, theirs: Quota, now: UnixMs, lag: Duration) -> bool {
        let before = self.peek();
        let idle = now.since(UnixMs(self.last_spent.load(Ordering::Acquire)));
        self.note(before.drift(theirs, idle, lag));
        self.count_anew(|count| Quota { count, ..before }.adopt(theirs, idle, lag).count);
        self.set_terms(theirs);
        let is_new = Quota { count: 0, ..before } != Quota { count: 0, ..theirs };
        if is_new {
            self.told.forget();
        }
        is_new
    }

    /// By how much the provider's figures of this period were above ours, all in all; below 0 when they
    /// were below.
    pub(in crate::pool) fn drift(&self) -> i64 {
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

    /// Takes up what was known before, by `now`: what was spent shortly before may not be in the
    /// provider's figure yet.
    pub(in crate::pool) fn restore(&self, quota: Quota, now: UnixMs) {
        self.last_spent.fetch_max(now.0, Ordering::AcqRel);
        self.count_anew(|_| quota.count);
        self.set_terms(quota);
    }

    /// Gives another value to what is spent.
    fn count_anew(&self, count: impl Fn(u64) -> u64) {
        let before = self.spent.fetch_update(Ordering::AcqRel, Ordering::Acquire, |spent| Some(count(spent)));
        let before = before.unwrap_or_else(|spent| spent);
        self.committed.fetch_add(count(before).wrapping_sub(before), Ordering::AcqRel);
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

    fn ceiling(&self) -> Option<u64> {
        self.terms().ceiling()
    }

    fn peek(&self) -> Quota {
        Quota { count: self.spent.load(Ordering::Acquire), ..self.terms() }
    }

    fn terms(&self) -> Quota {
        let told = |word: u64, unknown: u64| (word != unknown).then_some(word);
        Quota {
            count: 0,
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

/// A sum that other differences have yet to reach is none.
fn not_below_zero(word: u64) -> u64 {
    if word > u64::MAX / 2 { 0 } else { word }
}

/// What became of taking some of what the provider said is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) enum Taken {
    /// It was taken.
    Some,
    /// The provider has said nothing.
    Untold,
    /// There is not so much.
    TooFew,
}

/// What the provider said is left, in the numbers of our estimates, when it refused a request for
/// its price: a smaller one may still go. Of a workspace, or of a key with a cap of its own.
#[derive(Debug)]
pub(in crate::pool) struct ToldCell(AtomicU64);

impl Default for ToldCell {
    fn default() -> Self {
        Self(AtomicU64::new(UNKNOWN))
    }
}

impl ToldCell {
    /// What is left of it. `None` when nothing was said.
    pub(in crate::pool) fn left(&self) -> Option<u64> {
        let left = self.0.load(Ordering::Acquire);
        (left != UNKNOWN).then_some(left)
    }

    /// The provider says so. The lower word holds: an earlier one may have been spent since.
    pub(in crate::pool) fn say(&self, left: u64) {
        self.0.fetch_min(left.min(UNKNOWN - 1), Ordering::AcqRel);
    }

    /// The provider says so with a refusal. What it said before counts while the park of that
    /// refusal holds.
    pub(in crate::pool) fn hear(&self, left: u64, before: Option<Park>, now: UnixMs) {
        if !before.is_some_and(|park| park.reason == ParkReason::Exhausted && park.holds(now)) {
            self.forget();
        }
        self.say(left);
    }

    pub(in crate::pool) fn forget(&self) {
        self.0.store(UNKNOWN, Ordering::Release);
    }

    /// Takes `credits` of what is left, if anything was said.
    pub(in crate::pool) fn take(&self, credits: u64) -> Taken {
        let take = |left: u64| if left == UNKNOWN { None } else { left.checked_sub(credits) };
        match self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, take) {
            Ok(_) => Taken::Some,
            Err(UNKNOWN) => Taken::Untold,
            Err(_) => Taken::TooFew,
        }
    }

    /// Gives back what was taken and not spent.
    pub(in crate::pool) fn settle(&self, paid: Paid) {
        update(&self.0, |left| {
            let settled = left.saturating_add(paid.reserved).saturating_sub(paid.spent).min(UNKNOWN - 1);
            if left == UNKNOWN { left } else { settled }
        });
    }
}

fn update(word: &AtomicU64, change: impl Fn(u64) -> u64) {
    let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |value| Some(change(value)));
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(50);

    fn holding(count: u64, limit: u64) -> QuotaCell {
        let cell = QuotaCell::default();
        cell.restore(
            Quota { count, limit: Some(limit), resets_at: Some(UnixMs(100)), ..Quota::default() },
            NOW,
        );
        cell
    }

    fn settle(cell: &QuotaCell, reserved: u64, spent: u64) {
        cell.settle(Paid { reserved, spent }, NOW);
    }

    #[test]
    fn a_quota_survives_its_cells() {
        let cell = QuotaCell::default();
        assert_eq!(cell.load(UnixMs(5)), Quota::default());
        for extension in [Extension::None, Extension::Credits(7), Extension::Unlimited] {
            let quota = Quota { count: 3, limit: Some(10), extension, resets_at: Some(UnixMs(100)) };
            cell.restore(quota, NOW);
            assert_eq!(cell.load(UnixMs(99)), quota);
        }
    }

    #[test]
    fn the_last_credits_are_given_once() {
        let cell = holding(90, 100);
        assert!(cell.reserve(6, Some(0)) && !cell.reserve(6, Some(0)) && cell.reserve(4, Some(0)));
        assert!(!cell.fits(1, 0) && cell.fits(0, 0));
        assert_eq!((cell.load(NOW).count, cell.reserved()), (90, 10));
        settle(&cell, 6, 3);
        settle(&cell, 4, 4);
        assert_eq!((cell.load(NOW).count, cell.reserved()), (97, 0));
        assert!(cell.fits(3, 0) && !cell.fits(4, 0) && !cell.fits(3, 1));
    }

    #[test]
    fn an_unknown_limit_and_overage_are_wide() {
        assert!(QuotaCell::default().reserve(1 << 40, Some(5)));
        let cell = QuotaCell::default();
        let limit = Some(10);
        cell.restore(Quota { count: 10, limit, extension: Extension::Credits(5), ..Quota::default() }, NOW);
        assert!(cell.reserve(5, Some(0)) && !cell.reserve(1, Some(0)));
        cell.restore(Quota { count: 10, limit, extension: Extension::Unlimited, ..Quota::default() }, NOW);
        assert!(cell.reserve(1 << 40, Some(5)));
    }

    #[test]
    fn whoever_stretches_is_alone() {
        let cell = holding(98, 100);
        assert!(cell.stretch(5) && !cell.stretch(5) && !cell.reserve(1, Some(0)));
        settle(&cell, 5, 1);
        assert_eq!(cell.load(NOW).count, 99);
        assert!(cell.reserve(1, Some(0)) && !cell.stretch(5));
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
        let spend = |credits, at| cell.settle(Paid { reserved: 0, spent: credits }, UnixMs(at));
        cell.adopt(theirs(7, 900), UnixMs(1), lag);
        assert_eq!(cell.drift(), 0, "what was spent before we came is no drift");
        spend(10, 2);
        cell.adopt(theirs(20, 900), UnixMs(3), lag);
        cell.adopt(theirs(20, 900), UnixMs(4), lag);
        assert_eq!(cell.drift(), 3, "three of them are not ours");
        spend(5, 5);
        cell.adopt(theirs(20, 900), UnixMs(14), lag);
        assert_eq!((cell.drift(), cell.load(UnixMs(14)).count), (3, 25), "it may lag");
        cell.adopt(theirs(24, 900), UnixMs(15), lag);
        assert_eq!((cell.drift(), cell.load(UnixMs(15)).count), (2, 24), "it has settled");
        cell.adopt(theirs(30, 9_000), UnixMs(16), lag);
        assert_eq!(cell.drift(), 0);
    }

    #[test]
    fn what_was_known_before_a_restart_is_not_given_back_at_once() {
        let cell = holding(50, 100);
        let theirs = Quota { count: 30, limit: Some(100), resets_at: Some(UnixMs(100)), ..Quota::default() };
        cell.adopt(theirs, NOW, Duration::from_secs(1));
        assert_eq!(cell.load(NOW).count, 50);
    }

    #[test]
    fn a_period_ends_once_and_what_is_spent_after_it_stays() {
        let cell = holding(9, 10);
        assert!(cell.reserve(1, Some(0)));
        cell.told().say(0);
        assert_eq!(cell.load(UnixMs(100)).count, 0);
        assert_eq!(cell.told().left(), None);
        settle(&cell, 1, 1);
        assert!(cell.reserve(3, Some(0)));
        settle(&cell, 3, 3);
        assert_eq!(cell.load(UnixMs(500)).count, 4);
    }

    #[test]
    fn figures_are_adopted_beside_what_is_reserved() {
        let cell = holding(10, 100);
        assert!(cell.reserve(5, Some(0)));
        let theirs = Quota { count: 40, limit: Some(100), resets_at: Some(UnixMs(100)), ..Quota::default() };
        assert!(!cell.adopt(theirs, NOW, Duration::from_secs(1)));
        assert_eq!((cell.load(NOW).count, cell.reserved()), (40, 5));
        cell.told().say(3);
        assert!(cell.adopt(Quota { limit: Some(200), ..theirs }, NOW, Duration::from_secs(1)));
        assert_eq!(cell.told().left(), None);
    }

    #[test]
    fn what_the_provider_says_is_left_is_spent_by_what_goes() {
        let told = ToldCell::default();
        assert_eq!(told.take(1_000), Taken::Untold);
        told.say(10);
        told.say(12);
        assert_eq!((told.take(7), told.take(7)), (Taken::Some, Taken::TooFew));
        told.settle(Paid { reserved: 7, spent: 4 });
        assert_eq!(told.left(), Some(6));
        told.settle(Paid { reserved: 0, spent: 9 });
        assert_eq!(told.left(), Some(0));
    }
}
