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

    /// Takes the place of what was there.
    pub(in crate::pool) fn store(&self, park: Option<Park>) {
        self.0.store(park.map_or(0, pack), Ordering::Release);
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
        5 => ParkReason::WrongHost,
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
        ParkReason::WrongHost => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_park_survives_its_packing() {
        for reason in [
            ParkReason::RateLimited,
            ParkReason::Exhausted,
            ParkReason::Billing,
            ParkReason::Invalid,
            ParkReason::WrongHost,
        ] {
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
    fn a_park_takes_the_place_of_another() {
        let cell = ParkCell::default();
        let park = |reason, until| Some(Park { reason, until: UnixMs(until) });
        cell.store(park(ParkReason::Exhausted, 100));
        cell.store(park(ParkReason::RateLimited, 50));
        assert_eq!(cell.load(), park(ParkReason::RateLimited, 50));
        cell.store(None);
        assert_eq!(cell.load(), None);
    }
}
