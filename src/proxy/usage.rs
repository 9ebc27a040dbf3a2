//! What the proxy writes down.

mod batch;
mod queue;

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use http::Method;
use uuid::Uuid;

use crate::policy::affinity::Named;
use crate::policy::charge::Charge;
use crate::policy::client::ClientName;
use crate::policy::endpoint::Route;
use crate::policy::retention::first_id;
use crate::policy::units::UnixMs;
use crate::pool::{Key, LearnedOwner};

pub use batch::{UsageBatch, UsageDimensions, UsageRow};
pub use queue::{Depth, QueueFull, UsagePermit, UsageQueue, UsageSink};

/// A change of what is known of an identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OwnershipUpdate {
    /// It belongs to a workspace.
    Learned(LearnedOwner),
    /// Its owner no longer has it.
    Forgotten(Named),
}

/// What became of one attempt. Never a text, a key or a token.
#[derive(Clone, Debug)]
pub struct AttemptRecord {
    /// Its own name; a second delivery of it is the same record.
    pub id: Uuid,
    /// The request it belongs to.
    pub request_id: Arc<str>,
    /// Which attempt of the request it was, from 1.
    pub number: u32,
    /// When it began.
    pub started_at: UnixMs,
    /// Who asked.
    pub client: ClientName,
    /// With which key of the pool; `None` when the client has brought its own.
    pub key: Option<Arc<Key>>,
    /// The method.
    pub method: Method,
    /// The path with identifiers replaced.
    pub route: Route,
    /// The status, if an answer came.
    pub status: Option<u16>,
    /// What became of it, in a word.
    pub verdict: &'static str,
    /// Bytes of body sent to the provider.
    pub request_bytes: u64,
    /// Bytes of body relayed to the client.
    pub response_bytes: u64,
    /// The provider's name of the model, when it was asked for one and has served.
    pub model: Option<Arc<str>>,
    /// Characters of text to be spoken, when it has served and they could be counted.
    pub characters: Option<u64>,
    /// How long the sound was that was sent to be written down, when it was a socket for that.
    pub audio: Option<Duration>,
    /// Credits set aside before it was sent.
    pub credits_reserved: Option<u64>,
    /// Credits charged, as far as is known.
    pub credits: u64,
    /// How that is known.
    pub credits_from: CreditSource,
    /// What it took from its client's quota.
    pub quota: QuotaCharge,
    /// From the begin to the head of the answer.
    pub first_byte: Option<Duration>,
    /// From the begin to the end.
    pub total: Duration,
}

impl AttemptRecord {
    /// A new name for a record that begins at `started_at`: a UUID of version 7 of that moment. What is
    /// named later in it is greater.
    #[must_use]
    pub fn name(started_at: UnixMs) -> Uuid {
        // Chance makes the names of this run its own. Within it they are counted, from anywhere in the
        // lower half, which takes neither a lock nor a call of the system.
        static CHANCE: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(0));
        static COUNT: LazyLock<AtomicU64> = LazyLock::new(|| (RandomState::new().hash_one(0) >> 23).into());
        RecordId { at: started_at, count: COUNT.fetch_add(1, Ordering::Relaxed), chance: *CHANCE as u32 }.id()
    }
}

/// What a record's id is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordId {
    /// The moment: 48 bits of it.
    pub at: UnixMs,
    /// Which of this run of the program it is: 42 bits.
    pub count: u64,
    /// What tells this run from others.
    pub chance: u32,
}

impl RecordId {
    /// The id, with version and variant between its parts.
    #[must_use]
    pub fn id(self) -> Uuid {
        let Self { at, count, chance } = self;
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&first_id(at));
        bytes[6..8].copy_from_slice(&(0x7000 | (count >> 30) as u16 & 0x0fff).to_be_bytes());
        bytes[8..12].copy_from_slice(&(0x8000_0000 | count as u32 & 0x3fff_ffff).to_be_bytes());
        bytes[12..].copy_from_slice(&chance.to_be_bytes());
        Uuid::from_bytes(bytes)
    }

    /// What an id is made of, if it is one of ours.
    #[must_use]
    pub fn of(id: Uuid) -> Option<Self> {
        let (upper, lower) = id.as_u64_pair();
        let name = Self {
            at: UnixMs(upper >> 16),
            count: (upper & 0x0fff) << 30 | (lower >> 32) & 0x3fff_ffff,
            chance: lower as u32,
        };
        (name.id() == id).then_some(name)
    }
}

/// What an attempt took from its client's quota; the sums of these are the client's count after a restart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QuotaCharge {
    /// Requests: 1 for the attempt by which its request counted, else 0.
    pub requests: u64,
    /// Credits: the price that is known, or what was reserved when it is not.
    pub credits: u64,
    /// Credits that the record had when it was first delivered, and that `credits` replace.
    pub replaced: u64,
}

impl QuotaCharge {
    /// Adds a charge.
    pub fn add(&mut self, Charge { requests, credits }: Charge) {
        self.requests += requests;
        self.credits = self.credits.saturating_add(credits);
    }
}

/// Where a figure of credits comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreditSource {
    /// The answer said it.
    Answer,
    /// The answer did not, and it is what was expected before.
    Estimate,
    /// Nothing is charged for this.
    Free,
    /// Something may have been charged, and nobody said how much.
    Unknown,
}

impl CreditSource {
    /// The word in the books.
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
    fn a_name_is_a_uuid_of_its_moment() {
        for (ms, count, chance, expected) in [
            (0, 0, 0, "00000000-0000-7000-8000-000000000000"),
            (0x0198_c2f0_7b1a, 1, 2, "0198c2f0-7b1a-7000-8000-000100000002"),
            (1, (1 << 42) - 1, u32::MAX, "00000000-0001-7fff-bfff-ffffffffffff"),
            (1, 1 << 42, 0, "00000000-0001-7000-8000-000000000000"),
            (u64::MAX, 1 << 30, 0, "ffffffff-ffff-7001-8000-000000000000"),
        ] {
            let id = RecordId { at: UnixMs(ms), count, chance }.id();
            assert_eq!(id.to_string(), expected);
            assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
            let at = UnixMs(ms & ((1 << 48) - 1));
            assert_eq!(RecordId::of(id), Some(RecordId { at, count: count & ((1 << 42) - 1), chance }));
        }
        assert_eq!([Uuid::nil(), Uuid::max()].map(RecordId::of), [None; 2]);
    }

    #[test]
    fn names_differ_and_are_in_the_order_in_which_they_were_given() {
        let at = |ms| move |_| AttemptRecord::name(UnixMs(ms));
        let names: Vec<Uuid> = (0..1_000).map(at(1_000)).chain((0..1_000).map(at(1_001))).collect();
        assert!(names.is_sorted());
        assert_eq!(names.iter().collect::<HashSet<_>>().len(), 2_000);
    }
}
