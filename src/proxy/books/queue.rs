//! The queue between the requests and the thread that writes: what waits in it is bounded, sending
//! takes no lock, and it wakes the reader only where the reader wants to be woken.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use super::{AttemptRecord, Entry, Ownership};

/// What is on its way: in the queue, or taken from it and not yet written or lost. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Depth(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    queued: AtomicU64,
    /// Of those in the queue, how many are no records: only the state of keys is to be written.
    marks: AtomicU64,
    held: AtomicU64,
}

impl Depth {
    /// So many records are on their way. A lesson counts while it is in the queue.
    #[must_use]
    pub fn records(&self) -> u64 {
        let marks = self.0.marks.load(Ordering::Acquire);
        self.queued().saturating_sub(marks) + self.0.held.load(Ordering::Acquire)
    }

    /// So many entries are in the queue.
    fn queued(&self) -> u64 {
        self.0.queued.load(Ordering::Acquire)
    }

    /// So many entries go into the queue; returns how many are in it then.
    pub fn sent(&self, entries: u64) -> u64 {
        self.0.queued.fetch_add(entries, Ordering::AcqRel) + entries
    }

    /// So many entries have left the queue, and so many records of them are held; returns how many
    /// were in it before.
    pub fn taken(&self, entries: u64, records: u64) -> u64 {
        // In this order: a record is counted twice for a moment, and never not at all.
        self.0.held.fetch_add(records, Ordering::AcqRel);
        self.0.queued.fetch_sub(entries, Ordering::AcqRel)
    }

    /// So many records have arrived, in the books or nowhere.
    pub fn arrived(&self, records: u64) {
        self.0.held.fetch_sub(records, Ordering::AcqRel);
    }
}

/// What both halves know of the queue.
#[derive(Clone, Debug)]
struct Line {
    depth: Depth,
    /// From so many entries on, nobody gets a place.
    queue_max: u64,
    /// With so many entries, the reader is called.
    batch: u64,
    /// There is a batch, or no sender any more.
    call: Arc<Notify>,
    /// A full queue has room again.
    room: Arc<Notify>,
}

/// The senders' part of it: the last of them to go calls the reader.
#[derive(Debug)]
struct Senders(Line);

impl Drop for Senders {
    fn drop(&mut self) {
        self.0.call.notify_one();
    }
}

/// The sending half. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Books {
    // Before `line`, so that the queue is closed when the reader is called.
    queue: mpsc::UnboundedSender<Entry>,
    line: Arc<Senders>,
}

/// A place in the books, taken before the provider is asked, so that what was charged is never
/// without a place to be written. It takes no room until it is used: the bound is on what waits to be
/// written, and not on how many requests are under way, which have a bound of their own.
#[derive(Debug)]
pub struct Place(Books);

/// The queue stayed full, or nobody reads it any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the queue of the books is full")]
pub struct NoPlace;

/// How long a request waits for a place. A full queue means a disk that does not keep up; a
/// quick refusal tells more than a long silence.
const PLACE_WAIT_MAX: Duration = Duration::from_millis(50);

impl Books {
    /// Books, and the queue that whoever writes them reads. From `queue_max` entries on nobody gets a
    /// place; with `batch` of them, the reader is called. `depth` tells how many there are.
    #[must_use]
    pub fn new(queue_max: usize, batch: usize, depth: Depth) -> (Self, Queue) {
        let (sender, entries) = mpsc::unbounded_channel();
        let line = Line {
            depth,
            queue_max: queue_max as u64,
            batch: batch as u64,
            call: Arc::default(),
            room: Arc::default(),
        };
        (Self { queue: sender, line: Arc::new(Senders(line.clone())) }, Queue { entries, line })
    }

    /// Takes a place; a full queue is waited for a moment.
    ///
    /// # Errors
    ///
    /// When it stays full, or nobody reads it any more.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future takes nothing.
    pub async fn place(&self) -> Result<Place, NoPlace> {
        if !self.has_room() {
            tokio::time::timeout(PLACE_WAIT_MAX, self.room()).await.map_err(|_| NoPlace)?;
        }
        if self.queue.is_closed() { Err(NoPlace) } else { Ok(Place(self.clone())) }
    }

    fn has_room(&self) -> bool {
        let Senders(line) = &*self.line;
        line.depth.queued() < line.queue_max
    }

    /// Waits until there is room.
    async fn room(&self) {
        loop {
            let mut room = pin!(self.line.0.room.notified());
            // From here on nothing is missed.
            room.as_mut().enable();
            if self.has_room() {
                return;
            }
            room.await;
        }
    }

    /// Has the state of the keys written. A full queue is about to write it anyway.
    pub fn keys_changed(&self) {
        if self.has_room() {
            self.send(Entry::KeysChanged);
        }
    }

    fn send(&self, entry: Entry) {
        let Senders(line) = &*self.line;
        // Counted first, so that the reader never takes what is not counted yet.
        let queued = line.depth.sent(1);
        if matches!(entry, Entry::KeysChanged) {
            line.depth.0.marks.fetch_add(1, Ordering::AcqRel);
        }
        // Where nobody reads any more it stays among those that wait, and is counted as lost at the end.
        let _ = self.queue.send(entry);
        if queued == line.batch {
            line.call.notify_one();
        }
    }
}

impl Place {
    /// Writes.
    pub fn write(self, record: AttemptRecord) {
        self.0.send(Entry::Attempt(Box::new(record)));
    }

    /// Writes down whose identifiers are.
    pub fn teach(self, changes: Vec<Ownership>) {
        if !changes.is_empty() {
            self.0.send(Entry::Owners(changes));
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Queue {
    entries: mpsc::UnboundedReceiver<Entry>,
    line: Line,
}

impl Queue {
    /// Waits for entries and takes up to `room` of them; none, when there are no more and nobody is
    /// left to send any.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, nothing was taken. Until then the next entry wakes the reader.
    pub async fn take(&mut self, entries: &mut Vec<Entry>, room: usize) -> usize {
        let count = self.entries.recv_many(entries, room).await;
        let taken = || entries.iter().rev().take(count);
        let records = taken().filter(|entry| matches!(entry, Entry::Attempt(_))).count();
        let marks = taken().filter(|entry| matches!(entry, Entry::KeysChanged)).count();
        // Before the entries: what is counted too often for a moment is never missed.
        self.line.depth.0.marks.fetch_sub(marks as u64, Ordering::AcqRel);
        let before = self.line.depth.taken(count as u64, records as u64);
        if before >= self.line.queue_max {
            self.line.room.notify_waiters();
        }
        count
    }

    /// So many entries wait.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.line.depth.queued()
    }

    /// Whether nobody is left to send anything.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.entries.sender_strong_count() == 0
    }

    /// Waits until there is a batch or nobody is left to send anything, and may come back for neither.
    /// Single entries wake nobody.
    ///
    /// # Cancel safety
    ///
    /// A call that comes after the future is dropped is heard by the next one.
    pub async fn called(&self) {
        self.line.call.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::{Context, Poll, Wake, Waker};

    use uuid::Uuid;

    use super::*;
    use crate::policy::client::ClientName;
    use crate::policy::units::UnixMs;
    use crate::proxy::CreditSource;

    const QUEUE_MAX: usize = 8;

    fn books() -> (Books, Queue) {
        Books::new(QUEUE_MAX, QUEUE_MAX, Depth::default())
    }

    fn record() -> AttemptRecord {
        AttemptRecord {
            id: Uuid::nil(),
            request_id: "request".into(),
            number: 1,
            started_at: UnixMs(0),
            client: ClientName::new("local"),
            key: None,
            method: "GET".into(),
            route: "/v1/voices".into(),
            status: Some(200),
            verdict: "served",
            request_bytes: 0,
            response_bytes: 0,
            model: None,
            characters: None,
            audio: None,
            credits_reserved: None,
            credits: 0,
            credits_from: CreditSource::Free,
            first_byte: None,
            total: Duration::ZERO,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_under_way_take_no_room() {
        let (books, mut queue) = books();
        let mut places = Vec::new();
        for _ in 0..100 * QUEUE_MAX {
            places.push(books.place().await.unwrap());
        }
        for place in places.drain(..QUEUE_MAX) {
            place.write(record());
        }
        assert_eq!(books.place().await.unwrap_err(), NoPlace, "now that many wait to be written");
        let under_way = places.len();
        places.into_iter().for_each(|place| place.write(record()));
        let mut entries = Vec::new();
        assert_eq!(
            queue.take(&mut entries, 10_000).await,
            QUEUE_MAX + under_way,
            "whoever has a place writes"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_queue_is_waited_for_a_moment() {
        let (books, mut queue) = books();
        for _ in 0..QUEUE_MAX {
            books.place().await.unwrap().write(record());
        }
        let mut entries = Vec::new();
        let (place, _) = tokio::join!(books.place(), queue.take(&mut entries, 1));
        place.unwrap().teach(vec![]);
        books.keys_changed();
        books.keys_changed();
        assert_eq!(queue.waiting(), QUEUE_MAX as u64, "there was room for one");
        drop(queue);
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_nobody_reads_is_none() {
        let (books, queue) = books();
        drop(queue);
        assert_eq!(books.place().await.unwrap_err(), NoPlace);
    }

    #[tokio::test]
    async fn what_is_taken_is_on_its_way_until_it_has_arrived() {
        let (books, mut queue) = books();
        let depth = queue.line.depth.clone();
        books.place().await.unwrap().write(record());
        books.keys_changed();
        assert_eq!(depth.records(), 1, "that keys have changed is no record");
        assert_eq!(queue.waiting(), 2);
        assert_eq!(queue.take(&mut Vec::new(), QUEUE_MAX).await, 2);
        assert_eq!((depth.records(), queue.waiting()), (1, 0), "only the record is held");
        depth.arrived(1);
        assert_eq!(depth.records(), 0);
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[tokio::test]
    async fn a_reader_that_rests_is_called_by_a_batch_or_by_the_end_and_by_nothing_else() {
        let (books, mut queue) = books();
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let woken = || wakes.0.load(Ordering::Relaxed);
        for round in 0..3 {
            {
                let mut called = pin!(queue.called());
                let mut poll = || called.as_mut().poll(&mut Context::from_waker(&waker));
                assert_eq!(poll(), Poll::Pending);
                for _ in 1..QUEUE_MAX {
                    books.place().await.unwrap().write(record());
                }
                assert_eq!(woken(), round);
                books.place().await.unwrap().write(record());
                assert_eq!(woken(), round + 1);
                assert_eq!(poll(), Poll::Ready(()));
            }
            queue.take(&mut Vec::new(), QUEUE_MAX).await;
        }
        let place = books.place().await.unwrap();
        drop(books);
        assert!(!queue.is_ended(), "a place may still be used");
        drop(place);
        assert!(queue.is_ended());
        queue.called().await;
        assert_eq!(queue.take(&mut Vec::new(), QUEUE_MAX).await, 0);
    }
}
