//! Stores the common dimensions of many attempts (client, route, model, key, outcome) once, as a
//! numbered series that each attempt refers to: this saves four fifths of the bytes and of the
//! work.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use http::Method;
use rusqlite::{Connection, OptionalExtension, params};

use super::rows::{OWN_KEY, moment};
use crate::elevenlabs::endpoint::Route;
use crate::policy::client::ClientName;
use crate::policy::units::UnixMs;
use crate::proxy::{CreditSource, UsageDimensions};
use crate::secret::Fingerprint;

/// Maximum series cached; a client that invents model names must not fill the memory.
const KNOWN_MAX: usize = 10_000;

/// A series, with the columns of its row.
#[derive(Debug)]
pub(super) struct Dimensions {
    pub(super) number: i64,
    /// The begin of the latest hour in which it was used: it is deleted after its last attempt.
    used_at: UnixMs,
    key: Option<Fingerprint>,
    /// The fingerprint in hexadecimal digits, or [`OWN_KEY`].
    pub(super) key_hash: String,
    pub(super) client: ClientName,
    workspace: Option<String>,
    method: Method,
    route: Route,
    pub(super) route_text: String,
    pub(super) model: Option<Arc<str>>,
    status: Option<u16>,
    verdict: &'static str,
    credits_from: CreditSource,
}

/// Cache of the series used through a connection, which saves queries.
#[derive(Debug, Default)]
pub(super) struct Known {
    series: Vec<Dimensions>,
    /// Indices of series, by a hash of the fields that usually differ.
    places: HashMap<u64, Vec<usize>>,
    hasher: RandomState,
}

impl std::ops::Index<usize> for Known {
    type Output = Dimensions;

    fn index(&self, place: usize) -> &Dimensions {
        &self.series[place]
    }
}

impl Known {
    /// Empties the cache, after a failed transaction or removed rows.
    pub(super) fn clear(&mut self) {
        self.series.clear();
        self.places.clear();
    }

    /// Bounds the cache. Call it only while no index into the cache is in use.
    pub(super) fn stay_small(&mut self) {
        if self.series.len() > KNOWN_MAX {
            self.clear();
        }
    }

    /// The index of the series of attempts that began in `hour`; a new series is inserted. After a
    /// failure, or when its transaction is rolled back, [`clear`](Self::clear) must follow.
    pub(super) fn of(
        &mut self,
        connection: &Connection,
        common: &UsageDimensions,
        hour: UnixMs,
    ) -> Result<usize, rusqlite::Error> {
        let workspace = common.key.as_ref().map(|key| key.workspace().membership());
        let workspace = workspace.as_ref().and_then(|belonging| belonging.name());
        let hash = self.hash(common);
        let places = self.places.entry(hash).or_default();
        let known = places.iter().position(|&place| self.series[place].is_of(common, workspace));
        if let Some(known) = known {
            let series = &mut self.series[places[known]];
            if hour <= series.used_at || series.is_used_at(connection, hour)? {
                return Ok(places[known]);
            }
            // Another program has removed the row.
            places.swap_remove(known);
        }
        let series = Dimensions::written(connection, common, workspace, hour)?;
        places.push(self.series.len());
        self.series.push(series);
        Ok(self.series.len() - 1)
    }

    /// Hashes few fields: most of the time goes into hashing, and the other fields are compared
    /// anyway.
    fn hash(&self, common: &UsageDimensions) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(common.client.as_str().as_bytes());
        common.route.hash(&mut hasher);
        hasher.write(common.model.as_deref().unwrap_or_default().as_bytes());
        // Keys are compared by their address.
        hasher.write_usize(common.key.as_ref().map_or(0, |key| Arc::as_ptr(key).addr()));
        hasher.finish()
    }
}

impl Dimensions {
    fn is_of(&self, common: &UsageDimensions, workspace: Option<&str>) -> bool {
        self.key == fingerprint(common)
            && self.client == common.client
            && self.workspace.as_deref() == workspace
            && self.method == common.method
            && self.route == common.route
            && self.model == common.model
            && self.status == common.status
            && self.verdict == common.outcome.word()
            && self.credits_from == common.credits_from
    }

    /// Records that the series is used in this hour; false if its row no longer exists.
    fn is_used_at(&mut self, connection: &Connection, hour: UnixMs) -> Result<bool, rusqlite::Error> {
        self.used_at = hour;
        let sql = "UPDATE series SET used_at_ms = max(used_at_ms, ?2) WHERE number = ?1";
        let updated = connection.prepare_cached(sql)?.execute(params![self.number, moment(hour)])?;
        Ok(updated == 1)
    }

    /// Finds the series in the file, or inserts it.
    fn written(
        connection: &Connection,
        common: &UsageDimensions,
        workspace: Option<&str>,
        hour: UnixMs,
    ) -> Result<Self, rusqlite::Error> {
        let key = fingerprint(common);
        let mut series = Self {
            number: 0,
            used_at: hour,
            key,
            key_hash: key.map_or_else(|| OWN_KEY.to_owned(), |key| key.to_string()),
            client: common.client.clone(),
            workspace: workspace.map(str::to_owned),
            method: common.method.clone(),
            route: common.route,
            route_text: common.route.to_string(),
            model: common.model.clone(),
            status: common.status,
            verdict: common.outcome.word(),
            credits_from: common.credits_from,
        };
        let columns = params![
            series.client.as_str(),
            series.key_hash,
            series.workspace,
            series.method.as_str(),
            series.route_text,
            series.model.as_deref(),
            series.status,
            series.verdict,
            series.credits_from.word(),
        ];
        let found = connection
            .prepare_cached(
                "SELECT number FROM series
                 WHERE client = ?1 AND key_hash = ?2 AND workspace IS ?3 AND method = ?4 AND route = ?5
                    AND model IS ?6 AND status IS ?7 AND verdict = ?8 AND credits_from = ?9",
            )?
            .query_row(columns, |row| row.get(0))
            .optional()?;
        if let Some(number) = found {
            series.number = number;
            series.is_used_at(connection, hour)?;
            return Ok(series);
        }
        connection
            .prepare_cached(
                "INSERT INTO series (client, key_hash, workspace, method, route, model, status, verdict, credits_from,
                    used_at_ms)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            )?
            .execute(params![
                series.client.as_str(),
                series.key_hash,
                series.workspace,
                series.method.as_str(),
                series.route_text,
                series.model.as_deref(),
                series.status,
                series.verdict,
                series.credits_from.word(),
                moment(hour),
            ])?;
        series.number = connection.last_insert_rowid();
        Ok(series)
    }
}

/// The fingerprint of the pool key of the attempt; a client's own key is not recorded.
fn fingerprint(common: &UsageDimensions) -> Option<Fingerprint> {
    common.key.as_ref().map(|key| key.api_key().fingerprint())
}
