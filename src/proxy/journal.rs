//! One log line a request, at its end, whichever end it takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, Request, StatusCode};
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::accounts::Admission;
use super::answer::Answer;
use super::books::AttemptRecord;
use super::error::ProxyError;
use super::seats::Seat;
use crate::body::Loss;
use crate::clock;
use crate::policy::classify::Concern;
use crate::policy::client::ClientName;
use crate::policy::headers::parameter_names;
use crate::telemetry::Meters;
use crate::upstream::{SendError, SendErrorKind};

/// What is said of a request when it ends. Dropping it says it.
#[derive(Debug)]
pub(super) struct RequestLog {
    request_id: Arc<str>,
    began: Instant,
    method: String,
    parameters: String,
    client: Option<ClientName>,
    route: Option<Arc<str>>,
    key: Option<String>,
    attempts: u32,
    verdict: &'static str,
    status: Option<u16>,
    bytes: u64,
    credits: u64,
    first_byte: Option<Duration>,
    loss: Option<Loss>,
    seat: Option<Seat>,
    /// Of all its time so far, what was spent with the provider.
    upstream: Duration,
    meters: Meters,
    admission: Option<Admission>,
}

impl RequestLog {
    /// Begins the line of a request; gives it a name, unless it brought one.
    pub(super) fn begin<B>(request: &Request<B>, meters: &Meters) -> Self {
        meters.request_begun();
        Self {
            request_id: own_id(request.headers()).unwrap_or_else(|| Uuid::now_v7().to_string().into()),
            began: clock::instant(),
            method: request.method().as_str().chars().take(20).collect(),
            parameters: request.uri().query().map(parameter_names).unwrap_or_default(),
            client: None,
            route: None,
            key: None,
            attempts: 0,
            verdict: "client_left",
            status: None,
            bytes: 0,
            credits: 0,
            first_byte: None,
            loss: None,
            seat: None,
            upstream: Duration::ZERO,
            meters: meters.clone(),
            admission: None,
        }
    }

    /// The request's name.
    pub(super) fn request_id(&self) -> Arc<str> {
        Arc::clone(&self.request_id)
    }

    /// The request is one of those under way, until its line is written.
    pub(super) fn seated(&mut self, seat: Seat) {
        self.seat = Some(seat);
    }

    /// The request is one of its client's, for as long.
    pub(super) fn admitted(&mut self, admission: Admission) {
        self.admission = Some(admission);
    }

    /// Nothing was served, and nothing can have been charged: the request does not count.
    pub(super) fn unserved(&mut self) {
        if let Some(admission) = &mut self.admission {
            admission.give_back();
        }
    }

    pub(super) fn opened(&mut self, client: &ClientName, route: &Arc<str>) {
        self.client = Some(client.clone());
        self.route = Some(Arc::clone(route));
    }

    /// An attempt has brought this, after so long.
    pub(super) fn learned(
        &mut self,
        record: &AttemptRecord,
        result: &Result<Answer, SendError>,
        elapsed: Duration,
    ) {
        self.upstream += elapsed;
        let request_id = &*self.request_id;
        self.attempts = record.number;
        self.key = Some(match &record.key {
            Some(key) => key.api_key().short().to_string(),
            None => "own".to_owned(),
        });
        let attempt = record.number;
        match result {
            Ok(answer) if answer.verdict.concern() == Concern::Nothing => {}
            Ok(answer) => debug!(request_id, attempt, "the provider says {:?}", answer.verdict),
            Err(SendError { kind: SendErrorKind::ClientBroke | SendErrorKind::ClientStalled(_), .. }) => {}
            Err(SendError { kind, .. }) => warn!(request_id, attempt, "no answer from the upstream: {kind}"),
        }
    }

    /// The body could not be sent again, and why.
    pub(super) fn lost(&mut self, loss: Option<Loss>) {
        self.loss = loss;
    }

    /// The head of the provider's answer goes to the client.
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

    pub(super) fn failed(&mut self, error: &ProxyError, status: StatusCode) {
        self.verdict = error.code();
        self.status = Some(status.as_u16());
    }
}

/// The client's own `x-request-id`, if it can stand in a line and a column.
fn own_id(headers: &HeaderMap) -> Option<Arc<str>> {
    let id = headers.get("x-request-id")?.to_str().ok()?;
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    ((1..=128).contains(&id.len()) && id.bytes().all(is_plain)).then(|| id.into())
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        self.meters.request_ended(self.status);
        let total_ms = millis(clock::since(self.began));
        let route = self.route.as_deref().unwrap_or("-");
        let status = self.status.map_or_else(|| "-".to_owned(), |status| status.to_string());
        let key = self.key.as_deref().unwrap_or("-");
        let (method, verdict, credits, attempts) = (&*self.method, self.verdict, self.credits, self.attempts);
        info!(
            event = "request_ended",
            request_id = &*self.request_id,
            client = self.client.as_ref().map_or("-", ClientName::as_str),
            method,
            route,
            parameters = &*self.parameters,
            key,
            attempts,
            verdict,
            status = self.status.unwrap_or(0),
            bytes = self.bytes,
            credits,
            first_byte_ms = self.first_byte.map_or(0, millis),
            total_ms,
            replay_lost = self.loss.map(Loss::word),
            "{method} {route} {status} {verdict} {key} {credits} credits, {attempts} attempts, {total_ms} ms"
        );
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
