//! What the proxy writes down, and the sending half of the queue that takes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use uuid::Uuid;

use crate::policy::affinity::Named;
use crate::policy::client::ClientName;
use crate::policy::units::UnixMs;
use crate::pool::{Key, Lesson};

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
    /// How long the sound was that was sent to be written down, when it was a socket for that.
    pub audio: Option<Duration>,
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

/// How many records are on their way: sent, and not yet written or lost. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Depth(Arc<AtomicU64>);

impl Depth {
    /// So many.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// So many are on their way.
    pub fn sent(&self, records: u64) {
        self.0.fetch_add(records, Ordering::AcqRel);
    }

    /// So many have arrived, in the books or nowhere.
    pub fn arrived(&self, records: u64) {
        self.0.fetch_sub(records, Ordering::AcqRel);
    }
}

/// The sending half. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Books {
    queue: mpsc::Sender<Entry>,
    depth: Depth,
}

/// A place in the queue, taken before the provider is asked, so that what was charged is never
/// without a place to be written.
#[derive(Debug)]
pub(crate) struct Place {
    permit: mpsc::OwnedPermit<Entry>,
    depth: Depth,
}

/// The queue stayed full, or nobody reads it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue of the books is full")]
pub struct NoPlace;

/// How long a request waits for a place. A full queue means a disk that does not keep up; a
/// quick refusal tells more than a long silence.
const PLACE_WAIT_MAX: Duration = Duration::from_millis(50);

impl Books {
    /// Books that are written by whoever reads the other end of `queue`, and tells `depth` what has
    /// arrived.
    #[must_use]
    pub fn new(queue: mpsc::Sender<Entry>, depth: Depth) -> Self {
        Self { queue, depth }
    }

    /// Takes a place in the queue.
    pub(crate) async fn place(&self) -> Result<Place, NoPlace> {
        let waiting = self.queue.clone().reserve_owned();
        match tokio::time::timeout(PLACE_WAIT_MAX, waiting).await {
            Ok(Ok(permit)) => Ok(Place { permit, depth: self.depth.clone() }),
            Ok(Err(_)) | Err(_) => Err(NoPlace),
        }
    }

    /// Has the state of the keys written. A full queue is about to write it anyway.
    pub fn keys_changed(&self) {
        let _ = self.queue.try_send(Entry::KeysChanged);
    }
}

impl Place {
    /// Writes.
    pub(crate) fn write(self, record: AttemptRecord) {
        self.depth.sent(1);
        self.permit.send(Entry::Attempt(Box::new(record)));
    }

    /// Writes down whose identifiers are.
    pub(crate) fn teach(self, changes: Vec<Ownership>) {
        if !changes.is_empty() {
            self.permit.send(Entry::Owners(changes));
        }
    }
}
