//! Serves `GET usage`, `GET attempts` and `GET changes`: checks the query, reads usage sums, attempts or changes from
//! the usage database, and renders their JSON documents.

use std::time::Duration;

use serde_json::{Value, json};

use crate::admin::api::error::ApiError;
use crate::admin::api::request::Query;
use crate::policy::quantity::duration;
use crate::policy::units::UnixMs;
use crate::secret::KEY_ID_DIGITS;
use crate::store::{
    AttemptFilter, History, StoredAttempt, StoredChange, UsageDimension, UsageFilter, UsageRow,
};

/// Number of attempts or changes on a page if the query has no `limit`.
const DEFAULT_LIMIT: usize = 100;
/// Maximum number of attempts or changes on a page.
const MAX_LIMIT: usize = 1_000;
/// Maximum number of usage sums in a response. The at most 744 hours of a month fit into a response.
const MAX_USAGE_ROWS: usize = 1_000;
/// Time before now at which the usage sums start if the query has no `since`.
const DEFAULT_USAGE_SPAN: Duration = Duration::from_secs(30 * 24 * 3_600);

/// Responds to `GET usage`.
pub(in crate::admin::api) async fn read_usage(
    history: &History,
    query: &Query,
    now: UnixMs,
) -> Result<Value, ApiError> {
    query.validate_names(&["since", "until", "by", "client"])?;
    let dimension_name = query.value("by").unwrap_or("day");
    let dimension = UsageDimension::ALL.into_iter().find(|dimension| dimension.as_str() == dimension_name);
    let dimension = dimension.ok_or_else(|| {
        let names = UsageDimension::ALL.map(UsageDimension::as_str).join(", ");
        ApiError::bad_request("invalid_parameter", format!("The parameter `by` must be one of: {names}."))
    })?;
    let filter = UsageFilter {
        since: parse_time(query, "since", now)?.unwrap_or(now.minus(DEFAULT_USAGE_SPAN)),
        until: parse_time(query, "until", now)?.unwrap_or(UnixMs(now.0.saturating_add(1))),
        dimension,
        client: query.value("client").map(str::to_owned),
        // An additional row shows that the response is truncated.
        limit: MAX_USAGE_ROWS + 1,
    };
    let (since, until) = (filter.since.rfc3339(), filter.until.rfc3339());
    let mut rows = history.usage(filter).await?;
    let is_truncated = rows.len() > MAX_USAGE_ROWS;
    rows.truncate(MAX_USAGE_ROWS);
    let usage: Vec<Value> = rows.iter().map(|row| usage_row_document(row, dimension)).collect();
    Ok(
        json!({"since": since, "until": until, "by": dimension_name, "usage": usage, "truncated": is_truncated}),
    )
}

/// Returns the document of one group of the usage sums.
fn usage_row_document(row: &UsageRow, dimension: UsageDimension) -> Value {
    let sums = row.sums;
    let group = if row.group.is_empty() { Value::Null } else { json!(row.group) };
    let mut document = json!({
        "attempts": sums.attempts,
        "served": sums.served,
        "failed": sums.attempts.saturating_sub(sums.served),
        "credits": sums.credits,
        "characters": sums.characters,
        "request_bytes": sums.request_bytes,
        "response_bytes": sums.response_bytes,
        "unpriced": sums.unpriced,
    });
    if let Some(members) = document.as_object_mut() {
        if dimension == UsageDimension::Key {
            members.insert("key_id".to_owned(), key_id(&row.group));
            members.insert("short_key".to_owned(), json!(row.short_key));
            members.insert("name".to_owned(), json!(row.key_name));
        } else {
            members.insert(dimension.as_str().to_owned(), group);
        }
    }
    document
}

/// Responds to `GET attempts`.
pub(in crate::admin::api) async fn read_attempts(
    history: &History,
    query: &Query,
) -> Result<Value, ApiError> {
    query.validate_names(&["limit", "before", "request_id", "failed"])?;
    let failed_only = match query.value("failed") {
        None | Some("false") => false,
        Some("true") => true,
        Some(_) => {
            let message = "The parameter `failed` must be true or false.";
            return Err(ApiError::bad_request("invalid_parameter", message));
        }
    };
    let page = history
        .attempts(AttemptFilter {
            limit: parse_limit(query)?,
            before: query.value("before").map(str::to_owned),
            request_id: query.value("request_id").map(str::to_owned),
            failed_only,
        })
        .await?;
    let attempts: Vec<Value> = page.attempts.iter().map(attempt_document).collect();
    Ok(json!({"attempts": attempts, "next": page.next}))
}

/// Returns the document of an attempt, in which the id of the key replaces its fingerprint.
fn attempt_document(attempt: &StoredAttempt) -> Value {
    let mut document = json!(attempt);
    if let Some(members) = document.as_object_mut() {
        members.remove("key_hash");
        members.remove("workspace");
        members.insert("key_id".to_owned(), key_id(&attempt.key_hash));
    }
    document
}

/// Returns the id of the key with this fingerprint, or `null` for a client's own key, whose fingerprint is not stored.
fn key_id(fingerprint: &str) -> Value {
    fingerprint.get(..KEY_ID_DIGITS).map_or(Value::Null, |id| json!(id))
}

/// Responds to `GET changes`.
pub(in crate::admin::api) async fn read_changes(history: &History, query: &Query) -> Result<Value, ApiError> {
    query.validate_names(&["limit", "before"])?;
    let limit = parse_limit(query)?;
    let mut changes = history.changes(query.value("before").map(str::to_owned), limit + 1).await?;
    let has_more = changes.len() > limit;
    changes.truncate(limit);
    let next = changes.last().filter(|_| has_more).map(|change| change.id.clone());
    let changes: Vec<Value> = changes.iter().map(change_document).collect();
    Ok(json!({"changes": changes, "next": next}))
}

/// Returns the document of a change.
pub(in crate::admin::api) fn change_document(change: &StoredChange) -> Value {
    let detail: Value = serde_json::from_str(&change.detail).unwrap_or(Value::Null);
    json!({
        "id": change.id,
        "at": change.at.rfc3339(),
        "actor": change.actor,
        "address": change.address,
        "action": change.action,
        "target": change.target,
        "detail": if detail.is_object() { detail } else { json!({}) },
        "generation": change.generation,
    })
}

/// Returns the number of rows that the query requests for a page.
fn parse_limit(query: &Query) -> Result<usize, ApiError> {
    let Some(text) = query.value("limit") else { return Ok(DEFAULT_LIMIT) };
    text.parse().ok().filter(|limit| (1..=MAX_LIMIT).contains(limit)).ok_or_else(|| {
        let message = format!("The parameter `limit` must be a whole number from 1 to {MAX_LIMIT}.");
        ApiError::bad_request("invalid_parameter", message)
    })
}

/// Parses the time in a parameter, which is a timestamp or a duration before `now`.
fn parse_time(query: &Query, name: &str, now: UnixMs) -> Result<Option<UnixMs>, ApiError> {
    let Some(text) = query.value(name) else { return Ok(None) };
    let ago = || duration::parse(text).ok().map(|elapsed| now.minus(elapsed));
    UnixMs::parse(text).or_else(ago).map(Some).ok_or_else(|| {
        let message = format!(
            "The parameter `{name}` must be a time such as 2026-12-01T00:00:00Z, or a duration such as 7d."
        );
        ApiError::bad_request("invalid_parameter", message)
    })
}
