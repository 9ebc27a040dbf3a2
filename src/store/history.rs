//! Reads attempts, sums and changes for the admin API and the dashboard, reads the usage of a user for its quota, and
//! records changes. This module is separate from `report`, whose connection belongs to a command: every read of this
//! module has a time limit, and none runs on a worker thread.
//!
//! A database file is read by read-only connections on blocking threads. The writer thread records the changes, reads
//! the usage of users, and runs all reads of an in-memory database, because only its connection can access that
//! database.

mod queries;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, ErrorCode, OpenFlags};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::changes::{self, StoredChange};
use super::{DatabaseLocation, schema, users};
use crate::clock;
use crate::policy::client::ClientName;
use crate::policy::units::UnixMs;
use crate::proxy::{UserUsageFuture, UserUsageReader, UserUsageUnavailable};
use crate::secret::UserFingerprint;
use crate::tasks;

#[cfg(test)]
pub(super) use queries::usage as read_usage;
pub use queries::{AttemptFilter, AttemptPage, HourOfKey, UsageFilter, UsageRow};

/// Maximum time that SQLite works on a read before it is interrupted.
const READ_TIMEOUT: Duration = Duration::from_millis(200);
/// Maximum wait for the result of a read or for the commit of a change, including the wait for other reads and
/// for the lock of a migration.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of concurrent reads. More reads would compete with the writer for the disk.
const MAX_CONCURRENT_READS: usize = 2;
/// Maximum number of commands that wait for the writer thread.
const MAX_QUEUED_COMMANDS: usize = 16;
/// Number of SQLite's virtual-machine instructions between two checks of the time limit. They take about 20
/// microseconds.
const INSTRUCTIONS_PER_CHECK: i32 = 1_000;

/// The reason why stored records cannot be read or a change cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// SQLite did not complete the read within its time limit.
    #[error("the usage database has too many records to read them in time")]
    TooSlow,
    /// The database is not open, cannot be read or written, or did not return a result in time.
    #[error("the usage database cannot be used now")]
    Unavailable,
}

/// A command for the writer thread.
pub(super) enum HistoryCommand {
    /// Runs a read with the writer's connection: of an in-memory database, or of the usage of a user.
    Read(Box<dyn FnOnce(&mut Connection) + Send>),
    /// Records a change, and confirms it after the commit.
    Record(StoredChange, oneshot::Sender<()>),
}

/// Reads stored records and records the changes of operators. Clones share the limit of concurrent reads.
#[derive(Clone, Debug)]
pub struct History {
    /// The database file, or `None` for an in-memory database.
    path: Option<Arc<PathBuf>>,
    commands: mpsc::Sender<HistoryCommand>,
    read_permits: Arc<Semaphore>,
}

impl History {
    /// Creates the channel to the writer thread.
    pub(super) fn new(location: &DatabaseLocation) -> (Self, mpsc::Receiver<HistoryCommand>) {
        let path = match location {
            DatabaseLocation::File(path) => Some(Arc::new(path.clone())),
            DatabaseLocation::Memory => None,
        };
        let (commands, receiver) = mpsc::channel(MAX_QUEUED_COMMANDS);
        let read_permits = Arc::new(Semaphore::new(MAX_CONCURRENT_READS));
        (Self { path, commands, read_permits }, receiver)
    }

    /// Reads attempts, the latest first.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be read in time.
    pub async fn attempts(&self, filter: AttemptFilter) -> Result<AttemptPage, HistoryError> {
        self.read(move |connection| queries::attempts(connection, &filter)).await
    }

    /// Reads the sums of attempts by one dimension.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be read in time.
    pub async fn usage(&self, filter: UsageFilter) -> Result<Vec<UsageRow>, HistoryError> {
        self.read(move |connection| queries::usage(connection, &filter)).await
    }

    /// Reads the credits and attempts of each key in each hour, the latest hours first. Includes the hour that contains
    /// `since`, and the hour that contains `until` unless it starts at `until`. If there are more than `limit` rows,
    /// the earliest are missing.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be read in time.
    pub async fn credits_by_hour(
        &self,
        since: UnixMs,
        until: UnixMs,
        limit: usize,
    ) -> Result<Vec<HourOfKey>, HistoryError> {
        self.read(move |connection| queries::credits_by_hour(connection, since, until, limit)).await
    }

    /// Reads the last hour since `since` in which each client sent a request.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be read in time.
    pub async fn last_hours_of_clients(&self, since: UnixMs) -> Result<Vec<(String, UnixMs)>, HistoryError> {
        self.read(move |connection| queries::last_hours_of_clients(connection, since)).await
    }

    /// Reads at most `limit` changes with ids below `before`, the latest first. If `before` is `None`, it reads the
    /// latest changes.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be read in time.
    pub async fn changes(
        &self,
        before: Option<String>,
        limit: usize,
    ) -> Result<Vec<StoredChange>, HistoryError> {
        self.read(move |connection| changes::read(connection, before.as_deref(), limit)).await
    }

    /// Records a change. It is in the database when the future completes.
    ///
    /// # Errors
    ///
    /// Fails when the database cannot be written in time. In that case, the change may still be recorded.
    pub async fn record_change(&self, change: StoredChange) -> Result<(), HistoryError> {
        let (confirm, confirmed) = oneshot::channel();
        let exchange = async {
            self.commands.send(HistoryCommand::Record(change, confirm)).await.ok()?;
            confirmed.await.ok()
        };
        timeout(RESPONSE_TIMEOUT, exchange).await.ok().flatten().ok_or(HistoryError::Unavailable)
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, HistoryError> {
        let exchange = async {
            let permit = Arc::clone(&self.read_permits).acquire_owned().await.ok()?;
            match self.path.clone() {
                Some(path) => {
                    let work = move || {
                        // The permit is held until the read has ended, even if the client disconnects.
                        let _permit = permit;
                        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                        let mut connection = Connection::open_with_flags(&*path, flags)?;
                        connection.busy_timeout(READ_TIMEOUT)?;
                        if schema::version(&connection)? != schema::VERSION {
                            return Err(rusqlite::Error::InvalidQuery);
                        }
                        read_in_time(&mut connection, read)
                    };
                    tasks::spawn_blocking(work).await.ok()
                }
                None => self.read_with_writer(read).await,
            }
        };
        convert_read_result(timeout(RESPONSE_TIMEOUT, exchange).await.ok().flatten())
    }

    /// Sends a read to the writer thread. Returns `None` if the writer cannot read the database.
    async fn read_with_writer<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Option<Result<T, rusqlite::Error>> {
        let (respond, response) = oneshot::channel();
        let work = Box::new(move |connection: &mut Connection| {
            // The receiver is dropped if the client has disconnected.
            let _ = respond.send(read_in_time(connection, read));
        });
        self.commands.send(HistoryCommand::Read(work)).await.ok()?;
        response.await.ok()
    }
}

/// The writer thread reads the usage of a user between two commits with its open connection, so that reads of the admin
/// API do not delay a request.
impl UserUsageReader for History {
    fn read_user_usage<'a>(
        &'a self,
        client: &'a ClientName,
        user: UserFingerprint,
        now: UnixMs,
    ) -> UserUsageFuture<'a> {
        let name = client.clone();
        Box::pin(async move {
            let read =
                self.read_with_writer(move |connection| users::read_usage(connection, &name, user, now));
            let read_result = timeout(RESPONSE_TIMEOUT, read).await.ok().flatten();
            convert_read_result(read_result).map_err(|_| UserUsageUnavailable)
        })
    }
}

/// Converts the result of a read, and logs an error of SQLite. `None` means that the read has no result, because it was
/// too slow or the database is not open.
fn convert_read_result<T>(read_result: Option<Result<T, rusqlite::Error>>) -> Result<T, HistoryError> {
    match read_result {
        Some(Ok(records)) => Ok(records),
        Some(Err(error)) if is_interrupted(&error) => Err(HistoryError::TooSlow),
        Some(Err(error)) => {
            tracing::warn!(event = "usage_store_unreadable", "Stored records cannot be read: {error}");
            Err(HistoryError::Unavailable)
        }
        None => Err(HistoryError::Unavailable),
    }
}

/// Runs a read, and interrupts it at the time limit.
fn read_in_time<T>(
    connection: &mut Connection,
    read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error>,
) -> Result<T, rusqlite::Error> {
    let started_at = clock::instant();
    connection.progress_handler(
        INSTRUCTIONS_PER_CHECK,
        Some(move || clock::elapsed_since(started_at) > READ_TIMEOUT),
    )?;
    let records = read(connection);
    connection.progress_handler(0, None::<fn() -> bool>)?;
    records
}

/// Returns whether a read was interrupted at its time limit.
fn is_interrupted(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_read_is_interrupted() {
        let mut connection = Connection::open_in_memory().unwrap();
        let endless_query =
            "WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n) SELECT count(*) FROM n";
        let endless_read =
            |connection: &Connection| connection.query_row(endless_query, [], |row| row.get::<_, i64>(0));
        assert!(is_interrupted(&read_in_time(&mut connection, endless_read).unwrap_err()));
        let short_read =
            |connection: &Connection| connection.query_row("SELECT 7", [], |row| row.get::<_, i64>(0));
        assert_eq!(
            read_in_time(&mut connection, short_read),
            Ok(7),
            "the time limit of a read must not affect the next read"
        );
    }
}
