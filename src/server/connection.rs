//! One connection: HTTP/1.1 on a stream of any kind, until it ends or is told to, or is taken over by
//! who speaks another protocol on it.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::gauged::{Gauge, Gauged};
use super::patient::Patient;
use super::{Drain, First, Limits, Reply, Service, Session};
use crate::tasks::Member;

/// A client that has connected is about to ask. When we end, it is waited for this long: closing on
/// it would refuse a request that was let in.
const FIRST_REQUEST_MAX: Duration = Duration::from_secs(1);

/// Serves the stream that `opening` comes to, if it does, to its end. A drain that begins before the
/// first poll knows of it already.
pub(super) fn serve<S, I>(
    opening: impl Future<Output = Option<I>> + Send + 'static,
    service: S,
    limits: Limits,
    drain: Drain,
) -> impl Future<Output = ()> + Send + 'static
where
    S: Service,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let first = drain.requests.member();
    run(opening, service, limits, drain, first)
}

async fn run<S, I>(
    opening: impl Future<Output = Option<I>> + Send,
    service: S,
    limits: Limits,
    drain: Drain,
    first: Member,
) where
    S: Service,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (requests, stop) = (drain.requests.clone(), drain.stop.clone());
    let asked = CancellationToken::new();
    let mut expecting = pin!(expect_first(first, drain.stop.clone(), asked.clone()));
    let opened = tokio::select! {
        opened = opening => opened,
        never = expecting.as_mut() => match never {},
        () = drain.close.cancelled() => return,
        () = drain.cut.cancelled() => return,
    };
    let Some(stream) = opened else { return };
    let (takeover, gauge) = (Takeover::default(), Gauge::default());
    let (reserved, read) = (takeover.clone(), gauge.clone());
    let answer = service_fn(move |mut request: Request<Incoming>| {
        if !asked.is_cancelled() {
            request.extensions_mut().insert(First);
            asked.cancel();
        }
        let (service, stop, member) = (service.clone(), stop.clone(), requests.member());
        let asks = request.headers().contains_key(UPGRADE);
        let upgrade = asks.then(|| (hyper::upgrade::on(&mut request), reserved.clone(), read.clone()));
        async move {
            let Reply { mut answer, session } = service.answer(request).await;
            if let Some((session, (upgrade, takeover, gauge))) = session.zip(upgrade) {
                // The session counts as a request under way, to its end.
                takeover.put(Taken { session, upgrade, read: gauge.bytes(), _member: member });
                return Ok(answer.map(|body| Counted { body, _member: None }));
            }
            if stop.is_cancelled() {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<Response<_>, Infallible>(answer.map(|body| Counted { body, _member: Some(member) }))
        }
    });
    let stream = Gauged::new(Patient::new(stream, limits.write_idle_max), gauge.clone());
    // In a box that goes before a session begins: its buffers are not needed any more.
    let mut connection = Box::pin(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_read_max)
            .max_buf_size(limits.head_bytes_max)
            .serve_connection(TokioIo::new(stream), answer)
            .with_upgrades(),
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        never = expecting => match never {},
        () = drain.close.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection.as_mut() => ended,
                // Nothing is under way but, perhaps, the first part of a head.
                () = last_words(&drain) => return,
                () = drain.cut.cancelled() => return,
            }
        }
        () = drain.cut.cancelled() => return,
    };
    if let Err(error) = ended {
        // Clients leave and send what is no HTTP; neither is news.
        debug!("a connection ended: {error}");
    }
    drop(connection);
    if let Some(taken) = takeover.take() {
        Box::pin(taken.run::<I>(gauge)).await;
    }
}

/// A place for who takes the connection over. Cheap to clone.
#[derive(Clone, Default)]
struct Takeover(Arc<Mutex<Option<Taken>>>);

impl Takeover {
    fn put(&self, taken: Taken) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(taken);
    }

    fn take(&self) -> Option<Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A connection that is taken over when its 101 is out.
struct Taken {
    session: Session,
    upgrade: OnUpgrade,
    /// What the client had sent when the 101 was ready.
    read: u64,
    _member: Member,
}

impl Taken {
    async fn run<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, gauge: Gauge) {
        let Self { session, upgrade, read, _member } = self;
        let upgraded = match upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => return debug!("a client left before its socket was open: {error}"),
        };
        let parts = match upgraded.downcast::<TokioIo<Gauged<Patient<I>>>>() {
            Ok(parts) => parts,
            Err(_) => return debug!("a stream of an unknown kind was upgraded"),
        };
        // Who sends before the 101 cannot know whether it speaks to us or to a server behind us, and
        // nobody has looked at what it says.
        let since = gauge.bytes().saturating_sub(read);
        if parts.read_buf.len() as u64 > since {
            return debug!("a client spoke on a socket that was not open yet");
        }
        session(Box::new(parts.io.into_inner()), parts.read_buf).await;
    }
}

/// Ends when a client has had its time to finish a head it had begun, and its request, if it became
/// one, is answered.
async fn last_words(drain: &Drain) {
    tokio::time::sleep(FIRST_REQUEST_MAX).await;
    drain.requests.ended().await;
}

/// Has the drain wait for the first request of a connection, but not for long.
async fn expect_first(member: Member, stop: CancellationToken, asked: CancellationToken) -> Infallible {
    tokio::select! {
        () = asked.cancelled() => {}
        () = stop.cancelled() => {
            let _ = tokio::time::timeout(FIRST_REQUEST_MAX, asked.cancelled()).await;
        }
    }
    drop(member);
    pending().await
}

pin_project! {
    /// An answer's body, which makes its request count as under way until it has passed.
    struct Counted<B> {
        #[pin]
        body: B,
        _member: Option<Member>,
    }
}

impl<B: Body<Data = Bytes>> Body for Counted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        self.project().body.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use http::StatusCode;
    use http_body_util::Full;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::timeout;

    use super::*;
    use crate::tasks::Tasks;

    const LIMITS: Limits = Limits {
        head_read_max: Duration::from_secs(30),
        write_idle_max: Duration::from_secs(60),
        head_bytes_max: 8192,
        connections_max: 1,
    };
    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\n\r\n";

    /// Answers with whether it was the first request of its connection.
    #[derive(Clone)]
    struct Told;

    impl Service for Told {
        type Body = Full<Bytes>;

        async fn answer(&self, request: Request<Incoming>) -> Reply<Full<Bytes>> {
            let is_first = request.extensions().get::<First>().is_some();
            let mut answer =
                Response::new(Full::new(Bytes::from_static(if is_first { b"first" } else { b"later" })));
            let asks = request.headers().contains_key(UPGRADE);
            let session = asks.then(|| -> Session {
                *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                Box::new(|mut stream, early| {
                    Box::pin(async move {
                        stream.write_all(&early).await.unwrap();
                        // An echo, to the client's end.
                        let mut bytes = [0; 64];
                        while let Ok(count @ 1..) = stream.read(&mut bytes).await {
                            stream.write_all(&bytes[..count]).await.unwrap();
                        }
                    })
                })
            });
            Reply { answer, session }
        }
    }

    /// The client's end of a connection that is served.
    fn connected(drain: &Drain) -> DuplexStream {
        let (client, server) = duplex(4096);
        Tasks::new().spawn(serve(ready(Some(server)), Told, LIMITS, drain.clone()));
        client
    }

    async fn ask(client: &mut DuplexStream) -> String {
        client.write_all(REQUEST).await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"first") && !answer.ends_with(b"later") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0, "it was closed");
        }
        String::from_utf8(answer).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_not_asked_yet_is_waited_for() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        drain.stop.cancel();
        let almost = FIRST_REQUEST_MAX.saturating_sub(Duration::from_millis(1));
        assert!(timeout(almost, drain.requests.ended()).await.is_err(), "a client may still ask");
        let answer = ask(&mut client).await;
        assert!(answer.contains("connection: close") && answer.ends_with("first"), "{answer}");
        assert!(timeout(almost, drain.requests.ended()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_ask_is_not_waited_for_long() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        drain.stop.cancel();
        assert!(timeout(FIRST_REQUEST_MAX * 2, drain.requests.ended()).await.is_ok());
        drain.close.cancel();
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn half_a_head_does_not_hold_the_end() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        client.write_all(&REQUEST[..REQUEST.len() - 2]).await.unwrap();
        drain.stop.cancel();
        drain.requests.ended().await;
        drain.close.cancel();
        let closed = timeout(FIRST_REQUEST_MAX * 2, client.read(&mut [0])).await;
        assert_eq!(closed.expect("it is still open").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_connection_is_answered_until_all_are_closed() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        assert!(ask(&mut client).await.ends_with("first"));
        drain.stop.cancel();
        drain.requests.ended().await;
        let answer = ask(&mut client).await;
        assert!(answer.contains("connection: close") && answer.ends_with("later"), "{answer}");
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0, "it is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_does_not_open_holds_the_end_no_longer_than_others() {
        let drain = Drain::default();
        let (mut client, server) = duplex(4096);
        // The other end goes with the future, as a socket does.
        let opening = async move {
            let _server = server;
            pending::<Option<DuplexStream>>().await
        };
        Tasks::new().spawn(serve(opening, Told, LIMITS, drain.clone()));
        drain.stop.cancel();
        assert!(timeout(FIRST_REQUEST_MAX * 2, drain.requests.ended()).await.is_ok());
        drain.close.cancel();
        let closed = timeout(FIRST_REQUEST_MAX, client.read(&mut [0])).await;
        assert_eq!(closed.expect("it is closed at once").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_fails_to_open_is_waited_for_no_more() {
        let drain = Drain::default();
        Tasks::new().spawn(serve(ready(None::<DuplexStream>), Told, LIMITS, drain.clone()));
        drain.stop.cancel();
        assert!(timeout(FIRST_REQUEST_MAX / 2, drain.requests.ended()).await.is_ok());
    }

    const UPGRADE_REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: k\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n";

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_taken_over_counts_to_its_end() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        client.write_all(UPGRADE_REQUEST).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            client.read_buf(&mut head).await.unwrap();
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "));
        client.write_all(b"hello").await.unwrap();
        let mut echo = [0; 5];
        client.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"hello");
        drain.stop.cancel();
        let long = FIRST_REQUEST_MAX * 10;
        assert!(timeout(long, drain.requests.ended()).await.is_err(), "the session is under way");
        drop(client);
        assert!(timeout(long, drain.requests.ended()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_sent_before_the_switch_is_not_let_in() {
        let drain = Drain::default();
        let mut client = connected(&drain);
        let both = [UPGRADE_REQUEST, b"too early"].concat();
        client.write_all(&both).await.unwrap();
        let mut answer = Vec::new();
        let closed = timeout(FIRST_REQUEST_MAX, client.read_to_end(&mut answer)).await;
        closed.expect("it is still open").unwrap();
        assert!(answer.ends_with(b"\r\n\r\n"), "there is no echo");
    }
}
