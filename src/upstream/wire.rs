//! An open upstream connection: its stream, the bytes read and not yet consumed, and one timer.

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

/// A byte stream of a connection.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A boxed stream.
pub type Wire = Box<dyn Stream>;

/// Maximum bytes of interim responses and empty lines before a response: room for thousands. A provider that
/// sends them without end would keep a core busy until the response timeout.
const INTERIM_BYTES_MAX: usize = 1024 * 1024;
/// Minimum read buffer: room for a head and a short response, or for a piece of a slow stream.
const READ_BYTES_MIN: usize = 8 * 1024;
/// Maximum read buffer, for a fast stream. Larger ones cost memory and brought no throughput.
const READ_BYTES_MAX: usize = 128 * 1024;
/// When the read buffer is larger than this, the first read of a response is small and is forwarded by
/// itself, so that the client receives it sooner.
const FIRST_BYTES_MAX: usize = 32 * 1024;
/// After this many consecutive reads that fill at most half of the buffer, its size is halved.
const SMALL_READS_MAX: u8 = 8;

thread_local! {
    static SHARED: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES_MIN].into());
}

/// An open connection. Dropping it closes it, in any state.
pub(super) struct Connection {
    pub(super) stream: Wire,
    /// Bytes read and not yet consumed.
    pub(super) inbox: BytesMut,
    pub(super) patience: Patience,
    /// Bytes of interim responses that were skipped before the awaited head.
    interim_bytes: usize,
    opened_at: Instant,
    /// Size of the next read, adapted to the last ones.
    read_bytes: usize,
    /// Whether the next read is the first one of a response.
    is_first: bool,
    small_reads: u8,
    /// Minimum free capacity; with less, the buffer grows.
    room_min: usize,
    /// The memory of larger reads: the buffer here, and a piece that waits to be written.
    share: BufferShare,
}

/// Free bytes of a connection's read buffers.
pub(super) const FREE: usize = 2 * READ_BYTES_MIN;

impl Connection {
    /// A connection whose reads grow as far as `share` covers them.
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

    /// Whether the last reads were large.
    pub(super) fn is_fast(&self) -> bool {
        self.read_bytes > FIRST_BYTES_MAX
    }

    /// Reads more bytes; 0 is the end of the stream. While a read is pending and the inbox is empty, it has
    /// no buffer.
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

    /// Reads through a buffer that all connections of a thread share: copying a few bytes is cheaper than
    /// allocating and freeing a buffer.
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

    /// The head of the response, once it is complete. Interim responses before it are skipped.
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
        // A short read leaves capacity behind it, and its piece may itself still wait to be written.
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

    /// Whether the connection can take a request: it is open, and no bytes came without a request.
    pub(super) fn is_quiet(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.inbox.is_empty() && self.poll_fill(&mut cx).is_pending()
    }

    /// Prepares the connection for the idle pool: frees its buffers.
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

/// A timer for deadlines that mostly move later: it is reset when it fires, not when the deadline moves.
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
            // Polled outside the task's cooperative budget, which a flood of bytes uses up each time: the
            // timer would not fire as long as the flood goes on.
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
