//! Collects the data of a request for the access log and the request metrics. The steps of the request set its
//! fields.

use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::USER_AGENT;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use tracing::{debug, warn};
use uuid::fmt::Hyphenated;

use super::error::ProxyError;
use super::upstream_response::UpstreamResponse;
use super::usage::AttemptRecord;
use crate::body::ReplayLoss;
use crate::clock;
use crate::elevenlabs::endpoint::Route;
use crate::policy::authority::Authority;
use crate::policy::client::ClientName;
use crate::policy::headers::parameter_names;
use crate::policy::method::recorded_method;
use crate::policy::outcome::Outcome;
use crate::policy::verdict::Concern;
use crate::secret::{ShortKey, UserFingerprint};
use crate::upstream::{SendError, SendErrorKind};

/// The key of the last attempt.
#[derive(Debug)]
enum LastKey {
    /// There was no attempt.
    None,
    /// The client's own key.
    Client,
    /// A key of the pool.
    Pool(ShortKey),
}

/// The summary of a request. Until a step sets a field, the field has a default.
#[derive(Debug)]
pub(super) struct RequestSummary {
    request_id: Arc<str>,
    started_at: Instant,
    pub(super) method: Method,
    /// The names of the query parameters, without their values.
    pub(super) parameters: String,
    /// The peer address of the connection. It is `None` for a Unix socket, and for a client that disconnected before
    /// its address was read.
    pub(super) client_address: Option<IpAddr>,
    user_agent: Option<HeaderValue>,
    pub(super) client: Option<ClientName>,
    /// The end user that the request names.
    pub(super) user: Option<UserFingerprint>,
    pub(super) route: Option<Route>,
    key: LastKey,
    /// The authority of the last attempt.
    pub(super) upstream_host: Option<Arc<Authority>>,
    /// Number of attempts at the provider.
    pub(super) attempts: u32,
    /// The reason of each retry.
    pub(super) retry_reasons: Vec<&'static str>,
    /// The outcome of the last attempt or of the session, or the code of an error of the proxy.
    pub(super) verdict: &'static str,
    pub(super) status: Option<u16>,
    /// Bytes of the response body, or bytes that the provider sent in a WebSocket session.
    pub(super) bytes: u64,
    /// Credits charged for the request.
    pub(super) credits: u64,
    /// Time from the start of the last attempt to the head of its response, or to the first useful message of a
    /// WebSocket session.
    pub(super) first_byte: Option<Duration>,
    /// The reason why the replay buffer was lost, so that the body could not have been sent again, or `None` if the
    /// buffer was not lost.
    pub(super) replay_loss: Option<ReplayLoss>,
    /// Time spent on attempts at the provider.
    upstream_time: Duration,
    /// Time spent waiting before and between the attempts, for the client's body, the other replicas, a key or the
    /// usage queue.
    wait_time: Duration,
}

impl RequestSummary {
    /// Creates the summary from a request head. Generates a request ID unless the client sent a valid request ID.
    pub(super) fn new<B>(request: &Request<B>, client_address: Option<IpAddr>) -> Self {
        Self {
            client_address,
            request_id: client_request_id(request.headers()).unwrap_or_else(generate_request_id),
            started_at: clock::instant(),
            method: recorded_method(request.method()),
            parameters: request.uri().query().map(parameter_names).unwrap_or_default(),
            user_agent: request.headers().get(USER_AGENT).cloned(),
            client: None,
            user: None,
            route: None,
            key: LastKey::None,
            upstream_host: None,
            attempts: 0,
            retry_reasons: Vec::new(),
            verdict: Outcome::ClientClosed.as_str(),
            status: None,
            bytes: 0,
            credits: 0,
            first_byte: None,
            replay_loss: None,
            upstream_time: Duration::ZERO,
            wait_time: Duration::ZERO,
        }
    }

    pub(super) fn request_id(&self) -> Arc<str> {
        Arc::clone(&self.request_id)
    }

    /// Returns the short form of the last attempt's key, `own` for the client's own key, or `-` if there was
    /// no attempt.
    pub(super) fn key(&self) -> &str {
        match &self.key {
            LastKey::None => "-",
            LastKey::Client => "own",
            LastKey::Pool(key) => key.as_str(),
        }
    }

    /// Returns the short form of the last attempt's key, unless it is the client's own.
    pub(super) fn short_key(&self) -> Option<&ShortKey> {
        match &self.key {
            LastKey::None | LastKey::Client => None,
            LastKey::Pool(key) => Some(key),
        }
    }

    /// Returns the `User-Agent` header, or an empty string if the header is missing or invalid.
    pub(super) fn user_agent(&self) -> &str {
        self.user_agent.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// Returns the time since the request's head was received.
    pub(super) fn elapsed(&self) -> Duration {
        clock::elapsed_since(self.started_at)
    }

    /// Returns the part of `elapsed` that was spent neither on attempts nor on waiting: the time that the proxy
    /// itself used.
    pub(super) fn overhead(&self, elapsed: Duration) -> Duration {
        elapsed.saturating_sub(self.upstream_time + self.wait_time)
    }

    /// Awaits `future`, and counts the time from its first pending poll to its completion as waiting. A
    /// future that is ready at its first poll does not read the clock.
    pub(super) async fn count_wait<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        let mut pending_since = None;
        let output = poll_fn(|cx| {
            let poll = future.as_mut().poll(cx);
            if poll.is_pending() {
                pending_since.get_or_insert_with(clock::instant);
            }
            poll
        })
        .await;
        self.wait_time += pending_since.map(clock::elapsed_since).unwrap_or_default();
        output
    }

    /// Records the client, its end user and the route, when they are known.
    pub(super) fn set_client_and_route(
        &mut self,
        client: &ClientName,
        user: Option<UserFingerprint>,
        route: Route,
    ) {
        self.client = Some(client.clone());
        self.user = user;
        self.route = Some(route);
    }

    /// Records the result of an attempt that took `elapsed` until the response head or the error.
    pub(super) fn record_attempt(
        &mut self,
        record: &AttemptRecord,
        result: &Result<Box<UpstreamResponse>, SendError>,
        elapsed: Duration,
    ) {
        self.upstream_time += elapsed;
        self.upstream_host = Some(Arc::clone(&record.authority));
        self.attempts = record.number;
        self.key = match &record.key {
            Some(key) => LastKey::Pool(key.api_key().short().clone()),
            None => LastKey::Client,
        };
        let (request_id, attempt) = (&*self.request_id, record.number);
        match result {
            Ok(response) if response.verdict.concern() == Concern::Nothing => {}
            Ok(response) => {
                debug!(request_id, attempt, "the provider refused the request: {:?}", response.verdict);
            }
            Err(SendError {
                kind:
                    SendErrorKind::ClientBodyFailed
                    | SendErrorKind::ClientStalled(_)
                    | SendErrorKind::ClientTooSlow(_),
                ..
            }) => {}
            Err(SendError { kind, .. }) => {
                warn!(request_id, attempt, "no response from the upstream: {kind}");
            }
        }
    }

    /// Records the final values of the last attempt.
    pub(super) fn record_end(&mut self, record: &AttemptRecord) {
        self.verdict = record.outcome.as_str();
        self.status = record.status;
        self.bytes = record.response_bytes;
        self.credits = record.credits;
        self.first_byte = record.first_byte;
    }

    /// Replaces the outcome of the last attempt with the outcome of the session.
    pub(super) fn set_outcome(&mut self, outcome: Outcome) {
        self.verdict = outcome.as_str();
    }

    /// Records an error response of the proxy.
    pub(super) fn record_error(&mut self, error: &ProxyError, status: StatusCode) {
        self.verdict = error.code();
        self.status = Some(status.as_u16());
    }
}

/// Returns the client's `x-request-id`, if it can be written safely to a log line and a database column.
fn client_request_id(headers: &HeaderMap) -> Option<Arc<str>> {
    const MAX_LENGTH: usize = 128;
    let id = headers.get("x-request-id")?.to_str().ok()?;
    let is_safe = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    ((1..=MAX_LENGTH).contains(&id.len()) && id.bytes().all(is_safe)).then(|| id.into())
}

/// Generates a UUID of version 7, as for usage records, without a system call.
fn generate_request_id() -> Arc<str> {
    let mut buffer = [0; Hyphenated::LENGTH];
    let id: &str = AttemptRecord::new_id(clock::now()).hyphenated().encode_lower(&mut buffer);
    id.into()
}
