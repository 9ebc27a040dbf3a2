//! Tests the pool, with one module per subject. This module has the settings and the helpers that several of them use.

mod cooldowns;
mod histories;
mod leases;
mod pause;
mod reload;
mod wait_queue;

use std::time::Duration;

use super::*;
use crate::elevenlabs::plan::Capabilities;
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, RefusalSource};
use crate::policy::key_state::{Cooldown, CooldownReason, StateChange};
use crate::policy::quota::Extension;
use crate::policy::select::Unavailable;
use crate::policy::verdict::{Shortfall, Subject, UnexplainedRefusal, Verdict};
use crate::secret::ApiKey;

const NOW: UnixMs = UnixMs(1_000_000);
const SETTINGS: Settings = Settings {
    strategy: crate::policy::strategy::Strategy::DEFAULT,
    queue_timeout: Duration::from_secs(60),
    max_queued: 100,
    near_limit_ratio: 0.8,
    rate_limited_cooldown: Duration::from_secs(60),
    concurrency_cooldown: Duration::from_secs(2),
    exhausted_cooldown: Duration::from_secs(3_600),
    billing_cooldown: Duration::from_secs(7_200),
    invalid_confirm_cooldown: Duration::from_secs(600),
    invalid_cooldown: Duration::from_secs(86_400),
    permission_cooldown: Duration::from_secs(3_600),
    feature_cooldown: Duration::from_secs(3_600),
    endpoint_cooldown: Duration::from_secs(600),
    unproven_cooldown: Duration::from_secs(60),
    max_retry_after: Duration::from_secs(300),
    probe_after: Duration::from_secs(30),
    quota_lag: Duration::from_secs(300),
};

/// Maximum delay of a timer under virtual time. The runtime and [`clock`](crate::clock) count milliseconds
/// from different instants, so a request that wakes too early retries a millisecond later.
const MAX_TIMER_DELAY: Duration = Duration::from_millis(10);

/// Returns the entry of the key with the given number.
fn entry(number: usize, name: Option<&str>, workspace: Option<&str>) -> KeyEntry {
    let key = ApiKey::new(&format!("sk_{number}{number}{number}{number}_of_the_pool_{number}")).unwrap();
    KeyEntry { name: name.map(str::to_owned), workspace: workspace.map(str::to_owned), ..key.into() }
}

/// Returns a pool with one key for each of the configured workspaces.
fn pool(workspaces: &[Option<&str>]) -> Arc<Pool> {
    let entries = workspaces.iter().enumerate().map(|(number, workspace)| entry(number, None, *workspace));
    Arc::new(Pool::new(entries.collect(), SETTINGS))
}

/// Returns a pool of `count` keys, each the only key of its workspace.
fn separate_keys(count: usize) -> Arc<Pool> {
    pool(&vec![None; count])
}

/// Returns a speech request with the estimated cost `credits` that has tried the keys at the positions `tried`.
fn speech_request(credits: u64, tried: &[usize]) -> KeyRequest {
    KeyRequest {
        tried: tried.to_vec(),
        ..KeyRequest::new(ClientName::new("app"), Some(credits), Some(ConcurrencyGroup::SPEECH))
    }
}

trait PoolTestExt {
    /// Reserves a key without waiting.
    fn try_lease(&self, request: &KeyRequest, now: UnixMs) -> Result<Reserved, Unavailable>;
    /// Returns the position of the key that serves a speech request without a cost.
    fn select(&self, tried: &[usize], now: UnixMs) -> Result<usize, Unavailable>;
    /// Records that a speech request with the key at `position` got `verdict`.
    fn record_verdict(&self, position: usize, verdict: Verdict, now: UnixMs) -> Vec<Transition>;
    /// Records a poll with the key at `position` that reports `count` spent credits of `limit`.
    fn report_quota(&self, position: usize, count: u64, limit: u64, now: UnixMs) -> Vec<Transition>;
    /// Charges a request with the key at `position`.
    fn charge_key(&self, position: usize, credits: u64, now: UnixMs) -> Vec<Transition>;
}

impl PoolTestExt for Arc<Pool> {
    fn try_lease(&self, request: &KeyRequest, now: UnixMs) -> Result<Reserved, Unavailable> {
        self.try_reserve(&self.roster(), request, now).map_err(|blocked| blocked.reason)
    }

    #[track_caller]
    fn select(&self, tried: &[usize], now: UnixMs) -> Result<usize, Unavailable> {
        self.try_lease(&speech_request(0, tried), now).map(|reserved| reserved.lease.key().position())
    }

    fn record_verdict(&self, position: usize, verdict: Verdict, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        record_attempt(self, &roster, &roster.keys()[position], verdict, Some(&speech_request(100, &[])), now)
    }

    fn report_quota(&self, position: usize, count: u64, limit: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        let quota = Quota {
            count,
            limit: Some(limit),
            extension: Extension::None,
            resets_at: Some(UnixMs(9_000_000)),
        };
        self.observe(&roster, &roster.keys()[position], quota_observation(quota, None), now)
    }

    fn charge_key(&self, position: usize, credits: u64, now: UnixMs) -> Vec<Transition> {
        let roster = self.roster();
        let mut lease =
            Lease::try_acquire(self, &roster.keys()[position], &speech_request(0, &[]), false, now).unwrap();
        self.charge(&roster, &mut lease, credits, now)
    }
}

fn quota_observation(quota: Quota, is_paid: Option<bool>) -> Observation {
    Observation::Quota { quota, tier: None, is_paid, capabilities: Capabilities::default() }
}

/// Records that an attempt with `key` got `verdict`.
fn record_attempt(
    pool: &Arc<Pool>,
    roster: &Roster,
    key: &Key,
    verdict: Verdict,
    request: Option<&KeyRequest>,
    now: UnixMs,
) -> Vec<Transition> {
    if verdict == Verdict::Served {
        return pool.record_service(
            roster,
            key,
            ServedAttempt { request, began_at: now, is_charged: true },
            now,
        );
    }
    pool.record_refusal(
        roster,
        key,
        RefusedAttempt { verdict, request, is_repeated_elsewhere: false, source: RefusalSource::default() },
        now,
    )
}

/// Returns the time that is `seconds` after [`NOW`].
fn later(seconds: u64) -> UnixMs {
    NOW.plus(Duration::from_secs(seconds))
}

/// Returns a refusal that reports zero remaining credits.
fn quota_refusal() -> Verdict {
    Verdict::WorkspaceQuota(Shortfall { remaining: Some(0), required: Some(100), ..Shortfall::default() })
}

/// Returns the state changes with the positions of their keys.
fn changes(transitions: &[Transition]) -> Vec<(usize, StateChange)> {
    transitions.iter().map(|transition| (transition.key.position(), transition.change)).collect()
}

fn invalid_observation() -> Observation {
    Observation::Invalid { verdict: Verdict::InvalidKey, source: RefusalSource::default() }
}

/// Polls a future once.
fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::Pin::new(future).poll(&mut context) {
        std::task::Poll::Ready(output) => Some(output),
        std::task::Poll::Pending => None,
    }
}
