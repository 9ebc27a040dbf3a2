//! Bounds how long a client may take to read its response, so that a client that does not read, or reads too
//! slowly, does not hold a key forever. The same bounds apply to WebSocket sessions, which use this stream
//! too.

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
use crate::policy::min_rate::ReadPace;

pin_project! {
    /// A stream whose writes fail when the client has read no byte for `send_timeout`, or reads below a minimum
    /// average rate over the time for which the server waits for it.
    ///
    /// Bytes in the kernel's buffers count as read: see `Accepted::register` for their bound.
    pub(super) struct WriteTimeout<S> {
        #[pin]
        stream: S,
        send_timeout: Duration,
        pace: ReadPace,
        // Created when a write is pending for the first time: most never are.
        timer: Option<Pin<Box<Sleep>>>,
        waiting_since: Option<Instant>,
    }
}

impl<S> WriteTimeout<S> {
    pub(super) fn new(stream: S, limits: &ConnectionLimits) -> Self {
        let ConnectionLimits { send_timeout, min_response_rate, response_grace, .. } = *limits;
        let pace = ReadPace::new(min_response_rate, response_grace, send_timeout);
        Self { stream, send_timeout, pace, timer: None, waiting_since: None }
    }

    /// The inner stream.
    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }
}

impl<S: AsyncWrite> WriteTimeout<S> {
    /// Runs `write`, and bounds how long it may be pending. `written_bytes` returns the number of bytes that it
    /// wrote.
    fn poll_in_time<T>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
        written_bytes: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        let this = self.project();
        if let Poll::Ready(written) = write(this.stream, cx) {
            if this.waiting_since.take().is_some_and(|since| this.pace.record_wait(clock::since(since))) {
                return Poll::Ready(Err(timed_out(SLOW)));
            }
            this.pace.record_read(written.as_ref().map_or(0, written_bytes) as u64);
            return Poll::Ready(written);
        }
        let since = *this.waiting_since.get_or_insert_with(clock::instant);
        let span = this.pace.left().map_or(*this.send_timeout, |left| left.min(*this.send_timeout));
        let deadline = (since + span).into();
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(timed_out(if span < *this.send_timeout { SLOW } else { IDLE })))
    }
}

const IDLE: &str = "the client reads no more of its response";
const SLOW: &str = "the client reads its response too slowly";

fn timed_out(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, reason)
}

/// Maximum bytes that are joined before a write: the system accepts one buffer faster than several.
const MAX_JOINED_BYTES: usize = 2 * 1024;

/// An uninitialized buffer for the joined bytes.
type JoinBuffer = [MaybeUninit<u8>; MAX_JOINED_BYTES];

const EMPTY_BUFFER: JoinBuffer = [MaybeUninit::uninit(); MAX_JOINED_BYTES];

/// All of `data` in one buffer, if it is small enough.
fn joined<'a>(data: &[IoSlice<'_>], buffer: &'a mut JoinBuffer) -> Option<ReadBuf<'a>> {
    if data.iter().map(|piece| piece.len()).sum::<usize>() > MAX_JOINED_BYTES {
        return None;
    }
    let mut joined = ReadBuf::uninit(buffer);
    data.iter().for_each(|piece| joined.put_slice(piece));
    Some(joined)
}

impl<S: AsyncWrite> AsyncWrite for WriteTimeout<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_in_time(cx, |stream, cx| stream.poll_write(cx, data), |bytes| *bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut buffer = EMPTY_BUFFER;
        if let Some(joined) = joined(data, &mut buffer) {
            return self.poll_write(cx, joined.filled());
        }
        self.poll_in_time(cx, |stream, cx| stream.poll_write_vectored(cx, data), |bytes| *bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_in_time(cx, AsyncWrite::poll_flush, |()| 0)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_in_time(cx, AsyncWrite::poll_shutdown, |()| 0)
    }
}

impl<S: Peek> Peek for WriteTimeout<S> {
    fn has_halves(&self) -> bool {
        self.stream.has_halves()
    }

    fn poll_next_byte(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.stream.poll_next_byte(cx)
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
    use crate::policy::min_rate::{GRACE, MinRate};

    const SEND_TIMEOUT: Duration = Duration::from_secs(60);
    const RATE: u32 = 100;

    /// A stream with a buffer of 8 bytes, and the client at its other end.
    fn pair(bytes_per_second: u32) -> (DuplexStream, WriteTimeout<DuplexStream>) {
        let (client, server) = duplex(8);
        let min_response_rate = MinRate { bytes_per_second };
        let limits = ConnectionLimits { send_timeout: SEND_TIMEOUT, min_response_rate, ..LIMITS };
        (client, WriteTimeout::new(server, &limits))
    }

    /// Reads `times` times up to `bytes` bytes, after a pause each.
    async fn read(client: &mut DuplexStream, times: usize, bytes: usize, pause: Duration) {
        for _ in 0..times {
            advance(pause).await;
            client.read_exact(&mut vec![0; bytes]).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_nothing_is_disconnected() {
        for (rate, expected) in [(0, SEND_TIMEOUT), (1, GRACE + Duration::from_secs(8)), (RATE, GRACE)] {
            let (_client, mut stream) = pair(rate);
            let began = clock::instant();
            let error = stream.write_all(&[0; 9]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(clock::since(began).as_secs(), expected.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_little_is_served_without_a_minimum_rate() {
        let (mut client, mut stream) = pair(0);
        let pause = SEND_TIMEOUT - Duration::from_secs(1);
        let (written, ()) = tokio::join!(stream.write_all(&[0; 100]), read(&mut client, 92, 1, pause));
        written.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_below_the_rate_is_disconnected() {
        let (client, mut stream) = pair(RATE);
        let trickling = async {
            let mut client = client;
            loop {
                read(&mut client, 1, 1, Duration::from_secs(1)).await;
            }
        };
        let began = clock::instant();
        tokio::select! {
            biased;
            written = stream.write_all(&[0; 10_000]) => {
                assert_eq!(written.unwrap_err().kind(), io::ErrorKind::TimedOut);
            }
            () = trickling => {}
        }
        // The client reads once a second, and the bytes of each read allow it less than another
        // second.
        assert!(clock::since(began) <= GRACE + Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_reads_unevenly_at_the_rate_is_served() {
        for (times, bytes, pause_ms) in [(1_000, 1, 10), (125, 8, 80), (100, 8, 0)] {
            let (mut client, mut stream) = pair(RATE);
            let pause = Duration::from_millis(pause_ms);
            let sent = vec![0; times * bytes];
            let (written, ()) = tokio::join!(stream.write_all(&sent), read(&mut client, times, bytes, pause));
            written.unwrap();
        }
        // The client reads fast at first, and then pauses for the time it has saved.
        let (mut client, mut stream) = pair(RATE);
        let reading = async {
            read(&mut client, 500, 8, Duration::ZERO).await;
            read(&mut client, 1, 8, SEND_TIMEOUT - Duration::from_secs(1)).await;
        };
        let (written, ()) = tokio::join!(stream.write_all(&[0; 4_008]), reading);
        written.unwrap();
    }

    #[test]
    fn small_buffers_are_joined() {
        let mut buffer = EMPTY_BUFFER;
        let mut joined =
            |data: &[IoSlice<'_>]| joined(data, &mut buffer).map(|joined| joined.filled().to_vec());
        let (half, over) = ([7; MAX_JOINED_BYTES / 2], [7; MAX_JOINED_BYTES / 2 + 1]);
        let slices =
            |texts: &[&'static [u8]]| texts.iter().map(|text| IoSlice::new(text)).collect::<Vec<_>>();
        assert_eq!(joined(&slices(&[b"head", b"", b"body"])), Some(b"headbody".to_vec()));
        assert_eq!(joined(&[]), Some(Vec::new()));
        let both = [IoSlice::new(&half), IoSlice::new(&half)];
        assert_eq!(joined(&both).map(|both| both.len()), Some(MAX_JOINED_BYTES));
        assert_eq!(joined(&[IoSlice::new(&half), IoSlice::new(&over)]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_is_slow_to_come_is_not_a_slow_client() {
        let (mut client, mut stream) = pair(RATE);
        for _ in 0..3 {
            stream.write_all(&[0; 8]).await.unwrap();
            client.read_exact(&mut [0; 8]).await.unwrap();
            advance(SEND_TIMEOUT * 2).await;
        }
        assert!(timeout(SEND_TIMEOUT * 2, client.read_u8()).await.is_err(), "it is still open");
    }
}
