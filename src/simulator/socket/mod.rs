//! The provider's WebSockets: their paths, the responses to handshakes, and the start of sessions.
//! The provider accepts a handshake with an invalid key (captured, 2026), and the session then
//! reports the error in its own format. Read `wire` next, then one of the WebSockets.
//!
//! A WebSocket at any other path echoes its messages without a key, so that a test can check
//! whether a proxy forwards them unchanged.

mod limited_stream;
mod session_faults;
mod wire;

mod message_check;
mod refusal;
mod session_auth;

mod dialogue;
mod speech;
mod voice;

mod agent;
mod scribe;

mod echo;

use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::accounts::Refused;
use super::answer::{Answer, AnswerBody, set, trace_id};
use super::fault::Fault;
use super::ledger::SocketSummary;
use super::route::query;
use super::service::{Closed, Service, facts_of_fault, handshake_refused};
use super::spawn_until;
use super::tracked_stream::TrackedStream;
use super::world::{PendingRequest, Presented, Session};

use self::refusal::RefusalFormat;
use self::session_auth::SessionAuth;
use self::session_faults::SessionFaults;
use self::wire::Wire;

/// A WebSocket of the provider.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// `/v1/text-to-speech/{voice_id}/stream-input` or, with contexts, `…/multi-stream-input`.
    Speech { voice: String, has_contexts: bool },
    /// `/v1/text-to-dialogue/stream-input` or, with contexts, `…/multi-stream-input`.
    Dialogue { has_contexts: bool },
    /// `/v1/speech-to-text/realtime`.
    Scribe,
    /// `/v1/convai/conversation`.
    Agent,
    /// The echo, at any path that does not begin like a path of the provider.
    Echo,
}

impl Kind {
    /// The WebSocket at a path; `None` if the provider refuses the path with 403.
    fn of(path: &str) -> Option<Self> {
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        match segments.as_slice() {
            ["v1", "text-to-speech", voice, "stream-input"] => {
                Some(Kind::Speech { voice: (*voice).to_owned(), has_contexts: false })
            }
            ["v1", "text-to-speech", voice, "multi-stream-input"] => {
                Some(Kind::Speech { voice: (*voice).to_owned(), has_contexts: true })
            }
            ["v1", "text-to-dialogue", "stream-input"] => Some(Kind::Dialogue { has_contexts: false }),
            ["v1", "text-to-dialogue", "multi-stream-input"] => Some(Kind::Dialogue { has_contexts: true }),
            ["v1", "speech-to-text", "realtime"] => Some(Kind::Scribe),
            ["v1", "convai", "conversation"] => Some(Kind::Agent),
            ["v1", "text-to-speech" | "text-to-dialogue" | "speech-to-text", ..] => None,
            _ => Some(Kind::Echo),
        }
    }

    /// The format of its refusals.
    fn refusal_format(&self) -> RefusalFormat {
        match self {
            // The echo uses the format of speech.
            Kind::Speech { .. } | Kind::Echo => RefusalFormat::Speech,
            Kind::Dialogue { .. } => RefusalFormat::Dialogue,
            Kind::Scribe => RefusalFormat::Scribe,
            Kind::Agent => RefusalFormat::Agent,
        }
    }
}

/// Whether a request is a WebSocket handshake.
pub(super) fn is_handshake(request: &Request<Incoming>) -> bool {
    request.method() == Method::GET
        && listed(request.headers(), "upgrade").any(|name| name.eq_ignore_ascii_case("websocket"))
}

/// The items of a header that contains a list.
fn listed<'a>(headers: &'a HeaderMap, name: &'static str) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|member| !member.is_empty())
}

/// Responds to a handshake. An accepted session runs in a separate task.
///
/// # Errors
///
/// When a fault requires that there is no response.
pub(super) async fn open(
    service: Service,
    parts: Parts,
    upgrade: OnUpgrade,
    presented: Presented,
    mut pending: PendingRequest,
) -> Result<Response<AnswerBody>, Closed> {
    let kind = Kind::of(parts.uri.path());
    let text = parts.uri.query().unwrap_or_default();
    let auth = kind.as_ref().map(|kind| SessionAuth::of(kind, presented, &parts));
    let script_key = auth.as_ref().map_or(presented, |auth| auth.script_key(&service.world));
    let fault = service.world.take_fault(script_key, &parts.method, parts.uri.path());
    if matches!(fault, Fault::CloseUnread | Fault::CloseBeforeHead) {
        return Err(Closed);
    }
    if let Fault::SlowHead { ms } = fault {
        tokio::time::sleep(std::time::Duration::from_millis(ms)).await;
    }
    let refused = handshake_refused(&fault, facts_of_fault(&service.world, script_key, 1));
    let answer = refused.or_else(|| malformed(&parts)).unwrap_or_else(|| switching_protocols(&parts));
    let (Some(kind), Some(auth)) = (kind, auth) else { return Ok(ended(forbidden(), &mut pending)) };
    if answer.status != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(ended(answer, &mut pending));
    }
    // The handshake refuses the third model, which these WebSockets do not support (captured).
    if matches!(kind, Kind::Speech { .. })
        && query_value(text, "model_id").is_some_and(|model| model.starts_with("eleven_v3"))
    {
        return Ok(ended(forbidden(), &mut pending));
    }
    let response = ended(answer, &mut pending);
    let session = pending.into_session(summary(&parts, &response));
    let faults = SessionFaults::of(fault, &service.world, script_key);
    let running = run(upgrade, session, faults, kind, auth, text.to_owned());
    spawn_until(service.shutdown, &service.tasks, running);
    Ok(response)
}

async fn run(
    upgrade: OnUpgrade,
    session: Session,
    faults: SessionFaults,
    kind: Kind,
    auth: SessionAuth,
    text: String,
) {
    // The upgrade fails if the client disconnected before it received the response.
    let Ok(upgraded) = upgrade.await else { return };
    let Ok(parts) = upgraded.downcast::<TrackedStream>() else { return };
    let mut wire =
        Wire::new(parts.io.into_stream(), parts.read_buf.to_vec(), session, faults, kind.refusal_format())
            .await;
    wire.has_key_in_head = auth.has_key_in_head();
    // A session ends with a close, a break, or a disconnected client.
    let _ended = match kind {
        Kind::Speech { voice, has_contexts } => {
            Box::pin(speech::serve(&mut wire, auth, voice, has_contexts, &text)).await
        }
        Kind::Dialogue { has_contexts } => {
            Box::pin(dialogue::serve(&mut wire, auth, has_contexts, &text)).await
        }
        Kind::Agent => Box::pin(agent::serve(&mut wire, auth)).await,
        Kind::Scribe => Box::pin(scribe::serve(&mut wire, auth, &text)).await,
        Kind::Echo => echo::serve(&mut wire).await,
    };
}

fn ended(answer: Answer, pending: &mut PendingRequest) -> Response<AnswerBody> {
    pending.summary.status = Some(answer.status.as_u16());
    pending.summary.body_complete = true;
    answer.into_response()
}

/// The refusal of a handshake at a wrong path or with an unsupported model. It has no body
/// (captured, 2026).
fn forbidden() -> Answer {
    let mut answer = Answer::empty(&trace_id(), "text/plain; charset=utf-8");
    answer.status = StatusCode::FORBIDDEN;
    answer
}

/// The response to a malformed handshake (RFC 6455).
fn malformed(parts: &Parts) -> Option<Answer> {
    let version = parts.headers.get("sec-websocket-version");
    if version.is_none_or(|version| version != "13") {
        let mut answer = Answer::empty(&trace_id(), "text/plain; charset=utf-8");
        answer.status = StatusCode::UPGRADE_REQUIRED;
        set(&mut answer.headers, "sec-websocket-version", "13");
        return Some(answer);
    }
    let is_upgrade = listed(&parts.headers, "connection").any(|name| name.eq_ignore_ascii_case("upgrade"));
    if is_upgrade && parts.headers.contains_key("sec-websocket-key") {
        return None;
    }
    let mut answer = Answer::empty(&trace_id(), "text/plain; charset=utf-8");
    answer.status = StatusCode::BAD_REQUEST;
    Some(answer)
}

fn switching_protocols(parts: &Parts) -> Answer {
    let mut answer = Answer::empty(&trace_id(), "");
    answer.headers = HeaderMap::new();
    answer.status = StatusCode::SWITCHING_PROTOCOLS;
    let key = parts.headers.get("sec-websocket-key").map(|key| derive_accept_key(key.as_bytes()));
    set(&mut answer.headers, "connection", "upgrade");
    set(&mut answer.headers, "upgrade", "websocket");
    set(&mut answer.headers, "sec-websocket-accept", &key.unwrap_or_default());
    // The only subprotocol of the provider's WebSockets (its JavaScript client 1.25).
    if listed(&parts.headers, "sec-websocket-protocol").any(|name| name == "convai") {
        set(&mut answer.headers, "sec-websocket-protocol", "convai");
    }
    answer
}

fn summary(parts: &Parts, response: &Response<AnswerBody>) -> SocketSummary {
    let text = |headers: &HeaderMap, name| {
        headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let extensions: Vec<_> = listed(&parts.headers, "sec-websocket-extensions").collect();
    SocketSummary {
        origin: text(&parts.headers, "origin"),
        protocols: listed(&parts.headers, "sec-websocket-protocol").map(str::to_owned).collect(),
        protocol: text(response.headers(), "sec-websocket-protocol"),
        extensions: (!extensions.is_empty()).then(|| extensions.join(", ")),
        ..SocketSummary::default()
    }
}

/// The value of a query parameter.
fn query_value(text: &str, parameter: &str) -> Option<String> {
    query(text).find(|(name, _)| name == parameter).map(|(_, value)| value)
}

/// A result whose refusal contains the current numbers.
type OrRefused<T> = Result<T, Refused>;
