//! `keychoir usage`: prints the recorded usage by key, client, user, region, model, route, hour or day, or the failures
//! among the attempts, as a table, CSV or JSON.

mod failures;

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::database::{DatabaseError, DatabaseOptions};
use super::table::{Alignment, MAX_SHORT_KEY_CHARS, Table, abbreviate, truncate};
use super::{CommandResult, EX_INVALID_ARGUMENTS, fail, fail_with, print};
use crate::clock;
use crate::policy::report_start::parse_report_start;
use crate::policy::retention::start_of_hour;
use crate::policy::units::UnixMs;
use crate::store::{UsageDimension, UsageGroup, UsageSums};
use failures::Failures;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    database: DatabaseOptions,
    /// The start of the period, rounded down to the hour: 24h, 7d, 4w, a day such as 2026-11-01 (UTC), or
    /// a timestamp.
    #[arg(long, value_name = "TIME", default_value = "7d")]
    since: String,
    /// The end of the period in the same notation, rounded down to the hour. That hour is excluded.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Group the usage by this dimension. Hours and days are in UTC.
    #[arg(long, value_enum, default_value_t = GroupBy::Key)]
    by: GroupBy,
    /// Count the attempts that were not served, by outcome and status. Attempts are kept for
    /// storage.attempts_retention.
    #[arg(long)]
    failures: bool,
    /// Print comma-separated values with a header line.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum GroupBy {
    Key,
    Client,
    /// The end users that clients name in x-keychoir-user, by their fingerprints. Attempts that cost nothing are
    /// counted without a user.
    User,
    /// The regions of ElevenLabs.
    Region,
    Model,
    Route,
    Hour,
    Day,
}

impl GroupBy {
    /// Returns the dimension by which the database groups the usage. Its identifier is also its name in the output.
    fn dimension(self) -> UsageDimension {
        match self {
            Self::Key => UsageDimension::Key,
            Self::Client => UsageDimension::Client,
            Self::User => UsageDimension::User,
            Self::Region => UsageDimension::Region,
            Self::Model => UsageDimension::Model,
            Self::Route => UsageDimension::Route,
            Self::Hour => UsageDimension::Hour,
            Self::Day => UsageDimension::Day,
        }
    }
}

/// The usage in a period.
struct Usage {
    since: UnixMs,
    until: Option<UnixMs>,
    dimension_name: &'static str,
    rows: Vec<(UsageGroup, UsageSums)>,
    total: UsageSums,
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Arguments { database, since, until, by, failures, csv, json } = arguments;
    let since = parse_hour("--since", &since)?;
    let until = until.map(|until| parse_hour("--until", &until)).transpose()?;
    if until.is_some_and(|until| until <= since) {
        return Err(fail_with(EX_INVALID_ARGUMENTS, "--until must be at least an hour after --since"));
    }
    let period = since..until.unwrap_or(UnixMs(u64::MAX));
    let dimension = by.dimension();
    let dimension_name = dimension.as_str();
    let reader = database.open()?;
    if failures {
        let failure_counts =
            reader.failures(period, dimension).map_err(|error| fail(DatabaseError::from(error)))?;
        let failures = Failures { since, until, dimension_name, counts: failure_counts };
        if json {
            print(&failures.format_json());
        } else if csv {
            print(&failures.format_csv());
        } else {
            print(&failures.format_table());
        }
        return Ok(());
    }
    let rows = reader.usage(period, dimension).map_err(|error| fail(DatabaseError::from(error)))?;
    let mut total = UsageSums::default();
    rows.iter().for_each(|(_, sums)| total += *sums);
    let usage = Usage { since, until, dimension_name, rows, total };
    if json {
        print(&usage.format_json());
    } else if csv {
        print(&usage.format_csv());
    } else {
        print(&usage.format_table());
    }
    Ok(())
}

/// Parses a time and rounds it down to the hour.
fn parse_hour(option: &str, text: &str) -> Result<UnixMs, ExitCode> {
    let time = parse_report_start(text, clock::now()).map_err(|error| {
        fail_with(EX_INVALID_ARGUMENTS, format_args!("{option} {}: {error}", truncate(text, 40)))
    })?;
    Ok(start_of_hour(time))
}

/// Formats the period for a sentence, in which it follows the word "since".
fn format_period(since: UnixMs, until: Option<UnixMs>) -> String {
    let until = until.map(|until| format!(" until {}", until.date_and_minute())).unwrap_or_default();
    format!("{}{until}", since.date_and_minute())
}

/// The label of a group without a name, such as the attempts with an unknown model.
const UNKNOWN_LABEL: &str = "-";

impl Usage {
    fn format_table(&self) -> String {
        let period = format_period(self.since, self.until);
        if self.rows.is_empty() {
            return format!("No requests since {period}.");
        }
        let mut table = Table::new([
            (self.dimension_name, Alignment::Left),
            ("attempts", Alignment::Right),
            ("served", Alignment::Right),
            ("characters", Alignment::Right),
            ("credits", Alignment::Right),
            ("unpriced", Alignment::Right),
        ]);
        let total_row = (UsageGroup::Name(Some("total".to_owned())), self.total);
        for (group, sums) in self.rows.iter().chain([&total_row]) {
            table.add_row([
                truncate(&format_label(group), 30),
                abbreviate(sums.attempts),
                abbreviate(sums.served),
                abbreviate(sums.characters),
                abbreviate(sums.credits),
                abbreviate(sums.unpriced),
            ]);
        }
        format!("Since {period}\n\n{}", table.format())
    }

    fn format_json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(group, sums)| {
                let mut row = group_json(group, self.dimension_name);
                row.extend(sums_json(sums));
                Value::Object(row)
            })
            .collect();
        json!({
            "since": self.since.rfc3339(),
            "until": self.until.map(UnixMs::rfc3339),
            "by": self.dimension_name,
            "rows": rows,
            "total": sums_json(&self.total),
        })
    }

    fn format_csv(&self) -> String {
        let group_columns = csv_titles(self.dimension_name);
        let mut csv = format!(
            "{group_columns},attempts,served,characters,credits,unpriced,request_bytes,response_bytes"
        );
        for (group, sums) in &self.rows {
            let group_cells = group_csv(group);
            let UsageSums { attempts, served, request_bytes, response_bytes, characters, credits, unpriced } =
                sums;
            csv.push_str(&format!(
                "\n{group_cells},{attempts},{served},{characters},{credits},{unpriced},{request_bytes},{response_bytes}"
            ));
        }
        csv
    }
}

/// Returns the members of a JSON row that name its group.
fn group_json(group: &UsageGroup, by: &str) -> Map<String, Value> {
    let mut row = Map::new();
    match group {
        UsageGroup::Key { hash, short, name } => {
            row.insert("key".to_owned(), json!(short));
            row.insert("keyHash".to_owned(), json!(hash));
            row.insert("name".to_owned(), json!(name));
        }
        UsageGroup::Name(name) => {
            row.insert(by.to_owned(), json!(name));
        }
    }
    row
}

/// Returns the titles of the CSV columns that name a group.
fn csv_titles(by: &str) -> &str {
    if by == "key" { "key,key_hash,name" } else { by }
}

/// Returns the CSV fields that name a group.
fn group_csv(group: &UsageGroup) -> String {
    match group {
        UsageGroup::Key { hash, short, name } => {
            let [short, name] = [short, name].map(|text| quote_csv(text.as_deref().unwrap_or_default()));
            format!("{short},{hash},{name}")
        }
        UsageGroup::Name(name) => quote_csv(name.as_deref().unwrap_or_default()),
    }
}

fn format_label(group: &UsageGroup) -> String {
    match group {
        UsageGroup::Key { short: Some(short), name: Some(name), .. } => format!("{short} {name}"),
        UsageGroup::Key { short: Some(short), .. } => short.clone(),
        UsageGroup::Key { hash, short: None, .. } => truncate(hash, MAX_SHORT_KEY_CHARS),
        UsageGroup::Name(name) => name.clone().unwrap_or_else(|| UNKNOWN_LABEL.to_owned()),
    }
}

fn sums_json(sums: &UsageSums) -> Map<String, Value> {
    let UsageSums { attempts, served, request_bytes, response_bytes, characters, credits, unpriced } = *sums;
    [
        ("attempts", attempts),
        ("served", served),
        ("characters", characters),
        ("credits", credits),
        ("unpriced", unpriced),
        ("requestBytes", request_bytes),
        ("responseBytes", response_bytes),
    ]
    .into_iter()
    .map(|(name, amount)| (name.to_owned(), amount.into()))
    .collect()
}

/// Formats a field of CSV, in quotes if necessary.
fn quote_csv(field: &str) -> String {
    if field.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", field.replace('"', "\"\""))
    } else {
        field.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_table_has_at_most_80_columns() {
        let max = u64::MAX;
        let sums = UsageSums {
            attempts: max,
            served: max,
            request_bytes: max,
            response_bytes: max,
            characters: max,
            credits: 999_999_999,
            unpriced: max,
        };
        let key = UsageGroup::Key {
            hash: "0".repeat(64),
            short: Some("sk_6c036526...d452b".to_owned()),
            name: Some("n".repeat(64)),
        };
        let rows = vec![(key, sums), (UsageGroup::Name(Some("/v1".repeat(100))), sums)];
        let usage =
            Usage { since: UnixMs(0), until: Some(UnixMs(1)), dimension_name: "route", rows, total: sums };
        let table = usage.format_table();
        assert!(
            table.lines().all(|line| line.chars().count() <= 80),
            "no line must be longer than 80 characters:\n{table}"
        );
    }

    #[test]
    fn a_field_with_a_comma_is_quoted() {
        assert_eq!(quote_csv("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!(quote_csv("plain"), "plain");
    }
}
