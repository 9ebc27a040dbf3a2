//! `keychoir usage`: prints the usage in the database by key, client, model or route.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

use super::database::{DatabaseError, DatabaseOptions};
use super::table::{Alignment, Table, cut, short};
use super::{EX_USAGE, failure, print, print_error};
use crate::clock;
use crate::policy::retention::hour_of;
use crate::policy::since::since;
use crate::policy::units::UnixMs;
use crate::store::{By, Sums, UsageOwner};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    database: DatabaseOptions,
    /// From when on: 24h, 7d, 4w, a day as 2026-11-01 (UTC) or a moment; from the begin of its hour.
    #[arg(long, value_name = "TIME", default_value = "7d")]
    since: String,
    /// The dimension to group by.
    #[arg(long, value_enum, default_value_t = GroupBy::Key)]
    by: GroupBy,
    /// Print comma-separated values, a line of names first.
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
    Model,
    Route,
}

impl GroupBy {
    fn by(self) -> By {
        match self {
            Self::Key => By::Key,
            Self::Client => By::Client,
            Self::Model => By::Model,
            Self::Route => By::Route,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Key => "key",
            Self::Client => "client",
            Self::Model => "model",
            Self::Route => "route",
        }
    }
}

/// The usage in a period.
struct Usage {
    since: UnixMs,
    by: &'static str,
    rows: Vec<(UsageOwner, Sums)>,
    total: Sums,
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let Arguments { database, since: text, by, csv, json } = arguments;
    let since = match since(&text, clock::now()) {
        Ok(since) => hour_of(since),
        Err(error) => {
            print_error(&format_args!("keychoir: --since {}: {error}", cut(&text, 40)));
            return ExitCode::from(EX_USAGE);
        }
    };
    let database = match database.open() {
        Ok(database) => database,
        Err(code) => return code,
    };
    let rows = database.and_then(|database| database.usage(since, by.by()).map_err(DatabaseError::from));
    let rows = match rows {
        Ok(rows) => rows,
        Err(error) => return failure(&error),
    };
    let mut total = Sums::default();
    rows.iter().for_each(|(_, sums)| total += *sums);
    let usage = Usage { since, by: by.word(), rows, total };
    if json {
        print(&usage.json());
    } else if csv {
        print(&usage.csv());
    } else {
        print(&usage.table());
    }
    ExitCode::SUCCESS
}

/// The text of an unknown value.
const NONE: &str = "-";

impl Usage {
    fn table(&self) -> String {
        let from = self.since.minute();
        if self.rows.is_empty() {
            return format!("There were no requests since {from}.");
        }
        let mut table = Table::new([
            (self.by, Alignment::Left),
            ("attempts", Alignment::Right),
            ("served", Alignment::Right),
            ("characters", Alignment::Right),
            ("credits", Alignment::Right),
            ("unpriced", Alignment::Right),
        ]);
        let total = (UsageOwner::Name(Some("total".to_owned())), self.total);
        for (owner, sums) in self.rows.iter().chain([&total]) {
            table.row([
                cut(&label(owner), 30),
                short(sums.attempts),
                short(sums.served),
                short(sums.characters),
                short(sums.credits),
                short(sums.unpriced),
            ]);
        }
        format!("Since {from}\n\n{}", table.text())
    }

    fn json(&self) -> Value {
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|(owner, sums)| {
                let mut row = Map::new();
                match owner {
                    UsageOwner::Key { hash, short, name } => {
                        row.insert("key".to_owned(), json!(short));
                        row.insert("keyHash".to_owned(), json!(hash));
                        row.insert("name".to_owned(), json!(name));
                    }
                    UsageOwner::Name(name) => {
                        row.insert(self.by.to_owned(), json!(name));
                    }
                }
                row.extend(sums_json(sums));
                Value::Object(row)
            })
            .collect();
        json!({"since": self.since.rfc3339(), "by": self.by, "rows": rows, "total": sums_json(&self.total)})
    }

    fn csv(&self) -> String {
        let names = if self.by == "key" { "key,key_hash,name" } else { self.by };
        let mut text =
            format!("{names},attempts,served,characters,credits,unpriced,request_bytes,response_bytes");
        for (owner, sums) in &self.rows {
            let names = match owner {
                UsageOwner::Key { hash, short, name } => {
                    let [short, name] = [short, name].map(|text| field(text.as_deref().unwrap_or_default()));
                    format!("{short},{hash},{name}")
                }
                UsageOwner::Name(name) => field(name.as_deref().unwrap_or_default()),
            };
            let Sums { attempts, served, request_bytes, response_bytes, characters, credits, unpriced } =
                sums;
            text.push_str(&format!(
                "\n{names},{attempts},{served},{characters},{credits},{unpriced},{request_bytes},{response_bytes}"
            ));
        }
        text
    }
}

fn label(owner: &UsageOwner) -> String {
    match owner {
        UsageOwner::Key { short: Some(short), name: Some(name), .. } => format!("{short} {name}"),
        UsageOwner::Key { short: Some(short), .. } => short.clone(),
        UsageOwner::Key { hash, short: None, .. } => cut(hash, 19),
        UsageOwner::Name(name) => name.clone().unwrap_or_else(|| NONE.to_owned()),
    }
}

fn sums_json(sums: &Sums) -> Map<String, Value> {
    let Sums { attempts, served, request_bytes, response_bytes, characters, credits, unpriced } = *sums;
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

/// Formats a field of CSV.
fn field(text: &str) -> String {
    if text.contains(['"', ',', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_table_has_80_columns_at_the_most() {
        let max = u64::MAX;
        let sums = Sums {
            attempts: max,
            served: max,
            request_bytes: max,
            response_bytes: max,
            characters: max,
            credits: 999_999_999,
            unpriced: max,
        };
        let key = UsageOwner::Key {
            hash: "0".repeat(64),
            short: Some("sk_6c036526...d452b".to_owned()),
            name: Some("n".repeat(64)),
        };
        let rows = vec![(key, sums), (UsageOwner::Name(Some("/v1".repeat(100))), sums)];
        let usage = Usage { since: UnixMs(0), by: "route", rows, total: sums };
        assert!(usage.table().lines().all(|line| line.chars().count() <= 80), "{}", usage.table());
    }

    #[test]
    fn a_field_with_a_comma_is_quoted() {
        assert_eq!(field("a,\"b\""), "\"a,\"\"b\"\"\"");
        assert_eq!(field("plain"), "plain");
    }
}
