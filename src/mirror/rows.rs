//! Defines the two tables in Supabase, and converts the rows of the outbox to their columns.

use serde_json::{Value, json};

use crate::policy::units::UnixMs;
use crate::store::{AttemptEvent, MirroredKeyState, RowVersion};

/// Maximum of an `INT` column. Larger numbers are clamped to it, because the database would refuse the
/// row.
const MAX_INT: i64 = i32::MAX as i64;
/// Maximum of a `DECIMAL(5,4)` column.
const MAX_RATIO: f64 = 9.9999;
/// The value of an unknown reset date. The column is `NOT NULL`, and `infinity` sorts after every date.
const UNKNOWN_DATE: &str = "infinity";

/// A row that is sent to a table of Supabase.
pub(super) trait MirrorRow {
    /// The name of the table.
    const TABLE: &'static str;
    /// The column that identifies a row (`on_conflict`).
    const CONFLICT: &'static str;

    /// Returns the columns and their values.
    fn to_json(&self) -> Value;

    /// Returns the version of the row in the outbox.
    fn version(&self) -> RowVersion;
}

impl MirrorRow for MirroredKeyState {
    const TABLE: &'static str = "elevenlabs_key_usage";
    const CONFLICT: &'static str = "api_key_hash";

    fn to_json(&self) -> Value {
        json!({
            "api_key_hash": self.key_hash,
            "short_key": self.short_key,
            "character_count": self.count.min(MAX_INT),
            "character_limit": self.limit.min(MAX_INT),
            "remaining_characters": self.remaining.min(MAX_INT),
            "usage_percentage": self.usage.clamp(0.0, MAX_RATIO),
            "is_over_limit": self.is_over_limit,
            "is_near_limit": self.is_near_limit,
            "next_reset_date": self.resets_at.map_or_else(|| UNKNOWN_DATE.to_owned(), UnixMs::rfc3339),
            "status": self.status,
            "last_checked": self.observed_at.rfc3339(),
        })
    }

    fn version(&self) -> RowVersion {
        RowVersion::Key { key_hash: self.key_hash.clone(), observed_at: self.observed_at }
    }
}

impl MirrorRow for AttemptEvent {
    const TABLE: &'static str = "elevenlabs_usage_events";
    const CONFLICT: &'static str = "id";

    fn to_json(&self) -> Value {
        json!({
            "id": self.id,
            "request_id": self.request_id,
            "attempt": self.number.min(MAX_INT),
            "started_at": self.started_at.rfc3339(),
            "client": self.client,
            "api_key_hash": self.key_hash,
            "workspace": self.workspace,
            "method": self.method,
            "route": self.route,
            "model": self.model,
            "status": self.status,
            "verdict": self.verdict,
            "request_bytes": self.request_bytes,
            "response_bytes": self.response_bytes,
            "characters": self.characters,
            "credits": self.credits,
            "credits_from": self.credits_from,
            "first_byte_ms": self.first_byte_ms,
            "total_ms": self.total_ms,
            "user_hash": self.user,
            "region": self.region,
        })
    }

    fn version(&self) -> RowVersion {
        RowVersion::Event { id: self.id.clone(), revision: self.revision }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_state() -> MirroredKeyState {
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
    fn a_key_row_has_the_documented_columns() {
        assert_eq!(
            key_state().to_json(),
            json!({
                "api_key_hash": "hash", "short_key": "sk_6c036526...d452b", "character_count": 84_766,
                "character_limit": 100_000, "remaining_characters": 15_234, "usage_percentage": 0.84766,
                "is_over_limit": false, "is_near_limit": true, "next_reset_date": "2025-02-01T00:00:00.000Z",
                "status": "active", "last_checked": "2025-01-27T17:46:40.007Z",
            })
        );
    }

    #[test]
    fn a_number_beyond_its_column_is_clamped_and_an_unknown_date_is_infinite() {
        let extreme_state = MirroredKeyState {
            count: i64::MAX,
            limit: 5_000_000_000,
            usage: 12.0,
            resets_at: None,
            ..key_state()
        };
        let row = extreme_state.to_json();
        assert_eq!((&row["character_count"], &row["character_limit"]), (&json!(i32::MAX), &json!(i32::MAX)));
        assert_eq!((&row["usage_percentage"], &row["next_reset_date"]), (&json!(9.9999), &json!("infinity")));
    }
}
