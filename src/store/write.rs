//! Runs the writer thread: commits the queued usage records, the changed keys and refusals, and the changes of
//! operators. A commit starts immediately after an idle period, and at intervals while more records arrive. Records
//! that cannot be written are kept up to a limit and retried. Between commits the thread runs the commands of the
//! mirror and of the history, and maintenance, and limits an in-memory database.

mod failure;
mod history;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tracing::{error, info};

use super::database::Database;
use super::history::HistoryCommand;
use super::maintenance::{self, MaintenanceProgress};
use super::open::{IntegrityCheck, OpenError};
use super::outbox::{self, OutboxCommand};
use super::{Health, LockableLocation, Settings, attempts, owners, transaction, users};
use crate::clock;
use crate::policy::commit_schedule;
use crate::pool::{Pool, Workspace};
use crate::proxy::{UsageBatch, UsageQueue};
use failure::WriteError;

/// A commit starts early when the length of the queue is its maximum length divided by this number.
const EARLY_COMMIT_DIVISOR: usize = 2;
/// Interval at which a failed write is retried.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of writes at shutdown. Another connection may release its lock between two writes, but a full disk
/// stays full.
const MAX_FINAL_WRITES: u32 = 3;
/// Time between two rounds of maintenance.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(3_600);
/// Maximum number of owner changes between two deletions of excess owners.
const MAX_OWNER_CHANGES: usize = 20_000;
/// Maximum number of attempts in an in-memory database. When it is exceeded, all attempts are deleted, and the hourly
/// sums are kept.
const MAX_IN_MEMORY_ATTEMPTS: usize = 10_000;

/// The channels between the writer thread and the other modules.
pub(super) struct WriterChannels {
    pub(super) queue: UsageQueue,
    /// Commands of the mirror.
    pub(super) outbox_commands: mpsc::Receiver<OutboxCommand>,
    /// Commands of the admin API, and of requests that read the usage of a user.
    pub(super) history_commands: mpsc::Receiver<HistoryCommand>,
    /// Signals that the queue has ended and its records are written or lost.
    pub(super) all_written: oneshot::Sender<()>,
}

/// The state of the writer thread.
pub(super) struct Writer {
    /// The open database, or `None` until the next write opens it.
    pub(super) database: Option<Database>,
    pub(super) location: LockableLocation,
    settings: Settings,
    pool: Arc<Pool>,
    health: Health,
    /// Records taken from the queue and not yet written.
    unwritten: UsageBatch,
    /// Changes of operators that are not written yet, each with the channel that confirms it.
    unwritten_changes: Vec<history::UnwrittenChange>,
    /// Time from the start of one commit to the start of the next.
    commit_interval: Duration,
    /// Number of owner changes written after the last maintenance.
    owner_changes: usize,
    /// Whether the file may lack the current state of keys that have no unwritten record.
    are_keys_stale: bool,
    /// The check of the file when it is opened next.
    next_check: IntegrityCheck,
    /// Number of records that were lost before the current outage.
    lost_before_outage: u64,
    /// The time at which a failed write is retried.
    retry_at: Instant,
    /// The time at which maintenance runs next.
    maintenance_at: Instant,
    /// Number of attempts in an in-memory database.
    in_memory_attempts: usize,
}

/// The reason why the writer thread wakes between two commits.
enum WakeReason {
    /// The queue has records or changes of owners, or the state of keys has changed.
    QueueFilled,
    /// The last sender of the queue was dropped.
    QueueEnded,
    /// The mirror has sent a command.
    OutboxCommand(OutboxCommand),
    /// A command of the history was run, or a retry or maintenance is due.
    Other,
}

/// Returns the number of queued records that starts a commit early, so that the queue does not fill up.
pub(super) fn early_commit_size(settings: &Settings) -> usize {
    (settings.max_queued_records / EARLY_COMMIT_DIVISOR).max(1)
}

impl Writer {
    pub(super) fn new(
        database: Option<Database>,
        location: LockableLocation,
        settings: Settings,
        pool: Arc<Pool>,
        health: Health,
    ) -> Self {
        let now = clock::instant();
        Self {
            database,
            location,
            settings,
            pool,
            health,
            unwritten: UsageBatch::default(),
            unwritten_changes: Vec::new(),
            commit_interval: commit_schedule::commit_interval(0, Duration::ZERO, settings.commit_interval),
            owner_changes: 0,
            are_keys_stale: true,
            next_check: IntegrityCheck::Skip,
            lost_before_outage: 0,
            retry_at: now,
            maintenance_at: now,
            in_memory_attempts: 0,
        }
    }

    /// Writes records until the last sender is dropped and every record is written or lost. Then runs the commands of
    /// the mirror until its handle is dropped.
    pub(super) async fn run(mut self, channels: WriterChannels) {
        let WriterChannels { mut queue, mut outbox_commands, mut history_commands, all_written } = channels;
        let mut last_commit_started = clock::instant();
        loop {
            let now = clock::instant();
            let maintenance_at = if self.is_maintenance_due(now) { now } else { self.maintenance_at };
            let wake_at = if self.health.is_failing() { self.retry_at } else { maintenance_at };
            let wake_reason = tokio::select! {
                biased;
                has_entries = queue.wait_for_entries() => {
                    if has_entries { WakeReason::QueueFilled } else { WakeReason::QueueEnded }
                }
                Some(command) = outbox_commands.recv() => WakeReason::OutboxCommand(command),
                Some(command) = history_commands.recv() => {
                    self.run_history_command(command);
                    WakeReason::Other
                }
                () = tokio::time::sleep_until(wake_at.into()) => WakeReason::Other,
            };
            let (is_queue_filled, command) = match wake_reason {
                WakeReason::QueueFilled => (true, None),
                WakeReason::QueueEnded => break,
                WakeReason::OutboxCommand(command) => (false, Some(command)),
                WakeReason::Other => (false, None),
            };
            let started_at = clock::instant();
            if is_queue_filled {
                let records = self.take_queued(&mut queue) as u64;
                let elapsed = started_at.saturating_duration_since(last_commit_started);
                self.commit_interval =
                    commit_schedule::commit_interval(records, elapsed, self.settings.commit_interval);
                last_commit_started = started_at;
            }
            self.run_due_work(started_at);
            // A busy queue must not starve the mirror.
            if let Some(command) = command.or_else(|| outbox_commands.try_recv().ok()) {
                self.run_outbox_command(command);
            }
            // A busy queue must not starve requests that wait for the usage of their user either.
            for _ in 0..history_commands.max_capacity() {
                let Ok(command) = history_commands.try_recv() else { break };
                self.run_history_command(command);
            }
            if is_queue_filled {
                self.wait_for_next_commit(started_at, &queue, &mut outbox_commands, &mut history_commands)
                    .await;
            }
        }
        self.write_last_records().await;
        // The receiver may have been dropped.
        let _ = all_written.send(());
        while let Some(command) = outbox_commands.recv().await {
            self.run_outbox_command(command);
        }
    }

    /// Waits until the next commit may start, and runs commands and maintenance during the wait. Records do not wake
    /// the thread until the queue reaches the size of an early commit.
    async fn wait_for_next_commit(
        &mut self,
        last_commit_started: Instant,
        queue: &UsageQueue,
        outbox_commands: &mut mpsc::Receiver<OutboxCommand>,
        history_commands: &mut mpsc::Receiver<HistoryCommand>,
    ) {
        let early_commit_size = early_commit_size(&self.settings) as u64;
        loop {
            let now = clock::instant();
            let elapsed = now.saturating_duration_since(last_commit_started);
            let pause = commit_schedule::next_commit_delay(
                elapsed,
                self.commit_interval,
                queue.queued(),
                early_commit_size,
            );
            if pause.is_zero() || queue.is_ended() {
                return;
            }
            tokio::select! {
                biased;
                Some(command) = outbox_commands.recv() => self.run_outbox_command(command),
                Some(command) = history_commands.recv() => self.run_history_command(command),
                () = std::future::ready(()), if self.is_maintenance_due(now) => self.run_maintenance_step(now),
                () = queue.wait_for_batch() => {}
                () = tokio::time::sleep(pause) => return,
            }
        }
    }

    /// Runs a command of the mirror. While writes fail, the command is dropped, and the mirror sends it
    /// again.
    fn run_outbox_command(&mut self, command: OutboxCommand) {
        let now = clock::now();
        let keys = self.pool.snapshot(now);
        let database = self.database.as_mut().filter(|_| !self.health.is_failing());
        let Some(database) = database else { return };
        if let Err(error) = outbox::run_command(&mut database.connection, command, &keys, now) {
            self.record_failure(&error.into());
        }
    }

    /// Writes pending records and runs due maintenance. Failed writes are retried once per
    /// [`RETRY_INTERVAL`], regardless of the rate of new records.
    pub(super) fn run_due_work(&mut self, now: Instant) {
        if !self.health.is_failing() || self.retry_at <= now {
            self.flush();
        }
        if self.is_maintenance_due(now) {
            self.run_maintenance_step(now);
        }
    }

    /// Takes all records from the queue, and returns their number.
    fn take_queued(&mut self, queue: &mut UsageQueue) -> usize {
        let mut batch = UsageBatch::default();
        self.are_keys_stale |= queue.take(&mut batch);
        self.add_batch(batch)
    }

    /// Adds records to be written, and returns their number.
    pub(super) fn add_batch(&mut self, mut batch: UsageBatch) -> usize {
        // Startup never reads owners from an in-memory database. Owners above the limit are recorded again when a later
        // response names them.
        if self.location.is_memory() || self.unwritten.owners.len() >= self.settings.max_queued_records {
            batch.owners.clear();
        }
        batch.owners.retain(owners::is_stored);
        let records = batch.attempts.len();
        if self.unwritten.attempts.is_empty() && records > 0 {
            self.health.set_unwritten_since(clock::now());
        }
        self.unwritten.append(batch);
        if self.health.is_failing() {
            self.drop_excess_records();
        }
        records
    }

    /// Drops the latest records above the limit while nothing can be written.
    fn drop_excess_records(&mut self) {
        let max_records = self.settings.max_queued_records;
        let lost_count = self.unwritten.attempts.len().saturating_sub(max_records);
        self.unwritten.attempts.truncate(max_records);
        if lost_count > 0 && self.health.lost_records() == self.lost_before_outage {
            error!(
                event = "usage_records_dropped",
                max_records,
                "Usage records are lost: the database cannot be written, and no more than {max_records} can be kept"
            );
        }
        self.health.count_lost(lost_count);
    }

    /// Writes the unwritten records and changes, and the keys and refusals that have changed. While writes fail, it
    /// also writes unchanged keys, which proves that the database can be written again.
    pub(super) fn flush(&mut self) {
        let is_stale = self.are_keys_stale || self.are_refusals_stale();
        let has_records = !self.unwritten.is_empty() || !self.unwritten_changes.is_empty();
        if !has_records && !is_stale && !self.health.is_failing() {
            return;
        }
        match self.write() {
            Ok(()) => self.record_success(),
            Err(error) => self.record_failure(&error),
        }
    }

    /// Returns whether restrictions have changed or ended, which can happen without a usage record.
    fn are_refusals_stale(&self) -> bool {
        let database = self.database.as_ref();
        database.is_some_and(|database| database.refusals.are_stale(self.pool.restrictions(), clock::now()))
    }

    /// Writes everything that is unwritten, and opens the database first if it is not open.
    fn write(&mut self) -> Result<(), WriteError> {
        // If the file was removed, the records are written once more, to a new file.
        for _ in 0..2 {
            let database = match self.database.take() {
                Some(database) => database,
                None => self.reopen()?,
            };
            let database = self.database.insert(database);
            let now = clock::now();
            // The state of a key is read when its records are written, so the stored state is never older
            // than a stored record.
            let charged_keys = self.unwritten.attempts.iter().filter_map(|attempt| attempt.key.as_ref());
            let charged_workspaces: HashSet<*const Workspace> =
                charged_keys.map(|key| std::ptr::from_ref(key.workspace())).collect();
            let is_charged =
                |workspace: &Workspace| charged_workspaces.contains(&std::ptr::from_ref(workspace));
            let keys = self.pool.snapshot_of(now, |key| self.are_keys_stale || is_charged(key.workspace()));
            database.refusals.prepare(self.pool.restrictions(), now);
            history::write_changes(&database.connection, &mut self.unwritten_changes)?;
            let committed =
                transaction::commit(database, &self.unwritten, &keys, self.settings.mirror_scope, now);
            if !database.is_file_gone() {
                return Ok(committed?);
            }
            error!(
                event = "usage_store_ended",
                "The database file was removed or replaced: its records are lost, and the file is opened again"
            );
            self.close();
        }
        Err(WriteError::FileReplaced)
    }

    fn reopen(&mut self) -> Result<Database, OpenError> {
        let mut database = self.location.open(clock::now(), self.next_check)?.database;
        database.rename_keys(self.pool.roster().keys().iter().map(|key| key.api_key()));
        Ok(database)
    }

    /// Closes the database. The next write opens the path again, which may name another file.
    fn close(&mut self) {
        self.are_keys_stale = true;
        if let Some(database) = self.database.take() {
            database.close_without_checkpoint();
        }
    }

    fn record_success(&mut self) {
        let UsageBatch { attempts, owners, .. } = std::mem::take(&mut self.unwritten);
        let count = attempts.len();
        self.owner_changes += owners.len();
        self.health.count_written(count);
        self.are_keys_stale = false;
        self.next_check = IntegrityCheck::Skip;
        if self.health.set_failing(false) {
            let lost_records = self.health.lost_records() - self.lost_before_outage;
            info!(
                event = "usage_store_recovered",
                count,
                lost_records,
                "The database can be written again: {count} usage records were kept, {lost_records} are lost"
            );
        }
        if self.location.is_memory() {
            self.in_memory_attempts += count;
            if self.in_memory_attempts > MAX_IN_MEMORY_ATTEMPTS
                && let Some(database) = &self.database
            {
                self.in_memory_attempts = 0;
                // An in-memory database fails only when memory is exhausted.
                let _ = attempts::delete_all(&database.connection);
                let _ = users::delete_excess(&database.connection, users::MAX_IN_MEMORY_ROWS);
            }
        }
    }

    /// Returns whether maintenance is due: at its interval, or early when many owners were written.
    fn is_maintenance_due(&self, now: Instant) -> bool {
        let is_round_due = self.maintenance_at <= now || self.owner_changes > MAX_OWNER_CHANGES;
        is_round_due && !self.health.is_failing()
    }

    fn run_maintenance_step(&mut self, now: Instant) {
        let Some(database) = &mut self.database else { return };
        let is_full_round = self.maintenance_at <= now;
        let progress = if is_full_round {
            maintenance::run_step(database, &self.settings, clock::now())
        } else {
            maintenance::delete_excess_owners(database, &self.settings, clock::now())
        };
        match progress {
            Ok(MaintenanceProgress::MoreWork) => return,
            Ok(MaintenanceProgress::Done) => {}
            Err(error) => self.record_failure(&error.into()),
        }
        self.owner_changes = 0;
        if is_full_round {
            self.maintenance_at = now + MAINTENANCE_INTERVAL;
        }
    }

    /// Writes the records that are left at shutdown. Records that cannot be written are counted as lost.
    async fn write_last_records(&mut self) {
        for remaining in (0..MAX_FINAL_WRITES).rev() {
            self.flush();
            if !self.health.is_failing() {
                return;
            }
            if remaining > 0 {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
        self.health.count_lost(self.unwritten.attempts.len());
    }
}
