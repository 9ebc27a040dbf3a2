//! Authentication in the first message of a socket, for clients that cannot send a token elsewhere.
//! The proxy accepts the handshake itself, and sends errors as messages instead of as HTTP
//! responses.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::header::{HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY};
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::buffers::{self, Read, ReadAhead, ReadBuffer, SendBuffer};
use super::client_to_upstream::{ClientMessage, ClientToUpstream};
use super::ending::{Ending, Side, put_close, put_refusal, say_last};
use super::session::Session;
use super::{Socket, SocketKind, SocketLimits};
use crate::clock;
use crate::elevenlabs::endpoint::socket_at;
use crate::elevenlabs::socket::{Dialect, presented};
use crate::policy::client::Unidentified;
use crate::policy::frame::{Sender, Violation};
use crate::policy::headers;
use crate::proxy::access_log::AccessLog;
use crate::proxy::error::ProxyError;
use crate::proxy::exchange::{ProxyResponse, UpstreamReply};
use crate::proxy::relay::ResponseBody;
use crate::proxy::request_summary::RequestSummary;
use crate::proxy::{Proxy, RuntimeConfig};
use crate::upstream::Connect;

/// Maximum bytes that are read of an unauthenticated client: enough for a token and voice settings.
const INTRODUCTION_BYTES_MAX: usize = 16 * 1024;

/// A handshake without a token, whose client may authenticate in its first message.
pub(in crate::proxy) struct FirstMessageAuth<C> {
    proxy: Arc<Proxy<C>>,
    config: Arc<RuntimeConfig>,
    dialect: Dialect,
    accept: HeaderValue,
}

/// An accepted handshake whose client has not authenticated yet.
pub(super) struct UnauthenticatedSession<C> {
    introduction: FirstMessageAuth<C>,
    request: Request<Incoming>,
    log: AccessLog,
}

impl<C> FirstMessageAuth<C> {
    /// Checks whether a request authenticates in its first message: tokens are required, it has
    /// none, and its protocol has a place for one in messages.
    pub(in crate::proxy) fn of(proxy: &Arc<Proxy<C>>, request: &Request<Incoming>) -> Option<Self> {
        let is_asked = headers::asks_for_socket(request.method(), request.version(), request.headers());
        // A handshake with a body is refused by the usual request processing.
        if !is_asked || !request.body().is_end_stream() {
            return None;
        }
        let config = proxy.config.load_full();
        // An ambiguous path is refused by the usual request processing.
        let dialect = socket_at(request.uri().path())?;
        let says_nothing = headers::presented(request.headers(), request.uri().query()).next().is_none();
        let may = config.clients.are_known() && says_nothing && dialect.takes_key_in_messages();
        let key = request.headers().get(SEC_WEBSOCKET_KEY).filter(|_| may)?;
        let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok()?;
        Some(Self { proxy: Arc::clone(proxy), config, dialect, accept })
    }

    /// Accepts the handshake, to wait for the client's first message.
    pub(in crate::proxy) fn begin(self, request: Request<Incoming>, log: AccessLog) -> ProxyResponse<C> {
        let mut answer = Response::new(ResponseBody::Ours(Full::default()));
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        headers::strip_switched(answer.headers_mut());
        answer.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, self.accept.clone());
        let unknown = Box::new(UnauthenticatedSession { introduction: self, request, log });
        ProxyResponse { answer, socket: Some(Socket(SocketKind::Unknown(unknown))) }
    }
}

impl<C: Connect> UnauthenticatedSession<C> {
    /// Waits for the token and processes the request with it. Returns the session with the client's
    /// bytes so far; `None` when no session begins and the client has received the reason.
    ///
    /// A disconnect, a close or a protocol violation of the client meanwhile is noticed at once,
    /// and cancels what is waited for.
    pub(super) async fn introduced<S>(
        self,
        mut client: S,
        early: Bytes,
    ) -> Option<(Box<Session<C>>, S, Bytes)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Self { introduction: FirstMessageAuth { proxy, config, dialect, .. }, mut request, mut log } =
            self;
        let bounds = config.limits.websocket;
        let mut share = config.limits.buffers.share(buffers::FREE);
        let mut from_client = ReadBuffer::new(Sender::Client, dialect.is_read(), BytesMut::from(&early[..]));
        drop(early);
        let hearing = hear_token(&mut client, &mut from_client, dialect, &bounds);
        let token = tokio::select! {
            biased;
            () = proxy.cut.cancelled() => Err(AuthFailure::Refused(ProxyError::Draining)),
            // A client that sends nothing in time has no token.
            token = timeout(bounds.auth_message_timeout, hearing) => token.unwrap_or(Ok(None)).map_err(AuthFailure::Ended),
        };
        let found = match token {
            Err(stopped) => Err(stopped),
            Ok(token) => {
                let finding = async {
                    let token = token.and_then(|token| HeaderValue::try_from(token).ok());
                    request.headers_mut().insert(headers::TOKEN_HEADER, token.ok_or(Unidentified::Missing)?);
                    proxy.find_reply(request, &mut log.summary).await
                };
                let bytes_max = bounds.max_session_buffer;
                let ahead = ReadAhead { bytes_max, share: &mut share, beside: 0 };
                tokio::select! {
                    biased;
                    () = proxy.cut.cancelled() => Err(AuthFailure::Refused(ProxyError::Draining)),
                    found = finding => found.map_err(AuthFailure::Refused),
                    ending = from_client.watch(&mut client, ahead) => {
                        Err(AuthFailure::Ended(ending))
                    }
                }
            }
        };
        let mut last = SendBuffer::default();
        match found {
            Ok(UpstreamReply::Socket(opened)) => {
                return Some((opened.into_session(log), client, from_client.bytes.freeze()));
            }
            Ok(UpstreamReply::Response { answer, .. }) => {
                let status = answer.head.status.as_u16();
                let message = format!("ElevenLabs responded with status {status}.");
                put_refusal(&mut last.bytes, dialect, "handshake_refused", &message);
            }
            Err(AuthFailure::Refused(error)) => {
                let (code, message) = refusal(&error, &mut log.summary);
                put_refusal(&mut last.bytes, dialect, code, &message);
            }
            Err(AuthFailure::Ended(ending)) => {
                log.summary.ended_as(ending.word());
                if let Some([to_client, _]) = ending.told() {
                    put_close(&mut last.bytes, to_client, None);
                }
            }
        }
        // The access log is written before the client's close is awaited.
        drop(log);
        say_last(&mut last, &mut client).await;
        None
    }
}

/// Why no session begins.
enum AuthFailure {
    /// The request is refused.
    Refused(ProxyError),
    /// The client has closed, disconnected or violated the protocol.
    Ended(Ending),
}

/// The code and the message of the error response, which is recorded in the access log.
fn refusal(error: &ProxyError, summary: &mut RequestSummary) -> (&'static str, String) {
    let (status, message) = error.message(clock::now());
    summary.failed(error, status);
    (error.code(), message)
}

/// Reads the token from a client's first message, which stays in `from_client`; `None` when it has
/// none.
///
/// # Errors
///
/// How the session ends when the client disconnects, closes or violates the protocol.
async fn hear_token<S: AsyncRead + Unpin>(
    client: &mut S,
    from_client: &mut ReadBuffer,
    dialect: Dialect,
    bounds: &SocketLimits,
) -> Result<Option<String>, Ending> {
    let mut upwards = ClientToUpstream::new(dialect, bounds.slice_bytes_max(), INTRODUCTION_BYTES_MAX);
    let (mut inbox, mut out) = (BytesMut::from(&from_client.bytes[..]), BytesMut::new());
    loop {
        match upwards.take(&mut inbox, &mut out) {
            ClientMessage::Message(_) => return Ok(presented(upwards.said())),
            ClientMessage::Refused(violation) => return Err(Ending::Violated(violation, Side::Client)),
            ClientMessage::Passed => out.clear(),
        }
        if let Some(ending) = from_client.ending() {
            return Err(ending);
        }
        if from_client.bytes.len() > INTRODUCTION_BYTES_MAX {
            return Err(Ending::Violated(Violation::TooLarge, Side::Client));
        }
        let before = from_client.bytes.len();
        if poll_fn(|cx| from_client.poll_read(cx, client)).await == Read::Gone {
            return Err(Ending::ClientLeft);
        }
        inbox.extend_from_slice(from_client.bytes.get(before..).unwrap_or_default());
    }
}
