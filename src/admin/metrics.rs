//! `GET /metrics`: the counters of the proxy, and the state of the keys, the usage store and the
//! connections at the time of the request.

use std::time::Duration;

use crate::mirror::{self, State};
use crate::policy::key_state::KeyStatus;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::proxy::BufferBudget;
use crate::server::ConnectionLimiter;
use crate::store;
use crate::telemetry::{Kind, Meters, Page};

/// The state that is exported.
pub(super) struct Sources<'a> {
    pub(super) meters: &'a Meters,
    pub(super) keys: &'a [KeySnapshot],
    pub(super) waiting: usize,
    pub(super) books: &'a store::Health,
    pub(super) mirror: Option<&'a mirror::Health>,
    pub(super) connections: &'a ConnectionLimiter,
    pub(super) buffers: &'a BufferBudget,
    pub(super) started_at: UnixMs,
}

const STATUSES: [KeyStatus; 4] =
    [KeyStatus::Active, KeyStatus::Exhausted, KeyStatus::RateLimited, KeyStatus::Invalid];

/// Digits of a key's fingerprint in labels: enough to distinguish keys with equal short forms.
const HASH_DIGITS: usize = 12;

/// The page. Its labels are fixed words, short forms of keys, their names and parts of their
/// fingerprints: their number is bounded by the keys, and no label contains input of a client.
pub(super) fn page(sources: &Sources<'_>, now: UnixMs) -> String {
    let mut page = Page::default();
    page.family("build_info", Kind::Gauge, "Always 1; its label says which version runs.");
    page.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.family("start_time_seconds", Kind::Gauge, "When it was started, in seconds since 1970.");
    page.sample(&[], seconds(Duration::from_millis(sources.started_at.0)));
    sources.meters.write(&mut page);
    connections(&mut page, sources.connections);
    buffers(&mut page, sources.buffers);
    page.family("requests_waiting", Kind::Gauge, "Requests that wait for a key that has room.");
    page.sample(&[], sources.waiting);
    keys(&mut page, sources.keys);
    books(&mut page, sources.books, now);
    mirror(&mut page, sources.mirror, now);
    page.text()
}

fn connections(page: &mut Page, room: &ConnectionLimiter) {
    page.family("connections", Kind::Gauge, "Clients connected now.");
    page.sample(&[], room.open());
    page.family("connections_accepted_total", Kind::Counter, "Connections accepted.");
    page.sample(&[], room.accepted());
}

fn buffers(page: &mut Page, buffers: &BufferBudget) {
    for (name, help, bytes) in [
        (
            "buffer_memory_bytes",
            "Memory taken by buffers of requests, answers and sockets.",
            buffers.memory_bytes(),
        ),
        ("buffer_memory_max_bytes", "Memory that these buffers may take in total.", buffers.memory_max()),
        ("buffer_disk_bytes", "Disk taken by uploads that may be sent again.", buffers.disk_bytes()),
        ("buffer_disk_max_bytes", "Disk that these uploads may take in total.", buffers.disk_max()),
    ] {
        page.family(name, Kind::Gauge, help);
        page.sample(&[], bytes);
    }
}

fn keys(page: &mut Page, keys: &[KeySnapshot]) {
    let known: Vec<Labels> = keys.iter().map(Labels::of).collect();
    let each = || known.iter().map(Labels::pairs).zip(keys);
    page.family("keys", Kind::Gauge, "Keys of the pool, by status.");
    for status in STATUSES {
        let count = keys.iter().filter(|key| key.state.status() == status).count();
        page.sample(&[("status", status.word())], count);
    }
    page.family("key_status", Kind::Gauge, "1 for the status that a key has, 0 for the others.");
    for (mut labels, seen) in each() {
        for status in STATUSES {
            let has = u8::from(seen.state.status() == status);
            labels.push(("status", status.word()));
            page.sample(&labels, has);
            labels.pop();
        }
    }
    page.family("key_in_flight", Kind::Gauge, "Requests under way with a key.");
    for (labels, seen) in each() {
        page.sample(&labels, seen.key.in_flight());
    }
    page.family("key_credits_used", Kind::Gauge, "Credits of its workspace that were used in this period.");
    for (labels, seen) in each() {
        page.sample(&labels, seen.quota.count);
    }
    // Values that the provider has not reported have no sample.
    page.family("key_credits_limit", Kind::Gauge, "Credits that its workspace has in a period.");
    for (labels, limit) in each().filter_map(|(labels, seen)| Some((labels, seen.quota.limit?))) {
        page.sample(&labels, limit);
    }
    page.family("key_credits_remaining", Kind::Gauge, "Credits that its workspace has left.");
    for (labels, seen) in each().filter(|(_, seen)| seen.quota.limit.is_some()) {
        page.sample(&labels, seen.quota.remaining());
    }
    page.family(
        "key_credits_drift",
        Kind::Gauge,
        "By how much the provider's figures of this period were above ours, since the start.",
    );
    for (labels, seen) in each() {
        page.sample(&labels, seen.key.workspace().drift());
    }
    page.family("key_resets_at_seconds", Kind::Gauge, "When its period ends, in seconds since 1970.");
    for (labels, at) in each().filter_map(|(labels, seen)| Some((labels, seen.quota.resets_at?))) {
        page.sample(&labels, seconds(Duration::from_millis(at.0)));
    }
}

/// The labels of a key: its short form, some digits of its fingerprint, and its name if it has one.
struct Labels {
    short: String,
    hash: String,
    name: Option<String>,
}

impl Labels {
    fn of(seen: &KeySnapshot) -> Self {
        let key = seen.key.api_key();
        let hash = key.fingerprint().to_string().chars().take(HASH_DIGITS).collect();
        Self { short: key.short().to_string(), hash, name: seen.key.name().map(str::to_owned) }
    }

    fn pairs(&self) -> Vec<(&'static str, &str)> {
        let name = self.name.as_deref().map(|name| ("name", name));
        [("key", &*self.short), ("hash", &*self.hash)].into_iter().chain(name).collect()
    }
}

fn books(page: &mut Page, books: &store::Health, now: UnixMs) {
    page.family("store_failing", Kind::Gauge, "1 while the books cannot be written.");
    page.sample(&[], u8::from(books.is_failing()));
    page.family("store_records_waiting", Kind::Gauge, "Records on their way to the disk.");
    page.sample(&[], books.waiting());
    page.family("store_lag_seconds", Kind::Gauge, "How long the oldest of them has been held.");
    page.sample(&[], seconds(books.lag(now)));
    for (name, help, count) in [
        ("store_records_written_total", "Records that were written.", books.written()),
        ("store_records_lost_total", "Records that could be neither written nor held.", books.lost()),
        ("store_errors_total", "Failed attempts to write.", books.errors()),
    ] {
        page.family(name, Kind::Counter, help);
        page.sample(&[], count);
    }
}

fn mirror(page: &mut Page, mirror: Option<&mirror::Health>, now: UnixMs) {
    page.family("mirror_state", Kind::Gauge, "1 for how the mirror fares, 0 for the others.");
    let state = mirror.map(mirror::Health::state);
    for (word, known) in [
        ("off", None),
        ("working", Some(State::Working)),
        ("failing", Some(State::Failing)),
        ("paused", Some(State::Paused)),
    ] {
        page.sample(&[("state", word)], u8::from(known == state));
    }
    let count = |count: fn(&mirror::Health) -> u64| mirror.map_or(0, count);
    for (name, help, count) in [
        ("mirror_rows_sent_total", "Rows that Supabase has confirmed.", count(mirror::Health::sent)),
        ("mirror_failures_total", "Requests to Supabase that failed.", count(mirror::Health::failures)),
    ] {
        page.family(name, Kind::Counter, help);
        page.sample(&[], count);
    }
    page.family("mirror_lag_seconds", Kind::Gauge, "How long ago everything had been sent.");
    page.sample(&[], seconds(mirror.map_or(Duration::ZERO, |mirror| mirror.lag(now))));
    page.family("mirror_rows_refused", Kind::Gauge, "Rows that Supabase does not take.");
    page.sample(&[], count(mirror::Health::refused));
}

fn seconds(span: Duration) -> f64 {
    span.as_secs_f64()
}
