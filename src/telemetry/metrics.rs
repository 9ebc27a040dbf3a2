//! The metrics of requests: handles, made and registered in one place with their names and helps. A request
//! updates them by a few relaxed atomic additions, without a lock, an allocation or text. `admin` adds what it
//! reads when a page is written.

mod exposition;
mod histogram;
mod table;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::Method;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Metric, Registry};

use crate::elevenlabs::endpoint::Route;
use crate::elevenlabs::socket::Dialect;
use crate::policy::client::ClientName;
use crate::policy::method::recorded;
use crate::policy::outcome::Outcome;
use crate::pool::Key;
pub use exposition::{Exposition, Samples};
use histogram::Histogram;
use table::MetricTable;

/// Bounds in seconds: from the provider's fastest pages to its longest speech.
const REQUEST_SECONDS: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// Bounds in seconds: from the overhead of a usual request to pauses before a retry.
const OVERHEAD_SECONDS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

/// Maximum series of `requests_total`, beside the one that counts all further sets of labels: a client that walks
/// through methods, paths and responses cannot make the page grow beyond that.
const REQUEST_SERIES_MAX: usize = 2_000;
/// Maximum keys with counters of their own, for reloads that bring other keys again and again.
const KEYS_MAX: usize = 10_000;

/// The label of everything that has none of its own.
const OTHER: &str = "other";
/// The label of keys that clients bring, as in the access log.
const OWN_KEY: &str = "own";

/// The metrics of requests; a clone shares them.
#[derive(Clone, Debug)]
pub struct Meters(Arc<Handles>);

#[derive(Debug)]
struct Handles {
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
    /// The method, as it is recorded.
    pub method: Method,
    /// The route, when the request got that far.
    pub route: Option<Route>,
    /// The status of the response, if there was one.
    pub code: Option<u16>,
    /// The client, when it was identified.
    pub client: Option<ClientName>,
}

/// Not a status: stands for all that are none.
const OTHER_CODE: u16 = 0;

impl RequestLabels {
    /// The labels with every value that is not of a fixed set replaced by `other`.
    fn bounded(&self) -> Self {
        Self {
            method: recorded(&self.method),
            route: self.route.filter(Route::is_documented),
            code: self.code.map(|code| if (100..600).contains(&code) { code } else { OTHER_CODE }),
            client: self.client.clone(),
        }
    }

    /// The labels of all requests beyond [`REQUEST_SERIES_MAX`].
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

/// The attempts with a key, by their outcomes.
#[derive(Debug)]
struct AttemptCounts {
    requests: [AtomicU64; Outcome::ALL.len()],
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
    begun: Gauge,
}

/// The usage that an attempt adds to the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttemptUsage {
    /// Bytes of body sent to the provider.
    pub request_bytes: u64,
    /// Bytes of body relayed to the client.
    pub response_bytes: u64,
    /// Characters of text converted to speech.
    pub characters: u64,
    /// Milliseconds of audio sent on WebSocket sessions to be transcribed.
    pub audio_ms: u64,
    /// Credits charged, as far as they are known.
    pub credits: u64,
    /// Whether the attempt may have been charged and the provider reported no price.
    pub is_unpriced: bool,
}

impl Default for Meters {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("keychoir");
        let requests = MetricTable::new(REQUEST_SERIES_MAX, RequestLabels::other());
        registry.register(
            "requests",
            "Requests that have ended, by method, route, status of the response and client",
            requests.family(MetricType::Counter, RequestLabels::encode),
        );
        let requests_in_flight =
            add(&mut registry, "requests_in_flight", "Requests under way, to the ends of their responses");
        let mut times = |name: &str, help: &str, bounds| {
            let histogram = Histogram::new(bounds);
            registry.register(name, help, histogram.clone());
            histogram
        };
        let request_duration = times(
            "request_duration_seconds",
            "From the head of a request to the end of its response; WebSocket sessions are left out",
            REQUEST_SECONDS,
        );
        let request_time_to_first_byte = times(
            "request_time_to_first_byte_seconds",
            "From the head of a request to the head of the relayed response, with all attempts and waits",
            REQUEST_SECONDS,
        );
        let proxy_overhead = times(
            "proxy_overhead_seconds",
            "The part of request_time_to_first_byte_seconds in which no attempt was under way and the request \
             waited neither for the client's body nor for a key: Keychoir's own work, and pauses before retries",
            OVERHEAD_SECONDS,
        );
        let upstream_time_to_first_byte = times(
            "upstream_time_to_first_byte_seconds",
            "From the begin of an attempt, with connecting and uploading, to the head of the provider's response",
            REQUEST_SECONDS,
        );
        let attempts: MetricTable<Arc<str>, Arc<AttemptCounts>> = MetricTable::new(KEYS_MAX, OTHER.into());
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
        // A session is rare: its counters are there from the start, so that their first increase is seen.
        Dialect::ALL.iter().for_each(|dialect| sessions.update(dialect.word(), || dialect.word(), |_| {}));
        registry.register(
            "websocket_sessions",
            "WebSocket sessions that are open, by protocol",
            sessions.family(MetricType::Gauge, |protocol, counts, encoder| {
                counts.open.encode(encoder.encode_family(&[("protocol", *protocol)])?)
            }),
        );
        // OpenMetrics names the family of a counter without `_total`, which would be the gauge's name: two
        // families of one name are no valid page. So it has no type.
        registry.register(
            "websocket_sessions_total",
            "WebSocket sessions that have begun, by protocol",
            sessions.family(MetricType::Unknown, |protocol, counts, encoder| {
                counts.begun.encode(encoder.encode_family(&[("protocol", *protocol)])?)
            }),
        );
        let bytes: Family<[(&str, &str); 1], Counter> =
            add(&mut registry, "body_bytes", "Bytes of bodies sent to the provider and relayed to clients");
        Self(Arc::new(Handles {
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
            characters: add(&mut registry, "characters", "Characters of text that were spoken"),
            credits: add(&mut registry, "credits", "Credits charged, as far as the provider reported them"),
            unpriced: add(
                &mut registry,
                "upstream_requests_unpriced",
                "Attempts that may have been charged and whose price the provider did not report",
            ),
            audio_seconds: add(
                &mut registry,
                "audio_seconds",
                "Seconds of audio that were sent on WebSocket sessions to be transcribed",
            ),
            registry,
        }))
    }
}

fn add<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

impl Meters {
    /// The registry of these metrics.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Counts a request that has begun.
    pub fn request_begun(&self) {
        self.0.requests_in_flight.inc();
    }

    /// Counts a request that has ended, and took this time.
    pub fn request_ended(&self, labels: &RequestLabels, took: Duration) {
        const SWITCHED: u16 = 101;
        self.0.requests_in_flight.dec();
        // A WebSocket session lasts as long as its client wants.
        if labels.code != Some(SWITCHED) {
            self.0.request_duration.observe(took);
        }
        self.0.requests.update(labels, || labels.bounded(), |count| _ = count.inc());
    }

    /// Records the time from the request head to the relay of the provider's response head, and the part of it
    /// that was the proxy's own.
    pub fn relaying(&self, first_byte: Duration, overhead: Duration) {
        self.0.request_time_to_first_byte.observe(first_byte);
        self.0.proxy_overhead.observe(overhead);
    }

    /// Records the time from the begin of an attempt to the head of the provider's response.
    pub fn first_byte(&self, elapsed: Duration) {
        self.0.upstream_time_to_first_byte.observe(elapsed);
    }

    /// Counts an attempt that ended with this outcome; without a key of the pool, the client has brought one.
    pub fn attempt_ended(&self, key: Option<&Key>, outcome: Outcome, spent: AttemptUsage) {
        self.of_key(key, |counts| add_one(&counts.requests, outcome));
        let AttemptUsage { request_bytes, response_bytes, characters, audio_ms, credits, is_unpriced } =
            spent;
        for (sum, amount) in [
            (&self.0.request_bytes, request_bytes),
            (&self.0.response_bytes, response_bytes),
            (&self.0.characters, characters),
            (&self.0.credits, credits),
            (&self.0.unpriced, u64::from(is_unpriced)),
        ] {
            if amount > 0 {
                sum.inc_by(amount);
            }
        }
        if audio_ms > 0 {
            self.0.audio_seconds.inc_by(Duration::from_millis(audio_ms).as_secs_f64());
        }
    }

    /// Adds the credits of an attempt whose price was reported after its end.
    pub fn priced(&self, credits: u64) {
        self.0.credits.inc_by(credits);
    }

    /// Counts an attempt with this outcome that was followed by another one.
    pub fn upstream_retry(&self, key: Option<&Key>, outcome: Outcome) {
        self.of_key(key, |counts| add_one(&counts.retries, outcome));
    }

    fn of_key(&self, key: Option<&Key>, update: impl FnOnce(&AttemptCounts)) {
        let label = key.map_or(OWN_KEY, key_label);
        self.0.attempts.update(label, || label.into(), |counts| update(counts));
    }

    /// Counts a WebSocket session of this dialect; it counts as open until the guard is dropped.
    #[must_use]
    pub fn socket_opened(&self, dialect: Dialect) -> SocketOpen {
        let mut open = Gauge::default();
        let begin = |counts: &SessionCounts| {
            counts.begun.inc();
            open = counts.open.clone();
        };
        self.0.sessions.update(dialect.word(), || dialect.word(), begin);
        open.inc();
        SocketOpen(open)
    }
}

/// An open WebSocket session, until it is dropped.
#[derive(Debug)]
pub struct SocketOpen(Gauge);

impl Drop for SocketOpen {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// The label of a key: its name, or its short form.
#[must_use]
pub fn key_label(key: &Key) -> &str {
    key.name().unwrap_or(key.api_key().short().as_str())
}

fn add_one(counts: &[AtomicU64; Outcome::ALL.len()], outcome: Outcome) {
    if let Some(count) = counts.get(outcome as usize) {
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// The outcomes that there were: all of them for each key would be tens of samples for each.
fn encode_outcomes(
    encoder: &mut MetricEncoder<'_>,
    key: &str,
    name: &'static str,
    counts: &[AtomicU64; Outcome::ALL.len()],
) -> fmt::Result {
    for (outcome, count) in Outcome::ALL.iter().zip(counts) {
        let count = count.load(Ordering::Relaxed);
        if count > 0 {
            let labels = [("key", key), (name, outcome.word())];
            encoder.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&count, None)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_has(meters: &Meters, lines: &[&str]) {
        let text = Exposition::OpenMetrics.page(&[meters.registry()]);
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "{line} is not in\n{text}");
        }
    }

    fn labels(method: &str, path: &str, code: Option<u16>, client: Option<&str>) -> RequestLabels {
        RequestLabels {
            method: method.parse().unwrap(),
            route: Some(Route::read(path)),
            code,
            client: client.map(ClientName::new),
        }
    }

    #[test]
    fn requests_are_counted_by_their_labels_when_they_end() {
        let meters = Meters::default();
        (0..6).for_each(|_| meters.request_begun());
        assert_has(&meters, &["keychoir_requests_in_flight 6"]);
        for labels in [
            labels("GET", "/v1/voices/x", Some(200), Some("app")),
            labels("GET", "/v1/voices/y", Some(200), Some("app")),
            labels("BREW", "/v1/voices/voices", Some(999), Some("app")),
            labels("GET", "/v1/convai/conversation", Some(101), Some("app")),
            RequestLabels { route: None, ..labels("POST", "/", None, None) },
        ] {
            meters.request_ended(&labels, Duration::from_secs(1));
        }
        let line = |labels: &str, count| format!("keychoir_requests_total{{{labels}}} {count}");
        assert_has(
            &meters,
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
    fn a_walk_through_paths_methods_and_statuses_makes_no_more_series_than_the_maximum() {
        let meters = Meters::default();
        let words = ["voices", "models", "user", "history", "music", "text", "tools", "usage", "v2", "x"];
        let mut count = 0;
        for (number, first) in words.iter().enumerate() {
            for (second, third) in words.iter().flat_map(|one| words.map(|other| (one, other))) {
                for code in [200, 404, 300 + number as u16] {
                    for method in ["GET", "DELETE", "BREW", &format!("M{count}")] {
                        let path = format!("/v1/{first}/{second}/{third}");
                        meters.request_ended(&labels(method, &path, Some(code), Some("app")), Duration::ZERO);
                        count += 1;
                    }
                }
            }
        }
        let series = |meters: &Meters| {
            let text = Exposition::OpenMetrics.page(&[meters.registry()]);
            let lines = text.lines().filter(|line| line.starts_with("keychoir_requests_total{"));
            lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap()).collect::<Vec<_>>()
        };
        let walked = series(&meters);
        assert!(walked.len() < 200 && count > 10_000, "{} series of {count}", walked.len());
        // A provider of many clients fills the table.
        for number in 0..REQUEST_SERIES_MAX + 100 {
            let client = format!("client-{number}");
            meters.request_ended(&labels("GET", "/v1/user", Some(200), Some(&client)), Duration::ZERO);
            count += 1;
        }
        let full = series(&meters);
        assert_eq!((full.len(), full.iter().sum()), (REQUEST_SERIES_MAX + 1, count));
    }

    #[test]
    fn a_session_is_open_until_it_ends() {
        let meters = Meters::default();
        let [first, second] = [(); 2].map(|()| meters.socket_opened(Dialect::Agent));
        drop(first);
        assert_has(
            &meters,
            &[
                "keychoir_websocket_sessions_total{protocol=\"agent\"} 2",
                "keychoir_websocket_sessions{protocol=\"agent\"} 1",
                "keychoir_websocket_sessions{protocol=\"speech\"} 0",
            ],
        );
        drop(second);
        assert_has(&meters, &["keychoir_websocket_sessions{protocol=\"agent\"} 0"]);
    }

    #[test]
    fn every_outcome_has_a_counter_and_a_word_of_its_own() {
        let meters = Meters::default();
        let usage =
            AttemptUsage { credits: 7, audio_ms: 1_500, is_unpriced: true, ..AttemptUsage::default() };
        for outcome in Outcome::ALL {
            meters.attempt_ended(None, *outcome, usage);
            meters.upstream_retry(None, *outcome);
            let word = outcome.word();
            assert_has(
                &meters,
                &[
                    &format!("keychoir_upstream_requests_total{{key=\"own\",outcome=\"{word}\"}} 1"),
                    &format!("keychoir_upstream_retries_total{{key=\"own\",reason=\"{word}\"}} 1"),
                ],
            );
        }
        let count = Outcome::ALL.len();
        assert_has(
            &meters,
            &[
                &format!("keychoir_credits_total {}", 7 * count),
                &format!("keychoir_upstream_requests_unpriced_total {count}"),
                &format!("keychoir_audio_seconds_total {:.1}", 1.5 * count as f64),
            ],
        );
    }

    #[test]
    fn a_span_falls_into_the_bucket_of_its_bound_and_all_above() {
        let meters = Meters::default();
        for us in [10_000, 10_001, 301_000_000] {
            meters.relaying(Duration::from_micros(us), Duration::from_micros(us / 100));
        }
        meters.first_byte(Duration::from_millis(30));
        assert_has(
            &meters,
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
