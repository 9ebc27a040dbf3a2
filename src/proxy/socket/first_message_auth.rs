//! Accepts the handshake of a client without a token, and reads the token from the first message of its WebSocket, for
//! clients that cannot send a token elsewhere. `upgrade` then authenticates the client and connects to the provider.

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
use crate::elevenlabs::endpoint::websocket_dialect;
use crate::elevenlabs::socket::{Dialect, credential_in_message};
use crate::policy::headers;
use crate::policy::websocket_frame::Violation;
use crate::proxy::access_log::AccessLog;
use crate::proxy::config::RuntimeConfig;
use crate::proxy::relay::ResponseBody;
use crate::proxy::socket_limits::SocketLimits;
use crate::proxy::state::Proxy;

/// Maximum number of bytes that are read from an unauthenticated client: enough for a token and voice
/// settings.
const MAX_AUTH_MESSAGE_SIZE: usize = 16 * 1024;

/// A handshake without a token, whose client may authenticate by its first message.
pub(in crate::proxy) struct FirstMessageAuth<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    /// The value of `Sec-WebSocket-Accept`.
    accept_header: HeaderValue,
}

/// An accepted handshake whose client has not authenticated yet.
pub(in crate::proxy) struct UnauthenticatedSession<C> {
    pub(super) auth: FirstMessageAuth<C>,
    pub(super) request: Request<Incoming>,
    pub(super) log: AccessLog,
}

impl<C> FirstMessageAuth<C> {
    /// Returns `Some` if the client of a WebSocket handshake may authenticate by its first message. The conditions are
    /// that a token is required, the request has none, and the messages of its protocol have a field for a token.
    pub(in crate::proxy) fn detect(proxy: &Arc<Proxy<C>>, request: &Request<Incoming>) -> Option<Self> {
        let is_handshake =
            headers::is_websocket_upgrade(request.method(), request.version(), request.headers());
        // `head::route` rejects a handshake with a body.
        if !is_handshake || !request.body().is_end_stream() {
            return None;
        }
        let config = proxy.config.load_full();
        // `head::route` rejects an ambiguous path.
        let dialect = websocket_dialect(request.uri().path())?;
        let has_no_token =
            headers::presented_credentials(request.headers(), request.uri().query()).next().is_none();
        let is_eligible = config.clients.require_token() && has_no_token && dialect.accepts_key_in_messages();
        let key = request.headers().get(SEC_WEBSOCKET_KEY).filter(|_| is_eligible)?;
        let accept_header = HeaderValue::try_from(derive_accept_key(key.as_bytes())).ok()?;
        Some(Self { proxy: Arc::clone(proxy), config, dialect, accept_header })
    }

    /// Accepts the handshake. Returns the 101 response, and the session that waits for the first message.
    pub(in crate::proxy) fn accept(
        self,
        request: Request<Incoming>,
        log: AccessLog,
    ) -> (Response<ResponseBody>, Box<UnauthenticatedSession<C>>) {
        let mut response = Response::new(ResponseBody::Generated(Full::default()));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        headers::prepare_upgrade_response(response.headers_mut());
        response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, self.accept_header.clone());
        (response, Box::new(UnauthenticatedSession { auth: self, request, log }))
    }
}

/// Reads the client's first message and returns its token, or `None` if the message contains no token. The message
/// remains in `from_client`.
///
/// # Errors
///
/// Returns the reason if the client disconnects, sends a close frame, violates the protocol or sends too many bytes.
pub(super) async fn read_token<S: AsyncRead + Unpin>(
    client: &mut S,
    from_client: &mut ReadBuffer,
    dialect: Dialect,
    limits: &SocketLimits,
) -> Result<Option<String>, SessionEnd> {
    let mut client_to_upstream =
        ClientToUpstream::new(dialect, limits.max_frame_part(), MAX_AUTH_MESSAGE_SIZE);
    let (mut input, mut output) = (BytesMut::from(&from_client.bytes[..]), BytesMut::new());
    loop {
        match client_to_upstream.process_input(&mut input, &mut output) {
            ClientMessage::Held(_) => return Ok(credential_in_message(&client_to_upstream.message_start)),
            ClientMessage::Refused(violation) => {
                return Err(SessionEnd::Violated(violation, SessionSide::Client));
            }
            ClientMessage::Forwarded => output.clear(),
        }
        if let Some(end) = from_client.client_end() {
            return Err(end);
        }
        if from_client.bytes.len() > MAX_AUTH_MESSAGE_SIZE {
            return Err(SessionEnd::Violated(Violation::TooLarge, SessionSide::Client));
        }
        let former_length = from_client.bytes.len();
        if poll_fn(|cx| from_client.poll_read(cx, client)).await == ReadResult::Disconnected {
            return Err(SessionEnd::ClientDisconnected);
        }
        input.extend_from_slice(from_client.bytes.get(former_length..).unwrap_or_default());
    }
}
