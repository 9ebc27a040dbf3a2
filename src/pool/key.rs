//! An API key of the pool and its state, in atomics.

use std::fmt;
use std::sync::Arc;

use super::Settings;
use super::cells::{CooldownCell, EvidenceCell, LastReported, ProbeCell, ReportedRemaining};
use super::membership::WorkspaceMembership;
use super::roster::KeyEntry;
use super::sync::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use super::workspace::Workspace;
use crate::policy::authority::Authority;
use crate::policy::budget::Quota;
use crate::policy::evidence::{Evidence, Meaning};
use crate::policy::key_state::{Cooldown, CooldownReason, KeyState, StateChange};
use crate::policy::units::UnixMs;
use crate::secret::ApiKey;

/// An API key of the pool, which gives access to a workspace.
///
/// The alignment keeps keys that different cores write to on separate cache lines (two lines, because
/// processors prefetch them in pairs).
#[repr(align(128))]
pub struct Key {
    /// The position in the latest roster, for status pages and logs.
    position: AtomicUsize,
    api_key: ApiKey,
    name: Option<String>,
    workspace: Arc<Workspace>,
    authority: Option<Arc<Authority>>,
    weight: u32,
    kept_credits: u64,
    /// Evidence about the key itself, and the state computed from it: a cooldown, a probe before
    /// its end, and the credits left of the key's own cap.
    evidence: EvidenceCell,
    cooldown: CooldownCell,
    probe: ProbeCell,
    reported: ReportedRemaining,
    in_flight: AtomicU32,
    /// Whether the provider should be polled with this key soon, because the poll can confirm or
    /// refute a refusal.
    wants_poll: AtomicBool,
    /// The turn that this key has reached; see [`Traits`](crate::policy::strategy::Traits).
    turn: AtomicU64,
    last_reported: LastReported,
}

impl Key {
    pub(super) fn new(position: usize, entry: KeyEntry, workspace: Arc<Workspace>) -> Self {
        workspace.state_change_cache().invalidate();
        Self {
            position: AtomicUsize::new(position),
            api_key: entry.key,
            name: entry.name,
            workspace,
            authority: entry.authority.or(entry.found_region),
            weight: entry.weight.max(1),
            kept_credits: entry.kept_credits,
            evidence: EvidenceCell::default(),
            cooldown: CooldownCell::default(),
            probe: ProbeCell::default(),
            reported: ReportedRemaining::default(),
            in_flight: AtomicU32::new(0),
            wants_poll: AtomicBool::new(false),
            turn: AtomicU64::new(0),
            last_reported: LastReported::default(),
        }
    }

    /// Whether the key is configured as `entry` says.
    pub(super) fn matches(&self, entry: &KeyEntry, membership: &WorkspaceMembership) -> bool {
        self.name == entry.name
            && self.authority.as_ref() == entry.authority.as_ref().or(entry.found_region.as_ref())
            && self.weight == entry.weight.max(1)
            && self.kept_credits == entry.kept_credits
            && self.workspace.membership().is_same(membership)
            && membership.name().is_none_or(|name| self.workspace.membership().name() == Some(name))
    }

    /// The position in the pool, from 0. A key that was removed keeps its last position.
    #[must_use]
    pub fn position(&self) -> usize {
        self.position.load(Ordering::Acquire)
    }

    pub(super) fn set_position(&self, position: usize) {
        self.position.store(position, Ordering::Release);
    }

    /// The secret, which is sent to the provider.
    #[must_use]
    pub fn api_key(&self) -> &ApiKey {
        &self.api_key
    }

    /// The name in the configuration, if it has one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// The provider's host and port for this key; `None` for the default one.
    #[must_use]
    pub fn authority(&self) -> Option<&Arc<Authority>> {
        self.authority.as_ref()
    }

    /// The workspace that the key belongs to.
    #[must_use]
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }

    pub(super) fn workspace_arc(&self) -> &Arc<Workspace> {
        &self.workspace
    }

    /// Number of requests that hold a lease on the key now.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }

    /// The state at `now`, as reported: a key whose workspace is rate limited for speech counts as rate
    /// limited.
    #[must_use]
    pub fn state(&self, now: UnixMs) -> KeyState {
        match self.state_with(&self.workspace.quota(now), now) {
            KeyState::Usable => match self.workspace.limited_until(now) {
                Some(until) => KeyState::Resting { reason: CooldownReason::RateLimited, until: Some(until) },
                None => KeyState::Usable,
            },
            resting @ KeyState::Resting { .. } => resting,
        }
    }

    /// The state for selection, which checks concurrency groups separately.
    pub(super) fn state_with(&self, quota: &Quota, now: UnixMs) -> KeyState {
        KeyState::of(self.cooldown.load(), self.workspace.cooldown(), quota, now)
    }

    /// Current evidence about the key itself.
    #[must_use]
    pub fn evidence(&self) -> Vec<Evidence> {
        self.evidence.all()
    }

    pub(super) fn evidence_cell(&self) -> &EvidenceCell {
        &self.evidence
    }

    pub(super) fn probe(&self) -> &ProbeCell {
        &self.probe
    }

    /// Copies the state of `before`, which is the same key under another configuration.
    pub(super) fn inherit(&self, before: &Self) {
        for evidence in before.evidence() {
            self.evidence.add(evidence);
        }
        if let Some(poll) = before.evidence.poll() {
            self.evidence.polled(poll);
        }
        self.cooldown.store(before.cooldown.load());
    }

    /// Computes cooldown, probe and remaining credits from the evidence at `now`.
    pub(super) fn apply_evidence(&self, settings: &Settings, now: UnixMs) {
        // The reset date of the workspace does not apply to a key's own cap.
        let meanings = self.evidence.meanings(None, &settings.cooldowns(), now);
        // A probe is allowed only if every cooldown of the key allows it.
        let (mut joined, mut may_be_probed, mut has_shortfall) = (None::<Cooldown>, true, false);
        for meaning in meanings {
            match meaning {
                Meaning::Cooldown { cooldown, is_probable: allows_probe } => {
                    joined = Some(joined.map_or(cooldown, |earlier| earlier.joined(cooldown)));
                    may_be_probed &= allows_probe;
                }
                Meaning::Short { left, until } => {
                    has_shortfall = true;
                    self.reported.report(left, until, now);
                }
                // A concurrency group belongs to the workspace.
                Meaning::Nothing | Meaning::GroupCooldown { .. } => {}
            }
        }
        self.cooldown.store(joined);
        let may_probe = may_be_probed && joined.is_some();
        self.probe.allow(may_probe.then_some(settings.probe_after), now);
        if !has_shortfall {
            self.reported.clear();
        }
        self.workspace.state_change_cache().invalidate();
    }

    /// The key's own cooldown, even after its end.
    #[must_use]
    pub fn cooldown(&self) -> Option<Cooldown> {
        self.cooldown.load()
    }

    /// Sets the cooldown, for tests of its consequences.
    #[cfg(test)]
    pub(super) fn set_cooldown(&self, cooldown: Cooldown) {
        self.cooldown.store(Some(cooldown));
        self.workspace.state_change_cache().invalidate();
    }

    pub(super) fn weight(&self) -> u32 {
        self.weight
    }

    pub(super) fn kept_credits(&self) -> u64 {
        self.kept_credits
    }

    pub(super) fn reported(&self) -> &ReportedRemaining {
        &self.reported
    }

    pub(super) fn turn(&self) -> &AtomicU64 {
        &self.turn
    }

    /// Whether the provider should be polled with this key soon.
    #[must_use]
    pub fn wants_poll(&self) -> bool {
        self.wants_poll.load(Ordering::Acquire)
    }

    /// Requests a poll, or withdraws the request. Must be called after the evidence is evaluated: a
    /// poll that sees the request may end a cooldown.
    pub(super) fn set_wants_poll(&self, wants: bool) {
        self.wants_poll.store(wants, Ordering::Release);
    }

    /// The next moment at which the key's state may change without an event.
    pub(super) fn next_change(&self, now: UnixMs) -> Option<UnixMs> {
        self.cooldown.load().filter(|cooldown| cooldown.holds(now)).map(|cooldown| cooldown.until)
    }

    pub(super) fn report_change(&self, state: KeyState, quota: Quota, is_near: bool) -> Option<StateChange> {
        self.last_reported.update(state, quota, is_near)
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
