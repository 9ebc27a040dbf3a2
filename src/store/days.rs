//! Keeps the sums of `hours` by day in the table `days`, so that the usage of weeks is read from few rows: up to 24
//! hourly sums become one daily sum. [`PeriodParts`] divides a period into the days and hours to read.
//!
//! Maintenance adds the hours that have ended, one in each step, and deletes the days whose retention has ended.
//! Attempts of an added hour that are written later are added to both tables in the transaction that writes them, so
//! `days` contains the sums of all hours before the hour in `next_hour_of_days`.

use std::sync::LazyLock;

use rusqlite::{Connection, OptionalExtension, ToSql, params};

use super::attempts::HourAmounts;
use super::columns::{timestamp, unsigned};
use crate::policy::retention::start_of_hour;
use crate::policy::units::UnixMs;

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

/// The migration that adds the table. The table is empty after the migration and filled by maintenance, so that a large
/// file does not delay startup.
pub(super) const TABLE: &str = "
    -- Sums over the attempts that started on a day, in UTC.
    CREATE TABLE days (
        day_ms INTEGER NOT NULL,
        key_hash TEXT NOT NULL,
        client TEXT NOT NULL,
        route TEXT NOT NULL,
        model TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        served INTEGER NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        credits INTEGER NOT NULL,
        unpriced INTEGER NOT NULL,
        PRIMARY KEY (day_ms, key_hash, client, route, model)
    ) STRICT, WITHOUT ROWID;

    -- One row: the hours before this one are in `days`.
    CREATE TABLE next_hour_of_days (
        hour_ms INTEGER NOT NULL
    ) STRICT;
    INSERT INTO next_hour_of_days VALUES (0);
    ";

/// The columns of the table that are sums.
pub(super) const SUM_COLUMNS: [&str; 7] =
    ["attempts", "served", "request_bytes", "response_bytes", "characters", "credits", "unpriced"];

/// The columns that identify a row of `hours`.
pub(super) struct SumsRow<'a> {
    pub(super) hour: UnixMs,
    pub(super) key_hash: &'a str,
    pub(super) client: &'a str,
    pub(super) route: &'a str,
    pub(super) model: &'a str,
}

/// The `ON CONFLICT` clause that adds the inserted sums to the sums of an existing row. Sums are limited to 2^53, which
/// is far above real amounts and exact as a floating-point number.
static ADD_SUMS: LazyLock<String> = LazyLock::new(|| {
    let sums =
        SUM_COLUMNS.map(|column| format!("{column} = min({column} + excluded.{column}, 9007199254740992)"));
    format!("ON CONFLICT DO UPDATE SET {}", sums.join(", "))
});

/// The statement that adds the sums of an hour to the sums of its day.
static ADD_HOUR: LazyLock<String> = LazyLock::new(|| {
    let columns = SUM_COLUMNS.join(", ");
    format!(
        "INSERT INTO days (day_ms, key_hash, client, route, model, {columns})
         SELECT hour_ms - hour_ms % 86400000, key_hash, client, route, model, {columns} FROM hours
         WHERE hour_ms = ?1 {}",
        *ADD_SUMS
    )
});

/// The statement that adds amounts to a row of `days`. Parameters 1 to 5 identify the row, and parameters 6 to 12 are
/// the amounts.
static ADD_TO_DAY: LazyLock<String> = LazyLock::new(|| {
    let columns = SUM_COLUMNS.join(", ");
    let limited_sums = (6..13).map(|parameter| format!("min(?{parameter}, 9007199254740992)"));
    let values = limited_sums.collect::<Vec<_>>().join(", ");
    format!(
        "INSERT INTO days (day_ms, key_hash, client, route, model, {columns})
         VALUES (?1, ?2, ?3, ?4, ?5, {values}) {}",
        *ADD_SUMS
    )
});

/// Returns the start of the first hour that the daily sums do not include.
pub(super) fn next_hour(connection: &Connection) -> Result<UnixMs, rusqlite::Error> {
    let mut statement = connection.prepare_cached("SELECT hour_ms FROM next_hour_of_days")?;
    statement.query_row([], |row| row.get(0).map(unsigned)).map(UnixMs)
}

/// Adds the sums of the next hour that ended before `now` to its day. Returns false if there is no such hour.
pub(super) fn add_next_hour(connection: &mut Connection, now: UnixMs) -> Result<bool, rusqlite::Error> {
    const NEXT_HOUR: &str =
        "SELECT hour_ms FROM hours WHERE hour_ms >= ?1 AND hour_ms < ?2 ORDER BY hour_ms LIMIT 1";
    let first_hour = timestamp(next_hour(connection)?);
    let hour: Option<i64> = connection
        .prepare_cached(NEXT_HOUR)?
        .query_row(params![first_hour, timestamp(start_of_hour(now))], |row| row.get(0))
        .optional()?;
    let Some(hour) = hour.map(unsigned).map(UnixMs) else { return Ok(false) };
    let transaction = connection.transaction()?;
    transaction.prepare_cached(&ADD_HOUR)?.execute([timestamp(hour)])?;
    transaction
        .prepare_cached("UPDATE next_hour_of_days SET hour_ms = ?1")?
        .execute([timestamp(UnixMs(hour.0.saturating_add(HOUR_MS)))])?;
    transaction.commit()?;
    Ok(true)
}

/// Empties the table, which maintenance fills again. Used when the names of keys in `hours` change.
pub(super) const CLEAR: &str = "DELETE FROM days; UPDATE next_hour_of_days SET hour_ms = 0;";

/// Deletes at most `max_rows` sums of days that ended before `oldest`, and returns their number.
pub(super) fn delete_older(
    connection: &Connection,
    oldest: UnixMs,
    max_rows: u16,
) -> Result<usize, rusqlite::Error> {
    const DELETE_OLDER: &str = "DELETE FROM days WHERE (day_ms, key_hash, client, route, model) IN (
        SELECT day_ms, key_hash, client, route, model FROM days WHERE day_ms < ?1 LIMIT ?2)";
    connection.prepare_cached(DELETE_OLDER)?.execute(params![timestamp(start_of_day(oldest)), max_rows])
}

/// Adds the amounts of attempts to the sums of their day, if these sums already include the hour of the attempts.
pub(super) fn add_late_amounts(
    connection: &Connection,
    row: &SumsRow<'_>,
    amounts: &HourAmounts,
    next_hour: UnixMs,
) -> Result<(), rusqlite::Error> {
    if row.hour >= next_hour {
        return Ok(());
    }
    let mut statement = connection.prepare_cached(&ADD_TO_DAY)?;
    let SumsRow { hour, key_hash, client, route, model } = row;
    let key_columns: [&dyn ToSql; 5] = [&timestamp(start_of_day(*hour)), key_hash, client, route, model];
    for (parameter, column) in (1..).zip(key_columns) {
        statement.raw_bind_parameter(parameter, column)?;
    }
    for (parameter, sum) in (key_columns.len() + 1..).zip(amounts.columns()).take(SUM_COLUMNS.len()) {
        statement.raw_bind_parameter(parameter, sum)?;
    }
    statement.raw_execute()?;
    Ok(())
}

/// The bounds between the parts of a period: hours before the first whole day, days, and the remaining hours.
/// If no day can be read, both bounds are the end of the period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PeriodParts {
    /// The end of the first hours, and the start of the first day.
    pub(super) first_day: UnixMs,
    /// The end of the days, and the start of the remaining hours.
    pub(super) days_end: UnixMs,
}

impl PeriodParts {
    /// Divides the period from the hour `since` to `until`, for daily sums of all hours before `next_hour`.
    pub(super) fn new(since: UnixMs, until: UnixMs, next_hour: UnixMs) -> Self {
        let first_day = start_of_day(UnixMs(since.0.saturating_add(DAY_MS - 1)));
        // The sums of the day of `next_hour` do not include the hours that follow.
        let days_end = if until >= next_hour { next_hour } else { start_of_day(until) };
        if first_day < days_end {
            Self { first_day, days_end }
        } else {
            Self { first_day: until, days_end: until }
        }
    }
}

/// Returns the start of the UTC day that contains `time`.
fn start_of_day(time: UnixMs) -> UnixMs {
    UnixMs(time.0 - time.0 % DAY_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asserts the first day and the end of the days of a period. All times are numbers of hours.
    #[track_caller]
    fn assert_parts(since: u64, until: u64, next_hour: u64, expected: (u64, u64)) {
        let [since, until, next_hour] = [since, until, next_hour].map(|hour| UnixMs(hour * HOUR_MS));
        let PeriodParts { first_day, days_end } = PeriodParts::new(since, until, next_hour);
        assert_eq!((first_day.0 / HOUR_MS, days_end.0 / HOUR_MS), expected);
    }

    #[test]
    fn a_period_consists_of_hours_days_and_hours() {
        assert_parts(30, 130, 125, (48, 125));
        assert_parts(48, 130, 125, (48, 125));
        // The period does not contain all hours of its last day.
        assert_parts(30, 110, 125, (48, 96));
        assert_parts(30, 120, 125, (48, 120));
        assert_parts(30, 125, 125, (48, 125));
    }

    #[test]
    fn a_period_without_a_summed_day_consists_of_hours() {
        assert_parts(30, 40, 125, (40, 40));
        assert_parts(30, 71, 125, (71, 71));
        assert_parts(30, 130, 40, (130, 130));
        assert_parts(30, 130, 0, (130, 130));
        assert_parts(0, u64::MAX / HOUR_MS, 0, (u64::MAX / HOUR_MS, u64::MAX / HOUR_MS));
    }
}
