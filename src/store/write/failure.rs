//! Reacts to failures of the writer thread, in writes, commands of the mirror and maintenance: logs an outage once,
//! schedules the retry, and decides whether the database is reopened and how its file is checked.

use rusqlite::ErrorCode;
use tracing::warn;

use super::{RETRY_INTERVAL, Writer};
use crate::clock;
use crate::store::open::{IntegrityCheck, OpenError, is_corruption};

/// The reason why a write, a command of the mirror or maintenance failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// The database cannot be opened again.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// SQLite reported an error.
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    /// The database file was removed or replaced twice during one write.
    #[error("the database file was removed again after it was created")]
    FileReplaced,
}

impl Writer {
    /// Records a failure, logs it once per outage, and drops the records above the limit.
    pub(super) fn record_failure(&mut self, error: &WriteError) {
        if let WriteError::Sqlite(error) = error {
            self.prepare_reopening(error);
        }
        self.health.count_error();
        // A write without rows would not prove that the database can be written, so the next write includes the keys.
        self.are_keys_stale = true;
        self.retry_at = clock::instant() + RETRY_INTERVAL;
        self.log_failing(error);
        self.drop_excess_records();
    }

    /// Logs once per outage that usage records cannot be written.
    pub(in crate::store) fn log_failing(&mut self, error: &dyn std::error::Error) {
        if !self.health.set_failing(true) {
            self.lost_before_outage = self.health.lost_records();
            warn!(
                event = "usage_store_failing",
                "The database cannot be written: {error}; requests continue, and usage records are kept and written \
                 later"
            );
        }
    }

    /// Chooses the check of the file when it is opened next: a full check after the first report of corruption, and
    /// quarantine after the second. Closes the connection after errors from which it may not recover, such as I/O
    /// errors.
    fn prepare_reopening(&mut self, error: &rusqlite::Error) {
        if is_corruption(error) {
            self.next_check = match self.next_check {
                IntegrityCheck::Skip => IntegrityCheck::Full,
                IntegrityCheck::Quick | IntegrityCheck::Full | IntegrityCheck::Quarantine => {
                    IntegrityCheck::Quarantine
                }
            };
        }
        let is_connection_usable = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull | ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => true,
            Some(_) | None => self.location.is_memory(),
        };
        if !is_connection_usable {
            self.close();
        }
    }
}
