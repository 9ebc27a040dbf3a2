//! The outbox of rows to be mirrored to Supabase: the latest state of each key, and attempts as events. A row
//! is inserted in the transaction of its attempt and deleted after its delivery, so a crash loses no row. The
//! mirror reads the rows through the writing thread, which owns the file.

mod tables;

use tokio::sync::{mpsc, oneshot};

use crate::policy::units::UnixMs;

pub(super) use tables::{put_event, put_event_again, put_key, run_command};

/// The rows that enter the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mirrored {
    /// None: there is no mirror.
    #[default]
    Nothing,
    /// The state of the keys.
    Keys,
    /// The state of the keys, and every attempt.
    KeysAndEvents,
}

/// The state of a key at a point in time.
#[derive(Clone, Debug, PartialEq)]
pub struct MirroredKeyState {
    /// The key's fingerprint, in hexadecimal digits.
    pub key_hash: String,
    /// The short form of the key.
    pub short_key: String,
    /// The status as a word.
    pub status: String,
    /// Credits spent in this period.
    pub count: i64,
    /// Credits of a period; 0 if unknown.
    pub limit: i64,
    /// Credits left.
    pub remaining: i64,
    /// The used share; above 1 with overage.
    pub usage: f64,
    /// Whether the included credits are used up.
    pub is_over_limit: bool,
    /// Whether its usage is near the limit.
    pub is_near_limit: bool,
    /// When the period ends.
    pub resets_at: Option<UnixMs>,
    /// When the state was observed. Later states of a key always have a later time, even if the
    /// clock was set back.
    pub observed_at: UnixMs,
}

/// An attempt of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// A UUID.
    pub id: String,
    /// The id of the request it belongs to.
    pub request_id: String,
    /// The number of the attempt within its request, from 1.
    pub number: i64,
    /// When it began.
    pub started_at: UnixMs,
    /// The name of the client.
    pub client: String,
    /// The key's fingerprint.
    pub key_hash: String,
    /// The workspace of the key.
    pub workspace: Option<String>,
    /// The HTTP method.
    pub method: String,
    /// The path with identifiers replaced.
    pub route: String,
    /// The provider's name of the model.
    pub model: Option<String>,
    /// The response status, if there was a response.
    pub status: Option<i64>,
    /// The verdict on the attempt, as a word.
    pub verdict: String,
    /// Bytes of the request body sent to the provider.
    pub request_bytes: i64,
    /// Bytes of the response body relayed to the client.
    pub response_bytes: i64,
    /// Characters of text converted to speech.
    pub characters: Option<i64>,
    /// Credits charged.
    pub credits: i64,
    /// The source of that number.
    pub credits_from: String,
    /// Milliseconds from the begin to the response head.
    pub first_byte_ms: Option<i64>,
    /// Milliseconds from the begin to the end.
    pub total_ms: i64,
    /// Number of changes of the attempt while it was in the outbox.
    pub revision: i64,
}

/// Rows of the mirror that an earlier version sent under an old key name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rename {
    /// The first digits of the old name. The full name may be a secret.
    pub beginning: String,
    /// The new name.
    pub key_hash: String,
}

/// The rows that are due.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Renames, to be sent before the other rows.
    pub renames: Vec<Rename>,
    /// At most one state per key.
    pub keys: Vec<MirroredKeyState>,
    /// In the order in which they began.
    pub events: Vec<Event>,
    /// Number of rows that Supabase refused and that are to be retried.
    pub refused: u64,
}

/// The identity of a row and its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowName {
    /// The state of a key, as of its time.
    Key {
        /// The key's fingerprint.
        key_hash: String,
        /// The time of the state: a later state is still to be sent.
        observed_at: UnixMs,
    },
    /// Rows to be renamed.
    Rename(Rename),
    /// An event in one of its revisions.
    Event {
        /// Its UUID.
        id: String,
        /// Its revision: a later one is still to be sent.
        revision: i64,
    },
}

/// A row that Supabase refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedRow {
    /// The row.
    pub name: RowName,
    /// The database's code for the reason.
    pub code: String,
    /// When the row is retried.
    pub until: UnixMs,
}

/// The results of a delivery.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivery {
    /// Delivered rows.
    pub sent: Vec<RowName>,
    /// Refused rows, which are not retried before their time.
    pub refused: Vec<RefusedRow>,
}

/// The usage records cannot be read or written now, or the writing thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the database cannot be used now")]
pub struct StoreClosed;

/// The mirror's handle to the outbox. The database stays open until it is dropped.
#[derive(Debug)]
pub struct Outbox {
    commands: mpsc::Sender<Command>,
}

/// A command of the mirror for the writing thread.
#[derive(Debug)]
pub(super) enum Command {
    Take { rows_max: usize, reply: oneshot::Sender<Batch> },
    Record { delivery: Delivery, reply: oneshot::Sender<u64> },
    ClearParked { reply: oneshot::Sender<()> },
}

impl Outbox {
    /// An outbox, and the receiver of its commands.
    pub(super) fn new() -> (Self, mpsc::Receiver<Command>) {
        // The mirror sends one command at a time.
        let (sender, commands) = mpsc::channel(1);
        (Self { commands: sender }, commands)
    }

    /// The rows that are due: at most `rows_max` keys and `rows_max` events. The state of the keys
    /// is computed now, because it can change by time alone.
    ///
    /// # Errors
    ///
    /// When the database cannot be used.
    pub async fn take(&self, rows_max: usize) -> Result<Batch, StoreClosed> {
        self.ask(|reply| Command::Take { rows_max, reply }).await
    }

    /// Records the results of a delivery; returns how many rows were refused for the first time.
    ///
    /// # Errors
    ///
    /// When the results cannot be recorded: the rows are then sent again, which changes nothing.
    pub async fn record(&self, delivery: Delivery) -> Result<u64, StoreClosed> {
        self.ask(|reply| Command::Record { delivery, reply }).await
    }

    /// Makes all refused rows due now.
    ///
    /// # Errors
    ///
    /// When the database cannot be used.
    pub async fn clear_parked(&self) -> Result<(), StoreClosed> {
        self.ask(|reply| Command::ClearParked { reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, StoreClosed> {
        let (reply, result) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| StoreClosed)?;
        // The writing thread reports an error by dropping the reply channel.
        result.await.map_err(|_| StoreClosed)
    }
}
