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

use super::Limits;
use super::leaving::Peek;
use crate::clock;
use crate::policy::min_rate::ReadPace;

pin_project! {
    /// A stream whose writes fail when the client has read no byte for `idle_max`, or reads below a minimum
    /// average rate over the time for which the server waits for it.
    ///
    /// Bytes in the kernel's buffers count as read: see `Accepted::here` for their bound.
    pub(super) struct WriteTimeout<S> {
        #[pin]
        stream: S,
        idle_max: Duration,
        pace: ReadPace,
        // Created when a write is pending for the first time: most never are.
        timer: Option<Pin<Box<Sleep>>>,
        waiting_since: Option<Instant>,
    }
}

impl<S> WriteTimeout<S> {
    pub(super) fn new(stream: S, limits: &Limits) -> Self {
        let Limits {
            send_timeout: write_idle_max, min_response_rate: response_min_rate, response_grace, ..
        } = *limits;
        let pace = ReadPace::new(response_min_rate, response_grace, write_idle_max);
        Self { stream, idle_max: write_idle_max, pace, timer: None, waiting_since: None }
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
    /// Runs `write`, and bounds how long it may be pending. `taken` returns the number of bytes that it
    /// wrote.
    fn poll_in_time<T>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
        taken: impl FnOnce(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        let this = self.project();
        if let Poll::Ready(written) = write(this.stream, cx) {
            if this.waiting_since.take().is_some_and(|since| this.pace.record_wait(clock::since(since))) {
                return Poll::Ready(Err(timed_out(SLOW)));
            }
            this.pace.record_read(written.as_ref().map_or(0, taken) as u64);
            return Poll::Ready(written);
        }
        let since = *this.waiting_since.get_or_insert_with(clock::instant);
        let span = this.pace.left().map_or(*this.idle_max, |left| left.min(*this.idle_max));
        let deadline = (since + span).into();
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        if timer.deadline() != deadline {
            timer.as_mut().reset(deadline);
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(timed_out(if span < *this.idle_max { SLOW } else { IDLE })))
    }
}

const IDLE: &str = "the client takes no more of its answer";
const SLOW: &str = "the client takes its answer too slowly";

fn timed_out(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, why)
}

/// Maximum bytes that are joined before a write: the system accepts one buffer faster than several.
const JOINED_BYTES_MAX: usize = 2 * 1024;

/// An uninitialized buffer for the joined bytes.
type Room = [MaybeUninit<u8>; JOINED_BYTES_MAX];

const ROOM: Room = [MaybeUninit::uninit(); JOINED_BYTES_MAX];

/// All of `data` in one buffer, if it is small enough.
fn joined<'a>(data: &[IoSlice<'_>], room: &'a mut Room) -> Option<ReadBuf<'a>> {
    if data.iter().map(|piece| piece.len()).sum::<usize>() > JOINED_BYTES_MAX {
        return None;
    }
    let mut joined = ReadBuf::uninit(room);
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
        let mut room = ROOM;
        if let Some(joined) = joined(data, &mut room) {
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

    const IDLE_MAX: Duration = Duration::from_secs(60);
    const RATE: u32 = 100;

    /// A stream with a buffer of 8 bytes, and the client at its other end.
    fn pair(bytes_per_second: u32) -> (DuplexStream, WriteTimeout<DuplexStream>) {
        let (client, server) = duplex(8);
        let response_min_rate = MinRate { bytes_per_second };
        let limits = Limits { send_timeout: IDLE_MAX, min_response_rate: response_min_rate, ..LIMITS };
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
    async fn a_client_that_takes_nothing_is_given_up() {
        for (rate, expected) in [(0, IDLE_MAX), (1, GRACE + Duration::from_secs(8)), (RATE, GRACE)] {
            let (_client, mut stream) = pair(rate);
            let began = clock::instant();
            let error = stream.write_all(&[0; 9]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert_eq!(clock::since(began).as_secs(), expected.as_secs());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_a_client_that_takes_a_little_now_and_then_is_served() {
        let (mut client, mut stream) = pair(0);
        let pause = IDLE_MAX - Duration::from_secs(1);
        let (written, ()) = tokio::join!(stream.write_all(&[0; 100]), read(&mut client, 92, 1, pause));
        written.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_trickles_is_given_up() {
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
        // The client reads once a second, and the bytes it has read earn it less than another second.
        assert!(clock::since(began) <= GRACE + Duration::from_secs(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_at_the_rate_is_served_however_unevenly() {
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
            read(&mut client, 1, 8, IDLE_MAX - Duration::from_secs(1)).await;
        };
        let (written, ()) = tokio::join!(stream.write_all(&[0; 4_008]), reading);
        written.unwrap();
    }

    #[test]
    fn small_pieces_are_written_as_one() {
        let mut room = ROOM;
        let mut joined =
            |data: &[IoSlice<'_>]| joined(data, &mut room).map(|joined| joined.filled().to_vec());
        let (half, over) = ([7; JOINED_BYTES_MAX / 2], [7; JOINED_BYTES_MAX / 2 + 1]);
        let slices =
            |texts: &[&'static [u8]]| texts.iter().map(|text| IoSlice::new(text)).collect::<Vec<_>>();
        assert_eq!(joined(&slices(&[b"head", b"", b"body"])), Some(b"headbody".to_vec()));
        assert_eq!(joined(&[]), Some(Vec::new()));
        let both = [IoSlice::new(&half), IoSlice::new(&half)];
        assert_eq!(joined(&both).map(|both| both.len()), Some(JOINED_BYTES_MAX));
        assert_eq!(joined(&[IoSlice::new(&half), IoSlice::new(&over)]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_comes_slowly_is_nobodys_idleness() {
        let (mut client, mut stream) = pair(RATE);
        for _ in 0..3 {
            stream.write_all(&[0; 8]).await.unwrap();
            client.read_exact(&mut [0; 8]).await.unwrap();
            advance(IDLE_MAX * 2).await;
        }
        assert!(timeout(IDLE_MAX * 2, client.read_u8()).await.is_err(), "it is still open");
    }
}
