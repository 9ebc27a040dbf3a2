//! Reads single attempts for `keychoir attempts`, and counts failures for `keychoir usage --failures`.

use std::ops::Range;

use rusqlite::{named_params, params};

use super::{ReadError, UsageDimension, UsageGroup, UsageReader, read_error};
use crate::policy::units::UnixMs;
use crate::store::columns::{timestamp, unsigned};
use crate::store::stored_attempt::{StoredAttempt, first_id, read_attempt, select_attempts};

/// The conditions for the attempts that a command prints.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttemptQuery {
    /// The id of the request that the attempts must belong to, or `None` for all requests.
    pub request_id: Option<String>,
    /// Whether attempts with the outcome `served` are excluded.
    pub failed_only: bool,
    /// The time at or after which the attempts must have started.
    pub started_since: UnixMs,
    /// The time at or after which the attempts must have ended.
    pub ended_since: UnixMs,
    /// Maximum number of attempts. If more attempts match, the latest attempts are returned.
    pub limit: usize,
}

/// The number of attempts of a group that failed in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailureCount {
    /// The group that the attempts belong to.
    pub group: UsageGroup,
    /// The identifier of the outcome.
    pub outcome: String,
    /// The status of the response, or `None` if there was no response.
    pub status: Option<u16>,
    /// The number of failed attempts.
    pub attempts: u64,
}

impl UsageReader {
    /// Returns the latest attempts that match `query`, in the order of their starts.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read.
    pub fn attempts(&self, query: &AttemptQuery) -> Result<Vec<StoredAttempt>, ReadError> {
        self.select_attempts(query).map_err(|source| read_error(self.path.clone(), source))
    }

    /// Counts the attempts that were not served and started in `period`, the most frequent failures first.
    /// By default, attempts are kept for a shorter time than sums.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read, and for the dimensions of users and regions when the file is of a version
    /// without them.
    pub fn failures(
        &self,
        period: Range<UnixMs>,
        dimension: UsageDimension,
    ) -> Result<Vec<FailureCount>, ReadError> {
        self.check_dimension(dimension)?;
        self.count_failures(period, dimension).map_err(|source| read_error(self.path.clone(), source))
    }

    fn select_attempts(&self, query: &AttemptQuery) -> Result<Vec<StoredAttempt>, rusqlite::Error> {
        // The id is the primary key and begins with the time, so SQLite reads only the attempts from `:first_id` on.
        let select = select_attempts(self.has_users);
        let sql = format!(
            "{select}
             WHERE attempts.id >= :first_id AND (:request IS NULL OR request_id = :request)
                AND (NOT :failed OR verdict <> 'served') AND started_at_ms + total_ms >= :ended_since
             ORDER BY attempts.id DESC LIMIT :limit"
        );
        let mut statement = self.connection.prepare_cached(&sql)?;
        let rows = statement.query_map(
            named_params! {
                ":first_id": first_id(query.started_since),
                ":request": query.request_id,
                ":failed": query.failed_only,
                ":ended_since": timestamp(query.ended_since),
                ":limit": i64::try_from(query.limit).unwrap_or(i64::MAX),
            },
            read_attempt,
        )?;
        let mut attempts = rows.collect::<Result<Vec<_>, _>>()?;
        attempts.reverse();
        Ok(attempts)
    }

    fn count_failures(
        &self,
        period: Range<UnixMs>,
        dimension: UsageDimension,
    ) -> Result<Vec<FailureCount>, rusqlite::Error> {
        let column = dimension.expression("started_at_ms");
        let sql = format!(
            "SELECT failures.*, keys.short_key, keys.name
             FROM (SELECT coalesce({column}, '') AS group_name, verdict, status, count(*) AS failed FROM attempts
                WHERE id >= ?1 AND started_at_ms >= ?2 AND started_at_ms < ?3 AND verdict <> 'served'
                GROUP BY 1, 2, 3) AS failures
             LEFT JOIN keys ON keys.key_hash = failures.group_name
             ORDER BY failed DESC, group_name, verdict"
        );
        let mut statement = self.connection.prepare(&sql)?;
        let (start, end) = (timestamp(period.start), timestamp(period.end));
        let rows = statement.query_map(params![first_id(period.start), start, end], |row| {
            Ok(FailureCount {
                group: UsageGroup::new(dimension, row.get(0)?, row.get(4)?, row.get(5)?),
                outcome: row.get(1)?,
                status: row.get(2)?,
                attempts: row.get(3).map(unsigned)?,
            })
        })?;
        rows.collect()
    }
}
