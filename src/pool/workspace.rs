//! A workspace of the provider, which owns credits, concurrency and resources, and its state in atomics.

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
use crate::policy::budget::Quota;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::{ClaimedFault, Evidence, Meaning, PollResult};
use crate::policy::forecast::{Forecast, forecast};
use crate::policy::key_state::Cooldown;
use crate::policy::units::UnixMs;

/// A workspace of the provider, which owns credits, concurrency and resources. Its keys share them.
#[repr(align(128))]
#[derive(Debug)]
pub struct Workspace {
    membership: ArcSwap<WorkspaceMembership>,
    identity: OwnerId,
    quota: QuotaCell,
    /// Evidence about the workspace, and the state computed from it: a cooldown, a probe before its
    /// end, and the end of a rate limit of speech (0: not limited).
    evidence: EvidenceCell,
    cooldown: CooldownCell,
    probe: ProbeCell,
    limited_until: AtomicU64,
    /// Time until which it is logged already that the workspace is skipped for too few credits.
    skipped_until: AtomicU64,
    /// Caches the time until which no key of the workspace can change state.
    state_change_cache: StateChangeCache,
    in_flight: AtomicU32,
    spending: SpendingCell,
    tier: ArcSwapOption<String>,
    capabilities: ArcSwapOption<Capabilities>,
    limiters: [ConcurrencyLimiter; ConcurrencyGroup::COUNT],
}

impl Workspace {
    /// Creates a workspace. `identity` is stable: the resources of the workspace are stored under
    /// it.
    pub(super) fn new(membership: WorkspaceMembership, identity: OwnerId) -> Self {
        Self {
            membership: ArcSwap::from_pointee(membership),
            identity,
            quota: QuotaCell::default(),
            evidence: EvidenceCell::default(),
            cooldown: CooldownCell::default(),
            probe: ProbeCell::default(),
            limited_until: AtomicU64::new(0),
            skipped_until: AtomicU64::new(0),
            state_change_cache: StateChangeCache::default(),
            in_flight: AtomicU32::new(0),
            spending: SpendingCell::default(),
            tier: ArcSwapOption::empty(),
            capabilities: ArcSwapOption::empty(),
            limiters: Default::default(),
        }
    }

    /// The current identification of the workspace.
    #[must_use]
    pub fn membership(&self) -> Guard<Arc<WorkspaceMembership>> {
        self.membership.load()
    }

    /// The stable identity of the workspace: its resources are stored under it.
    #[must_use]
    pub fn identity(&self) -> &OwnerId {
        &self.identity
    }

    /// The credits at `now`.
    #[must_use]
    pub fn quota(&self, now: UnixMs) -> Quota {
        self.quota.load(now)
    }

    /// Time of the last poll that reported its credits.
    #[must_use]
    pub fn polled_at(&self) -> Option<UnixMs> {
        let poll = self.evidence.poll()?;
        matches!(poll.result, PollResult::Figures { .. }).then_some(poll.at)
    }

    /// Credits that requests in flight may still spend.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.quota.reserved()
    }

    /// Sum of the differences by which the provider's figures of this period exceeded ours; negative when
    /// they were lower.
    #[must_use]
    pub fn drift(&self) -> i64 {
        self.quota.drift()
    }

    /// Forecasts when its credits run out, at the rate they are spent at `now`.
    #[must_use]
    pub fn forecast(&self, now: UnixMs) -> Forecast {
        forecast(&self.quota(now), self.spent_per_day(now), now)
    }

    /// Credits per day, at the rate of the last hours.
    #[must_use]
    pub fn spent_per_day(&self, now: UnixMs) -> f64 {
        self.spending.load().per_day(now)
    }

    /// The plan's name, when a poll has reported it.
    #[must_use]
    pub fn tier(&self) -> Option<Arc<String>> {
        self.tier.load_full()
    }

    /// The features and limits of its subscription, as last polled.
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities.load().as_deref().copied().unwrap_or_default()
    }

    /// Current evidence about the workspace.
    #[must_use]
    pub fn evidence(&self) -> Vec<Evidence> {
        self.evidence.all()
    }

    /// End of the rate limit of speech; `None` when speech is not rate limited.
    #[must_use]
    pub fn limited_until(&self, now: UnixMs) -> Option<UnixMs> {
        Some(UnixMs(self.limited_until.load(Ordering::Acquire))).filter(|until| *until > now)
    }

    /// Number of requests that hold a lease on one of its keys now.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Number of running requests of a concurrency group, and their maximum when it is known.
    #[must_use]
    pub fn running(&self, group: ConcurrencyGroup) -> (u32, Option<u32>) {
        let limiter = self.limiter(group);
        (limiter.running(), limiter.known_max())
    }

    /// The workspace's cooldown, even after its end.
    #[must_use]
    pub fn cooldown(&self) -> Option<Cooldown> {
        self.cooldown.load()
    }

    /// The next moment at which the workspace's state may change without an event.
    pub(super) fn next_change(&self, quota: &Quota, now: UnixMs) -> Option<UnixMs> {
        let cooldown = self.cooldown.load().map(|cooldown| cooldown.until);
        let times = [cooldown, self.limited_until(now), quota.resets_at];
        times.into_iter().flatten().filter(|at| *at > now).min()
    }

    /// Records that the workspace is skipped for too few credits, up to `until`. Returns whether
    /// that was not recorded already.
    pub(super) fn record_skip(&self, until: UnixMs, now: UnixMs) -> bool {
        self.skipped_until.swap(until.0, Ordering::AcqRel) <= now.0
    }

    pub(super) fn evidence_cell(&self) -> &EvidenceCell {
        &self.evidence
    }

    pub(super) fn probe(&self) -> &ProbeCell {
        &self.probe
    }

    /// Computes cooldown, probes, rate limits and remaining credits from the evidence at `now`.
    pub(super) fn apply_evidence(&self, settings: &Settings, now: UnixMs) {
        let resets_at = self.quota(now).resets_at;
        let meanings = self.evidence.meanings(resets_at, &settings.cooldowns(), now);
        let probe_after = |is_probable: bool| is_probable.then_some(settings.probe_after);
        // A probe is allowed only if every cooldown of the workspace allows it.
        let (mut joined, mut may_be_probed, mut has_shortfall) = (None::<Cooldown>, true, false);
        let mut limits: [Option<(UnixMs, bool)>; ConcurrencyGroup::COUNT] = [None; ConcurrencyGroup::COUNT];
        for meaning in meanings {
            match meaning {
                Meaning::Cooldown { cooldown, is_probable: allows_probe } => {
                    joined = Some(joined.map_or(cooldown, |earlier| earlier.joined(cooldown)));
                    may_be_probed &= allows_probe;
                }
                Meaning::GroupCooldown { group, until, is_probable } => {
                    limits[group.index()] = Some((until, is_probable));
                }
                Meaning::Short { left, until } => {
                    has_shortfall = true;
                    self.quota.reported().report(left, until, now);
                }
                Meaning::Nothing => {}
            }
        }
        self.cooldown.store(joined);
        self.probe.allow(probe_after(may_be_probed && joined.is_some()), now);
        for (limiter, limit) in self.limiters.iter().zip(limits) {
            limiter.limit(limit.map(|(until, _)| until), limit.and_then(|(_, may)| probe_after(may)), now);
        }
        // Nearly all requests are speech, so a rate limit of speech is reported as one of the workspace.
        let of_speech =
            [ConcurrencyGroup::SPEECH, ConcurrencyGroup::FAST_SPEECH].map(|group| limits[group.index()]);
        let limited_until = of_speech.iter().flatten().map(|(until, _)| until.0).max();
        self.limited_until.store(limited_until.unwrap_or(0), Ordering::Release);
        if !has_shortfall {
            self.quota.reported().clear();
        }
        self.state_change_cache.invalidate();
    }

    pub(super) fn state_change_cache(&self) -> &StateChangeCache {
        &self.state_change_cache
    }

    pub(super) fn rename(&self, membership: WorkspaceMembership) {
        self.membership.store(Arc::new(membership));
    }

    pub(super) fn add_in_flight(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn remove_in_flight(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    pub(super) fn cell(&self) -> &QuotaCell {
        &self.quota
    }

    pub(super) fn spending(&self) -> &SpendingCell {
        &self.spending
    }

    pub(super) fn limiter(&self, group: ConcurrencyGroup) -> &ConcurrencyLimiter {
        // The index of a concurrency group is below their count.
        &self.limiters[group.index()]
    }

    /// Adopts the figures of a poll.
    pub(super) fn observe(
        &self,
        polled: Quota,
        tier: Option<String>,
        capabilities: Capabilities,
        now: UnixMs,
        lag: Duration,
    ) {
        // After a new period or another limit, older refusals for credits no longer apply.
        if self.quota.adopt(polled, now, lag) {
            self.evidence.drop_if(|known| matches!(known.claim, ClaimedFault::Credits { .. }));
            self.skipped_until.store(0, Ordering::Release);
        }
        if let Some(tier) = &tier {
            for (group, limiter) in ConcurrencyGroup::all().zip(&self.limiters) {
                limiter.set_plan_max(group.plan_max(tier));
            }
        }
        self.tier.store(tier.map(Arc::new));
        self.capabilities.store(Some(Arc::new(capabilities)));
        self.state_change_cache.invalidate();
    }

    pub(super) fn restore(&self, quota: Quota, now: UnixMs) {
        self.quota.restore(quota, now);
        self.state_change_cache.invalidate();
    }

    /// Restores the stored plan, until a poll reports the current one.
    pub(super) fn restore_tier(&self, tier: &str) {
        self.tier.store(Some(Arc::new(tier.to_owned())));
    }
}
