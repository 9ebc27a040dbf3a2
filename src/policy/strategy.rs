//! Strategies: each selects one of the keys that can serve a request.
//!
//! A strategy is a pure ranking of candidates. Whether a key may serve, has enough credits and capacity
//! is decided before it is ranked.

use super::units::UnixMs;

/// The inputs of a strategy for one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traits {
    /// Credits of its workspace that are neither spent nor reserved; `None` when the limit is unknown.
    pub remaining: Option<u64>,
    /// When the credits are reset.
    pub resets_at: Option<UnixMs>,
    /// Requests in flight in its workspace.
    pub in_flight: u32,
    /// Virtual time of its next turn, which advances with every request that the key serves, by less for
    /// a larger weight. It is never below the time of the last selected turn.
    pub turn: u64,
    /// Its share of the requests, from 1, relative to the weights of other keys.
    pub weight: u32,
}

/// A ranking of keys: a row of [`STRATEGIES`].
#[derive(Debug)]
pub struct Strategy {
    /// The name in the configuration.
    pub name: &'static str,
    /// The rank of a key: the lowest is used, and of equal ranks the first in pool order. [`BEST`] ends
    /// the search.
    pub rank: fn(&Traits) -> u64,
    /// The lowest rank that any key can have while the argument is the turn of the key that was selected
    /// last: a key with this rank ends the search.
    pub least: fn(u64) -> u64,
    /// Whether the rank depends on [`Traits::remaining`] or [`Traits::resets_at`].
    pub counts_credits: bool,
    /// Whether the rank depends on [`Traits::turn`], which must then be maintained.
    pub takes_turns: bool,
    /// Whether one key is used as long as it can serve; a change of this key is then reported.
    pub fills: bool,
}

/// The lowest possible rank.
pub const BEST: u64 = 0;

/// How far a key's turn advances for a request, with weight 1.
pub const TURN: u64 = 1 << 16;

/// All strategies, the default first. A new strategy is a row here, and a word in `config/keychoir.toml`.
pub static STRATEGIES: [Strategy; 5] = [
    // The first key in configured order that can serve, until it is refused or exhausted.
    Strategy { name: "fill-first", rank: |_| BEST, fills: true, ..ANY },
    // Weighted round robin.
    Strategy {
        name: "round-robin",
        rank: |key| key.turn.saturating_add(1),
        least: |turn| turn.saturating_add(1),
        takes_turns: true,
        ..ANY
    },
    // The key with the most credits left; keys with unknown limits come last.
    Strategy {
        name: "most-remaining",
        rank: |key| key.remaining.map_or(u64::MAX, |remaining| u64::MAX - 1 - remaining.min(u64::MAX - 2)),
        counts_credits: true,
        ..ANY
    },
    // The key whose workspace has the fewest requests in flight, relative to its weight. With any
    // weights, an idle key has the lowest rank.
    Strategy {
        name: "least-requests",
        rank: |key| u64::from(key.in_flight) * TURN / u64::from(key.weight.max(1)),
        ..ANY
    },
    // The key whose credits are reset first; keys with unknown dates come last.
    Strategy {
        name: "soonest-reset",
        rank: |key| key.resets_at.map_or(u64::MAX, |at| at.0.max(1)),
        counts_credits: true,
        ..ANY
    },
];

/// The properties of most strategies.
const ANY: Strategy = Strategy {
    name: "",
    rank: |_| BEST,
    least: |_| BEST,
    counts_credits: false,
    takes_turns: false,
    fills: false,
};

impl Strategy {
    /// The default strategy.
    pub const DEFAULT: &'static Self = &STRATEGIES[0];

    /// The strategy with that name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        STRATEGIES.iter().find(|strategy| strategy.name == name)
    }
}

/// The position of the best of `keys`. `None` when there is none.
pub fn best(strategy: &Strategy, keys: impl Iterator<Item = (usize, Traits)>) -> Option<usize> {
    let mut best: Option<(u64, usize)> = None;
    for (position, key) in keys {
        let rank = (strategy.rank)(&key);
        if rank == BEST {
            return Some(position);
        }
        if best.is_none_or(|(lowest, _)| rank < lowest) {
            best = Some((rank, position));
        }
    }
    best.map(|(_, position)| position)
}

#[cfg(test)]
mod tests {
    use proptest::strategy::Strategy as Values;
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    fn keys() -> impl Values<Value = Vec<Traits>> {
        let key = (
            proptest::option::of(0..1_000_u64),
            proptest::option::of(1..1_000_u64),
            0..20_u32,
            0..1_000_u64,
            1..9_u32,
        )
            .prop_map(|(remaining, resets_at, in_flight, turn, weight)| Traits {
                remaining,
                resets_at: resets_at.map(UnixMs),
                in_flight,
                turn,
                weight,
            });
        proptest::collection::vec(key, 1..12)
    }

    fn named(name: &str) -> &'static Strategy {
        Strategy::named(name).unwrap()
    }

    fn selected(strategy: &Strategy, keys: &[Traits]) -> usize {
        best(strategy, keys.iter().copied().enumerate()).unwrap()
    }

    proptest! {
        #[test]
        fn a_key_is_always_selected(keys in keys()) {
            for strategy in &STRATEGIES {
                prop_assert!(selected(strategy, &keys) < keys.len());
            }
        }

        #[test]
        fn fill_first_selects_the_first_key(keys in keys()) {
            prop_assert_eq!(selected(named("fill-first"), &keys), 0);
        }

        #[test]
        fn round_robin_selects_the_earliest_turn(keys in keys()) {
            let at = selected(named("round-robin"), &keys);
            prop_assert!(keys.iter().all(|key| key.turn >= keys[at].turn));
        }

        #[test]
        fn no_rank_is_below_the_least_and_credits_change_it_only_where_declared(key in keys(), turn in 0..1_000_u64) {
            for strategy in &STRATEGIES {
                // A turn is never in the past.
                let key = Traits { turn: key[0].turn.max(turn), ..key[0] };
                prop_assert!((strategy.rank)(&key) >= (strategy.least)(turn));
                let without_credits = Traits { remaining: None, resets_at: None, ..key };
                prop_assert!(strategy.counts_credits || (strategy.rank)(&key) == (strategy.rank)(&without_credits));
            }
        }

        #[test]
        fn most_remaining_selects_the_most_credits(keys in keys()) {
            let at = selected(named("most-remaining"), &keys);
            prop_assert!(keys.iter().all(|key| key.remaining <= keys[at].remaining));
        }

        #[test]
        fn least_requests_selects_the_lowest_load(keys in keys()) {
            let at = selected(named("least-requests"), &keys);
            let load = |key: &Traits| f64::from(key.in_flight) / f64::from(key.weight);
            prop_assert!(keys.iter().all(|key| load(key) + 1e-3 >= load(&keys[at])));
        }

        #[test]
        fn soonest_reset_selects_the_earliest_reset(keys in keys()) {
            let at = selected(named("soonest-reset"), &keys);
            let when = |key: &Traits| key.resets_at.map_or(u64::MAX, |at| at.0);
            prop_assert!(keys.iter().all(|key| when(key) >= when(&keys[at])));
        }
    }

    #[test]
    fn the_first_of_equal_keys_is_selected() {
        for strategy in &STRATEGIES {
            assert_eq!(selected(strategy, &[Traits { weight: 1, ..Traits::default() }; 3]), 0);
        }
    }

    #[test]
    fn the_configuration_describes_every_strategy() {
        let reference = include_str!("../../config/keychoir.toml");
        for strategy in &STRATEGIES {
            let name = strategy.name;
            assert!(reference.contains(name), "config/keychoir.toml does not describe {name}");
        }
    }

    #[test]
    fn an_empty_list_selects_no_key() {
        for strategy in &STRATEGIES {
            assert_eq!(best(strategy, std::iter::empty()), None);
        }
    }
}
