//! Evaluates a key for one request: whether the request may use it, whether its credits suffice, and
//! whether its concurrency group has capacity.

use std::sync::Arc;
use std::time::Duration;

use super::cells::ProbeCell;
use super::key::Key;
use super::restrictions::Restraint;
use super::sync::Ordering;
use super::wait_queue::KeyRequest;
use crate::policy::budget::{Extension, Quota};
use crate::policy::key_state::{CooldownReason, KeyState};
use crate::policy::select::{Affordability, Candidate, ConcurrencyState};
use crate::policy::strategy::Traits;
use crate::policy::units::UnixMs;

/// The limits on the keys that one round of a selection considers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SelectionRound {
    /// Whether only the keys that the request prefers are considered.
    pub(super) is_preferred_only: bool,
    /// Whether keys without credits are considered, too.
    pub(super) allow_exhausted: bool,
    /// The highest restraint of the keys that are considered; `None` excludes restricted keys.
    pub(super) max_restraint: Option<Restraint>,
}

/// Evaluates `key`, at this position, for `request` at `now`. `turn` is the turn of the key that was
/// selected last.
pub(super) fn candidate(
    key: &Arc<Key>,
    position: usize,
    request: &KeyRequest,
    round: SelectionRound,
    turn: u64,
    now: UnixMs,
) -> Candidate {
    let workspace = key.workspace();
    let quota = workspace.quota(now);
    let is_excluded = is_excluded(position, request, round);
    let restraint = request.restraint(position);
    let ignore_exhaustion = |state: KeyState| match state {
        KeyState::Resting { reason: CooldownReason::Exhausted | CooldownReason::Billing, .. }
            if round.allow_exhausted =>
        {
            KeyState::Usable
        }
        state @ (KeyState::Usable | KeyState::Resting { .. }) => state,
    };
    let state = match ignore_exhaustion(key.state_with(&quota, now)) {
        // A key that may not serve this request is treated like an invalid one.
        _ if is_excluded => KeyState::Resting { reason: CooldownReason::Invalid, until: None },
        KeyState::Usable if let Some(Restraint::Until(until)) = restraint => {
            KeyState::Resting { reason: CooldownReason::RateLimited, until: Some(until) }
        }
        state @ (KeyState::Usable | KeyState::Resting { .. }) => state,
    };
    let concurrency =
        request.group.map_or(ConcurrencyState::Free, |group| workspace.limiter(group).state(now));
    let affordability = affordability(key, request.estimate, now);
    // In the usual case the key serves, and no probe or retry time is needed.
    let (may_probe, again_at) = match (state, concurrency, affordability) {
        (KeyState::Usable, ConcurrencyState::Free, Affordability::Enough)
        | (KeyState::Usable, ConcurrencyState::Full { until: None }, _) => (false, None),
        (KeyState::Usable, ConcurrencyState::Free, _) => (false, credits_change_at(key, &quota, now)),
        (_, _, affordability) => {
            let blocked = BlockedKey {
                key,
                request,
                state,
                concurrency,
                is_excluded: is_excluded || restraint > round.max_restraint,
            };
            // A key whose credits fall short only by our estimate may still serve.
            let credits_at =
                credits_change_at(key, &quota, now).filter(|_| affordability == Affordability::Refused);
            let ends_at = blocked.ends_at(now);
            (blocked.may_be_probed(now), ends_at.map(|at| credits_at.map_or(at, |credits| at.max(credits))))
        }
    };
    let is_within_restraint = match restraint {
        None | Some(Restraint::Until(_)) => true,
        restraint @ Some(_) => restraint <= round.max_restraint,
    };
    Candidate {
        state,
        is_eligible: is_within_restraint && !request.tried.contains(&position),
        affordability,
        concurrency,
        may_probe,
        again_at,
        traits: traits(key, Some(&quota), turn),
    }
}

/// The conditions that keep a key from serving a request now.
struct BlockedKey<'a> {
    key: &'a Key,
    request: &'a KeyRequest,
    state: KeyState,
    concurrency: ConcurrencyState,
    /// Whether eligibility, preference or a restriction keeps the request from the key.
    is_excluded: bool,
}

impl BlockedKey<'_> {
    /// The probe cells of all cooldowns in force. A probe needs the permission of each of them.
    fn probes(&self) -> impl Iterator<Item = &ProbeCell> {
        let workspace = self.key.workspace();
        let probe_if = |is_in_force: bool, probe| is_in_force.then_some(probe);
        let is_cooling_down = self.state != KeyState::Usable;
        let limited =
            self.request.group.filter(|_| matches!(self.concurrency, ConcurrencyState::Cooling { .. }));
        let key_probe = probe_if(is_cooling_down && self.key.cooldown().is_some(), self.key.probe());
        let workspace_probe = probe_if(is_cooling_down && workspace.cooldown().is_some(), workspace.probe());
        [key_probe, workspace_probe, limited.map(|group| workspace.limiter(group).probe())]
            .into_iter()
            .flatten()
    }

    fn may_be_probed(&self, now: UnixMs) -> bool {
        let is_cooling_down =
            self.state != KeyState::Usable || matches!(self.concurrency, ConcurrencyState::Cooling { .. });
        if !is_cooling_down || self.is_excluded {
            return false;
        }
        let mut probes = self.probes().peekable();
        probes.peek().is_some() && probes.all(|probe| probe.is_due(now))
    }

    /// The time after `now` at which the key may serve without an event: its cooldown ends, or a
    /// probe is allowed. Ignores a probe that is allowed already.
    fn ends_at(&self, now: UnixMs) -> Option<UnixMs> {
        let state_ends = match self.state {
            KeyState::Usable => None,
            KeyState::Resting { until, .. } => Some(until),
        };
        let concurrency_ends = match self.concurrency {
            ConcurrencyState::Free | ConcurrencyState::Full { until: None } => None,
            ConcurrencyState::Full { until: Some(until) } | ConcurrencyState::Cooling { until } => {
                Some(Some(until))
            }
        };
        let ends = match (state_ends, concurrency_ends) {
            (Some(one), Some(other)) => one.zip(other).map(|(one, other)| one.max(other)),
            (one, other) => one.or(other).flatten(),
        };
        if self.is_excluded {
            return ends;
        }
        let probes = || self.probes().map(|probe| probe.retry_at(now));
        let probe = if probes().all(|at| at.is_some()) { probes().flatten().max() } else { None };
        [ends, probe.filter(|at| *at > now)].into_iter().flatten().min()
    }
}

/// The time at which a key with too few credits may have enough without an event: its credits are
/// reset, or a report of remaining credits expires.
fn credits_change_at(key: &Key, quota: &Quota, now: UnixMs) -> Option<UnixMs> {
    let reports = [key.reported(), key.workspace().cell().reported()].map(|report| report.ends_at(now));
    reports.into_iter().chain([quota.resets_at]).flatten().min()
}

/// Claims the probes of all cooldowns of `key`. Returns `false` when another request claimed one
/// first.
pub(super) fn claim_probe(key: &Key, request: &KeyRequest, pause: Duration, now: UnixMs) -> bool {
    let workspace = key.workspace();
    let limiter =
        request.group.map(|group| workspace.limiter(group)).filter(|limiter| limiter.probe().at().is_some());
    let key_probe = key.cooldown().filter(|cooldown| cooldown.holds(now)).map(|_| key.probe());
    let workspace_probe =
        workspace.cooldown().filter(|cooldown| cooldown.holds(now)).map(|_| workspace.probe());
    let claims = [key_probe, workspace_probe, limiter.map(|limiter| limiter.probe())];
    claims.into_iter().flatten().all(|probe| probe.claim(pause, now))
}

/// The inputs of a strategy for a key; its credits are those of `quota`.
pub(super) fn traits(key: &Key, quota: Option<&Quota>, turn: u64) -> Traits {
    let workspace = key.workspace();
    Traits {
        remaining: quota.and_then(|quota| remaining(quota, workspace.reserved())),
        resets_at: quota.and_then(|quota| quota.resets_at),
        in_flight: workspace.in_flight(),
        turn: key.turn().load(Ordering::Acquire).max(turn),
        weight: key.weight(),
    }
}

fn is_excluded(position: usize, request: &KeyRequest, round: SelectionRound) -> bool {
    request.is_ineligible(position) || (round.is_preferred_only && !request.is_preferred(position))
}

/// Whether `key` is in cooldown or may not serve this request. This check is cheaper than an
/// evaluation.
pub(super) fn is_unavailable(
    key: &Key,
    position: usize,
    request: &KeyRequest,
    round: SelectionRound,
    now: UnixMs,
) -> bool {
    if is_excluded(position, request, round) {
        return true;
    }
    match key.state_with(&key.workspace().quota(now), now) {
        KeyState::Usable => false,
        KeyState::Resting {
            reason: CooldownReason::RateLimited | CooldownReason::Invalid | CooldownReason::WrongHost,
            ..
        } => true,
        KeyState::Resting { reason: CooldownReason::Billing | CooldownReason::Exhausted, .. } => {
            !round.allow_exhausted
        }
    }
}

/// Credits that are neither spent nor reserved.
fn remaining(quota: &Quota, reserved: u64) -> Option<u64> {
    match quota.extension {
        Extension::Unlimited => Some(u64::MAX),
        Extension::None | Extension::Credits(_) => Some(quota.spendable()?.saturating_sub(reserved)),
    }
}

fn affordability(key: &Key, estimate: Option<u64>, now: UnixMs) -> Affordability {
    let quota = key.workspace().cell();
    let reported = match (key.reported().left(now), quota.reported().left(now)) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    };
    match (estimate, reported) {
        // A free request needs no credits.
        (Some(0), _) | (None, None) => Affordability::Enough,
        // The provider refused an earlier request for its price, and the cost of this one is
        // unknown.
        (None, Some(_)) => Affordability::Short { is_undisturbed: quota.reserved() == 0 },
        (Some(credits), Some(left)) if credits <= left => Affordability::Enough,
        (Some(_), Some(_)) => Affordability::Refused,
        (Some(credits), None) if quota.fits(credits, key.kept_credits()) => Affordability::Enough,
        // An overcommitted request must not spend the credits that the key keeps for others.
        (Some(_), None) if key.kept_credits() > 0 && quota.reserved() == 0 => Affordability::Refused,
        (Some(_), None) => Affordability::Short { is_undisturbed: quota.reserved() == 0 },
    }
}
