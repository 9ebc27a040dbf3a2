//! The reads of the admin API. Each returns a limited number of rows.

use rusqlite::{Connection, Row, params};
use uuid::Uuid;

use super::is_interrupted;
use crate::policy::retention::{start_of_hour, uuid_prefix};
use crate::policy::units::UnixMs;
use crate::store::UsageSums;
use crate::store::columns::{integer, timestamp, unsigned};

/// The attempts to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttemptFilter {
    /// Maximum attempts of a page.
    pub limit: usize,
    /// Only attempts with ids below this one.
    pub before: Option<String>,
    /// Only attempts of the request with this id.
    pub request_id: Option<String>,
    /// Only attempts that the provider did not serve.
    pub is_failed_only: bool,
}

/// Attempts, the latest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptPage {
    /// The attempts.
    pub attempts: Vec<StoredAttempt>,
    /// Where the next page starts; `None` after the last attempt. A page that ended at the time limit may have
    /// few attempts, or none.
    pub next: Option<String>,
}

/// A stored attempt: the sending of a request with one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredAttempt {
    /// A UUID of version 7.
    pub id: String,
    /// The id of the request.
    pub request_id: String,
    /// The number of the attempt within its request, from 1.
    pub number: u64,
    /// When the attempt started.
    pub started_at: UnixMs,
    /// The name of the client.
    pub client: String,
    /// The fingerprint of the end user, if the client named one.
    pub user: Option<String>,
    /// The region of the provider.
    pub region: Option<String>,
    /// The key's fingerprint, or `own` for a client's own key.
    pub key_hash: String,
    /// The short form of the key, if it is stored.
    pub short_key: Option<String>,
    /// The name of the key, if it has one.
    pub key_name: Option<String>,
    /// The HTTP method.
    pub method: String,
    /// The path with `{id}` instead of identifiers.
    pub route: String,
    /// The provider's name of the model.
    pub model: Option<String>,
    /// The status of the response, if there was one.
    pub status: Option<u64>,
    /// The name of the outcome.
    pub outcome: String,
    /// Bytes of the request body sent to the provider.
    pub request_bytes: u64,
    /// Bytes of the response body relayed to the client.
    pub response_bytes: u64,
    /// Characters of text converted to speech.
    pub characters: Option<u64>,
    /// Charged credits.
    pub credits: u64,
    /// The source of the credits: `answer`, `estimate`, `free` or `unknown`.
    pub credits_from: String,
    /// Milliseconds until the first byte of the response.
    pub first_byte_ms: Option<u64>,
    /// Milliseconds until the end of the attempt.
    pub total_ms: u64,
}

/// Time around a request's id in which its attempts started. A session may last for hours before it moves to
/// another key.
const REQUEST_DURATION_MS: u64 = 24 * 3_600 * 1_000;
/// Time before a request's id at which its attempts may have started, because the clocks of attempts and
/// requests are read at different moments.
const CLOCK_TOLERANCE_MS: u64 = 1_000;

/// Reads a page of attempts. When the time limit is reached, the page ends early.
pub(super) fn attempts(
    connection: &Connection,
    filter: &AttemptFilter,
) -> Result<AttemptPage, rusqlite::Error> {
    const READ: &str = "SELECT id, request_id, number, started_at_ms, client, attempts.key_hash, keys.short_key,
            keys.name, method, route, model, attempts.status, verdict, request_bytes, response_bytes, characters,
            credits, credits_from, first_byte_ms, total_ms, user, region
        FROM attempts LEFT JOIN keys ON keys.key_hash = attempts.key_hash
        WHERE id >= ?1 AND id < ?2 ORDER BY id DESC";
    let (first, end) = id_range(filter.request_id.as_deref());
    let end = filter.before.clone().map_or(end.clone(), |before| before.min(end));
    let mut statement = connection.prepare_cached(READ)?;
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
        let is_served = attempt.status.is_some_and(|status| status < 400) && attempt.outcome == "served";
        if is_of_request && !(filter.is_failed_only && is_served) {
            attempts.push(attempt);
        }
    }
}

/// The ids of attempts that may belong to a request. Keychoir's own request ids contain the time; a client may
/// choose any other id, whose attempts may be anywhere.
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

/// The lowest id of an attempt that starts at `time`.
fn first_id(time: UnixMs) -> String {
    let mut id = [0; 16];
    id[..6].copy_from_slice(&uuid_prefix(time));
    Uuid::from_bytes(id).to_string()
}

fn read_attempt(row: &Row<'_>) -> Result<StoredAttempt, rusqlite::Error> {
    let number = |index| row.get(index).map(unsigned);
    let optional = |index| row.get::<_, Option<i64>>(index).map(|value| value.map(unsigned));
    Ok(StoredAttempt {
        id: row.get(0)?,
        request_id: row.get(1)?,
        number: number(2)?,
        started_at: UnixMs(number(3)?),
        client: row.get(4)?,
        key_hash: row.get(5)?,
        short_key: row.get(6)?,
        key_name: row.get(7)?,
        method: row.get(8)?,
        route: row.get(9)?,
        model: row.get(10)?,
        status: optional(11)?,
        outcome: row.get(12)?,
        request_bytes: number(13)?,
        response_bytes: number(14)?,
        characters: optional(15)?,
        credits: number(16)?,
        credits_from: row.get(17)?,
        first_byte_ms: optional(18)?,
        total_ms: number(19)?,
        user: row.get(20)?,
        region: row.get(21)?,
    })
}

/// The dimension of usage sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryDimension {
    /// One sum per UTC day.
    Day,
    /// One sum per hour.
    Hour,
    /// One sum per key.
    Key,
    /// One sum per client.
    Client,
    /// One sum per end user of a client.
    User,
    /// One sum per region of the provider.
    Region,
    /// One sum per model.
    Model,
    /// One sum per route.
    Route,
}

impl HistoryDimension {
    /// All dimensions.
    pub const ALL: [Self; 8] =
        [Self::Day, Self::Hour, Self::Key, Self::Client, Self::User, Self::Region, Self::Model, Self::Route];

    /// The identifier in queries and documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Hour => "hour",
            Self::Key => "key",
            Self::Client => "client",
            Self::User => "user",
            Self::Region => "region",
            Self::Model => "model",
            Self::Route => "route",
        }
    }

    /// The expression by which the hours are grouped, as text.
    fn expression(self) -> &'static str {
        match self {
            Self::Day => "CAST(hour_ms - hour_ms % 86400000 AS TEXT)",
            Self::Hour => "CAST(hour_ms AS TEXT)",
            Self::Key => "key_hash",
            Self::Client => "client",
            Self::User => "user",
            Self::Region => "region",
            Self::Model => "model",
            Self::Route => "route",
        }
    }

    /// The table with the sums.
    fn table(self) -> &'static str {
        match self {
            Self::User | Self::Region => "user_hours",
            Self::Day | Self::Hour | Self::Key | Self::Client | Self::Model | Self::Route => "hours",
        }
    }

    /// Whether the groups are times.
    #[must_use]
    pub fn is_time(self) -> bool {
        match self {
            Self::Day | Self::Hour => true,
            Self::Key | Self::Client | Self::User | Self::Region | Self::Model | Self::Route => false,
        }
    }
}

/// The sums to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageFilter {
    /// From the hour that contains this time.
    pub since: UnixMs,
    /// Before this time; an hour that contains it is included.
    pub until: UnixMs,
    /// The dimension.
    pub dimension: HistoryDimension,
    /// Only the attempts of this client.
    pub client: Option<String>,
    /// Maximum rows.
    pub limit: usize,
}

/// The sums of one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageRow {
    /// The day, hour, fingerprint, client, user, region, model or route; empty for attempts without one.
    pub group: String,
    /// The short form of the key, for sums by key.
    pub short_key: Option<String>,
    /// The name of the key, for sums by key.
    pub key_name: Option<String>,
    /// The sums.
    pub sums: UsageSums,
}

/// Reads sums: times in their order, from the latest; other groups by credits.
pub(super) fn usage(connection: &Connection, filter: &UsageFilter) -> Result<Vec<UsageRow>, rusqlite::Error> {
    // `total` adds floating-point numbers, which cannot overflow and are exact far beyond real amounts.
    let sum = |column: &str| format!("CAST(min(total({column}), 9007199254740992) AS INTEGER)");
    let sums = ["attempts", "served", "request_bytes", "response_bytes", "characters", "credits", "unpriced"]
        .map(sum)
        .join(", ");
    let (expression, table) = (filter.dimension.expression(), filter.dimension.table());
    let order =
        if filter.dimension.is_time() { "CAST(group_name AS INTEGER) DESC" } else { "7 DESC, 2 DESC, 1" };
    let sql = format!(
        "SELECT sums.*, keys.short_key, keys.name
         FROM (SELECT {expression} AS group_name, {sums} FROM {table}
            WHERE hour_ms >= ?1 AND hour_ms < ?2 AND (?3 IS NULL OR client = ?3) GROUP BY 1) AS sums
         LEFT JOIN keys ON keys.key_hash = sums.group_name
         ORDER BY {order} LIMIT ?4"
    );
    let mut statement = connection.prepare_cached(&sql)?;
    let parameters = params![
        timestamp(start_of_hour(filter.since)),
        timestamp(filter.until),
        filter.client,
        integer(filter.limit as u64)
    ];
    let rows = statement.query_map(parameters, |row| {
        let amount = |index| row.get(index).map(unsigned);
        let group: String = row.get(0)?;
        Ok(UsageRow {
            group: match group.parse() {
                Ok(time) if filter.dimension.is_time() => UnixMs(time).rfc3339_seconds(),
                Ok(_) | Err(_) => group,
            },
            short_key: row.get(8)?,
            key_name: row.get(9)?,
            sums: UsageSums {
                attempts: amount(1)?,
                served: amount(2)?,
                request_bytes: amount(3)?,
                response_bytes: amount(4)?,
                characters: amount(5)?,
                credits: amount(6)?,
                unpriced: amount(7)?,
            },
        })
    })?;
    rows.collect()
}
