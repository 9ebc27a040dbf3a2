//! Reads single attempts for `keychoir attempts`, and counts failures for `keychoir usage --failures`.

use std::ops::Range;

use rusqlite::{Row, named_params, params};
use uuid::Uuid;

use super::{ReadError, UsageDimension, UsageGroup, UsageReader, read_error};
use crate::policy::retention::uuid_prefix;
use crate::policy::units::UnixMs;
use crate::store::columns::{timestamp, unsigned};

/// Selects attempts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttemptQuery {
    /// Only attempts of the request with this id.
    pub request_id: Option<String>,
    /// Only attempts that were not served.
    pub only_failed: bool,
    /// Only attempts that started at this time or later.
    pub started_since: UnixMs,
    /// Only attempts that ended at this time or later.
    pub ended_since: UnixMs,
    /// Maximum attempts; the latest ones are returned.
    pub limit: usize,
}

/// A stored attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptRow {
    /// Its id, a UUID that increases with the time of its start.
    pub id: String,
    /// The id of its request.
    pub request_id: String,
    /// Its number in the request, from 1.
    pub number: u64,
    /// Its start.
    pub started_at: UnixMs,
    /// The name of the client.
    pub client: String,
    /// The fingerprint of the end user, if the client named one.
    pub user: Option<String>,
    /// The region of the provider.
    pub region: Option<String>,
    /// The fingerprint of the key; `own` for a client's own key.
    pub key_hash: String,
    /// The short form of the key, if it is stored.
    pub short_key: Option<String>,
    /// The configured name of the key.
    pub key_name: Option<String>,
    /// The workspace of the key, if one was configured.
    pub workspace: Option<String>,
    /// The method of the request.
    pub method: String,
    /// The path with `{id}` instead of identifiers.
    pub route: String,
    /// The model, if the request names one.
    pub model: Option<String>,
    /// The status of the response; `None` if there was none.
    pub status: Option<u16>,
    /// The identifier of its outcome.
    pub verdict: String,
    /// Bytes of the request body.
    pub request_bytes: u64,
    /// Bytes of the response body.
    pub response_bytes: u64,
    /// Characters of text converted to speech.
    pub characters: Option<u64>,
    /// Credits charged.
    pub credits: u64,
    /// The source of `credits`: `answer`, `estimate`, `free` or `unknown`.
    pub credits_from: String,
    /// Milliseconds to the head of the response.
    pub first_byte_ms: Option<u64>,
    /// Milliseconds to its end.
    pub total_ms: u64,
}

/// The number of attempts of a group that failed in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailureCount {
    /// The group.
    pub group: UsageGroup,
    /// The identifier of the outcome.
    pub verdict: String,
    /// The status of the response; `None` if there was none.
    pub status: Option<u16>,
    /// The attempts.
    pub attempts: u64,
}

impl UsageReader {
    /// Returns the latest selected attempts, in the order of their starts.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn attempts(&self, query: &AttemptQuery) -> Result<Vec<AttemptRow>, ReadError> {
        self.select_attempts(query).map_err(|source| read_error(self.path.clone(), source))
    }

    /// Counts the attempts that were not served and started in `period`, the most frequent failures first.
    /// Attempts are kept for a shorter time than sums.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn failures(
        &self,
        period: Range<UnixMs>,
        dimension: UsageDimension,
    ) -> Result<Vec<FailureCount>, ReadError> {
        self.check_dimension(dimension)?;
        self.count_failures(period, dimension).map_err(|source| read_error(self.path.clone(), source))
    }

    fn select_attempts(&self, query: &AttemptQuery) -> Result<Vec<AttemptRow>, rusqlite::Error> {
        // The id is the primary key and begins with the time, so that only the selected part is read.
        let users = if self.has_users { "user, region" } else { "NULL, NULL" };
        let sql = format!(
            "SELECT attempts.id, request_id, number, started_at_ms, client, attempts.key_hash, keys.short_key,
                keys.name, attempts.workspace, method, route, model, attempts.status, verdict, request_bytes,
                response_bytes, characters, credits, credits_from, first_byte_ms, total_ms, {users}
             FROM attempts LEFT JOIN keys ON keys.key_hash = attempts.key_hash
             WHERE attempts.id >= :first_id AND (:request IS NULL OR request_id = :request)
                AND (NOT :failed OR verdict <> 'served') AND started_at_ms + total_ms >= :ended_since
             ORDER BY attempts.id DESC LIMIT :limit"
        );
        let mut statement = self.connection.prepare_cached(&sql)?;
        let rows = statement.query_map(
            named_params! {
                ":first_id": first_id(query.started_since),
                ":request": query.request_id,
                ":failed": query.only_failed,
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
                group: dimension.group(row.get(0)?, row.get(4)?, row.get(5)?),
                verdict: row.get(1)?,
                status: row.get(2)?,
                attempts: row.get(3).map(unsigned)?,
            })
        })?;
        rows.collect()
    }
}

/// The smallest id of an attempt that starts at `time` or later.
fn first_id(time: UnixMs) -> String {
    if time.0 == 0 {
        // Ids of early versions are no UUIDs.
        return String::new();
    }
    let mut id = [0; 16];
    id[..6].copy_from_slice(&uuid_prefix(time));
    Uuid::from_bytes(id).to_string()
}

fn read_attempt(row: &Row<'_>) -> Result<AttemptRow, rusqlite::Error> {
    let amount = |index| row.get(index).map(unsigned);
    let optional_amount = |index| row.get::<_, Option<i64>>(index).map(|amount| amount.map(unsigned));
    Ok(AttemptRow {
        id: row.get(0)?,
        request_id: row.get(1)?,
        number: amount(2)?,
        started_at: UnixMs(amount(3)?),
        client: row.get(4)?,
        key_hash: row.get(5)?,
        short_key: row.get(6)?,
        key_name: row.get(7)?,
        workspace: row.get(8)?,
        method: row.get(9)?,
        route: row.get(10)?,
        model: row.get(11)?,
        status: row.get(12)?,
        verdict: row.get(13)?,
        request_bytes: amount(14)?,
        response_bytes: amount(15)?,
        characters: optional_amount(16)?,
        credits: amount(17)?,
        credits_from: row.get(18)?,
        first_byte_ms: optional_amount(19)?,
        total_ms: amount(20)?,
        user: row.get(21)?,
        region: row.get(22)?,
    })
}
