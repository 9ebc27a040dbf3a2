//! What Supabase is still to be told: the latest state of each key, and events. Rows enter in the
//! transaction of the attempt they come from and leave when they have arrived, so that nothing is
//! forgotten in between. The mirror asks for them through the writing thread: one thread has the file.

mod tables;

use tokio::sync::{mpsc, oneshot};

use crate::policy::units::UnixMs;

pub(super) use tables::{answer, put_event, put_event_again, put_key};

/// What enters the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mirrored {
    /// Nothing: there is no mirror.
    #[default]
    Nothing,
    /// The state of the keys.
    Keys,
    /// The state of the keys, and every attempt.
    KeysAndEvents,
}

/// The state of a key at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyState {
    /// The key's fingerprint, in hexadecimal digits.
    pub key_hash: String,
    /// What may be shown of it.
    pub short_key: String,
    /// The word of its status.
    pub status: String,
    /// Credits spent in this period.
    pub count: i64,
    /// Credits of a period; 0 when unknown.
    pub limit: i64,
    /// Credits left.
    pub remaining: i64,
    /// The share that is used; above 1 with overage.
    pub usage: f64,
    /// Whether the included credits are used up.
    pub is_over_limit: bool,
    /// Whether its use has come near the limit.
    pub is_near_limit: bool,
    /// When the period ends.
    pub resets_at: Option<UnixMs>,
    /// When this was so. Later states of a key always have a later moment, whatever the clock did.
    pub observed_at: UnixMs,
}

/// An attempt of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// A UUID.
    pub id: String,
    /// The request it belongs to.
    pub request_id: String,
    /// Which attempt of the request it was, from 1.
    pub number: i64,
    /// When it began.
    pub started_at: UnixMs,
    /// Who asked.
    pub client: String,
    /// The key's fingerprint.
    pub key_hash: String,
    /// The workspace of the key.
    pub workspace: Option<String>,
    /// The method.
    pub method: String,
    /// The path with identifiers replaced.
    pub route: String,
    /// The provider's name of the model.
    pub model: Option<String>,
    /// The status, if an answer came.
    pub status: Option<i64>,
    /// What became of it, in a word.
    pub verdict: String,
    /// Bytes of body sent to the provider.
    pub request_bytes: i64,
    /// Bytes of body relayed to the client.
    pub response_bytes: i64,
    /// Characters of text to be spoken.
    pub characters: Option<i64>,
    /// Credits charged.
    pub credits: i64,
    /// How that is known.
    pub credits_from: String,
    /// Milliseconds from the begin to the head of the answer.
    pub first_byte_ms: Option<i64>,
    /// Milliseconds from the begin to the end.
    pub total_ms: i64,
    /// How often it has changed while it waited in the outbox.
    pub revision: i64,
}

/// Rows of the mirror that an earlier version has sent, and that are called otherwise since.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rename {
    /// The first digits of what they are called. The rest may be a secret.
    pub beginning: String,
    /// What they are to be called.
    pub key_hash: String,
}

/// What is due.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// To be done before the rest is sent.
    pub renames: Vec<Rename>,
    /// At most one a key.
    pub keys: Vec<KeyState>,
    /// In the order in which they began.
    pub events: Vec<Event>,
    /// Rows that Supabase has refused, and which wait to be tried again.
    pub refused: u64,
}

/// Which row, in a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowName {
    /// The state of a key, at its moment.
    Key {
        /// The key's fingerprint.
        key_hash: String,
        /// The moment of the state: a later one is still to be sent.
        observed_at: UnixMs,
    },
    /// Rows to be renamed.
    Rename(Rename),
    /// An event, as it was then.
    Event {
        /// Its UUID.
        id: String,
        /// Its revision: a later one is still to be sent.
        revision: i64,
    },
}

/// A row that Supabase does not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedRow {
    /// Which.
    pub name: RowName,
    /// The database's code for the reason.
    pub code: String,
    /// When it is tried again.
    pub until: UnixMs,
}

/// What became of rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// They have arrived.
    pub sent: Vec<RowName>,
    /// They have not, and are not tried again for a while.
    pub refused: Vec<RefusedRow>,
}

/// The books cannot be read or written just now, or not any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the books cannot be used now")]
pub struct Unavailable;

/// The mirror's hold on the outbox. The books stay open until it is dropped.
#[derive(Debug)]
pub struct Outbox {
    commands: mpsc::Sender<Command>,
}

/// What the writing thread is asked.
#[derive(Debug)]
pub(super) enum Command {
    Take { rows_max: usize, reply: oneshot::Sender<Batch> },
    Settle { delivery: Delivery, reply: oneshot::Sender<u64> },
    Forgive { reply: oneshot::Sender<()> },
}

impl Outbox {
    /// An outbox, and the end at which its questions arrive.
    pub(super) fn new() -> (Self, mpsc::Receiver<Command>) {
        // One question at a time.
        let (commands, questions) = mpsc::channel(1);
        (Self { commands }, questions)
    }

    /// What is due, at most so many keys and so many events. The keys are as they stand now, also
    /// when only time has changed them.
    ///
    /// # Errors
    ///
    /// When the books cannot be used.
    pub async fn take(&self, rows_max: usize) -> Result<Batch, Unavailable> {
        self.ask(|reply| Command::Take { rows_max, reply }).await
    }

    /// Notes what became of rows; returns how many of the refused are so for the first time.
    ///
    /// # Errors
    ///
    /// When it could not be noted: the rows are sent again, which changes nothing.
    pub async fn settle(&self, delivery: Delivery) -> Result<u64, Unavailable> {
        self.ask(|reply| Command::Settle { delivery, reply }).await
    }

    /// Has all refused rows tried again now.
    ///
    /// # Errors
    ///
    /// When the books cannot be used.
    pub async fn forgive(&self) -> Result<(), Unavailable> {
        self.ask(|reply| Command::Forgive { reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Unavailable> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| Unavailable)?;
        // An error is answered by silence.
        answer.await.map_err(|_| Unavailable)
    }
}
