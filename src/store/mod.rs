//! The books: SQLite on a thread of its own behind a bounded queue. Traffic never waits for the
//! disk; what cannot be written is held and tried again, and what cannot be held is counted aloud.

mod evidence;
mod lock;
mod open;
mod origin;
mod read;
mod report;
mod schema;

mod database;
mod dimensions;
mod held;
mod maintenance;
mod names;
mod outbox;
mod owners;
mod pending;
mod refusals;
mod rows;
mod touched;
mod write;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::policy::affinity::Keeping;
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
    Batch, Delivery, Event, KeyState, Mirrored, Outbox, RefusedRow, Rename, RowName, Unavailable,
};
pub use report::{By, KnownKey, ReadError, Reader, Sums, Whose};
use write::{Callers, Writer};

/// Where the books are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseLocation {
    /// In this file.
    File(PathBuf),
    /// In memory, until the program ends.
    Memory,
}

/// How the books are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Records that wait to be written at the most; as many more are held while they cannot be.
    pub queue_max: usize,
    /// While many records come, a commit begins so long after the last at the earliest.
    pub commit_interval: Duration,
    /// How long records are kept.
    pub retention: Retention,
    /// What enters the outbox.
    pub mirrored: Mirrored,
    /// How much is kept of what belongs to whom.
    pub owners: Keeping,
}

/// How the books fare. Cheap to clone.
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
    /// Since when, in Unix milliseconds, the oldest record that is held has been; 0 for none.
    held_since: AtomicU64,
}

impl Health {
    /// Whether the last attempt to write failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.cells.is_failing.load(Ordering::Acquire)
    }

    /// Records that were lost because they could be neither written nor held.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.cells.lost.load(Ordering::Acquire)
    }

    /// Records that wait to be written, in the queue or held.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.depth.records()
    }

    /// Records that were written, from the start on.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.cells.written.load(Ordering::Relaxed)
    }

    /// Attempts to write that failed, from the start on.
    #[must_use]
    pub fn errors(&self) -> u64 {
        self.cells.errors.load(Ordering::Relaxed)
    }

    /// How long the oldest record that is taken up and not yet written has been so at `now`.
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
        self.depth.arrived(records as u64);
    }
}

/// Opened books, before anything is written.
#[derive(Debug)]
pub struct Store {
    site: Site,
    ledger: Result<Database, OpenError>,
    set_aside: Option<PathBuf>,
}

/// Books that are being written.
#[derive(Debug)]
pub struct Writing {
    /// How they fare.
    pub health: Health,
    /// What is to be mirrored, when something is; whoever takes it keeps the books open.
    pub outbox: Option<Outbox>,
    written: oneshot::Receiver<()>,
    ended: oneshot::Receiver<()>,
}

impl Store {
    /// Opens the database, making it where there is none, and locks it until the writer ends. A
    /// database of Keychoir's that is broken is set aside under another name and a new one is begun. A
    /// disk that is full or read-only, or a lock of SQLite's, is waited for: records are held until
    /// then.
    ///
    /// # Errors
    ///
    /// When the place is not to be had, another process has it, the file is of another program, or a
    /// newer version of this one has written it.
    pub fn open(place: &DatabaseLocation, now: UnixMs) -> Result<Self, OpenError> {
        let mut site = Site::from(place.clone());
        match site.open(now, IntegrityCheck::Quick) {
            Ok(opened) => Ok(Self { site, ledger: Ok(opened.ledger), set_aside: opened.set_aside }),
            Err(error) if error.may_pass() => Ok(Self { site, ledger: Err(error), set_aside: None }),
            Err(error) => Err(error),
        }
    }

    /// The file that was set aside, if there was one.
    #[must_use]
    pub fn set_aside(&self) -> Option<&PathBuf> {
        self.set_aside.as_ref()
    }

    /// Finds what an earlier version has written of `keys` under names that are not used any more. To
    /// be done before anything is read. While the file cannot be opened, this is left to the opening.
    pub fn recognize<'k>(&mut self, keys: impl Iterator<Item = &'k ApiKey>) {
        if let Ok(ledger) = &mut self.ledger {
            ledger.recognize(keys);
        }
    }

    /// What is known of the keys; nothing, while the file cannot be opened.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn remembered(&self) -> Result<Vec<RestoredKey>, rusqlite::Error> {
        self.ledger.as_ref().map_or_else(|_| Ok(Vec::new()), |ledger| read::remembered(&ledger.connection))
    }

    /// The refusals that restrictions are computed from, the oldest first; nothing, while the file cannot be
    /// opened.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn refusals(&self) -> Result<Vec<RefusalRecord>, rusqlite::Error> {
        self.ledger.as_ref().map_or_else(|_| Ok(Vec::new()), |ledger| refusals::read(&ledger.connection))
    }

    /// Whose identifiers are, the oldest use first; nothing, while the file cannot be opened.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn owners(&self) -> Result<Vec<LearnedOwner>, rusqlite::Error> {
        self.ledger.as_ref().map_or_else(|_| Ok(Vec::new()), |ledger| owners::read(&ledger.connection))
    }

    /// What each client has used of the pool in the periods of `now`, as far back as the sums are
    /// kept; nothing, while the file cannot be opened.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn used(&self, now: UnixMs) -> Result<Vec<Used>, rusqlite::Error> {
        self.ledger.as_ref().map_or_else(|_| Ok(Vec::new()), |ledger| read::used(&ledger.connection, now))
    }

    /// Begins to write: what is sent to the books, and with it the state of `pool`'s keys.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub fn write(self, pool: Arc<Pool>, settings: Settings) -> std::io::Result<(UsageSink, Writing)> {
        let (all_written, written) = oneshot::channel();
        let (done, ended) = oneshot::channel();
        let health = Health::default();
        let (books, queue) =
            UsageSink::new(settings.queue_max, write::batch(&settings), health.depth.clone());
        let writer = self.writer(pool, settings, health.clone());
        let (outbox, questions) = Outbox::new();
        let outbox = (settings.mirrored != Mirrored::Nothing).then_some(outbox);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        tasks::thread("books", move || {
            runtime.block_on(writer.run(Callers { queue, questions, all_written }));
            // Nobody may be waiting for the end.
            let _ = done.send(());
        })?;
        Ok((books, Writing { health, outbox, written, ended }))
    }
}

impl Store {
    fn writer(self, pool: Arc<Pool>, settings: Settings, health: Health) -> Writer {
        let (ledger, trouble) = match self.ledger {
            Ok(ledger) => (Some(ledger), None),
            Err(error) => (None, Some(error)),
        };
        let mut writer = Writer::new(ledger, self.site, settings, pool, health);
        if let Some(error) = trouble {
            writer.say_failing(&error);
        }
        writer
    }
}

impl Writing {
    /// Waits until everything is written, which comes when the last sender is gone, but at most
    /// `within`. Whether it is: then nothing enters the outbox any more. To be asked once.
    pub async fn written(&mut self, within: Duration) -> bool {
        tokio::time::timeout(within, &mut self.written).await.is_ok()
    }

    /// Waits until everything is written and the file is closed, which comes when the last sender
    /// and the outbox are gone, but at most `within`. Returns how many records were lost, from the
    /// start on.
    pub async fn ended(self, within: Duration) -> u64 {
        drop(self.outbox);
        // A writer that is gone without a word has ended, too; what still waits is lost.
        let _ = tokio::time::timeout(within, self.ended).await;
        self.health.lost() + self.health.waiting()
    }
}

/// Where the database is, with its lock once it is held.
#[derive(Debug)]
struct Site {
    place: DatabaseLocation,
    lock: Option<Lock>,
}

impl From<DatabaseLocation> for Site {
    fn from(place: DatabaseLocation) -> Self {
        Self { place, lock: None }
    }
}

impl Site {
    /// Opens the database under its lock.
    fn open(&mut self, now: UnixMs, look: IntegrityCheck) -> Result<OpenDatabase, OpenError> {
        self.lock()?;
        let opened = open::open(&self.place, now, look)?;
        opened.set_aside.as_deref().inspect(|aside| tell_set_aside(aside));
        Ok(opened)
    }

    /// Takes the lock, unless it is held already or there is no file to lock. The file of another
    /// program gets no lock file beside it.
    fn lock(&mut self) -> Result<(), OpenError> {
        let DatabaseLocation::File(path) = &self.place else { return Ok(()) };
        if self.lock.is_some() {
            return Ok(());
        }
        let unwritable = |source| OpenError::Unwritable { path: path.clone(), source };
        if let Origin::Foreign(found) = origin::of(path).map_err(unwritable)? {
            return Err(OpenError::Foreign { path: path.clone(), found });
        }
        open::make_private(path).map_err(unwritable)?;
        self.lock = Some(Lock::take(path).map_err(|error| match error {
            LockError::Held(pid) => OpenError::InUse { path: path.clone(), pid },
            LockError::System(source) => unwritable(source),
        })?);
        Ok(())
    }
}

/// Says that broken books were found, and where they are now.
fn tell_set_aside(aside: &Path) {
    let path = aside.display().to_string();
    tracing::error!(
        event = "usage_store_quarantined",
        path,
        "The usage records were broken; they are kept as {path}, and new ones were begun"
    );
}

#[cfg(test)]
mod tests;
