//! A client that takes no more of its answer does not hold a key for ever.

use std::future::Future;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::leaving::Peek;
use crate::clock;

pin_project! {
    /// A stream whose writes fail when the other end has taken nothing for a span. A slow client
    /// that takes a little now and then is never cut off.
    pub(super) struct Patient<S> {
        #[pin]
        stream: S,
        idle_max: Duration,
        // Made when a write has to wait for the first time: most never do.
        timer: Option<Pin<Box<Sleep>>>,
        is_waiting: bool,
    }
}

impl<S> Patient<S> {
    pub(super) fn new(stream: S, idle_max: Duration) -> Self {
        Self { stream, idle_max, timer: None, is_waiting: false }
    }

    /// The stream below.
    pub(super) fn get_ref(&self) -> &S {
        &self.stream
    }

    pub(super) fn into_inner(self) -> S {
        self.stream
    }
}

impl<S: AsyncWrite> Patient<S> {
    /// Does `write`, and waits with it for no longer than the span.
    fn poll_patiently<T>(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let this = self.project();
        if let Poll::Ready(written) = write(this.stream, cx) {
            *this.is_waiting = false;
            return Poll::Ready(written);
        }
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep(*this.idle_max)));
        if !*this.is_waiting {
            *this.is_waiting = true;
            timer.as_mut().reset((clock::instant() + *this.idle_max).into());
        }
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no more of its answer")))
    }
}

/// So much is copied together: the system takes one buffer faster than several.
const JOINED_BYTES_MAX: usize = 2 * 1024;

/// Room for that, which nobody has to clear.
type Room = [MaybeUninit<u8>; JOINED_BYTES_MAX];

const ROOM: Room = [MaybeUninit::uninit(); JOINED_BYTES_MAX];

/// All of `data` in one piece, if it is small enough.
fn joined<'a>(data: &[IoSlice<'_>], room: &'a mut Room) -> Option<ReadBuf<'a>> {
    if data.iter().map(|piece| piece.len()).sum::<usize>() > JOINED_BYTES_MAX {
        return None;
    }
    let mut joined = ReadBuf::uninit(room);
    data.iter().for_each(|piece| joined.put_slice(piece));
    Some(joined)
}

impl<S: AsyncWrite> AsyncWrite for Patient<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_patiently(cx, |stream, cx| stream.poll_write(cx, data))
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
        self.poll_patiently(cx, |stream, cx| stream.poll_write_vectored(cx, data))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_patiently(cx, AsyncWrite::poll_flush)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_patiently(cx, AsyncWrite::poll_shutdown)
    }
}

impl<S: Peek> Peek for Patient<S> {
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

impl<S: AsyncRead> AsyncRead for Patient<S> {
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::{advance, timeout};

    use super::*;

    const IDLE_MAX: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_given_up() {
        let (_client, server) = duplex(8);
        let mut patient = Patient::new(server, IDLE_MAX);
        let began = clock::instant();
        let error = patient.write_all(&[0; 9]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(clock::since(began).as_secs(), IDLE_MAX.as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_a_little_now_and_then_is_served() {
        let (mut client, server) = duplex(8);
        let mut patient = Patient::new(server, IDLE_MAX);
        let (written, ()) = tokio::join!(patient.write_all(&[0; 100]), async {
            for _ in 0..92 {
                advance(IDLE_MAX - Duration::from_secs(1)).await;
                client.read_u8().await.unwrap();
            }
        });
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
        let (mut client, server) = duplex(8);
        let mut patient = Patient::new(server, IDLE_MAX);
        for _ in 0..3 {
            patient.write_all(&[0; 8]).await.unwrap();
            client.read_exact(&mut [0; 8]).await.unwrap();
            advance(IDLE_MAX * 2).await;
        }
        assert!(timeout(IDLE_MAX * 2, client.read_u8()).await.is_err(), "it is still open");
    }
}
