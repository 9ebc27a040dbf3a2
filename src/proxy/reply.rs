//! Defines the two results of a request: the provider's reply, and the response to the client, with the WebSocket
//! session that may follow it.

use http::Response;

use super::attempt::Attempt;
use super::ownership_recorder::OwnershipRecorder;
use super::relay::ResponseBody;
use super::socket::{Handshake, Session, UnauthenticatedSession};
use super::upstream_response::UpstreamResponse;

/// The response to a client, and the WebSocket session that follows a 101 response.
pub struct ProxyResponse<C> {
    /// The provider's response, or a response of the proxy: an error, or the 101 response to a handshake without a
    /// token.
    pub response: Response<ResponseBody>,
    /// The session that takes over the connection after a 101 response, or `None` for any other response.
    pub session: Option<AcceptedSession<C>>,
}

/// The provider's reply to a request: a response to relay, or an accepted WebSocket handshake.
pub(super) enum UpstreamReply<C> {
    Response {
        response: Box<UpstreamResponse>,
        attempt: Box<Attempt>,
        /// Records the identifiers in the body while it is relayed.
        ownership: Option<OwnershipRecorder>,
    },
    Handshake(Box<Handshake<C>>),
}

/// The WebSocket session that runs on a connection after its 101 response.
pub struct AcceptedSession<C>(pub(super) SocketStage<C>);

/// The stage of a session when its 101 response is sent.
pub(super) enum SocketStage<C> {
    /// The provider has accepted the handshake.
    Open(Box<Session<C>>),
    /// The client must still authenticate in its first message.
    Unauthenticated(Box<UnauthenticatedSession<C>>),
}

impl<C> ProxyResponse<C> {
    pub(super) fn new(response: Response<ResponseBody>, session: Option<SocketStage<C>>) -> Self {
        Self { response, session: session.map(AcceptedSession) }
    }
}
