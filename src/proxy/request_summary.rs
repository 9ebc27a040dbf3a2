//! What is known of a request at its end: plain data that the steps of the request fill in, for the access
//! log and the metrics of requests.

use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::USER_AGENT;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use tracing::{debug, warn};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::error::ProxyError;
use super::upstream_response::UpstreamResponse;
use super::usage::AttemptRecord;
use crate::body::Loss;
use crate::clock;
use crate::elevenlabs::endpoint::Route;
use crate::policy::authority::Authority;
use crate::policy::client::ClientName;
use crate::policy::headers::parameter_names;
use crate::policy::method::recorded;
use crate::policy::outcome::Outcome;
use crate::policy::verdict::Concern;
use crate::secret::ShortKey;
use crate::upstream::{SendError, SendErrorKind};

/// The key of the last attempt.
#[derive(Debug)]
enum LastKey {
    None,
    Client,
    Pool(ShortKey),
}

/// The summary of a request, as far as the request has got.
#[derive(Debug)]
pub(super) struct RequestSummary {
    request_id: Arc<str>,
    began: Instant,
    pub(super) method: Method,
    /// The names of the query parameters; their values are not kept.
    pub(super) parameters: String,
    /// The address of the connection; a client on a Unix socket has none.
    pub(super) client_address: Option<IpAddr>,
    user_agent: Option<HeaderValue>,
    pub(super) client: Option<ClientName>,
    pub(super) route: Option<Route>,
    key: LastKey,
    /// The authority of the last attempt.
    pub(super) upstream_host: Option<Arc<Authority>>,
    /// Number of attempts at the provider.
    pub(super) attempts: u32,
    /// Why each attempt but the last was followed by another.
    pub(super) retry_reasons: Vec<&'static str>,
    pub(super) verdict: &'static str,
    pub(super) status: Option<u16>,
    /// Bytes of the response body.
    pub(super) bytes: u64,
    /// Credits charged for the request.
    pub(super) credits: u64,
    /// Time from the begin of the last attempt to the head of its response.
    pub(super) first_byte: Option<Duration>,
    /// Why the body could not have been sent again.
    pub(super) replay_loss: Option<Loss>,
    /// The part of its time that was spent at the provider.
    upstream: Duration,
    /// The part that was spent waiting for the client's body, a key or the usage queue.
    waited: Duration,
}

impl RequestSummary {
    /// Begins with the head of a request; generates a request ID unless the client sent one.
    pub(super) fn begin<B>(request: &Request<B>, client_address: Option<IpAddr>) -> Self {
        Self {
            client_address,
            request_id: own_id(request.headers()).unwrap_or_else(new_id),
            began: clock::instant(),
            method: recorded(request.method()),
            parameters: request.uri().query().map(parameter_names).unwrap_or_default(),
            user_agent: request.headers().get(USER_AGENT).cloned(),
            client: None,
            route: None,
            key: LastKey::None,
            upstream_host: None,
            attempts: 0,
            retry_reasons: Vec::new(),
            verdict: Outcome::ClientClosed.word(),
            status: None,
            bytes: 0,
            credits: 0,
            first_byte: None,
            replay_loss: None,
            upstream: Duration::ZERO,
            waited: Duration::ZERO,
        }
    }

    /// The request ID.
    pub(super) fn request_id(&self) -> Arc<str> {
        Arc::clone(&self.request_id)
    }

    /// The short form of the last attempt's key; `own` when the client brought it, `-` when there was no
    /// attempt.
    pub(super) fn key(&self) -> &str {
        match &self.key {
            LastKey::None => "-",
            LastKey::Client => "own",
            LastKey::Pool(key) => key.as_str(),
        }
    }

    /// The client's program, as far as the header is text.
    pub(super) fn user_agent(&self) -> &str {
        self.user_agent.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The time since the request's head was received.
    pub(super) fn elapsed(&self) -> Duration {
        clock::since(self.began)
    }

    /// The part of `elapsed` that was spent neither at the provider nor waiting.
    pub(super) fn overhead(&self, elapsed: Duration) -> Duration {
        elapsed.saturating_sub(self.upstream + self.waited)
    }

    /// Completes `future`, and counts the time from its first wait to its end as waiting. The clock is read
    /// only when it waits.
    pub(super) async fn waiting<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        let mut since = None;
        let output = poll_fn(|cx| {
            let polled = future.as_mut().poll(cx);
            if polled.is_pending() {
                since.get_or_insert_with(clock::instant);
            }
            polled
        });
        let output = output.await;
        self.waited += since.map(clock::since).unwrap_or_default();
        output
    }

    pub(super) fn set_route(&mut self, client: &ClientName, route: Route) {
        self.client = Some(client.clone());
        self.route = Some(route);
    }

    /// Records the result of an attempt at `host`, which took `elapsed`.
    pub(super) fn record_attempt(
        &mut self,
        record: &AttemptRecord,
        host: &Arc<Authority>,
        result: &Result<Box<UpstreamResponse>, SendError>,
        elapsed: Duration,
    ) {
        self.upstream += elapsed;
        self.upstream_host = Some(Arc::clone(host));
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
                    SendErrorKind::ClientBroke | SendErrorKind::ClientStalled(_) | SendErrorKind::ClientSlow(_),
                ..
            }) => {}
            Err(SendError { kind, .. }) => {
                warn!(request_id, attempt, "no response from the upstream: {kind}");
            }
        }
    }

    /// Records that another attempt follows the one with this verdict.
    pub(super) fn record_retry(&mut self, reason: &'static str) {
        self.retry_reasons.push(reason);
    }

    /// Records why the body could not be kept for a retry.
    pub(super) fn record_replay_loss(&mut self, loss: Option<Loss>) {
        self.replay_loss = loss;
    }

    /// Records the end of the last attempt.
    pub(super) fn record_end(&mut self, record: &AttemptRecord) {
        self.verdict = record.outcome.word();
        self.status = record.status;
        self.bytes = record.response_bytes;
        self.credits = record.credits;
        self.first_byte = record.first_byte;
    }

    /// Sets an outcome which differs from that of the last attempt.
    pub(super) fn ended_as(&mut self, outcome: Outcome) {
        self.verdict = outcome.word();
    }

    /// Records an error response of the proxy.
    pub(super) fn failed(&mut self, error: &ProxyError, status: StatusCode) {
        self.verdict = error.code();
        self.status = Some(status.as_u16());
    }
}

/// The client's own `x-request-id`, if it is safe in a log line and a database column.
fn own_id(headers: &HeaderMap) -> Option<Arc<str>> {
    let id = headers.get("x-request-id")?.to_str().ok()?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    ((1..=128).contains(&id.len()) && id.bytes().all(is_plain)).then(|| id.into())
}

/// A UUID of version 7 like the IDs of usage records, generated without a system call.
fn new_id() -> Arc<str> {
    let id: Uuid = AttemptRecord::name(clock::now());
    let mut text = [0; Hyphenated::LENGTH];
    let text: &str = id.hyphenated().encode_lower(&mut text);
    text.into()
}
