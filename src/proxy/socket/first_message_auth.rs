//! Authentication in the first message of a socket, for clients that cannot send a token elsewhere.
//! The proxy accepts the handshake itself, and sends errors as messages instead of as HTTP
//! responses.

use std::future::poll_fn;
use std::sync::Arc;

use bytes::BytesMut;
use http::header::{HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY};
use http::{Request, Response, StatusCode};
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::io::AsyncRead;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::buffers::{ReadBuffer, ReadResult};
use super::client_to_upstream::{ClientMessage, ClientToUpstream};
use super::session_end::{SessionEnd, SessionSide};
use crate::elevenlabs::endpoint::socket_at;
use crate::elevenlabs::socket::{Dialect, presented};
use crate::policy::frame::Violation;
use crate::policy::headers;
use crate::proxy::access_log::AccessLog;
use crate::proxy::config::RuntimeConfig;
use crate::proxy::relay::ResponseBody;
use crate::proxy::socket_limits::SocketLimits;
use crate::proxy::state::Proxy;

/// Maximum bytes that are read of an unauthenticated client: enough for a token and voice settings.
const AUTH_MESSAGE_BYTES_MAX: usize = 16 * 1024;

/// A handshake without a token, whose client may authenticate in its first message.
pub(in crate::proxy) struct FirstMessageAuth<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    accept: HeaderValue,
}

/// An accepted handshake whose client has not authenticated yet.
pub(in crate::proxy) struct UnauthenticatedSession<C> {
    pub(super) auth: FirstMessageAuth<C>,
    pub(super) request: Request<Incoming>,
    pub(super) log: AccessLog,
}

impl<C> FirstMessageAuth<C> {
    /// Checks whether a request authenticates in its first message: tokens are required, it has
    /// none, and its protocol has a field for one in messages.
    pub(in crate::proxy) fn of(proxy: &Arc<Proxy<C>>, request: &Request<Incoming>) -> Option<Self> {
        let is_handshake =
            headers::is_websocket_upgrade(request.method(), request.version(), request.headers());
        // A handshake with a body is refused by the usual request processing.
        if !is_handshake || !request.body().is_end_stream() {
            return None;
        }
        let config = proxy.config.load_full();
        // An ambiguous path is refused by the usual request processing.
        let dialect = socket_at(request.uri().path())?;
        let has_no_token = headers::presented(request.headers(), request.uri().query()).next().is_none();
        let is_eligible = config.clients.are_known() && has_no_token && dialect.takes_key_in_messages();
        let key = request.headers().get(SEC_WEBSOCKET_KEY).filter(|_| is_eligible)?;
        let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok()?;
        Some(Self { proxy: Arc::clone(proxy), config, dialect, accept })
    }

    /// Accepts the handshake, to wait for the client's first message.
    pub(in crate::proxy) fn begin(
        self,
        request: Request<Incoming>,
        log: AccessLog,
    ) -> (Response<ResponseBody>, Box<UnauthenticatedSession<C>>) {
        let mut response = Response::new(ResponseBody::Ours(Full::default()));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        headers::strip_switched(response.headers_mut());
        response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, self.accept.clone());
        (response, Box::new(UnauthenticatedSession { auth: self, request, log }))
    }
}

/// Reads the token from a client's first message, which stays in `from_client`; `None` when it has
/// none.
///
/// # Errors
///
/// The end of the session, when the client disconnects, closes or violates the protocol.
pub(super) async fn read_token<S: AsyncRead + Unpin>(
    client: &mut S,
    from_client: &mut ReadBuffer,
    dialect: Dialect,
    limits: &SocketLimits,
) -> Result<Option<String>, SessionEnd> {
    let mut client_to_upstream =
        ClientToUpstream::new(dialect, limits.slice_bytes_max(), AUTH_MESSAGE_BYTES_MAX);
    let (mut inbox, mut out) = (BytesMut::from(&from_client.bytes[..]), BytesMut::new());
    loop {
        match client_to_upstream.take(&mut inbox, &mut out) {
            ClientMessage::Message(_) => return Ok(presented(client_to_upstream.held_start())),
            ClientMessage::Refused(violation) => {
                return Err(SessionEnd::Violated(violation, SessionSide::Client));
            }
            ClientMessage::Forwarded => out.clear(),
        }
        if let Some(ending) = from_client.ending() {
            return Err(ending);
        }
        if from_client.bytes.len() > AUTH_MESSAGE_BYTES_MAX {
            return Err(SessionEnd::Violated(Violation::TooLarge, SessionSide::Client));
        }
        let before = from_client.bytes.len();
        if poll_fn(|cx| from_client.poll_read(cx, client)).await == ReadResult::Disconnected {
            return Err(SessionEnd::ClientDisconnected);
        }
        inbox.extend_from_slice(from_client.bytes.get(before..).unwrap_or_default());
    }
}
