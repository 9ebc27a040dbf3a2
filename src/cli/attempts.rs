//! `keychoir attempts`: prints single attempts from the usage database as a table or JSON, in the order of their
//! starts. With `--request`, it prints all details of each attempt. With `--follow`, it also prints new attempts as
//! they are recorded.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::database::{DatabaseError, DatabaseOptions};
use super::signals::Signals;
use super::table::{Alignment, Table, abbreviate, truncate};
use super::{CommandResult, build_runtime, fail, print, print_error};
use crate::clock;
use crate::policy::units::UnixMs;
use crate::store::{AttemptQuery, StoredAttempt, UsageReader};

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    database: DatabaseOptions,
    /// Only the attempts of this request, given by its id from the log or from x-request-id, with all
    /// details.
    #[arg(long, value_name = "ID")]
    request: Option<String>,
    /// Only attempts that were not served.
    #[arg(long)]
    failed: bool,
    /// Maximum number of attempts. The latest attempts are printed.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,
    /// Print new attempts as they are recorded, until an interrupt.
    #[arg(long)]
    follow: bool,
    /// Print JSON. With --follow, print one object per line.
    #[arg(long)]
    json: bool,
}

/// Interval between two reads of the database with `--follow`.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum time between the end of an attempt and its record, while the database can be written.
const COMMIT_DELAY: Duration = Duration::from_secs(30);
/// Most reads include only attempts that started within this time, so that a read takes little time.
const RECENT_ATTEMPT_AGE: Duration = Duration::from_secs(600);
/// Each read whose number is a multiple of this number includes attempts that started within [`MAX_ATTEMPT_AGE`].
const READS_PER_FULL_READ: u32 = 30;
/// Maximum age of the start of an attempt that `--follow` prints. It is an hour more than the default maximum duration
/// of a WebSocket session.
const MAX_ATTEMPT_AGE: Duration = Duration::from_secs(25 * 3_600);
/// Maximum number of attempts that one read of `--follow` prints.
const MAX_NEW_ATTEMPTS: usize = 100_000;

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let Arguments { database, request, failed, limit, follow, json } = arguments;
    let reader = database.open()?;
    let query = AttemptQuery {
        request_id: request,
        failed_only: failed,
        limit: usize::try_from(limit).unwrap_or(usize::MAX),
        ..AttemptQuery::default()
    };
    // Attempts that are committed from now on are new, even if they ended earlier.
    let followed_since = clock::now().minus(COMMIT_DELAY);
    let mut printed_attempts = PrintedAttempts::default();
    if follow {
        let recorded_query =
            AttemptQuery { ended_since: followed_since, limit: MAX_NEW_ATTEMPTS, ..query.clone() };
        printed_attempts.take_new(read_attempts(&reader, &recorded_query)?, followed_since);
    }
    let attempts = read_attempts(&reader, &query)?;
    match (json, follow) {
        (true, false) => {
            print(&json!({"attempts": attempts}));
        }
        (true, true) => attempts.iter().for_each(|attempt| print(&json!(attempt))),
        (false, _) if query.request_id.is_some() => {
            attempts.iter().for_each(|attempt| print(&format_details(attempt)));
        }
        (false, true) => {
            print(&format_titles());
            attempts.iter().for_each(|attempt| print(&format_line(attempt)));
        }
        (false, false) if attempts.is_empty() => {}
        (false, false) => print(&format_table(&attempts)),
    }
    if attempts.is_empty() && !json && !follow {
        print_error(&"No recorded attempts match.");
    }
    if follow {
        printed_attempts.take_new(attempts, followed_since);
        build_runtime()?.block_on(follow_attempts(&reader, query, printed_attempts, followed_since, json))?;
    }
    Ok(())
}

fn read_attempts(
    reader: &UsageReader,
    query: &AttemptQuery,
) -> Result<Vec<StoredAttempt>, std::process::ExitCode> {
    reader.attempts(query).map_err(|error| fail(DatabaseError::from(error)))
}

/// The attempts that were printed, or omitted because of `--limit`, and that a later read may return again.
#[derive(Debug, Default)]
struct PrintedAttempts {
    /// The end of each attempt, by its id.
    ends: HashMap<String, UnixMs>,
}

impl PrintedAttempts {
    /// Returns the attempts that were not printed, and remembers them as printed. Forgets the attempts that ended
    /// before `ended_since`, because no later read returns them.
    fn take_new(&mut self, attempts: Vec<StoredAttempt>, ended_since: UnixMs) -> Vec<StoredAttempt> {
        self.ends.retain(|_, end| *end >= ended_since);
        let is_new = |attempt: &StoredAttempt| {
            let end = attempt.started_at.plus(Duration::from_millis(attempt.total_ms));
            self.ends.insert(attempt.id.clone(), end).is_none()
        };
        attempts.into_iter().filter(is_new).collect()
    }
}

/// Prints new attempts until an interrupt, or until standard output is closed.
async fn follow_attempts(
    reader: &UsageReader,
    query: AttemptQuery,
    mut printed_attempts: PrintedAttempts,
    followed_since: UnixMs,
    json: bool,
) -> CommandResult {
    let mut signals = Signals::new().map_err(fail)?;
    let mut interval = tokio::time::interval(POLL_INTERVAL);
    for read_number in 1_u32.. {
        tokio::select! {
            _ = interval.tick() => {}
            () = signals.wait_for_stop() => break,
        }
        let now = clock::now();
        let max_age = if read_number.is_multiple_of(READS_PER_FULL_READ) {
            MAX_ATTEMPT_AGE
        } else {
            RECENT_ATTEMPT_AGE
        };
        // A long attempt may have ended since the last full read.
        let ended_since = now.minus(COMMIT_DELAY + POLL_INTERVAL * READS_PER_FULL_READ).max(followed_since);
        let new_query = AttemptQuery {
            started_since: now.minus(max_age),
            ended_since,
            limit: MAX_NEW_ATTEMPTS,
            ..query.clone()
        };
        let attempts = printed_attempts.take_new(read_attempts(reader, &new_query)?, ended_since);
        for attempt in &attempts {
            let line = if json { json!(attempt).to_string() } else { format_line(attempt) };
            if writeln!(io::stdout(), "{line}").is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

const COLUMN_TITLES: [&str; 6] = ["started", "key", "status", "outcome", "credits", "route"];
/// The widths of the columns in characters. With two spaces between columns, a line has at most 80 characters.
const COLUMN_WIDTHS: [usize; 6] = [14, 12, 6, 16, 7, 15];

/// Formats an attempt as one cell for each column.
fn format_cells(attempt: &StoredAttempt) -> [String; 6] {
    let [_, key_width, _, outcome_width, _, route_width] = COLUMN_WIDTHS;
    let started_at = attempt.started_at.rfc3339_seconds();
    let started_at = started_at.get(5..19).unwrap_or(&started_at).replace('T', " ");
    let key = match (&attempt.key_name, &attempt.short_key) {
        (Some(name), _) => name.as_str(),
        (None, Some(short_key)) => short_key.rsplit("...").next().unwrap_or(short_key),
        (None, None) => attempt.key_hash.as_str(),
    };
    let status = attempt.status.map_or_else(|| "-".to_owned(), |status| status.to_string());
    let route = attempt.route.strip_prefix("/v1/").unwrap_or(&attempt.route);
    [
        started_at,
        truncate(key, key_width),
        status,
        truncate(&attempt.outcome.replace('_', " "), outcome_width),
        abbreviate(attempt.credits),
        truncate(route, route_width),
    ]
}

fn format_table(attempts: &[StoredAttempt]) -> String {
    let alignment = |title: &str| if title == "credits" { Alignment::Right } else { Alignment::Left };
    let mut table = Table::new(COLUMN_TITLES.map(|title| (title, alignment(title))));
    attempts.iter().for_each(|attempt| table.add_row(format_cells(attempt)));
    table.format()
}

fn format_titles() -> String {
    format_columns(&COLUMN_TITLES.map(str::to_owned))
}

/// Formats one attempt in columns of fixed widths.
fn format_line(attempt: &StoredAttempt) -> String {
    format_columns(&format_cells(attempt))
}

fn format_columns([started_at, key, status, outcome, credits, route]: &[String; 6]) -> String {
    let [start_width, key_width, status_width, outcome_width, credits_width, _] = COLUMN_WIDTHS;
    format!(
        "{started_at:<start_width$}  {key:<key_width$}  {status:<status_width$}  {outcome:<outcome_width$}  \
         {credits:>credits_width$}  {route}"
    )
}

/// Formats all details of an attempt in several lines.
fn format_details(attempt: &StoredAttempt) -> String {
    let status = attempt.status.map_or_else(|| "no response".to_owned(), |status| status.to_string());
    let key = attempt.short_key.as_deref().unwrap_or(&attempt.key_hash);
    let name = attempt.key_name.as_deref().map(|name| format!(" ({name})")).unwrap_or_default();
    let user = attempt.user.as_deref().map(|user| format!(", user {user}")).unwrap_or_default();
    let region = attempt.region.as_deref().map(|region| format!(" in {region}")).unwrap_or_default();
    let model = attempt.model.as_deref().map(|model| format!("  model {model}")).unwrap_or_default();
    let first_byte =
        attempt.first_byte_ms.map(|ms| format!(", first byte after {ms} ms")).unwrap_or_default();
    format!(
        "attempt {}  {}  {}\n  request   {}\n  client    {}{user}\n  key       {key}{name}{region}\n  sent      {} {}{model}, {} bytes\n  \
         received  {status} {}, {} bytes{first_byte}, {} ms in total\n  credits   {} ({})",
        attempt.number,
        attempt.started_at.rfc3339(),
        attempt.id,
        attempt.request_id,
        attempt.client,
        attempt.method,
        attempt.route,
        attempt.request_bytes,
        attempt.outcome,
        attempt.response_bytes,
        attempt.total_ms,
        attempt.credits,
        attempt.credits_from,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(id: &str, started_at: u64, total_ms: u64) -> StoredAttempt {
        StoredAttempt {
            id: id.to_owned(),
            request_id: "r".to_owned(),
            number: 1,
            started_at: UnixMs(started_at),
            client: "local".to_owned(),
            user: None,
            region: Some("global".to_owned()),
            key_hash: "f".repeat(64),
            short_key: Some("sk_6c036526...d452b".to_owned()),
            key_name: None,
            workspace: None,
            method: "POST".to_owned(),
            route: "/v1/text-to-speech/{id}/stream/with-timestamps".to_owned(),
            model: None,
            status: Some(200),
            outcome: "upstream_protocol_error".to_owned(),
            request_bytes: 1,
            response_bytes: u64::MAX,
            characters: None,
            credits: u64::MAX,
            credits_from: "answer".to_owned(),
            first_byte_ms: None,
            total_ms,
        }
    }

    #[test]
    fn lines_titles_and_tables_have_at_most_80_columns() {
        let unnamed = attempt("a", 1_795_955_073_908, 1);
        let line = format_line(&unnamed);
        assert!(
            line.starts_with("11-29 12:24:33  d452b         200     upstream prot..."),
            "a line must have columns of fixed widths: {line}"
        );
        let named = StoredAttempt { key_name: Some("n".repeat(64)), ..unnamed };
        for output in [format_line(&named), format_titles(), format_table(&[named])] {
            assert!(
                output.lines().all(|line| line.chars().count() <= 80),
                "no line must be longer than 80 characters:\n{output}"
            );
        }
    }

    #[test]
    fn an_attempt_is_printed_once_and_also_when_it_started_long_ago() {
        let mut printed_attempts = PrintedAttempts::default();
        let ids = |attempts: Vec<StoredAttempt>| -> Vec<String> {
            attempts.into_iter().map(|attempt| attempt.id).collect()
        };
        let first = vec![attempt("b", 200, 10), attempt("c", 300, 10)];
        assert_eq!(ids(printed_attempts.take_new(first.clone(), UnixMs(0))), ["b", "c"]);
        let later = [vec![attempt("a", 100, 500)], first].concat();
        assert_eq!(ids(printed_attempts.take_new(later, UnixMs(0))), ["a"]);
        assert_eq!(ids(printed_attempts.take_new(Vec::new(), UnixMs(400))), [""; 0]);
        assert_eq!(printed_attempts.ends.keys().collect::<Vec<_>>(), ["a"]);
    }
}
