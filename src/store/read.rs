//! Reads the stored state of the keys and the usage of the clients, which startup restores. `report` reads the state of
//! a key with the same function for commands.

use rusqlite::{Connection, Row};

use super::columns::{timestamp, unsigned};
use super::evidence::{self, StoredEvidence};
use crate::policy::client::ClientName;
use crate::policy::client_quota::Period;
use crate::policy::quota::{Extension, Quota};
use crate::policy::units::UnixMs;
use crate::pool::RestoredKey;
use crate::proxy::UsageTotals;
use crate::secret::Fingerprint;

/// Returns the stored state of each key.
pub(super) fn keys(connection: &Connection) -> Result<Vec<RestoredKey>, rusqlite::Error> {
    let mut statement = connection.prepare(
        "SELECT key_hash, character_count, character_limit, extension, resets_at_ms, evidence, plan FROM keys",
    )?;
    let rows = statement.query_map([], |row| {
        let tier = row.get(6)?;
        Ok(read_key(row)?.map(|key| RestoredKey { tier, ..key }))
    })?;
    // An unreadable row is skipped, because the provider reports the state again.
    rows.filter_map(Result::transpose).collect()
}

/// Returns the usage of each client in the periods that contain `now`: the sums of the quota that its attempts used,
/// by the same rule as the counters in memory (`policy::charge`).
pub(super) fn client_usage(
    connection: &Connection,
    now: UnixMs,
) -> Result<Vec<UsageTotals>, rusqlite::Error> {
    let [day, month, ever] = Period::ALL.map(|period| timestamp(period.start(now)));
    let mut statement = connection.prepare(
        "SELECT client,
            sum(quota_requests * (hour_ms >= ?1)), sum(quota_requests * (hour_ms >= ?2)),
            sum(quota_requests * (hour_ms >= ?3)), sum(quota_credits * (hour_ms >= ?1)),
            sum(quota_credits * (hour_ms >= ?2)), sum(quota_credits * (hour_ms >= ?3))
         FROM hours GROUP BY client",
    )?;
    let rows = statement.query_map(rusqlite::params![day, month, ever], |row| {
        let amount = |index| row.get(index).map(unsigned);
        Ok(UsageTotals {
            client: ClientName::new(&row.get::<_, String>(0)?),
            requests: [amount(1)?, amount(2)?, amount(3)?],
            credits: [amount(4)?, amount(5)?, amount(6)?],
        })
    })?;
    rows.collect()
}

/// Reads a key from the first six columns of [`keys`], without the plan.
pub(super) fn read_key(row: &Row<'_>) -> Result<Option<RestoredKey>, rusqlite::Error> {
    let hash: String = row.get(0)?;
    let amount = |index| -> Result<Option<u64>, rusqlite::Error> {
        Ok(row.get::<_, Option<i64>>(index)?.and_then(|amount| u64::try_from(amount).ok()))
    };
    let extension = match row.get::<_, Option<i64>>(3)? {
        Some(-1) => Extension::Unlimited,
        Some(credits) => u64::try_from(credits).map_or(Extension::None, Extension::Credits),
        None => Extension::None,
    };
    let StoredEvidence { key_evidence, workspace_evidence } = evidence::from_json(&row.get::<_, String>(5)?);
    let Some(fingerprint) = Fingerprint::parse(&hash) else { return Ok(None) };
    Ok(Some(RestoredKey {
        fingerprint,
        quota: Quota {
            count: amount(1)?.unwrap_or(0),
            limit: amount(2)?,
            extension,
            resets_at: amount(4)?.map(UnixMs),
        },
        tier: None,
        key_evidence,
        workspace_evidence,
    }))
}
