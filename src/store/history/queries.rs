//! Reads attempts and sums for the admin API and the dashboard. A filter or parameter limits the number of rows of each
//! query, except for the queries that return one row per client or per key.

use std::collections::HashMap;

use rusqlite::{Connection, ToSql, params};
use uuid::Uuid;

use super::is_interrupted;
use crate::policy::retention::start_of_hour;
use crate::policy::units::UnixMs;
use crate::store::columns::{integer, timestamp, unsigned};
use crate::store::days::{self, PeriodParts};
use crate::store::stored_attempt::{StoredAttempt, first_id, read_attempt, select_attempts};
use crate::store::usage_sums::{UsageDimension, UsageSums, read_sums, sum_columns, sum_of};

/// The conditions for the attempts on a page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttemptFilter {
    /// Maximum number of attempts on a page.
    pub limit: usize,
    /// The id below which the ids of the attempts must be, or `None` for the first page.
    pub before: Option<String>,
    /// The id of the request that the attempts must belong to, or `None` for all requests.
    pub request_id: Option<String>,
    /// Whether attempts with the outcome `served` are excluded.
    pub failed_only: bool,
}

/// A page of attempts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptPage {
    /// The attempts that match the filter, the latest first.
    pub attempts: Vec<StoredAttempt>,
    /// The id before which the next page starts, or `None` after the last attempt. A page that ended at the time limit
    /// may have few attempts, or none.
    pub next: Option<String>,
}

/// Maximum time from the time in a request's id to the start of its last attempt. A session may last for hours before
/// it moves to another key.
const REQUEST_DURATION_MS: u64 = 24 * 3_600 * 1_000;
/// Maximum time by which the first attempt of a request may start before the time in the request's id. A client may
/// choose the id, and its clock may be ahead.
const CLOCK_TOLERANCE_MS: u64 = 600_000;

/// Reads a page of attempts. When the time limit of the read is reached, the page ends early. If no attempt was read
/// before, the read fails.
pub(super) fn attempts(
    connection: &Connection,
    filter: &AttemptFilter,
) -> Result<AttemptPage, rusqlite::Error> {
    let (first, end) = id_range(filter.request_id.as_deref());
    let end = filter.before.clone().map_or(end.clone(), |before| before.min(end));
    let select = select_attempts(true);
    let sql = format!("{select} WHERE attempts.id >= ?1 AND attempts.id < ?2 ORDER BY attempts.id DESC");
    let mut statement = connection.prepare_cached(&sql)?;
    let mut rows = statement.query(params![first, end])?;
    let mut attempts = Vec::new();
    let mut last_id = None;
    loop {
        let attempt = match rows.next() {
            Ok(Some(row)) => read_attempt(row)?,
            Ok(None) => return Ok(AttemptPage { attempts, next: None }),
            Err(error) if is_interrupted(&error) && last_id.is_some() => {
                return Ok(AttemptPage { attempts, next: last_id });
            }
            Err(error) => return Err(error),
        };
        if attempts.len() == filter.limit {
            return Ok(AttemptPage { attempts, next: last_id });
        }
        last_id = Some(attempt.id.clone());
        let is_of_request = filter.request_id.as_ref().is_none_or(|id| *id == attempt.request_id);
        let is_served = attempt.outcome == "served";
        if is_of_request && !(filter.failed_only && is_served) {
            attempts.push(attempt);
        }
    }
}

/// Returns the range of the ids of attempts that may belong to a request. A request id that is a UUID of version 7,
/// such as those of Keychoir, contains the time. The attempts of any other request id may have any id.
fn id_range(request_id: Option<&str>) -> (String, String) {
    let bounds = request_id.and_then(|id| {
        let id = Uuid::parse_str(id).ok().filter(|id| id.get_version_num() == 7)?;
        let (seconds, nanoseconds) = id.get_timestamp()?.to_unix();
        let at_ms = seconds.saturating_mul(1_000).saturating_add(u64::from(nanoseconds) / 1_000_000);
        let first = UnixMs(at_ms.saturating_sub(CLOCK_TOLERANCE_MS));
        Some((first, UnixMs(at_ms.saturating_add(REQUEST_DURATION_MS))))
    });
    match bounds {
        Some((first, end)) => (first_id(first), first_id(end)),
        // Ids are hexadecimal digits, which come before every letter from `g`.
        None => (String::new(), "g".to_owned()),
    }
}

/// The period, groups and client of the sums to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageFilter {
    /// The start of the period. The hour that contains it is included.
    pub since: UnixMs,
    /// The end of the period. The hour that contains it is included, unless it starts at this time.
    pub until: UnixMs,
    /// The property of attempts by which the sums are grouped.
    pub dimension: UsageDimension,
    /// The name of the client whose attempts are summed, or `None` for all clients.
    pub client: Option<String>,
    /// Maximum number of rows.
    pub limit: usize,
}

/// The sums of the attempts of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    /// The start of the day or hour, the fingerprint of the key or user, or the client, region, model or route. It is
    /// empty for attempts that have none.
    pub group: String,
    /// The short form of the key, or `None` if the sums are not by key or the key is not stored.
    pub short_key: Option<String>,
    /// The configured name of the key, or `None` as for `short_key` or if the key has no name.
    pub key_name: Option<String>,
    /// The sums of the group.
    pub sums: UsageSums,
}

/// Reads the sums of each group. Groups that are times are sorted from the latest, and other groups by descending
/// credits.
pub(in crate::store) fn usage(
    connection: &Connection,
    filter: &UsageFilter,
) -> Result<Vec<UsageRow>, rusqlite::Error> {
    let sums = sum_columns();
    // One transaction reads the days and the hours, so that no commit between two queries changes the sums.
    let transaction = connection.unchecked_transaction()?;
    let since = start_of_hour(filter.since);
    let group_of = |table: &str, time: &str, start: &str, end: &str| {
        let group = filter.dimension.expression(time);
        format!(
            "SELECT {group} AS group_name, {sums} FROM {table}
             WHERE {time} >= {start} AND {time} < {end} AND (?3 IS NULL OR client = ?3) GROUP BY 1"
        )
    };
    let parts = PeriodParts::new(since, filter.until, days::next_hour(&transaction)?);
    let groups = if filter.dimension.has_days() {
        let hours = [("?1", "?5"), ("?6", "?2")].map(|(start, end)| group_of("hours", "hour_ms", start, end));
        let days = group_of("days", "day_ms", "?5", "?6");
        let sums_of_parts = [&*hours[0], &days, &hours[1]].join(" UNION ALL ");
        format!("SELECT group_name, {sums} FROM ({sums_of_parts}) GROUP BY 1")
    } else {
        let table = smaller_table(&transaction, filter.dimension, filter.until)?;
        group_of(table, "hour_ms", "?1", "?2")
    };
    // Column 7 contains the credits, column 2 the attempts, and column 1 the group.
    let order =
        if filter.dimension.is_time() { "CAST(group_name AS INTEGER) DESC" } else { "7 DESC, 2 DESC, 1" };
    let sql = format!(
        "SELECT sums.*, keys.short_key, keys.name
         FROM ({groups}) AS sums
         LEFT JOIN keys ON keys.key_hash = sums.group_name
         ORDER BY {order} LIMIT ?4"
    );
    let mut statement = transaction.prepare_cached(&sql)?;
    let parameters: [&dyn ToSql; 6] = [
        &timestamp(since),
        &timestamp(filter.until),
        &filter.client,
        &integer(filter.limit as u64),
        &timestamp(parts.first_day),
        &timestamp(parts.days_end),
    ];
    let parameters = &parameters[..statement.parameter_count()];
    let rows = statement.query_map(parameters, |row| {
        let group: String = row.get(0)?;
        Ok(UsageRow {
            group: match filter.dimension.period_start(&group) {
                Some(start) => start.rfc3339_seconds(),
                None => group,
            },
            short_key: row.get(8)?,
            key_name: row.get(9)?,
            sums: read_sums(row)?,
        })
    })?;
    rows.collect()
}

/// Returns the table with the sums of a dimension. If both tables contain the dimension, this is the table with fewer
/// rows in the last complete hour before `until`: with many keys, `hours` may have a hundred times as many rows as
/// `user_hours`, and with many users the reverse.
fn smaller_table(
    connection: &Connection,
    dimension: UsageDimension,
    until: UnixMs,
) -> Result<&'static str, rusqlite::Error> {
    match dimension {
        UsageDimension::Day | UsageDimension::Hour | UsageDimension::Client => {}
        UsageDimension::Key
        | UsageDimension::User
        | UsageDimension::Region
        | UsageDimension::Model
        | UsageDimension::Route => return Ok(dimension.table()),
    }
    // Only `hours` is complete in an in-memory database, which deletes the oldest sums of users.
    if connection.path().is_none_or(str::is_empty) {
        return Ok("hours");
    }
    let row_count = |table: &str| -> Result<u64, rusqlite::Error> {
        let sql = format!(
            "SELECT count(*) FROM {table} WHERE hour_ms = (SELECT max(hour_ms) FROM {table} WHERE hour_ms < ?1)"
        );
        let mut statement = connection.prepare_cached(&sql)?;
        statement.query_row([timestamp(start_of_hour(until))], |row| row.get(0).map(unsigned))
    };
    Ok(if row_count("user_hours")? < row_count("hours")? { "user_hours" } else { "hours" })
}

/// The attempts with a key that started in an hour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HourOfKey {
    /// The start of the hour.
    pub hour: UnixMs,
    /// The fingerprint of the key, or `own` for keys of clients.
    pub key_hash: String,
    /// The short form of the key, or `None` for keys of clients and keys that are not stored.
    pub short_key: Option<String>,
    /// The configured name of the key, or `None` as for `short_key` or if the key has no name.
    pub key_name: Option<String>,
    /// Credits charged, including estimates.
    pub credits: u64,
    /// All attempts, with and without a response.
    pub attempts: u64,
    /// Attempts with a response status below 400.
    pub served: u64,
}

/// Reads the sums by hour and key, see [`History::credits_by_hour`](super::History::credits_by_hour).
///
/// The groups are in the order of the primary key of `hours`, so that SQLite neither sorts nor stores them. A join with
/// `keys` and another order would double the time of the read.
pub(super) fn credits_by_hour(
    connection: &Connection,
    since: UnixMs,
    until: UnixMs,
    limit: usize,
) -> Result<Vec<HourOfKey>, rusqlite::Error> {
    let [credits, attempts, served] = ["credits", "attempts", "served"].map(sum_of);
    let sql = format!(
        "SELECT hour_ms, key_hash, {credits}, {attempts}, {served} FROM hours WHERE hour_ms >= ?1 AND hour_ms < ?2
         GROUP BY hour_ms, key_hash ORDER BY hour_ms DESC, key_hash DESC LIMIT ?3"
    );
    let names = key_names(connection)?;
    let mut statement = connection.prepare_cached(&sql)?;
    let parameters = params![timestamp(start_of_hour(since)), timestamp(until), integer(limit as u64)];
    let rows = statement.query_map(parameters, |row| {
        let key_hash: String = row.get(1)?;
        let (short_key, key_name) = names.get(&key_hash).cloned().unzip();
        Ok(HourOfKey {
            hour: UnixMs(unsigned(row.get(0)?)),
            key_hash,
            short_key,
            key_name: key_name.flatten(),
            credits: unsigned(row.get(2)?),
            attempts: unsigned(row.get(3)?),
            served: unsigned(row.get(4)?),
        })
    })?;
    rows.collect()
}

/// Reads the last hour of each client, see
/// [`History::last_hours_of_clients`](super::History::last_hours_of_clients).
pub(super) fn last_hours_of_clients(
    connection: &Connection,
    since: UnixMs,
) -> Result<Vec<(String, UnixMs)>, rusqlite::Error> {
    let table = smaller_table(connection, UsageDimension::Client, UnixMs(u64::MAX))?;
    let sql = format!("SELECT client, max(hour_ms) FROM {table} WHERE hour_ms >= ?1 GROUP BY client");
    let mut statement = connection.prepare_cached(&sql)?;
    let rows = statement.query_map([timestamp(start_of_hour(since))], |row| {
        Ok((row.get(0)?, UnixMs(row.get(1).map(unsigned)?)))
    })?;
    rows.collect()
}

/// Reads the short form and the name of every stored key, by its fingerprint.
fn key_names(connection: &Connection) -> Result<HashMap<String, (String, Option<String>)>, rusqlite::Error> {
    let mut statement = connection.prepare_cached("SELECT key_hash, short_key, name FROM keys")?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, (row.get(1)?, row.get(2)?))))?;
    rows.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_from_the_table_with_fewer_rows() {
        const HOUR: u64 = 3_600_000;
        let directory = tempfile::tempdir().unwrap();
        let tables = "CREATE TABLE hours (hour_ms INTEGER); CREATE TABLE user_hours (hour_ms INTEGER);";
        let open = |path: Option<&str>, keys: u64, users: u64| {
            let path = path.map(|name| directory.path().join(name));
            let connection = path.map_or_else(Connection::open_in_memory, Connection::open).unwrap();
            connection.execute_batch(tables).unwrap();
            for (table, rows) in [("hours", keys), ("user_hours", users)] {
                // The current hour may have few rows of either table.
                for hour in [0, 1].into_iter().chain((0..rows).map(|_| 1)).chain([2; 5]) {
                    let sql = format!("INSERT INTO {table} VALUES (?1)");
                    connection.execute(&sql, [integer(hour * HOUR)]).unwrap();
                }
            }
            connection
        };
        let assert_table = |connection: &Connection, dimension, expected| {
            assert_eq!(smaller_table(connection, dimension, UnixMs(2 * HOUR + 9)).unwrap(), expected);
        };
        let (many_keys, many_users) = (open(Some("keys"), 9, 3), open(Some("users"), 3, 9));
        for dimension in [UsageDimension::Day, UsageDimension::Hour, UsageDimension::Client] {
            assert_table(&many_keys, dimension, "user_hours");
            assert_table(&many_users, dimension, "hours");
        }
        assert_table(&many_keys, UsageDimension::Key, "hours");
        assert_table(&many_users, UsageDimension::User, "user_hours");
        assert_table(&open(None, 9, 3), UsageDimension::Day, "hours");
    }
}
