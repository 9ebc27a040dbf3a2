//! The usage store: SQLite on a thread of its own behind a bounded queue. Traffic never waits for
//! the disk: records that cannot be written are kept and retried, and records beyond the bound are
//! dropped, counted and logged.

mod attempts;
mod evidence;
mod lock;
mod open;
mod origin;
mod read;
mod report;
mod schema;

mod columns;
mod database;
mod maintenance;
mod names;
mod outbox;
mod owners;
mod refusals;
mod rows;
mod source;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::elevenlabs::affinity::Keeping;
use crate::policy::retention::Retention;
use crate::policy::units::UnixMs;
use crate::pool::{LearnedOwner, Pool, RefusalRecord, RestoredKey};
use crate::proxy::{Depth, UsageSink, Used};
use crate::secret::ApiKey;
use crate::tasks;

use database::Database;
use lock::{Lock, LockError};
use open::{IntegrityCheck, OpenDatabase};
pub use open::{OpenError, examine};
use origin::Origin;
pub use outbox::{
    Batch, Delivery, Event, Mirrored, MirroredKeyState, Outbox, RefusedRow, Rename, RowName, StoreClosed,
};
pub use report::{By, KnownKey, ReadError, Reader, Sums, UsageOwner};
use write::{Callers, Writer};

/// The location of the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseLocation {
    /// In this file.
    File(PathBuf),
    /// In memory, until the program ends.
    Memory,
}

/// The bounds and the timing of the usage store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Maximum records in the queue; also the maximum records kept in memory while the database cannot be
    /// written.
    pub queue_max: usize,
    /// Minimum time between two commits while many records arrive.
    pub commit_interval: Duration,
    /// The retention of the records.
    pub retention: Retention,
    /// The rows that enter the outbox.
    pub mirrored: Mirrored,
    /// Maximum number and age of the stored identifier owners.
    pub owners: Keeping,
}

/// Counters and state of the usage store. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Health {
    cells: Arc<HealthCells>,
    depth: Depth,
}

#[derive(Debug, Default)]
struct HealthCells {
    is_failing: AtomicBool,
    lost: AtomicU64,
    written: AtomicU64,
    errors: AtomicU64,
    /// Unix milliseconds since when the oldest unwritten record has been kept; 0 if there is none.
    held_since: AtomicU64,
}

impl Health {
    /// Whether the last write failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.cells.is_failing.load(Ordering::Acquire)
    }

    /// Records dropped because they could be neither written nor kept.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.cells.lost.load(Ordering::Acquire)
    }

    /// Records to be written, in the queue or kept for a retry.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.depth.records()
    }

    /// Records written since the start.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.cells.written.load(Ordering::Relaxed)
    }

    /// Writes that failed since the start.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.cells.errors.load(Ordering::Relaxed)
    }

    /// The age at `now` of the oldest record that was taken from the queue and is not written.
    #[must_use]
    pub fn lag(&self, now: UnixMs) -> Duration {
        match self.cells.held_since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => now.since(UnixMs(since)),
        }
    }

    fn set_held_since(&self, since: UnixMs) {
        self.cells.held_since.store(since.0, Ordering::Relaxed);
    }

    fn count_written(&self, records: usize) {
        self.set_held_since(UnixMs(0));
        self.cells.written.fetch_add(records as u64, Ordering::Relaxed);
        self.arrived(records);
    }

    fn count_error(&self) {
        self.cells.errors.fetch_add(1, Ordering::Relaxed);
    }

    fn set_failing(&self, is_failing: bool) -> bool {
        self.cells.is_failing.swap(is_failing, Ordering::AcqRel)
    }

    fn lose(&self, records: usize) {
        self.cells.lost.fetch_add(records as u64, Ordering::AcqRel);
        self.arrived(records);
    }

    fn arrived(&self, records: usize) {
        self.depth.record_written(records as u64);
    }
}

/// An opened database, before anything is written.
#[derive(Debug)]
pub struct Store {
    site: LockedLocation,
    database: Result<Database, OpenError>,
    quarantined: Option<PathBuf>,
}

/// A database with its running writing thread.
#[derive(Debug)]
pub struct Writing {
    /// Its counters and state.
    pub health: Health,
    /// The outbox, if rows are mirrored; a handle to it keeps the database open.
    pub outbox: Option<Outbox>,
    written: oneshot::Receiver<()>,
    ended: oneshot::Receiver<()>,
}

impl Store {
    /// Opens the database, creates it if it is missing, and locks it until the writer ends. A corrupt
    /// database of Keychoir is quarantined under another name and replaced by a new one. A full or read-only
    /// disk, or a lock held by another SQLite connection, is no error: records are kept until it is writable.
    ///
    /// # Errors
    ///
    /// When the path cannot be used, another process has it open, the file belongs to another
    /// program, or a newer version of Keychoir has written it.
    pub fn open(location: &DatabaseLocation, now: UnixMs) -> Result<Self, OpenError> {
        let mut site = LockedLocation::from(location.clone());
        match site.open(now, IntegrityCheck::Quick) {
            Ok(opened) => Ok(Self { site, database: Ok(opened.database), quarantined: opened.quarantined }),
            Err(error) if error.may_pass() => Ok(Self { site, database: Err(error), quarantined: None }),
            Err(error) => Err(error),
        }
    }

    /// The new path of a corrupt file that was quarantined.
    #[must_use]
    pub fn quarantined(&self) -> Option<&PathBuf> {
        self.quarantined.as_ref()
    }

    /// Renames the rows that an earlier version wrote of `keys` under old names. Must be called
    /// before anything is read. While the file cannot be opened, the later opening does it.
    pub fn recognize<'k>(&mut self, keys: impl Iterator<Item = &'k ApiKey>) {
        if let Ok(database) = &mut self.database {
            database.recognize(keys);
        }
    }

    /// The stored state of the keys; empty while the file cannot be opened.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn remembered(&self) -> Result<Vec<RestoredKey>, rusqlite::Error> {
        self.database
            .as_ref()
            .map_or_else(|_| Ok(Vec::new()), |database| read::remembered(&database.connection))
    }

    /// The refusals that restrictions are computed from, the oldest first; empty while the file
    /// cannot be opened.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn refusals(&self) -> Result<Vec<RefusalRecord>, rusqlite::Error> {
        self.database
            .as_ref()
            .map_or_else(|_| Ok(Vec::new()), |database| refusals::read(&database.connection))
    }

    /// The owners of identifiers, the oldest use first; empty while the file cannot be opened.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn owners(&self) -> Result<Vec<LearnedOwner>, rusqlite::Error> {
        self.database.as_ref().map_or_else(|_| Ok(Vec::new()), |database| owners::read(&database.connection))
    }

    /// The usage of each client in the periods of `now`, without hours whose sums were deleted; empty while
    /// the file cannot be opened.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn used(&self, now: UnixMs) -> Result<Vec<Used>, rusqlite::Error> {
        self.database
            .as_ref()
            .map_or_else(|_| Ok(Vec::new()), |database| read::used(&database.connection, now))
    }

    /// Starts the writing thread, which writes the usage records sent to it and the state of
    /// `pool`'s keys.
    ///
    /// # Errors
    ///
    /// When the thread cannot be spawned.
    pub fn write(self, pool: Arc<Pool>, settings: Settings) -> std::io::Result<(UsageSink, Writing)> {
        let (all_written, written) = oneshot::channel();
        let (done, ended) = oneshot::channel();
        let health = Health::default();
        let (usage, queue) =
            UsageSink::new(settings.queue_max, write::batch(&settings), health.depth.clone());
        let writer = self.writer(pool, settings, health.clone());
        let (outbox, commands) = Outbox::new();
        let outbox = (settings.mirrored != Mirrored::Nothing).then_some(outbox);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        tasks::thread("usage-store", move || {
            runtime.block_on(writer.run(Callers { queue, commands, all_written }));
            // The receiver may have been dropped.
            let _ = done.send(());
        })?;
        Ok((usage, Writing { health, outbox, written, ended }))
    }
}

impl Store {
    fn writer(self, pool: Arc<Pool>, settings: Settings, health: Health) -> Writer {
        let (database, trouble) = match self.database {
            Ok(database) => (Some(database), None),
            Err(error) => (None, Some(error)),
        };
        let mut writer = Writer::new(database, self.site, settings, pool, health);
        if let Some(error) = trouble {
            writer.log_failing(&error);
        }
        writer
    }
}

impl Writing {
    /// Waits at most `within` until everything is written, which happens after the last sender is dropped.
    /// Returns whether everything is written: then no further rows enter the outbox. Must be called only
    /// once.
    pub async fn written(&mut self, within: Duration) -> bool {
        tokio::time::timeout(within, &mut self.written).await.is_ok()
    }

    /// Waits at most `within` until everything is written and the file is closed, which happens
    /// after the last sender and the outbox are dropped. Returns how many records were lost since
    /// the start.
    pub async fn ended(self, within: Duration) -> u64 {
        drop(self.outbox);
        // A writer that panicked has ended, too; the records left in its queue are lost.
        let _ = tokio::time::timeout(within, self.ended).await;
        self.health.lost() + self.health.waiting()
    }
}

/// The location of the database, with its lock once it is taken.
#[derive(Debug)]
struct LockedLocation {
    location: DatabaseLocation,
    lock: Option<Lock>,
}

impl From<DatabaseLocation> for LockedLocation {
    fn from(location: DatabaseLocation) -> Self {
        Self { location, lock: None }
    }
}

impl LockedLocation {
    /// Locks and opens the database.
    fn open(&mut self, now: UnixMs, check: IntegrityCheck) -> Result<OpenDatabase, OpenError> {
        self.lock()?;
        let opened = open::open(&self.location, now, check)?;
        opened.quarantined.as_deref().inspect(|quarantined| log_quarantine(quarantined));
        Ok(opened)
    }

    /// Takes the lock, unless it is held already or there is no file to lock. No lock file is created beside
    /// the file of another program.
    fn lock(&mut self) -> Result<(), OpenError> {
        let DatabaseLocation::File(path) = &self.location else { return Ok(()) };
        if self.lock.is_some() {
            return Ok(());
        }
        let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
        if let Origin::Foreign(content) = origin::of(path).map_err(unwritable)? {
            return Err(OpenError::Foreign { path: path.clone(), content });
        }
        open::make_private(path).map_err(unwritable)?;
        self.lock = Some(Lock::take(path).map_err(|error| match error {
            LockError::Held(pid) => OpenError::InUse { path: path.clone(), pid },
            LockError::System(source) => unwritable(source),
        })?);
        Ok(())
    }
}

/// Logs that a corrupt database was quarantined, and where it is now.
fn log_quarantine(quarantined: &Path) {
    let path = quarantined.display().to_string();
    tracing::error!(
        event = "usage_store_quarantined",
        path,
        "The usage records were broken; they are kept as {path}, and new ones were begun"
    );
}

#[cfg(test)]
mod tests;
