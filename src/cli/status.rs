//! `keychoir status`: prints the keys of a running Keychoir as a table or as JSON. `--check` reports the state in the
//! exit code, `--why` explains one key, and `--watch` repeats the output. `keychoir keys list` fetches the states of
//! the keys with the same code.

mod watch;
mod why;

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::color::{ColorOption, Palette, Tone};
use super::server::{KeychoirClient, ServerOptions, ServerRequestError};
use super::table::{Alignment, MAX_SHORT_KEY_CHARS, Table, abbreviate, truncate};
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
    /// Exit with 0 if all keys are active, usage records are written, and ElevenLabs and Redis can be reached, 2 if no
    /// key can serve or Keychoir does not respond, and 1 otherwise.
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

/// The exit code of `--check` if a key is not active, usage records cannot be written, or ElevenLabs or Redis cannot be
/// reached.
const DEGRADED_EXIT_CODE: u8 = 1;
/// The exit code of `--check` if no key is active, or if Keychoir is shutting down or does not respond.
const UNAVAILABLE_EXIT_CODE: u8 = 2;

/// The value in `/readyz` for a provider that cannot be reached.
const UNREACHABLE: &str = "unreachable";
/// The value in `/readyz` of a replica whose Redis server does not respond.
const ALONE: &str = "alone";

/// The fields of the status document that the table shows.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReportedStatus {
    total_keys: u64,
    active_keys: u64,
    total_remaining_characters: u64,
    keys: Vec<ReportedKeyStatus>,
}

/// The fields of a key in the status document that commands use.
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

/// The fields of `/readyz` that are printed or determine the exit code.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReportedReadiness {
    store: String,
    #[serde(default)]
    upstream: String,
    draining: String,
    records_waiting: u64,
    records_lost: u64,
    /// The state of the connection to Redis: `off` without `[redis]`, and empty if an earlier version does not report
    /// it.
    #[serde(default)]
    shared: String,
    /// The number of replicas that share the pool.
    #[serde(default)]
    replicas: u64,
}

/// The document `/api/keychoir-keys`, with the fields of `K` for each key. The document lists the keys in the
/// order of the status document.
#[derive(Debug, Deserialize)]
struct KeysDocument<K> {
    keys: Vec<K>,
}

/// The fields of a key in `/api/keychoir-keys` that the table shows.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReportedKeyDetails {
    short_key: String,
    name: Option<String>,
    plan: Option<String>,
    workspace: Option<String>,
    /// The state of the key, which can be `paused`, unlike the status in the status document.
    #[serde(default)]
    state: String,
    /// The credits that ElevenLabs charged for the workspace and Keychoir did not record.
    drift: i64,
}

/// The documents that a running Keychoir sends about itself.
struct StatusDocuments {
    /// The status document as it was received.
    status_json: String,
    status: ReportedStatus,
    details: KeysDocument<ReportedKeyDetails>,
    readiness: ReportedReadiness,
    explained_keys: Vec<ExplainedKey>,
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Arguments { server, json, check, why, watch, color } = arguments;
    let error_code = if check { UNAVAILABLE_EXIT_CODE } else { 1 };
    let client = server.into_client(error_code)?;
    let palette = color.palette();
    let runtime = build_runtime()?;
    if let Some(interval) = watch {
        let format = |documents: &StatusDocuments| {
            documents.format(why.as_deref(), palette).unwrap_or_else(|message| message)
        };
        return runtime.block_on(watch::run(client, interval, palette, format));
    }
    let documents =
        runtime.block_on(fetch_documents(&client)).map_err(|error| fail_with(error_code, error))?;
    if json {
        print(&documents.to_json());
    } else {
        print(&documents.format(why.as_deref(), palette).map_err(fail)?);
    }
    if check { check_status(&documents.status, &documents.readiness) } else { Ok(()) }
}

impl ReportedReadiness {
    /// Returns whether Keychoir is configured to share its pool with other replicas.
    fn is_shared(&self) -> bool {
        !matches!(&*self.shared, "" | "off")
    }
}

impl StatusDocuments {
    /// Returns the status document, with the state of the replicas at its end if the pool is shared.
    fn to_json(&self) -> String {
        let ReportedReadiness { shared, replicas, .. } = &self.readiness;
        match self.status_json.trim_end().strip_suffix('}') {
            Some(members) if self.readiness.is_shared() => {
                format!("{members},\"shared\":{},\"replicas\":{replicas}}}", json!(shared))
            }
            Some(_) | None => self.status_json.clone(),
        }
    }

    /// Formats the state of all keys, or all details of the key `requested_key`. Returns an error message if that key
    /// is unknown.
    fn format(&self, requested_key: Option<&str>, palette: Palette) -> Result<String, String> {
        let Self { status_json: _, status, details, readiness, explained_keys } = self;
        match requested_key {
            Some(requested_key) => why::explain(explained_keys, requested_key),
            None => {
                let overview = format_overview(status, details, readiness, palette);
                Ok(format!("{overview}{}", why::format_reasons(explained_keys)))
            }
        }
    }
}

async fn fetch_documents(client: &KeychoirClient) -> Result<StatusDocuments, ServerRequestError> {
    let (status_json, status) = client.get("/api/elevenlabs-status").await?;
    let (_, readiness) = client.get("/readyz").await?;
    let (keys_json, details) = client.get("/api/keychoir-keys").await?;
    // The explanations are optional, because a different version may have different fields.
    let explained_keys = serde_json::from_str::<KeysDocument<ExplainedKey>>(&keys_json)
        .map(|document| document.keys)
        .unwrap_or_default();
    Ok(StatusDocuments { status_json, status, details, readiness, explained_keys })
}

/// Fetches the keys of the Keychoir that runs with `config`. Returns `None` if it does not respond or requires a token.
pub(super) async fn fetch_keys(config: &Config) -> Option<Vec<ReportedKeyStatus>> {
    let client = KeychoirClient::from_config(config).ok()?;
    let (_, status) = client.get::<ReportedStatus>("/api/elevenlabs-status").await.ok()?;
    Some(status.keys)
}

/// Returns the exit code of `--check`.
fn check_status(status: &ReportedStatus, readiness: &ReportedReadiness) -> CommandResult {
    if status.active_keys == 0 || readiness.draining == "yes" {
        return Err(ExitCode::from(UNAVAILABLE_EXIT_CODE));
    }
    let is_degraded =
        readiness.store != "ok" || readiness.upstream == UNREACHABLE || readiness.shared == ALONE;
    if status.active_keys < status.total_keys || is_degraded {
        return Err(ExitCode::from(DEGRADED_EXIT_CODE));
    }
    Ok(())
}

/// Formats the table and the lines below it. Each line has at most 80 characters.
fn format_overview(
    status: &ReportedStatus,
    details: &KeysDocument<ReportedKeyDetails>,
    readiness: &ReportedReadiness,
    palette: Palette,
) -> String {
    let mut text = format_table(status, details, palette);
    let paused = match details.keys.iter().filter(|key| key.state == PAUSED).count() {
        0 => String::new(),
        count => format!(", {count} paused"),
    };
    text.push_str(&format!(
        "\n\n{} of {} keys active{paused}, {}",
        status.active_keys,
        status.total_keys,
        format_total_remaining(status)
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
        let write_state = if readiness.store == "ok" { "are written again" } else { "cannot be written" };
        text.push_str(&format!(
            "\nUsage records {write_state}: {} are queued, {} are lost.",
            Grouped(readiness.records_waiting),
            Grouped(readiness.records_lost)
        ));
    }
    text
}

/// Formats a line about the replicas that share the pool. Returns an empty string if the pool is not shared.
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
fn format_total_remaining(status: &ReportedStatus) -> String {
    let remaining = Grouped(status.total_remaining_characters);
    match status.keys.iter().filter(|key| key.has_unknown_limit()).count() {
        0 => format!("{remaining} characters left"),
        unknown if unknown == status.keys.len() => "characters left unknown".to_owned(),
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
        let (key, credits) = (truncate(short_key, MAX_SHORT_KEY_CHARS), abbreviate(drift.unsigned_abs()));
        text.push_str(&format!("\nDrift of {key}: {credits} credits {cause}"));
    }
    text
}

/// Formats the table of keys. If a key has a name, the table shows names, and otherwise numbers and the
/// used percentage.
fn format_table(
    reported: &ReportedStatus,
    details: &KeysDocument<ReportedKeyDetails>,
    palette: Palette,
) -> String {
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
    let rows = reported
        .keys
        .iter()
        .enumerate()
        .map(|(index, key)| (index, format_cells(key, detail(index), palette)));
    let [key, status, remaining, used, percentage, resets] = titles;
    if (0..reported.keys.len()).all(|index| name(index).is_none()) {
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
    let (remaining, usage, percentage) = if key.has_unknown_limit() {
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
        truncate(&key.short_key, MAX_SHORT_KEY_CHARS),
        palette.paint(status_tone(&status), &status),
        remaining,
        usage,
        percentage,
        resets.unwrap_or_else(|| "-".to_owned()),
    ]
}

/// The state of a paused key in the documents, and its status in the tables.
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
        let status = ReportedStatus {
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
            let text = format_overview(&status, &details, &readiness, Palette::default());
            assert_eq!(text.matches("Drift of ").count(), 2, "two keys must have a discrepancy:\n{text}");
            let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(
                widest <= 80,
                "no line must have more than 80 characters, but the widest has {widest}:\n{}",
                text.lines().next().unwrap()
            );
            for part in ["Dec 31", "are lost.", "\nAlone: "] {
                assert!(text.contains(part), "{part:?} must be in:\n{text}");
            }
            assert_eq!(text.contains("a-name-t..."), name.is_some(), "a long name is truncated:\n{text}");
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
            let status = ReportedStatus {
                total_keys: count,
                active_keys: count,
                total_remaining_characters: total,
                keys,
            };
            let readiness = ReportedReadiness {
                store: "ok".into(),
                upstream: "ok".into(),
                draining: "no".into(),
                records_waiting: 0,
                records_lost: 0,
                shared: "off".into(),
                replicas: 1,
            };
            format_overview(&status, &details, &readiness, Palette::default())
        };
        let text = format_keys(vec![key(0, 0)], None);
        assert!(
            text.contains("unknown        40/?") && text.ends_with("characters left unknown"),
            "the only limit and the total must be unknown:\n{text}"
        );
        let text = format_keys(vec![key(0, 0), key(100, 60)], Some("payg"));
        assert!(text.contains("unknown  pay as you go"), "the limit of this plan must be unknown:\n{text}");
        assert!(
            text.ends_with("60 characters left and 1 key without a known limit"),
            "the total must exclude the unknown limit:\n{text}"
        );
    }

    #[test]
    fn the_number_of_replicas_is_shown_only_if_the_pool_is_shared() {
        let check_line = |shared: &str, replicas, expected: &str| {
            let document = json!({
                "store": "ok", "draining": "no", "recordsWaiting": 0, "recordsLost": 0, "shared": shared,
                "replicas": replicas,
            });
            let readiness: ReportedReadiness = serde_json::from_value(document).unwrap();
            let line = format_replicas(&readiness, Palette::default());
            assert_eq!(
                line.trim_start(),
                expected,
                "the line must be right for {replicas} replicas in the state {shared:?}"
            );
        };
        check_line("off", 1, "");
        check_line("", 0, "");
        check_line("connecting", 1, "This replica is connecting to Redis.");
        check_line("connected", 1, "No other replica shares the pool.");
        check_line("connected", 3, "3 replicas share the pool.");
        check_line("alone", 3, "Alone: Redis does not respond, and this replica uses its part of the pool.");
    }
}
