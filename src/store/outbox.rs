//! Gives the mirror access to the outbox. The outbox contains the rows that the mirror has yet to send to Supabase: the
//! latest state of each key, attempts as events, and renames of keys. An event is inserted in the transaction of its
//! attempt and deleted after its delivery, so a crash loses no event. The mirror reads the rows, records its deliveries
//! and releases refused rows by commands to the writer thread, which owns the database.

mod tables;

use tokio::sync::{mpsc, oneshot};

use crate::policy::units::UnixMs;

pub(super) use tables::{put_changed_event, put_event, put_key, run_command};

/// The rows that enter the outbox.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MirrorScope {
    /// No rows, because the mirror is off.
    #[default]
    Nothing,
    /// The state of the keys.
    Keys,
    /// The state of the keys, and every attempt as an event.
    KeysAndEvents,
}

/// The state of a key at a point in time.
#[derive(Clone, Debug, PartialEq)]
pub struct MirroredKeyState {
    /// The key's fingerprint, in hexadecimal digits.
    pub key_hash: String,
    /// The short form of the key.
    pub short_key: String,
    /// The name of the key's status.
    pub status: String,
    /// Credits that the workspace has spent in this period.
    pub count: i64,
    /// Credits that the workspace has in a period, or 0 if the number is unknown.
    pub limit: i64,
    /// Credits that the workspace has left.
    pub remaining: i64,
    /// The fraction of the credits that is used. It is above 1 with overage.
    pub usage: f64,
    /// Whether the included credits are exhausted.
    pub is_over_limit: bool,
    /// Whether the usage is near the limit.
    pub is_near_limit: bool,
    /// The time at which the period ends, or `None` if it is unknown.
    pub resets_at: Option<UnixMs>,
    /// The time at which the state was observed. A later state of a key always has a later time, even if the clock was
    /// set back.
    pub observed_at: UnixMs,
}

/// An attempt, as the mirror sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptEvent {
    /// The id of the attempt, a UUID.
    pub id: String,
    /// The id of the request that the attempt belongs to.
    pub request_id: String,
    /// The number of the attempt within its request, from 1.
    pub number: i64,
    /// The time at which the attempt started.
    pub started_at: UnixMs,
    /// The name of the client that sent the request.
    pub client: String,
    /// The key's fingerprint, or `own` for a client's own key.
    pub key_hash: String,
    /// The configured workspace of the key, or `None` if none is configured.
    pub workspace: Option<String>,
    /// The HTTP method.
    pub method: String,
    /// The path with `{id}` instead of identifiers.
    pub route: String,
    /// The provider's name of the model, or `None` if the request names none.
    pub model: Option<String>,
    /// The response status, if there was a response.
    pub status: Option<i64>,
    /// The name of the attempt's outcome.
    pub verdict: String,
    /// Bytes of the request body sent to the provider.
    pub request_bytes: i64,
    /// Bytes of the response body relayed to the client.
    pub response_bytes: i64,
    /// Characters of text converted to speech, or `None` if they are unknown.
    pub characters: Option<i64>,
    /// Credits charged, or their estimate, or 0 if both are unknown.
    pub credits: i64,
    /// The source of `credits`: `answer`, `estimate`, `free` or `unknown`.
    pub credits_from: String,
    /// Milliseconds from the start of the attempt to the head of the response, or `None` without a response.
    pub first_byte_ms: Option<i64>,
    /// Milliseconds from the start of the attempt to its end.
    pub total_ms: i64,
    /// The fingerprint of the end user, if the client named one.
    pub user: Option<String>,
    /// The region of ElevenLabs, or the host of another provider. It is `None` in rows of earlier versions.
    pub region: Option<String>,
    /// Number of changes of the attempt while it was in the outbox.
    pub revision: i64,
}

/// A rename of the rows of a key that an earlier version sent under an old name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRename {
    /// The first digits of the old name. The whole name may be a secret.
    pub old_prefix: String,
    /// The key's fingerprint, which is the new name.
    pub key_hash: String,
}

/// The rows of the outbox that are due to be sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OutboxBatch {
    /// The renames of keys, which are sent before the other rows.
    pub renames: Vec<KeyRename>,
    /// The states of keys, at most one per key.
    pub keys: Vec<MirroredKeyState>,
    /// The events, in the order in which their attempts started.
    pub events: Vec<AttemptEvent>,
    /// Number of rows that Supabase has refused and that will be retried.
    pub refused: u64,
}

/// Identifies a version of a row, so that the delivery of an old version does not count for a newer one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowVersion {
    /// The state of a key.
    Key {
        /// The key's fingerprint.
        key_hash: String,
        /// The time at which the state was observed.
        observed_at: UnixMs,
    },
    /// A rename, which never changes.
    Rename(KeyRename),
    /// An attempt that is mirrored as an event.
    Event {
        /// The id of the attempt.
        id: String,
        /// The revision of the event.
        revision: i64,
    },
}

/// A row that Supabase refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedRow {
    /// The refused row.
    pub row: RowVersion,
    /// The error code of Supabase's database.
    pub code: String,
    /// The time at which the row is retried.
    pub retry_at: UnixMs,
}

/// The results of a delivery.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeliveryReport {
    /// The rows that Supabase has accepted.
    pub sent: Vec<RowVersion>,
    /// The rows that Supabase has refused. Each of them is retried separately, at its retry time.
    pub refused: Vec<RefusedRow>,
}

/// The error of a command: the database cannot be used now, or the writer thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the database cannot be used now")]
pub struct StoreUnavailable;

/// The mirror's handle to the outbox. The database stays open until the handle is dropped.
#[derive(Debug)]
pub struct Outbox {
    commands: mpsc::Sender<OutboxCommand>,
}

/// A command of the mirror to the writer thread.
#[derive(Debug)]
pub(super) enum OutboxCommand {
    /// Reads the rows that are due, see [`Outbox::next_batch`].
    NextBatch { max_rows: usize, reply: oneshot::Sender<OutboxBatch> },
    /// Records the results of a delivery, see [`Outbox::record_delivery`].
    RecordDelivery { report: DeliveryReport, reply: oneshot::Sender<u64> },
    /// Makes the refused rows due, see [`Outbox::release_refused`].
    ReleaseRefused { reply: oneshot::Sender<()> },
}

impl Outbox {
    /// Creates an outbox and the receiver of its commands.
    pub(super) fn new() -> (Self, mpsc::Receiver<OutboxCommand>) {
        // The mirror sends one command at a time.
        let (sender, commands) = mpsc::channel(1);
        (Self { commands: sender }, commands)
    }

    /// Returns at most `max_rows` renames, keys and events each that are due to be sent. This call computes the state
    /// of the keys, because it can change with time alone.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be used.
    pub async fn next_batch(&self, max_rows: usize) -> Result<OutboxBatch, StoreUnavailable> {
        self.send(|reply| OutboxCommand::NextBatch { max_rows, reply }).await
    }

    /// Records the results of a delivery, and returns the number of rows that were refused for the first time.
    ///
    /// # Errors
    ///
    /// Fails when the results cannot be recorded. The rows are then sent again, which is idempotent.
    pub async fn record_delivery(&self, report: DeliveryReport) -> Result<u64, StoreUnavailable> {
        self.send(|reply| OutboxCommand::RecordDelivery { report, reply }).await
    }

    /// Makes all refused rows due before their retry times.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be used.
    pub async fn release_refused(&self) -> Result<(), StoreUnavailable> {
        self.send(|reply| OutboxCommand::ReleaseRefused { reply }).await
    }

    async fn send<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> OutboxCommand,
    ) -> Result<T, StoreUnavailable> {
        let (reply, result) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| StoreUnavailable)?;
        // On an error the writer thread drops the reply channel.
        result.await.map_err(|_| StoreUnavailable)
    }
}
