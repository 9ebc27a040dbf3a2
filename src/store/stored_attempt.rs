//! Defines a stored attempt, the query that selects attempts, the conversion of a row, and the lowest id of attempts
//! that start at a given time. The commands (`report`) and the admin API (`history`) add their conditions to the query.

use rusqlite::Row;
use serde::Serialize;
use uuid::Uuid;

use super::columns::unsigned;
use crate::policy::retention::uuid_prefix;
use crate::policy::rfc3339;
use crate::policy::units::UnixMs;

/// An attempt in the database. Its JSON has the members below, and the start time in RFC 3339.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoredAttempt {
    /// The id of the attempt, a UUID that increases with the start time.
    pub id: String,
    /// The id of the request that the attempt belongs to.
    pub request_id: String,
    /// The number of the attempt in the request, from 1.
    pub number: u64,
    /// The start time of the attempt.
    #[serde(serialize_with = "rfc3339::serialize")]
    pub started_at: UnixMs,
    /// The name of the client.
    pub client: String,
    /// The fingerprint of the end user, if the client named one.
    pub user: Option<String>,
    /// The region of ElevenLabs, or the host of another provider. It is `None` in rows of earlier versions.
    pub region: Option<String>,
    /// The fingerprint of the key, or `own` for a client's own key.
    pub key_hash: String,
    /// The short form of the key, if it is stored.
    pub short_key: Option<String>,
    /// The configured name of the key, or `None` if the key has no name or is not stored.
    pub key_name: Option<String>,
    /// The workspace of the key, if one was configured.
    pub workspace: Option<String>,
    /// The method of the request.
    pub method: String,
    /// The path with `{id}` instead of identifiers.
    pub route: String,
    /// The model, if the request names one.
    pub model: Option<String>,
    /// The status of the response, or `None` if there was no response.
    pub status: Option<u16>,
    /// The identifier of the attempt's outcome.
    pub outcome: String,
    /// Bytes of the request body sent to the provider.
    pub request_bytes: u64,
    /// Bytes of the response body relayed to the client.
    pub response_bytes: u64,
    /// Characters of text converted to speech, or `None` if they are unknown.
    pub characters: Option<u64>,
    /// Credits charged, or their estimate, or 0 if both are unknown.
    pub credits: u64,
    /// The source of `credits`: `answer`, `estimate`, `free` or `unknown`.
    pub credits_from: String,
    /// Milliseconds from the start of the attempt to the head of the response, or `None` without a response.
    pub first_byte_ms: Option<u64>,
    /// Milliseconds from the start of the attempt to its end.
    pub total_ms: u64,
}

/// Returns the query of attempts with the names of their keys, without conditions. If the file is of an earlier version
/// without users and regions, the query returns `NULL` for them.
pub(super) fn select_attempts(has_users: bool) -> String {
    let users = if has_users { "user, region" } else { "NULL, NULL" };
    format!(
        "SELECT attempts.id, request_id, number, started_at_ms, client, attempts.key_hash, keys.short_key,
            keys.name, attempts.workspace, method, route, model, attempts.status, verdict, request_bytes,
            response_bytes, characters, credits, credits_from, first_byte_ms, total_ms, {users}
         FROM attempts LEFT JOIN keys ON keys.key_hash = attempts.key_hash"
    )
}

/// Reads a row of [`select_attempts`].
pub(super) fn read_attempt(row: &Row<'_>) -> Result<StoredAttempt, rusqlite::Error> {
    let amount = |index| row.get(index).map(unsigned);
    let optional_amount = |index| row.get::<_, Option<i64>>(index).map(|amount| amount.map(unsigned));
    Ok(StoredAttempt {
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
        outcome: row.get(13)?,
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

/// Returns the lowest id of an attempt that starts at `time` or later.
pub(super) fn first_id(time: UnixMs) -> String {
    if time.0 == 0 {
        // The ids of early versions are not UUIDs.
        return String::new();
    }
    let mut id = [0; 16];
    id[..6].copy_from_slice(&uuid_prefix(time));
    Uuid::from_bytes(id).to_string()
}
