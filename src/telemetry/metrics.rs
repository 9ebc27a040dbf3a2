//! Counters that are updated while requests pass: a few relaxed atomic additions each, without locks or text.
//! This module defines the metric families and their names; `exposition` formats them, and `admin` adds the
//! metrics that it reads elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::exposition::{Kind, Page};
use super::log;
use crate::elevenlabs::socket::Dialect;

/// The outcomes of an attempt, in the words of the usage records, and whether another attempt may follow.
const OUTCOMES: [(&str, bool); 34] = [
    ("served", false),
    ("workspace_quota", true),
    ("key_quota", true),
    ("invalid_key", true),
    ("missing_permission", true),
    ("plan_feature", true),
    ("slots", true),
    ("wrong_host", true),
    ("too_many_requests", true),
    ("billing", true),
    ("abuse", true),
    ("rate_limited", true),
    ("concurrency", true),
    ("busy", true),
    ("unauthorized", true),
    ("payment_required", true),
    ("forbidden", true),
    ("unexplained", true),
    ("not_found", true),
    ("request_error", false),
    ("server_error", true),
    ("unreadable", false),
    ("connect_failed", true),
    ("no_response", true),
    ("upstream_reset", true),
    ("client_closed", false),
    ("shutdown", false),
    ("idle", false),
    ("max_duration", false),
    ("client_quota_exceeded", false),
    ("protocol_error", false),
    ("message_too_large", false),
    ("upstream_protocol_error", true),
    (OTHER, true),
];

/// The label of all outcomes that the list does not contain.
const OTHER: &str = "other";

/// Classes of responses, by the first digit of the status; `none` for requests whose client disconnected
/// first.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

/// The protocols of WebSocket sessions, in the words of the policy.
const SOCKETS: [&str; Dialect::ALL.len()] = {
    let mut words = [""; Dialect::ALL.len()];
    let mut at = 0;
    while at < words.len() {
        words[at] = Dialect::ALL[at].word();
        at += 1;
    }
    words
};

/// Bounds in microseconds: from the provider's fastest pages to its longest speech.
const FIRST_BYTE_US: [u64; 14] = [
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    30_000_000,
    60_000_000,
    120_000_000,
    300_000_000,
];

/// Bounds in microseconds: from the overhead of a usual request to pauses before a retry.
const OVERHEAD_US: [u64; 13] =
    [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000, 5_000_000];

/// The counters of the program; a clone shares them.
#[derive(Clone, Debug, Default)]
pub struct Meters(Arc<Cells>);

#[derive(Debug, Default)]
struct Cells {
    requests: [AtomicU64; CLASSES.len()],
    in_flight: AtomicU64,
    attempts: PerOutcome,
    failovers: PerOutcome,
    request_bytes: AtomicU64,
    response_bytes: AtomicU64,
    characters: AtomicU64,
    credits: AtomicU64,
    unpriced: AtomicU64,
    audio_ms: AtomicU64,
    sockets: [AtomicU64; SOCKETS.len()],
    sockets_open: [AtomicU64; SOCKETS.len()],
    first_byte: Histogram<{ FIRST_BYTE_US.len() }>,
    overhead: Histogram<{ OVERHEAD_US.len() }>,
}

/// A counter for each outcome. The standard library has `Default` for arrays up to 32 elements only.
#[derive(Debug)]
struct PerOutcome([AtomicU64; OUTCOMES.len()]);

impl Default for PerOutcome {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::default()))
    }
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

impl Meters {
    /// Counts a request that has begun.
    pub fn request_begun(&self) {
        add(&self.0.in_flight, 1);
    }

    /// Counts a request that has ended; `status` is the status of its response, if it had one.
    pub fn request_ended(&self, status: Option<u16>) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        let class = status.map_or(0, |status| usize::from(status / 100));
        if let Some(count) = self.0.requests.get(class).or(self.0.requests.last()) {
            add(count, 1);
        }
    }

    /// Records the time from the request head to the relay of the provider's response head, of which
    /// `upstream` was spent waiting for the provider.
    pub fn relayed(&self, first_byte: Duration, upstream: Duration) {
        self.0.first_byte.observe(&FIRST_BYTE_US, first_byte);
        self.0.overhead.observe(&OVERHEAD_US, first_byte.saturating_sub(upstream));
    }

    /// Counts an attempt that ended with this outcome.
    pub fn attempt_ended(&self, outcome: &str, spent: AttemptUsage) {
        count(&self.0.attempts.0, outcome);
        let AttemptUsage { request_bytes, response_bytes, characters, audio_ms, credits, is_unpriced } =
            spent;
        for (sum, amount) in [
            (&self.0.request_bytes, request_bytes),
            (&self.0.response_bytes, response_bytes),
            (&self.0.characters, characters),
            (&self.0.audio_ms, audio_ms),
            (&self.0.credits, credits),
            (&self.0.unpriced, u64::from(is_unpriced)),
        ] {
            if amount > 0 {
                add(sum, amount);
            }
        }
    }

    /// Adds the credits of an attempt whose price was reported after its end.
    pub fn priced(&self, credits: u64) {
        add(&self.0.credits, credits);
    }

    /// Counts an attempt with this outcome that was followed by another one.
    pub fn failed_over(&self, outcome: &str) {
        count(&self.0.failovers.0, outcome);
    }

    /// Counts a WebSocket session of this dialect; it counts as open until the guard is dropped.
    #[must_use]
    pub fn socket_opened(&self, dialect: Dialect) -> SocketOpen {
        let index = Dialect::ALL.iter().position(|known| *known == dialect).unwrap_or_default();
        for cells in [&self.0.sockets, &self.0.sockets_open] {
            cells.get(index).inspect(|cell| add(cell, 1));
        }
        SocketOpen { meters: self.clone(), index }
    }

    /// Writes all counters to `page`.
    pub fn write(&self, page: &mut Page) {
        let cells = &*self.0;
        page.family(
            "requests_total",
            Kind::Counter,
            "Requests that have ended, by the class of their answer.",
        );
        for (class, cell) in CLASSES.iter().zip(&cells.requests) {
            page.sample(&[("class", class)], load(cell));
        }
        page.family("requests_in_flight", Kind::Gauge, "Requests under way, to the ends of their answers.");
        page.sample(&[], load(&cells.in_flight));
        page.family("attempts_total", Kind::Counter, "Attempts that have ended, by what became of them.");
        for ((outcome, _), cell) in OUTCOMES.iter().zip(&cells.attempts.0) {
            page.sample(&[("outcome", outcome)], load(cell));
        }
        page.family(
            "failovers_total",
            Kind::Counter,
            "Attempts that were followed by another, by what became of them.",
        );
        for ((outcome, _), cell) in OUTCOMES.iter().zip(&cells.failovers.0).filter(|((_, may), _)| *may) {
            page.sample(&[("reason", outcome)], load(cell));
        }
        page.family(
            "body_bytes_total",
            Kind::Counter,
            "Bytes of bodies, sent to the provider and relayed back.",
        );
        page.sample(&[("direction", "request")], load(&cells.request_bytes));
        page.sample(&[("direction", "response")], load(&cells.response_bytes));
        for (name, help, cell) in [
            ("characters_total", "Characters of text that were spoken.", &cells.characters),
            ("credits_total", "Credits charged, as far as the provider told.", &cells.credits),
            (
                "unpriced_attempts_total",
                "Attempts that may have been charged, without a reported cost.",
                &cells.unpriced,
            ),
        ] {
            page.family(name, Kind::Counter, help);
            page.sample(&[], load(cell));
        }
        page.family(
            "audio_seconds_total",
            Kind::Counter,
            "Seconds of sound that were sent on sockets to be written down.",
        );
        page.sample(&[], seconds(load(&cells.audio_ms).saturating_mul(1_000)));
        page.family("sockets_total", Kind::Counter, "Sessions that have begun, by what is spoken.");
        for (socket, cell) in SOCKETS.iter().zip(&cells.sockets) {
            page.sample(&[("socket", socket)], load(cell));
        }
        page.family("sockets", Kind::Gauge, "Sessions open now, by what is spoken.");
        for (socket, cell) in SOCKETS.iter().zip(&cells.sockets_open) {
            page.sample(&[("socket", socket)], load(cell));
        }
        page.family(
            "first_byte_seconds",
            Kind::Histogram,
            "From the head of a request to the head of the provider's answer, all attempts and uploads in it.",
        );
        cells.first_byte.write(&FIRST_BYTE_US, page);
        page.family(
            "overhead_seconds",
            Kind::Histogram,
            "What of that was spent in Keychoir and not with the provider.",
        );
        cells.overhead.write(&OVERHEAD_US, page);
        page.family("log_lines_dropped_total", Kind::Counter, "Log lines that could not be written in time.");
        page.sample(&[], log::dropped());
    }
}

/// An open WebSocket session, until it is dropped.
#[derive(Debug)]
pub struct SocketOpen {
    meters: Meters,
    index: usize,
}

impl Drop for SocketOpen {
    fn drop(&mut self) {
        if let Some(open) = self.meters.0.sockets_open.get(self.index) {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn count(cells: &[AtomicU64; OUTCOMES.len()], outcome: &str) {
    let known = OUTCOMES.iter().position(|(word, _)| *word == outcome);
    if let Some(cell) = known.and_then(|index| cells.get(index)).or(cells.last()) {
        add(cell, 1);
    }
}

// Relaxed: the counters are independent of each other.
fn add(cell: &AtomicU64, amount: u64) {
    cell.fetch_add(amount, Ordering::Relaxed);
}

fn load(cell: &AtomicU64) -> u64 {
    cell.load(Ordering::Relaxed)
}

/// Counts durations: one cell for each bound, and one for durations beyond the last bound.
#[derive(Debug)]
struct Histogram<const N: usize> {
    buckets: [AtomicU64; N],
    beyond: AtomicU64,
    sum_us: AtomicU64,
}

impl<const N: usize> Default for Histogram<N> {
    fn default() -> Self {
        Self {
            buckets: std::array::from_fn(|_| AtomicU64::new(0)),
            beyond: AtomicU64::new(0),
            sum_us: AtomicU64::new(0),
        }
    }
}

impl<const N: usize> Histogram<N> {
    fn observe(&self, bounds_us: &[u64; N], span: Duration) {
        let us = u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        let fits = bounds_us.iter().zip(&self.buckets).find(|(bound, _)| us <= **bound);
        add(fits.map_or(&self.beyond, |(_, bucket)| bucket), 1);
        add(&self.sum_us, us);
    }

    fn write(&self, bounds_us: &[u64; N], page: &mut Page) {
        let mut count = 0;
        let mut buckets = Vec::with_capacity(N);
        for (bound, bucket) in bounds_us.iter().zip(&self.buckets) {
            count += load(bucket);
            buckets.push((seconds(*bound), count));
        }
        count += load(&self.beyond);
        page.histogram(&buckets, seconds(load(&self.sum_us)), count);
    }
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people; exact for centuries")]
fn seconds(us: u64) -> f64 {
    us as f64 / 1_000_000.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::verdict::{Refusal, Shortfall, Subject, Verdict};

    #[test]
    fn every_verdict_is_listed() {
        let verdicts = [
            Verdict::Served,
            Verdict::WorkspaceQuota(Shortfall::default()),
            Verdict::KeyQuota(Shortfall::default()),
            Verdict::InvalidKey,
            Verdict::MissingPermission(None),
            Verdict::Abuse,
            Verdict::PlanFeature(Subject::Voice),
            Verdict::Slots,
            Verdict::WrongHost,
            Verdict::Unexplained(Refusal::TooMany(None)),
            Verdict::Billing,
            Verdict::RateLimited(None),
            Verdict::Concurrency { maximum: None },
            Verdict::Busy,
            Verdict::Unexplained(Refusal::Unauthorized),
            Verdict::Unexplained(Refusal::PaymentRequired),
            Verdict::Unexplained(Refusal::Forbidden),
            Verdict::Unexplained(Refusal::Bodiless),
            Verdict::NotFound,
            Verdict::RequestError,
            Verdict::ServerError,
            Verdict::Unreadable,
        ];
        for verdict in verdicts {
            assert!(OUTCOMES.iter().any(|(word, _)| *word == verdict.word()), "{}", verdict.word());
        }
    }

    fn text(meters: &Meters) -> String {
        let mut page = Page::default();
        meters.write(&mut page);
        page.text()
    }

    #[track_caller]
    fn assert_has(meters: &Meters, lines: &[&str]) {
        let text = text(meters);
        for line in lines {
            assert!(text.lines().any(|found| found == *line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn requests_are_counted_by_class_when_they_end() {
        let meters = Meters::default();
        (0..4).for_each(|_| meters.request_begun());
        assert_has(&meters, &["keychoir_requests_in_flight 4", "keychoir_requests_total{class=\"2xx\"} 0"]);
        [Some(200), Some(429), None].into_iter().for_each(|status| meters.request_ended(status));
        assert_has(
            &meters,
            &[
                "keychoir_requests_in_flight 1",
                "keychoir_requests_total{class=\"2xx\"} 1",
                "keychoir_requests_total{class=\"4xx\"} 1",
                "keychoir_requests_total{class=\"none\"} 1",
            ],
        );
        meters.request_ended(Some(999));
        assert_has(&meters, &["keychoir_requests_total{class=\"5xx\"} 1"]);
    }

    #[test]
    fn a_session_is_open_until_it_ends() {
        let meters = Meters::default();
        let [first, second] = [(); 2].map(|()| meters.socket_opened(Dialect::Agent));
        drop(first);
        assert_has(
            &meters,
            &[
                "keychoir_sockets_total{socket=\"agent\"} 2",
                "keychoir_sockets{socket=\"agent\"} 1",
                "keychoir_sockets{socket=\"speech\"} 0",
            ],
        );
        drop(second);
        assert_has(&meters, &["keychoir_sockets{socket=\"agent\"} 0"]);
    }

    #[test]
    fn an_outcome_that_is_not_listed_is_counted_as_other() {
        let meters = Meters::default();
        meters.attempt_ended("served", AttemptUsage { credits: 7, ..AttemptUsage::default() });
        meters.attempt_ended("something new", AttemptUsage { is_unpriced: true, ..AttemptUsage::default() });
        meters.failed_over("key_quota");
        assert_has(
            &meters,
            &[
                "keychoir_attempts_total{outcome=\"served\"} 1",
                "keychoir_attempts_total{outcome=\"other\"} 1",
                "keychoir_failovers_total{reason=\"key_quota\"} 1",
                "keychoir_credits_total 7",
                "keychoir_unpriced_attempts_total 1",
            ],
        );
    }

    #[test]
    fn a_span_falls_into_the_bucket_of_its_bound_and_all_above() {
        let meters = Meters::default();
        meters.relayed(Duration::from_micros(10_000), Duration::from_micros(9_900));
        meters.relayed(Duration::from_micros(10_001), Duration::from_micros(20_000));
        meters.relayed(Duration::from_secs(301), Duration::ZERO);
        assert_has(
            &meters,
            &[
                "keychoir_first_byte_seconds_bucket{le=\"0.01\"} 1",
                "keychoir_first_byte_seconds_bucket{le=\"0.025\"} 2",
                "keychoir_first_byte_seconds_bucket{le=\"300\"} 2",
                "keychoir_first_byte_seconds_bucket{le=\"+Inf\"} 3",
                "keychoir_first_byte_seconds_count 3",
                "keychoir_first_byte_seconds_sum 301.020001",
                "keychoir_overhead_seconds_bucket{le=\"0.0001\"} 2",
                "keychoir_overhead_seconds_bucket{le=\"5\"} 2",
                "keychoir_overhead_seconds_count 3",
            ],
        );
    }
}
