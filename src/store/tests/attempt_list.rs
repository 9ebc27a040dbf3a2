//! Tests of `UsageReader`: it selects single attempts, counts failures by outcome, and sums usage by hour, day and
//! client.

use super::*;
use crate::store::{AttemptQuery, UsageDimension, UsageGroup, UsageReader};

/// 2026-11-29T12:00:00Z.
const NOON: u64 = 1_795_953_600_000;
const HOUR: u64 = 3_600_000;

/// Creates a database with four attempts: two of one request, the first of which was refused, one that runs for
/// two hours, and a failed one on the next day.
fn create_database(directory: &Path) -> UsageReader {
    let (location, path) = location(directory);
    let database = open_database(&location);
    let insert = |at: u64, number: u64, request: &str, status: Option<u16>, verdict: &str, total_ms: u64| {
        let id = crate::proxy::AttemptRecord::new_id(UnixMs(at)).to_string();
        let sql = "INSERT INTO attempts VALUES (?1, ?2, ?3, ?4, 'app', ?5, NULL, 'POST', '/v1/x', 'm', ?6, ?7, 1, 2,
            NULL, NULL, NULL, 3, 'answer', NULL, ?8, NULL, 'eu')";
        let hash = "5".repeat(64);
        database
            .connection
            .execute(
                sql,
                rusqlite::params![
                    id,
                    request,
                    number as i64,
                    at as i64,
                    hash,
                    status,
                    verdict,
                    total_ms as i64
                ],
            )
            .unwrap();
    };
    insert(NOON, 1, "r1", Some(401), "workspace_quota", 10);
    insert(NOON + 10, 2, "r1", Some(200), "served", 20);
    insert(NOON + 20, 1, "r2", Some(101), "served", 2 * HOUR);
    insert(NOON + 24 * HOUR, 1, "r3", None, "connect_failed", 5);
    let hour = "INSERT INTO hours (hour_ms, key_hash, client, route, model, attempts, served, request_bytes,
        response_bytes, characters, credits, unpriced) VALUES (?1, 'k', 'app', '/v1/x', 'm', ?2, 1, 1, 1, 1, ?3, 0)";
    for (at, attempts, credits) in [(NOON, 3, 7), (NOON + HOUR, 1, 50), (NOON + 24 * HOUR, 1, 9)] {
        database.connection.execute(hour, [at as i64, attempts, credits]).unwrap();
    }
    UsageReader::open(&path).unwrap()
}

/// Asserts the request ids and the numbers of the attempts that a query selects.
#[track_caller]
fn assert_selected(query: AttemptQuery, expected: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let attempts = create_database(directory.path()).attempts(&query).unwrap();
    let names: Vec<String> =
        attempts.iter().map(|attempt| format!("{} {}", attempt.request_id, attempt.number)).collect();
    assert_eq!(names, expected, "the query must select these attempts: {query:?}");
}

#[test]
fn attempts_are_selected_and_the_latest_come_last() {
    let all = AttemptQuery { limit: 10, ..AttemptQuery::default() };
    assert_selected(all.clone(), &["r1 1", "r1 2", "r2 1", "r3 1"]);
    assert_selected(AttemptQuery { limit: 2, ..all.clone() }, &["r2 1", "r3 1"]);
    assert_selected(AttemptQuery { request_id: Some("r1".to_owned()), ..all.clone() }, &["r1 1", "r1 2"]);
    assert_selected(AttemptQuery { request_id: Some("r1' OR 1".to_owned()), ..all.clone() }, &[]);
    assert_selected(AttemptQuery { failed_only: true, ..all.clone() }, &["r1 1", "r3 1"]);
    assert_selected(
        AttemptQuery { started_since: UnixMs(NOON + 10), ..all.clone() },
        &["r1 2", "r2 1", "r3 1"],
    );
    assert_selected(AttemptQuery { started_since: UnixMs(NOON + 11), ..all.clone() }, &["r2 1", "r3 1"]);
    assert_selected(AttemptQuery { ended_since: UnixMs(NOON + HOUR), ..all.clone() }, &["r2 1", "r3 1"]);
    assert_selected(AttemptQuery { ended_since: UnixMs(NOON + 20 + 2 * HOUR + 1), ..all }, &["r3 1"]);
}

#[test]
fn usage_is_summed_by_hour_and_day_in_their_order() {
    let directory = tempfile::tempdir().unwrap();
    let reader = create_database(directory.path());
    let sums = |period: std::ops::Range<u64>, dimension| -> Vec<(String, u64)> {
        let rows = reader.usage(UnixMs(period.start)..UnixMs(period.end), dimension).unwrap();
        let name_of = |group| match group {
            UsageGroup::Name(Some(name)) => name,
            group @ (UsageGroup::Name(None) | UsageGroup::Key { .. }) => {
                panic!("the group must have a name: {group:?}")
            }
        };
        rows.into_iter().map(|(group, sums)| (name_of(group), sums.credits)).collect()
    };
    let named_sums = |rows: &[(&str, u64)]| -> Vec<(String, u64)> {
        rows.iter().map(|(name, credits)| ((*name).to_owned(), *credits)).collect()
    };
    let hours = [("2026-11-29T12:00Z", 7), ("2026-11-29T13:00Z", 50), ("2026-11-30T12:00Z", 9)];
    assert_eq!(sums(0..u64::MAX, UsageDimension::Hour), named_sums(&hours));
    assert_eq!(sums(0..u64::MAX, UsageDimension::Day), named_sums(&[("2026-11-29", 57), ("2026-11-30", 9)]));
    // The hour that contains the end is excluded.
    assert_eq!(sums(NOON..NOON + HOUR + 1, UsageDimension::Hour), named_sums(&hours[..1]));
    assert_eq!(sums(NOON + 1..NOON + 2 * HOUR, UsageDimension::Hour), named_sums(&hours[..2]));
    assert_eq!(sums(0..u64::MAX, UsageDimension::Client), named_sums(&[("app", 66)]));
}

#[test]
fn failures_are_counted_by_outcome() {
    let directory = tempfile::tempdir().unwrap();
    let reader = create_database(directory.path());
    let count = |period: std::ops::Range<u64>, dimension| -> Vec<(String, Option<u16>, u64)> {
        let counts = reader.failures(UnixMs(period.start)..UnixMs(period.end), dimension).unwrap();
        counts.into_iter().map(|count| (count.outcome, count.status, count.attempts)).collect()
    };
    let quota_failure = ("workspace_quota".to_owned(), Some(401), 1);
    let connect_failure = ("connect_failed".to_owned(), None, 1);
    assert_eq!(count(0..u64::MAX, UsageDimension::Key), [connect_failure.clone(), quota_failure.clone()]);
    assert_eq!(count(0..u64::MAX, UsageDimension::Day), [quota_failure.clone(), connect_failure]);
    assert_eq!(count(NOON..NOON + HOUR, UsageDimension::Model), [quota_failure]);
}
