//! Defines the record of the credits that a replica has used, and merges two such records. A replica continues its
//! count after a restart, and Redis or another replica may lack a part of it. `grants.lua` merges records by the same
//! rule.

/// The credits that a replica has used. Each process of the replica counts only its own use. If Redis has lost the use
/// of an earlier process when the replica starts again, that use is added when another replica restores it.
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
    /// Merges two records of the use of the same replica, which may be of different ages. All amounts only grow.
    pub(super) fn merged(self, other: Self) -> Self {
        let own_use = |record: Self| record.used.saturating_sub(record.before);
        let (older, newer) = if self.run <= other.run { (self, other) } else { (other, self) };
        let (before, own) = if older.run == newer.run {
            (older.before.max(newer.before), own_use(older).max(own_use(newer)))
        } else {
            (newer.before.max(older.used), own_use(newer))
        };
        Self { used: before.saturating_add(own), run: newer.run, before }
    }

    /// Parses `used run before` from the next three words.
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
    fn a_formatted_use_is_parsed() {
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
            // The records of each process, which may lack the use of the earlier processes.
            let records = parts.iter().map(|(process, charged, is_lost)| {
                let process = process % charges.len();
                let before = if *is_lost { 0 } else { charges[..process].iter().sum() };
                replica_use(before + charged.min(&charges[process]), process as u64 + 1, before)
            });
            let records: Vec<ReplicaUse> = records.collect();
            let merge_all = |records: &mut dyn Iterator<Item = &ReplicaUse>| {
                records.fold(ReplicaUse::default(), |sum, record| sum.merged(*record))
            };
            let total = merge_all(&mut records.iter());
            prop_assert!(
                total.used <= charges.iter().sum(),
                "{total:?} must not exceed the charges of {records:?}"
            );
            let repeated = merge_all(&mut records.iter().chain(&records));
            prop_assert!(repeated.used >= total.used, "the use must not fall when {records:?} are merged again");
            for record in &records {
                prop_assert!(total.used >= record.used, "{total:?} must contain the use of {record:?}");
            }
        }
    }
}
