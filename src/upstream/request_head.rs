//! The head of a request on its way to the provider.

use http::header::{HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use http::{HeaderMap, Method, Uri};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// A request's head as it goes to the provider, but for its key.
#[derive(Clone, Debug)]
pub struct UpstreamRequestHead {
    /// The method, whatever it is.
    pub method: Method,
    /// Path and query, without the client's credentials, every other byte as received.
    pub target: Uri,
    /// Headers that were stripped for the upstream.
    pub headers: HeaderMap,
}

impl UpstreamRequestHead {
    /// Copies what is still part of the buffer that the client's head came in, so that the buffer can
    /// go although this head is kept for long.
    pub fn settle(&mut self) {
        if let Ok(copied) = Uri::try_from(self.target.to_string()) {
            self.target = copied;
        }
        for value in self.headers.values_mut() {
            let Ok(mut copied) = HeaderValue::from_bytes(value.as_bytes()) else { continue };
            copied.set_sensitive(value.is_sensitive());
            *value = copied;
        }
    }

    /// Whether it asks for a socket: then, and only then, 101 is an answer.
    #[must_use]
    pub fn asks_for_socket(&self) -> bool {
        self.headers.contains_key(UPGRADE)
    }

    /// Whether a 101 with these headers opens the socket that it asks for: one of its protocol, by a server that
    /// has read its key (RFC 6455, section 4.1).
    pub(super) fn is_opened_by(&self, headers: &HeaderMap) -> bool {
        let is_websocket = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"websocket");
        let accept = self.headers.get(SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
        let is_accepted = |accept: String| {
            headers.get(SEC_WEBSOCKET_ACCEPT).is_some_and(|found| found.as_bytes() == accept.as_bytes())
        };
        self.asks_for_socket()
            && headers.get(UPGRADE).is_some_and(is_websocket)
            && accept.is_none_or(is_accepted)
    }
}
