//! Usage records on their way to the usage store, grouped: the fields that many records share are
//! stored once, and each record is a row of plain values.
//!
//! A batch is filled by the thread that made the record, which has its fields at hand. The writer
//! thread reads contiguous rows, and frees no memory that other threads have allocated.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use uuid::Uuid;

use super::{AttemptRecord, CreditSource, OwnershipUpdate, QuotaCharge};
use crate::elevenlabs::endpoint::Route;
use crate::policy::client::ClientName;
use crate::policy::outcome::Outcome;
use crate::policy::units::UnixMs;
use crate::pool::Key;

/// Fields that many attempts share: client, endpoint, key and outcome. They are those of
/// [`AttemptRecord`].
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "they are told where a record is")]
pub struct UsageDimensions {
    pub client: ClientName,
    pub key: Option<Arc<Key>>,
    pub method: Method,
    pub route: Route,
    pub model: Option<Arc<str>>,
    pub status: Option<u16>,
    pub outcome: Outcome,
    pub credits_from: CreditSource,
}

/// Fields of a single attempt.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "they are told where a record is")]
pub struct UsageRow {
    pub id: Uuid,
    pub number: u32,
    pub started_at: UnixMs,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub characters: Option<u64>,
    pub audio_ms: Option<u64>,
    pub credits_reserved: Option<u64>,
    pub credits: u64,
    pub quota: QuotaCharge,
    pub first_byte_ms: Option<u64>,
    pub total_ms: u64,
    /// Whether the attempt was written before, and this delivery adds its price.
    pub is_price: bool,
    common: u32,
    /// Offset and length of the request's ID within `request_ids`.
    request_id: (u32, u32),
}

/// Slots of the cache that finds existing dimensions by a hash of the record.
const KINDS: usize = 256;
/// Maximum row capacity of a batch that is reused; a batch that a burst made larger is freed.
const ROWS_KEPT_MAX: usize = 8_192;

/// Usage records and ownership changes.
#[derive(Debug)]
pub struct UsageBatch {
    commons: Vec<UsageDimensions>,
    /// Index of the last dimensions of each hash. Two kinds of records may share a slot: then
    /// dimensions are stored repeatedly, which changes nothing.
    places: [u32; KINDS],
    rows: Vec<UsageRow>,
    request_ids: String,
    owners: Vec<OwnershipUpdate>,
    /// Number of ownership records, which have one or more changes each.
    ownership_permit: usize,
}

impl Default for UsageBatch {
    fn default() -> Self {
        Self {
            commons: Vec::new(),
            places: [0; KINDS],
            rows: Vec::new(),
            request_ids: String::new(),
            owners: Vec::new(),
            ownership_permit: 0,
        }
    }
}

impl UsageBatch {
    /// Adds the record of an attempt.
    pub fn add(&mut self, record: &AttemptRecord) {
        self.push(record, false);
    }

    /// Adds the price of an attempt that was written without one. If it was not written, it is
    /// stored as a new record.
    pub fn price(&mut self, record: &AttemptRecord) {
        self.push(record, true);
    }

    fn push(&mut self, record: &AttemptRecord, is_price: bool) {
        let common = self.common_of(record);
        let begin = self.request_ids.len() as u32;
        self.request_ids.push_str(&record.request_id);
        self.rows.push(UsageRow {
            id: record.id,
            number: record.number,
            started_at: record.started_at,
            request_bytes: record.request_bytes,
            response_bytes: record.response_bytes,
            characters: record.characters,
            audio_ms: record.audio.map(millis),
            credits_reserved: record.credits_reserved,
            credits: record.credits,
            quota: record.quota,
            first_byte_ms: record.first_byte.map(millis),
            total_ms: millis(record.total),
            is_price,
            common,
            request_id: (begin, record.request_id.len() as u32),
        });
    }

    fn common_of(&mut self, record: &AttemptRecord) -> u32 {
        let place = &mut self.places[kind(record)];
        if !self.commons.get(*place as usize).is_some_and(|common| common.is_of(record)) {
            *place = self.commons.len() as u32;
            self.commons.push(UsageDimensions::of(record));
        }
        *place
    }

    /// Adds ownership changes.
    pub fn record_ownership(&mut self, changes: Vec<OwnershipUpdate>) {
        self.owners.extend(changes);
        self.ownership_permit += 1;
    }

    /// The records, in the order in which they were added.
    #[must_use]
    pub fn rows(&self) -> &[UsageRow] {
        &self.rows
    }

    /// The ownership changes, in the order in which they were added.
    #[must_use]
    pub fn owners(&self) -> &[OwnershipUpdate] {
        &self.owners
    }

    /// The shared fields of the records. Equal ones may be stored more than once.
    #[must_use]
    pub fn commons(&self) -> &[UsageDimensions] {
        &self.commons
    }

    /// The index in [`commons`](Self::commons) and the request ID of a row of this batch.
    #[must_use]
    pub fn of(&self, row: &UsageRow) -> (usize, &str) {
        let (begin, length) = row.request_id;
        let end = begin.saturating_add(length);
        (row.common as usize, self.request_ids.get(begin as usize..end as usize).unwrap_or_default())
    }

    /// Whether there are no records and no ownership changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.owners.is_empty()
    }

    /// Number of entries: usage records and ownership records.
    #[must_use]
    pub fn entries(&self) -> u64 {
        (self.rows.len() + self.ownership_permit) as u64
    }

    /// Drops all but the first `rows` records.
    pub fn keep(&mut self, rows: usize) {
        self.rows.truncate(rows);
    }

    /// Drops the ownership changes.
    pub fn forget_owners(&mut self) {
        self.owners.clear();
    }

    /// Empties the batch for reuse.
    #[must_use]
    pub fn cleared(mut self) -> Self {
        if self.rows.capacity().max(self.owners.capacity()) > ROWS_KEPT_MAX {
            return Self::default();
        }
        self.commons.clear();
        self.rows.clear();
        self.request_ids.clear();
        self.owners.clear();
        self.ownership_permit = 0;
        self
    }
}

impl UsageDimensions {
    fn of(record: &AttemptRecord) -> Self {
        Self {
            client: record.client.clone(),
            key: record.key.clone(),
            method: record.method.clone(),
            route: record.route,
            model: record.model.clone(),
            status: record.status,
            outcome: record.outcome,
            credits_from: record.credits_from,
        }
    }

    fn is_of(&self, record: &AttemptRecord) -> bool {
        let key = |key: &Option<Arc<Key>>| key.as_ref().map(Arc::as_ptr);
        key(&self.key) == key(&record.key)
            && self.status == record.status
            && self.credits_from == record.credits_from
            && self.outcome == record.outcome
            && self.client == record.client
            && self.route == record.route
            && self.method == record.method
            && self.model == record.model
    }
}

/// A slot below [`KINDS`]: a hash of the fields in which records mostly differ and which are cheap
/// to read.
fn kind(record: &AttemptRecord) -> usize {
    let key = record.key.as_ref().map_or(0, |key| Arc::as_ptr(key).addr() as u64);
    let model = record.model.as_ref().map_or(0, |model| model.len() as u64);
    let method = record.method.as_str().len() as u64;
    let mixed =
        key ^ record.route.mixed() ^ model << 40 ^ method << 48 ^ u64::from(record.status.unwrap_or(0)) << 52;
    // The upper bits of the product depend on all lower ones (Fibonacci hashing).
    (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize % KINDS
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::queue::tests::record;
    use super::*;

    fn routes(sheet: &UsageBatch) -> Vec<(Route, &str)> {
        let of = |row| {
            let (common, request_id) = sheet.of(row);
            (sheet.commons()[common].route, request_id)
        };
        sheet.rows().iter().map(of).collect()
    }

    #[test]
    fn what_records_have_in_common_is_there_once_and_each_finds_its_own() {
        let mut sheet = UsageBatch::default();
        let [one, other] = ["/v1/voices", "/v1/models"].map(Route::read);
        let records = [one, other].map(|route| AttemptRecord { route, ..record() });
        for turn in 0..100 {
            let record = &records[turn % 2];
            sheet.add(&AttemptRecord { request_id: turn.to_string().into(), ..record.clone() });
        }
        // The two routes may hash to the same slot and replace each other in it.
        assert!(sheet.commons().len() <= 100);
        let found = routes(&sheet);
        assert_eq!((found[0], found[1], found[99]), ((one, "0"), (other, "1"), (other, "99")));

        let mut sheet = sheet.cleared();
        assert!(sheet.is_empty());
        (0..100).for_each(|_| sheet.add(&records[1]));
        assert_eq!((sheet.commons().len(), sheet.entries()), (1, 100));
        assert_eq!(routes(&sheet)[99], (other, "request"));
    }

    #[test]
    fn what_differs_in_anything_has_something_else_in_common() {
        let different = [
            record(),
            AttemptRecord { client: ClientName::new("phone"), ..record() },
            AttemptRecord { method: Method::PUT, ..record() },
            AttemptRecord { route: Route::read("/v1/models"), ..record() },
            AttemptRecord { model: Some("".into()), ..record() },
            AttemptRecord { status: None, ..record() },
            AttemptRecord { status: Some(500), ..record() },
            AttemptRecord { outcome: Outcome::Shutdown, ..record() },
            AttemptRecord { credits_from: CreditSource::Answer, ..record() },
        ];
        let mut sheet = UsageBatch::default();
        different.iter().for_each(|record| sheet.add(record));
        assert_eq!(sheet.commons().len(), different.len());
    }
}
