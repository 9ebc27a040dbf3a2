//! A key as one request sees it: whether it may use it, whether it can pay, whether there is room.

use std::sync::Arc;
use std::time::Duration;

use super::cells::ProbeCell;
use super::key::Key;
use super::line::Ask;
use super::restrictions::Restraint;
use super::sync::Ordering;
use crate::policy::budget::{Extension, Quota};
use crate::policy::select::{Candidate, Means, Room};
use crate::policy::standing::{ParkReason, Standing};
use crate::policy::strategy::Traits;
use crate::policy::units::UnixMs;

/// How far a choice goes to find a key for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Round {
    /// Only to those that are asked first.
    pub(super) is_at_home: bool,
    /// To those without credits, too.
    pub(super) spares_credits: bool,
    /// To those that are restricted so far.
    pub(super) up_to: Option<Restraint>,
}

/// How `key`, at that position, looks for what is asked at `now`. `turn` is the turn of the key that
/// was chosen last.
pub(super) fn candidate(
    key: &Arc<Key>,
    position: usize,
    ask: &Ask,
    round: Round,
    turn: u64,
    now: UnixMs,
) -> Candidate {
    let workspace = key.workspace();
    let quota = workspace.quota(now);
    let is_barred = is_barred(position, ask, round);
    let restraint = ask.restraint(position);
    let spares = |standing: Standing| match standing {
        Standing::Resting { reason: ParkReason::Exhausted | ParkReason::Billing, .. }
            if round.spares_credits =>
        {
            Standing::Usable
        }
        standing @ (Standing::Usable | Standing::Resting { .. }) => standing,
    };
    let standing = match spares(key.standing_with(&quota, now)) {
        // One that is not for this request is like one that is refused for good.
        _ if is_barred => Standing::Resting { reason: ParkReason::Invalid, until: None },
        Standing::Usable if let Some(Restraint::Until(until)) = restraint => {
            Standing::Resting { reason: ParkReason::RateLimited, until: Some(until) }
        }
        standing @ (Standing::Usable | Standing::Resting { .. }) => standing,
    };
    let room = ask.lane.map_or(Room::Free, |lane| workspace.room(lane).look(now));
    let means = means(key, ask.estimate, now);
    // Nearly always it serves, and nothing more is to be found out.
    let (may_probe, again_at) = match (standing, room, means) {
        (Standing::Usable, Room::Free, Means::Enough) | (Standing::Usable, Room::Full { until: None }, _) => {
            (false, None)
        }
        (Standing::Usable, Room::Free, _) => (false, credits_change_at(key, &quota, now)),
        (_, _, means) => {
            let rest = Rest { key, ask, standing, room, is_foreign: is_barred || restraint > round.up_to };
            // One that is only short by our estimate may be asked all the same.
            let credits_at = credits_change_at(key, &quota, now).filter(|_| means == Means::Refused);
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
        is_eligible: is_within && !ask.excluded.contains(&position),
        means,
        room,
        may_probe,
        again_at,
        traits: traits(key, Some(&quota), turn),
    }
}

/// What keeps a key from serving a request now.
struct Rest<'a> {
    key: &'a Key,
    ask: &'a Ask,
    standing: Standing,
    room: Room,
    /// Whether it is kept from this request by more than its state.
    is_foreign: bool,
}

impl Rest<'_> {
    /// The tries that all that it rests for would have to allow.
    fn probes(&self) -> impl Iterator<Item = &ProbeCell> {
        let workspace = self.key.workspace();
        let of = |is_in_force: bool, probe| is_in_force.then_some(probe);
        let is_resting = self.standing != Standing::Usable;
        let limited = self.ask.lane.filter(|_| matches!(self.room, Room::Cooling { .. }));
        let own = of(is_resting && self.key.parked().is_some(), self.key.probe());
        let shared = of(is_resting && workspace.parked().is_some(), workspace.probe());
        [own, shared, limited.map(|lane| workspace.room(lane).probe())].into_iter().flatten()
    }

    fn may_be_probed(&self, now: UnixMs) -> bool {
        let rests = self.standing != Standing::Usable || matches!(self.room, Room::Cooling { .. });
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
            Standing::Usable => None,
            Standing::Resting { until, .. } => Some(until),
        };
        let of_room = match self.room {
            Room::Free | Room::Full { until: None } => None,
            Room::Full { until: Some(until) } | Room::Cooling { until } => Some(Some(until)),
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
pub(super) fn claim_probe(key: &Key, ask: &Ask, pause: Duration, now: UnixMs) -> bool {
    let workspace = key.workspace();
    let room = ask.lane.map(|lane| workspace.room(lane)).filter(|room| room.probe().at().is_some());
    let own = key.parked().filter(|park| park.holds(now)).map(|_| key.probe());
    let shared = workspace.parked().filter(|park| park.holds(now)).map(|_| workspace.probe());
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

fn is_barred(position: usize, ask: &Ask, round: Round) -> bool {
    ask.bars(position) || (round.is_at_home && !ask.is_at_home(position))
}

/// Whether a look at `key` would find only that it rests, or is not for this request.
pub(super) fn is_closed(key: &Key, position: usize, ask: &Ask, round: Round, now: UnixMs) -> bool {
    if is_barred(position, ask, round) {
        return true;
    }
    match key.standing_with(&key.workspace().quota(now), now) {
        Standing::Usable => false,
        Standing::Resting {
            reason: ParkReason::RateLimited | ParkReason::Invalid | ParkReason::WrongHost,
            ..
        } => true,
        Standing::Resting { reason: ParkReason::Billing | ParkReason::Exhausted, .. } => {
            !round.spares_credits
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

fn means(key: &Key, estimate: Option<u64>, now: UnixMs) -> Means {
    let quota = key.workspace().cell();
    let reported = match (key.reported().left(now), quota.reported().left(now)) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    };
    match (estimate, reported) {
        // What is free needs no credits.
        (Some(0), _) | (None, None) => Means::Enough,
        // Something was too dear; whether this is, nothing says.
        (None, Some(_)) => Means::Short { is_undisturbed: quota.reserved() == 0 },
        (Some(credits), Some(left)) if credits <= left => Means::Enough,
        (Some(_), Some(_)) => Means::Refused,
        (Some(credits), None) if quota.fits(credits, key.kept_credits()) => Means::Enough,
        // The last resort is no reason to spend what is left for others.
        (Some(_), None) if key.kept_credits() > 0 && quota.reserved() == 0 => Means::Refused,
        (Some(_), None) => Means::Short { is_undisturbed: quota.reserved() == 0 },
    }
}
