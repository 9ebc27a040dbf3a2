//! What the books say of the keys when the program starts.

use rusqlite::{Connection, Row};

use super::rows::{OWN_KEY, moment};
use crate::policy::allowance::Period;
use crate::policy::budget::{Extension, Quota};
use crate::policy::client::ClientName;
use crate::policy::standing::{Park, ParkReason};
use crate::policy::units::UnixMs;
use crate::pool::Remembered;
use crate::proxy::Used;
use crate::secret::Fingerprint;

pub(super) fn remembered(connection: &Connection) -> Result<Vec<Remembered>, rusqlite::Error> {
    let mut statement = connection.prepare(
        "SELECT key_hash, character_count, character_limit, extension, resets_at_ms,
                park_reason, park_until_ms, workspace_park_reason, workspace_park_until_ms
         FROM keys",
    )?;
    let rows = statement.query_map([], |row| Ok(remembered_key(row)))?;
    // A row that says nothing sensible is as good as none: the provider will tell.
    rows.filter_map(|row| row.and_then(|row| row).transpose()).collect()
}

/// What each client has used of the pool in the periods of `now`. An hour's requests count when
/// something was charged in it, or may have been.
pub(super) fn used(connection: &Connection, now: UnixMs) -> Result<Vec<Used>, rusqlite::Error> {
    let [day, month, ever] = Period::ALL.map(|period| moment(period.begin(now)));
    let mut statement = connection.prepare(
        "SELECT client,
            sum(requests * (hour_ms >= ?1)), sum(requests * (hour_ms >= ?2)), sum(requests * (hour_ms >= ?3)),
            sum(credits * (hour_ms >= ?1)), sum(credits * (hour_ms >= ?2)), sum(credits * (hour_ms >= ?3))
         FROM (SELECT client, hour_ms, credits, served * (credits > 0 OR unpriced > 0) AS requests
               FROM hours WHERE key_hash <> ?4)
         GROUP BY client",
    )?;
    let rows = statement.query_map(rusqlite::params![day, month, ever, OWN_KEY], |row| {
        let amount = |index| row.get::<_, i64>(index).map(|amount| u64::try_from(amount).unwrap_or(0));
        Ok(Used {
            client: ClientName::new(&row.get::<_, String>(0)?),
            requests: [amount(1)?, amount(2)?, amount(3)?],
            credits: [amount(4)?, amount(5)?, amount(6)?],
        })
    })?;
    rows.collect()
}

pub(super) fn remembered_key(row: &Row<'_>) -> Result<Option<Remembered>, rusqlite::Error> {
    let hash: String = row.get(0)?;
    let amount = |index| -> Result<Option<u64>, rusqlite::Error> {
        Ok(row.get::<_, Option<i64>>(index)?.and_then(|amount| u64::try_from(amount).ok()))
    };
    let extension = match row.get::<_, Option<i64>>(3)? {
        Some(-1) => Extension::Unlimited,
        Some(more) => u64::try_from(more).map_or(Extension::None, Extension::Credits),
        None => Extension::None,
    };
    let park = |index| -> Result<Option<Park>, rusqlite::Error> {
        let reason = row.get::<_, Option<String>>(index)?.as_deref().and_then(reason);
        Ok(reason.zip(amount(index + 1)?).map(|(reason, until)| Park { reason, until: UnixMs(until) }))
    };
    let Some(fingerprint) = Fingerprint::parse(&hash) else { return Ok(None) };
    Ok(Some(Remembered {
        fingerprint,
        quota: Quota {
            count: amount(1)?.unwrap_or(0),
            limit: amount(2)?,
            extension,
            resets_at: amount(4)?.map(UnixMs),
        },
        park: park(5)?,
        workspace_park: park(7)?,
    }))
}

const REASONS: [(ParkReason, &str); 4] = [
    (ParkReason::RateLimited, "rate_limited"),
    (ParkReason::Exhausted, "exhausted"),
    (ParkReason::Billing, "billing"),
    (ParkReason::Invalid, "invalid"),
];

fn reason(word: &str) -> Option<ParkReason> {
    REASONS.iter().find(|(_, name)| *name == word).map(|(reason, _)| *reason)
}

/// The word for a reason in the books.
pub(super) fn reason_word(reason: ParkReason) -> &'static str {
    match reason {
        ParkReason::RateLimited => REASONS[0].1,
        // Nobody is parked for being short; it is noticed again.
        ParkReason::Exhausted | ParkReason::Short => REASONS[1].1,
        ParkReason::Billing => REASONS[2].1,
        ParkReason::Invalid => REASONS[3].1,
    }
}
