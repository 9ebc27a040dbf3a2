//! A connection after its 101: authenticates the client in its first message if it has not done so before,
//! processes its request, and runs its session to the end.

use bytes::{Bytes, BytesMut};
use http::HeaderValue;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::buffers::{self, ReadAhead, ReadBuffer, SendBuffer};
use super::close_frames::{put_close, put_refusal};
use super::ending::send_last_frames;
use super::first_message_auth::{FirstMessageAuth, UnauthenticatedSession, read_token};
use super::session::Session;
use super::session_end::SessionEnd;
use crate::clock;
use crate::policy::client::Unidentified;
use crate::policy::frame::Sender;
use crate::policy::headers;
use crate::proxy::error::ProxyError;
use crate::proxy::reply::{Socket, SocketStage, UpstreamReply};
use crate::proxy::request_summary::RequestSummary;
use crate::upstream::Connect;

impl<C: Connect> Socket<C> {
    /// Runs the session with `client`, which has already sent `early`, to its end.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes both connections at once, and writes the usage record.
    pub async fn run<S: AsyncRead + AsyncWrite + Unpin>(self, client: S, early: Bytes) {
        let (session, client, early) = match self.0 {
            SocketStage::Open(session) => (session, client, early),
            // Boxed, so that its memory is free while the session runs.
            SocketStage::Unauthenticated(session) => {
                match Box::pin(session.authenticate(client, early)).await {
                    Some(begun) => begun,
                    None => return,
                }
            }
        };
        session.run(client, early).await;
    }
}

impl<C: Connect> UnauthenticatedSession<C> {
    /// Waits for the token and processes the request with it. Returns the session with the client's
    /// bytes so far; `None` when no session begins and the client has received the reason.
    ///
    /// A disconnect, a close or a protocol violation of the client meanwhile is noticed at once,
    /// and cancels what is waited for.
    async fn authenticate<S>(self, mut client: S, early: Bytes) -> Option<(Box<Session<C>>, S, Bytes)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { auth: FirstMessageAuth { proxy, config, dialect, .. }, mut request, mut log } = self;
        let limits = config.limits.websocket;
        let mut share = config.limits.buffers.share(buffers::FREE);
        let mut from_client = ReadBuffer::new(Sender::Client, dialect.is_read(), BytesMut::from(&early[..]));
        drop(early);
        let reading = read_token(&mut client, &mut from_client, dialect, &limits);
        let token = tokio::select! {
            biased;
            () = proxy.cut.cancelled() => Err(AuthFailure::Refused(ProxyError::Draining)),
            // A client that sends nothing in time has no token.
            token = timeout(limits.auth_message_timeout, reading) => token.unwrap_or(Ok(None)).map_err(AuthFailure::Ended),
        };
        let result = match token {
            Err(stopped) => Err(stopped),
            Ok(token) => {
                let finding = async {
                    let token = token.and_then(|token| HeaderValue::try_from(token).ok());
                    request.headers_mut().insert(headers::TOKEN_HEADER, token.ok_or(Unidentified::Missing)?);
                    proxy.find_reply(request, &mut log.summary).await
                };
                let bytes_max = limits.max_session_buffer;
                let ahead = ReadAhead { bytes_max, share: &mut share, other_bytes: 0 };
                tokio::select! {
                    biased;
                    () = proxy.cut.cancelled() => Err(AuthFailure::Refused(ProxyError::Draining)),
                    result = finding => result.map_err(AuthFailure::Refused),
                    ending = from_client.watch(&mut client, ahead) => {
                        Err(AuthFailure::Ended(ending))
                    }
                }
            }
        };
        let mut last = SendBuffer::default();
        match result {
            Ok(UpstreamReply::Socket(opened)) => {
                return Some((opened.into_session(log), client, from_client.bytes.freeze()));
            }
            Ok(UpstreamReply::Response { response, .. }) => {
                let status = response.head.status.as_u16();
                let message = format!("ElevenLabs responded with status {status}.");
                put_refusal(&mut last.bytes, dialect, "handshake_refused", &message);
            }
            Err(AuthFailure::Refused(error)) => {
                let (code, message) = refusal(&error, &mut log.summary);
                put_refusal(&mut last.bytes, dialect, code, &message);
            }
            Err(AuthFailure::Ended(ending)) => {
                log.summary.ended_as(ending.outcome());
                if let Some([to_client, _]) = ending.close_frames() {
                    put_close(&mut last.bytes, to_client, None);
                }
            }
        }
        // The access log is written before the client's close is awaited.
        drop(log);
        send_last_frames(&mut last, &mut client).await;
        None
    }
}

/// Why no session begins.
enum AuthFailure {
    /// The request is refused.
    Refused(ProxyError),
    /// The client has closed, disconnected or violated the protocol.
    Ended(SessionEnd),
}

/// The code and the message of the error response, which is recorded in the access log.
fn refusal(error: &ProxyError, summary: &mut RequestSummary) -> (&'static str, String) {
    let (status, message) = error.message(clock::now());
    summary.failed(error, status);
    (error.code(), message)
}
