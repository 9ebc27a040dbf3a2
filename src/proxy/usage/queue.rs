//! Queues usage records and ownership updates between the requests and the thread that writes the usage store. While
//! the queue has its maximum length, no permit for another entry is issued. Senders do not contend with each other. An
//! idle writer is woken by any entry, a writer that waits for a batch by a full batch, and both when the last sender is
//! dropped.
//!
//! Each thread fills its own batch, and the writer takes all batches together. The lock of a batch is
//! contended only while the writer takes it.

use std::mem;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::batch::UsageBatch;
use super::record::{AttemptRecord, OwnershipUpdate};

/// The number of records that are queued, or taken by the writer and not written yet. Clones share the
/// counts.
#[derive(Clone, Debug, Default)]
pub struct QueueDepth(Arc<QueueCounts>);

/// The counts that the clones of a [`QueueDepth`] share.
#[derive(Debug, Default)]
struct QueueCounts {
    /// Entries in the queue.
    queued: AtomicU64,
    /// Records that the writer has taken, and has neither written nor lost.
    taken: AtomicU64,
}

impl QueueDepth {
    /// Returns the number of records that are not written yet. A set of ownership updates counts while it is
    /// in the queue.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.queued() + self.0.taken.load(Ordering::Acquire)
    }

    /// Returns the number of entries in the queue.
    fn queued(&self) -> u64 {
        self.0.queued.load(Ordering::SeqCst)
    }

    /// Counts `entries` as added to the queue, and returns the new length of the queue.
    pub fn record_sent(&self, entries: u64) -> u64 {
        self.0.queued.fetch_add(entries, Ordering::SeqCst) + entries
    }

    /// Counts `entries` and their `records` as taken by the writer, and returns the former length of the
    /// queue.
    pub fn record_taken(&self, entries: u64, records: u64) -> u64 {
        // In this order, a record may briefly be counted twice, but is never omitted.
        self.0.taken.fetch_add(records, Ordering::AcqRel);
        self.0.queued.fetch_sub(entries, Ordering::SeqCst)
    }

    /// Counts `records` as written or lost.
    pub fn remove_records(&self, records: u64) {
        self.0.taken.fetch_sub(records, Ordering::AcqRel);
    }
}

/// Number of batches that are filled in parallel. Up to this number of threads do not contend.
const SHARDS: usize = 16;

/// A batch that threads fill, aligned to its own cache line to avoid false sharing.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<UsageBatch>);

impl Shard {
    fn lock(&self) -> MutexGuard<'_, UsageBatch> {
        // Every change is complete before the lock is released, so a poisoned lock leaves consistent data.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the index of this thread's shard.
fn shard_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static INDEX: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    // A thread that is exiting may already have destroyed its thread-local.
    INDEX.try_with(|index| *index).unwrap_or(0)
}

/// The value of `wake_threshold` while the writer is working. The writer then needs no wakeup, because it
/// checks the queue before it waits.
const NEVER: u64 = u64::MAX;

/// The state that the senders and the writer share.
#[derive(Debug)]
struct UsageQueueState {
    shards: [Shard; SHARDS],
    depth: QueueDepth,
    /// The queue length at which the writer is woken once.
    wake_threshold: AtomicU64,
    /// Whether the state of the keys must be written.
    are_keys_changed: AtomicBool,
    /// Whether all senders and permits were dropped.
    is_ended: AtomicBool,
    /// Whether the receiving half was dropped.
    is_closed: AtomicBool,
    /// At this queue length, no permit is issued.
    max_entries: u64,
    /// The queue length that wakes a writer which waits for a batch.
    batch_size: u64,
    /// Wakes the writer.
    writer_wakeup: Notify,
    /// Notified when a full queue has capacity again.
    capacity_available: Notify,
}

impl UsageQueueState {
    /// Wakes the writer if it waits for at most this number of entries.
    fn wake_writer(&self, entries: u64) {
        if entries >= self.wake_threshold.load(Ordering::SeqCst)
            && self.wake_threshold.swap(NEVER, Ordering::SeqCst) != NEVER
        {
            self.writer_wakeup.notify_one();
        }
    }
}

/// The senders' reference to the state. Dropping the last sender wakes the writer.
#[derive(Debug)]
struct Senders(Arc<UsageQueueState>);

impl Drop for Senders {
    fn drop(&mut self) {
        self.0.is_ended.store(true, Ordering::SeqCst);
        self.0.writer_wakeup.notify_one();
    }
}

/// The sending half. Clones share the queue.
#[derive(Clone, Debug)]
pub struct UsageSink(Arc<Senders>);

/// The right to add one entry to the queue. It is acquired before a request is sent, so that a charged
/// attempt can always be recorded. A permit needs no capacity until the entry is added: the queue bounds only
/// the records that wait to be written, because `server.max_requests` bounds the requests in progress.
#[derive(Debug)]
pub struct UsagePermit(UsageSink);

/// The error for a queue that remained full, or whose receiving half was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue of usage records is full")]
pub struct QueueFull;

/// Maximum wait of a request for a permit. A full queue means that the disk is too slow, so an early error is
/// more useful to the client than a long wait.
const PERMIT_TIMEOUT: Duration = Duration::from_millis(50);

impl UsageSink {
    /// Creates a queue. With `max_entries` in the queue, no permit is issued. `batch_size` entries wake a
    /// writer that waits for a batch. `depth` counts the entries.
    #[must_use]
    pub fn new(max_entries: usize, batch_size: usize, depth: QueueDepth) -> (Self, UsageQueue) {
        let state = Arc::new(UsageQueueState {
            shards: Default::default(),
            depth,
            wake_threshold: AtomicU64::new(NEVER),
            are_keys_changed: AtomicBool::new(false),
            is_ended: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            max_entries: max_entries as u64,
            batch_size: batch_size as u64,
            writer_wakeup: Notify::new(),
            capacity_available: Notify::new(),
        });
        (Self(Arc::new(Senders(Arc::clone(&state)))), UsageQueue(state))
    }

    fn state(&self) -> &UsageQueueState {
        let Senders(state) = &*self.0;
        state
    }

    /// Acquires a permit. Waits up to 50 ms while the queue is full.
    ///
    /// # Errors
    ///
    /// Fails when the queue remains full, or its receiving half was dropped.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future acquires nothing.
    pub async fn acquire_permit(&self) -> Result<UsagePermit, QueueFull> {
        if !self.has_capacity() {
            tokio::time::timeout(PERMIT_TIMEOUT, self.wait_for_capacity()).await.map_err(|_| QueueFull)?;
        }
        if self.state().is_closed.load(Ordering::Acquire) {
            Err(QueueFull)
        } else {
            Ok(UsagePermit(self.clone()))
        }
    }

    /// Returns whether the queue contains less than its maximum number of entries.
    fn has_capacity(&self) -> bool {
        let state = self.state();
        state.depth.queued() < state.max_entries
    }

    /// Waits until the queue contains less than its maximum number of entries.
    async fn wait_for_capacity(&self) {
        loop {
            let mut notified = pin!(self.state().capacity_available.notified());
            // After this call, no notification is missed.
            notified.as_mut().enable();
            if self.has_capacity() {
                return;
            }
            notified.await;
        }
    }

    /// Requests that the state of the keys is written.
    pub fn request_key_state_write(&self) {
        let state = self.state();
        if !state.are_keys_changed.swap(true, Ordering::SeqCst) {
            // A state change wakes an idle writer, but does not count as an entry of a batch.
            state.wake_writer(1);
        }
    }

    /// Adds one entry to the batch of this thread.
    fn send(&self, add_entry: impl FnOnce(&mut UsageBatch)) {
        let state = self.state();
        let queued = {
            let mut batch = state.shards[shard_index()].lock();
            batch.entries += 1;
            add_entry(&mut batch);
            // The entry is counted under the lock, so that the writer never takes an uncounted entry. If the
            // receiving half was dropped, the entry remains in the queue and counts as lost at the end.
            state.depth.record_sent(1)
        };
        state.wake_writer(queued);
    }
}

impl UsagePermit {
    /// Queues the record of an attempt.
    pub fn write(self, record: AttemptRecord) {
        self.0.send(|batch| batch.attempts.push(record));
    }

    /// Requests that the state of all keys is written. The record alone writes only the state of the
    /// attempt's key.
    pub fn request_key_state_write(&self) {
        self.0.request_key_state_write();
    }

    /// Queues ownership updates. An empty list adds no entry.
    pub fn record_ownership(self, updates: Vec<OwnershipUpdate>) {
        if !updates.is_empty() {
            self.0.send(|batch| batch.owners.extend(updates));
        }
    }
}

/// The receiving half, which the writer of the usage store owns.
#[derive(Debug)]
pub struct UsageQueue(Arc<UsageQueueState>);

impl Drop for UsageQueue {
    fn drop(&mut self) {
        self.0.is_closed.store(true, Ordering::Release);
    }
}

impl UsageQueue {
    /// Waits for an entry or a state change and returns `true`, or returns `false` if all senders were
    /// dropped. Until the next [`take`](Self::take), any new entry wakes the writer.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn wait_for_entries(&self) -> bool {
        loop {
            self.0.wake_threshold.store(1, Ordering::SeqCst);
            // The end is read before the queue length, so that the length includes the entries of the last
            // sender.
            let is_ended = self.is_ended();
            if self.queued() > 0 || self.0.are_keys_changed.load(Ordering::SeqCst) {
                return true;
            }
            if is_ended {
                return false;
            }
            self.0.writer_wakeup.notified().await;
        }
    }

    /// Moves all entries of the queue to `taken`. Returns whether the state of the keys must be written.
    pub fn take(&mut self, taken: &mut UsageBatch) -> bool {
        let state = &*self.0;
        state.wake_threshold.store(NEVER, Ordering::SeqCst);
        let are_keys_changed = state.are_keys_changed.swap(false, Ordering::SeqCst);
        // All shards are locked together, so that no entry is taken before an earlier entry of another
        // thread.
        let mut shards = state.shards.each_ref().map(Shard::lock);
        let batches = shards.each_mut().map(|shard| mem::take(&mut **shard));
        drop(shards);
        let entries = batches.iter().map(|batch| batch.entries).sum();
        let records: usize = batches.iter().map(|batch| batch.attempts.len()).sum();
        // The locks are released, so senders do not wait for these copies.
        batches.into_iter().for_each(|batch| taken.append(batch));
        let former_length = state.depth.record_taken(entries, records as u64);
        if former_length >= state.max_entries {
            state.capacity_available.notify_waiters();
        }
        are_keys_changed
    }

    /// Returns the number of entries in the queue.
    #[must_use]
    pub fn queued(&self) -> u64 {
        self.0.depth.queued()
    }

    /// Returns whether all senders and permits were dropped.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.0.is_ended.load(Ordering::SeqCst)
    }

    /// Waits until the queue contains a batch or all senders were dropped. The future may also complete
    /// early. Fewer entries than a batch do not wake the writer.
    ///
    /// # Cancel safety
    ///
    /// If the future is dropped, the next call receives the notification.
    pub async fn wait_for_batch(&self) {
        self.0.wake_threshold.store(self.0.batch_size, Ordering::SeqCst);
        if self.queued() < self.0.batch_size && !self.is_ended() {
            self.0.writer_wakeup.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::{Context, Poll, Wake, Waker};

    use http::Method;
    use uuid::Uuid;

    use super::*;
    use crate::elevenlabs::endpoint::Route;
    use crate::policy::authority::{Authority, Scheme};
    use crate::policy::client::ClientName;
    use crate::policy::outcome::Outcome;
    use crate::policy::units::UnixMs;
    use crate::proxy::{CreditSource, QuotaCharge};

    const MAX_ENTRIES: usize = 8;

    fn create_queue() -> (UsageSink, UsageQueue) {
        UsageSink::new(MAX_ENTRIES, MAX_ENTRIES, QueueDepth::default())
    }

    fn record() -> AttemptRecord {
        AttemptRecord {
            id: Uuid::nil(),
            request_id: "request".into(),
            number: 1,
            started_at: UnixMs(0),
            client: ClientName::new("local"),
            user: None,
            authority: Arc::new(Authority::new(Scheme::Http, "localhost", 80, "").unwrap()),
            key: None,
            method: Method::GET,
            route: Route::parse("/v1/voices"),
            status: Some(200),
            outcome: Outcome::Served,
            request_bytes: 0,
            response_bytes: 0,
            model: None,
            characters: None,
            audio: None,
            credits_reserved: None,
            credits: 0,
            quota: QuotaCharge::default(),
            credits_from: CreditSource::Free,
            first_byte: None,
            total: Duration::ZERO,
            is_price_update: false,
        }
    }

    /// Takes all batches. Returns the number of records, and whether the state of the keys must be written.
    fn take_all(queue: &mut UsageQueue) -> (usize, bool) {
        let mut batch = UsageBatch::default();
        let are_keys_changed = queue.take(&mut batch);
        (batch.attempts.len(), are_keys_changed)
    }

    #[tokio::test(start_paused = true)]
    async fn requests_in_progress_use_no_queue_capacity() {
        let (usage, mut queue) = create_queue();
        let mut permits = Vec::new();
        for _ in 0..100 * MAX_ENTRIES {
            permits.push(usage.acquire_permit().await.unwrap());
        }
        for permit in permits.drain(..MAX_ENTRIES) {
            permit.write(record());
        }
        assert_eq!(usage.acquire_permit().await.unwrap_err(), QueueFull, "the queue must be full");
        let permit_count = permits.len();
        permits.into_iter().for_each(|permit| permit.write(record()));
        assert_eq!(
            take_all(&mut queue),
            (MAX_ENTRIES + permit_count, false),
            "every permit must add its record"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_permit_is_issued_when_a_full_queue_has_capacity_again() {
        let (usage, mut queue) = create_queue();
        for _ in 0..MAX_ENTRIES {
            usage.acquire_permit().await.unwrap().write(record());
        }
        let (permit, _) = tokio::join!(usage.acquire_permit(), async { take_all(&mut queue) });
        permit.unwrap().record_ownership(vec![]);
        assert_eq!(queue.queued(), 0, "an empty list must add no entry");
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_without_a_receiver_issues_no_permit() {
        let (usage, queue) = create_queue();
        drop(queue);
        assert_eq!(usage.acquire_permit().await.unwrap_err(), QueueFull);
    }

    #[tokio::test]
    async fn a_taken_record_counts_until_it_is_written() {
        let (usage, mut queue) = create_queue();
        let depth = queue.0.depth.clone();
        usage.acquire_permit().await.unwrap().write(record());
        usage.request_key_state_write();
        usage.request_key_state_write();
        assert_eq!((depth.records(), queue.queued()), (1, 1), "a state change must not count as a record");
        assert_eq!(take_all(&mut queue), (1, true));
        assert_eq!((depth.records(), queue.queued()), (1, 0), "the writer must have taken the record");
        depth.remove_records(1);
        assert_eq!((depth.records(), take_all(&mut queue)), (0, (0, false)));
    }

    #[test]
    fn records_of_several_threads_arrive_complete_and_in_order() {
        const THREADS: u32 = 8;
        const RECORDS_PER_THREAD: u32 = 2_000;
        let (usage, mut queue) = UsageSink::new(usize::MAX, usize::MAX, QueueDepth::default());
        let depth = queue.0.depth.clone();
        // The threads alternate, so that a thread with a later number follows one with an earlier number.
        let turn = Arc::new(Mutex::new(0_u32));
        for _ in 0..THREADS {
            let (usage, turn) = (usage.clone(), Arc::clone(&turn));
            let send = move || {
                for _ in 0..RECORDS_PER_THREAD {
                    let mut next = turn.lock().unwrap();
                    UsagePermit(usage.clone()).write(AttemptRecord { number: *next, ..record() });
                    *next += 1;
                }
            };
            crate::tasks::spawn_thread("sender", send).unwrap();
        }
        drop(usage);
        let mut next_number = 0;
        while !queue.is_ended() || queue.queued() > 0 {
            let mut batch = UsageBatch::default();
            queue.take(&mut batch);
            let mut numbers: Vec<u32> = batch.attempts.iter().map(|record| record.number).collect();
            numbers.sort_unstable();
            assert!(
                numbers.iter().copied().eq(next_number..next_number + numbers.len() as u32),
                "no record before {numbers:?} may be missing"
            );
            next_number += numbers.len() as u32;
            depth.remove_records(numbers.len() as u64);
        }
        assert_eq!((next_number, depth.records()), (THREADS * RECORDS_PER_THREAD, 0));
    }

    #[derive(Default)]
    struct WakeCounter(AtomicUsize);

    impl Wake for WakeCounter {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_writer_that_waits_for_a_batch_is_woken_only_by_a_batch_or_the_end() {
        let (usage, mut queue) = create_queue();
        let wakes = Arc::new(WakeCounter::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let wake_count = || wakes.0.load(Ordering::Relaxed);
        for round in 0..3 {
            {
                let mut batch_ready = pin!(queue.wait_for_batch());
                let mut poll = || batch_ready.as_mut().poll(&mut Context::from_waker(&waker));
                assert_eq!(poll(), Poll::Pending);
                for _ in 1..MAX_ENTRIES {
                    usage.acquire_permit().await.unwrap().write(record());
                }
                usage.request_key_state_write();
                assert_eq!(wake_count(), round);
                usage.acquire_permit().await.unwrap().write(record());
                assert_eq!(wake_count(), round + 1);
                assert_eq!(poll(), Poll::Ready(()));
            }
            take_all(&mut queue);
        }
        let permit = usage.acquire_permit().await.unwrap();
        drop(usage);
        assert!(!queue.is_ended(), "the permit must still be able to add an entry");
        drop(permit);
        assert!(queue.is_ended());
        queue.wait_for_batch().await;
        assert!(!queue.wait_for_entries().await);
    }

    #[tokio::test]
    async fn an_idle_writer_is_woken_once_by_any_entry() {
        let (usage, mut queue) = create_queue();
        let wakes = Arc::new(WakeCounter::default());
        let waker = Waker::from(Arc::clone(&wakes));
        for round in 0..4 {
            let permit = usage.acquire_permit().await.unwrap();
            {
                let mut entries = pin!(queue.wait_for_entries());
                let mut poll = || entries.as_mut().poll(&mut Context::from_waker(&waker));
                assert_eq!(poll(), Poll::Pending);
                match round % 2 {
                    0 => permit.write(record()),
                    _ => usage.request_key_state_write(),
                }
                usage.acquire_permit().await.unwrap().write(record());
                assert_eq!(wakes.0.load(Ordering::Relaxed), round + 1);
                assert_eq!(poll(), Poll::Ready(true));
            }
            take_all(&mut queue);
        }
    }
}
