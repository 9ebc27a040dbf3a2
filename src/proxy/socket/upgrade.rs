//! Runs a connection after its 101 response. If the handshake had no token, first authenticates the client by its
//! first message, and sends its request to the provider.

use bytes::{Bytes, BytesMut};
use http::HeaderValue;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::buffers::{self, ReadAheadLimits, ReadBuffer, SendBuffer};
use super::close_frames::{put_close, put_refusal};
use super::ending::send_last_frames;
use super::first_message_auth::{FirstMessageAuth, UnauthenticatedSession, read_token};
use super::session::Session;
use super::session_end::SessionEnd;
use crate::clock;
use crate::policy::client::Unauthenticated;
use crate::policy::headers;
use crate::policy::websocket_frame::Sender;
use crate::proxy::error::ProxyError;
use crate::proxy::reply::{AcceptedSession, SocketStage, UpstreamReply};
use crate::upstream::Connect;

/// A session whose client has authenticated.
struct AuthenticatedSession<C, S> {
    session: Box<Session<C>>,
    client: S,
    /// The bytes that the client has sent so far.
    early_bytes: Bytes,
}

impl<C: Connect> AcceptedSession<C> {
    /// Runs the session with `client`, which has already sent `early_bytes`, until the session ends.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes both connections, and writes the usage record.
    pub async fn run<S: AsyncRead + AsyncWrite + Unpin>(self, client: S, early_bytes: Bytes) {
        let AuthenticatedSession { session, client, early_bytes } = match self.0 {
            SocketStage::Open(session) => AuthenticatedSession { session, client, early_bytes },
            // The future is boxed, so that its memory is freed before the session runs.
            SocketStage::Unauthenticated(session) => {
                match Box::pin(session.authenticate(client, early_bytes)).await {
                    Some(authenticated) => authenticated,
                    None => return,
                }
            }
        };
        session.run(client, early_bytes).await;
    }
}

impl<C: Connect> UnauthenticatedSession<C> {
    /// Waits for the token and processes the request with it. Returns `None` if the client is not authenticated or the
    /// request fails. The client then receives an error or a close frame, unless it has disconnected.
    ///
    /// The processing of the request is cancelled if the client disconnects, sends a close frame, violates the protocol
    /// or sends too many bytes, or if the drain timeout expires.
    async fn authenticate<S>(self, mut client: S, early_bytes: Bytes) -> Option<AuthenticatedSession<C, S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { auth: FirstMessageAuth { proxy, config, dialect, .. }, mut request, mut log } = self;
        let limits = config.limits.websocket;
        let mut reservation = config.limits.buffers.reservation(buffers::UNBUDGETED_SESSION_BYTES);
        let mut from_client =
            ReadBuffer::new(Sender::Client, dialect.is_inspected(), BytesMut::from(&early_bytes[..]));
        drop(early_bytes);
        let read_token = read_token(&mut client, &mut from_client, dialect, &limits);
        let token_result = tokio::select! {
            biased;
            () = proxy.drain_expired.cancelled() => Err(AuthFailure::Refused(ProxyError::Draining)),
            // A client that sends no message in time has no token.
            result = timeout(limits.auth_message_timeout, read_token) => {
                result.unwrap_or(Ok(None)).map_err(AuthFailure::SessionEnded)
            }
        };
        let reply_result = match token_result {
            Err(failure) => Err(failure),
            Ok(token) => {
                let forward_request = async {
                    let token_header = token.and_then(|token| HeaderValue::try_from(token).ok());
                    let token_header = token_header.ok_or(Unauthenticated::MissingToken)?;
                    request.headers_mut().insert(headers::TOKEN_HEADER, token_header);
                    proxy.forward_request(request, &mut log.summary).await
                };
                let max_bytes = limits.max_session_buffer;
                let read_ahead = ReadAheadLimits { max_bytes, reservation: &mut reservation, other_bytes: 0 };
                tokio::select! {
                    biased;
                    () = proxy.drain_expired.cancelled() => Err(AuthFailure::Refused(ProxyError::Draining)),
                    result = forward_request => result.map_err(AuthFailure::Refused),
                    end = from_client.read_ahead(&mut client, read_ahead) => Err(AuthFailure::SessionEnded(end)),
                }
            }
        };
        let mut last_frames = SendBuffer::default();
        match reply_result {
            Ok(UpstreamReply::Handshake(handshake)) => {
                let (session, early_bytes) = (handshake.into_session(log), from_client.bytes.freeze());
                return Some(AuthenticatedSession { session, client, early_bytes });
            }
            Ok(UpstreamReply::Response { response, .. }) => {
                let status = response.head.status.as_u16();
                let message = format!("ElevenLabs responded with status {status}.");
                put_refusal(&mut last_frames.bytes, dialect, "handshake_refused", &message);
            }
            Err(AuthFailure::Refused(error)) => {
                let (status, message) = error.message(clock::now());
                log.summary.record_error(&error, status);
                put_refusal(&mut last_frames.bytes, dialect, error.code(), &message);
            }
            Err(AuthFailure::SessionEnded(end)) => {
                log.summary.set_outcome(end.outcome());
                if let Some([to_client, _]) = end.close_frames() {
                    put_close(&mut last_frames.bytes, to_client, None);
                }
            }
        }
        // The access log is written before the wait for the client's close frame.
        drop(log);
        send_last_frames(&mut last_frames, &mut client).await;
        None
    }
}

/// The reason why authentication by the first message does not lead to a session.
enum AuthFailure {
    /// The request is refused.
    Refused(ProxyError),
    /// The client has sent a close frame, disconnected or violated the protocol, or its bytes exceed a buffer limit.
    SessionEnded(SessionEnd),
}
