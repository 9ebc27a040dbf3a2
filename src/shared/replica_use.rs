//! Merges two records of the credits that a replica has used. A replica continues its count after a restart, and
//! Redis or another replica may have missed a part of it. `grants.lua` merges by the same rule.

/// The credits that a replica has used. A process counts only its own use. If Redis had lost the use of an earlier
/// process when the replica started again, that use is added later, when another replica restores it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ReplicaUse {
    /// The use of all processes.
    pub(super) used: u64,
    /// The number of the last process.
    pub(super) run: u64,
    /// The use of the processes before the last process.
    pub(super) before: u64,
}

impl ReplicaUse {
    /// Merges two records of the use of the same replica, which may be of different ages, as `grants.lua` does.
    pub(super) fn merged(self, other: Self) -> Self {
        let own = |state: Self| state.used.saturating_sub(state.before);
        let (older, newer) = if self.run <= other.run { (self, other) } else { (other, self) };
        let (before, own) = if older.run == newer.run {
            (older.before.max(newer.before), own(older).max(own(newer)))
        } else {
            (newer.before.max(older.used), own(newer))
        };
        Self { used: before.saturating_add(own), run: newer.run, before }
    }

    /// Parses "used run before".
    pub(super) fn parse<'a>(words: &mut impl Iterator<Item = &'a str>) -> Option<Self> {
        let mut number = || words.next()?.parse().ok();
        Some(Self { used: number()?, run: number()?, before: number()? })
    }
}

impl std::fmt::Display for ReplicaUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.used, self.run, self.before)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replica_use(used: u64, run: u64, before: u64) -> ReplicaUse {
        ReplicaUse { used, run, before }
    }

    #[test]
    fn the_use_of_an_earlier_process_is_added_when_it_becomes_known_late() {
        let earlier = replica_use(333, 1, 0);
        assert_eq!(earlier.merged(replica_use(50, 2, 0)), replica_use(383, 2, 333));
        assert_eq!(replica_use(383, 2, 333).merged(earlier), replica_use(383, 2, 333));
        assert_eq!(replica_use(383, 2, 333).merged(replica_use(60, 2, 0)), replica_use(393, 2, 333));
    }

    #[test]
    fn a_text_is_parsed() {
        let replica_use = replica_use(3, 2, 1);
        assert_eq!(ReplicaUse::parse(&mut replica_use.to_string().split(' ')), Some(replica_use));
        assert_eq!(ReplicaUse::parse(&mut "3 2".split(' ')), None);
    }

    proptest! {
        #[test]
        fn records_are_merged_in_any_order(
            charges in proptest::collection::vec(1..50_u64, 1..4),
            parts in proptest::collection::vec((0_usize..4, 0..=50_u64, any::<bool>()), 1..8),
        ) {
            // The statement of each process, which may lack the use of the earlier processes.
            let states = parts.iter().map(|(process, charged, is_lost)| {
                let process = process % charges.len();
                let before = if *is_lost { 0 } else { charges[..process].iter().sum() };
                replica_use(before + charged.min(&charges[process]), process as u64 + 1, before)
            });
            let states: Vec<ReplicaUse> = states.collect();
            let merged = |states: &mut dyn Iterator<Item = &ReplicaUse>| {
                states.fold(ReplicaUse::default(), |sum, state| sum.merged(*state))
            };
            let total = merged(&mut states.iter());
            prop_assert!(total.used <= charges.iter().sum(), "{total:?} of {states:?}");
            prop_assert_eq!(merged(&mut states.iter().chain(&states)).used >= total.used, true);
            for state in &states {
                prop_assert!(total.used >= state.used, "{total:?} of {states:?}");
            }
        }
    }
}
