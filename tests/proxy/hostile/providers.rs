//! Hostile providers. A case contains the request of a client, the bytes and the moment of the provider's
//! response, and the expected outcome for the client.

mod cases;
mod leaks;
mod server;

use super::escape_bytes;
use super::http_parser;
use crate::support::SPEECH_PATH;

pub use cases::{account_responses, cases};
pub use leaks::find_leaks;
pub use server::Provider;

/// A hostile response and its expected outcome.
pub struct ProviderCase {
    pub name: &'static str,
    pub request_kind: RequestKind,
    pub script: ScriptedResponse,
    pub outcome: ResponseOutcome,
    /// The maximum number of keys that may be unusable after the response.
    pub max_unusable_keys: usize,
    /// Whether the response may change the state of keys and thereby affect later requests.
    pub changes_key_state: bool,
}

/// The kind of request that the client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// A GET, which is retried if there is no response.
    Voices,
    /// A POST, which is sent once.
    Speech,
    /// A WebSocket handshake.
    Socket,
}

/// The bytes that the provider sends in response to any request.
#[derive(Clone, Debug, Default)]
pub struct ScriptedResponse {
    pub chunks: Vec<Vec<u8>>,
    pub end: ConnectionEnd,
    /// Whether the response is sent as soon as a connection is open, before a request.
    pub is_early: bool,
    /// Bytes that are sent on all connections after the client has received its response.
    pub after_response: Vec<u8>,
}

/// The behaviour of the provider after its response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ConnectionEnd {
    /// The provider waits for the next request.
    #[default]
    KeepOpen,
    Close,
    Reset,
    /// The provider repeats these bytes until the proxy closes the connection.
    Flood(&'static [u8]),
}

/// The response that a client receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseOutcome {
    /// A complete response with this status.
    Complete(u16),
    /// A complete response with this status and this body.
    Body(u16, &'static str),
    /// A response with this status that the client recognizes as truncated, or no response, because the connection to
    /// the provider may fail before the proxy sends the head.
    Truncated(u16),
    /// An error response of the proxy with this status.
    ProxyError(u16),
}

pub const VOICES_BODY: &str = "{\"voices\":[]}";
pub const SPEECH_BODY: &str = "sound";

/// The query of valid requests. The provider always sends a valid response to them.
pub const VALID_REQUEST_MARK: &str = "honest=1";

/// Returns a request of a client that reads one response.
pub fn request(request_kind: RequestKind, query: &str) -> Vec<u8> {
    let body = r#"{"text":"Hello.","model_id":"eleven_multilingual_v2"}"#;
    let headers_and_body = match request_kind {
        RequestKind::Voices => "connection: close\r\n\r\n".to_owned(),
        RequestKind::Speech => {
            format!(
                "connection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        }
        RequestKind::Socket => "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
            sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            .to_owned(),
    };
    let (method, path) = match request_kind {
        RequestKind::Voices => ("GET", "/v1/voices".to_owned()),
        RequestKind::Speech => ("POST", SPEECH_PATH.to_owned()),
        RequestKind::Socket => ("GET", format!("{SPEECH_PATH}/stream-input")),
    };
    format!("{method} {path}?{query} HTTP/1.1\r\nhost: localhost\r\n{headers_and_body}").into_bytes()
}

/// Compares the bytes that a client received with the expected outcome.
///
/// # Errors
///
/// Describes the difference.
pub fn check_outcome(received: &[u8], outcome: ResponseOutcome) -> Result<(), String> {
    let mismatch = || Err(format!("the client must receive {outcome:?}, not {}", escape_bytes(received)));
    let is_truncated = matches!(outcome, ResponseOutcome::Truncated(_));
    if received.is_empty() && is_truncated {
        return Ok(());
    }
    let mut responses = http_parser::parse_responses(received)?;
    // The proxy sends an interim 100 to check whether a client that has closed its write half is still
    // connected.
    responses.retain(|response| response.status != 100);
    let [response] = &*responses else { return mismatch() };
    let is_proxy_error = response.header("x-keychoir-error").is_some();
    let matches = match outcome {
        ResponseOutcome::Complete(status) => {
            response.status == status && response.is_complete && !is_proxy_error
        }
        ResponseOutcome::Body(status, body) => {
            response.status == status
                && response.is_complete
                && !is_proxy_error
                && response.body == body.as_bytes()
        }
        ResponseOutcome::Truncated(status) => {
            response.status == status && !response.is_complete && !is_proxy_error
        }
        ResponseOutcome::ProxyError(status) => {
            response.status == status && response.is_complete && is_proxy_error
        }
    };
    if matches { Ok(()) } else { mismatch() }
}
