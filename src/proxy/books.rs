//! What the proxy writes down.

mod queue;

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::policy::affinity::Named;
use crate::policy::client::ClientName;
use crate::policy::units::UnixMs;
use crate::pool::{Key, Lesson};

pub(crate) use queue::Place;
pub use queue::{Books, Depth, NoPlace, Queue};

/// One entry for the books.
#[derive(Debug)]
pub enum Entry {
    /// What became of an attempt.
    Attempt(Box<AttemptRecord>),
    /// What has become known of whose identifiers are.
    Owners(Vec<Ownership>),
    /// Keys have changed without an attempt: their state is to be written.
    KeysChanged,
}

/// A change of what is known of an identifier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// It belongs to a workspace.
    Learned(Lesson),
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
    pub method: Arc<str>,
    /// The path with identifiers replaced.
    pub route: Arc<str>,
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
    /// Credits set aside before it was sent.
    pub credits_reserved: Option<u64>,
    /// Credits charged, as far as is known.
    pub credits: u64,
    /// How that is known.
    pub credits_from: CreditSource,
    /// From the begin to the head of the answer.
    pub first_byte: Option<Duration>,
    /// From the begin to the end.
    pub total: Duration,
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
