//! The access log: one line per request, written when the request ends, however it ends. It holds
//! none of the request's resources; the outcome is reported to it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, Request, StatusCode};
use tracing::{debug, warn};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use super::error::ProxyError;
use super::upstream_response::UpstreamResponse;
use super::usage::AttemptRecord;
use crate::body::Loss;
use crate::clock;
use crate::elevenlabs::endpoint::Route;
use crate::policy::client::ClientName;
use crate::policy::headers::parameter_names;
use crate::policy::method::recorded;
use crate::policy::verdict::Concern;
use crate::secret::ShortKey;
use crate::telemetry::{self, AccessLogEntry, Meters};
use crate::upstream::{SendError, SendErrorKind};

/// The key of the last attempt.
#[derive(Debug)]
enum LoggedKey {
    None,
    Client,
    Pool(ShortKey),
}

impl LoggedKey {
    fn word(&self) -> &str {
        match self {
            Self::None => "-",
            Self::Client => "own",
            Self::Pool(key) => key.as_str(),
        }
    }
}

/// The fields of a request's log line. Dropping it writes the line.
#[derive(Debug)]
pub(super) struct AccessLog {
    request_id: Arc<str>,
    began: Instant,
    method: Method,
    parameters: String,
    client: Option<ClientName>,
    route: Option<Route>,
    key: LoggedKey,
    attempts: u32,
    verdict: &'static str,
    status: Option<u16>,
    bytes: u64,
    credits: u64,
    first_byte: Option<Duration>,
    loss: Option<Loss>,
    /// The part of its time that was spent waiting for the provider.
    upstream: Duration,
    meters: Meters,
}

impl AccessLog {
    /// Begins the log of a request; generates a request ID unless the client sent one.
    pub(super) fn begin<B>(request: &Request<B>, meters: &Meters) -> Self {
        meters.request_begun();
        Self {
            request_id: own_id(request.headers()).unwrap_or_else(new_id),
            began: clock::instant(),
            method: recorded(request.method()),
            parameters: request.uri().query().map(parameter_names).unwrap_or_default(),
            client: None,
            route: None,
            key: LoggedKey::None,
            attempts: 0,
            verdict: "client_closed",
            status: None,
            bytes: 0,
            credits: 0,
            first_byte: None,
            loss: None,
            upstream: Duration::ZERO,
            meters: meters.clone(),
        }
    }

    /// The request ID.
    pub(super) fn request_id(&self) -> Arc<str> {
        Arc::clone(&self.request_id)
    }

    pub(super) fn set_route(&mut self, client: &ClientName, route: Route) {
        self.client = Some(client.clone());
        self.route = Some(route);
    }

    /// Records the result of an attempt, which took `elapsed`.
    pub(super) fn learned(
        &mut self,
        record: &AttemptRecord,
        result: &Result<Box<UpstreamResponse>, SendError>,
        elapsed: Duration,
    ) {
        self.upstream += elapsed;
        let request_id = &*self.request_id;
        self.attempts = record.number;
        self.key = match &record.key {
            Some(key) => LoggedKey::Pool(key.api_key().short().clone()),
            None => LoggedKey::Client,
        };
        let attempt = record.number;
        match result {
            Ok(answer) if answer.verdict.concern() == Concern::Nothing => {}
            Ok(answer) => debug!(request_id, attempt, "the provider says {:?}", answer.verdict),
            Err(SendError {
                kind:
                    SendErrorKind::ClientBroke | SendErrorKind::ClientStalled(_) | SendErrorKind::ClientSlow(_),
                ..
            }) => {}
            Err(SendError { kind, .. }) => warn!(request_id, attempt, "no answer from the upstream: {kind}"),
        }
    }

    /// Records why the body could not be kept for a retry.
    pub(super) fn record_replay_loss(&mut self, loss: Option<Loss>) {
        self.loss = loss;
    }

    /// Records that the relay of the provider's response begins.
    pub(super) fn relaying(&self) {
        self.meters.relayed(clock::since(self.began), self.upstream);
    }

    pub(super) fn relayed(&mut self, record: &AttemptRecord) {
        self.verdict = record.verdict;
        self.status = record.status;
        self.bytes = record.response_bytes;
        self.credits = record.credits;
        self.first_byte = record.first_byte;
    }

    /// Sets a verdict which differs from that of the last attempt.
    pub(super) fn ended_as(&mut self, verdict: &'static str) {
        self.verdict = verdict;
    }

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

impl Drop for AccessLog {
    fn drop(&mut self) {
        self.meters.request_ended(self.status);
        telemetry::tell(&AccessLogEntry {
            attempts: self.attempts,
            bytes: self.bytes,
            client: self.client.as_ref().map_or("-", ClientName::as_str),
            credits: self.credits,
            first_byte_ms: self.first_byte.map_or(0, millis),
            key: self.key.word(),
            method: self.method.as_str(),
            parameters: &self.parameters,
            replay_lost: self.loss.map(Loss::word),
            request_id: &self.request_id,
            route: self.route,
            status: self.status,
            time: clock::now(),
            total_ms: millis(clock::since(self.began)),
            verdict: self.verdict,
        });
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
