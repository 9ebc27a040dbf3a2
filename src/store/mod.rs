//! The books: SQLite on a thread of its own behind a bounded queue. Traffic never waits for the
//! disk; what cannot be written is held and tried again, and what cannot be held is counted aloud.

mod open;
mod read;
mod schema;
mod write;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::{mpsc, oneshot};

use crate::pool::{Pool, Remembered};
use crate::proxy::{Books, Entry};
use crate::tasks;

pub use open::OpenError;

/// Where the books are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this file.
    File(PathBuf),
    /// In memory, until the program ends.
    Memory,
}

/// How the books fare.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<HealthCells>);

#[derive(Debug, Default)]
struct HealthCells {
    is_failing: AtomicBool,
    lost: AtomicU64,
}

impl Health {
    /// Whether the last attempt to write failed.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        self.0.is_failing.load(Ordering::Acquire)
    }

    /// Records that were lost because they could be neither written nor held.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Acquire)
    }

    fn set_failing(&self, is_failing: bool) -> bool {
        self.0.is_failing.swap(is_failing, Ordering::AcqRel)
    }

    fn lose(&self, count: u64) {
        self.0.lost.fetch_add(count, Ordering::AcqRel);
    }
}

/// Opened books, before anything is written.
#[derive(Debug)]
pub struct Store {
    connection: rusqlite::Connection,
    set_aside: Option<PathBuf>,
}

/// Books that are being written.
#[derive(Debug)]
pub struct Writing {
    /// How they fare.
    pub health: Health,
    ended: oneshot::Receiver<()>,
}

impl Store {
    /// Opens the books, making them where there are none. A file that is no database, or a broken
    /// one, is set aside under another name and new books are begun.
    ///
    /// # Errors
    ///
    /// When the place cannot be written, or a newer version of the program has written it.
    pub fn open(place: &Place, now: crate::policy::units::UnixMs) -> Result<Self, OpenError> {
        open::open(place, now)
    }

    /// The file that was set aside, if there was one.
    #[must_use]
    pub fn set_aside(&self) -> Option<&PathBuf> {
        self.set_aside.as_ref()
    }

    /// What is known of the keys.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn remembered(&self) -> Result<Vec<Remembered>, rusqlite::Error> {
        read::remembered(&self.connection)
    }

    /// Begins to write: what is sent to the books, and with it the state of `pool`'s keys.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub fn write(self, pool: Arc<Pool>, queue_max: usize) -> std::io::Result<(Books, Writing)> {
        let (sender, receiver) = mpsc::channel::<Entry>(queue_max);
        let (done, ended) = oneshot::channel();
        let health = Health::default();
        let writer = write::Writer::new(self.connection, pool, health.clone(), queue_max);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        tasks::thread("books", move || {
            runtime.block_on(writer.run(receiver));
            // Nobody may be waiting for the end.
            let _ = done.send(());
        })?;
        Ok((Books::new(sender), Writing { health, ended }))
    }
}

impl Writing {
    /// Waits until everything is written and the file is closed. That comes when the last sender
    /// is gone.
    pub async fn ended(self) {
        // A writer that is gone without a word has ended, too.
        let _ = self.ended.await;
    }
}

#[cfg(test)]
mod tests;
