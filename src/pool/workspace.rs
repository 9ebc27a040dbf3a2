//! Defines a workspace of the provider: its identification, and its state, which requests, polls and other replicas
//! change through atomics. Only the evidence of refusals and the credits that are spent elsewhere have locks.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption, Guard};

use super::Settings;
use super::cells::{
    ConcurrencyLimiter, CooldownCell, EvidenceCell, ProbeCell, QuotaCell, SpendingCell, StateChangeCache,
};
use super::membership::WorkspaceMembership;
use super::ownership_index::OwnerId;
use super::sync::{AtomicU32, AtomicU64, Ordering};
use crate::elevenlabs::plan::Capabilities;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, Evidence, PollResult};
use crate::policy::forecast::{Forecast, forecast};
use crate::policy::key_state::Cooldown;
use crate::policy::quota::Quota;
use crate::policy::units::UnixMs;

/// A workspace of the provider. Its keys share its credits, concurrency limits and resources.
///
/// The alignment avoids false sharing, as for [`Key`](super::Key).
#[repr(align(128))]
#[derive(Debug)]
pub struct Workspace {
    membership: ArcSwap<WorkspaceMembership>,
    identity: OwnerId,
    pub(super) quota_cell: QuotaCell,
    /// Evidence about the workspace. The next three fields, the rate limits in `limiters` and the reported remaining
    /// credits in `quota_cell` are computed from it. `speech_limited_until` is 0 without a rate limit of speech.
    pub(super) evidence_cell: EvidenceCell,
    cooldown: CooldownCell,
    pub(super) probe: ProbeCell,
    speech_limited_until: AtomicU64,
    /// Time until which no further log event is written when the workspace is skipped for too few credits. 0 before
    /// the first skip.
    skip_logged_until: AtomicU64,
    /// Caches the time until which no key of the workspace can change state.
    pub(super) state_change_cache: StateChangeCache,
    in_flight: AtomicU32,
    pub(super) spending: SpendingCell,
    tier: ArcSwapOption<String>,
    capabilities: ArcSwapOption<Capabilities>,
    limiters: [ConcurrencyLimiter; ConcurrencyGroup::COUNT],
}

impl Workspace {
    /// Creates a workspace without state. Its resources are stored under `identity`, which must be stable.
    pub(super) fn new(membership: WorkspaceMembership, identity: OwnerId) -> Self {
        Self {
            membership: ArcSwap::from_pointee(membership),
            identity,
            quota_cell: QuotaCell::default(),
            evidence_cell: EvidenceCell::default(),
            cooldown: CooldownCell::default(),
            probe: ProbeCell::default(),
            speech_limited_until: AtomicU64::new(0),
            skip_logged_until: AtomicU64::new(0),
            state_change_cache: StateChangeCache::default(),
            in_flight: AtomicU32::new(0),
            spending: SpendingCell::default(),
            tier: ArcSwapOption::empty(),
            capabilities: ArcSwapOption::empty(),
            limiters: Default::default(),
        }
    }

    /// Returns the current identification of the workspace.
    #[must_use]
    pub fn membership(&self) -> Guard<Arc<WorkspaceMembership>> {
        self.membership.load()
    }

    /// Returns the stable identity of the workspace, under which its resources are stored.
    #[must_use]
    pub fn identity(&self) -> &OwnerId {
        &self.identity
    }

    /// Returns the quota at `now`.
    #[must_use]
    pub fn quota(&self, now: UnixMs) -> Quota {
        self.quota_cell.load(now)
    }

    /// Returns the time of the last poll, if it returned the quota.
    #[must_use]
    pub fn polled_at(&self) -> Option<UnixMs> {
        let poll = self.evidence_cell.last_poll()?;
        matches!(poll.result, PollResult::Quota { .. }).then_some(poll.at)
    }

    /// Returns the credits that requests in flight may still spend.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.quota_cell.reserved()
    }

    /// Returns the sum of the differences by which the provider's counts of this period exceeded the counts of the
    /// pool. The sum is negative if the provider's counts were lower.
    #[must_use]
    pub fn discrepancy(&self) -> i64 {
        self.quota_cell.discrepancy()
    }

    /// Forecasts when the credits run out, at the rate of spending at `now`.
    #[must_use]
    pub fn forecast(&self, now: UnixMs) -> Forecast {
        forecast(&self.quota(now), self.spent_per_day(now), now)
    }

    /// Returns the credits spent per day, at the rate of the last hours.
    #[must_use]
    pub fn spent_per_day(&self, now: UnixMs) -> f64 {
        self.spending.load().per_day(now)
    }

    /// Returns the provider's name of the plan, if a poll has reported it.
    #[must_use]
    pub fn tier(&self) -> Option<Arc<String>> {
        self.tier.load_full()
    }

    /// Returns the features and limits of the plan, from the last poll.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities.load().as_deref().copied().unwrap_or_default()
    }

    /// Returns the current refusals of the workspace.
    #[must_use]
    pub fn evidence(&self) -> Vec<Evidence> {
        self.evidence_cell.entries()
    }

    /// Returns the end of the rate limit of speech, or `None` if speech is not rate limited at `now`.
    #[must_use]
    pub fn speech_limited_until(&self, now: UnixMs) -> Option<UnixMs> {
        Some(UnixMs(self.speech_limited_until.load(Ordering::Acquire))).filter(|until| *until > now)
    }

    /// Returns the number of current leases on the keys of the workspace.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Returns the number of running requests of a concurrency group, and their maximum if it is known.
    #[must_use]
    pub fn concurrency(&self, group: ConcurrencyGroup) -> (u32, Option<u32>) {
        let limiter = self.limiter(group);
        (limiter.running(), limiter.known_max())
    }

    /// Returns the workspace's cooldown, even after its end.
    #[must_use]
    pub fn cooldown(&self) -> Option<Cooldown> {
        self.cooldown.load()
    }

    /// Returns the next time at which the state of the workspace changes because a cooldown ends or the credits are
    /// reset.
    pub(super) fn next_change(&self, quota: &Quota, now: UnixMs) -> Option<UnixMs> {
        let cooldown = self.cooldown.load().map(|cooldown| cooldown.until);
        let times = [cooldown, self.speech_limited_until(now), quota.resets_at];
        times.into_iter().flatten().filter(|at| *at > now).min()
    }

    /// Records that the workspace is skipped for too few credits until `until`. Returns whether the skip must be
    /// logged, because the time of the previously recorded skip has passed.
    pub(super) fn record_skip(&self, until: UnixMs, now: UnixMs) -> bool {
        self.skip_logged_until.swap(until.0, Ordering::AcqRel) <= now.0
    }

    /// Computes the cooldown, the rate limits, their probes and the remaining credits from the evidence at
    /// `now`.
    pub(super) fn apply_evidence(&self, settings: &Settings, now: UnixMs) {
        let resets_at = self.quota(now).resets_at;
        let summary = self.evidence_cell.evaluate(resets_at, &settings.cooldowns(), now);
        let probe_after = |may_probe: bool| may_probe.then_some(settings.probe_after);
        if let Some((credits, expires_at)) = summary.remaining {
            self.quota_cell.reported_remaining.report(credits, expires_at, now);
        }
        self.cooldown.store(summary.cooldown.map(|(cooldown, _)| cooldown));
        self.probe.schedule(summary.cooldown.and_then(|(_, may_probe)| probe_after(may_probe)), now);
        for (limiter, rate_limit) in self.limiters.iter().zip(summary.rate_limits) {
            let probe_delay = rate_limit.and_then(|(_, may_probe)| probe_after(may_probe));
            limiter.set_rate_limit(rate_limit.map(|(until, _)| until), probe_delay, now);
        }
        // Nearly all requests are speech, so a rate limit of speech is reported as a rate limit of the workspace.
        let limited_until = [ConcurrencyGroup::SPEECH, ConcurrencyGroup::FAST_SPEECH]
            .into_iter()
            .filter_map(|group| summary.rate_limits[group.index()])
            .map(|(until, _)| until.0)
            .max();
        self.speech_limited_until.store(limited_until.unwrap_or(0), Ordering::Release);
        if summary.remaining.is_none() {
            self.quota_cell.reported_remaining.clear();
        }
        self.state_change_cache.invalidate();
    }

    pub(super) fn set_membership(&self, membership: WorkspaceMembership) {
        self.membership.store(Arc::new(membership));
    }

    pub(super) fn add_in_flight(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn remove_in_flight(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn limiter(&self, group: ConcurrencyGroup) -> &ConcurrencyLimiter {
        // The index of a group is less than `ConcurrencyGroup::COUNT`.
        &self.limiters[group.index()]
    }

    /// Applies the quota and the plan from a poll at `at`.
    pub(super) fn apply_poll(
        &self,
        polled: Quota,
        tier: Option<String>,
        capabilities: Capabilities,
        at: UnixMs,
        lag: Duration,
    ) {
        // Earlier refusals because of too few credits do not apply to a new period or to a new limit.
        if self.quota_cell.apply_poll(polled, at, lag) {
            self.evidence_cell.remove_if(|evidence| matches!(evidence.claim, ClaimedFault::Credits { .. }));
            self.skip_logged_until.store(0, Ordering::Release);
        }
        if let Some(tier) = &tier {
            for (group, limiter) in ConcurrencyGroup::all().zip(&self.limiters) {
                limiter.set_plan_max(group.max_on_plan(tier));
            }
        }
        self.tier.store(tier.map(Arc::new));
        self.capabilities.store(Some(Arc::new(capabilities)));
        self.state_change_cache.invalidate();
    }

    pub(super) fn restore(&self, quota: Quota, now: UnixMs) {
        self.quota_cell.restore(quota, now);
        self.state_change_cache.invalidate();
    }

    /// Restores the stored plan. The next poll replaces it.
    pub(super) fn restore_tier(&self, tier: &str) {
        self.tier.store(Some(Arc::new(tier.to_owned())));
    }
}
