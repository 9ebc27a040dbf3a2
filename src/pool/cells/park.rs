//! A park in one word, so that its reason and its end never belong to different parks.

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::standing::{Park, ParkReason};
use crate::policy::units::UnixMs;

/// The reason in the top byte (0: none), the end in milliseconds below it (enough for two million
/// years).
#[derive(Debug, Default)]
pub(in crate::pool) struct ParkCell(AtomicU64);

const UNTIL_BITS: u32 = 56;
const UNTIL_MASK: u64 = (1 << UNTIL_BITS) - 1;

impl ParkCell {
    pub(in crate::pool) fn load(&self) -> Option<Park> {
        unpack(self.0.load(Ordering::Acquire))
    }

    /// Parks, unless a park with a later end holds.
    pub(in crate::pool) fn join(&self, park: Park) {
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some(pack(unpack(word).map_or(park, |held| held.joined(park))))
        });
    }

    /// Ends the park if it has this reason.
    pub(in crate::pool) fn pardon(&self, reason: ParkReason) {
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
        5 => ParkReason::Short,
        _ => return None,
    };
    Some(Park { reason, until: UnixMs(word & UNTIL_MASK) })
}

pub(super) fn reason_code(reason: ParkReason) -> u8 {
    match reason {
        ParkReason::RateLimited => 1,
        ParkReason::Exhausted => 2,
        ParkReason::Billing => 3,
        ParkReason::Invalid => 4,
        ParkReason::Short => 5,
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
}
