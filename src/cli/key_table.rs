//! Formats the table of keys that `serve` logs at startup. With the prefix of a log line, each line has
//! at most 80 characters.

use super::table::{Alignment, MAX_SHORT_KEY_CHARS, Table, abbreviate, truncate};
use crate::policy::key_state::KeyStatus;
use crate::pool::KeySnapshot;
use crate::telemetry::{describe_unknown_limit, key_name};

/// Maximum number of characters of a name, so that the other columns fit into the line.
const MAX_NAME_CHARS: usize = 16;
/// Maximum number of characters of a plan. `business` is the longest known plan.
const MAX_PLAN_CHARS: usize = 8;

/// Formats the lines of the table. The first line contains the column titles. If a key has a name, the table
/// shows names instead of plans.
pub(super) fn format_lines(keys: &[KeySnapshot]) -> Vec<String> {
    let has_names = keys.iter().any(|snapshot| snapshot.key.name().is_some());
    let titles = [
        ("key", Alignment::Left),
        ("", Alignment::Left),
        ("used/limit", Alignment::Right),
        ("resets", Alignment::Left),
        ("status", Alignment::Left),
    ];
    let [key, short_key, used, resets, status] = titles;
    let table = if has_names {
        let mut table = Table::new(titles);
        keys.iter().for_each(|snapshot| table.add_row(format_cells(snapshot)));
        table.format()
    } else {
        let mut table = Table::new([key, short_key, ("plan", Alignment::Left), used, resets, status]);
        for snapshot in keys {
            let [key, short_key, used, resets, status] = format_cells(snapshot);
            let plan = snapshot
                .key
                .workspace()
                .tier()
                .map_or_else(|| "-".to_owned(), |plan| truncate(&plan, MAX_PLAN_CHARS));
            table.add_row([key, short_key, plan, used, resets, status]);
        }
        table.format()
    };
    table.lines().map(str::to_owned).collect()
}

fn format_cells(snapshot: &KeySnapshot) -> [String; 5] {
    let KeySnapshot { key, quota, state, is_near_limit, .. } = snapshot;
    let usage = match quota.limit {
        Some(limit) => format!("{}/{}", abbreviate(quota.count), abbreviate(limit)),
        None => describe_unknown_limit(key.workspace().tier().as_deref().map(String::as_str)).to_owned(),
    };
    let status = match state.status() {
        KeyStatus::Active if *is_near_limit => "near limit".to_owned(),
        status @ (KeyStatus::Active | KeyStatus::Exhausted | KeyStatus::RateLimited | KeyStatus::Invalid) => {
            status.as_str().replace('_', " ")
        }
    };
    [
        truncate(&key_name(key.position(), key.name()), MAX_NAME_CHARS),
        truncate(key.api_key().short().as_str(), MAX_SHORT_KEY_CHARS),
        usage,
        quota.resets_at.map_or_else(|| "-".to_owned(), |resets_at| resets_at.month_and_day()),
        status,
    ]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::elevenlabs::plan::Capabilities;
    use crate::policy::quota::{Extension, Quota};
    use crate::policy::units::UnixMs;
    use crate::pool::{KeyEntry, Observation, Pool, Settings};
    use crate::secret::ApiKey;

    const NOW: UnixMs = UnixMs(1_795_000_000_000);
    const DECEMBER_12: UnixMs = UnixMs(1_797_033_600_000);
    /// The width of the prefix of an ASCII log line.
    const PREFIX_WIDTH: usize = 4;

    /// A key of the pool with the facts that the table shows.
    #[derive(Clone)]
    struct TestKey {
        name: Option<&'static str>,
        plan: &'static str,
        quota: Quota,
    }

    fn test_key(name: Option<&'static str>, plan: &'static str, quota: Quota) -> TestKey {
        TestKey { name, plan, quota }
    }

    fn format_table(keys: &[TestKey]) -> Vec<String> {
        let entry = |(index, key): (usize, &TestKey)| KeyEntry {
            name: key.name.map(str::to_owned),
            ..ApiKey::new(&format!("sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333{index:05}"))
                .unwrap()
                .into()
        };
        let pool = Arc::new(Pool::new(keys.iter().enumerate().map(entry).collect(), Settings::FOR_TESTS));
        let roster = pool.roster();
        for (key, TestKey { plan, quota, .. }) in roster.keys().iter().zip(keys) {
            let tier = Some((*plan).to_owned());
            let capabilities = Capabilities::default();
            let observation = Observation::Quota { quota: *quota, tier, is_paid: Some(true), capabilities };
            pool.observe(&roster, key, observation, NOW);
        }
        format_lines(&pool.snapshot(NOW))
    }

    fn quota(count: u64, limit: Option<u64>) -> Quota {
        Quota { count, limit, extension: Extension::None, resets_at: limit.map(|_| DECEMBER_12) }
    }

    #[test]
    fn keys_without_names_are_shown_by_number_and_plan() {
        assert_eq!(
            format_table(&[
                test_key(None, "creator", quota(84_766, Some(100_000))),
                test_key(None, "payg", quota(7, None)),
                test_key(None, "creator", quota(0, None)),
            ]),
            [
                "key                         plan         used/limit  resets  status",
                "key 1  sk_6c036526...00000  creator  84,766/100,000  Dec 12  near limit",
                "key 2  sk_6c036526...00001  payg      pay as you go  -       active",
                "key 3  sk_6c036526...00002  creator         unknown  -       active",
            ]
        );
    }

    #[test]
    fn keys_with_names_are_shown_by_name() {
        assert_eq!(
            format_table(&[
                test_key(Some("studio"), "creator", quota(2_110, Some(100_000))),
                test_key(None, "creator", quota(0, None)),
            ]),
            [
                "key                             used/limit  resets  status",
                "studio  sk_6c036526...00000  2,110/100,000  Dec 12  active",
                "key 2   sk_6c036526...00001        unknown  -       active",
            ]
        );
    }

    #[test]
    fn the_widest_log_line_of_a_table_has_at_most_80_columns() {
        let full = quota(999_999_999, Some(999_999_999));
        let name = "a-name-that-is-longer-than-its-column";
        let unnamed = vec![test_key(None, "growing_business", full); 99];
        let named = vec![test_key(Some(name), "growing_business", full); 2];
        for keys in [unnamed, named] {
            for line in format_table(&keys) {
                let width = line.chars().count() + PREFIX_WIDTH;
                assert!(width <= 80, "the line must have at most 80 columns with its prefix: {line}");
            }
        }
    }
}
