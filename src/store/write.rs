//! The writing thread: writes the queued usage records in one transaction, at once after an idle period, and
//! at intervals while more records arrive. Records that cannot be written are kept and retried. Between two
//! transactions old records are deleted.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::ErrorCode;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use super::database::Database;
use super::maintenance::{self, MaintenanceStep};
use super::open::{IntegrityCheck, OpenError, is_broken};
use super::outbox::{self, Command};
use super::{DatabaseLocation, Health, LockedLocation, Settings, attempts, owners, rows};
use crate::clock;
use crate::policy::pace;
use crate::pool::{Pool, Workspace};
use crate::proxy::{UsageBatch, UsageQueue};

/// A commit starts early when the queue has reached this fraction (1/2) of its capacity.
const BATCH_SHARE: usize = 2;
/// Delay before a failed write is retried.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Maximum write attempts at shutdown: in that time a lock may be released, but a full disk stays full.
const END_TRIES: u32 = 3;
/// Time between two rounds of maintenance.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(3_600);
/// Maintenance starts early after this number of owner changes.
const OWNERS_UNTIL_MAINTENANCE: usize = 20_000;
/// Maximum attempts kept in an in-memory database; the hourly sums stay.
const MEMORY_RECORDS_MAX: usize = 10_000;

/// The reason that a write failed.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error("the file disappears as soon as it is made")]
    FileReplaced,
}

/// The channels of the writing thread: queued records, commands of the mirror, and the signal that
/// all is written.
pub(super) struct Callers {
    pub(super) queue: UsageQueue,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) all_written: oneshot::Sender<()>,
}

pub(super) struct Writer {
    pub(super) database: Option<Database>,
    site: LockedLocation,
    settings: Settings,
    pool: Arc<Pool>,
    health: Health,
    /// Records taken from the queue and not yet written.
    held: UsageBatch,
    /// Time from one commit to the start of the next.
    interval: Duration,
    /// Owner changes since the last maintenance.
    owners_written: usize,
    are_keys_stale: bool,
    /// The check of the next opened file.
    check: IntegrityCheck,
    /// Records dropped before the current failure.
    lost_before: u64,
    retry_at: Instant,
    maintenance_at: Instant,
    /// Attempts written to an in-memory database since it was last emptied.
    in_memory: usize,
}

/// The number of records at which a commit starts early, so that the queue does not fill up.
pub(super) fn batch(settings: &Settings) -> usize {
    (settings.queue_max / BATCH_SHARE).max(1)
}

impl Writer {
    pub(super) fn new(
        database: Option<Database>,
        site: LockedLocation,
        settings: Settings,
        pool: Arc<Pool>,
        health: Health,
    ) -> Self {
        let now = clock::instant();
        Self {
            database,
            site,
            settings,
            pool,
            health,
            held: UsageBatch::default(),
            interval: pace::interval(0, Duration::ZERO, settings.commit_interval),
            owners_written: 0,
            are_keys_stale: true,
            check: IntegrityCheck::Skip,
            lost_before: 0,
            retry_at: now,
            maintenance_at: now,
            in_memory: 0,
        }
    }

    /// Writes until the last sender is dropped and everything is written or cannot be, and serves
    /// the mirror until its handle is dropped, too.
    pub(super) async fn run(mut self, callers: Callers) {
        let Callers { mut queue, mut commands, all_written } = callers;
        let mut last_began = clock::instant();
        loop {
            let now = clock::instant();
            let maintenance_at = if self.is_maintenance_due(now) { now } else { self.maintenance_at };
            let wake_at = if self.health.is_failing() { self.retry_at } else { maintenance_at };
            let mut command = None;
            let is_filled = tokio::select! {
                biased;
                is_filled = queue.filled() => Some(is_filled),
                Some(received) = commands.recv() => {
                    command = Some(received);
                    None
                }
                () = tokio::time::sleep_until(wake_at.into()) => None,
            };
            if is_filled == Some(false) {
                break;
            }
            let began = clock::instant();
            if is_filled.is_some() {
                let records = self.take_from(&mut queue) as u64;
                let over = began.saturating_duration_since(last_began);
                self.interval = pace::interval(records, over, self.settings.commit_interval);
                last_began = began;
            }
            self.work(began);
            // A busy queue must not starve the mirror.
            if let Some(command) = command.or_else(|| commands.try_recv().ok()) {
                self.run_command(command);
            }
            if is_filled.is_some() {
                self.pause(began, &queue, &mut commands).await;
            }
        }
        self.end().await;
        // The receiver may have been dropped.
        let _ = all_written.send(());
        while let Some(command) = commands.recv().await {
            self.run_command(command);
        }
    }

    /// Waits until the next commit may begin. Records sent meanwhile do not wake the thread unless
    /// they fill a batch. Commands of the mirror are served, and old records are deleted.
    async fn pause(&mut self, began: Instant, queue: &UsageQueue, commands: &mut mpsc::Receiver<Command>) {
        let batch = batch(&self.settings) as u64;
        loop {
            let now = clock::instant();
            let since = now.saturating_duration_since(began);
            let pause = pace::pause(since, self.interval, queue.queued(), batch);
            if pause.is_zero() || queue.is_ended() {
                return;
            }
            tokio::select! {
                biased;
                Some(command) = commands.recv() => self.run_command(command),
                () = std::future::ready(()), if self.is_maintenance_due(now) => self.maintain(now),
                () = queue.batch_ready() => {}
                () = tokio::time::sleep(pause) => return,
            }
        }
    }

    /// Runs a command of the mirror. While the database is unavailable, the command is dropped, and the
    /// mirror sends it again.
    fn run_command(&mut self, command: Command) {
        let now = clock::now();
        let keys = self.pool.snapshot(now);
        let database = self.database.as_mut().filter(|_| !self.health.is_failing());
        let Some(database) = database else { return };
        if let Err(error) = outbox::run_command(&mut database.connection, command, &keys, now) {
            self.failed(&error.into());
        }
    }

    /// Writes everything that is due. While the disk fails, it is retried once per `RETRY_PAUSE`,
    /// regardless of the rate of new records.
    pub(super) fn work(&mut self, now: Instant) {
        if !self.health.is_failing() || self.retry_at <= now {
            self.flush();
        }
        if self.is_maintenance_due(now) {
            self.maintain(now);
        }
    }

    /// Takes everything from the queue; returns the number of records.
    fn take_from(&mut self, queue: &mut UsageQueue) -> usize {
        let mut batch = UsageBatch::default();
        self.are_keys_stale |= queue.take(&mut batch);
        self.take(batch)
    }

    pub(super) fn take(&mut self, mut batch: UsageBatch) -> usize {
        // An in-memory database is never read back. Owners above the limit are recorded again when
        // a later response names them.
        if self.site.location == DatabaseLocation::Memory || self.held.owners.len() >= self.settings.queue_max
        {
            batch.owners.clear();
        }
        batch.owners.retain(owners::is_stored);
        let records = batch.attempts.len();
        if self.held.attempts.is_empty() && records > 0 {
            self.health.set_held_since(clock::now());
        }
        self.held.append(batch);
        if self.health.is_failing() {
            self.drop_excess();
        }
        records
    }

    /// Drops the latest records above the limit while nothing can be written.
    fn drop_excess(&mut self) {
        let held = self.settings.queue_max;
        let lost = self.held.attempts.len().saturating_sub(held);
        self.held.attempts.truncate(held);
        if lost > 0 && self.health.lost() == self.lost_before {
            error!(
                event = "usage_records_dropped",
                held,
                "Usage records are lost: the database cannot be written, and no more than {held} can be kept"
            );
        }
        self.health.lose(lost);
    }

    pub(super) fn flush(&mut self) {
        let is_stale = self.are_keys_stale || self.are_refusals_stale();
        if self.held.is_empty() && !is_stale && !self.health.is_failing() {
            return;
        }
        match self.write() {
            Ok(()) => self.written(),
            Err(error) => self.failed(&error),
        }
    }

    /// Whether restrictions have changed or ended, which can happen without a usage record.
    fn are_refusals_stale(&self) -> bool {
        let database = self.database.as_ref();
        database.is_some_and(|database| database.refusals.are_stale(self.pool.restrictions(), clock::now()))
    }

    fn write(&mut self) -> Result<(), WriteError> {
        // If the file was removed, the batch is written once more, to the next file.
        for _ in 0..2 {
            let database = match self.database.take() {
                Some(database) => database,
                None => self.reopen()?,
            };
            let database = self.database.insert(database);
            let now = clock::now();
            // The state of the keys is read when it is written, so the file never holds a state
            // older than a record.
            let charged = self.held.attempts.iter().filter_map(|attempt| attempt.key.as_ref());
            let charged: HashSet<*const Workspace> =
                charged.map(|key| std::ptr::from_ref(key.workspace())).collect();
            let is_stale = |workspace: &Workspace| charged.contains(&std::ptr::from_ref(workspace));
            let keys = self.pool.snapshot_of(now, |key| self.are_keys_stale || is_stale(key.workspace()));
            database.refusals.prepare(self.pool.restrictions(), now);
            let committed = rows::commit(database, &self.held, &keys, self.settings.mirrored, now);
            if !database.is_gone() {
                return Ok(committed?);
            }
            error!(
                event = "usage_store_ended",
                "The file of the usage records was removed or replaced; it is opened anew, and what it held is gone"
            );
            self.close();
        }
        Err(WriteError::FileReplaced)
    }

    fn reopen(&mut self) -> Result<Database, OpenError> {
        let mut database = self.site.open(clock::now(), self.check)?.database;
        database.recognize(self.pool.roster().keys().iter().map(|key| key.api_key()));
        Ok(database)
    }

    /// Closes the database; the next write opens the path again, which may be another file then.
    fn close(&mut self) {
        self.are_keys_stale = true;
        if let Some(database) = self.database.take() {
            database.abandon();
        }
    }

    fn written(&mut self) {
        let UsageBatch { attempts, owners, .. } = std::mem::take(&mut self.held);
        let count = attempts.len();
        self.owners_written += owners.len();
        self.health.count_written(count);
        self.are_keys_stale = false;
        self.check = IntegrityCheck::Skip;
        if self.health.set_failing(false) {
            let lost = self.health.lost() - self.lost_before;
            info!(
                event = "usage_store_recovered",
                count,
                lost,
                "The database is written again: {count} usage records were kept, {lost} are lost"
            );
        }
        if self.site.location == DatabaseLocation::Memory {
            self.in_memory += count;
            if self.in_memory > MEMORY_RECORDS_MAX {
                self.delete_memory_records();
            }
        }
    }

    fn delete_memory_records(&mut self) {
        self.in_memory = 0;
        if let Some(database) = &self.database {
            // An in-memory database fails only when memory is exhausted.
            let _ = attempts::delete_all(&database.connection);
        }
    }

    /// Records a failed write, and logs it once per outage.
    fn failed(&mut self, error: &WriteError) {
        if let WriteError::Sqlite(error) = error {
            self.choose_next_check(error);
        }
        self.health.count_error();
        // The next success only proves recovery if it writes something.
        self.are_keys_stale = true;
        self.retry_at = clock::instant() + RETRY_PAUSE;
        self.log_failing(error);
        self.drop_excess();
    }

    /// Logs once per outage that usage records cannot be written.
    pub(super) fn log_failing(&mut self, error: &dyn std::error::Error) {
        if !self.health.set_failing(true) {
            self.lost_before = self.health.lost();
            warn!(
                event = "usage_store_failing",
                "The database cannot be written: {error}; requests go on, usage records are kept and written later"
            );
        }
    }

    /// Decides how the next open checks the file: after an I/O error the connection is closed, as
    /// it may not recover. A file reported as corrupt is checked in full, and quarantined if it is
    /// reported again.
    fn choose_next_check(&mut self, error: &rusqlite::Error) {
        if is_broken(error) {
            self.check = if self.check == IntegrityCheck::Skip {
                IntegrityCheck::Full
            } else {
                IntegrityCheck::Quarantine
            };
        }
        let is_sound = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull | ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => true,
            Some(_) | None => self.site.location == DatabaseLocation::Memory,
        };
        if !is_sound {
            self.close();
        }
    }

    /// Whether maintenance is due: at its interval, or early when rows arrive faster than the
    /// interval would bound them.
    fn is_maintenance_due(&self, now: Instant) -> bool {
        let is_due = self.maintenance_at <= now || self.owners_written > OWNERS_UNTIL_MAINTENANCE;
        is_due && !self.health.is_failing()
    }

    fn maintain(&mut self, now: Instant) {
        let Some(database) = &mut self.database else { return };
        let is_round = self.maintenance_at <= now;
        let step = if is_round {
            maintenance::step(database, &self.settings, clock::now())
        } else {
            maintenance::trim_owners(database, &self.settings, clock::now())
        };
        match step {
            Ok(MaintenanceStep::More) => return,
            Ok(MaintenanceStep::Done) => {}
            Err(error) => self.failed(&error.into()),
        }
        self.owners_written = 0;
        if is_round {
            self.maintenance_at = now + MAINTENANCE_INTERVAL;
        }
    }

    async fn end(&mut self) {
        for remaining in (0..END_TRIES).rev() {
            self.flush();
            if !self.health.is_failing() {
                return;
            }
            if remaining > 0 {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
        self.health.lose(self.held.attempts.len());
    }
}
