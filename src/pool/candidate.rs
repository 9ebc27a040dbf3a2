//! Evaluates a key for one request, as input for the selection: whether the request may use the key, whether the
//! credits suffice, and whether the concurrency group has capacity. For a key that cannot serve now, computes when it
//! may be tried again. Also computes the inputs of the ranking, claims probes, and offers a cheaper check of
//! availability. A probe is one request that tries a key during a cooldown whose reason is unproven.

use std::sync::Arc;
use std::time::Duration;

use super::cells::ProbeCell;
use super::key::Key;
use super::restrictions::RestrictionLevel;
use super::sync::Ordering;
use super::wait_queue::KeyRequest;
use crate::policy::key_state::{Cooldown, CooldownReason, KeyState};
use crate::policy::quota::{Extension, Quota};
use crate::policy::select::{Affordability, Candidate, ConcurrencyState};
use crate::policy::strategy::RankingInputs;
use crate::policy::units::UnixMs;

/// The keys that one round of a selection considers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SelectionRound {
    /// Whether only preferred keys are considered.
    pub(super) is_preferred_only: bool,
    /// Whether keys in cooldown because of exhausted credits or billing are also considered.
    pub(super) allow_exhausted: bool,
    /// The highest restriction level of the considered keys, or `None` to exclude restricted keys.
    pub(super) max_level: Option<RestrictionLevel>,
}

/// Evaluates `key`, at the given `position` of the roster, for `request` at `now`. `last_turn` is the turn of the last
/// selected key, as [`RankingInputs`] defines it.
pub(super) fn evaluate_key(
    key: &Arc<Key>,
    position: usize,
    request: &KeyRequest,
    round: SelectionRound,
    last_turn: u64,
    now: UnixMs,
) -> Candidate {
    let workspace = key.workspace();
    let quota = workspace.quota(now);
    let is_excluded = is_excluded(position, request, round);
    let level = request.restriction_level(position);
    let without_exhaustion = |state: KeyState| match state {
        KeyState::CoolingDown { reason: CooldownReason::Exhausted | CooldownReason::Billing, .. }
            if round.allow_exhausted =>
        {
            KeyState::Usable
        }
        state @ (KeyState::Usable | KeyState::CoolingDown { .. } | KeyState::Paused { .. }) => state,
    };
    let state = match without_exhaustion(key.selection_state(&quota, now)) {
        // A key that may not serve this request is treated like an invalid key.
        _ if is_excluded => KeyState::CoolingDown { reason: CooldownReason::Invalid, until: None },
        KeyState::Usable if let Some(RestrictionLevel::Until(until)) = level => {
            KeyState::CoolingDown { reason: CooldownReason::RateLimited, until: Some(until) }
        }
        state @ (KeyState::Usable | KeyState::CoolingDown { .. } | KeyState::Paused { .. }) => state,
    };
    let concurrency =
        request.group.map_or(ConcurrencyState::Free, |group| workspace.limiter(group).state(now));
    let affordability = affordability(key, request.estimate, now);
    // A key that can serve needs no probe and no time for a retry. A key that is only busy becomes available by a
    // release, not at a certain time.
    let (may_probe, retry_at) = match (state, concurrency, affordability) {
        (KeyState::Usable, ConcurrencyState::Free, Affordability::Enough)
        | (KeyState::Usable, ConcurrencyState::Full { until: None }, _) => (false, None),
        (KeyState::Usable, ConcurrencyState::Free, _) => (false, credits_change_at(key, &quota, now)),
        (_, _, affordability) => {
            let blocked = BlockedKey {
                key,
                request,
                state,
                concurrency,
                is_excluded: is_excluded || level > round.max_level,
            };
            // A key may still serve if the credits are insufficient only by the estimate of the pool.
            let credits_change_at =
                credits_change_at(key, &quota, now).filter(|_| affordability == Affordability::Refused);
            let retry_at =
                blocked.retry_at(now).map(|at| credits_change_at.map_or(at, |change| at.max(change)));
            (blocked.may_be_probed(now), retry_at)
        }
    };
    let is_level_allowed = matches!(level, Some(RestrictionLevel::Until(_))) || level <= round.max_level;
    Candidate {
        state,
        is_eligible: is_level_allowed && !request.tried.contains(&position),
        affordability,
        concurrency,
        may_probe,
        retry_at,
        ranking: ranking_inputs(key, Some(&quota), last_turn),
    }
}

/// A key that cannot serve a request now, with the reasons.
struct BlockedKey<'a> {
    key: &'a Key,
    request: &'a KeyRequest,
    state: KeyState,
    concurrency: ConcurrencyState,
    /// Whether eligibility, preference or a restriction keeps the request from the key.
    is_excluded: bool,
}

impl BlockedKey<'_> {
    /// Whether the key or its workspace is in cooldown, or the key is paused.
    fn is_unusable(&self) -> bool {
        self.state != KeyState::Usable
    }

    fn is_group_cooling_down(&self) -> bool {
        matches!(self.concurrency, ConcurrencyState::Cooling { .. })
    }

    /// Returns the probes of all current cooldowns. The key may be probed only if each of them is due.
    fn probes(&self) -> impl Iterator<Item = &ProbeCell> {
        let workspace = self.key.workspace();
        let is_unusable = self.is_unusable();
        let key_probe = (is_unusable && self.key.cooldown().is_some()).then_some(&self.key.probe);
        let workspace_probe = (is_unusable && workspace.cooldown().is_some()).then_some(&workspace.probe);
        let group = self.request.group.filter(|_| self.is_group_cooling_down());
        let group_probe = group.map(|group| &workspace.limiter(group).probe);
        [key_probe, workspace_probe, group_probe].into_iter().flatten()
    }

    fn may_be_probed(&self, now: UnixMs) -> bool {
        let is_blocked = self.is_unusable() || self.is_group_cooling_down();
        if !is_blocked || self.is_excluded || self.state.is_paused() {
            return false;
        }
        let mut probes = self.probes().peekable();
        probes.peek().is_some() && probes.all(|probe| probe.is_due(now))
    }

    /// Returns the time after `now` at which the key may serve without an event, because its cooldowns end or a probe
    /// becomes due. Ignores a probe that is due at `now`.
    fn retry_at(&self, now: UnixMs) -> Option<UnixMs> {
        let group_ends_at = match self.concurrency {
            ConcurrencyState::Free | ConcurrencyState::Full { until: None } => None,
            ConcurrencyState::Full { until: Some(until) } | ConcurrencyState::Cooling { until } => {
                Some(until)
            }
        };
        let ends_at = match self.state {
            KeyState::Usable => group_ends_at,
            KeyState::CoolingDown { until, .. } | KeyState::Paused { until, .. } => {
                until.map(|until| until.max(group_ends_at.unwrap_or(until)))
            }
        };
        if self.is_excluded || self.state.is_paused() {
            return ends_at;
        }
        let probes: Option<Vec<UnixMs>> = self.probes().map(|probe| probe.retry_at(now)).collect();
        let probe_at = probes.and_then(|times| times.into_iter().max()).filter(|at| *at > now);
        ends_at.into_iter().chain(probe_at).min()
    }
}

/// Returns the time at which a key without sufficient credits may have enough without an event, because the credits
/// are reset or a report of remaining credits expires.
fn credits_change_at(key: &Key, quota: &Quota, now: UnixMs) -> Option<UnixMs> {
    let reports = [&key.reported_remaining, &key.workspace().quota_cell.reported_remaining];
    let expirations = reports.map(|report| report.expires_at(now));
    expirations.into_iter().chain([quota.resets_at]).flatten().min()
}

/// Claims the probes of all cooldowns that keep `request` from `key`. Returns `false` if another request has claimed
/// one of them first.
pub(super) fn claim_probe(key: &Key, request: &KeyRequest, delay: Duration, now: UnixMs) -> bool {
    let workspace = key.workspace();
    let group_probe = request.group.map(|group| &workspace.limiter(group).probe);
    let group_probe = group_probe.filter(|probe| probe.allowed_at().is_some());
    let is_active = |cooldown: &Cooldown| cooldown.is_active(now);
    let key_probe = key.cooldown().filter(is_active).map(|_| &key.probe);
    let workspace_probe = workspace.cooldown().filter(is_active).map(|_| &workspace.probe);
    let probes = [key_probe, workspace_probe, group_probe];
    probes.into_iter().flatten().all(|probe| probe.claim(delay, now))
}

/// Returns the inputs of a strategy for a key. Without `quota`, the credits are unknown to the strategy.
pub(super) fn ranking_inputs(key: &Key, quota: Option<&Quota>, last_turn: u64) -> RankingInputs {
    let workspace = key.workspace();
    RankingInputs {
        remaining: quota.and_then(|quota| remaining_credits(quota, workspace.reserved())),
        resets_at: quota.and_then(|quota| quota.resets_at),
        in_flight: workspace.in_flight(),
        turn: key.turn.load(Ordering::Acquire).max(last_turn),
        weight: key.weight,
    }
}

/// Whether the key at `position` may not serve `request`, or is not considered in `round` because it is not preferred.
fn is_excluded(position: usize, request: &KeyRequest, round: SelectionRound) -> bool {
    request.is_ineligible(position) || (round.is_preferred_only && !request.is_preferred(position))
}

/// Whether `key` is paused, in cooldown or exhausted, or may not serve `request`. This check is cheaper than
/// [`evaluate_key`].
pub(super) fn is_unavailable(
    key: &Key,
    position: usize,
    request: &KeyRequest,
    round: SelectionRound,
    now: UnixMs,
) -> bool {
    // A key without credits is unavailable regardless of the rest of its state.
    let is_exhausted = !round.allow_exhausted && key.workspace().quota_cell.is_exhausted(now);
    if is_exhausted || is_excluded(position, request, round) {
        return true;
    }
    match key.selection_state(&key.workspace().quota(now), now) {
        KeyState::Usable => false,
        KeyState::CoolingDown {
            reason: CooldownReason::RateLimited | CooldownReason::Invalid | CooldownReason::WrongHost,
            ..
        }
        | KeyState::Paused { .. } => true,
        KeyState::CoolingDown { reason: CooldownReason::Billing | CooldownReason::Exhausted, .. } => {
            !round.allow_exhausted
        }
    }
}

/// Returns the credits that are neither spent nor reserved, or `None` if the limit is unknown.
fn remaining_credits(quota: &Quota, reserved: u64) -> Option<u64> {
    match quota.extension {
        Extension::Unlimited => Some(u64::MAX),
        Extension::None | Extension::Credits(_) => Some(quota.spendable()?.saturating_sub(reserved)),
    }
}

/// Returns whether the credits of `key` and its workspace suffice for a request with the given `estimate`.
fn affordability(key: &Key, estimate: Option<u64>, now: UnixMs) -> Affordability {
    let quota = &key.workspace().quota_cell;
    let reports = [&key.reported_remaining, &quota.reported_remaining].map(|report| report.credits(now));
    let reported_credits = reports.into_iter().flatten().min();
    match (estimate, reported_credits) {
        // A request that costs no credits needs none.
        (Some(0), _) | (None, None) => Affordability::Enough,
        // The provider refused an earlier request for its price, and the cost of this request is unknown.
        (None, Some(_)) => Affordability::Short { is_unreserved: quota.may_overcommit() },
        // The report is about all replicas together, so the credits must also fit into the share of this replica.
        (Some(credits), Some(remaining)) if credits <= remaining => {
            if quota.fits_share(credits) {
                Affordability::Enough
            } else {
                Affordability::Short { is_unreserved: quota.may_overcommit() }
            }
        }
        (Some(_), Some(_)) => Affordability::Refused,
        (Some(credits), None) if quota.fits(credits, key.kept_credits) => Affordability::Enough,
        // A request that exceeds the ceiling must not spend the credits that the key leaves unspent.
        (Some(_), None) if key.kept_credits > 0 && quota.may_overcommit() => Affordability::Refused,
        (Some(_), None) => Affordability::Short { is_unreserved: quota.may_overcommit() },
    }
}
