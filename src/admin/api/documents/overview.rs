//! Builds two JSON documents about the whole server: the overview of its state, and its settings.

use std::collections::HashSet;
use std::ptr;

use serde::Serialize;
use serde_json::{Value, json};

use super::sorted_clients;
use crate::admin::details::{exhaustion_time, round_credits};
use crate::admin::{Admin, Readiness};
use crate::policy::key_state::KeyStatus;
use crate::policy::units::UnixMs;
use crate::pool::{KeySnapshot, Workspace};
use crate::shared::ListedReplica;

/// The document of `GET overview`.
#[derive(Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct OverviewDocument {
    pub(crate) version: &'static str,
    pub(crate) generation: u64,
    pub(crate) started_at: String,
    pub(crate) now: String,
    /// The status in `GET /readyz`: `ready`, `degraded` or `unready`.
    pub(crate) state: &'static str,
    /// `ok`, `unreachable`, or `unknown` before the first connection attempt.
    pub(crate) upstream: &'static str,
    pub(crate) draining: bool,
    /// Whether operators can make changes at runtime.
    pub(crate) can_change: bool,
    pub(crate) keys: KeyCounts,
    pub(crate) workspaces: usize,
    pub(crate) credits: PoolCredits,
    pub(crate) requests: RequestCounts,
    pub(crate) connections: u64,
    pub(crate) clients: usize,
    pub(crate) usage_store: UsageStoreState,
    pub(crate) mirror: MirrorDocument,
    /// `off` without `[redis]`, `connecting`, `connected`, or `alone` while Redis does not respond.
    pub(crate) shared: &'static str,
    pub(crate) replicas: Vec<ReplicaDocument>,
}

/// The number of keys by state. A paused key is not counted in the state that it would have without the pause. A key
/// near its limit is counted in its state and in `near_limit`.
#[derive(Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct KeyCounts {
    pub(crate) total: usize,
    pub(crate) active: usize,
    pub(crate) near_limit: usize,
    pub(crate) rate_limited: usize,
    pub(crate) exhausted: usize,
    pub(crate) invalid: usize,
    pub(crate) paused: usize,
}

/// The credits of all workspaces. The limit is `None` if the limit of any workspace is unknown.
#[derive(Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct PoolCredits {
    pub(crate) used: u64,
    pub(crate) limit: Option<u64>,
    pub(crate) remaining: Option<u64>,
    /// Credits that all workspaces use per day at the rate of the last hours.
    pub(crate) per_day: u64,
    /// The time at which all credits will be exhausted at this rate. `None` if they last until their reset, or if the
    /// forecast is unknown.
    pub(crate) exhausted_at: Option<String>,
}

#[derive(Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct RequestCounts {
    pub(crate) in_flight: u64,
    /// The number of requests that are queued for a key.
    pub(crate) queued: usize,
}

#[derive(Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct UsageStoreState {
    /// `ok` or `failing`.
    pub(crate) state: &'static str,
    pub(crate) unwritten_records: u64,
    pub(crate) lost_records: u64,
}

#[derive(Serialize)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct MirrorDocument {
    /// `off`, `ok`, `failing` or `paused`.
    pub(crate) state: &'static str,
    pub(crate) refused_rows: u64,
}

#[derive(Serialize)]
pub(crate) struct ReplicaDocument {
    pub(crate) id: String,
    pub(crate) version: String,
    pub(crate) started_at: String,
    pub(crate) last_seen: String,
    pub(crate) is_live: bool,
    pub(crate) is_leader: bool,
    pub(crate) is_self: bool,
    /// The replica's part of the slots for concurrent requests of all live replicas, from 0 to 1.
    pub(crate) share: f64,
}

/// Returns the document of `GET overview` for a pool with the given `keys`.
pub(in crate::admin::api) fn overview_document(
    admin: &Admin,
    keys: &[KeySnapshot],
    generation: u64,
    now: UnixMs,
) -> OverviewDocument {
    let count = |is_counted: &dyn Fn(&KeySnapshot) -> bool| keys.iter().filter(|key| is_counted(key)).count();
    let count_with_status =
        |status| count(&|key: &KeySnapshot| !key.state.is_paused() && key.state.status() == status);
    let mut counted_workspaces: HashSet<*const Workspace> = HashSet::new();
    // The first key of each workspace stands for the workspace.
    let workspaces = keys.iter().filter(|key| counted_workspaces.insert(ptr::from_ref(key.key.workspace())));
    let workspaces: Vec<&KeySnapshot> = workspaces.collect();
    let sum = |amount: fn(&KeySnapshot) -> u64| {
        workspaces.iter().map(|key| amount(key)).fold(0_u64, u64::saturating_add)
    };
    let limit = workspaces.iter().try_fold(0_u64, |sum, key| Some(sum.saturating_add(key.quota.limit?)));
    let per_day = workspaces.iter().map(|key| key.key.workspace().spent_per_day(now)).sum::<f64>();
    let config = admin.config.load();
    let (health, mirror) = (&admin.store_health, admin.mirror.as_ref());
    let pool_view = admin.pool_view();
    let readiness = Readiness::new(
        keys,
        health,
        mirror,
        admin.reachability.get(),
        admin.draining.is_set(),
        pool_view.as_deref(),
    );
    OverviewDocument {
        version: env!("CARGO_PKG_VERSION"),
        generation,
        started_at: admin.started_at.rfc3339(),
        now: now.rfc3339(),
        state: readiness.status(),
        upstream: readiness.upstream(),
        draining: admin.draining.is_set(),
        can_change: admin.control.is_some(),
        keys: KeyCounts {
            total: keys.len(),
            active: count_with_status(KeyStatus::Active),
            near_limit: count(&|key: &KeySnapshot| key.is_near_limit && !key.quota.is_over_limit()),
            rate_limited: count_with_status(KeyStatus::RateLimited),
            exhausted: count_with_status(KeyStatus::Exhausted),
            invalid: count_with_status(KeyStatus::Invalid),
            paused: count(&|key: &KeySnapshot| key.state.is_paused()),
        },
        workspaces: workspaces.len(),
        credits: PoolCredits {
            used: sum(|key| key.quota.count),
            limit,
            remaining: limit.map(|_| sum(|key| key.quota.remaining())),
            per_day: round_credits(per_day),
            exhausted_at: exhaustion_time(admin.pool.forecast(now)),
        },
        requests: RequestCounts {
            in_flight: keys.iter().map(|key| u64::from(key.key.in_flight())).sum::<u64>(),
            queued: admin.pool.queued_requests(),
        },
        connections: admin.connections.open(),
        clients: sorted_clients(&config.clients).len(),
        usage_store: UsageStoreState {
            state: readiness.store(),
            unwritten_records: health.unwritten_records(),
            lost_records: health.lost_records(),
        },
        mirror: MirrorDocument {
            state: readiness.mirror(),
            refused_rows: mirror.map_or(0, crate::mirror::MirrorHealth::refused),
        },
        shared: pool_view.as_ref().map_or("off", |view| view.link.as_str()),
        replicas: pool_view.iter().flat_map(|view| &view.replicas).map(replica_document).collect(),
    }
}

fn replica_document(replica: &ListedReplica) -> ReplicaDocument {
    ReplicaDocument {
        id: replica.id.clone(),
        version: replica.version.clone(),
        started_at: replica.started_at.rfc3339(),
        last_seen: replica.last_seen.rfc3339(),
        is_live: replica.is_live,
        is_leader: replica.is_leader,
        is_self: replica.is_self,
        share: replica.share,
    }
}

/// Returns the document of `GET config`.
pub(in crate::admin::api) fn config_document(settings: &Value, generation: u64) -> Value {
    json!({"generation": generation, "settings": settings})
}
