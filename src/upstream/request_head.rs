//! Defines the head of an upstream request before a key is added. The head is kept until the last attempt, and for the
//! failovers of a WebSocket session. [`compact`](UpstreamRequestHead::compact) copies it, so that the read buffer with
//! the client's head can be freed. The head of a WebSocket handshake also decides whether a 101 response accepts the
//! handshake.

use http::header::{HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use http::{HeaderMap, Method, Uri};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// The head of an upstream request, without its key.
#[derive(Clone, Debug)]
pub struct UpstreamRequestHead {
    /// The method of the client's request.
    pub method: Method,
    /// The path and query without credentials, otherwise byte for byte as received.
    pub target: Uri,
    /// The headers, sanitized for the upstream.
    pub headers: HeaderMap,
}

impl UpstreamRequestHead {
    /// Copies the target and the header values. Until they are copied, they reference the read buffer with the client's
    /// head and prevent its release.
    pub fn compact(&mut self) {
        if let Ok(copied_target) = Uri::try_from(self.target.to_string()) {
            self.target = copied_target;
        }
        for value in self.headers.values_mut() {
            let Ok(mut copied_value) = HeaderValue::from_bytes(value.as_bytes()) else { continue };
            copied_value.set_sensitive(value.is_sensitive());
            *value = copied_value;
        }
    }

    /// Returns whether the request is a WebSocket handshake. A 101 response is valid only for such a request.
    #[must_use]
    pub fn is_websocket_upgrade(&self) -> bool {
        self.headers.contains_key(UPGRADE)
    }

    /// Returns whether a 101 response with the given `headers` accepts the WebSocket handshake. The response must name
    /// the protocol and prove that the provider has read `sec-websocket-key` (RFC 6455, section 4.1).
    pub(super) fn is_upgraded_by(&self, headers: &HeaderMap) -> bool {
        let is_websocket = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"websocket");
        let expected_accept =
            self.headers.get(SEC_WEBSOCKET_KEY).map(|key| derive_accept_key(key.as_bytes()));
        self.is_websocket_upgrade()
            && headers.get(UPGRADE).is_some_and(is_websocket)
            && expected_accept.is_none_or(|expected| {
                headers.get(SEC_WEBSOCKET_ACCEPT).is_some_and(|value| *value == expected)
            })
    }
}
