//! Owns an open upstream connection: its stream, its read buffer and one timer. The size of a read adapts to the
//! received data: it grows while the stream is fast, and shrinks after several small reads.

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
use crate::body::budget::BufferReservation;
use crate::clock;

/// A bidirectional byte stream.
pub trait ByteStream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> ByteStream for T {}

/// The stream of an upstream connection, independent of the type of its connector.
pub type BoxedStream = Box<dyn ByteStream>;

/// Maximum number of bytes of interim responses and empty lines before a response: enough for thousands of interim
/// responses. An endless sequence would keep a core busy until the response timeout.
const MAX_INTERIM_BYTES: usize = 1024 * 1024;
/// Minimum size of a read: enough for a head and a short response, or for a chunk of a slow stream.
const MIN_READ_SIZE: usize = 8 * 1024;
/// Maximum size of a read, for a fast stream. Larger buffers cost memory and did not increase the throughput.
const MAX_READ_SIZE: usize = 128 * 1024;
/// If the read size is larger than this, the first read of a response has the minimum size and is forwarded
/// separately, so that the client receives the first bytes earlier.
const MAX_FIRST_READ_SIZE: usize = 32 * 1024;
/// Number of consecutive reads of at most half of the read size, after which the read size is halved.
const MAX_SMALL_READS: u8 = 8;

thread_local! {
    /// The buffer of small reads, which all connections of a thread share.
    static SHARED_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; MIN_READ_SIZE].into());
}

/// An open connection. Dropping it closes the connection.
pub(super) struct Connection {
    pub(super) stream: BoxedStream,
    /// Bytes that were read but not yet consumed.
    pub(super) read_buf: BytesMut,
    pub(super) timer: DeadlineTimer,
    /// The number of bytes of interim responses that were skipped before the head of the next response.
    interim_bytes: usize,
    opened_at: Instant,
    /// The size of the next read, which is adapted to the sizes of the last reads.
    read_size: usize,
    /// Whether the next read is the first read of a response.
    is_first_read: bool,
    /// The number of consecutive reads of at most half of the read size.
    small_reads: u8,
    /// The minimum number of free bytes in the read buffer before a read. The buffer grows if it has less.
    min_free_capacity: usize,
    /// Reserves the memory of reads larger than the minimum: the read buffer, and a chunk that hyper's server has not
    /// written to the client yet.
    reservation: BufferReservation,
}

/// Number of bytes of the read buffers of a connection that do not count against the budget.
pub(super) const UNBUDGETED_BYTES: usize = 2 * MIN_READ_SIZE;

impl Connection {
    /// Creates a connection whose reads grow only while `reservation` can grow for them.
    pub(super) fn new(stream: BoxedStream, reservation: BufferReservation) -> Self {
        Self {
            stream,
            read_buf: BytesMut::new(),
            timer: DeadlineTimer::default(),
            interim_bytes: 0,
            opened_at: clock::instant(),
            read_size: MIN_READ_SIZE,
            is_first_read: true,
            small_reads: 0,
            min_free_capacity: MIN_READ_SIZE,
            reservation,
        }
    }

    pub(super) fn opened_at(&self) -> Instant {
        self.opened_at
    }

    /// Returns whether the stream is fast: its read size has grown beyond [`MAX_FIRST_READ_SIZE`].
    pub(super) fn is_fast(&self) -> bool {
        self.read_size > MAX_FIRST_READ_SIZE
    }

    /// Reads more bytes into the read buffer, and returns their number, which is 0 at the end of the stream. While a
    /// read is pending and the read buffer is empty, the buffer has no memory.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.read_size == MIN_READ_SIZE || (self.is_first_read && self.is_fast()) {
            return self.poll_fill_small(cx);
        }
        if self.free_capacity() < self.min_free_capacity {
            if !self.reservation.try_resize(2 * self.read_size) {
                return self.poll_fill_small(cx);
            }
            self.read_buf.reserve(self.read_size);
        }
        let capacity = self.free_capacity();
        let read_result = poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.read_buf);
        match &read_result {
            Poll::Ready(Ok(bytes)) => self.adapt_read_size(*bytes, capacity),
            Poll::Ready(Err(_)) => {}
            Poll::Pending if self.read_buf.is_empty() => self.read_buf = BytesMut::new(),
            Poll::Pending => {}
        }
        read_result
    }

    /// Reads into the shared buffer of the thread and copies the bytes. For a few bytes, a copy is cheaper than the
    /// allocation of a buffer.
    fn poll_fill_small(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        SHARED_BUFFER.with_borrow_mut(|shared_buffer| {
            let mut buffer = ReadBuf::new(shared_buffer);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer))?;
            let bytes = buffer.filled();
            self.read_buf.extend_from_slice(bytes);
            self.adapt_read_size(bytes.len(), MIN_READ_SIZE);
            Poll::Ready(Ok(bytes.len()))
        })
    }

    /// Decodes the next response head in the read buffer, and skips interim responses. Returns `None` until the head is
    /// complete.
    pub(super) fn decode_head(&mut self, method: &Method) -> Result<Option<ResponseHead>, HeadError> {
        let unread_before = self.read_buf.len();
        let head = head::decode_response(&mut self.read_buf, method)?;
        self.interim_bytes = match head {
            Some(_) => 0,
            None => self.interim_bytes + unread_before - self.read_buf.len(),
        };
        if self.interim_bytes > MAX_INTERIM_BYTES { Err(HeadError::TooLarge) } else { Ok(head) }
    }

    fn free_capacity(&self) -> usize {
        self.read_buf.capacity() - self.read_buf.len()
    }

    /// Adapts the size of the next read after a read of `bytes_read` bytes into a buffer of `capacity`.
    fn adapt_read_size(&mut self, bytes_read: usize, capacity: usize) {
        self.is_first_read = false;
        if bytes_read >= capacity {
            if capacity >= self.read_size {
                self.read_size = (self.read_size * 2).min(MAX_READ_SIZE);
            }
            self.small_reads = 0;
            self.min_free_capacity = self.read_size;
            return;
        }
        // After a read that does not fill the buffer, the next read may use the rest of the buffer.
        self.min_free_capacity = self.read_size / 2;
        if bytes_read > self.read_size / 2 {
            self.small_reads = 0;
        } else {
            self.small_reads += 1;
            if self.small_reads >= MAX_SMALL_READS {
                self.read_size = (self.read_size / 2).max(MIN_READ_SIZE);
                self.small_reads = 0;
            }
        }
    }

    /// Reads from the idle connection without waiting. Returns whether it can be used for a request: it is open, and no
    /// unexpected bytes have arrived.
    pub(super) fn is_reusable(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.read_buf.is_empty() && self.poll_fill(&mut cx).is_pending()
    }

    /// Frees the buffers before the connection becomes idle.
    pub(super) fn release_buffers(&mut self) {
        self.read_buf = BytesMut::new();
        self.is_first_read = true;
        self.reservation.shrink(0);
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("unread_bytes", &self.read_buf.len()).finish_non_exhaustive()
    }
}

/// A timer for a deadline that usually moves to a later time. Such a move does not reset the timer, because a reset per
/// chunk is expensive. When the timer fires before the deadline, it is reset to the deadline.
#[derive(Debug, Default)]
pub(super) struct DeadlineTimer {
    timer: Option<Pin<Box<Sleep>>>,
}

impl DeadlineTimer {
    /// Returns `Ready` once `deadline` has passed.
    pub(super) fn poll_until(&mut self, deadline: Instant, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline.into())));
        if timer.deadline() > deadline.into() {
            timer.as_mut().reset(deadline.into());
        }
        loop {
            // The timer is polled outside the cooperative budget of the task. A fast stream uses up the
            // budget in every poll, so the timer would otherwise never fire.
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
        let start = clock::instant();
        for (deadline_second, expected_second) in [(30, 30), (90, 90), (10, 90), (100, 100)] {
            let deadline = start + Duration::from_secs(deadline_second);
            poll_fn(|cx| timer.poll_until(deadline, cx)).await;
            assert_eq!(clock::elapsed_since(start).as_secs(), expected_second);
        }
        // The deadline moves from second 160 to second 130.
        let deadline = clock::instant() + Duration::from_secs(60);
        assert!(timer.poll_until(deadline, &mut Context::from_waker(Waker::noop())).is_pending());
        poll_fn(|cx| timer.poll_until(deadline - Duration::from_secs(30), cx)).await;
        assert_eq!(clock::elapsed_since(start).as_secs(), 130);
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_fires_although_the_task_has_used_up_its_budget() {
        let mut timer = DeadlineTimer::default();
        let deadline = clock::instant();
        poll_fn(|cx| {
            while let Poll::Ready(budget_unit) = coop::poll_proceed(cx) {
                budget_unit.made_progress();
            }
            assert!(
                timer.poll_until(deadline, cx).is_ready(),
                "the timer must ignore the budget of the task"
            );
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn the_read_size_follows_the_received_data() {
        let (mut server, client) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(client), BufferReservation::default());
        server.write_all(&[1; 1 << 20]).await.unwrap();
        let mut bytes_read = 0;
        while bytes_read < 1 << 20 {
            bytes_read += poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            connection.read_buf.clear();
        }
        assert_eq!(connection.read_size, MAX_READ_SIZE);
        for _ in 0..100 {
            server.write_all(&[1; 100]).await.unwrap();
            poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            connection.read_buf.clear();
        }
        assert_eq!(connection.read_size, MIN_READ_SIZE);
    }

    #[tokio::test]
    async fn the_first_read_of_a_fast_response_is_small() {
        let (mut server, client) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(client), BufferReservation::default());
        for (read_size, first_read_size) in [
            (MAX_READ_SIZE, MIN_READ_SIZE),
            (MAX_FIRST_READ_SIZE, MAX_FIRST_READ_SIZE),
            (MIN_READ_SIZE, MIN_READ_SIZE),
        ] {
            connection.release_buffers();
            connection.read_size = read_size;
            server.write_all(&[1; MAX_READ_SIZE]).await.unwrap();
            assert_eq!(poll_fn(|cx| connection.poll_fill(cx)).await.unwrap(), first_read_size);
            let mut remaining = MAX_READ_SIZE - first_read_size;
            while remaining > 0 {
                connection.read_buf.clear();
                remaining -= poll_fn(|cx| connection.poll_fill(cx)).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_fast_connection_with_a_pending_read_has_no_buffer() {
        let (mut server, client) = duplex(1 << 20);
        let mut connection = Connection::new(Box::new(client), BufferReservation::default());
        connection.read_size = MAX_READ_SIZE;
        let mut cx = Context::from_waker(Waker::noop());
        assert!(connection.poll_fill(&mut cx).is_pending());
        assert_eq!(connection.read_buf.capacity(), 0);
        assert!(connection.is_reusable());
        server.write_all(b"x").await.unwrap();
        assert!(!connection.is_reusable(), "a connection with unexpected bytes must not be reused");
    }
}
