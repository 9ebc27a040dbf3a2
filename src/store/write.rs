//! The writing thread: what has gathered in the queue goes into one transaction, at once after a quiet
//! moment and in steps while records keep coming. What cannot be written is held and tried again;
//! between two transactions old records go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::ErrorCode;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use super::database::Database;
use super::held::HeldTransaction;
use super::maintenance::{self, MaintenanceStep};
use super::open::{IntegrityCheck, OpenError, is_broken};
use super::outbox::{self, Command};
use super::pending::CommitUncertainty;
use super::touched::Touched;
use super::{DatabaseLocation, Health, Settings, Site, rows};
use crate::clock;
use crate::policy::pace;
use crate::pool::Pool;
use crate::proxy::UsageQueue;

/// Of the room in the queue, the part that is worth a commit before its time.
const BATCH_SHARE: usize = 2;
/// After a failure, how long until the next try.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// At the end of the program, so many tries: a lock may be released, an empty disk will not be.
const END_TRIES: u32 = 3;
/// From one round of chores to the next.
const CHORES_INTERVAL: Duration = Duration::from_secs(3_600);
/// So many changes of owners are looked after at once.
const OWNERS_UNTIL_CHORES: usize = 20_000;
/// Without a file, so many attempts are kept; their sums stay.
const MEMORY_RECORDS_MAX: usize = 10_000;

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Sqlite(#[from] rusqlite::Error),
    #[error("the file disappears as soon as it is made")]
    Gone,
}

/// Who comes to the writing thread, and whom it tells that all is written.
pub(super) struct Callers {
    pub(super) queue: UsageQueue,
    pub(super) questions: mpsc::Receiver<Command>,
    pub(super) all_written: oneshot::Sender<()>,
}

pub(super) struct Writer {
    pub(super) ledger: Option<Database>,
    site: Site,
    settings: Settings,
    pool: Arc<Pool>,
    health: Health,
    /// Taken from the queue and not yet written.
    held: HeldTransaction,
    doubt: CommitUncertainty,
    /// How long after the last commit the next one begins.
    interval: Duration,
    /// Changes of owners since the last chores.
    owners_written: usize,
    are_keys_stale: bool,
    /// How closely the next file is looked at.
    look: IntegrityCheck,
    /// What was lost before this failure.
    lost_before: u64,
    retry_at: Instant,
    chores_at: Instant,
    /// Written to books in memory since they were last emptied.
    in_memory: usize,
}

/// So many records are committed before their time with these settings: the queue must not fill.
pub(super) fn batch(settings: &Settings) -> usize {
    (settings.queue_max / BATCH_SHARE).max(1)
}

impl Writer {
    pub(super) fn new(
        ledger: Option<Database>,
        site: Site,
        settings: Settings,
        pool: Arc<Pool>,
        health: Health,
    ) -> Self {
        let now = clock::instant();
        Self {
            ledger,
            site,
            settings,
            pool,
            health,
            held: HeldTransaction::default(),
            doubt: CommitUncertainty::default(),
            interval: pace::interval(0, Duration::ZERO, settings.commit_interval),
            owners_written: 0,
            are_keys_stale: true,
            look: IntegrityCheck::Trusting,
            lost_before: 0,
            retry_at: now,
            chores_at: now,
            in_memory: 0,
        }
    }

    /// Writes until the last sender is gone and everything is written, or cannot be, and answers
    /// the mirror until that is gone, too.
    pub(super) async fn run(mut self, callers: Callers) {
        let Callers { mut queue, mut questions, all_written } = callers;
        let mut last_began = clock::instant();
        loop {
            let now = clock::instant();
            let chores_at = if self.has_chores(now) { now } else { self.chores_at };
            let wake_at = if self.health.is_failing() { self.retry_at } else { chores_at };
            let mut question = None;
            let is_filled = tokio::select! {
                biased;
                is_filled = queue.filled() => Some(is_filled),
                Some(asked) = questions.recv() => {
                    question = Some(asked);
                    None
                }
                () = tokio::time::sleep_until(wake_at.into()) => None,
            };
            if is_filled == Some(false) {
                break;
            }
            let began = clock::instant();
            if is_filled.is_some() {
                let came = self.take_from(&mut queue) as u64;
                let over = began.saturating_duration_since(last_began);
                self.interval = pace::interval(came, over, self.settings.commit_interval);
                last_began = began;
            }
            self.work(began);
            // A busy queue must not keep the mirror waiting for ever.
            if let Some(question) = question.or_else(|| questions.try_recv().ok()) {
                self.answer(question);
            }
            if is_filled.is_some() {
                self.rest(began, &queue, &mut questions).await;
            }
        }
        self.end().await;
        // Nobody may be waiting for it.
        let _ = all_written.send(());
        while let Some(question) = questions.recv().await {
            self.answer(question);
        }
    }

    /// Waits until the next commit may begin. What is sent meanwhile wakes nobody, unless it fills a
    /// commit; the mirror is answered, and old records go.
    async fn rest(&mut self, began: Instant, queue: &UsageQueue, questions: &mut mpsc::Receiver<Command>) {
        let batch = batch(&self.settings) as u64;
        loop {
            let now = clock::instant();
            let since = now.saturating_duration_since(began);
            let pause = pace::pause(since, self.interval, queue.waiting(), batch);
            if pause.is_zero() || queue.is_ended() {
                return;
            }
            tokio::select! {
                biased;
                Some(question) = questions.recv() => self.answer(question),
                () = std::future::ready(()), if self.has_chores(now) => self.do_chore(now),
                () = queue.called() => {}
                () = tokio::time::sleep(pause) => return,
            }
        }
    }

    /// Answers the mirror, or lets its question fall: it will ask again.
    fn answer(&mut self, question: Command) {
        let now = clock::now();
        let keys = self.pool.snapshot(now);
        let ledger = self.ledger.as_mut().filter(|_| !self.health.is_failing());
        let Some(ledger) = ledger else { return };
        if let Err(error) = outbox::answer(&mut ledger.connection, question, &keys, now) {
            self.failed(&error.into());
        }
    }

    /// Does what is due. A failing disk is asked once a pause, however much comes in meanwhile.
    pub(super) fn work(&mut self, now: Instant) {
        if !self.health.is_failing() || self.retry_at <= now {
            self.flush();
        }
        if self.has_chores(now) {
            self.do_chore(now);
        }
    }

    /// Takes all that is in the queue; returns how many records these are.
    fn take_from(&mut self, queue: &mut UsageQueue) -> usize {
        let before = self.held.records();
        self.are_keys_stale |= self.held.take_from(queue, &self.site.place, &self.settings);
        self.taken(before)
    }

    #[cfg(test)]
    pub(super) fn take(&mut self, sheet: crate::proxy::UsageBatch) {
        let before = self.held.records();
        self.held.take(sheet, &self.site.place, &self.settings);
        self.taken(before);
    }

    fn taken(&mut self, before: usize) -> usize {
        let came = self.held.records() - before;
        if before == 0 && came > 0 {
            self.health.set_held_since(clock::now());
        }
        if self.health.is_failing() {
            self.shed();
        }
        came
    }

    /// Loses what is too much to be held while nothing can be written.
    fn shed(&mut self) {
        let held = self.settings.queue_max;
        let lost = self.held.shed(held);
        if lost > 0 && self.health.lost() == self.lost_before {
            error!(
                event = "usage_records_dropped",
                held,
                "Usage records are lost: the books cannot be written, and no more than {held} can be held"
            );
        }
        self.health.lose(lost);
    }

    pub(super) fn flush(&mut self) {
        let is_stale = self.are_keys_stale || self.are_refusals_stale();
        if self.held.sheets().is_empty() && !is_stale && !self.health.is_failing() {
            return;
        }
        match self.write() {
            Ok(()) => self.written(),
            Err(error) => self.failed(&error),
        }
    }

    /// Whether restrictions have changed or ended, which no record need tell.
    fn are_refusals_stale(&self) -> bool {
        let ledger = self.ledger.as_ref();
        ledger.is_some_and(|ledger| ledger.refusals.are_stale(self.pool.restrictions(), clock::now()))
    }

    fn write(&mut self) -> Result<(), WriteError> {
        // What went into a file that is gone goes once more, into the next one.
        for _ in 0..2 {
            let ledger = match self.ledger.take() {
                Some(ledger) => ledger,
                None => self.reopen()?,
            };
            let ledger = self.ledger.insert(ledger);
            let now = clock::now();
            // The state is read when it is written: what is in the file is never older than a record.
            let sheets = self.held.sheets();
            let touched = Touched::by(sheets);
            let keys = self.pool.snapshot_of(now, |key| self.are_keys_stale || touched.includes(key));
            ledger.refusals.prepare(self.pool.restrictions(), now);
            let mirrored = self.settings.mirrored;
            let committed = rows::commit(ledger, sheets, &keys, mirrored, &mut self.doubt, now);
            if !ledger.is_gone() {
                return Ok(committed?);
            }
            // What lies there now may have been copied after that.
            self.doubt.arises();
            error!(
                event = "usage_store_ended",
                "The file of the usage records was removed or replaced; it is opened anew, and what it held is gone"
            );
            self.close();
        }
        Err(WriteError::Gone)
    }

    fn reopen(&mut self) -> Result<Database, OpenError> {
        let mut ledger = self.site.open(clock::now(), self.look)?.ledger;
        ledger.recognize(self.pool.roster().keys().iter().map(|key| key.api_key()));
        Ok(ledger)
    }

    /// The next write opens the file anew, whatever lies there then.
    fn close(&mut self) {
        self.are_keys_stale = true;
        if let Some(ledger) = self.ledger.take() {
            ledger.abandon();
        }
    }

    fn written(&mut self) {
        let (count, owners) = self.held.written();
        self.owners_written += owners;
        self.health.count_written(count);
        self.are_keys_stale = false;
        self.look = IntegrityCheck::Trusting;
        if self.health.set_failing(false) {
            let lost = self.health.lost() - self.lost_before;
            info!(
                event = "usage_store_recovered",
                count, lost, "The books are written again: {count} records were held, {lost} are lost"
            );
        }
        if self.site.place == DatabaseLocation::Memory {
            self.in_memory += count;
            if self.in_memory > MEMORY_RECORDS_MAX {
                self.empty_memory();
            }
        }
    }

    fn empty_memory(&mut self) {
        self.in_memory = 0;
        if let Some(ledger) = &self.ledger {
            // Nothing can fail here but memory itself.
            let _ = ledger.connection.execute_batch("DELETE FROM attempt_rows; DELETE FROM attempt_sheets");
        }
    }

    /// Takes in that nothing was written, and says so once.
    fn failed(&mut self, error: &WriteError) {
        if let WriteError::Sqlite(error) = error {
            self.suspect(error);
        }
        self.health.count_error();
        // The next success proves something only if something is written.
        self.are_keys_stale = true;
        self.retry_at = clock::instant() + RETRY_PAUSE;
        self.say_failing(error);
        self.shed();
    }

    /// Says once that the books cannot be written.
    pub(super) fn say_failing(&mut self, error: &dyn std::error::Error) {
        if !self.health.set_failing(true) {
            self.lost_before = self.health.lost();
            warn!(
                event = "usage_store_failing",
                "The books cannot be written: {error}; requests go on, records are held and written later"
            );
        }
    }

    /// A connection that met an error of the disk may not recover; a file that is broken is looked
    /// through, and set aside when it says so again.
    fn suspect(&mut self, error: &rusqlite::Error) {
        if is_broken(error) {
            self.look = if self.look == IntegrityCheck::Trusting {
                IntegrityCheck::Whole
            } else {
                IntegrityCheck::Condemning
            };
        }
        let is_sound = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull | ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => true,
            Some(_) | None => self.site.place == DatabaseLocation::Memory,
        };
        if !is_sound {
            self.close();
        }
    }

    /// Whether old records are due to go. What comes faster than that must not grow without a bound
    /// until then.
    fn has_chores(&self, now: Instant) -> bool {
        let is_due = self.chores_at <= now || self.owners_written > OWNERS_UNTIL_CHORES;
        is_due && !self.health.is_failing()
    }

    fn do_chore(&mut self, now: Instant) {
        let Some(ledger) = &mut self.ledger else { return };
        let is_round = self.chores_at <= now;
        let step = if is_round {
            maintenance::step(ledger, &self.settings, clock::now())
        } else {
            maintenance::trim_owners(ledger, &self.settings, clock::now())
        };
        match step {
            Ok(MaintenanceStep::More) => return,
            Ok(MaintenanceStep::Done) => {}
            Err(error) => self.failed(&error.into()),
        }
        self.owners_written = 0;
        if is_round {
            self.chores_at = now + CHORES_INTERVAL;
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
        self.health.lose(self.held.records());
    }
}
