//! The rows of Supabase's tables, with the columns of each table as fields.

use serde::Serialize;

use crate::policy::units::UnixMs;
use crate::store::{Event, MirroredKeyState, RowName};

/// The maximum of an `INT` column. Larger numbers are reduced to it, because the database would
/// refuse the row.
const MAX_INT: i64 = i32::MAX as i64;
/// The maximum of a `DECIMAL(5,4)` column.
const MAX_SHARE: f64 = 9.9999;
/// The value of an unknown reset date. The column is `NOT NULL`, and `infinity` sorts after every
/// date.
const UNKNOWN_DATE: &str = "infinity";

/// A row that is sent to a table of Supabase.
pub(super) trait MirrorRow: Serialize {
    /// The name of the table.
    const TABLE: &'static str;
    /// The columns that identify a row (`on_conflict`).
    const CONFLICT: &'static str;
    /// The `Prefer` header: how an existing row is treated.
    const PREFER: &'static str;

    fn name(&self) -> RowName;
}

/// A row of `elevenlabs_key_usage`.
#[derive(Debug, Serialize)]
pub(super) struct KeyUsage {
    api_key_hash: String,
    short_key: String,
    character_count: i64,
    character_limit: i64,
    remaining_characters: i64,
    usage_percentage: f64,
    is_over_limit: bool,
    is_near_limit: bool,
    next_reset_date: String,
    status: String,
    last_checked: String,
    #[serde(skip)]
    observed_at: UnixMs,
}

impl From<MirroredKeyState> for KeyUsage {
    fn from(state: MirroredKeyState) -> Self {
        Self {
            api_key_hash: state.key_hash,
            short_key: state.short_key,
            character_count: state.count.min(MAX_INT),
            character_limit: state.limit.min(MAX_INT),
            remaining_characters: state.remaining.min(MAX_INT),
            usage_percentage: state.usage.clamp(0.0, MAX_SHARE),
            is_over_limit: state.is_over_limit,
            is_near_limit: state.is_near_limit,
            next_reset_date: state.resets_at.map_or_else(|| UNKNOWN_DATE.to_owned(), UnixMs::rfc3339),
            status: state.status,
            last_checked: state.observed_at.rfc3339(),
            observed_at: state.observed_at,
        }
    }
}

impl MirrorRow for KeyUsage {
    const TABLE: &'static str = "elevenlabs_key_usage";
    const CONFLICT: &'static str = "api_key_hash";
    const PREFER: &'static str = "resolution=merge-duplicates,return=minimal";

    fn name(&self) -> RowName {
        RowName::Key { key_hash: self.api_key_hash.clone(), observed_at: self.observed_at }
    }
}

/// A row of `elevenlabs_usage_events`.
#[derive(Debug, Serialize)]
pub(super) struct UsageEvent {
    id: String,
    request_id: String,
    attempt: i64,
    started_at: String,
    client: String,
    api_key_hash: String,
    workspace: Option<String>,
    method: String,
    route: String,
    model: Option<String>,
    status: Option<i64>,
    verdict: String,
    request_bytes: i64,
    response_bytes: i64,
    characters: Option<i64>,
    credits: i64,
    credits_from: String,
    first_byte_ms: Option<i64>,
    total_ms: i64,
    #[serde(skip)]
    revision: i64,
}

impl From<Event> for UsageEvent {
    fn from(event: Event) -> Self {
        Self {
            id: event.id,
            request_id: event.request_id,
            attempt: event.number.min(MAX_INT),
            started_at: event.started_at.rfc3339(),
            client: event.client,
            api_key_hash: event.key_hash,
            workspace: event.workspace,
            method: event.method,
            route: event.route,
            model: event.model,
            status: event.status,
            verdict: event.verdict,
            request_bytes: event.request_bytes,
            response_bytes: event.response_bytes,
            characters: event.characters,
            credits: event.credits,
            credits_from: event.credits_from,
            first_byte_ms: event.first_byte_ms,
            total_ms: event.total_ms,
            revision: event.revision,
        }
    }
}

impl MirrorRow for UsageEvent {
    const TABLE: &'static str = "elevenlabs_usage_events";
    const CONFLICT: &'static str = "id";
    // A row that is sent again is equal to the first, or contains the price that the first lacked.
    // A trigger in the database prevents a late repetition of the first row from removing the
    // price.
    const PREFER: &'static str = "resolution=merge-duplicates,return=minimal";

    fn name(&self) -> RowName {
        RowName::Event { id: self.id.clone(), revision: self.revision }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state() -> MirroredKeyState {
        MirroredKeyState {
            key_hash: "hash".to_owned(),
            short_key: "sk_6c036526...d452b".to_owned(),
            status: "active".to_owned(),
            count: 84_766,
            limit: 100_000,
            remaining: 15_234,
            usage: 0.84766,
            is_over_limit: false,
            is_near_limit: true,
            resets_at: Some(UnixMs(1_738_368_000_000)),
            observed_at: UnixMs(1_738_000_000_007),
        }
    }

    #[test]
    fn a_key_has_the_contracts_columns() {
        assert_eq!(
            serde_json::to_value(KeyUsage::from(state())).unwrap(),
            json!({
                "api_key_hash": "hash", "short_key": "sk_6c036526...d452b", "character_count": 84_766,
                "character_limit": 100_000, "remaining_characters": 15_234, "usage_percentage": 0.84766,
                "is_over_limit": false, "is_near_limit": true, "next_reset_date": "2025-02-01T00:00:00.000Z",
                "status": "active", "last_checked": "2025-01-27T17:46:40.007Z",
            })
        );
    }

    #[test]
    fn a_number_beyond_its_column_is_cut_and_not_refused() {
        let state = MirroredKeyState {
            count: i64::MAX,
            limit: 5_000_000_000,
            usage: 12.0,
            resets_at: None,
            ..state()
        };
        let row = serde_json::to_value(KeyUsage::from(state)).unwrap();
        assert_eq!((&row["character_count"], &row["character_limit"]), (&json!(i32::MAX), &json!(i32::MAX)));
        assert_eq!((&row["usage_percentage"], &row["next_reset_date"]), (&json!(9.9999), &json!("infinity")));
    }
}
