//! The state at the time of a request for `GET /metrics`: of the process, the keys and workspaces, the usage
//! store, the mirror and the connections. The metrics of requests are in `telemetry`.

use std::collections::{HashMap, HashSet};
use std::ptr;
use std::time::Duration;

use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::mirror::{self, State};
use crate::policy::key_state::KeyStatus;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::proxy::BufferBudget;
use crate::server::ConnectionLimiter;
use crate::store;
use crate::telemetry::{self, Samples, key_label};

/// The state that is exported.
pub(super) struct MetricSources<'a> {
    pub(super) keys: &'a [KeySnapshot],
    pub(super) queued: usize,
    pub(super) store_health: &'a store::Health,
    pub(super) mirror: Option<&'a mirror::MirrorHealth>,
    pub(super) connections: &'a ConnectionLimiter,
    pub(super) buffers: &'a BufferBudget,
    pub(super) started_at: UnixMs,
}

const STATUSES: [KeyStatus; 4] =
    [KeyStatus::Active, KeyStatus::Exhausted, KeyStatus::RateLimited, KeyStatus::Invalid];

/// Digits of a key's fingerprint in labels: enough to distinguish keys with equal short forms.
const HASH_DIGITS: usize = 12;

/// The state in a registry. Labels are fixed words, names of the configuration, short forms of keys and
/// parts of their fingerprints: their number is bounded by the keys, and none contains input of a client.
pub(super) fn registry(sources: &MetricSources<'_>, now: UnixMs) -> Registry {
    let MetricSources { keys, queued, store_health, mirror, connections, buffers, started_at } = *sources;
    let mut all = Registry::default();
    let help = "When the program was started, in seconds since 1970";
    all.register("process_start_time_seconds", help, ConstGauge::new(seconds(started_at)));
    #[cfg(target_os = "linux")]
    let _ = process(&mut all);
    let registry = all.sub_registry_with_prefix("keychoir");
    registry.register("build", "The running version", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    let count = |count: fn(&mirror::MirrorHealth) -> u64| mirror.map_or(0, count);
    for (name, help, value) in [
        ("connections", "Client connections that are open", connections.open()),
        ("requests_queued", "Requests that wait for a key", queued as u64),
        ("buffer_memory_bytes", "Memory of the buffers of all requests and sessions", buffers.memory_bytes()),
        ("buffer_memory_max_bytes", "Maximum memory of these buffers", buffers.memory_max()),
        ("buffer_disk_bytes", "Disk space of uploads that may be sent again", buffers.disk_bytes()),
        ("buffer_disk_max_bytes", "Maximum disk space of these uploads", buffers.disk_max()),
        (
            "usage_store_up",
            "1 while usage records can be written, else 0",
            u64::from(!store_health.is_failing()),
        ),
        ("usage_records_queued", "Usage records that are not yet written", store_health.waiting()),
        (
            "mirror_rows_refused",
            "Rows that Supabase refuses for their content",
            count(mirror::MirrorHealth::refused),
        ),
    ] {
        registry.register(name, help, ConstGauge::new(value));
    }
    let lag = mirror.map(|mirror| mirror.lag(now)).unwrap_or_default();
    for (name, help, span) in [
        (
            "usage_store_lag_seconds",
            "Age of the oldest usage record that is not yet written",
            store_health.lag(now),
        ),
        ("mirror_lag_seconds", "Time since the mirror had sent everything", lag),
    ] {
        registry.register(name, help, ConstGauge::new(span.as_secs_f64()));
    }
    for (name, help, value) in [
        ("connections_accepted", "Client connections that were accepted", connections.accepted()),
        ("log_lines_dropped", "Log lines that could not be written in time", telemetry::dropped()),
        ("usage_records_written", "Usage records that were written", store_health.written()),
        (
            "usage_records_dropped",
            "Usage records that could be neither written nor kept",
            store_health.lost(),
        ),
        ("usage_store_errors", "Failed attempts to write usage records", store_health.errors()),
        ("mirror_rows_sent", "Rows that Supabase has confirmed", count(mirror::MirrorHealth::sent)),
        ("mirror_failures", "Requests to Supabase that failed", count(mirror::MirrorHealth::failures)),
    ] {
        registry.register(name, help, ConstCounter::new(value));
    }
    let state = mirror.map(mirror::MirrorHealth::state);
    let states = [
        ("off", None),
        ("working", Some(State::Working)),
        ("failing", Some(State::Failing)),
        ("paused", Some(State::Paused)),
    ];
    let states = states
        .map(|(word, workspaces_seen)| ([("state", word.to_owned())], u64::from(workspaces_seen == state)));
    registry.register(
        "mirror_state",
        "1 for the state of the mirror, 0 for the others",
        Samples(states.into()),
    );
    of_keys(registry, keys);
    all
}

fn of_keys(registry: &mut Registry, keys: &[KeySnapshot]) {
    let all: Vec<&KeySnapshot> = keys.iter().collect();
    let labels = distinct(&all, |seen| key_label(&seen.key).to_owned());
    let each = || labels.iter().map(|label| ("key", label.clone())).zip(keys);
    let counts = STATUSES.map(|status| {
        let count = keys.iter().filter(|key| key.state.status() == status).count();
        ([("status", status.word().to_owned())], count as u64)
    });
    registry.register("keys", "Keys of the pool, by status", Samples(counts.into()));
    let statuses = each().flat_map(|(key, seen)| {
        STATUSES.map(|status| {
            let has = seen.state.status() == status;
            ([key.clone(), ("status", status.word().to_owned())], u64::from(has))
        })
    });
    let help = "1 for the status that a key has, 0 for the others";
    registry.register("key_status", help, Samples(statuses.collect()));
    let running = each().map(|(key, seen)| ([key], u64::from(seen.key.in_flight())));
    registry.register("key_requests_in_flight", "Requests under way with a key", Samples(running.collect()));

    let workspaces = workspaces(keys);
    let info = each().map(|(key, seen)| {
        let workspace = workspaces.iter().find(|(first, _)| is_same_workspace(first, seen));
        let workspace = workspace.map(|(_, label)| label.clone()).unwrap_or_default();
        let short_key = seen.key.api_key().short().to_string();
        ([key, ("short_key", short_key), ("hash", hash(seen)), ("workspace", workspace)], 1_u64)
    });
    registry.register("key_info", "Always 1; the labels describe the key", Samples(info.collect()));
    // Figures that the provider has not reported have no sample.
    type Figure = fn(&KeySnapshot) -> Option<u64>;
    let figures: [(&str, &str, Figure); 3] = [
        ("used", "Credits of a workspace that were used in this period", |seen| Some(seen.quota.count)),
        ("limit", "Credits that a workspace has in a period", |seen| seen.quota.limit),
        ("remaining", "Credits that a workspace has left", |seen| {
            seen.quota.limit.map(|_| seen.quota.remaining())
        }),
    ];
    let labelled = || workspaces.iter().map(|(seen, label)| ([("workspace", label.clone())], *seen));
    for (name, help, figure) in figures {
        let samples = labelled().filter_map(|(labels, seen)| Some((labels, figure(seen)?)));
        registry.register(format!("workspace_credits_{name}"), help, Samples(samples.collect()));
    }
    let resets = labelled().filter_map(|(labels, seen)| Some((labels, seconds(seen.quota.resets_at?))));
    let help = "When the period of a workspace ends, in seconds since 1970";
    registry.register("workspace_quota_reset_timestamp_seconds", help, Samples(resets.collect()));
    let drifts = labelled().map(|(labels, seen)| (labels, seen.key.workspace().drift()));
    let help = "Credits by which the provider's figures of this period were above the recorded ones";
    registry.register("workspace_billing_discrepancy_credits", help, Samples(drifts.collect()));
}

/// The first key of each workspace, and the workspace's label: its name in the configuration, or the label
/// of that key.
fn workspaces(keys: &[KeySnapshot]) -> Vec<(&KeySnapshot, String)> {
    let mut workspaces_seen = HashSet::new();
    let firsts: Vec<&KeySnapshot> =
        keys.iter().filter(|seen| workspaces_seen.insert(ptr::from_ref(seen.key.workspace()))).collect();
    let labels = distinct(&firsts, |seen| {
        let membership = seen.key.workspace().membership();
        membership.name().unwrap_or(key_label(&seen.key)).to_owned()
    });
    firsts.into_iter().zip(labels).collect()
}

/// The labels of these keys or of their workspaces. Where several have the same one, digits of the fingerprint
/// follow, because two samples with the same labels make a page invalid.
fn distinct(seen: &[&KeySnapshot], label: impl Fn(&KeySnapshot) -> String) -> Vec<String> {
    let mut labels: Vec<String> = seen.iter().map(|seen| label(seen)).collect();
    let mut counts: HashMap<String, usize> = HashMap::new();
    labels.iter().for_each(|label| *counts.entry(label.clone()).or_default() += 1);
    for (label, seen) in labels.iter_mut().zip(seen) {
        if counts.get(label).is_some_and(|count| *count > 1) {
            *label = format!("{label}#{}", hash(seen));
        }
    }
    labels
}

fn is_same_workspace(one: &KeySnapshot, other: &KeySnapshot) -> bool {
    ptr::eq(one.key.workspace(), other.key.workspace())
}

fn hash(seen: &KeySnapshot) -> String {
    seen.key.api_key().fingerprint().to_string().chars().take(HASH_DIGITS).collect()
}

fn seconds(at: UnixMs) -> f64 {
    Duration::from_millis(at.0).as_secs_f64()
}

/// The process metrics that all of Prometheus' libraries have; values that the system does not report are left out.
#[cfg(target_os = "linux")]
fn process(registry: &mut Registry) -> procfs::ProcResult<()> {
    use procfs::WithCurrentSystemInfo;
    use procfs::process::{LimitValue, Process};

    let process = Process::myself()?;
    let stat = process.stat()?;
    #[expect(clippy::cast_precision_loss, reason = "a figure for people; exact for centuries")]
    let cpu = (stat.utime + stat.stime) as f64 / procfs::ticks_per_second() as f64;
    registry.register("process_cpu_seconds", "CPU time of the process", ConstCounter::new(cpu));
    for (name, help, value) in [
        ("process_resident_memory_bytes", "Memory of the process in RAM", stat.rss_bytes().get()),
        ("process_virtual_memory_bytes", "Address space of the process", stat.vsize),
        ("process_open_fds", "Open files and sockets of the process", process.fd_count()? as u64),
    ] {
        registry.register(name, help, ConstGauge::new(value));
    }
    if let LimitValue::Value(max) = process.limits()?.max_open_files.soft_limit {
        registry.register("process_max_fds", "Maximum open files and sockets", ConstGauge::new(max));
    }
    Ok(())
}
