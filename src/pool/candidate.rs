//! A key as one request sees it: whether it may use it, whether it can pay, whether there is room.

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

/// How far a choice goes to find a key for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SelectionRound {
    /// Only to those that are asked first.
    pub(super) is_preferred_only: bool,
    /// To those without credits, too.
    pub(super) allow_exhausted: bool,
    /// To those that are restricted so far.
    pub(super) up_to: Option<Restraint>,
}

/// How `key`, at that position, looks for what is asked at `now`. `turn` is the turn of the key that
/// was chosen last.
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
    let is_barred = is_barred(position, request, round);
    let restraint = request.restraint(position);
    let spares = |standing: KeyState| match standing {
        KeyState::Resting { reason: CooldownReason::Exhausted | CooldownReason::Billing, .. }
            if round.allow_exhausted =>
        {
            KeyState::Usable
        }
        standing @ (KeyState::Usable | KeyState::Resting { .. }) => standing,
    };
    let standing = match spares(key.state_with(&quota, now)) {
        // One that is not for this request is like one that is refused for good.
        _ if is_barred => KeyState::Resting { reason: CooldownReason::Invalid, until: None },
        KeyState::Usable if let Some(Restraint::Until(until)) = restraint => {
            KeyState::Resting { reason: CooldownReason::RateLimited, until: Some(until) }
        }
        standing @ (KeyState::Usable | KeyState::Resting { .. }) => standing,
    };
    let room = request.group.map_or(ConcurrencyState::Free, |group| workspace.limiter(group).look(now));
    let means = means(key, request.estimate, now);
    // Nearly always it serves, and nothing more is to be found out.
    let (may_probe, again_at) = match (standing, room, means) {
        (KeyState::Usable, ConcurrencyState::Free, Affordability::Enough)
        | (KeyState::Usable, ConcurrencyState::Full { until: None }, _) => (false, None),
        (KeyState::Usable, ConcurrencyState::Free, _) => (false, credits_change_at(key, &quota, now)),
        (_, _, means) => {
            let rest =
                RestingKey { key, request, standing, room, is_foreign: is_barred || restraint > round.up_to };
            // One that is only short by our estimate may be asked all the same.
            let credits_at = credits_change_at(key, &quota, now).filter(|_| means == Affordability::Refused);
            let ends_at = rest.ends_at(now);
            (rest.may_be_probed(now), ends_at.map(|at| credits_at.map_or(at, |credits| at.max(credits))))
        }
    };
    let is_within = match restraint {
        None | Some(Restraint::Until(_)) => true,
        restraint @ Some(_) => restraint <= round.up_to,
    };
    Candidate {
        standing,
        is_eligible: is_within && !request.tried.contains(&position),
        means,
        room,
        may_probe,
        again_at,
        traits: traits(key, Some(&quota), turn),
    }
}

/// What keeps a key from serving a request now.
struct RestingKey<'a> {
    key: &'a Key,
    request: &'a KeyRequest,
    standing: KeyState,
    room: ConcurrencyState,
    /// Whether it is kept from this request by more than its state.
    is_foreign: bool,
}

impl RestingKey<'_> {
    /// The tries that all that it rests for would have to allow.
    fn probes(&self) -> impl Iterator<Item = &ProbeCell> {
        let workspace = self.key.workspace();
        let of = |is_in_force: bool, probe| is_in_force.then_some(probe);
        let is_resting = self.standing != KeyState::Usable;
        let limited = self.request.group.filter(|_| matches!(self.room, ConcurrencyState::Cooling { .. }));
        let own = of(is_resting && self.key.cooldown().is_some(), self.key.probe());
        let shared = of(is_resting && workspace.cooldown().is_some(), workspace.probe());
        [own, shared, limited.map(|group| workspace.limiter(group).probe())].into_iter().flatten()
    }

    fn may_be_probed(&self, now: UnixMs) -> bool {
        let rests =
            self.standing != KeyState::Usable || matches!(self.room, ConcurrencyState::Cooling { .. });
        if !rests || self.is_foreign {
            return false;
        }
        let mut probes = self.probes().peekable();
        probes.peek().is_some() && probes.all(|probe| probe.is_due(now))
    }

    /// When it may serve by itself, later than now: its rest is over, or a try is allowed. A try that is
    /// allowed already is not waited for.
    fn ends_at(&self, now: UnixMs) -> Option<UnixMs> {
        let of_standing = match self.standing {
            KeyState::Usable => None,
            KeyState::Resting { until, .. } => Some(until),
        };
        let of_room = match self.room {
            ConcurrencyState::Free | ConcurrencyState::Full { until: None } => None,
            ConcurrencyState::Full { until: Some(until) } | ConcurrencyState::Cooling { until } => {
                Some(Some(until))
            }
        };
        let ends = match (of_standing, of_room) {
            (Some(one), Some(other)) => one.zip(other).map(|(one, other)| one.max(other)),
            (one, other) => one.or(other).flatten(),
        };
        if self.is_foreign {
            return ends;
        }
        let probes = || self.probes().map(|probe| probe.look_again_at(now));
        let probe = if probes().all(|at| at.is_some()) { probes().flatten().max() } else { None };
        [ends, probe.filter(|at| *at > now)].into_iter().flatten().min()
    }
}

/// When a key that cannot pay may be able to by itself: its credits come back, or a report of what is
/// left ends.
fn credits_change_at(key: &Key, quota: &Quota, now: UnixMs) -> Option<UnixMs> {
    let reports = [key.reported(), key.workspace().cell().reported()].map(|report| report.ends_at(now));
    reports.into_iter().chain([quota.resets_at]).flatten().min()
}

/// Takes the tries of all that `key` rests for. `false` when another request was faster.
pub(super) fn claim_probe(key: &Key, request: &KeyRequest, pause: Duration, now: UnixMs) -> bool {
    let workspace = key.workspace();
    let room = request.group.map(|group| workspace.limiter(group)).filter(|room| room.probe().at().is_some());
    let own = key.cooldown().filter(|cooldown| cooldown.holds(now)).map(|_| key.probe());
    let shared = workspace.cooldown().filter(|cooldown| cooldown.holds(now)).map(|_| workspace.probe());
    let claims = [own, shared, room.map(|room| room.probe())];
    claims.into_iter().flatten().all(|probe| probe.claim(pause, now))
}

/// What a strategy sees of a key; of its credits, what `quota` says.
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

fn is_barred(position: usize, request: &KeyRequest, round: SelectionRound) -> bool {
    request.is_ineligible(position) || (round.is_preferred_only && !request.is_preferred(position))
}

/// Whether a look at `key` would find only that it rests, or is not for this request.
pub(super) fn is_closed(
    key: &Key,
    position: usize,
    request: &KeyRequest,
    round: SelectionRound,
    now: UnixMs,
) -> bool {
    if is_barred(position, request, round) {
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

/// Credits that nobody has spent or reserved.
fn remaining(quota: &Quota, reserved: u64) -> Option<u64> {
    match quota.extension {
        Extension::Unlimited => Some(u64::MAX),
        Extension::None | Extension::Credits(_) => Some(quota.spendable()?.saturating_sub(reserved)),
    }
}

fn means(key: &Key, estimate: Option<u64>, now: UnixMs) -> Affordability {
    let quota = key.workspace().cell();
    let reported = match (key.reported().left(now), quota.reported().left(now)) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    };
    match (estimate, reported) {
        // What is free needs no credits.
        (Some(0), _) | (None, None) => Affordability::Enough,
        // Something was too dear; whether this is, nothing says.
        (None, Some(_)) => Affordability::Short { is_undisturbed: quota.reserved() == 0 },
        (Some(credits), Some(left)) if credits <= left => Affordability::Enough,
        (Some(_), Some(_)) => Affordability::Refused,
        (Some(credits), None) if quota.fits(credits, key.kept_credits()) => Affordability::Enough,
        // The last resort is no reason to spend what is left for others.
        (Some(_), None) if key.kept_credits() > 0 && quota.reserved() == 0 => Affordability::Refused,
        (Some(_), None) => Affordability::Short { is_undisturbed: quota.reserved() == 0 },
    }
}
