//! One connection: HTTP/1.1 on a stream of any kind, until it ends or is told to.

use std::convert::Infallible;
use std::pin::pin;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tracing::debug;

use super::{Drain, Limits, Service};

/// Serves `stream` to its end.
pub(super) async fn serve<S, I>(stream: I, service: S, limits: Limits, drain: Drain)
where
    S: Service,
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answer = service_fn(move |request| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(service.answer(request).await) }
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
        () = drain.stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = connection => ended,
                () = drain.cut.cancelled() => return,
            }
        }
    };
    if let Err(error) = ended {
        // Clients leave and send what is no HTTP; neither is news.
        debug!("a connection ended: {error}");
    }
}
