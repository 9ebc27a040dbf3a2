//! Writes the access log: one event per request when the request ends, whatever its outcome. [`AccessLog`] is the guard
//! of a running request. Dropping it also records the end of the request in the metrics, and adds the request to the
//! events for listeners of the admin API. The guard holds neither the key nor the permits of the request, so these are
//! released independently of it.

use std::net::IpAddr;
use std::sync::OnceLock;
use std::time::Duration;
use std::{fmt, mem};

use http::Request;
use tracing::{Level, enabled, info};

use super::request_summary::RequestSummary;
use crate::policy::client::ClientName;
use crate::policy::plain_text::hide_tokens;
use crate::telemetry::{EndedRequest, EventRing, RequestLabels, RequestMetrics};

/// Maximum number of characters of a `User-Agent` in the log.
const MAX_USER_AGENT_CHARS: usize = 200;

/// The guard of a running request. Dropping the guard writes the event, adds the request to the events for listeners
/// of the admin API, and records the request in the metrics.
#[derive(Debug)]
pub(super) struct AccessLog {
    pub(super) summary: RequestSummary,
    metrics: RequestMetrics,
    events: EventRing,
}

impl AccessLog {
    pub(super) fn new<B>(
        request: &Request<B>,
        peer: Option<IpAddr>,
        metrics: &RequestMetrics,
        events: &EventRing,
    ) -> Self {
        metrics.record_request_start();
        let summary = RequestSummary::new(request, peer);
        Self { summary, metrics: metrics.clone(), events: events.clone() }
    }

    /// Records in the metrics that the proxy starts to relay the provider's response.
    pub(super) fn record_relay_start(&self) {
        let elapsed = self.summary.elapsed();
        self.metrics.record_response_start(elapsed, self.summary.overhead(elapsed));
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        let summary = &mut self.summary;
        write_event(summary);
        self.events.record_request(|| take_ended_request(summary));
        let (method, client) = (mem::take(&mut summary.method), summary.client.take());
        let labels = RequestLabels { method, route: summary.route, code: summary.status, client };
        self.metrics.record_request_end(&labels, summary.elapsed());
    }
}

/// Creates the event for listeners of the admin API. Moves the reasons of its retries out of the summary.
fn take_ended_request(summary: &mut RequestSummary) -> EndedRequest {
    EndedRequest {
        request_id: summary.request_id(),
        client: summary.client.clone(),
        short_key: summary.short_key().cloned(),
        method: summary.method.clone(),
        route: summary.route,
        status: summary.status,
        outcome: summary.verdict,
        attempts: summary.attempts,
        retry_reasons: mem::take(&mut summary.retry_reasons),
        credits: summary.credits,
        duration: summary.elapsed(),
        event_text: OnceLock::new(),
    }
}

/// Writes the log event. Its fields are in alphabetical order, as in every log event.
fn write_event(summary: &RequestSummary) {
    if !enabled!(Level::INFO) {
        return;
    }
    let (attempts, credits, key, verdict) =
        (summary.attempts, summary.credits, summary.key(), summary.verdict);
    let (method, total_ms) = (summary.method.as_str(), millis(summary.elapsed()));
    let route = OptionalField(summary.route);
    let retry_reasons = (!summary.retry_reasons.is_empty()).then(|| summary.retry_reasons.join(","));
    let user_agent = hide_tokens(summary.user_agent());
    let end = user_agent.char_indices().nth(MAX_USER_AGENT_CHARS).map_or(user_agent.len(), |(end, _)| end);
    info!(
        attempts,
        bytes = summary.bytes,
        client = summary.client.as_ref().map_or("-", ClientName::as_str),
        client_address = summary.client_address.map(tracing::field::display),
        credits,
        event = "request_ended",
        first_byte_ms = summary.first_byte.map_or(0, millis),
        key,
        method,
        parameters = summary.parameters,
        replay_lost = summary.replay_loss.map(|loss| loss.code()),
        request_id = &*summary.request_id(),
        retry_reasons = retry_reasons.as_deref(),
        route = %route,
        status = summary.status.unwrap_or(0),
        total_ms,
        upstream_host = summary.upstream_host.as_ref().map(|host| host.host()),
        user = summary.user.map(tracing::field::display),
        user_agent = &user_agent[..end],
        verdict,
        "{method} {route} {} {verdict} {key} {credits} credits, {attempts} attempts, {total_ms} ms",
        OptionalField(summary.status),
    );
}

/// A field of the log message, which is displayed as `-` if it is `None`.
struct OptionalField<T>(Option<T>);

impl<T: fmt::Display> fmt::Display for OptionalField<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(value) => value.fmt(f),
            None => f.write_str("-"),
        }
    }
}

/// Returns the whole milliseconds of `duration`.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
