//! An open connection: its stream, what was read of it and not yet taken, and one timer.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};
use std::time::Instant;

use bytes::BytesMut;
use http::Method;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::unconstrained;
use tokio::time::{Sleep, sleep_until};
use tokio_util::io::poll_read_buf;

use super::head::{self, HeadError, ResponseHead};
use crate::body::budget::BufferShare;
use crate::clock;

/// What bytes travel on.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A stream of any kind.
pub type Wire = Box<dyn Stream>;

/// Interim answers and empty lines before an answer: thousands of them. A provider that sends them without end
/// would keep a core busy until the answer's time is over.
const INTERIM_BYTES_MAX: usize = 1024 * 1024;
/// Room for a head and a short answer, or for a piece of a slow stream.
const READ_BYTES_MIN: usize = 8 * 1024;
/// Room for a fast stream. More costs memory and brought nothing.
const READ_BYTES_MAX: usize = 128 * 1024;
/// Where reads are larger than this, the first of an answer is small, and goes out by itself: a client
/// hears of it sooner.
const FIRST_BYTES_MAX: usize = 32 * 1024;
/// After so many reads that would have fitted in half of the room, it is halved.
const SMALL_READS_MAX: u8 = 8;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES_MIN].into());
}

/// An open connection. Dropping it closes it, whatever it is doing.
pub(super) struct Connection {
    pub(super) stream: Wire,
    /// What was read and not yet taken.
    pub(super) inbox: BytesMut,
    pub(super) patience: Patience,
    /// What was sent before the head that is waited for, and passed over.
    interim_bytes: usize,
    opened_at: Instant,
    /// Room for the next read: as much as the last ones needed.
    read_bytes: usize,
    /// Nothing was read yet of what is waited for.
    is_first: bool,
    small_reads: u8,
    /// With less than this, new room is made.
    room_min: usize,
    /// The memory of larger reads: what waits here, and a piece that waits to be written.
    share: BufferShare,
}

/// What a connection may read into for free.
pub(super) const FREE: usize = 2 * READ_BYTES_MIN;

impl Connection {
    /// A connection whose reads become larger as far as `share` covers them.
    pub(super) fn new(stream: Wire, share: BufferShare) -> Self {
        Self {
            stream,
            inbox: BytesMut::new(),
            patience: Patience::default(),
            interim_bytes: 0,
            opened_at: clock::instant(),
            read_bytes: READ_BYTES_MIN,
            is_first: true,
            small_reads: 0,
            room_min: READ_BYTES_MIN,
            share,
        }
    }

    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// Whether much came at once, the last times.
    pub(super) fn is_fast(&self) -> bool {
        self.read_bytes > FIRST_BYTES_MAX
    }

    /// Reads more; 0 bytes are the end. Who waits with nothing in hand holds no memory.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.read_bytes == READ_BYTES_MIN || (self.is_first && self.is_fast()) {
            return self.poll_fill_little(cx);
        }
        if self.room() < self.room_min {
            if !self.share.cover(2 * self.read_bytes) {
                return self.poll_fill_little(cx);
            }
            self.inbox.reserve(self.read_bytes);
        }
        let room = self.room();
        let read = poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.inbox);
        match &read {
            Poll::Ready(Ok(bytes)) => self.adapt(*bytes, room),
            Poll::Ready(Err(_)) => {}
            Poll::Pending if self.inbox.is_empty() => self.inbox = BytesMut::new(),
            Poll::Pending => {}
        }
        read
    }

    /// The same by way of room that all connections of a thread share: little is copied sooner than
    /// room of its own is asked for and given back.
    fn poll_fill_little(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SHARED.with_borrow_mut(|shared| {
            let mut read = ReadBuf::new(shared);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
            let read = read.filled();
            self.inbox.extend_from_slice(read);
            self.adapt(read.len(), READ_BYTES_MIN);
            Poll::Ready(Ok(read.len()))
        })
    }

    /// The head of the answer, once all of it was read. Interim answers before it are passed over.
    pub(super) fn read_head(&mut self, method: &Method) -> Result<Option<ResponseHead>, HeadError> {
        let unread = self.inbox.len();
        let head = head::read(&mut self.inbox, method)?;
        self.interim_bytes = match head {
            Some(_) => 0,
            None => self.interim_bytes + unread - self.inbox.len(),
        };
        if self.interim_bytes > INTERIM_BYTES_MAX { Err(HeadError::TooLarge) } else { Ok(head) }
    }

    fn room(&self) -> usize {
        self.inbox.capacity() - self.inbox.len()
    }

    fn adapt(&mut self, read: usize, room: usize) {
        self.is_first = false;
        if read >= room {
            if room >= self.read_bytes {
                self.read_bytes = (self.read_bytes * 2).min(READ_BYTES_MAX);
            }
            self.small_reads = 0;
            self.room_min = self.read_bytes;
            return;
        }
        // A short piece leaves room behind it, and may itself still wait to be written.
        self.room_min = self.read_bytes / 2;
        if read > self.read_bytes / 2 {
            self.small_reads = 0;
        } else {
            self.small_reads += 1;
            if self.small_reads >= SMALL_READS_MAX {
                self.read_bytes = (self.read_bytes / 2).max(READ_BYTES_MIN);
                self.small_reads = 0;
            }
        }
    }

    /// Whether it can take a request: it is open, and nothing was said that nobody asked for.
    pub(super) fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.inbox.is_empty() && self.poll_fill(&mut cx).is_pending()
    }

    /// It waits for its next request, and holds nothing meanwhile.
    pub(super) fn rest(&mut self) {
        self.inbox = BytesMut::new();
        self.is_first = true;
        self.share.shrink(0);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("unread_bytes", &self.inbox.len()).finish_non_exhaustive()
    }
}

/// A timer for deadlines that mostly move on: it is set anew when it rings and not when they move.
#[derive(Debug, Default)]
pub(super) struct Patience {
    timer: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    /// Completes at `deadline`.
    pub(super) fn poll_until(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline.into())));
        if timer.deadline() > deadline.into() {
            timer.as_mut().reset(deadline.into());
        }
        loop {
            // Past the task's budget, which a flood of bytes uses up each time: the timer would wait for as long
            // as the flood goes on.
            ready!(pin!(unconstrained(timer.as_mut())).poll(cx));
            if timer.deadline() >= deadline.into() {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::Duration;

    use tokio::io::{AsyncWriteExt, duplex};
    use tokio::task::coop;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_ends_at_the_deadline_that_holds() {
        let mut patience = Patience::default();
        let began = clock::instant();
        for (second, ends) in [(30, 30), (90, 90), (10, 90), (100, 100)] {
            let deadline = began + Duration::from_secs(second);
            poll_fn(|cx| patience.poll_until(deadline, cx)).await;
            assert_eq!(clock::since(began).as_secs(), ends);
        }
        let sooner = clock::instant() + Duration::from_secs(60);
        assert!(patience.poll_until(sooner, &mut Context::from_waker(Waker::noop())).is_pending());
        poll_fn(|cx| patience.poll_until(sooner - Duration::from_secs(30), cx)).await;
        assert_eq!(clock::since(began).as_secs(), 130);
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends_although_the_task_has_used_up_its_budget() {
        let mut patience = Patience::default();
        let deadline = clock::instant();
        poll_fn(|cx| {
            while let Poll::Ready(turn) = coop::poll_proceed(cx) {
                turn.made_progress();
            }
            assert!(patience.poll_until(deadline, cx).is_ready());
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn room_follows_what_arrives() {
        let (mut theirs, ours) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(ours), BufferShare::default());
        theirs.write_all(&[1; 1 << 20]).await.unwrap();
        let mut read = 0;
        while read < 1 << 20 {
            read += poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            connection.inbox.clear();
        }
        assert_eq!(connection.read_bytes, READ_BYTES_MAX);
        for _ in 0..100 {
            theirs.write_all(&[1; 100]).await.unwrap();
            poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            connection.inbox.clear();
        }
        assert_eq!(connection.read_bytes, READ_BYTES_MIN);
    }

    #[tokio::test]
    async fn the_first_read_of_an_answer_is_small_where_others_are_large() {
        let (mut theirs, ours) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(ours), BufferShare::default());
        for (learned, first) in [
            (READ_BYTES_MAX, READ_BYTES_MIN),
            (FIRST_BYTES_MAX, FIRST_BYTES_MAX),
            (READ_BYTES_MIN, READ_BYTES_MIN),
        ] {
            connection.rest();
            connection.read_bytes = learned;
            theirs.write_all(&[1; READ_BYTES_MAX]).await.unwrap();
            assert_eq!(poll_fn(|cx| connection.poll_fill(cx)).await.unwrap(), first);
            let mut left = READ_BYTES_MAX - first;
            while left > 0 {
                connection.inbox.clear();
                left -= poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn who_waits_for_a_fast_stream_holds_little() {
        let (mut theirs, ours) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(ours), BufferShare::default());
        connection.read_bytes = READ_BYTES_MAX;
        let mut cx = Context::from_waker(Waker::noop());
        assert!(connection.poll_fill(&mut cx).is_pending());
        assert_eq!(connection.inbox.capacity(), 0);
        assert!(connection.is_quiet());
        theirs.write_all(b"x").await.unwrap();
        assert!(!connection.is_quiet());
    }
}
