//! `keychoir status`: prints the keys of a running Keychoir as a table or as JSON, or reports their
//! state in the exit code.

mod why;

use std::process::ExitCode;

use clap::Args;
use serde::Deserialize;

use super::server::{RunningServer, ServerOptions, ServerRequestError};
use super::table::{Alignment, Table, cut, short};
use super::{failure, print, print_error, runtime};
use crate::config::Config;
use crate::policy::units::{Grouped, UnixMs};
use crate::telemetry::{key_name, unknown_limit};
use why::ExplainedKey;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    server: ServerOptions,
    /// Print the document of /api/elevenlabs-status as it is.
    #[arg(long)]
    json: bool,
    /// Exit with 0 when all is well, 1 when a key is not active or usage records cannot be written,
    /// 2 when no key can serve or Keychoir does not respond.
    #[arg(long)]
    check: bool,
    /// Explain one key, by its number, name or short form: its state, why, since when, until when,
    /// on which evidence, and what it cannot do.
    #[arg(long, value_name = "KEY", conflicts_with_all = ["json", "check"])]
    why: Option<String>,
}

const CHECK_DEGRADED: u8 = 1;
const CHECK_UNAVAILABLE: u8 = 2;

/// The value in `/readyz` for a provider that is not reachable.
const UNREACHABLE: &str = "unreachable";

/// The fields of the status document that are printed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusPage {
    total_keys: u64,
    active_keys: u64,
    total_remaining_characters: u64,
    keys: Vec<KeyRow>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct KeyRow {
    pub(super) short_key: String,
    pub(super) status: String,
    pub(super) character_count: u64,
    pub(super) character_limit: u64,
    pub(super) remaining_characters: u64,
    usage_percentage: u64,
    is_over_limit: bool,
    pub(super) is_near_limit: bool,
    next_reset_date: Option<String>,
}

/// The fields of `/readyz` that are printed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReportedReadiness {
    store: String,
    #[serde(default)]
    upstream: String,
    draining: String,
    records_waiting: u64,
    records_lost: u64,
}

/// The fields of `/api/keychoir-keys` that are printed. Both documents list the keys in the same
/// order.
#[derive(Debug, Default, Deserialize)]
struct Details {
    keys: Vec<Detail>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Detail {
    short_key: String,
    name: Option<String>,
    plan: Option<String>,
    workspace: Option<String>,
    drift: i64,
}

/// The documents of a running Keychoir.
struct StatusPages {
    text: String,
    page: StatusPage,
    details: Details,
    readiness: ReportedReadiness,
    explained: Vec<ExplainedKey>,
}

/// The explanations of key states in `/api/keychoir-keys`.
#[derive(Debug, Default, Deserialize)]
struct Explanations {
    keys: Vec<ExplainedKey>,
}

pub(super) fn run(arguments: Arguments) -> ExitCode {
    let Arguments { server, json, check, why } = arguments;
    let server = match server.client() {
        Ok(server) => server,
        Err(code) => return code,
    };
    let fetched = runtime()
        .map_err(|error| error.to_string())
        .and_then(|runtime| runtime.block_on(fetch(server)).map_err(|error| error.to_string()));
    let StatusPages { text, page, details, readiness, explained } = match fetched {
        Ok(fetched) => fetched,
        Err(error) if check => {
            print_error(&format_args!("keychoir: {error}"));
            return ExitCode::from(CHECK_UNAVAILABLE);
        }
        Err(error) => return failure(&error),
    };
    if let Some(requested_key) = why {
        return match why::explain(&explained, &requested_key) {
            Ok(text) => {
                print(&text);
                ExitCode::SUCCESS
            }
            Err(error) => failure(&error),
        };
    }
    if json {
        print(&text);
    } else {
        print(&format_args!("{}{}", rendered(&page, &details, &readiness), why::reasons(&explained)));
    }
    if check { verdict(&page, &readiness) } else { ExitCode::SUCCESS }
}

async fn fetch(server: Result<RunningServer, ServerRequestError>) -> Result<StatusPages, ServerRequestError> {
    let server = server?;
    let (text, page) = server.get("/api/elevenlabs-status").await?;
    let (_, readiness) = server.get("/readyz").await?;
    let (keys, details) = server.get("/api/keychoir-keys").await?;
    let explained = serde_json::from_str::<Explanations>(&keys).unwrap_or_default().keys;
    Ok(StatusPages { text, page, details, readiness, explained })
}

/// The keys of the Keychoir that runs with this configuration; `None` if it does not respond or
/// requires a token.
pub(super) async fn keys_of_running(config: &Config) -> Option<Vec<KeyRow>> {
    let server = RunningServer::of(config).ok()?;
    let (_, page) = server.get::<StatusPage>("/api/elevenlabs-status").await.ok()?;
    Some(page.keys)
}

fn verdict(page: &StatusPage, readiness: &ReportedReadiness) -> ExitCode {
    if page.active_keys == 0 || readiness.draining == "yes" {
        return ExitCode::from(CHECK_UNAVAILABLE);
    }
    if page.active_keys < page.total_keys || readiness.store != "ok" || readiness.upstream == UNREACHABLE {
        return ExitCode::from(CHECK_DEGRADED);
    }
    ExitCode::SUCCESS
}

/// Formats the table and the lines below it. Each line has at most 80 characters.
fn rendered(page: &StatusPage, details: &Details, readiness: &ReportedReadiness) -> String {
    let mut text = table(page, details);
    text.push_str(&format!(
        "\n\n{} of {} keys active, {}",
        page.active_keys,
        page.total_keys,
        remaining_in_all(page)
    ));
    text.push_str(&drift_lines(details));
    if readiness.upstream == UNREACHABLE {
        text.push_str("\nElevenLabs cannot be reached: connections to it fail.");
    }
    if readiness.draining == "yes" {
        text.push_str("\nKeychoir is shutting down.");
    }
    if readiness.store != "ok" || readiness.records_lost > 0 {
        let state = if readiness.store == "ok" { "are written again" } else { "cannot be written" };
        text.push_str(&format!(
            "\nUsage records {state}: {} are queued, {} are lost.",
            Grouped(readiness.records_waiting),
            Grouped(readiness.records_lost)
        ));
    }
    text
}

/// Formats the remaining characters of all keys. Keys without a known limit are counted separately.
fn remaining_in_all(page: &StatusPage) -> String {
    let remaining = Grouped(page.total_remaining_characters);
    match page.keys.iter().filter(|key| key.is_unknown()).count() {
        0 => format!("{remaining} characters left"),
        unknown if unknown == page.keys.len() => "characters left unknown".to_owned(),
        1 => format!("{remaining} characters left and 1 key without a known limit"),
        unknown => format!("{remaining} characters left and {unknown} keys without a known limit"),
    }
}

/// Formats a line for each workspace with a billing discrepancy.
fn drift_lines(details: &Details) -> String {
    let mut text = String::new();
    for (index, Detail { short_key, workspace, drift, .. }) in details.keys.iter().enumerate() {
        let is_repeated = |earlier: &Detail| workspace.is_some() && earlier.workspace == *workspace;
        if *drift == 0 || details.keys.iter().take(index).any(is_repeated) {
            continue;
        }
        let cause = if *drift > 0 { "spent by others or unpriced" } else { "recorded and never charged" };
        let (key, credits) = (cut(short_key, 19), short(drift.unsigned_abs()));
        text.push_str(&format!("\nDrift of {key}: {credits} credits {cause}"));
    }
    text
}

/// Formats the table of keys. If a key has a name, the table shows names; otherwise it shows
/// numbers and used shares.
fn table(page: &StatusPage, details: &Details) -> String {
    let titles = [
        ("key", Alignment::Left),
        ("status", Alignment::Left),
        ("left", Alignment::Right),
        ("used/limit", Alignment::Right),
        ("used", Alignment::Right),
        ("resets", Alignment::Left),
    ];
    let detail = |index: usize| details.keys.get(index);
    let name = |index: usize| detail(index).and_then(|detail| detail.name.as_deref());
    let rows = page.keys.iter().enumerate().map(|(index, key)| {
        let plan = detail(index).and_then(|detail| detail.plan.as_deref());
        (index, row(key, plan))
    });
    let [key, status, remaining, used, share, resets] = titles;
    if (0..page.keys.len()).all(|index| name(index).is_none()) {
        let mut table = Table::new([("#", Alignment::Right), key, status, remaining, used, share, resets]);
        for (index, [key, status, remaining, used, share, resets]) in rows {
            table.row([(index + 1).to_string(), key, status, remaining, used, share, resets]);
        }
        return table.text();
    }
    let mut table = Table::new([("name", Alignment::Left), key, status, remaining, used, resets]);
    for (index, [key, status, remaining, used, _, resets]) in rows {
        let name = cut(&key_name(index, name(index)), MAX_NAME_CHARS);
        table.row([name, key, status, remaining, used, resets]);
    }
    table.text()
}

/// Maximum characters of a name. The other columns then fit into the line.
const MAX_NAME_CHARS: usize = 11;

impl KeyRow {
    /// Whether the limit is unknown: the provider reported none, so it is zero and not reached.
    pub(super) fn is_unknown(&self) -> bool {
        self.character_limit == 0 && !self.is_over_limit
    }
}

fn row(key: &KeyRow, plan: Option<&str>) -> [String; 6] {
    let (remaining, used, share) = if key.is_unknown() {
        let used = match unknown_limit(plan) {
            "unknown" => format!("{}/?", short(key.character_count)),
            why => why.to_owned(),
        };
        ("unknown".to_owned(), used, "-".to_owned())
    } else {
        let percent = key.usage_percentage.min(9_999);
        let used = format!("{}/{}", short(key.character_count), short(key.character_limit));
        (short(key.remaining_characters), used, format!("{percent}%"))
    };
    let resets = key.next_reset_date.as_deref().and_then(UnixMs::parse).map(UnixMs::month_and_day);
    [
        cut(&key.short_key, 19),
        status_words(&key.status, key.is_near_limit),
        remaining,
        used,
        share,
        resets.unwrap_or_else(|| "-".to_owned()),
    ]
}

/// The status of a key as text.
pub(super) fn status_words(status: &str, is_near_limit: bool) -> String {
    match status {
        "active" if is_near_limit => "near limit".to_owned(),
        word => cut(&word.replace('_', " "), 12),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_table_has_80_columns_at_the_most() {
        let key = |count, limit| KeyRow {
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
        let page = StatusPage {
            total_keys: 1_003,
            active_keys: 0,
            total_remaining_characters: u64::MAX,
            keys: keys.into_iter().chain((0..1_000).map(|_| key(1, 0))).collect(),
        };
        let readiness = ReportedReadiness {
            store: "failing".to_owned(),
            upstream: UNREACHABLE.to_owned(),
            draining: "yes".to_owned(),
            records_waiting: 1_000_000,
            records_lost: u64::from(u32::MAX),
        };
        let detail = |drift, name: Option<&str>| Detail {
            short_key: "sk_6c036526...d452b".to_owned(),
            name: name.map(str::to_owned),
            plan: None,
            workspace: None,
            drift,
        };
        for name in [None, Some("a-name-that-is-longer-than-its-column")] {
            let details =
                Details { keys: vec![detail(i64::MAX, name), detail(0, None), detail(i64::MIN, None)] };
            let text = rendered(&page, &details, &readiness);
            assert_eq!(text.matches("Drift of ").count(), 2, "{text}");
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= 80, "{widest}\n{}", text.lines().next().unwrap());
            assert!(text.contains("Dec 31") && text.contains("are lost."));
            assert_eq!(text.contains("a-name-t..."), name.is_some(), "{text}");
        }
    }

    #[test]
    fn an_unknown_limit_is_not_shown_as_zero() {
        let key = |limit: u64, left: u64| KeyRow {
            short_key: "sk_6c036526...d452b".to_owned(),
            status: "active".to_owned(),
            character_count: 40,
            character_limit: limit,
            remaining_characters: left,
            usage_percentage: 0,
            is_over_limit: false,
            is_near_limit: false,
            next_reset_date: None,
        };
        let rendered = |keys: Vec<KeyRow>, plan: Option<&str>| {
            let detail = |key: &KeyRow| Detail {
                short_key: key.short_key.clone(),
                name: None,
                plan: plan.map(str::to_owned),
                workspace: None,
                drift: 0,
            };
            let details = Details { keys: keys.iter().map(detail).collect() };
            let total = keys.iter().map(|key| key.remaining_characters).sum();
            let count = keys.len() as u64;
            let page =
                StatusPage { total_keys: count, active_keys: count, total_remaining_characters: total, keys };
            let readiness = ReportedReadiness {
                store: "ok".into(),
                upstream: "ok".into(),
                draining: "no".into(),
                records_waiting: 0,
                records_lost: 0,
            };
            super::rendered(&page, &details, &readiness)
        };
        let text = rendered(vec![key(0, 0)], None);
        assert!(text.contains("unknown        40/?") && text.ends_with("characters left unknown"), "{text}");
        let text = rendered(vec![key(0, 0), key(100, 60)], Some("payg"));
        assert!(text.contains("unknown  pay as you go"), "{text}");
        assert!(text.ends_with("60 characters left and 1 key without a known limit"), "{text}");
    }
}
