//! The queue between the requests and the thread that writes the usage store. Its length is
//! bounded, senders do not contend with each other, and the writer is only woken for a full batch,
//! or when it is idle.
//!
//! Each thread fills a batch of its own, and the writer takes all batches at once. Each batch has a
//! lock, which is contended only at the moment of that exchange.

use std::mem;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::batch::UsageBatch;
use super::record::{AttemptRecord, OwnershipUpdate};

/// The number of records that are queued, or taken and neither written nor lost. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Depth(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    queued: AtomicU64,
    held: AtomicU64,
}

impl Depth {
    /// Number of records on their way. An ownership record counts while it is in the queue.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.queued() + self.0.held.load(Ordering::Acquire)
    }

    /// Number of entries in the queue.
    fn queued(&self) -> u64 {
        self.0.queued.load(Ordering::SeqCst)
    }

    /// Counts `entries` as added to the queue; returns its new length.
    pub fn record_sent(&self, entries: u64) -> u64 {
        self.0.queued.fetch_add(entries, Ordering::SeqCst) + entries
    }

    /// Counts `entries` as taken from the queue, and their `records` as held by the writer; returns
    /// the former length.
    pub fn record_taken(&self, entries: u64, records: u64) -> u64 {
        // In this order, a record may be counted twice for a moment, but is never left out.
        self.0.held.fetch_add(records, Ordering::AcqRel);
        self.0.queued.fetch_sub(entries, Ordering::SeqCst)
    }

    /// Counts `records` as written or lost.
    pub fn record_written(&self, records: u64) {
        self.0.held.fetch_sub(records, Ordering::AcqRel);
    }
}

/// Number of batches that are filled in parallel: up to this number of threads do not contend.
const SHARDS: usize = 16;

/// A batch that is being filled, on a cache line of its own to avoid false sharing.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Shard(Mutex<UsageBatch>);

impl Shard {
    fn lock(&self) -> MutexGuard<'_, UsageBatch> {
        // Every change is complete before the lock is released, so a poisoned lock leaves
        // consistent data.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The index of this thread's shard.
fn own_shard() -> usize {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static OWN: usize = THREADS.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    // A thread that ends may have destroyed its thread-local already.
    OWN.try_with(|own| *own).unwrap_or(0)
}

/// The value of `wake_threshold` while the writer works: it needs no wakeup, as it checks the queue
/// itself.
const NEVER: u64 = u64::MAX;

/// The state that senders and writer share.
#[derive(Debug)]
struct QueueState {
    shards: [Shard; SHARDS],
    depth: Depth,
    /// The queue length at which the writer is woken, once.
    wake_threshold: AtomicU64,
    /// The state of the keys is to be written.
    are_keys_changed: AtomicBool,
    /// All senders and permits were dropped.
    is_ended: AtomicBool,
    /// The receiving half was dropped.
    is_closed: AtomicBool,
    /// The queue length from which no permit is issued.
    queue_max: u64,
    /// Number of entries in a batch.
    batch: u64,
    wakeup: Notify,
    /// Notified when a full queue has capacity again.
    capacity: Notify,
}

impl QueueState {
    /// Wakes the writer, if it waits for at most this number of entries.
    fn wake_writer(&self, entries: u64) {
        let is_reached = |from: u64| entries >= from;
        if is_reached(self.wake_threshold.load(Ordering::SeqCst))
            && self.wake_threshold.swap(NEVER, Ordering::SeqCst) != NEVER
        {
            self.wakeup.notify_one();
        }
    }
}

/// The state as senders hold it: dropping the last one wakes the writer.
#[derive(Debug)]
struct Senders(Arc<QueueState>);

impl Drop for Senders {
    fn drop(&mut self) {
        self.0.is_ended.store(true, Ordering::SeqCst);
        self.0.wakeup.notify_one();
    }
}

/// The sending half. Cheap to clone.
#[derive(Clone, Debug)]
pub struct UsageSink(Arc<Senders>);

/// The right to write a usage record. It is acquired before a request is sent, so that a charged
/// attempt can always be recorded. It takes no capacity of the queue until it is used: the queue bounds
/// the records that wait to be written, and the requests in progress have a limit of their own.
#[derive(Debug)]
pub struct UsagePermit(UsageSink);

/// The queue stayed full, or its receiving half was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue of usage records is full")]
pub struct QueueFull;

/// Maximum wait of a request for a permit. A full queue means that the disk is too slow, and an
/// error soon is more useful to the client than a long wait.
const PERMIT_TIMEOUT: Duration = Duration::from_millis(50);

impl UsageSink {
    /// A sender and its queue. From `queue_max` entries on no permit is issued; at `batch` entries,
    /// a waiting writer is woken. `depth` counts the entries.
    #[must_use]
    pub fn new(queue_max: usize, batch: usize, depth: Depth) -> (Self, UsageQueue) {
        let state = Arc::new(QueueState {
            shards: Default::default(),
            depth,
            wake_threshold: AtomicU64::new(NEVER),
            are_keys_changed: AtomicBool::new(false),
            is_ended: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            queue_max: queue_max as u64,
            batch: batch as u64,
            wakeup: Notify::new(),
            capacity: Notify::new(),
        });
        (Self(Arc::new(Senders(Arc::clone(&state)))), UsageQueue(state))
    }

    fn state(&self) -> &QueueState {
        let Senders(state) = &*self.0;
        state
    }

    /// Acquires a permit; waits a short time while the queue is full.
    ///
    /// # Errors
    ///
    /// When the queue stays full, or its receiving half was dropped.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future acquires nothing.
    pub async fn permit(&self) -> Result<UsagePermit, QueueFull> {
        if !self.has_capacity() {
            tokio::time::timeout(PERMIT_TIMEOUT, self.capacity()).await.map_err(|_| QueueFull)?;
        }
        if self.state().is_closed.load(Ordering::Acquire) {
            Err(QueueFull)
        } else {
            Ok(UsagePermit(self.clone()))
        }
    }

    fn has_capacity(&self) -> bool {
        let state = self.state();
        state.depth.queued() < state.queue_max
    }

    /// Waits until the queue has capacity.
    async fn capacity(&self) {
        loop {
            let mut capacity = pin!(self.state().capacity.notified());
            // From here on no notification is missed.
            capacity.as_mut().enable();
            if self.has_capacity() {
                return;
            }
            capacity.await;
        }
    }

    /// Requests that the state of the keys is written.
    pub fn keys_changed(&self) {
        let state = self.state();
        if !state.are_keys_changed.swap(true, Ordering::SeqCst) {
            // A state change is no entry: it wakes an idle writer and does not count for a batch.
            state.wake_writer(1);
        }
    }

    /// Adds one entry to the batch of this thread.
    fn send(&self, add: impl FnOnce(&mut UsageBatch)) {
        let state = self.state();
        let queued = {
            let mut batch = state.shards[own_shard()].lock();
            batch.entries += 1;
            add(&mut batch);
            // Within the lock, so that the writer never takes an entry which is not counted yet.
            // After the receiving half was dropped, the entry stays in the queue and is counted as
            // lost at the end.
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

    /// Requests that the state of the keys is written, beside that of the attempt's key.
    pub fn keys_changed(&self) {
        self.0.keys_changed();
    }

    /// Queues ownership changes, if there are any.
    pub fn record_ownership(self, changes: Vec<OwnershipUpdate>) {
        if !changes.is_empty() {
            self.0.send(|batch| batch.owners.extend(changes));
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct UsageQueue(Arc<QueueState>);

impl Drop for UsageQueue {
    fn drop(&mut self) {
        self.0.is_closed.store(true, Ordering::Release);
    }
}

impl UsageQueue {
    /// Waits until there is something to write, and returns `true`; returns `false` when all
    /// senders were dropped. Until [`take`](Self::take), any new entry wakes the writer.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future changes nothing.
    pub async fn filled(&self) -> bool {
        loop {
            self.0.wake_threshold.store(1, Ordering::SeqCst);
            // The end is read before the queue length, so that the queue length includes the entries of the
            // last sender.
            let is_ended = self.is_ended();
            if self.queued() > 0 || self.0.are_keys_changed.load(Ordering::SeqCst) {
                return true;
            }
            if is_ended {
                return false;
            }
            self.0.wakeup.notified().await;
        }
    }

    /// Appends everything in the queue to `taken`. Returns whether the state of the keys is to be
    /// written.
    pub fn take(&mut self, taken: &mut UsageBatch) -> bool {
        let state = &*self.0;
        state.wake_threshold.store(NEVER, Ordering::SeqCst);
        let are_keys_changed = state.are_keys_changed.swap(false, Ordering::SeqCst);
        // All shards are taken at once, so that no entry is taken before an earlier entry of another thread.
        let mut shards = state.shards.each_ref().map(Shard::lock);
        let batches = shards.each_mut().map(|shard| mem::take(&mut **shard));
        drop(shards);
        let entries = batches.iter().map(|batch| batch.entries).sum();
        let records: usize = batches.iter().map(|batch| batch.attempts.len()).sum();
        // Senders do not wait for these copies.
        batches.into_iter().for_each(|batch| taken.append(batch));
        let before = state.depth.record_taken(entries, records as u64);
        if before >= state.queue_max {
            state.capacity.notify_waiters();
        }
        are_keys_changed
    }

    /// Number of entries in the queue.
    #[must_use]
    pub fn queued(&self) -> u64 {
        self.0.depth.queued()
    }

    /// Whether all senders and permits were dropped.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.0.is_ended.load(Ordering::SeqCst)
    }

    /// Waits until there is a batch or all senders were dropped, and may return without either.
    /// Single entries do not wake the writer.
    ///
    /// # Cancel safety
    ///
    /// A notification after the future was dropped is kept for the next call.
    pub async fn batch_ready(&self) {
        self.0.wake_threshold.store(self.0.batch, Ordering::SeqCst);
        if self.queued() < self.0.batch && !self.is_ended() {
            self.0.wakeup.notified().await;
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
    use crate::policy::client::ClientName;
    use crate::policy::outcome::Outcome;
    use crate::policy::units::UnixMs;
    use crate::proxy::{CreditSource, QuotaCharge};

    const QUEUE_MAX: usize = 8;

    fn usage() -> (UsageSink, UsageQueue) {
        UsageSink::new(QUEUE_MAX, QUEUE_MAX, Depth::default())
    }

    fn record() -> AttemptRecord {
        AttemptRecord {
            id: Uuid::nil(),
            request_id: "request".into(),
            number: 1,
            started_at: UnixMs(0),
            client: ClientName::new("local"),
            key: None,
            method: Method::GET,
            route: Route::read("/v1/voices"),
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
            is_price: false,
        }
    }

    /// Takes all batches; returns the number of records, and whether keys have changed.
    fn take(queue: &mut UsageQueue) -> (usize, bool) {
        let mut taken = UsageBatch::default();
        let are_keys_changed = queue.take(&mut taken);
        (taken.attempts.len(), are_keys_changed)
    }

    #[tokio::test(start_paused = true)]
    async fn requests_in_progress_take_no_queue_capacity() {
        let (usage, mut queue) = usage();
        let mut permits = Vec::new();
        for _ in 0..100 * QUEUE_MAX {
            permits.push(usage.permit().await.unwrap());
        }
        for permit in permits.drain(..QUEUE_MAX) {
            permit.write(record());
        }
        assert_eq!(usage.permit().await.unwrap_err(), QueueFull, "the queue is full");
        let under_way = permits.len();
        permits.into_iter().for_each(|permit| permit.write(record()));
        assert_eq!(take(&mut queue), (QUEUE_MAX + under_way, false), "every permit may be used");
    }

    #[tokio::test(start_paused = true)]
    async fn a_permit_waits_briefly_for_a_full_queue() {
        let (usage, mut queue) = usage();
        for _ in 0..QUEUE_MAX {
            usage.permit().await.unwrap().write(record());
        }
        let (permit, _) = tokio::join!(usage.permit(), async { take(&mut queue) });
        permit.unwrap().record_ownership(vec![]);
        assert_eq!(queue.queued(), 0, "an empty list adds no entry");
    }

    #[tokio::test(start_paused = true)]
    async fn a_queue_without_a_receiver_gives_no_permit() {
        let (usage, queue) = usage();
        drop(queue);
        assert_eq!(usage.permit().await.unwrap_err(), QueueFull);
    }

    #[tokio::test]
    async fn a_taken_record_counts_until_it_is_written() {
        let (usage, mut queue) = usage();
        let depth = queue.0.depth.clone();
        usage.permit().await.unwrap().write(record());
        usage.keys_changed();
        usage.keys_changed();
        assert_eq!((depth.records(), queue.queued()), (1, 1), "a state change is no record");
        assert_eq!(take(&mut queue), (1, true));
        assert_eq!((depth.records(), queue.queued()), (1, 0), "only the record is held");
        depth.record_written(1);
        assert_eq!((depth.records(), take(&mut queue)), (0, (0, false)));
    }

    #[test]
    fn records_of_several_threads_arrive_complete_and_in_order() {
        const THREADS: u32 = 8;
        const EACH: u32 = 2_000;
        let (usage, mut queue) = UsageSink::new(usize::MAX, usize::MAX, Depth::default());
        let depth = queue.0.depth.clone();
        // The threads send in turn, so that a thread with a later number follows one with an
        // earlier number.
        let turn = Arc::new(Mutex::new(0_u32));
        for _ in 0..THREADS {
            let (usage, turn) = (usage.clone(), Arc::clone(&turn));
            let send = move || {
                for _ in 0..EACH {
                    let mut next = turn.lock().unwrap();
                    UsagePermit(usage.clone()).write(AttemptRecord { number: *next, ..record() });
                    *next += 1;
                }
            };
            crate::tasks::thread("sender", send).unwrap();
        }
        drop(usage);
        let mut next_number = 0;
        while !queue.is_ended() || queue.queued() > 0 {
            let mut taken = UsageBatch::default();
            queue.take(&mut taken);
            let mut numbers: Vec<u32> = taken.attempts.iter().map(|record| record.number).collect();
            numbers.sort_unstable();
            assert!(
                numbers.iter().copied().eq(next_number..next_number + numbers.len() as u32),
                "a gap before {numbers:?}"
            );
            next_number += numbers.len() as u32;
            depth.record_written(numbers.len() as u64);
        }
        assert_eq!((next_number, depth.records()), (THREADS * EACH, 0));
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_pausing_writer_is_woken_only_by_a_batch_or_the_end() {
        let (usage, mut queue) = usage();
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let woken = || wakes.0.load(Ordering::Relaxed);
        for round in 0..3 {
            {
                let mut batch_ready = pin!(queue.batch_ready());
                let mut poll = || batch_ready.as_mut().poll(&mut Context::from_waker(&waker));
                assert_eq!(poll(), Poll::Pending);
                for _ in 1..QUEUE_MAX {
                    usage.permit().await.unwrap().write(record());
                }
                usage.keys_changed();
                assert_eq!(woken(), round);
                usage.permit().await.unwrap().write(record());
                assert_eq!(woken(), round + 1);
                assert_eq!(poll(), Poll::Ready(()));
            }
            take(&mut queue);
        }
        let permit = usage.permit().await.unwrap();
        drop(usage);
        assert!(!queue.is_ended(), "a permit may still be used");
        drop(permit);
        assert!(queue.is_ended());
        queue.batch_ready().await;
        assert!(!queue.filled().await);
    }

    #[tokio::test]
    async fn an_idle_writer_is_woken_once_by_any_entry() {
        let (usage, mut queue) = usage();
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        for round in 0..4 {
            let permit = usage.permit().await.unwrap();
            {
                let mut filled = pin!(queue.filled());
                let mut poll = || filled.as_mut().poll(&mut Context::from_waker(&waker));
                assert_eq!(poll(), Poll::Pending);
                match round % 2 {
                    0 => permit.write(record()),
                    _ => usage.keys_changed(),
                }
                usage.permit().await.unwrap().write(record());
                assert_eq!(wakes.0.load(Ordering::Relaxed), round + 1);
                assert_eq!(poll(), Poll::Ready(true));
            }
            take(&mut queue);
        }
    }
}
