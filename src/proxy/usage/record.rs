//! The record of an attempt, and changes of owners, as the usage store gets them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use http::Method;
use uuid::{Builder, Uuid};

use crate::elevenlabs::affinity::Named;
use crate::elevenlabs::endpoint::Route;
use crate::policy::charge::Charge;
use crate::policy::client::ClientName;
use crate::policy::outcome::Outcome;
use crate::policy::units::UnixMs;
use crate::pool::{Key, LearnedOwner};

/// A change of the known owner of an identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnershipUpdate {
    /// The identifier belongs to a workspace.
    Recorded(LearnedOwner),
    /// The owner no longer has it.
    Forgotten(Named),
}

impl OwnershipUpdate {
    /// The identifier.
    #[must_use]
    pub fn named(&self) -> &Named {
        match self {
            Self::Recorded(owner) => &owner.named,
            Self::Forgotten(named) => named,
        }
    }
}

/// The usage record of one attempt. It never contains text, keys or tokens.
#[derive(Clone, Debug)]
pub struct AttemptRecord {
    /// Unique ID of the record; a second delivery with this ID is the same record.
    pub id: Uuid,
    /// ID of the request that the attempt belongs to.
    pub request_id: Arc<str>,
    /// Number of the attempt within the request, from 1.
    pub number: u32,
    /// When the attempt began.
    pub started_at: UnixMs,
    /// Name of the client that sent the request.
    pub client: ClientName,
    /// The key of the pool; `None` when the client has brought its own.
    pub key: Option<Arc<Key>>,
    /// The HTTP method, if HTTP defines it, or `other`.
    pub method: Method,
    /// The path with identifiers replaced.
    pub route: Route,
    /// The status of the response, if one was received.
    pub status: Option<u16>,
    /// How the attempt ended.
    pub outcome: Outcome,
    /// Bytes of body sent to the provider.
    pub request_bytes: u64,
    /// Bytes of body relayed to the client.
    pub response_bytes: u64,
    /// The provider's model ID, when the request named a model and was served.
    pub model: Option<Arc<str>>,
    /// Characters of text to speak, when the request was served and they could be counted.
    pub characters: Option<u64>,
    /// Duration of the audio that was sent over a socket to be transcribed.
    pub audio: Option<Duration>,
    /// Credits reserved in the workspace before the request was sent.
    pub credits_reserved: Option<u64>,
    /// Credits charged by the provider, as far as is known.
    pub credits: u64,
    /// The source of `credits`.
    pub credits_from: CreditSource,
    /// What the attempt charged to its client's quota.
    pub quota: QuotaCharge,
    /// Time from the beginning of the attempt to the head of the response.
    pub first_byte: Option<Duration>,
    /// Time from the beginning of the attempt to its end.
    pub total: Duration,
    /// Whether the attempt was recorded before without a price, and this record adds it. If that
    /// record was lost, this one stands for it.
    pub is_price: bool,
}

impl AttemptRecord {
    /// A new record ID for an attempt that begins at `started_at`: a UUID of version 7 with that
    /// timestamp. IDs that are generated later for the same timestamp are greater.
    #[must_use]
    pub fn name(started_at: UnixMs) -> Uuid {
        // A random part makes the IDs unique to this process. Within it they are counted from a
        // random start in the lower half of the range, which takes neither a lock nor a system
        // call.
        static RANDOM: LazyLock<u32> = LazyLock::new(|| fastrand::u32(..));
        static COUNT: LazyLock<AtomicU64> = LazyLock::new(|| fastrand::u64(..1 << 41).into());
        record_id(started_at, COUNT.fetch_add(1, Ordering::Relaxed), *RANDOM)
    }
}

/// A UUID of version 7: 48 bits of the timestamp, 42 bits of a counter within this process, and random
/// bits that differ between processes.
fn record_id(at: UnixMs, count: u64, random: u32) -> Uuid {
    let mut tail = [0; 10];
    tail[..2].copy_from_slice(&((count >> 30) as u16).to_be_bytes());
    tail[2..6].copy_from_slice(&(count as u32).to_be_bytes());
    tail[6..].copy_from_slice(&random.to_be_bytes());
    // It overwrites the bits of the version and of the variant, which the counter leaves free.
    Builder::from_unix_timestamp_millis(at.0, &tail).into_uuid()
}

/// What an attempt charged to its client's quota; after a restart, the client's usage is the sum of
/// these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaCharge {
    /// Requests: 1 for the attempt by which its request was counted, else 0.
    pub requests: u64,
    /// Credits: the known price, or the reservation when the price is unknown.
    pub credits: u64,
    /// Credits of the first delivery of the record, which `credits` replace.
    pub replaced: u64,
}

impl QuotaCharge {
    /// Adds a charge.
    pub fn add(&mut self, Charge { requests, credits }: Charge) {
        self.requests += requests;
        self.credits = self.credits.saturating_add(credits);
    }
}

/// The source of a number of credits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CreditSource {
    /// The provider reported it.
    Answer,
    /// The provider did not report it; it is the estimate made before.
    Estimate,
    /// The attempt is free.
    Free,
    /// The provider may have charged something, and the amount was not reported.
    Unknown,
}

impl CreditSource {
    /// The word in the usage store.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Answer => "answer",
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
    fn an_id_is_a_uuid_of_its_time() {
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
    fn ids_differ_and_are_in_order() {
        let at = |ms| move |_| AttemptRecord::name(UnixMs(ms));
        let names: Vec<Uuid> = (0..1_000).map(at(1_000)).chain((0..1_000).map(at(1_001))).collect();
        assert!(names.is_sorted());
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), 2_000);
    }
}
