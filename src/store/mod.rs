//! Stores attempts and the sums of their usage, the state of keys, refusals, the owners of identifiers, the changes of
//! operators and the id of the replica in an SQLite database. Requests put records into a bounded queue and do not wait
//! for the commit: one writer thread commits the records. Records that cannot be written are kept in memory and
//! retried, up to [`Settings::max_queued_records`]. Further records are dropped, counted and logged.
//!
//! Startup reads the database through [`Store`], the admin API, the dashboard and the quotas of users through
//! [`History`], commands through [`UsageReader`], and the mirror through [`Outbox`].

mod lock;
mod origin;

mod open;
mod schema;
mod snapshot;
mod temporary;
mod upgrade;

mod database;
mod key_names;
mod read;

mod write;

mod transaction;

mod attempts;
mod changes;
mod columns;
mod days;
mod evidence;
mod outbox;
mod owners;
mod refusals;
mod replica;
mod source;
mod users;

mod maintenance;

mod history;
mod report;
mod stored_attempt;
mod usage_sums;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::elevenlabs::affinity::RetentionLimits;
use crate::policy::retention::Retention;
use crate::policy::units::UnixMs;
use crate::pool::{OwnershipEntry, Pool, RefusalRecord, RestoredKey};
use crate::proxy::{QueueDepth, UsageSink, UsageTotals};
use crate::secret::ApiKey;
use crate::tasks;

pub use changes::{OfflineChanges, StoredChange};
use database::Database;
pub use history::{AttemptFilter, AttemptPage, History, HistoryError, HourOfKey, UsageFilter, UsageRow};
use lock::{DatabaseLockError, Lock};
use open::{IntegrityCheck, OpenDatabase};
pub use open::{OpenError, check_location};
use origin::Origin;
pub use outbox::{
    AttemptEvent, DeliveryReport, KeyRename, MirrorScope, MirroredKeyState, Outbox, OutboxBatch, RefusedRow,
    RowVersion, StoreUnavailable,
};
pub use refusals::{refusal_from_json, refusal_to_json};
pub use report::{
    AttemptQuery, DatabaseInspection, DatabaseIntegrity, FailureCount, ReadError, StoredKey, UsageGroup,
    UsageReader,
};
pub use snapshot::{Backup, ExistingFile, SnapshotError, back_up};
pub use stored_attempt::StoredAttempt;
pub use upgrade::{MigrateError, MigrationOutcome, MigrationReport, dry_run_migration, migrate};
pub use usage_sums::{UsageDimension, UsageSums};
use write::{Writer, WriterChannels};

/// The location of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseLocation {
    /// The database is the file at this path.
    File(PathBuf),
    /// The database is in memory, so its records are lost when Keychoir exits.
    Memory,
}

/// The limits and intervals of the usage store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Maximum number of records in the queue, and maximum number of records kept in memory while the database cannot
    /// be written.
    pub max_queued_records: usize,
    /// Maximum time from the start of one commit to the start of the next while records arrive.
    pub commit_interval: Duration,
    /// The retention of attempts and hourly sums.
    pub retention: Retention,
    /// The rows that enter the outbox.
    pub mirror_scope: MirrorScope,
    /// Maximum number and age of the stored owners of identifiers.
    pub owner_limits: RetentionLimits,
}

/// Counters and state of the usage store, shared by all clones.
#[derive(Clone, Debug, Default)]
pub struct Health {
    counters: Arc<HealthCounters>,
    depth: QueueDepth,
}

#[derive(Debug, Default)]
struct HealthCounters {
    is_failing: AtomicBool,
    lost_records: AtomicU64,
    written_records: AtomicU64,
    write_errors: AtomicU64,
    /// The time at which the oldest unwritten record left the queue, in Unix milliseconds. It is 0 if no record that
    /// left the queue is unwritten.
    unwritten_since: AtomicU64,
}

impl Health {
    /// Returns whether the last write or other command of the writer thread failed, or the database is not open yet.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.counters.is_failing.load(Ordering::Acquire)
    }

    /// Returns the number of records that were dropped because the database could not be written: while the buffer in
    /// memory was full, or at shutdown.
    #[must_use]
    pub fn lost_records(&self) -> u64 {
        self.counters.lost_records.load(Ordering::Acquire)
    }

    /// Returns the number of records that are in the queue or kept for a retry.
    #[must_use]
    pub fn unwritten_records(&self) -> u64 {
        self.depth.records()
    }

    /// Returns the number of records written after Keychoir started.
    #[must_use]
    pub fn written_records(&self) -> u64 {
        self.counters.written_records.load(Ordering::Relaxed)
    }

    /// Returns the number of writes that failed after Keychoir started.
    #[must_use]
    pub fn write_errors(&self) -> u64 {
        self.counters.write_errors.load(Ordering::Relaxed)
    }

    /// Returns the time from when the oldest unwritten record left the queue to `now`, or zero if there is none.
    #[must_use]
    pub fn lag(&self, now: UnixMs) -> Duration {
        match self.counters.unwritten_since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            unix_ms => now.since(UnixMs(unix_ms)),
        }
    }

    fn set_unwritten_since(&self, time: UnixMs) {
        self.counters.unwritten_since.store(time.0, Ordering::Relaxed);
    }

    fn count_written(&self, records: usize) {
        self.set_unwritten_since(UnixMs(0));
        self.counters.written_records.fetch_add(records as u64, Ordering::Relaxed);
        self.depth.remove_records(records as u64);
    }

    fn count_lost(&self, records: usize) {
        self.counters.lost_records.fetch_add(records as u64, Ordering::AcqRel);
        self.depth.remove_records(records as u64);
    }

    fn count_error(&self) {
        self.counters.write_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Sets [`is_failing`](Self::is_failing), and returns its previous value.
    fn set_failing(&self, is_failing: bool) -> bool {
        self.counters.is_failing.swap(is_failing, Ordering::AcqRel)
    }
}

/// The database before its writer thread starts. It is open, or a temporary error prevented opening it and the
/// writer will open it.
#[derive(Debug)]
pub struct Store {
    location: LockableLocation,
    database: Result<Database, OpenError>,
    /// The new path of a corrupt file that was renamed, or `None` if no file was renamed.
    quarantined_path: Option<PathBuf>,
}

/// A handle to the running writer thread.
#[derive(Debug)]
pub struct WriterHandle {
    /// The counters and state of the usage store.
    pub health: Health,
    /// The outbox, if rows are mirrored. The database stays open until the outbox is dropped.
    pub outbox: Option<Outbox>,
    /// Reads stored records, and stores the changes of operators.
    pub history: History,
    all_written: oneshot::Receiver<()>,
    closed: oneshot::Receiver<()>,
}

impl Store {
    /// Opens or creates the database, and locks it until the writer ends. A corrupt database of Keychoir is
    /// renamed, and a new one is created. A temporary error, such as a full disk or a lock held by another SQLite
    /// connection, is not returned: records are kept in memory until the database can be written.
    ///
    /// # Errors
    ///
    /// Fails when the path cannot be used, another process has the database open, the file belongs to another program,
    /// a newer version of Keychoir has written it, or it needs an upgrade and cannot be copied first.
    pub fn open(location: &DatabaseLocation, now: UnixMs) -> Result<Self, OpenError> {
        let mut location = LockableLocation::from(location.clone());
        match location.open(now, IntegrityCheck::Quick) {
            Ok(OpenDatabase { database, quarantined_path }) => {
                Ok(Self { location, database: Ok(database), quarantined_path })
            }
            Err(error) if error.is_temporary() => {
                Ok(Self { location, database: Err(error), quarantined_path: None })
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the new path of the corrupt file that [`open`](Self::open) renamed, if it renamed one.
    #[must_use]
    pub fn quarantined_path(&self) -> Option<&PathBuf> {
        self.quarantined_path.as_ref()
    }

    /// Renames the rows of `keys` that an earlier version stored under other names. Must be called before
    /// the rows are read. If the database is not open yet, the writer renames the rows when it opens the database.
    pub fn rename_keys<'k>(&mut self, keys: impl Iterator<Item = &'k ApiKey>) {
        if let Ok(database) = &mut self.database {
            database.rename_keys(keys);
        }
    }

    /// Reads the stored state of the keys. Returns an empty list if the database is not open.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read.
    pub fn read_keys(&self) -> Result<Vec<RestoredKey>, rusqlite::Error> {
        self.read(read::keys)
    }

    /// Reads the refusals from which restrictions are computed, the oldest first. Returns an empty list if the database
    /// is not open.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read.
    pub fn read_refusals(&self) -> Result<Vec<RefusalRecord>, rusqlite::Error> {
        self.read(refusals::read)
    }

    /// Reads the owners of identifiers: first those of created resources, in the order of their last use, then those of
    /// identifiers that every request creates. Returns an empty list if the database is not open.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read.
    pub fn read_owners(&self) -> Result<Vec<OwnershipEntry>, rusqlite::Error> {
        self.read(owners::read)
    }

    /// Reads the usage of each client in the periods that contain `now`, without the hours whose sums were deleted.
    /// Returns an empty list if the database is not open.
    ///
    /// # Errors
    ///
    /// Fails when the file cannot be read.
    pub fn read_client_usage(&self, now: UnixMs) -> Result<Vec<UsageTotals>, rusqlite::Error> {
        self.read(|connection| read::client_usage(connection, now))
    }

    fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> Result<Vec<T>, rusqlite::Error>,
    ) -> Result<Vec<T>, rusqlite::Error> {
        self.database.as_ref().map_or_else(|_| Ok(Vec::new()), |database| read(&database.connection))
    }

    /// Starts the writer thread, which stores the records that requests put into the returned sink, and the state of
    /// the keys in `pool`.
    ///
    /// # Errors
    ///
    /// Fails when the thread or its runtime cannot be created.
    pub fn start_writer(
        self,
        pool: Arc<Pool>,
        settings: Settings,
    ) -> std::io::Result<(UsageSink, WriterHandle)> {
        let (all_written_sender, all_written) = oneshot::channel();
        let (closed_sender, closed) = oneshot::channel();
        let health = Health::default();
        let early_commit_size = write::early_commit_size(&settings);
        let (usage, queue) =
            UsageSink::new(settings.max_queued_records, early_commit_size, health.depth.clone());
        let writer = self.into_writer(pool, settings, health.clone());
        let (history, history_commands) = History::new(&writer.location.location);
        let (outbox, outbox_commands) = Outbox::new();
        let outbox = (settings.mirror_scope != MirrorScope::Nothing).then_some(outbox);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        tasks::spawn_thread("usage-store", move || {
            let channels =
                WriterChannels { queue, outbox_commands, history_commands, all_written: all_written_sender };
            runtime.block_on(writer.run(channels));
            // The receiver may have been dropped.
            let _ = closed_sender.send(());
        })?;
        Ok((usage, WriterHandle { health, outbox, history, all_written, closed }))
    }

    fn into_writer(self, pool: Arc<Pool>, settings: Settings, health: Health) -> Writer {
        let (database, open_error) = match self.database {
            Ok(database) => (Some(database), None),
            Err(error) => (None, Some(error)),
        };
        let mut writer = Writer::new(database, self.location, settings, pool, health);
        if let Some(error) = open_error {
            writer.log_failing(&error);
        }
        writer
    }
}

impl WriterHandle {
    /// Waits until all records are written, which happens after the last [`UsageSink`] is dropped. Returns false after
    /// the timeout, and if the writer panicked. If it returns true, no further rows enter the outbox. Must be called
    /// only once.
    pub async fn wait_until_written(&mut self, timeout: Duration) -> bool {
        tokio::time::timeout(timeout, &mut self.all_written).await.is_ok_and(|written| written.is_ok())
    }

    /// Waits until all records are written and the database is closed, which happens after the last
    /// [`UsageSink`] and the outbox are dropped. Returns the number of records lost after Keychoir
    /// started, including those that are unwritten at the timeout.
    pub async fn wait_until_closed(self, timeout: Duration) -> u64 {
        drop(self.outbox);
        // If the writer panicked, the channel is closed and the records in its queue are lost.
        let _ = tokio::time::timeout(timeout, self.closed).await;
        self.health.lost_records() + self.health.unwritten_records()
    }
}

/// The location of the database, and its lock after it was acquired.
#[derive(Debug)]
struct LockableLocation {
    location: DatabaseLocation,
    lock: Option<Lock>,
}

impl From<DatabaseLocation> for LockableLocation {
    fn from(location: DatabaseLocation) -> Self {
        Self { location, lock: None }
    }
}

impl LockableLocation {
    fn is_memory(&self) -> bool {
        self.location == DatabaseLocation::Memory
    }

    /// Locks and opens the database.
    fn open(&mut self, now: UnixMs, check: IntegrityCheck) -> Result<OpenDatabase, OpenError> {
        self.lock()?;
        let opened = open::open(&self.location, now, check)?;
        if let Some(path) = &opened.quarantined_path {
            log_quarantine(path);
        }
        Ok(opened)
    }

    /// Acquires the lock, unless it is already held or the database is in memory. The origin of the file is
    /// checked first, so that no lock file is created next to the file of another program.
    fn lock(&mut self) -> Result<(), OpenError> {
        let DatabaseLocation::File(path) = &self.location else { return Ok(()) };
        if self.lock.is_some() {
            return Ok(());
        }
        let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
        if let Origin::Foreign(content) = origin::detect(path).map_err(unwritable)? {
            return Err(OpenError::Foreign { path: path.clone(), content });
        }
        open::create_private_file(path).map_err(unwritable)?;
        self.lock = Some(Lock::acquire(path).map_err(|error| match error {
            DatabaseLockError::Held(pid) => OpenError::InUse { path: path.clone(), pid },
            DatabaseLockError::System(source) => unwritable(source),
        })?);
        Ok(())
    }
}

fn log_quarantine(path: &Path) {
    let path = path.display().to_string();
    tracing::error!(
        event = "usage_store_quarantined",
        path,
        "The usage database was corrupt: it was moved to {path}, and a new one was created"
    );
}

#[cfg(test)]
mod tests;
