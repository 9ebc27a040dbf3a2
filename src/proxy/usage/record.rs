//! Defines the data that the usage store receives: usage records of attempts, and ownership updates.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use http::Method;
use uuid::{Builder, Uuid};

use crate::elevenlabs::affinity::Identifier;
use crate::elevenlabs::endpoint::Route;
use crate::policy::authority::Authority;
use crate::policy::charge::Charge;
use crate::policy::client::ClientName;
use crate::policy::outcome::Outcome;
use crate::policy::units::UnixMs;
use crate::pool::{Key, OwnershipEntry};
use crate::proxy::client_usage::RequestUser;

/// A change of the known owner of an identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnershipUpdate {
    /// The identifier belongs to a workspace.
    Recorded(OwnershipEntry),
    /// The recorded owner does not have the resource.
    Removed(Identifier),
}

impl OwnershipUpdate {
    /// Returns the identifier whose owner changes.
    #[must_use]
    pub fn identifier(&self) -> &Identifier {
        match self {
            Self::Recorded(entry) => &entry.identifier,
            Self::Removed(identifier) => identifier,
        }
    }
}

/// The usage record of one attempt. It contains neither the text of the request nor a token.
#[derive(Clone, Debug)]
pub struct AttemptRecord {
    /// Unique ID of the record. A second delivery with the same ID updates the same record.
    pub id: Uuid,
    /// ID of the request that the attempt belongs to.
    pub request_id: Arc<str>,
    /// Number of the attempt within the request, from 1.
    pub number: u32,
    /// The time at which the attempt started.
    pub started_at: UnixMs,
    /// Name of the client that sent the request.
    pub client: ClientName,
    /// The end user that the request names. It keeps the user's counters in memory until the record is written.
    pub user: Option<RequestUser>,
    /// The host to which the attempt was sent.
    pub authority: Arc<Authority>,
    /// The key of the pool, or `None` if the client's own key was used.
    pub key: Option<Arc<Key>>,
    /// The HTTP method, or `other` for an extension method.
    pub method: Method,
    /// The path, with its identifiers replaced.
    pub route: Route,
    /// The status of the response, if one was received.
    pub status: Option<u16>,
    /// The result of the attempt.
    pub outcome: Outcome,
    /// Bytes of the request body sent to the provider, or bytes that the client sent in a WebSocket session.
    pub request_bytes: u64,
    /// Bytes of the response body relayed to the client, or bytes that the provider sent in a WebSocket session.
    pub response_bytes: u64,
    /// The provider's model ID, if the request named a model and was served.
    pub model: Option<Arc<str>>,
    /// Characters of text to speak, if the request was served and the characters could be counted.
    pub characters: Option<u64>,
    /// Duration of the audio that was sent for transcription in a WebSocket session.
    pub audio: Option<Duration>,
    /// Credits reserved in the workspace before the request was sent, or `None` if no credits were reserved.
    pub credits_reserved: Option<u64>,
    /// Credits charged by the provider, or their estimate, or 0 if both are unknown.
    pub credits: u64,
    /// The source of `credits`.
    pub credits_from: CreditSource,
    /// The charge of the attempt to the client's quota.
    pub quota: QuotaCharge,
    /// Time from the start of the attempt to the response head, or to the first useful message of a WebSocket session.
    pub first_byte: Option<Duration>,
    /// Time from the start of the attempt to its end.
    pub total: Duration,
    /// Whether this record adds the price to an earlier record with the same ID. If the earlier record was
    /// lost, this record replaces it.
    pub is_price_update: bool,
}

impl AttemptRecord {
    /// Generates a record ID for an attempt that starts at `started_at`: a UUID of version 7 with that
    /// timestamp. IDs that are generated later for the same timestamp are greater.
    #[must_use]
    pub fn new_id(started_at: UnixMs) -> Uuid {
        // A random part makes the IDs unique to this process. Within the process, they are counted from a
        // random start in the lower half of the range, without a lock or a system call.
        static RANDOM: LazyLock<u32> = LazyLock::new(|| fastrand::u32(..));
        static COUNT: LazyLock<AtomicU64> = LazyLock::new(|| fastrand::u64(..1 << 41).into());
        record_id(started_at, COUNT.fetch_add(1, Ordering::Relaxed), *RANDOM)
    }
}

/// Returns a UUID of version 7: 48 bits of the timestamp, 42 bits of a counter within this process, and random bits
/// that differ between processes.
fn record_id(timestamp: UnixMs, count: u64, random: u32) -> Uuid {
    let mut random_bytes = [0; 10];
    random_bytes[..2].copy_from_slice(&((count >> 30) as u16).to_be_bytes());
    random_bytes[2..6].copy_from_slice(&(count as u32).to_be_bytes());
    random_bytes[6..].copy_from_slice(&random.to_be_bytes());
    // The builder overwrites the bits of the version and the variant, which the counter does not use.
    Builder::from_unix_timestamp_millis(timestamp.0, &random_bytes).into_uuid()
}

/// The charge of an attempt to its client's quota. After a restart, the client's usage is the sum of these charges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaCharge {
    /// Requests: 1 for the attempt by which the request was counted, otherwise 0.
    pub requests: u64,
    /// Credits: the known price, or the reservation when the price is unknown.
    pub credits: u64,
    /// Credits in the first delivery of the record, which `credits` replaces.
    pub replaced: u64,
}

impl QuotaCharge {
    /// Adds a charge of the same attempt.
    pub fn add(&mut self, Charge { requests, credits }: Charge) {
        self.requests += requests;
        self.credits = self.credits.saturating_add(credits);
    }
}

/// The source of a number of credits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CreditSource {
    /// The provider reported the credits.
    Reported,
    /// The provider did not report the credits. They are estimated from the request, or from the text of a session.
    Estimate,
    /// The attempt cost nothing.
    Free,
    /// The provider may have charged an amount that it did not report.
    Unknown,
}

impl CreditSource {
    /// Returns the name in the usage store.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reported => "answer",
            Self::Estimate => "estimate",
            Self::Free => "free",
            Self::Unknown => "unknown",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_record_id_is_a_uuid_with_its_timestamp() {
        for (ms, count, random, expected) in [
            (0, 0, 0, "00000000-0000-7000-8000-000000000000"),
            (0x0198_c2f0_7b1a, 1, 2, "0198c2f0-7b1a-7000-8000-000100000002"),
            (1, (1 << 42) - 1, u32::MAX, "00000000-0001-7fff-bfff-ffffffffffff"),
            (1, 1 << 42, 0, "00000000-0001-7000-8000-000000000000"),
            (u64::MAX, 1 << 30, 0, "ffffffff-ffff-7001-8000-000000000000"),
        ] {
            let id = record_id(UnixMs(ms), count, random);
            assert_eq!(id.to_string(), expected);
            assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
        }
    }

    #[test]
    fn record_ids_are_unique_and_ordered() {
        let new_id_at = |ms| move |_| AttemptRecord::new_id(UnixMs(ms));
        let ids: Vec<Uuid> =
            (0..1_000).map(new_id_at(1_000)).chain((0..1_000).map(new_id_at(1_001))).collect();
        assert!(ids.is_sorted());
        assert_eq!(ids.iter().collect::<HashSet<_>>().len(), 2_000);
    }
}
