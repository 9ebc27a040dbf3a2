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

/// Maximum bytes of interim responses and empty lines before a response: enough for thousands. A provider that
/// sends them without end would keep a core busy until the response timeout.
const INTERIM_BYTES_MAX: usize = 1024 * 1024;
/// Minimum read buffer: enough for a head and a short response, or for a piece of a slow stream.
const READ_BYTES_MIN: usize = 8 * 1024;
/// Maximum read buffer, for a fast stream. Larger ones cost memory and brought no throughput.
const READ_BYTES_MAX: usize = 128 * 1024;
/// When the read buffer is larger than this, the first read of a response is small and is forwarded by
/// itself, so that the client receives it earlier.
const FIRST_BYTES_MAX: usize = 32 * 1024;
/// After this many consecutive reads that fill at most half of the buffer, its size is halved.
const SMALL_READS_MAX: u8 = 8;

thread_local! {
    static SHARED_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES_MIN].into());
}

/// An open connection. Dropping it closes it, in any state.
pub(super) struct Connection {
    pub(super) stream: Wire,
    /// Bytes read and not yet consumed.
    pub(super) read_buf: BytesMut,
    pub(super) timer: DeadlineTimer,
    /// Bytes of interim responses that were skipped before the awaited head.
    interim_bytes: usize,
    opened_at: Instant,
    /// Size of the next read, adapted to the last ones.
    read_bytes: usize,
    /// Whether the next read is the first one of a response.
    is_first: bool,
    small_reads: u8,
    /// Minimum free capacity; with less, the buffer grows.
    min_free_capacity: usize,
    /// The memory of larger reads: the buffer here, and a piece that waits to be written.
    share: BufferShare,
}

/// Free bytes of a connection's read buffers.
pub(super) const FREE_BYTES: usize = 2 * READ_BYTES_MIN;

impl Connection {
    /// A connection whose reads grow as far as `share` covers them.
    pub(super) fn new(stream: Wire, share: BufferShare) -> Self {
        Self {
            stream,
            read_buf: BytesMut::new(),
            timer: DeadlineTimer::default(),
            interim_bytes: 0,
            opened_at: clock::instant(),
            read_bytes: READ_BYTES_MIN,
            is_first: true,
            small_reads: 0,
            min_free_capacity: READ_BYTES_MIN,
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

    /// Reads more bytes; 0 is the end of the stream. While a read is pending and the read_buf is empty, it has
    /// no buffer.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.read_bytes == READ_BYTES_MIN || (self.is_first && self.is_fast()) {
            return self.poll_fill_small(cx);
        }
        if self.free_capacity() < self.min_free_capacity {
            if !self.share.cover(2 * self.read_bytes) {
                return self.poll_fill_small(cx);
            }
            self.read_buf.reserve(self.read_bytes);
        }
        let capacity = self.free_capacity();
        let read = poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.read_buf);
        match &read {
            Poll::Ready(Ok(bytes)) => self.adapt(*bytes, capacity),
            Poll::Ready(Err(_)) => {}
            Poll::Pending if self.read_buf.is_empty() => self.read_buf = BytesMut::new(),
            Poll::Pending => {}
        }
        read
    }

    /// Reads through a buffer that all connections of a thread share: copying a few bytes is cheaper than
    /// allocating and freeing a buffer.
    fn poll_fill_small(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SHARED_BUFFER.with_borrow_mut(|shared| {
            let mut read = ReadBuf::new(shared);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut read))?;
            let read = read.filled();
            self.read_buf.extend_from_slice(read);
            self.adapt(read.len(), READ_BYTES_MIN);
            Poll::Ready(Ok(read.len()))
        })
    }

    /// The head of the response, once it is complete. Interim responses before it are skipped.
    pub(super) fn read_head(&mut self, method: &Method) -> Result<Option<ResponseHead>, HeadError> {
        let unread = self.read_buf.len();
        let head = head::read(&mut self.read_buf, method)?;
        self.interim_bytes = match head {
            Some(_) => 0,
            None => self.interim_bytes + unread - self.read_buf.len(),
        };
        if self.interim_bytes > INTERIM_BYTES_MAX { Err(HeadError::TooLarge) } else { Ok(head) }
    }

    fn free_capacity(&self) -> usize {
        self.read_buf.capacity() - self.read_buf.len()
    }

    fn adapt(&mut self, read: usize, capacity: usize) {
        self.is_first = false;
        if read >= capacity {
            if capacity >= self.read_bytes {
                self.read_bytes = (self.read_bytes * 2).min(READ_BYTES_MAX);
            }
            self.small_reads = 0;
            self.min_free_capacity = self.read_bytes;
            return;
        }
        // A short read leaves capacity behind it, and its piece may itself still wait to be written.
        self.min_free_capacity = self.read_bytes / 2;
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
    pub(super) fn is_idle(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.read_buf.is_empty() && self.poll_fill(&mut cx).is_pending()
    }

    /// Prepares the connection for the idle pool: frees its buffers.
    pub(super) fn release_buffers(&mut self) {
        self.read_buf = BytesMut::new();
        self.is_first = true;
        self.share.shrink(0);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("unread_bytes", &self.read_buf.len()).finish_non_exhaustive()
    }
}

/// A timer for deadlines that mostly move later: it is reset when it fires, not when the deadline moves.
#[derive(Debug, Default)]
pub(super) struct DeadlineTimer {
    timer: Option<Pin<Box<Sleep>>>,
}

impl DeadlineTimer {
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
    async fn a_timer_fires_at_the_last_deadline() {
        let mut timer = DeadlineTimer::default();
        let began = clock::instant();
        for (second, ends) in [(30, 30), (90, 90), (10, 90), (100, 100)] {
            let deadline = began + Duration::from_secs(second);
            poll_fn(|cx| timer.poll_until(deadline, cx)).await;
            assert_eq!(clock::since(began).as_secs(), ends);
        }
        let earlier = clock::instant() + Duration::from_secs(60);
        assert!(timer.poll_until(earlier, &mut Context::from_waker(Waker::noop())).is_pending());
        poll_fn(|cx| timer.poll_until(earlier - Duration::from_secs(30), cx)).await;
        assert_eq!(clock::since(began).as_secs(), 130);
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_fires_although_the_task_has_used_up_its_budget() {
        let mut timer = DeadlineTimer::default();
        let deadline = clock::instant();
        poll_fn(|cx| {
            while let Poll::Ready(turn) = coop::poll_proceed(cx) {
                turn.made_progress();
            }
            assert!(timer.poll_until(deadline, cx).is_ready());
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn the_size_of_reads_follows_what_arrives() {
        let (mut server, client) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(client), BufferShare::default());
        server.write_all(&[1; 1 << 20]).await.unwrap();
        let mut read = 0;
        while read < 1 << 20 {
            read += poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            connection.read_buf.clear();
        }
        assert_eq!(connection.read_bytes, READ_BYTES_MAX);
        for _ in 0..100 {
            server.write_all(&[1; 100]).await.unwrap();
            poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            connection.read_buf.clear();
        }
        assert_eq!(connection.read_bytes, READ_BYTES_MIN);
    }

    #[tokio::test]
    async fn the_first_read_of_a_response_is_small_where_others_are_large() {
        let (mut server, client) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(client), BufferShare::default());
        for (read_bytes, first) in [
            (READ_BYTES_MAX, READ_BYTES_MIN),
            (FIRST_BYTES_MAX, FIRST_BYTES_MAX),
            (READ_BYTES_MIN, READ_BYTES_MIN),
        ] {
            connection.release_buffers();
            connection.read_bytes = read_bytes;
            server.write_all(&[1; READ_BYTES_MAX]).await.unwrap();
            assert_eq!(poll_fn(|cx| connection.poll_fill(cx)).await.unwrap(), first);
            let mut left = READ_BYTES_MAX - first;
            while left > 0 {
                connection.read_buf.clear();
                left -= poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_connection_that_waits_for_a_fast_stream_has_no_buffer() {
        let (mut server, client) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(client), BufferShare::default());
        connection.read_bytes = READ_BYTES_MAX;
        let mut cx = Context::from_waker(Waker::noop());
        assert!(connection.poll_fill(&mut cx).is_pending());
        assert_eq!(connection.read_buf.capacity(), 0);
        assert!(connection.is_idle());
        server.write_all(b"x").await.unwrap();
        assert!(!connection.is_idle());
    }
}
