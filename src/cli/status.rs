//! `keychoir status`: what a running Keychoir says of its keys, as a table, as it says it, or as an
//! exit code.

mod why;

use std::process::ExitCode;

use clap::Args;
use serde::Deserialize;

use super::ask::{AskError, Asking, Running};
use super::table::{Side, Table, cut, short};
use super::{complain, failed, print, runtime};
use crate::policy::units::{Grouped, UnixMs};
use why::Explained;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    asking: Asking,
    /// Print the document of /api/elevenlabs-status as it is.
    #[arg(long)]
    json: bool,
    /// Exit with 0 when all is well, 1 when a key is not active or the books cannot be written, 2 when
    /// no key can serve or nothing answers.
    #[arg(long)]
    check: bool,
    /// Say all that is known of one key, by its number, name or short form: its state, why, since when,
    /// until when, on which evidence, and what it cannot do.
    #[arg(long, value_name = "KEY", conflicts_with_all = ["json", "check"])]
    why: Option<String>,
}

const CHECK_DEGRADED: u8 = 1;
const CHECK_UNAVAILABLE: u8 = 2;

/// The status document, as far as it is shown.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    total_keys: u64,
    active_keys: u64,
    total_remaining_characters: u64,
    keys: Vec<Key>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Key {
    short_key: String,
    status: String,
    character_count: u64,
    character_limit: u64,
    remaining_characters: u64,
    usage_percentage: u64,
    is_over_limit: bool,
    is_near_limit: bool,
    next_reset_date: Option<String>,
}

/// `/readyz`, as far as it is shown.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Readiness {
    store: String,
    draining: String,
    records_waiting: u64,
    records_lost: u64,
}

/// `/api/keychoir-keys`, as far as it is shown. Keys are in the same order.
#[derive(Debug, Default, Deserialize)]
struct Details {
    keys: Vec<Detail>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Detail {
    short_key: String,
    workspace: Option<String>,
    drift: i64,
}

/// What was answered.
struct Answers {
    text: String,
    document: Document,
    details: Details,
    readiness: Readiness,
    explained: Vec<Explained>,
}

/// `/api/keychoir-keys`, as far as it explains.
#[derive(Debug, Default, Deserialize)]
struct Explanations {
    keys: Vec<Explained>,
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let Arguments { asking, json, check, why } = arguments;
    let running = match asking.running() {
        Ok(running) => running,
        Err(code) => return code,
    };
    let asked = runtime()
        .map_err(|error| error.to_string())
        .and_then(|runtime| runtime.block_on(ask(running)).map_err(|error| error.to_string()));
    let Answers { text, document, details, readiness, explained } = match asked {
        Ok(asked) => asked,
        Err(error) if check => {
            complain(&format_args!("keychoir: {error}"));
            return ExitCode::from(CHECK_UNAVAILABLE);
        }
        Err(error) => return failed(&error),
    };
    if let Some(wanted) = why {
        return match why::explain(&explained, &wanted) {
            Ok(text) => {
                print(&text);
                ExitCode::SUCCESS
            }
            Err(error) => failed(&error),
        };
    }
    if json {
        print(&text);
    } else {
        print(&format_args!("{}{}", shown(&document, &details, &readiness), why::reasons(&explained)));
    }
    if check { verdict(&document, &readiness) } else { ExitCode::SUCCESS }
}

async fn ask(running: Result<Running, AskError>) -> Result<Answers, AskError> {
    let running = running?;
    let (text, document) = running.ask("/api/elevenlabs-status").await?;
    let (_, readiness) = running.ask("/readyz").await?;
    let (keys, details) = running.ask("/api/keychoir-keys").await?;
    let explained = serde_json::from_str::<Explanations>(&keys).unwrap_or_default().keys;
    Ok(Answers { text, document, details, readiness, explained })
}

fn verdict(document: &Document, readiness: &Readiness) -> ExitCode {
    if document.active_keys == 0 || readiness.draining == "yes" {
        return ExitCode::from(CHECK_UNAVAILABLE);
    }
    if document.active_keys < document.total_keys || readiness.store != "ok" {
        return ExitCode::from(CHECK_DEGRADED);
    }
    ExitCode::SUCCESS
}

/// The table and what is below it; no line is longer than 80 characters.
fn shown(document: &Document, details: &Details, readiness: &Readiness) -> String {
    let mut table = Table::new([
        ("#", Side::Right),
        ("key", Side::Left),
        ("status", Side::Left),
        ("left", Side::Right),
        ("used/limit", Side::Right),
        ("used", Side::Right),
        ("resets", Side::Left),
    ]);
    for (index, key) in document.keys.iter().enumerate() {
        table.row(row(index + 1, key));
    }
    let mut text = table.text();
    text.push_str(&format!(
        "\n\n{} of {} keys active, {} characters left",
        document.active_keys,
        document.total_keys,
        Grouped(document.total_remaining_characters)
    ));
    text.push_str(&drifts(details));
    if readiness.draining == "yes" {
        text.push_str("\nIt is about to end.");
    }
    if readiness.store != "ok" || readiness.records_lost > 0 {
        let state = if readiness.store == "ok" { "are written again" } else { "cannot be written" };
        text.push_str(&format!(
            "\nThe books {state}: {} records wait, {} are lost.",
            Grouped(readiness.records_waiting),
            Grouped(readiness.records_lost)
        ));
    }
    text
}

/// A line for each workspace whose figures have drifted.
fn drifts(details: &Details) -> String {
    let mut text = String::new();
    for (index, Detail { short_key, workspace, drift }) in details.keys.iter().enumerate() {
        let is_told = |earlier: &Detail| workspace.is_some() && earlier.workspace == *workspace;
        if *drift == 0 || details.keys.iter().take(index).any(is_told) {
            continue;
        }
        let cause = if *drift > 0 { "spent by others or unpriced" } else { "booked and never charged" };
        let (key, credits) = (cut(short_key, 19), short(drift.unsigned_abs()));
        text.push_str(&format!("\nDrift of {key}: {credits} credits {cause}"));
    }
    text
}

fn row(number: usize, key: &Key) -> [String; 7] {
    // A limit of nothing that is not reached is one that nobody has told.
    let is_unknown = key.character_limit == 0 && !key.is_over_limit;
    let (left, limit, used) = if is_unknown {
        ("?".to_owned(), "?".to_owned(), "-".to_owned())
    } else {
        let percent = key.usage_percentage.min(9_999);
        (short(key.remaining_characters), short(key.character_limit), format!("{percent}%"))
    };
    let status = match key.status.as_str() {
        "active" if key.is_near_limit => "near limit".to_owned(),
        word => cut(&word.replace('_', " "), 12),
    };
    let resets = key.next_reset_date.as_deref().and_then(UnixMs::parse).map(UnixMs::month_and_day);
    [
        number.to_string(),
        cut(&key.short_key, 19),
        status,
        left,
        format!("{}/{limit}", short(key.character_count)),
        used,
        resets.unwrap_or_else(|| "-".to_owned()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_table_has_80_columns_at_the_most() {
        let key = |count, limit| Key {
            short_key: "sk_6c036526...d452b".to_owned(),
            status: "rate_limited".to_owned(),
            character_count: count,
            character_limit: limit,
            remaining_characters: limit,
            usage_percentage: u64::MAX,
            is_over_limit: true,
            is_near_limit: true,
            next_reset_date: Some("2025-12-31T00:00:00.000Z".to_owned()),
        };
        let keys = [999_999, 999_999_999, u64::MAX].map(|amount| key(amount, amount));
        let document = Document {
            total_keys: 1_003,
            active_keys: 0,
            total_remaining_characters: u64::MAX,
            keys: keys.into_iter().chain((0..1_000).map(|_| key(1, 0))).collect(),
        };
        let readiness = Readiness {
            store: "failing".to_owned(),
            draining: "yes".to_owned(),
            records_waiting: 1_000_000,
            records_lost: u64::from(u32::MAX),
        };
        let detail = |drift| Detail { short_key: "sk_6c036526...d452b".to_owned(), workspace: None, drift };
        let details = Details { keys: vec![detail(i64::MAX), detail(0), detail(i64::MIN)] };
        let text = shown(&document, &details, &readiness);
        assert_eq!(text.matches("Drift of ").count(), 2, "{text}");
        let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= 80, "{widest}\n{}", text.lines().next().unwrap());
        assert!(text.contains("Dec 31") && text.contains("are lost."));
    }
}
