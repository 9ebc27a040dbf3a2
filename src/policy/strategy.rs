//! Defines the load balancing strategies. A strategy is a pure function that ranks the keys that can serve a request.
//! [`select`](super::select) decides which keys can serve it.

use super::units::UnixMs;

/// The properties of a key by which a strategy ranks it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankingInputs {
    /// Credits of the workspace that are neither spent nor reserved, or `None` if the limit is unknown.
    pub remaining: Option<u64>,
    /// The time at which the credits are reset, or `None` if it is unknown.
    pub resets_at: Option<UnixMs>,
    /// Requests in flight in the workspace.
    pub in_flight: u32,
    /// Virtual time of the key's next turn. Every request that the key serves advances it by [`TURN`] divided
    /// by the weight. The turn is never below the turn that was selected last.
    pub turn: u64,
    /// The share of requests relative to the weights of other keys, at least 1.
    pub weight: u32,
}

/// A ranking of keys: a row of [`STRATEGIES`].
#[derive(Debug)]
pub struct Strategy {
    /// The name in the configuration.
    pub name: &'static str,
    /// Ranks a key. The key with the lowest rank is selected, and among equal ranks the first key in pool order. The
    /// rank [`BEST`] ends the search.
    pub rank: fn(&RankingInputs) -> u64,
    /// Returns the lowest rank that any key can have, given the turn that was selected last. A key with
    /// this rank ends the search.
    pub min_rank: fn(u64) -> u64,
    /// Whether the rank depends on [`RankingInputs::remaining`] or [`RankingInputs::resets_at`].
    pub uses_credits: bool,
    /// Whether the rank depends on [`RankingInputs::turn`], which the pool must then maintain.
    pub uses_turns: bool,
    /// Whether one key serves all requests as long as it can. A later key then only substitutes for an earlier usable
    /// key, and the pool does not report it as the key in use.
    pub stays_on_key: bool,
}

/// The lowest possible rank. A key with this rank ends the search for the best key.
pub const BEST: u64 = 0;

/// The amount by which a request advances the turn of a key with weight 1.
pub const TURN: u64 = 1 << 16;

/// All strategies, the default first. `CONTRIBUTING.md` lists the other places that a new strategy changes.
pub static STRATEGIES: [Strategy; 5] = [
    // Selects the first key in configured order until it is refused or exhausted.
    Strategy { name: "fill-first", rank: |_| BEST, stays_on_key: true, ..DEFAULTS },
    // Selects the keys in turn, in proportion to their weights (weighted round robin).
    Strategy {
        name: "round-robin",
        rank: |key| key.turn.saturating_add(1),
        min_rank: |turn| turn.saturating_add(1),
        uses_turns: true,
        ..DEFAULTS
    },
    // Selects the key with the most remaining credits. Keys with unknown limits come last.
    Strategy {
        name: "most-remaining",
        rank: |key| key.remaining.map_or(u64::MAX, |remaining| u64::MAX - 1 - remaining.min(u64::MAX - 2)),
        uses_credits: true,
        ..DEFAULTS
    },
    // Selects the key whose workspace has the fewest requests in flight relative to its weight. An idle
    // key has the lowest rank regardless of its weight.
    Strategy {
        name: "least-requests",
        rank: |key| u64::from(key.in_flight) * TURN / u64::from(key.weight.max(1)),
        ..DEFAULTS
    },
    // Selects the key whose credits are reset first. Keys with unknown dates come last.
    Strategy {
        name: "soonest-reset",
        rank: |key| key.resets_at.map_or(u64::MAX, |at| at.0.max(1)),
        uses_credits: true,
        ..DEFAULTS
    },
];

/// The properties of most strategies.
const DEFAULTS: Strategy = Strategy {
    name: "",
    rank: |_| BEST,
    min_rank: |_| BEST,
    uses_credits: false,
    uses_turns: false,
    stays_on_key: false,
};

impl Strategy {
    /// The default strategy.
    pub const DEFAULT: &'static Self = &STRATEGIES[0];

    /// Returns the strategy with the configured name `name`.
    #[must_use]
    pub fn by_name(name: &str) -> Option<&'static Self> {
        STRATEGIES.iter().find(|strategy| strategy.name == name)
    }
}

/// Returns the position of the key with the lowest rank, or `None` if `keys` is empty.
pub fn select_best(strategy: &Strategy, keys: impl Iterator<Item = (usize, RankingInputs)>) -> Option<usize> {
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
    use proptest::strategy::Strategy as ValueStrategy;
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    fn candidates() -> impl ValueStrategy<Value = Vec<RankingInputs>> {
        let key = (
            proptest::option::of(0..1_000_u64),
            proptest::option::of(1..1_000_u64),
            0..20_u32,
            0..1_000_u64,
            1..9_u32,
        )
            .prop_map(|(remaining, resets_at, in_flight, turn, weight)| RankingInputs {
                remaining,
                resets_at: resets_at.map(UnixMs),
                in_flight,
                turn,
                weight,
            });
        proptest::collection::vec(key, 1..12)
    }

    fn strategy(name: &str) -> &'static Strategy {
        Strategy::by_name(name).unwrap()
    }

    fn select_position(strategy: &Strategy, keys: &[RankingInputs]) -> usize {
        select_best(strategy, keys.iter().copied().enumerate()).unwrap()
    }

    proptest! {
        #[test]
        fn a_key_is_always_selected(keys in candidates()) {
            for strategy in &STRATEGIES {
                prop_assert!(select_position(strategy, &keys) < keys.len());
            }
        }

        #[test]
        fn fill_first_selects_the_first_key(keys in candidates()) {
            prop_assert_eq!(select_position(strategy("fill-first"), &keys), 0);
        }

        #[test]
        fn round_robin_selects_the_earliest_turn(keys in candidates()) {
            let best = select_position(strategy("round-robin"), &keys);
            prop_assert!(keys.iter().all(|key| key.turn >= keys[best].turn));
        }

        #[test]
        fn the_declared_properties_of_a_rank_hold(keys in candidates(), last_turn in 0..1_000_u64) {
            for strategy in &STRATEGIES {
                // A turn is never below the turn that was selected last.
                let key = RankingInputs { turn: keys[0].turn.max(last_turn), ..keys[0] };
                prop_assert!((strategy.rank)(&key) >= (strategy.min_rank)(last_turn));
                let without_credits = RankingInputs { remaining: None, resets_at: None, ..key };
                prop_assert!(strategy.uses_credits || (strategy.rank)(&key) == (strategy.rank)(&without_credits));
            }
        }

        #[test]
        fn most_remaining_selects_the_most_credits(keys in candidates()) {
            let best = select_position(strategy("most-remaining"), &keys);
            prop_assert!(keys.iter().all(|key| key.remaining <= keys[best].remaining));
        }

        #[test]
        fn least_requests_selects_the_lowest_load(keys in candidates()) {
            let best = select_position(strategy("least-requests"), &keys);
            let load = |key: &RankingInputs| f64::from(key.in_flight) / f64::from(key.weight);
            prop_assert!(keys.iter().all(|key| load(key) + 1e-3 >= load(&keys[best])));
        }

        #[test]
        fn soonest_reset_selects_the_earliest_reset(keys in candidates()) {
            let best = select_position(strategy("soonest-reset"), &keys);
            let reset = |key: &RankingInputs| key.resets_at.map_or(u64::MAX, |at| at.0);
            prop_assert!(keys.iter().all(|key| reset(key) >= reset(&keys[best])));
        }
    }

    #[test]
    fn the_first_of_equal_keys_is_selected() {
        for strategy in &STRATEGIES {
            assert_eq!(
                select_position(strategy, &[RankingInputs { weight: 1, ..RankingInputs::default() }; 3]),
                0
            );
        }
    }

    #[test]
    fn the_configuration_describes_every_strategy() {
        let reference = include_str!("../../config/keychoir.toml");
        for strategy in &STRATEGIES {
            let name = strategy.name;
            assert!(reference.contains(name), "config/keychoir.toml must describe {name}");
        }
    }

    #[test]
    fn no_key_is_selected_from_an_empty_list() {
        for strategy in &STRATEGIES {
            assert_eq!(select_best(strategy, std::iter::empty()), None);
        }
    }
}
