//! One connection: HTTP/1.1 on a stream of any kind, until it ends or is told to.

use std::convert::Infallible;
use std::future::pending;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Drain, First, Limits, Service};
use crate::tasks::Member;

/// A client that has connected is about to ask. When we end, it is waited for this long: closing on
/// it would refuse a request that was let in.
const FIRST_REQUEST_MAX: Duration = Duration::from_secs(1);

/// Serves `stream` to its end.
pub(super) async fn serve<S, I>(stream: I, service: S, limits: Limits, drain: Drain)
where
    S: Service,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (requests, stop) = (drain.requests.clone(), drain.stop.clone());
    let asked = CancellationToken::new();
    let expecting = expect_first(drain.requests.member(), drain.stop.clone(), asked.clone());
    let answer = service_fn(move |mut request: Request<Incoming>| {
        if !asked.is_cancelled() {
            request.extensions_mut().insert(First);
            asked.cancel();
        }
        let (service, stop, member) = (service.clone(), stop.clone(), requests.member());
        async move {
            let mut answer = service.answer(request).await;
            if stop.is_cancelled() {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<Response<_>, Infallible>(answer.map(|body| Counted { body, member }))
        }
    });
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_read_max)
            .max_buf_size(limits.head_bytes_max)
            .serve_connection(TokioIo::new(stream), answer)
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        never = expecting => match never {},
        () = drain.close.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = drain.cut.cancelled() => return,
            }
        }
        () = drain.cut.cancelled() => return,
    };
    if let Err(error) = ended {
        // Clients leave and send what is no HTTP; neither is news.
        debug!("a connection ended: {error}");
    }
}

/// Has the drain wait for the first request of a connection, but not for long.
async fn expect_first(member: Member, stop: CancellationToken, asked: CancellationToken) -> Infallible {
    stop.cancelled().await;
    let _ = tokio::time::timeout(FIRST_REQUEST_MAX, asked.cancelled()).await;
    drop(member);
    pending().await
}

pin_project! {
    /// An answer's body, which makes its request count as under way until it has passed.
    struct Counted<B> {
        #[pin]
        body: B,
        member: Member,
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
