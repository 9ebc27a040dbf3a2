//! The results of a request, from the provider's reply to what the server sends to the client.

use http::Response;

use super::account_affinity::OwnershipRecorder;
use super::attempt::Attempt;
use super::relay::ResponseBody;
use super::socket::{Handshake, Session, UnauthenticatedSession};
use super::upstream_response::UpstreamResponse;

/// The result of a request: an HTTP response, and for a switched connection its socket session.
pub struct ProxyResponse<C> {
    /// The response for the client: the provider's, or one of the proxy's own.
    pub response: Response<ResponseBody>,
    /// The session that takes over the connection when the response is a 101.
    pub socket: Option<Socket<C>>,
}

/// The provider's reply to a request: a response to relay, or an accepted socket handshake.
pub(super) enum UpstreamReply<C> {
    Response {
        response: Box<UpstreamResponse>,
        attempt: Box<Attempt>,
        /// Reads owned identifiers from the body while it is relayed.
        ownership: Option<OwnershipRecorder>,
    },
    Socket(Box<Handshake<C>>),
}

/// The session that runs on a connection after its 101.
pub struct Socket<C>(pub(super) SocketStage<C>);

/// How far a session has got at its 101.
pub(super) enum SocketStage<C> {
    /// The provider has accepted its handshake.
    Open(Box<Session<C>>),
    /// Its client has yet to authenticate, in its first message.
    Unauthenticated(Box<UnauthenticatedSession<C>>),
}

impl<C> ProxyResponse<C> {
    /// A 101 and the session that follows it.
    pub(super) fn switched(response: Response<ResponseBody>, session: Box<Session<C>>) -> Self {
        Self { response, socket: Some(Socket(SocketStage::Open(session))) }
    }

    /// A 101 to a client that authenticates in its first message.
    pub(super) fn unauthenticated(
        response: Response<ResponseBody>,
        session: Box<UnauthenticatedSession<C>>,
    ) -> Self {
        Self { response, socket: Some(Socket(SocketStage::Unauthenticated(session))) }
    }

    /// A response without a session.
    pub(super) fn of(response: Response<ResponseBody>) -> Self {
        Self { response, socket: None }
    }
}
