//! Sums the attempts of each hour by client, end user and region in `user_hours`, reads the usage of a user for its
//! quota, and deletes old rows. The table is separate from `hours`, because `hours` would need a row per user for each
//! key, route and model.
//!
//! Attempts that may have cost something are counted for their user, and all other attempts are counted without a user.
//! A client can name any number of users, so this rule prevents rows for users whose attempts cost nothing.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

use rusqlite::{Connection, ToSql, Transaction, params};

use super::attempts::{ADD_SUMS, HourAmounts, SUM_COLUMNS};
use super::columns::{timestamp, unsigned};
use crate::elevenlabs::region::region_of_host;
use crate::policy::client::ClientName;
use crate::policy::client_quota::Period;
use crate::policy::retention::start_of_hour;
use crate::policy::units::UnixMs;
use crate::proxy::{AttemptRecord, RequestUser, UsageTotals};
use crate::secret::UserFingerprint;

/// The migration that adds the table, and the user and the region of attempts.
pub(super) const TABLE: &str = "
    -- fingerprint of the end user that the client named
    ALTER TABLE attempts ADD COLUMN user TEXT;
    -- region of ElevenLabs, or the host of another provider
    ALTER TABLE attempts ADD COLUMN region TEXT;

    -- Sums over the attempts that started in an hour.
    CREATE TABLE user_hours (
        hour_ms INTEGER NOT NULL,
        client TEXT NOT NULL,
        -- fingerprint of the end user; empty: none, or attempts that cost nothing
        user TEXT NOT NULL,
        -- empty: unknown
        region TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        served INTEGER NOT NULL,
        request_bytes INTEGER NOT NULL,
        response_bytes INTEGER NOT NULL,
        characters INTEGER NOT NULL,
        credits INTEGER NOT NULL,
        unpriced INTEGER NOT NULL,
        quota_requests INTEGER NOT NULL,
        quota_credits INTEGER NOT NULL,
        PRIMARY KEY (hour_ms, client, user, region)
    ) STRICT, WITHOUT ROWID;

    -- The usage of a user is read before its first request.
    CREATE INDEX user_hours_by_user ON user_hours (user, client) WHERE user <> '';

    INSERT INTO user_hours
    SELECT hour_ms, client, '', '', CAST(min(total(attempts), 9007199254740992) AS INTEGER),
        CAST(min(total(served), 9007199254740992) AS INTEGER),
        CAST(min(total(request_bytes), 9007199254740992) AS INTEGER),
        CAST(min(total(response_bytes), 9007199254740992) AS INTEGER),
        CAST(min(total(characters), 9007199254740992) AS INTEGER),
        CAST(min(total(credits), 9007199254740992) AS INTEGER),
        CAST(min(total(unpriced), 9007199254740992) AS INTEGER),
        CAST(min(total(quota_requests), 9007199254740992) AS INTEGER),
        CAST(min(total(quota_credits), 9007199254740992) AS INTEGER)
    FROM hours GROUP BY hour_ms, client;
    ";

/// Maximum number of rows of users in an in-memory database. Each row takes about 200 bytes. The oldest rows are
/// deleted first.
pub(super) const MAX_IN_MEMORY_ROWS: i64 = 100_000;

/// The columns that identify a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct RowKey<'a> {
    hour: UnixMs,
    client: &'a str,
    user: Option<UserFingerprint>,
    region: &'a str,
}

/// The amounts that a transaction adds to the sums.
#[derive(Default)]
pub(super) struct UserSums<'a>(HashMap<RowKey<'a>, HourAmounts>);

impl<'a> UserSums<'a> {
    /// Returns the amounts to which an attempt is added.
    pub(super) fn amounts_for(&mut self, attempt: &'a AttemptRecord) -> &mut HourAmounts {
        let may_have_cost = attempt.credits > 0 || attempt.quota.requests > 0 || attempt.quota.credits > 0;
        let user = attempt.user.as_ref().filter(|_| may_have_cost);
        let key = RowKey {
            hour: start_of_hour(attempt.started_at),
            client: attempt.client.as_str(),
            user: user.map(RequestUser::fingerprint),
            region: region_of_host(attempt.authority.host()),
        };
        self.0.entry(key).or_default()
    }

    /// Adds the amounts to the rows of the transaction.
    pub(super) fn write(self, transaction: &Transaction<'_>) -> Result<(), rusqlite::Error> {
        let mut statement = transaction.prepare_cached(&ADD_TO_HOUR)?;
        let mut user_column = String::new();
        for (RowKey { hour, client, user, region }, amounts) in self.0 {
            user_column.clear();
            if let Some(user) = user {
                // Writing to a string does not fail.
                let _ = write!(user_column, "{user}");
            }
            let key_columns: [&dyn ToSql; 4] = [&timestamp(hour), &client, &user_column, &region];
            for (parameter, column) in (1..).zip(key_columns) {
                statement.raw_bind_parameter(parameter, column)?;
            }
            for (parameter, sum) in (key_columns.len() + 1..).zip(amounts.columns()) {
                statement.raw_bind_parameter(parameter, sum)?;
            }
            statement.raw_execute()?;
        }
        Ok(())
    }
}

/// The statement that adds amounts to a row of `user_hours`. Parameters 1 to 4 identify the row, and parameters 5 to 13
/// are the amounts.
static ADD_TO_HOUR: LazyLock<String> = LazyLock::new(|| {
    let columns = SUM_COLUMNS.join(", ");
    let limited_sums = (5..14).map(|parameter| format!("min(?{parameter}, 9007199254740992)"));
    let values = limited_sums.collect::<Vec<_>>().join(", ");
    format!(
        "INSERT INTO user_hours (hour_ms, client, user, region, {columns})
         VALUES (?1, ?2, ?3, ?4, {values}) {}",
        *ADD_SUMS
    )
});

/// Reads the usage of a user in the periods that contain `now`, by the same rule as the usage of clients.
pub(super) fn read_usage(
    connection: &Connection,
    client: &ClientName,
    user: UserFingerprint,
    now: UnixMs,
) -> Result<UsageTotals, rusqlite::Error> {
    const READ: &str = "SELECT
            total(quota_requests * (hour_ms >= ?3)), total(quota_requests * (hour_ms >= ?4)), total(quota_requests),
            total(quota_credits * (hour_ms >= ?3)), total(quota_credits * (hour_ms >= ?4)), total(quota_credits)
         FROM user_hours WHERE user = ?2 AND user <> '' AND client = ?1";
    let [day, month] = [Period::Day, Period::Month].map(|period| timestamp(period.start(now)));
    let mut statement = connection.prepare_cached(READ)?;
    statement.query_row(params![client.as_str(), user.to_string(), day, month], |row| {
        #[expect(clippy::cast_possible_truncation, reason = "the cast saturates")]
        let amount = |index| row.get::<_, f64>(index).map(|sum| unsigned(sum as i64));
        Ok(UsageTotals {
            client: client.clone(),
            requests: [amount(0)?, amount(1)?, amount(2)?],
            credits: [amount(3)?, amount(4)?, amount(5)?],
        })
    })
}

/// Deletes at most `max_rows` sums of hours before `oldest`, and returns their number.
pub(super) fn delete_older(
    connection: &Connection,
    oldest: UnixMs,
    max_rows: u16,
) -> Result<usize, rusqlite::Error> {
    const DELETE_OLDER: &str = "DELETE FROM user_hours WHERE (hour_ms, client, user, region) IN (
        SELECT hour_ms, client, user, region FROM user_hours WHERE hour_ms < ?1 LIMIT ?2)";
    connection.prepare_cached(DELETE_OLDER)?.execute(params![timestamp(oldest), max_rows])
}

/// Deletes the oldest rows of users above `max_rows`, and returns their number. The quotas of the users then do not
/// count the usage in these rows.
pub(super) fn delete_excess(connection: &Connection, max_rows: i64) -> Result<usize, rusqlite::Error> {
    const DELETE_OLDEST: &str = "DELETE FROM user_hours WHERE (hour_ms, client, user, region) IN (
        SELECT hour_ms, client, user, region FROM user_hours WHERE user <> '' ORDER BY hour_ms
        LIMIT max(0, (SELECT count(*) FROM user_hours WHERE user <> '') - ?1))";
    connection.prepare_cached(DELETE_OLDEST)?.execute([max_rows])
}
