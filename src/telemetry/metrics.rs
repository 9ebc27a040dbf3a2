//! Defines the metrics of requests, attempts and WebSocket sessions, with their names and help texts. A request updates
//! them by a few relaxed atomic additions, without a lock. Only a new label set needs an allocation. Metrics whose
//! values are read when they are scraped are in `admin`.

mod exposition;
mod histogram;
mod table;
mod totals;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{Method, StatusCode};
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::socket::Dialect;
use crate::policy::client::ClientName;
use crate::policy::method::recorded_method;
use crate::policy::outcome::Outcome;
use crate::pool::Key;
pub use exposition::{ExpositionFormat, GaugeSamples};
pub use histogram::Histogram;
use table::MetricTable;
pub use totals::{Percentiles, RequestTotals};

/// Upper bounds of the buckets of durations, in seconds: from the provider's fastest responses to its longest generated
/// speech.
const REQUEST_BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// Upper bounds of the buckets of the overhead, in seconds: from the overhead of a typical request to delays before a
/// retry.
const OVERHEAD_BUCKETS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

/// Maximum number of series of `requests_total`, plus one series that counts all other label sets. Without the limit,
/// clients could make the page grow by sending many different methods and paths.
const MAX_REQUEST_SERIES: usize = 2_000;
/// Maximum number of keys with separate counters. It bounds the memory when many reloads add new keys.
const MAX_KEYS: usize = 10_000;

/// The label value for all values without a separate label value.
const OTHER: &str = "other";
/// The label value for keys that clients bring, as in the access log.
const OWN_KEY_LABEL: &str = "own";

/// The metrics of requests, shared by all clones.
#[derive(Clone, Debug)]
pub struct RequestMetrics(Arc<Metrics>);

#[derive(Debug)]
struct Metrics {
    registry: Registry,
    requests: MetricTable<RequestLabels, Counter>,
    requests_in_flight: Gauge,
    request_duration: Histogram,
    request_time_to_first_byte: Histogram,
    proxy_overhead: Histogram,
    upstream_time_to_first_byte: Histogram,
    attempts: MetricTable<Arc<str>, Arc<AttemptCounts>>,
    sessions: MetricTable<&'static str, SessionCounts>,
    request_bytes: Counter,
    response_bytes: Counter,
    characters: Counter,
    credits: Counter,
    unpriced: Counter,
    audio_seconds: Counter<f64>,
}

/// The labels of `requests_total`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RequestLabels {
    /// The method of the request.
    pub method: Method,
    /// The route, if the path was parsed.
    pub route: Option<Route>,
    /// The status of the response, or `None` if there was no response.
    pub code: Option<u16>,
    /// The client, if it was identified.
    pub client: Option<ClientName>,
}

/// The status that represents all values that are not an HTTP status, and the statuses of all label sets above
/// [`MAX_REQUEST_SERIES`].
const OTHER_CODE: u16 = 0;

impl RequestLabels {
    /// Replaces an unusual method, an undocumented route and an invalid status by `other`. The client is kept.
    fn bounded(&self) -> Self {
        Self {
            method: recorded_method(&self.method),
            route: self.route.filter(Route::is_documented),
            code: self.code.map(|code| if (100..600).contains(&code) { code } else { OTHER_CODE }),
            client: self.client.clone(),
        }
    }

    /// Returns the labels of requests that would exceed [`MAX_REQUEST_SERIES`].
    fn other() -> Self {
        let method = Method::from_bytes(OTHER.as_bytes()).unwrap_or_default();
        Self { method, route: None, code: Some(OTHER_CODE), client: None }
    }

    fn encode(&self, count: &Counter, encoder: &mut MetricEncoder<'_>) -> fmt::Result {
        let route = self.route.map_or_else(|| OTHER.to_owned(), |route| route.to_string());
        let code = match self.code {
            None => "none".to_owned(),
            Some(OTHER_CODE) => OTHER.to_owned(),
            Some(code) => code.to_string(),
        };
        let client = self.client.as_ref().map_or(OTHER, ClientName::as_str);
        let labels =
            [("method", self.method.as_str()), ("route", &route), ("code", &code), ("client", client)];
        count.encode(encoder.encode_family(&labels)?)
    }
}

/// The numbers of attempts with a key, indexed by outcome.
#[derive(Debug)]
struct AttemptCounts {
    /// The attempts that have ended.
    requests: [AtomicU64; Outcome::ALL.len()],
    /// The attempts that were followed by another attempt.
    retries: [AtomicU64; Outcome::ALL.len()],
}

impl Default for AttemptCounts {
    fn default() -> Self {
        let [requests, retries] = [(); 2].map(|()| std::array::from_fn(|_| AtomicU64::new(0)));
        Self { requests, retries }
    }
}

/// The WebSocket sessions of a protocol.
#[derive(Clone, Debug, Default)]
struct SessionCounts {
    open: Gauge,
    started: Gauge,
}

/// The usage that an attempt adds to the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttemptUsage {
    /// Bytes of the request body sent to the provider.
    pub request_bytes: u64,
    /// Bytes of the response body relayed to the client.
    pub response_bytes: u64,
    /// Characters of text converted to speech.
    pub characters: u64,
    /// Milliseconds of audio sent on WebSocket sessions to be transcribed.
    pub audio_ms: u64,
    /// Credits charged, or their estimate, or 0 if both are unknown.
    pub credits: u64,
    /// Whether the attempt may have been charged and the provider reported no price.
    pub is_unpriced: bool,
}

impl Default for RequestMetrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("keychoir");
        let requests = MetricTable::new(MAX_REQUEST_SERIES, RequestLabels::other());
        registry.register(
            "requests",
            "Requests that have ended, by method, route, status of the response and client",
            requests.family(MetricType::Counter, RequestLabels::encode),
        );
        let requests_in_flight = add_metric(
            &mut registry,
            "requests_in_flight",
            "Requests under way, to the ends of their responses",
        );
        let mut add_histogram = |name: &str, help: &str, bounds| {
            let histogram = Histogram::new(bounds);
            registry.register(name, help, histogram.clone());
            histogram
        };
        let request_duration = add_histogram(
            "request_duration_seconds",
            "From the head of a request to the end of its response; WebSocket sessions are left out",
            REQUEST_BUCKETS,
        );
        let request_time_to_first_byte = add_histogram(
            "request_time_to_first_byte_seconds",
            "From the head of a request to the head of the relayed response, with all attempts and waits",
            REQUEST_BUCKETS,
        );
        let proxy_overhead = add_histogram(
            "proxy_overhead_seconds",
            "The part of request_time_to_first_byte_seconds in which no attempt was under way and the request \
             waited neither for the client's body nor for a key: Keychoir's own work, and pauses before retries",
            OVERHEAD_BUCKETS,
        );
        let upstream_time_to_first_byte = add_histogram(
            "upstream_time_to_first_byte_seconds",
            "From the start of an attempt, including connecting and uploading, to the head of the provider's response",
            REQUEST_BUCKETS,
        );
        let attempts: MetricTable<Arc<str>, Arc<AttemptCounts>> = MetricTable::new(MAX_KEYS, OTHER.into());
        registry.register(
            "upstream_requests",
            "Attempts at the provider that have ended, by key and outcome",
            attempts.family(MetricType::Counter, |key, counts, encoder| {
                encode_outcomes(encoder, key, "outcome", &counts.requests)
            }),
        );
        registry.register(
            "upstream_retries",
            "Attempts that were followed by another one, by key and outcome",
            attempts.family(MetricType::Counter, |key, counts, encoder| {
                encode_outcomes(encoder, key, "reason", &counts.retries)
            }),
        );
        let sessions: MetricTable<&'static str, SessionCounts> = MetricTable::new(Dialect::ALL.len(), OTHER);
        // Sessions are rare. Their counters exist from startup on, so that Prometheus sees the first
        // increase.
        Dialect::ALL
            .iter()
            .for_each(|dialect| sessions.update(dialect.as_str(), || dialect.as_str(), |_| {}));
        registry.register(
            "websocket_sessions",
            "WebSocket sessions that are open, by protocol",
            sessions.family(MetricType::Gauge, |protocol, counts, encoder| {
                counts.open.encode(encoder.encode_family(&[("protocol", *protocol)])?)
            }),
        );
        // As a counter, this family would be named without `_total` in OpenMetrics, which is the name of the
        // gauge above. A page with two families of one name is invalid, so this family has no type.
        registry.register(
            "websocket_sessions_total",
            "WebSocket sessions that have started, by protocol",
            sessions.family(MetricType::Unknown, |protocol, counts, encoder| {
                counts.started.encode(encoder.encode_family(&[("protocol", *protocol)])?)
            }),
        );
        let bytes: Family<[(&str, &str); 1], Counter> = add_metric(
            &mut registry,
            "body_bytes",
            "Bytes of bodies sent to the provider and relayed to clients",
        );
        Self(Arc::new(Metrics {
            requests,
            requests_in_flight,
            request_duration,
            request_time_to_first_byte,
            proxy_overhead,
            upstream_time_to_first_byte,
            attempts,
            sessions,
            request_bytes: bytes.get_or_create_owned(&[("direction", "request")]),
            response_bytes: bytes.get_or_create_owned(&[("direction", "response")]),
            characters: add_metric(&mut registry, "characters", "Characters of text that were spoken"),
            credits: add_metric(
                &mut registry,
                "credits",
                "Credits charged, as the provider reported them or else as estimated",
            ),
            unpriced: add_metric(
                &mut registry,
                "upstream_requests_unpriced",
                "Attempts that may have been charged and whose price the provider did not report",
            ),
            audio_seconds: add_metric(
                &mut registry,
                "audio_seconds",
                "Seconds of audio that were sent on WebSocket sessions to be transcribed",
            ),
            registry,
        }))
    }
}

/// Registers a new metric, and returns a handle that updates it.
fn add_metric<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

impl RequestMetrics {
    /// Returns the registry of these metrics.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Counts a request as in flight.
    pub fn record_request_start(&self) {
        self.0.requests_in_flight.inc();
    }

    /// Counts a request that ended after `duration`.
    pub fn record_request_end(&self, labels: &RequestLabels, duration: Duration) {
        self.0.requests_in_flight.dec();
        // The duration of a WebSocket session depends on the client.
        if labels.code != Some(StatusCode::SWITCHING_PROTOCOLS.as_u16()) {
            self.0.request_duration.observe(duration);
        }
        self.0.requests.update(labels, || labels.bounded(), |count| _ = count.inc());
    }

    /// Records the time from the request head to the relay of the provider's response head, and the part of
    /// it that Keychoir caused.
    pub fn record_response_start(&self, time_to_first_byte: Duration, overhead: Duration) {
        self.0.request_time_to_first_byte.observe(time_to_first_byte);
        self.0.proxy_overhead.observe(overhead);
    }

    /// Records the time from the start of an attempt to the head of the provider's response.
    pub fn record_upstream_response_head(&self, elapsed: Duration) {
        self.0.upstream_time_to_first_byte.observe(elapsed);
    }

    /// Counts an attempt that ended with the given `outcome`. `key` is `None` for an attempt with a client's own
    /// key.
    pub fn record_attempt(&self, key: Option<&Key>, outcome: Outcome, usage: AttemptUsage) {
        self.update_key(key, |counts| increment(&counts.requests, outcome));
        let AttemptUsage { request_bytes, response_bytes, characters, audio_ms, credits, is_unpriced } =
            usage;
        for (counter, amount) in [
            (&self.0.request_bytes, request_bytes),
            (&self.0.response_bytes, response_bytes),
            (&self.0.characters, characters),
            (&self.0.credits, credits),
            (&self.0.unpriced, u64::from(is_unpriced)),
        ] {
            if amount > 0 {
                counter.inc_by(amount);
            }
        }
        if audio_ms > 0 {
            self.0.audio_seconds.inc_by(Duration::from_millis(audio_ms).as_secs_f64());
        }
    }

    /// Adds the credits of an attempt whose price was reported after its end.
    pub fn record_late_price(&self, credits: u64) {
        self.0.credits.inc_by(credits);
    }

    /// Counts an attempt with the given `outcome` that was followed by another attempt.
    pub fn record_retry(&self, key: Option<&Key>, outcome: Outcome) {
        self.update_key(key, |counts| increment(&counts.retries, outcome));
    }

    fn update_key(&self, key: Option<&Key>, update: impl FnOnce(&AttemptCounts)) {
        let label = key.map_or(OWN_KEY_LABEL, key_label);
        self.0.attempts.update(label, || label.into(), |counts| update(counts));
    }

    /// Counts a WebSocket session of `dialect`. It counts as open until the returned guard is dropped.
    #[must_use]
    pub fn open_session(&self, dialect: Dialect) -> OpenSession {
        let mut open = Gauge::default();
        let count_start = |counts: &SessionCounts| {
            counts.started.inc();
            open = counts.open.clone();
        };
        self.0.sessions.update(dialect.as_str(), || dialect.as_str(), count_start);
        open.inc();
        OpenSession(open)
    }
}

/// Counts a WebSocket session as open until it is dropped.
#[derive(Debug)]
pub struct OpenSession(Gauge);

impl Drop for OpenSession {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Returns the label of a key in metrics: its name, or its short form if it has no name.
#[must_use]
pub fn key_label(key: &Key) -> &str {
    key.name().unwrap_or(key.api_key().short().as_str())
}

fn increment(counts: &[AtomicU64; Outcome::ALL.len()], outcome: Outcome) {
    if let Some(count) = counts.get(outcome as usize) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Encodes only the outcomes that have occurred, because the page would otherwise have tens of samples per key.
fn encode_outcomes(
    encoder: &mut MetricEncoder<'_>,
    key: &str,
    outcome_label: &'static str,
    counts: &[AtomicU64; Outcome::ALL.len()],
) -> fmt::Result {
    for (outcome, count) in Outcome::ALL.iter().zip(counts) {
        let count = count.load(Ordering::Relaxed);
        if count > 0 {
            let labels = [("key", key), (outcome_label, outcome.as_str())];
            encoder.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_contains_lines(metrics: &RequestMetrics, lines: &[&str]) {
        let page = ExpositionFormat::OpenMetrics.write_page(&[metrics.registry()]);
        for line in lines {
            assert!(
                page.lines().any(|actual| actual == *line),
                "the page must contain the line {line}:\n{page}"
            );
        }
    }

    fn labels(method: &str, path: &str, code: Option<u16>, client: Option<&str>) -> RequestLabels {
        RequestLabels {
            method: method.parse().unwrap(),
            route: Some(Route::parse(path)),
            code,
            client: client.map(ClientName::new),
        }
    }

    #[test]
    fn requests_are_counted_by_their_labels_when_they_end() {
        let metrics = RequestMetrics::default();
        (0..6).for_each(|_| metrics.record_request_start());
        assert_contains_lines(&metrics, &["keychoir_requests_in_flight 6"]);
        for labels in [
            labels("GET", "/v1/voices/x", Some(200), Some("app")),
            labels("GET", "/v1/voices/y", Some(200), Some("app")),
            labels("BREW", "/v1/voices/voices", Some(999), Some("app")),
            labels("GET", "/v1/convai/conversation", Some(101), Some("app")),
            RequestLabels { route: None, ..labels("POST", "/", None, None) },
        ] {
            metrics.record_request_end(&labels, Duration::from_secs(1));
        }
        let line = |labels: &str, count| format!("keychoir_requests_total{{{labels}}} {count}");
        assert_contains_lines(
            &metrics,
            &[
                "keychoir_requests_in_flight 1",
                &line(r#"method="GET",route="/v1/voices/{id}",code="200",client="app""#, 2),
                &line(r#"method="other",route="other",code="other",client="app""#, 1),
                &line(r#"method="GET",route="/v1/convai/conversation",code="101",client="app""#, 1),
                &line(r#"method="POST",route="other",code="none",client="other""#, 1),
                "keychoir_request_duration_seconds_count 4",
            ],
        );
    }

    #[test]
    fn the_number_of_series_is_bounded() {
        let metrics = RequestMetrics::default();
        let segments = ["voices", "models", "user", "history", "music", "text", "tools", "usage", "v2", "x"];
        let mut count = 0;
        for (number, first) in segments.iter().enumerate() {
            for (second, third) in segments.iter().flat_map(|second| segments.map(|third| (second, third))) {
                for code in [200, 404, 300 + number as u16] {
                    for method in ["GET", "DELETE", "BREW", &format!("M{count}")] {
                        let path = format!("/v1/{first}/{second}/{third}");
                        metrics.record_request_end(
                            &labels(method, &path, Some(code), Some("app")),
                            Duration::ZERO,
                        );
                        count += 1;
                    }
                }
            }
        }
        let series = |metrics: &RequestMetrics| {
            let page = ExpositionFormat::OpenMetrics.write_page(&[metrics.registry()]);
            let lines = page.lines().filter(|line| line.starts_with("keychoir_requests_total{"));
            lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).collect::<Vec<_>>()
        };
        let counts = series(&metrics);
        assert!(
            counts.len() < 200 && count > 10_000,
            "{count} requests must have fewer than 200 series, not {}",
            counts.len()
        );
        // Many client names fill the table.
        for number in 0..MAX_REQUEST_SERIES + 100 {
            let client = format!("client-{number}");
            metrics.record_request_end(&labels("GET", "/v1/user", Some(200), Some(&client)), Duration::ZERO);
            count += 1;
        }
        let counts = series(&metrics);
        assert_eq!((counts.len(), counts.iter().sum()), (MAX_REQUEST_SERIES + 1, count));
    }

    #[test]
    fn a_session_is_open_until_it_ends() {
        let metrics = RequestMetrics::default();
        let [first, second] = [(); 2].map(|()| metrics.open_session(Dialect::Agent));
        drop(first);
        assert_contains_lines(
            &metrics,
            &[
                "keychoir_websocket_sessions_total{protocol=\"agent\"} 2",
                "keychoir_websocket_sessions{protocol=\"agent\"} 1",
                "keychoir_websocket_sessions{protocol=\"speech\"} 0",
            ],
        );
        drop(second);
        assert_contains_lines(&metrics, &["keychoir_websocket_sessions{protocol=\"agent\"} 0"]);
    }

    #[test]
    fn every_outcome_has_a_separate_counter_and_label() {
        let metrics = RequestMetrics::default();
        let usage =
            AttemptUsage { credits: 7, audio_ms: 1_500, is_unpriced: true, ..AttemptUsage::default() };
        for outcome in Outcome::ALL {
            metrics.record_attempt(None, *outcome, usage);
            metrics.record_retry(None, *outcome);
            let label = outcome.as_str();
            assert_contains_lines(
                &metrics,
                &[
                    &format!("keychoir_upstream_requests_total{{key=\"own\",outcome=\"{label}\"}} 1"),
                    &format!("keychoir_upstream_retries_total{{key=\"own\",reason=\"{label}\"}} 1"),
                ],
            );
        }
        let count = Outcome::ALL.len();
        assert_contains_lines(
            &metrics,
            &[
                &format!("keychoir_credits_total {}", 7 * count),
                &format!("keychoir_upstream_requests_unpriced_total {count}"),
                &format!("keychoir_audio_seconds_total {:.1}", 1.5 * count as f64),
            ],
        );
    }

    #[test]
    fn a_duration_is_counted_in_its_bucket_and_all_larger_ones() {
        let metrics = RequestMetrics::default();
        for micros in [10_000, 10_001, 301_000_000] {
            metrics.record_response_start(Duration::from_micros(micros), Duration::from_micros(micros / 100));
        }
        metrics.record_upstream_response_head(Duration::from_millis(30));
        assert_contains_lines(
            &metrics,
            &[
                "keychoir_request_time_to_first_byte_seconds_bucket{le=\"0.01\"} 1",
                "keychoir_request_time_to_first_byte_seconds_bucket{le=\"0.025\"} 2",
                "keychoir_request_time_to_first_byte_seconds_bucket{le=\"300.0\"} 2",
                "keychoir_request_time_to_first_byte_seconds_bucket{le=\"+Inf\"} 3",
                "keychoir_request_time_to_first_byte_seconds_count 3",
                "keychoir_request_time_to_first_byte_seconds_sum 301.020001",
                "keychoir_proxy_overhead_seconds_bucket{le=\"0.0001\"} 2",
                "keychoir_proxy_overhead_seconds_bucket{le=\"5.0\"} 3",
                "keychoir_upstream_time_to_first_byte_seconds_bucket{le=\"0.05\"} 1",
            ],
        );
    }
}
