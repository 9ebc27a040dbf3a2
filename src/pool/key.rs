//! Defines an API key of the pool: its configuration, and its state, which requests, polls, other replicas and reloads
//! change through atomics. Only the evidence of refusals has a lock.

use std::fmt;
use std::sync::Arc;

use super::Settings;
use super::cells::{CooldownCell, EvidenceCell, LastReportedState, PauseCell, ProbeCell, ReportedRemaining};
use super::membership::WorkspaceMembership;
use super::roster::KeyEntry;
use super::sync::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use super::workspace::Workspace;
use crate::policy::authority::Authority;
use crate::policy::evidence::Evidence;
use crate::policy::key_state::{Cooldown, CooldownReason, KeyOrigin, KeyState, Pause};
use crate::policy::quota::Quota;
use crate::policy::units::UnixMs;
use crate::secret::ApiKey;

/// An API key of the pool, which gives access to a workspace.
///
/// The alignment avoids false sharing between keys that different cores write to. It is the size of two cache lines,
/// because processors prefetch cache lines in pairs.
#[repr(align(128))]
pub struct Key {
    /// The position in the latest roster, for status pages and logs.
    position: AtomicUsize,
    api_key: ApiKey,
    name: Option<String>,
    origin: KeyOrigin,
    pub(super) workspace: Arc<Workspace>,
    authority: Option<Arc<Authority>>,
    /// The default host with the key's own route: through its forward proxy, or directly. `None` if the key has no
    /// route of its own.
    default_route: Option<Arc<Authority>>,
    pub(super) weight: u32,
    pub(super) kept_credits: u64,
    /// Evidence about the key itself. The fields `cooldown`, `probe` and `reported_remaining` are computed from it.
    /// `reported_remaining` contains the remaining credits of the key's own quota.
    pub(super) evidence_cell: EvidenceCell,
    cooldown: CooldownCell,
    pause: PauseCell,
    pub(super) probe: ProbeCell,
    pub(super) reported_remaining: ReportedRemaining,
    in_flight: AtomicU32,
    /// Whether a poll with this key is requested, because it can confirm or refute a refusal.
    is_poll_requested: AtomicBool,
    /// The next turn of this key, as [`RankingInputs`](crate::policy::strategy::RankingInputs) defines it.
    pub(super) turn: AtomicU64,
    pub(super) last_reported: LastReportedState,
}

impl Key {
    pub(super) fn new(position: usize, entry: KeyEntry, workspace: Arc<Workspace>) -> Self {
        workspace.state_change_cache.invalidate();
        Self {
            position: AtomicUsize::new(position),
            api_key: entry.key,
            name: entry.name,
            origin: entry.origin,
            workspace,
            authority: entry.authority.or(entry.detected_region),
            default_route: entry.default_route,
            weight: entry.weight.max(1),
            kept_credits: entry.kept_credits,
            evidence_cell: EvidenceCell::default(),
            cooldown: CooldownCell::default(),
            pause: PauseCell::new(entry.pause),
            probe: ProbeCell::default(),
            reported_remaining: ReportedRemaining::default(),
            in_flight: AtomicU32::new(0),
            is_poll_requested: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            last_reported: LastReportedState::default(),
        }
    }

    /// Whether the key has the configuration of `entry` and `membership`.
    pub(super) fn matches(&self, entry: &KeyEntry, membership: &WorkspaceMembership) -> bool {
        self.name == entry.name
            && self.origin == entry.origin
            && self.authority.as_ref() == entry.authority.as_ref().or(entry.detected_region.as_ref())
            && self.default_route == entry.default_route
            && self.weight == entry.weight.max(1)
            && self.kept_credits == entry.kept_credits
            && self.workspace.membership().is_same(membership)
            && membership.name().is_none_or(|name| self.workspace.membership().name() == Some(name))
    }

    /// Returns the position in the latest roster, from 0. A removed key keeps its last position.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position.load(Ordering::Acquire)
    }

    pub(super) fn set_position(&self, position: usize) {
        self.position.store(position, Ordering::Release);
    }

    /// Returns the secret key that is sent to the provider.
    #[must_use]
    pub fn api_key(&self) -> &ApiKey {
        &self.api_key
    }

    /// Returns the name that the configuration gives to the key, if there is one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Returns the kind of source from which the key was configured.
    #[must_use]
    pub fn origin(&self) -> KeyOrigin {
        self.origin
    }

    /// Returns the key's share of the requests relative to other keys, at least 1.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// Returns the provider's host and port for this key, or `None` for the default host.
    #[must_use]
    pub fn authority(&self) -> Option<&Arc<Authority>> {
        self.authority.as_ref()
    }

    /// Returns where requests with the key are sent: its own host, or the default host by the key's own route. Returns
    /// `None` for the default host and the default route.
    #[must_use]
    pub fn destination(&self) -> Option<&Arc<Authority>> {
        self.authority.as_ref().or(self.default_route.as_ref())
    }

    /// Returns `host` with the route of the key to the default host: through the key's own forward proxy, directly, or
    /// unchanged if the key has no route of its own.
    #[must_use]
    pub fn route_to(&self, host: &Arc<Authority>) -> Arc<Authority> {
        match &self.default_route {
            Some(route) => Arc::new((**host).clone().through(route.proxy().cloned())),
            None => Arc::clone(host),
        }
    }

    /// Returns the workspace that the key belongs to.
    #[must_use]
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    /// Returns the number of current leases on the key.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// Returns the state at `now` for status pages and logs. A key whose workspace is rate limited for speech
    /// is reported as rate limited.
    #[must_use]
    pub fn state(&self, now: UnixMs) -> KeyState {
        self.with_pause(self.unpaused_state(now), now)
    }

    /// Returns the state at `now` that the key has, or would have without its pause.
    #[must_use]
    pub fn unpaused_state(&self, now: UnixMs) -> KeyState {
        let state =
            KeyState::new(self.cooldown.load(), self.workspace.cooldown(), &self.workspace.quota(now), now);
        match (state, self.workspace.speech_limited_until(now)) {
            (KeyState::Usable, Some(until)) => {
                KeyState::CoolingDown { reason: CooldownReason::RateLimited, until: Some(until) }
            }
            (state, _) => state,
        }
    }

    /// Returns the state for selection. It ignores rate limits of concurrency groups, which selection checks
    /// separately.
    pub(super) fn selection_state(&self, quota: &Quota, now: UnixMs) -> KeyState {
        self.with_pause(KeyState::new(self.cooldown.load(), self.workspace.cooldown(), quota, now), now)
    }

    fn with_pause(&self, state: KeyState, now: UnixMs) -> KeyState {
        match self.pause.active_pause(now) {
            Some(pause) => KeyState::Paused { until: pause.until, status: state.status() },
            None => state,
        }
    }

    /// Returns the operator's pause, unless it has ended at `now`.
    #[must_use]
    pub fn pause(&self, now: UnixMs) -> Option<Arc<Pause>> {
        self.pause.load(now)
    }

    /// Starts, changes or ends the operator's pause.
    pub(super) fn set_pause(&self, pause: Option<Pause>) {
        if self.pause.store(pause) {
            self.workspace.state_change_cache.invalidate();
        }
    }

    /// Returns the current refusals of the key itself.
    #[must_use]
    pub fn evidence(&self) -> Vec<Evidence> {
        self.evidence_cell.entries()
    }

    /// Copies the evidence, the last poll and the cooldown of `previous`, which is the same key with another
    /// configuration.
    pub(super) fn copy_state(&self, previous: &Self) {
        for evidence in previous.evidence() {
            self.evidence_cell.add(evidence);
        }
        if let Some(poll) = previous.evidence_cell.last_poll() {
            self.evidence_cell.record_poll(poll);
        }
        self.cooldown.store(previous.cooldown.load());
    }

    /// Computes the cooldown, the probe and the remaining credits from the evidence at `now`.
    pub(super) fn apply_evidence(&self, settings: &Settings, now: UnixMs) {
        // The reset date of the workspace does not apply to a key's own quota.
        let summary = self.evidence_cell.evaluate(None, &settings.cooldowns(), now);
        if let Some((credits, expires_at)) = summary.remaining {
            self.reported_remaining.report(credits, expires_at, now);
        }
        self.cooldown.store(summary.cooldown.map(|(cooldown, _)| cooldown));
        let may_be_probed = summary.cooldown.is_some_and(|(_, may_probe)| may_probe);
        self.probe.schedule(may_be_probed.then_some(settings.probe_after), now);
        if summary.remaining.is_none() {
            self.reported_remaining.clear();
        }
        self.workspace.state_change_cache.invalidate();
    }

    /// Returns the key's own cooldown, even after its end.
    #[must_use]
    pub fn cooldown(&self) -> Option<Cooldown> {
        self.cooldown.load()
    }

    /// Sets the cooldown without evidence, for tests of its consequences.
    #[cfg(test)]
    pub(super) fn set_cooldown(&self, cooldown: Cooldown) {
        self.cooldown.store(Some(cooldown));
        self.workspace.state_change_cache.invalidate();
    }

    /// Whether a poll with this key is requested.
    #[must_use]
    pub fn is_poll_requested(&self) -> bool {
        self.is_poll_requested.load(Ordering::Acquire)
    }

    /// Requests a poll, or withdraws the request. Must be called after
    /// [`apply_evidence`](Self::apply_evidence), because a poll that finds the request may end a cooldown.
    pub(super) fn set_poll_requested(&self, is_requested: bool) {
        self.is_poll_requested.store(is_requested, Ordering::Release);
    }

    /// Returns the next time at which the state of the key changes because a cooldown or a pause ends.
    pub(super) fn next_change(&self, now: UnixMs) -> Option<UnixMs> {
        let cooldown = self.cooldown.load().filter(|cooldown| cooldown.is_active(now));
        let pause_end = self.pause.active_pause(now).and_then(|pause| pause.until);
        cooldown.map(|cooldown| cooldown.until).into_iter().chain(pause_end).min()
    }

    pub(super) fn add_in_flight(&self) {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        self.workspace.add_in_flight();
    }

    pub(super) fn remove_in_flight(&self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        self.workspace.remove_in_flight();
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Key({} {})", self.position(), self.api_key.short())
    }
}
