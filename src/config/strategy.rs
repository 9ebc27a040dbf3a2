//! Parses the setting `pool.strategy`, which names one of the load balancing strategies in `policy::strategy`. The
//! error for an unknown name lists the strategies, and suggests a similar name or the new name of an old one.

use std::fmt;
use std::str::FromStr;

use super::old_names;
use super::problem::ValueError;
use crate::policy::strategy::{STRATEGIES, Strategy};

/// The configured strategy, which chooses the key of each request.
#[derive(Clone, Copy, Debug)]
pub struct StrategyChoice(pub &'static Strategy);

impl Default for StrategyChoice {
    fn default() -> Self {
        Self(Strategy::DEFAULT)
    }
}

impl PartialEq for StrategyChoice {
    fn eq(&self, other: &Self) -> bool {
        self.0.name == other.0.name
    }
}

impl fmt::Display for StrategyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.name)
    }
}

impl FromStr for StrategyChoice {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        Strategy::by_name(text).map(Self).ok_or_else(|| {
            let names = STRATEGIES.each_ref().map(|strategy| strategy.name);
            ValueError::unknown_name("strategy", text, &names).suggest(old_names::new_strategy(text))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_strategy(text: &str, expected: &str) {
        let printed_text = match text.parse::<StrategyChoice>() {
            Ok(strategy) => strategy.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn every_strategy_is_parsed() {
        STRATEGIES.iter().for_each(|strategy| check_strategy(strategy.name, strategy.name));
    }

    #[test]
    fn the_error_for_an_unknown_strategy_lists_all_strategies() {
        const NAMES: &str =
            "`fill-first`, `round-robin`, `most-remaining`, `least-requests`, `soonest-reset`";
        check_strategy("best", &format!("! unknown strategy `best`; use one of {NAMES}"));
        check_strategy(
            "Fill_first",
            &format!("! unknown strategy `Fill_first`; use one of {NAMES}; did you mean `fill-first`?"),
        );
    }
}
