//! The state of the whole program, and its settings.

use std::collections::HashSet;
use std::ptr;

use serde_json::{Value, json};

use super::clients_by_name;
use crate::admin::details::{exhaustion_time, round_credits};
use crate::admin::{Admin, Readiness};
use crate::policy::key_state::KeyStatus;
use crate::policy::units::UnixMs;
use crate::pool::{KeySnapshot, Workspace};
use crate::shared::ReplicaInfo;

/// Returns the document of `GET overview`.
pub(in crate::admin::api) fn overview_document(admin: &Admin, generation: u64, now: UnixMs) -> Value {
    let keys = admin.pool.snapshot(now);
    let count = |is_counted: &dyn Fn(&KeySnapshot) -> bool| keys.iter().filter(|key| is_counted(key)).count();
    let with_status =
        |status| count(&|key: &KeySnapshot| !key.state.is_paused() && key.state.status() == status);
    let mut counted: HashSet<*const Workspace> = HashSet::new();
    let mut workspaces = keys.clone();
    workspaces.retain(|key| counted.insert(ptr::from_ref(key.key.workspace())));
    let sum =
        |amount: fn(&KeySnapshot) -> u64| workspaces.iter().map(amount).fold(0_u64, u64::saturating_add);
    let limit = workspaces.iter().try_fold(0_u64, |sum, key| Some(sum.saturating_add(key.quota.limit?)));
    let per_day = workspaces.iter().map(|key| key.key.workspace().spent_per_day(now)).sum::<f64>();
    let config = admin.config.load();
    let (health, mirror) = (&admin.store_health, admin.mirror.as_ref());
    let pool_view = admin.pool_view();
    let readiness = Readiness::new(
        &keys,
        health,
        mirror,
        admin.reachability.get(),
        admin.draining.is_set(),
        pool_view.as_deref(),
    );
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "generation": generation,
        "started_at": admin.started_at.rfc3339(),
        "now": now.rfc3339(),
        "state": readiness.status(),
        "upstream": readiness.upstream(),
        "draining": admin.draining.is_set(),
        "can_change": admin.control.is_some(),
        "keys": {
            "total": keys.len(),
            "active": with_status(KeyStatus::Active),
            "near_limit": count(&|key: &KeySnapshot| key.is_near_limit && !key.quota.is_over_limit()),
            "rate_limited": with_status(KeyStatus::RateLimited),
            "exhausted": with_status(KeyStatus::Exhausted),
            "invalid": with_status(KeyStatus::Invalid),
            "paused": count(&|key: &KeySnapshot| key.state.is_paused()),
        },
        "workspaces": workspaces.len(),
        "credits": {
            "used": sum(|key| key.quota.count),
            "limit": limit,
            "remaining": limit.map(|_| sum(|key| key.quota.remaining())),
            "per_day": round_credits(per_day),
            "exhausted_at": exhaustion_time(admin.pool.forecast(now)),
        },
        "requests": {
            "in_flight": keys.iter().map(|key| u64::from(key.key.in_flight())).sum::<u64>(),
            "queued": admin.pool.queued_requests(),
        },
        "connections": admin.connections.open(),
        "clients": clients_by_name(&config.clients).len(),
        "usage_store": {
            "state": readiness.store(),
            "unwritten_records": health.unwritten_records(),
            "lost_records": health.lost_records(),
        },
        "mirror": {
            "state": readiness.mirror(),
            "refused_rows": mirror.map_or(0, crate::mirror::MirrorHealth::refused),
        },
        "shared": pool_view.as_ref().map_or("off", |view| view.link.as_str()),
        "replicas": pool_view.iter().flat_map(|view| &view.replicas).map(replica_document).collect::<Vec<_>>(),
    })
}

fn replica_document(replica: &ReplicaInfo) -> Value {
    json!({
        "id": replica.id,
        "version": replica.version,
        "started_at": replica.started_at.rfc3339(),
        "last_seen": replica.last_seen.rfc3339(),
        "is_live": replica.is_live,
        "is_leader": replica.is_leader,
        "is_self": replica.is_self,
        "share": replica.share,
    })
}

/// Returns the document of `GET config`.
pub(in crate::admin::api) fn config_document(settings: &Value, generation: u64) -> Value {
    json!({"generation": generation, "settings": settings})
}
