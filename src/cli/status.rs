//! `keychoir status`: prints the keys of a running Keychoir as a table or as JSON, or reports their
//! state in the exit code.

mod watch;
mod why;

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::color::{ColorOption, Palette, Tone};
use super::server::{KeychoirClient, ServerOptions, ServerRequestError};
use super::table::{Alignment, Table, abbreviate, truncate};
use super::{CommandResult, build_runtime, fail, fail_with, print};
use crate::config::Config;
use crate::policy::units::{Grouped, UnixMs};
use crate::telemetry::{describe_unknown_limit, key_name};
use why::ExplainedKey;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    server: ServerOptions,
    /// Print the document of /api/elevenlabs-status. With [redis], `shared` and `replicas` of /readyz are added.
    #[arg(long)]
    json: bool,
    /// Exit with 0 if all keys are active, usage records are written and other replicas can be reached, 2 if no key
    /// can serve or Keychoir does not respond, and 1 otherwise.
    #[arg(long)]
    check: bool,
    /// Explain the state of one key, given by its number, name or short form: the reason, the times, the
    /// evidence, and what the key cannot do.
    #[arg(long, value_name = "KEY", conflicts_with_all = ["json", "check"])]
    why: Option<String>,
    /// Show the state again at every interval, 2s by default, until it is interrupted. With --why, the state
    /// of one key.
    #[arg(
        long,
        value_name = "INTERVAL",
        num_args = 0..=1,
        default_missing_value = "2s",
        value_parser = watch::parse_interval,
        conflicts_with_all = ["json", "check"]
    )]
    watch: Option<Duration>,
    #[command(flatten)]
    color: ColorOption,
}

/// The exit code of `--check` if a key is not active, usage records cannot be written, or Redis does not respond.
const CHECK_DEGRADED: u8 = 1;
/// The exit code of `--check` if no key can serve or Keychoir does not respond.
const CHECK_UNAVAILABLE: u8 = 2;

/// The value in `/readyz` for a provider that cannot be reached.
const UNREACHABLE: &str = "unreachable";
/// The value in `/readyz` of a replica whose Redis server does not respond.
const ALONE: &str = "alone";

/// The fields of the status document that are printed.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct StatusPage {
    total_keys: u64,
    active_keys: u64,
    total_remaining_characters: u64,
    keys: Vec<ReportedKeyStatus>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReportedKeyStatus {
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
    /// The state of the connection to other replicas. `off` without `[redis]`, and empty at an earlier version.
    #[serde(default)]
    shared: String,
    /// The replicas that share the pool.
    #[serde(default)]
    replicas: u64,
}

/// The document `/api/keychoir-keys`, with the fields of `K` for each key. The document lists the keys in the
/// order of the status document.
#[derive(Debug, Deserialize)]
struct KeysDocument<K> {
    keys: Vec<K>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReportedKeyDetails {
    short_key: String,
    name: Option<String>,
    plan: Option<String>,
    workspace: Option<String>,
    /// The state with `paused`, which the status document does not have.
    #[serde(default)]
    state: String,
    drift: i64,
}

/// The documents of a running Keychoir.
struct StatusDocuments {
    /// The status document as it was received.
    text: String,
    page: StatusPage,
    details: KeysDocument<ReportedKeyDetails>,
    readiness: ReportedReadiness,
    explained_keys: Vec<ExplainedKey>,
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Arguments { server, json, check, why, watch, color } = arguments;
    let client = server.into_client()?;
    let palette = color.palette();
    let runtime = build_runtime()?;
    if let Some(interval) = watch {
        let format = |documents: &StatusDocuments| {
            documents.format(why.as_deref(), palette).unwrap_or_else(|message| message)
        };
        return runtime.block_on(watch::run(client.map_err(fail)?, interval, palette, format));
    }
    let error_code = if check { CHECK_UNAVAILABLE } else { 1 };
    let documents = runtime
        .block_on(async { fetch_documents(&client?).await })
        .map_err(|error| fail_with(error_code, error))?;
    if json {
        print(&documents.to_json());
    } else {
        print(&documents.format(why.as_deref(), palette).map_err(fail)?);
    }
    if check { check_status(&documents.page, &documents.readiness) } else { Ok(()) }
}

impl ReportedReadiness {
    /// Whether the server is configured to share its pool with other replicas.
    fn is_shared(&self) -> bool {
        !matches!(&*self.shared, "" | "off")
    }
}

impl StatusDocuments {
    /// Returns the status document, with the state of the replicas at its end if the pool is shared.
    fn to_json(&self) -> String {
        let ReportedReadiness { shared, replicas, .. } = &self.readiness;
        match self.text.trim_end().strip_suffix('}') {
            Some(members) if self.readiness.is_shared() => {
                format!("{members},\"shared\":{},\"replicas\":{replicas}}}", json!(shared))
            }
            Some(_) | None => self.text.clone(),
        }
    }

    /// Formats the state of all keys, or everything about one of them. Returns an error message if that key is
    /// unknown.
    fn format(&self, requested_key: Option<&str>, palette: Palette) -> Result<String, String> {
        let Self { text: _, page, details, readiness, explained_keys } = self;
        match requested_key {
            Some(requested_key) => why::explain(explained_keys, requested_key),
            None => {
                let table = format_page(page, details, readiness, palette);
                Ok(format!("{table}{}", why::format_reasons(explained_keys)))
            }
        }
    }
}

async fn fetch_documents(client: &KeychoirClient) -> Result<StatusDocuments, ServerRequestError> {
    let (text, page) = client.get("/api/elevenlabs-status").await?;
    let (_, readiness) = client.get("/readyz").await?;
    let (keys_text, details) = client.get("/api/keychoir-keys").await?;
    // The explanations are optional, because a different version may have different fields.
    let explained_keys = serde_json::from_str::<KeysDocument<ExplainedKey>>(&keys_text)
        .map(|document| document.keys)
        .unwrap_or_default();
    Ok(StatusDocuments { text, page, details, readiness, explained_keys })
}

/// Fetches the keys of the server that runs with `config`. Returns `None` if that server does not respond or requires
/// a token.
pub(super) async fn fetch_keys(config: &Config) -> Option<Vec<ReportedKeyStatus>> {
    let client = KeychoirClient::from_config(config).ok()?;
    let (_, page) = client.get::<StatusPage>("/api/elevenlabs-status").await.ok()?;
    Some(page.keys)
}

fn check_status(page: &StatusPage, readiness: &ReportedReadiness) -> CommandResult {
    if page.active_keys == 0 || readiness.draining == "yes" {
        return Err(ExitCode::from(CHECK_UNAVAILABLE));
    }
    let is_degraded =
        readiness.store != "ok" || readiness.upstream == UNREACHABLE || readiness.shared == ALONE;
    if page.active_keys < page.total_keys || is_degraded {
        return Err(ExitCode::from(CHECK_DEGRADED));
    }
    Ok(())
}

/// Formats the table and the lines below it. Each line has at most 80 characters.
fn format_page(
    page: &StatusPage,
    details: &KeysDocument<ReportedKeyDetails>,
    readiness: &ReportedReadiness,
    palette: Palette,
) -> String {
    let mut text = format_table(page, details, palette);
    let paused = match details.keys.iter().filter(|key| key.state == PAUSED).count() {
        0 => String::new(),
        count => format!(", {count} paused"),
    };
    text.push_str(&format!(
        "\n\n{} of {} keys active{paused}, {}",
        page.active_keys,
        page.total_keys,
        format_total_remaining(page)
    ));
    text.push_str(&format_discrepancies(details));
    text.push_str(&format_replicas(readiness, palette));
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

/// Formats a line about the replicas that share the pool. Returns an empty text if no replicas are configured.
fn format_replicas(readiness: &ReportedReadiness, palette: Palette) -> String {
    if !readiness.is_shared() {
        return String::new();
    }
    let line = match (&*readiness.shared, readiness.replicas) {
        (ALONE, _) => palette.paint(
            Tone::Warning,
            "Alone: Redis does not respond, and this replica uses its part of the pool.",
        ),
        ("connecting", _) => "This replica is connecting to Redis.".to_owned(),
        (_, 0 | 1) => "No other replica shares the pool.".to_owned(),
        (_, replicas) => format!("{replicas} replicas share the pool."),
    };
    format!("\n{line}")
}

/// Formats the total of remaining characters. Keys with an unknown limit are counted separately.
fn format_total_remaining(page: &StatusPage) -> String {
    let remaining = Grouped(page.total_remaining_characters);
    match page.keys.iter().filter(|key| key.has_unknown_limit()).count() {
        0 => format!("{remaining} characters left"),
        unknown if unknown == page.keys.len() => "characters left unknown".to_owned(),
        1 => format!("{remaining} characters left and 1 key without a known limit"),
        unknown => format!("{remaining} characters left and {unknown} keys without a known limit"),
    }
}

/// Formats a line for each workspace with a billing discrepancy.
fn format_discrepancies(details: &KeysDocument<ReportedKeyDetails>) -> String {
    let mut text = String::new();
    for (index, ReportedKeyDetails { short_key, workspace, drift, .. }) in details.keys.iter().enumerate() {
        let is_same_workspace =
            |earlier: &ReportedKeyDetails| workspace.is_some() && earlier.workspace == *workspace;
        if *drift == 0 || details.keys.iter().take(index).any(is_same_workspace) {
            continue;
        }
        let cause = if *drift > 0 { "spent by others or unpriced" } else { "recorded and never charged" };
        let (key, credits) = (truncate(short_key, 19), abbreviate(drift.unsigned_abs()));
        text.push_str(&format!("\nDrift of {key}: {credits} credits {cause}"));
    }
    text
}

/// Formats the table of keys. If a key has a name, the table shows names, and otherwise numbers and the
/// used percentage.
fn format_table(page: &StatusPage, details: &KeysDocument<ReportedKeyDetails>, palette: Palette) -> String {
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
    let rows =
        page.keys.iter().enumerate().map(|(index, key)| (index, format_cells(key, detail(index), palette)));
    let [key, status, remaining, used, percentage, resets] = titles;
    if (0..page.keys.len()).all(|index| name(index).is_none()) {
        let mut table =
            Table::new([("#", Alignment::Right), key, status, remaining, used, percentage, resets]);
        for (index, [key, status, remaining, used, percentage, resets]) in rows {
            table.add_row([(index + 1).to_string(), key, status, remaining, used, percentage, resets]);
        }
        return table.format();
    }
    let mut table = Table::new([("name", Alignment::Left), key, status, remaining, used, resets]);
    for (index, [key, status, remaining, used, _, resets]) in rows {
        let name = truncate(&key_name(index, name(index)), MAX_NAME_CHARS);
        table.add_row([name, key, status, remaining, used, resets]);
    }
    table.format()
}

/// Maximum number of characters of a name, so that the other columns fit into the line.
const MAX_NAME_CHARS: usize = 11;

impl ReportedKeyStatus {
    /// Returns whether the limit is unknown. If the provider reports no limit, the document contains a limit of zero
    /// that is not exceeded.
    pub(super) fn has_unknown_limit(&self) -> bool {
        self.character_limit == 0 && !self.is_over_limit
    }
}

fn format_cells(
    key: &ReportedKeyStatus,
    details: Option<&ReportedKeyDetails>,
    palette: Palette,
) -> [String; 6] {
    let plan = details.and_then(|details| details.plan.as_deref());
    let status = match details {
        Some(details) if details.state == PAUSED => PAUSED.to_owned(),
        Some(_) | None => format_status(&key.status, key.is_near_limit),
    };
    let (remaining, used, percentage) = if key.has_unknown_limit() {
        let usage = match describe_unknown_limit(plan) {
            "unknown" => format!("{}/?", abbreviate(key.character_count)),
            plan_limit => plan_limit.to_owned(),
        };
        ("unknown".to_owned(), usage, "-".to_owned())
    } else {
        let percent = key.usage_percentage.min(9_999);
        let usage = format!("{}/{}", abbreviate(key.character_count), abbreviate(key.character_limit));
        (abbreviate(key.remaining_characters), usage, format!("{percent}%"))
    };
    let resets = key.next_reset_date.as_deref().and_then(UnixMs::parse).map(UnixMs::month_and_day);
    [
        truncate(&key.short_key, 19),
        palette.paint(status_tone(&status), &status),
        remaining,
        used,
        percentage,
        resets.unwrap_or_else(|| "-".to_owned()),
    ]
}

/// The state of a key that an operator has paused.
pub(super) const PAUSED: &str = "paused";

/// Returns the tone of a formatted status.
fn status_tone(status: &str) -> Tone {
    match status {
        "active" => Tone::Good,
        "near limit" | "rate limited" | PAUSED => Tone::Warning,
        _ => Tone::Bad,
    }
}

/// Formats the status of a key.
pub(super) fn format_status(status: &str, is_near_limit: bool) -> String {
    match status {
        "active" if is_near_limit => "near limit".to_owned(),
        status => truncate(&status.replace('_', " "), 12),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_table_has_at_most_80_columns() {
        let key = |count, limit| ReportedKeyStatus {
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
            shared: ALONE.to_owned(),
            replicas: 1_000,
        };
        let details_of_key = |drift, name: Option<&str>| ReportedKeyDetails {
            short_key: "sk_6c036526...d452b".to_owned(),
            name: name.map(str::to_owned),
            plan: None,
            workspace: None,
            state: PAUSED.to_owned(),
            drift,
        };
        for name in [None, Some("a-name-that-is-longer-than-its-column")] {
            let details = KeysDocument {
                keys: vec![
                    details_of_key(i64::MAX, name),
                    details_of_key(0, None),
                    details_of_key(i64::MIN, None),
                ],
            };
            let text = format_page(&page, &details, &readiness, Palette::default());
            assert_eq!(text.matches("Drift of ").count(), 2, "{text}");
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= 80, "{widest}\n{}", text.lines().next().unwrap());
            assert!(text.contains("Dec 31") && text.contains("are lost.") && text.contains("\nAlone: "));
            assert_eq!(text.contains("a-name-t..."), name.is_some(), "{text}");
        }
    }

    #[test]
    fn an_unknown_limit_is_not_shown_as_zero() {
        let key = |limit: u64, remaining: u64| ReportedKeyStatus {
            short_key: "sk_6c036526...d452b".to_owned(),
            status: "active".to_owned(),
            character_count: 40,
            character_limit: limit,
            remaining_characters: remaining,
            usage_percentage: 0,
            is_over_limit: false,
            is_near_limit: false,
            next_reset_date: None,
        };
        let format_keys = |keys: Vec<ReportedKeyStatus>, plan: Option<&str>| {
            let details_of_key = |key: &ReportedKeyStatus| ReportedKeyDetails {
                short_key: key.short_key.clone(),
                name: None,
                plan: plan.map(str::to_owned),
                workspace: None,
                state: String::new(),
                drift: 0,
            };
            let details = KeysDocument { keys: keys.iter().map(details_of_key).collect() };
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
                shared: "off".into(),
                replicas: 1,
            };
            format_page(&page, &details, &readiness, Palette::default())
        };
        let text = format_keys(vec![key(0, 0)], None);
        assert!(text.contains("unknown        40/?") && text.ends_with("characters left unknown"), "{text}");
        let text = format_keys(vec![key(0, 0), key(100, 60)], Some("payg"));
        assert!(text.contains("unknown  pay as you go"), "{text}");
        assert!(text.ends_with("60 characters left and 1 key without a known limit"), "{text}");
    }

    #[test]
    fn the_number_of_replicas_is_shown_only_if_there_can_be_others() {
        let check = |shared: &str, replicas, expected: &str| {
            let document = json!({
                "store": "ok", "draining": "no", "recordsWaiting": 0, "recordsLost": 0, "shared": shared,
                "replicas": replicas,
            });
            let readiness: ReportedReadiness = serde_json::from_value(document).unwrap();
            let text = format_replicas(&readiness, Palette::default());
            assert_eq!(text.trim_start(), expected, "{shared} {replicas}");
        };
        check("off", 1, "");
        check("", 0, "");
        check("connecting", 1, "This replica is connecting to Redis.");
        check("connected", 1, "No other replica shares the pool.");
        check("connected", 3, "3 replicas share the pool.");
        check("alone", 3, "Alone: Redis does not respond, and this replica uses its part of the pool.");
    }
}
