//! Collects the metrics whose values are read when `GET /metrics` is requested. They are about the process, the queue,
//! the keys, the workspaces, the usage store, the mirror, the replicas, the buffers, the connections and the log. The
//! metrics that each proxied request updates are in `telemetry`.

use std::collections::{HashMap, HashSet};
use std::ptr;
use std::time::Duration;

use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use super::Admin;
use crate::mirror::{self, MirrorState};
use crate::policy::key_state::KeyStatus;
use crate::policy::units::UnixMs;
use crate::pool::KeySnapshot;
use crate::shared::{LinkState, SharedPoolView};
use crate::telemetry::{self, GaugeSamples, key_label};

/// The statuses of the status document, and `paused`.
const STATUSES: [&str; 5] = [
    KeyStatus::Active.as_str(),
    KeyStatus::Exhausted.as_str(),
    KeyStatus::RateLimited.as_str(),
    KeyStatus::Invalid.as_str(),
    PAUSED,
];

const PAUSED: &str = "paused";

/// Returns the status of a key, which is one of [`STATUSES`].
fn key_status(snapshot: &KeySnapshot) -> &'static str {
    if snapshot.state.is_paused() { PAUSED } else { snapshot.state.status().as_str() }
}

/// Number of digits of a key's fingerprint in labels. These digits distinguish keys with equal names or short forms.
const FINGERPRINT_LABEL_DIGITS: usize = 12;

/// Returns a registry with the values at `now`. The values of labels are constants, names from the configuration, short
/// forms of keys and parts of their fingerprints. They contain no input of clients, and the number of keys bounds the
/// number of samples.
pub(super) fn registry(admin: &Admin, now: UnixMs) -> Registry {
    let Admin { pool, store_health, connections, .. } = admin;
    let (keys, mirror) = (pool.snapshot(now), admin.mirror.as_ref());
    let config = admin.config.load();
    let buffers = &config.limits.buffers;
    let mut page_registry = Registry::default();
    let help = "The time at which the program was started, in seconds since 1970";
    page_registry.register(
        "process_start_time_seconds",
        help,
        ConstGauge::new(unix_seconds(admin.started_at)),
    );
    #[cfg(target_os = "linux")]
    let _ = register_process_metrics(&mut page_registry);
    let registry = page_registry.sub_registry_with_prefix("keychoir");
    registry.register("build", "The running version", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    let mirror_count = |count: fn(&mirror::MirrorHealth) -> u64| mirror.map_or(0, count);
    for (name, help, value) in [
        ("connections", "Client connections that are open", connections.open()),
        ("requests_queued", "Requests that wait for a key", pool.queued_requests() as u64),
        ("buffer_memory_bytes", "Memory of the buffers of all requests and sessions", buffers.memory_bytes()),
        ("buffer_memory_max_bytes", "Maximum memory of these buffers", buffers.max_memory()),
        ("buffer_disk_bytes", "Disk space of uploads that may be sent again", buffers.disk_bytes()),
        ("buffer_disk_max_bytes", "Maximum disk space of these uploads", buffers.max_disk()),
        (
            "usage_store_up",
            "1 while usage records can be written, else 0",
            u64::from(!store_health.is_failing()),
        ),
        ("usage_records_queued", "Usage records that are not yet written", store_health.unwritten_records()),
        (
            "mirror_rows_refused",
            "Rows that Supabase refuses for their content",
            mirror_count(mirror::MirrorHealth::refused),
        ),
    ] {
        registry.register(name, help, ConstGauge::new(value));
    }
    let mirror_lag = mirror.map(|mirror| mirror.lag(now)).unwrap_or_default();
    for (name, help, lag) in [
        (
            "usage_store_lag_seconds",
            "Age of the oldest usage record that is not yet written",
            store_health.lag(now),
        ),
        ("mirror_lag_seconds", "Time since the mirror had sent everything", mirror_lag),
    ] {
        registry.register(name, help, ConstGauge::new(lag.as_secs_f64()));
    }
    for (name, help, value) in [
        ("connections_accepted", "Client connections that were accepted", connections.accepted()),
        ("log_lines_dropped", "Log lines that could not be written in time", telemetry::dropped_lines()),
        ("usage_records_written", "Usage records that were written", store_health.written_records()),
        (
            "usage_records_dropped",
            "Usage records that could be neither written nor kept",
            store_health.lost_records(),
        ),
        ("usage_store_errors", "Failed attempts to write usage records", store_health.write_errors()),
        ("mirror_rows_sent", "Rows that Supabase has confirmed", mirror_count(mirror::MirrorHealth::sent)),
        ("mirror_failures", "Requests to Supabase that failed", mirror_count(mirror::MirrorHealth::failures)),
    ] {
        registry.register(name, help, ConstCounter::new(value));
    }
    let state = mirror.map(mirror::MirrorHealth::state);
    let states = [
        ("off", None),
        ("working", Some(MirrorState::Working)),
        ("failing", Some(MirrorState::Failing)),
        ("paused", Some(MirrorState::Paused)),
    ];
    let states =
        states.map(|(name, named_state)| ([("state", name.to_owned())], u64::from(named_state == state)));
    registry.register(
        "mirror_state",
        "1 for the state of the mirror, 0 for its other states",
        GaugeSamples(states.into()),
    );
    register_key_metrics(registry, &keys);
    if let Some(shared) = &admin.shared {
        register_replica_metrics(registry, shared);
    }
    page_registry
}

/// Registers the metrics of the replicas and of Redis, which exist only with `[redis]`.
fn register_replica_metrics(registry: &mut Registry, shared: &SharedPoolView) {
    let view = shared.get();
    let is_connected = view.link == LinkState::Connected;
    let is_leader = is_connected && view.replicas.iter().any(|replica| replica.is_self && replica.is_leader);
    for (name, help, value) in [
        ("redis_up", "1 while the replicas share the pool through Redis, else 0", u64::from(is_connected)),
        (
            "replicas",
            "Live replicas of the pool when Redis responded last, including this replica",
            view.live_replicas().count().max(1) as u64,
        ),
        (
            "replica_is_leader",
            "1 while this replica polls the provider for all replicas, else 0",
            u64::from(is_leader),
        ),
    ] {
        registry.register(name, help, ConstGauge::new(value));
    }
    shared.counts().register(registry);
}

/// Registers the metrics of each key and of each workspace.
fn register_key_metrics(registry: &mut Registry, keys: &[KeySnapshot]) {
    let snapshots: Vec<&KeySnapshot> = keys.iter().collect();
    let labels = unique_labels(&snapshots, |snapshot| key_label(&snapshot.key).to_owned());
    let labelled_keys = || labels.iter().map(|label| ("key", label.clone())).zip(keys);
    let status_counts = STATUSES.map(|status| {
        let count = keys.iter().filter(|key| key_status(key) == status).count();
        ([("status", status.to_owned())], count as u64)
    });
    registry.register("keys", "Keys of the pool, by status", GaugeSamples(status_counts.into()));
    let statuses = labelled_keys().flat_map(|(key, snapshot)| {
        STATUSES.map(|status| {
            let has_status = key_status(snapshot) == status;
            ([key.clone(), ("status", status.to_owned())], u64::from(has_status))
        })
    });
    let help = "1 for the status that a key has, 0 for the other statuses";
    registry.register("key_status", help, GaugeSamples(statuses.collect()));
    let requests = labelled_keys().map(|(key, snapshot)| ([key], u64::from(snapshot.key.in_flight())));
    registry.register(
        "key_requests_in_flight",
        "Requests in progress with a key",
        GaugeSamples(requests.collect()),
    );

    let workspaces = labelled_first_keys(keys);
    let key_labels = labelled_keys().map(|(key, snapshot)| {
        let workspace = workspaces.iter().find(|(first_key, _)| have_same_workspace(first_key, snapshot));
        let workspace = workspace.map(|(_, label)| label.clone()).unwrap_or_default();
        let short_key = snapshot.key.api_key().short().to_string();
        (
            [key, ("short_key", short_key), ("hash", fingerprint_digits(snapshot)), ("workspace", workspace)],
            1_u64,
        )
    });
    registry.register(
        "key_info",
        "Always 1; the labels describe the key",
        GaugeSamples(key_labels.collect()),
    );
    // Credits that the provider has not reported have no sample.
    type Credits = fn(&KeySnapshot) -> Option<u64>;
    let metrics: [(&str, &str, Credits); 3] = [
        ("used", "Credits of a workspace that were used in this period", |snapshot| {
            Some(snapshot.quota.count)
        }),
        ("limit", "Credits that a workspace has in a period", |snapshot| snapshot.quota.limit),
        ("remaining", "Credits that a workspace has left", |snapshot| {
            snapshot.quota.limit.map(|_| snapshot.quota.remaining())
        }),
    ];
    let labelled_workspaces =
        || workspaces.iter().map(|(snapshot, label)| ([("workspace", label.clone())], *snapshot));
    for (name, help, credits) in metrics {
        let samples =
            labelled_workspaces().filter_map(|(labels, snapshot)| Some((labels, credits(snapshot)?)));
        registry.register(format!("workspace_credits_{name}"), help, GaugeSamples(samples.collect()));
    }
    let resets = labelled_workspaces()
        .filter_map(|(labels, snapshot)| Some((labels, unix_seconds(snapshot.quota.resets_at?))));
    let help = "The end of the period of a workspace, in seconds since 1970";
    registry.register("workspace_quota_reset_timestamp_seconds", help, GaugeSamples(resets.collect()));
    let discrepancies =
        labelled_workspaces().map(|(labels, snapshot)| (labels, snapshot.key.workspace().discrepancy()));
    let help = "Credits by which the provider's count of this period was above the recorded count";
    registry.register("workspace_billing_discrepancy_credits", help, GaugeSamples(discrepancies.collect()));
}

/// Returns the first key of each workspace, and the workspace's label: its configured name, or the label of
/// that key.
fn labelled_first_keys(keys: &[KeySnapshot]) -> Vec<(&KeySnapshot, String)> {
    let mut seen_workspaces = HashSet::new();
    let first_keys: Vec<&KeySnapshot> = keys
        .iter()
        .filter(|snapshot| seen_workspaces.insert(ptr::from_ref(snapshot.key.workspace())))
        .collect();
    let labels = unique_labels(&first_keys, |snapshot| {
        let membership = snapshot.key.workspace().membership();
        membership.name().unwrap_or(key_label(&snapshot.key)).to_owned()
    });
    first_keys.into_iter().zip(labels).collect()
}

/// Returns a different label for each of the `snapshots`. Equal labels are extended by digits of the key's fingerprint,
/// because Prometheus rejects a page with two samples that have the same labels.
fn unique_labels(snapshots: &[&KeySnapshot], label: impl Fn(&KeySnapshot) -> String) -> Vec<String> {
    let mut labels: Vec<String> = snapshots.iter().map(|snapshot| label(snapshot)).collect();
    let mut label_counts: HashMap<String, usize> = HashMap::new();
    labels.iter().for_each(|label| *label_counts.entry(label.clone()).or_default() += 1);
    for (label, snapshot) in labels.iter_mut().zip(snapshots) {
        if label_counts.get(label).is_some_and(|count| *count > 1) {
            *label = format!("{label}#{}", fingerprint_digits(snapshot));
        }
    }
    labels
}

fn have_same_workspace(left: &KeySnapshot, right: &KeySnapshot) -> bool {
    ptr::eq(left.key.workspace(), right.key.workspace())
}

fn fingerprint_digits(snapshot: &KeySnapshot) -> String {
    snapshot.key.api_key().fingerprint().to_string().chars().take(FINGERPRINT_LABEL_DIGITS).collect()
}

fn unix_seconds(time: UnixMs) -> f64 {
    Duration::from_millis(time.0).as_secs_f64()
}

/// Registers the process metrics that Prometheus client libraries define. An error of the system ends the registration,
/// so that the remaining metrics are absent from the page.
#[cfg(target_os = "linux")]
fn register_process_metrics(registry: &mut Registry) -> procfs::ProcResult<()> {
    use procfs::WithCurrentSystemInfo;
    use procfs::process::{LimitValue, Process};

    let process = Process::myself()?;
    let stat = process.stat()?;
    #[expect(clippy::cast_precision_loss, reason = "exact for centuries of CPU time")]
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
