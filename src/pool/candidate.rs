//! A key as one request sees it: whether it may use it, whether it can pay, whether there is room.

use std::sync::Arc;

use super::key::Key;
use super::line::Ask;
use super::sync::Ordering;
use crate::policy::budget::{Extension, Quota};
use crate::policy::select::{Candidate, Means, Room};
use crate::policy::standing::{Park, ParkReason, Standing};
use crate::policy::strategy::Traits;
use crate::policy::units::UnixMs;

/// How far a choice goes to find a key for one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Round {
    /// Only to those that are asked first.
    pub(super) is_at_home: bool,
    /// To those without credits, too.
    pub(super) spares_credits: bool,
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
    let lacks = ask.permission.is_some_and(|permission| key.lacks().has(permission, now));
    let is_barred = is_barred(position, ask, round);
    let standing = match key.standing_with(&quota, now) {
        // One that is not for this request is like one that is refused for good.
        _ if is_barred => Standing::Resting { reason: ParkReason::Invalid, until: None },
        Standing::Resting { reason: ParkReason::Exhausted | ParkReason::Billing, .. }
            if round.spares_credits =>
        {
            Standing::Usable
        }
        standing @ (Standing::Usable | Standing::Resting { .. }) => standing,
    };
    Candidate {
        standing,
        is_eligible: !lacks && !ask.excluded.contains(&position),
        means: means(key, ask.estimate, now),
        room: ask.lane.map_or(Room::Free, |lane| workspace.room(lane).look(now)),
        traits: traits(key, Some(&quota), turn),
    }
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
    match key.standing(now) {
        Standing::Usable | Standing::Resting { reason: ParkReason::Short, .. } => false,
        Standing::Resting { reason: ParkReason::RateLimited | ParkReason::Invalid, .. } => true,
        Standing::Resting { reason: ParkReason::Billing, .. } => !round.spares_credits,
        // Unless the provider has said that there is something left.
        Standing::Resting { reason: ParkReason::Exhausted, .. } => {
            let is_told = key.told().left().is_some() || key.workspace().cell().told().left().is_some();
            !round.spares_credits && !is_told
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
    let holds =
        |park: Option<Park>| park.is_some_and(|park| park.reason == ParkReason::Exhausted && park.holds(now));
    let of_key = key.told().left().filter(|_| holds(key.parked()));
    let of_workspace = quota.told().left().filter(|_| holds(key.workspace().parked()));
    let told = match (of_key, of_workspace) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (one, other) => one.or(other),
    };
    match (estimate, told) {
        // What is free needs no credits, and yet is not what an empty key is for.
        (Some(0), _) | (None, None) => Means::Enough,
        (None, Some(_)) => Means::Refused,
        (Some(credits), Some(left)) if credits <= left => Means::StillEnough,
        (Some(_), Some(_)) => Means::Refused,
        (Some(credits), None) if quota.fits(credits, key.kept_credits()) => Means::Enough,
        // The last resort is no reason to spend what is left for others.
        (Some(_), None) if key.kept_credits() > 0 && quota.reserved() == 0 => Means::Refused,
        (Some(_), None) => Means::Short { is_undisturbed: quota.reserved() == 0 },
    }
}
