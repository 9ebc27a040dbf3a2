//! Serves the provider's WebSockets: finds the WebSocket of a path, responds to the handshake, and starts the session.
//! The provider accepts a handshake with an invalid key (captured, 2026), and the session then reports the error in its
//! own format. Read `connection` next, then the module of a WebSocket.
//!
//! A WebSocket at a path of no provider endpoint echoes its messages without a key, so that a test can check whether a
//! proxy forwards them unchanged.

mod connection;
mod limited_stream;
mod session_faults;

mod message_check;
mod refusal;
mod session_auth;

mod dialogue;
mod speech;
mod synthesizer;

mod agent;
mod scribe;

mod echo;

use std::time::Duration;

use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use serde_json::Value;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::accounts::Refusal;
use super::fault::Fault;
use super::fault_response::{replace_response, scripted_refusal_values};
use super::ledger::SocketSummary;
use super::provider::{PendingRequest, PresentedKey, Session};
use super::query::query_value;
use super::response::ProviderResponse;
use super::response_body::ResponseBody;
use super::service::{ConnectionClosed, Service};
use super::spawn_until;
use super::tracked_stream::TrackedStream;

use self::connection::SessionConnection;
use self::refusal::RefusalFormat;
use self::session_auth::SessionAuth;
use self::session_faults::SessionFaults;

/// Maximum number of open contexts per connection. Each context collects its text separately.
const MAX_CONTEXTS: usize = 5;

/// A WebSocket of the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Endpoint {
    /// `/v1/text-to-speech/{voice_id}/stream-input` or, with contexts, `…/multi-stream-input`.
    Speech { voice: String, has_contexts: bool },
    /// `/v1/text-to-dialogue/stream-input` or, with contexts, `…/multi-stream-input`.
    Dialogue { has_contexts: bool },
    /// `/v1/speech-to-text/realtime`.
    Scribe,
    /// `/v1/convai/conversation`.
    Agent,
    /// The echo, at any other path that does not begin like a path of speech, dialogue or transcription.
    Echo,
}

impl Endpoint {
    /// Returns the WebSocket at a path. Returns `None` if the provider refuses the path with 403.
    fn find(path: &str) -> Option<Self> {
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        match segments.as_slice() {
            ["v1", "text-to-speech", voice, name @ ("stream-input" | "multi-stream-input")] => {
                Some(Endpoint::Speech { voice: (*voice).to_owned(), has_contexts: *name != "stream-input" })
            }
            ["v1", "text-to-dialogue", name @ ("stream-input" | "multi-stream-input")] => {
                Some(Endpoint::Dialogue { has_contexts: *name != "stream-input" })
            }
            ["v1", "speech-to-text", "realtime"] => Some(Endpoint::Scribe),
            ["v1", "convai", "conversation"] => Some(Endpoint::Agent),
            ["v1", "text-to-speech" | "text-to-dialogue" | "speech-to-text", ..] => None,
            _ => Some(Endpoint::Echo),
        }
    }

    /// Returns the format in which a session is refused.
    fn refusal_format(&self) -> RefusalFormat {
        match self {
            // The echo uses the format of speech.
            Endpoint::Speech { .. } | Endpoint::Echo => RefusalFormat::Speech,
            Endpoint::Dialogue { .. } => RefusalFormat::Dialogue,
            Endpoint::Scribe => RefusalFormat::Scribe,
            Endpoint::Agent => RefusalFormat::Agent,
        }
    }
}

/// Returns whether a request is a WebSocket handshake.
pub(super) fn is_handshake(request: &Request<Incoming>) -> bool {
    request.method() == Method::GET
        && list_items(request.headers(), "upgrade").any(|name| name.eq_ignore_ascii_case("websocket"))
}

/// Returns the items of a header that contains a list.
fn list_items<'a>(headers: &'a HeaderMap, name: &'static str) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|item| !item.is_empty())
}

/// Responds to a handshake. An accepted session runs in a separate task.
///
/// # Errors
///
/// Fails if a fault requires that there is no response.
pub(super) async fn open_session(
    service: Service,
    parts: Parts,
    upgrade: OnUpgrade,
    presented_key: PresentedKey,
    mut pending: PendingRequest,
) -> Result<Response<ResponseBody>, ConnectionClosed> {
    let endpoint = Endpoint::find(parts.uri.path());
    let query = parts.uri.query().unwrap_or_default();
    let auth = endpoint.as_ref().map(|endpoint| SessionAuth::new(endpoint, presented_key, &parts));
    let script_key = auth.as_ref().map_or(presented_key, |auth| auth.script_key(&service.provider));
    let fault = service.provider.take_fault(script_key, &parts.method, parts.uri.path());
    if matches!(fault, Fault::CloseUnread | Fault::CloseBeforeHead) {
        return Err(ConnectionClosed);
    }
    if let Fault::SlowHead { ms } = fault {
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
    let values = scripted_refusal_values(&service.provider, script_key, 1);
    let response = replace_response(&fault, |kind| Refusal::new(kind.clone(), values.clone()).into())
        .or_else(|| refuse_malformed(&parts))
        .unwrap_or_else(|| switching_protocols(&parts));
    let (Some(endpoint), Some(auth)) = (endpoint, auth) else {
        return Ok(finish_response(forbidden_response(), &mut pending));
    };
    if response.status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(finish_response(response, &mut pending));
    }
    // The handshake is refused for the model v3, which these WebSockets do not support (captured).
    if matches!(endpoint, Endpoint::Speech { .. })
        && query_value(query, "model_id").is_some_and(|model| model.starts_with("eleven_v3"))
    {
        return Ok(finish_response(forbidden_response(), &mut pending));
    }
    let response = finish_response(response, &mut pending);
    let session = pending.into_session(new_summary(&parts, &response));
    let faults = SessionFaults::new(fault, &service.provider, script_key);
    let session = run_session(upgrade, session, faults, endpoint, auth, query.to_owned());
    spawn_until(service.shutdown, &service.tasks, session);
    Ok(response)
}

/// Serves a session after its handshake, and closes it unless it has ended already.
async fn run_session(
    upgrade: OnUpgrade,
    session: Session,
    faults: SessionFaults,
    endpoint: Endpoint,
    auth: SessionAuth,
    query: String,
) {
    // The upgrade fails if the client disconnected before it received the response.
    let Ok(upgraded) = upgrade.await else { return };
    let Ok(parts) = upgraded.downcast::<TrackedStream>() else { return };
    let (tcp, read_bytes) = (parts.io.into_stream(), parts.read_buf.to_vec());
    let mut connection =
        SessionConnection::new(tcp, read_bytes, session, faults, endpoint.refusal_format()).await;
    connection.has_key_in_head = auth.has_key_in_head();
    let session_end = match endpoint {
        Endpoint::Speech { voice, has_contexts } => {
            Box::pin(speech::serve(&mut connection, auth, voice, has_contexts, &query)).await
        }
        Endpoint::Dialogue { has_contexts } => {
            Box::pin(dialogue::serve(&mut connection, auth, has_contexts, &query)).await
        }
        Endpoint::Agent => Box::pin(agent::serve(&mut connection, auth)).await,
        Endpoint::Scribe => Box::pin(scribe::serve(&mut connection, auth, &query)).await,
        Endpoint::Echo => echo::serve(&mut connection).await,
    };
    if session_end.is_ok() {
        connection.close(1_000, "").await;
    }
}

/// Records the status of the response to a handshake, and converts the response.
fn finish_response(response: ProviderResponse, pending: &mut PendingRequest) -> Response<ResponseBody> {
    pending.summary.status = Some(response.status.as_u16());
    pending.summary.is_body_complete = true;
    response.into_response()
}

fn empty_response(status: StatusCode) -> ProviderResponse {
    ProviderResponse::empty("text/plain; charset=utf-8").with_status(status)
}

/// Creates the refusal of a handshake at a wrong path or with an unsupported model. It has no body
/// (captured, 2026).
fn forbidden_response() -> ProviderResponse {
    empty_response(StatusCode::FORBIDDEN)
}

/// Returns the response to a malformed handshake (RFC 6455). Returns `None` for a valid handshake.
fn refuse_malformed(parts: &Parts) -> Option<ProviderResponse> {
    let version = parts.headers.get("sec-websocket-version");
    if version.is_none_or(|version| version != "13") {
        let response = empty_response(StatusCode::UPGRADE_REQUIRED);
        return Some(response.with_header("sec-websocket-version", "13"));
    }
    let is_upgrade =
        list_items(&parts.headers, "connection").any(|name| name.eq_ignore_ascii_case("upgrade"));
    let is_valid = is_upgrade && parts.headers.contains_key("sec-websocket-key");
    (!is_valid).then(|| empty_response(StatusCode::BAD_REQUEST))
}

/// Creates the 101 that accepts a handshake.
fn switching_protocols(parts: &Parts) -> ProviderResponse {
    let key = parts.headers.get("sec-websocket-key").map(|key| derive_accept_key(key.as_bytes()));
    let mut response = empty_response(StatusCode::SWITCHING_PROTOCOLS);
    response.headers.clear();
    let response = response
        .with_header("connection", "upgrade")
        .with_header("upgrade", "websocket")
        .with_header("sec-websocket-accept", &key.unwrap_or_default());
    // This is the only subprotocol of the provider's WebSockets (its JavaScript client 1.25).
    if list_items(&parts.headers, "sec-websocket-protocol").any(|name| name == "convai") {
        return response.with_header("sec-websocket-protocol", "convai");
    }
    response
}

/// Creates the record of a session from its handshake.
fn new_summary(parts: &Parts, response: &Response<ResponseBody>) -> SocketSummary {
    let header_text = |headers: &HeaderMap, name| {
        headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let extensions: Vec<_> = list_items(&parts.headers, "sec-websocket-extensions").collect();
    SocketSummary {
        origin: header_text(&parts.headers, "origin"),
        protocols: list_items(&parts.headers, "sec-websocket-protocol").map(str::to_owned).collect(),
        protocol: header_text(response.headers(), "sec-websocket-protocol"),
        extensions: (!extensions.is_empty()).then(|| extensions.join(", ")),
        ..SocketSummary::default()
    }
}

/// Returns whether the field `name` of a message is true.
fn is_set(message: &Value, name: &str) -> bool {
    message.get(name).and_then(Value::as_bool).unwrap_or(false)
}

/// Returns the name and the text of the refusal of a context beyond the maximum.
fn context_limit_error() -> (&'static str, String) {
    let message = format!(
        "Maximum simultaneous contexts per WebSocket connection exceeded ({MAX_CONTEXTS}). Please close an \
         existing context before opening a new one."
    );
    ("max_active_conversations", message)
}
