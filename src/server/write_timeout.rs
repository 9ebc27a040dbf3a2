//! Fails writes to a client that stops reading or reads too slowly, so that its request does not occupy an API key
//! forever.
//! The timeout is in the stream, below HTTP, so that it also applies to WebSocket sessions. Small slices of a vectored
//! write are joined into one buffer.

use std::future::Future;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep_until};

use super::ConnectionLimits;
use super::disconnect::Peek;
use crate::clock;
use crate::policy::min_rate::ReadTimeBudget;

pin_project! {
    /// A stream whose writes fail when a write is blocked for `send_timeout`, or when the client's average
    /// rate over all blocked time is below the minimum.
    ///
    /// Bytes in the kernel's send buffer count as read. `AcceptedConnection::register` bounds that buffer.
    pub(super) struct WriteTimeout<S> {
        #[pin]
        stream: S,
        send_timeout: Duration,
        read_time_budget: ReadTimeBudget,
        // The first blocked write creates the timer. Most connections never have a blocked write.
        timer: Option<Pin<Box<Sleep>>>,
        blocked_since: Option<Instant>,
    }
}

impl<S> WriteTimeout<S> {
    pub(super) fn new(stream: S, limits: &ConnectionLimits) -> Self {
        let ConnectionLimits { send_timeout, min_response_rate, response_grace, .. } = *limits;
        let read_time_budget = ReadTimeBudget::new(min_response_rate, response_grace, send_timeout);
        Self { stream, send_timeout, read_time_budget, timer: None, blocked_since: None }
    }

    /// Returns the inner stream.
    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }
}

impl<S: AsyncWrite> WriteTimeout<S> {
    /// Polls `write`, and fails when the write is pending for longer than the timeout. `written_bytes`
    /// returns the number of written bytes from the result of the write.
    fn poll_with_timeout<T>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
        written_bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        let this = self.project();
        if let Poll::Ready(write_result) = write(this.stream, cx) {
            let blocked_since = this.blocked_since.take();
            if blocked_since
                .is_some_and(|since| this.read_time_budget.record_wait(clock::elapsed_since(since)))
            {
                return Poll::Ready(Err(timed_out(READS_TOO_SLOWLY)));
            }
            this.read_time_budget.record_read(write_result.as_ref().map_or(0, written_bytes) as u64);
            return Poll::Ready(write_result);
        }
        let blocked_since = *this.blocked_since.get_or_insert_with(clock::instant);
        let remaining = this.read_time_budget.remaining();
        let timeout = remaining.map_or(*this.send_timeout, |remaining| remaining.min(*this.send_timeout));
        let deadline = (blocked_since + timeout).into();
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(timed_out(if timeout < *this.send_timeout {
            READS_TOO_SLOWLY
        } else {
            STOPPED_READING
        })))
    }
}

const STOPPED_READING: &str = "the client has stopped reading its response";
const READS_TOO_SLOWLY: &str = "the client reads its response too slowly";

/// Returns the error of a write that failed for `reason`.
fn timed_out(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, reason)
}

/// Maximum number of bytes of a vectored write that are copied into one buffer. Writing one small buffer is
/// faster than writing several.
const MAX_JOINED_BYTES: usize = 2 * 1024;

/// The buffer into which small slices are copied.
type JoinBuffer = [MaybeUninit<u8>; MAX_JOINED_BYTES];

const EMPTY_BUFFER: JoinBuffer = [MaybeUninit::uninit(); MAX_JOINED_BYTES];

/// Copies `slices` into `buffer` if they fit.
fn join_slices<'a>(slices: &[IoSlice<'_>], buffer: &'a mut JoinBuffer) -> Option<ReadBuf<'a>> {
    if slices.iter().map(|slice| slice.len()).sum::<usize>() > MAX_JOINED_BYTES {
        return None;
    }
    let mut joined_buffer = ReadBuf::uninit(buffer);
    slices.iter().for_each(|slice| joined_buffer.put_slice(slice));
    Some(joined_buffer)
}

impl<S: AsyncWrite> AsyncWrite for WriteTimeout<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_with_timeout(cx, |stream, cx| stream.poll_write(cx, data), |bytes| *bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut buffer = EMPTY_BUFFER;
        if let Some(joined) = join_slices(data, &mut buffer) {
            return self.poll_write(cx, joined.filled());
        }
        self.poll_with_timeout(cx, |stream, cx| stream.poll_write_vectored(cx, data), |bytes| *bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_with_timeout(cx, AsyncWrite::poll_flush, |()| 0)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_with_timeout(cx, AsyncWrite::poll_shutdown, |()| 0)
    }
}

impl<S: Peek> Peek for WriteTimeout<S> {
    fn supports_half_close(&self) -> bool {
        self.stream.supports_half_close()
    }

    fn poll_peek_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.stream.poll_peek_byte(cx)
    }

    fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.stream.take_error()
    }
}

impl<S: AsyncRead> AsyncRead for WriteTimeout<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.project().stream.poll_read(cx, buffer)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::{advance, timeout};

    use super::super::connection::LIMITS;
    use super::*;
    use crate::policy::min_rate::{GRACE_PERIOD, MinRate};

    const SEND_TIMEOUT: Duration = Duration::from_secs(60);
    /// The minimum rate of these tests, in bytes per second.
    const MIN_RATE: u32 = 100;

    /// Returns the two ends of a stream with a buffer of 8 bytes. `bytes_per_second` is the minimum rate.
    fn create_stream(bytes_per_second: u32) -> (DuplexStream, WriteTimeout<DuplexStream>) {
        let (client, server) = duplex(8);
        let min_response_rate = MinRate { bytes_per_second };
        let limits = ConnectionLimits { send_timeout: SEND_TIMEOUT, min_response_rate, ..LIMITS };
        (client, WriteTimeout::new(server, &limits))
    }

    /// Reads chunks of `chunk_size` bytes, each after a pause.
    async fn read_chunks(client: &mut DuplexStream, chunks: usize, chunk_size: usize, pause: Duration) {
        for _ in 0..chunks {
            advance(pause).await;
            client.read_exact(&mut vec![0; chunk_size]).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_is_disconnected() {
        for (min_rate, expected) in
            [(0, SEND_TIMEOUT), (1, GRACE_PERIOD + Duration::from_secs(8)), (MIN_RATE, GRACE_PERIOD)]
        {
            let (_client, mut stream) = create_stream(min_rate);
            let start = clock::instant();
            let error = stream.write_all(&[0; 9]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(clock::elapsed_since(start).as_secs(), expected.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_little_is_served_without_a_minimum_rate() {
        let (mut client, mut stream) = create_stream(0);
        let pause = SEND_TIMEOUT - Duration::from_secs(1);
        let (write_result, ()) =
            tokio::join!(stream.write_all(&[0; 100]), read_chunks(&mut client, 92, 1, pause));
        write_result.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_below_the_rate_is_disconnected() {
        let (client, mut stream) = create_stream(MIN_RATE);
        let read_slowly = async {
            let mut client = client;
            loop {
                read_chunks(&mut client, 1, 1, Duration::from_secs(1)).await;
            }
        };
        let start = clock::instant();
        tokio::select! {
            biased;
            write_result = stream.write_all(&[0; 10_000]) => {
                assert_eq!(write_result.unwrap_err().kind(), io::ErrorKind::TimedOut);
            }
            () = read_slowly => {}
        }
        // At the minimum rate, each byte extends the client's time by 10 ms, but the client reads one byte per second.
        assert!(clock::elapsed_since(start) <= GRACE_PERIOD + Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_unevenly_at_the_rate_is_served() {
        for (chunks, chunk_size, pause_ms) in [(1_000, 1, 10), (125, 8, 80), (100, 8, 0)] {
            let (mut client, mut stream) = create_stream(MIN_RATE);
            let pause = Duration::from_millis(pause_ms);
            let response = vec![0; chunks * chunk_size];
            let (write_result, ()) = tokio::join!(
                stream.write_all(&response),
                read_chunks(&mut client, chunks, chunk_size, pause)
            );
            write_result.unwrap();
        }
        // A client that reads fast at first may pause later.
        let (mut client, mut stream) = create_stream(MIN_RATE);
        let read_unevenly = async {
            read_chunks(&mut client, 500, 8, Duration::ZERO).await;
            read_chunks(&mut client, 1, 8, SEND_TIMEOUT - Duration::from_secs(1)).await;
        };
        let (write_result, ()) = tokio::join!(stream.write_all(&[0; 4_008]), read_unevenly);
        write_result.unwrap();
    }

    #[test]
    fn small_slices_are_joined() {
        let mut buffer = EMPTY_BUFFER;
        let mut join = |slices: &[&[u8]]| {
            let slices: Vec<_> = slices.iter().map(|slice| IoSlice::new(slice)).collect();
            join_slices(&slices, &mut buffer).map(|joined| joined.filled().to_vec())
        };
        let (half, more_than_half) = ([7; MAX_JOINED_BYTES / 2], [7; MAX_JOINED_BYTES / 2 + 1]);
        assert_eq!(join(&[b"head", b"", b"body"]), Some(b"headbody".to_vec()));
        assert_eq!(join(&[]), Some(Vec::new()));
        assert_eq!(join(&[&half, &half]).map(|joined| joined.len()), Some(MAX_JOINED_BYTES));
        assert_eq!(join(&[&half, &more_than_half]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_between_writes_do_not_count_against_the_client() {
        let (mut client, mut stream) = create_stream(MIN_RATE);
        for _ in 0..3 {
            stream.write_all(&[0; 8]).await.unwrap();
            client.read_exact(&mut [0; 8]).await.unwrap();
            advance(SEND_TIMEOUT * 2).await;
        }
        assert!(timeout(SEND_TIMEOUT * 2, client.read_u8()).await.is_err(), "the connection must stay open");
    }
}
