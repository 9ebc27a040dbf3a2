//! Reserves a key for a request: selects a key, acquires a lease on it, and queues the request when the keys that could
//! serve it are only busy. Also records the key in use and the keys that were skipped for too few credits.
//!
//! Selection reads atomics without a lock. If another request acquires the selected key first, the
//! selection is repeated.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::Pool;
use super::candidate::{SelectionRound, claim_probe, evaluate_key, is_unavailable, ranking_inputs};
use super::key::Key;
use super::lease::Lease;
use super::restrictions::RestrictionLevel;
use super::roster::Roster;
use super::sync::Ordering;
use super::transitions::{Transition, key_transition};
use super::wait_queue::{KeyRequest, ReserveResult, TryReserveResult};
use crate::clock;
use crate::policy::key_state::{KeyState, StateChange};
use crate::policy::select::{Affordability, Candidate, Choice, SelectionFailure, Unavailable, select};
use crate::policy::strategy::TURN;
use crate::policy::units::UnixMs;

/// A lease, with the state changes that its reservation caused.
#[derive(Debug)]
pub struct Reserved {
    /// The lease on the selected key.
    pub lease: Lease,
    /// State changes, which the caller logs.
    pub transitions: Vec<Transition>,
}

/// Maximum number of selections per call whose key another request has acquired first. Each such selection means that
/// another request was served.
const MAX_LOST_RACES: usize = 64;
/// The maximum restriction level of each successive round. The round before them excludes restricted keys.
const MAX_LEVELS: [RestrictionLevel; 3] =
    [RestrictionLevel::Inferred, RestrictionLevel::RefusedLongest, RestrictionLevel::Refused];
/// Delay of the retry after [`MAX_LOST_RACES`], and minimum delay of every other retry.
const MIN_RETRY_DELAY: Duration = Duration::from_millis(1);

impl Pool {
    /// Reserves a key of `roster` for `request`. If the keys that could serve it are only busy, the request
    /// is queued for at most the `queue_timeout` of the pool.
    ///
    /// # Errors
    ///
    /// Fails if no key can serve the request before the timeout, or if a reload has replaced the roster while the
    /// request was queued. The error is the reason.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future removes the request from the queue. If a key was assigned to the request
    /// already, the key is released.
    pub async fn reserve(self: &Arc<Self>, roster: &Arc<Roster>, request: &KeyRequest) -> ReserveResult {
        if self.queue.is_empty() {
            let now = clock::now();
            match self.try_reserve(roster, request, now) {
                Err(blocked) if blocked.is_worth_waiting(now) => {}
                result => return result.map_err(|blocked| blocked.reason),
            }
        }
        self.wait_in_queue(roster, request).await
    }

    /// Queues `request` until a key is assigned to it, no key can serve it any more, or the timeout ends.
    async fn wait_in_queue(self: &Arc<Self>, roster: &Arc<Roster>, request: &KeyRequest) -> ReserveResult {
        let settings = roster.settings;
        let Some((waiter, mut receiver)) = self.queue.enqueue(roster, request, settings.max_queued) else {
            // The queue is full. The request is still served if it can use a key that no queued request can use.
            let result = self.try_reserve(roster, request, clock::now()).map_err(|blocked| blocked.reason);
            if result.is_ok() {
                self.dispatch_waiters_now();
            }
            return result;
        };
        self.demand_increase.notify_one();
        let busy = || Err(Unavailable::Full { until: None });
        let waiting = async {
            loop {
                self.dispatch_waiters(clock::now());
                // A key may become available without a release, when a cooldown ends. The earliest end may
                // change while the request is queued.
                loop {
                    let now = clock::now();
                    let retry_in = waiter.retry_at().map(|at| at.since(now).max(MIN_RETRY_DELAY));
                    tokio::select! {
                        biased;
                        result = &mut receiver => return result.unwrap_or_else(|_| busy()),
                        () = waiter.retry_moved_earlier() => {}
                        () = sleep(retry_in.unwrap_or(settings.queue_timeout)) => break,
                    }
                }
            }
        };
        match timeout(settings.queue_timeout, waiting).await {
            Ok(result) => result,
            Err(_) => {
                drop(waiter);
                // A key may have been assigned just before the timeout.
                receiver.try_recv().unwrap_or_else(|_| busy())
            }
        }
    }

    /// Assigns available keys to queued requests.
    pub(super) fn dispatch_waiters(self: &Arc<Self>, now: UnixMs) {
        if !self.queue.is_empty() {
            self.queue.dispatch(now, |roster, request| self.try_reserve(roster, request, now));
        }
    }

    /// Assigns available keys to queued requests at the current time. Reads the clock only if requests are
    /// queued.
    pub(super) fn dispatch_waiters_now(self: &Arc<Self>) {
        if !self.queue.is_empty() {
            self.dispatch_waiters(clock::now());
        }
    }

    /// Reserves a key without waiting. Returns the reason if no key can serve the request now.
    pub(super) fn try_reserve(
        self: &Arc<Self>,
        roster: &Arc<Roster>,
        request: &KeyRequest,
        now: UnixMs,
    ) -> TryReserveResult {
        let try_round_then_exhausted =
            |round: SelectionRound| match self.try_round(roster, request, round, now) {
                Err(blocked) if request.allow_exhausted => {
                    let exhausted_round = SelectionRound { allow_exhausted: true, ..round };
                    let result = self.try_round(roster, request, exhausted_round, now);
                    result.map_err(|with_exhausted| blocked.with_earlier_retry(with_exhausted.retry_at))
                }
                result => result,
            };
        let try_preferred_first = |max_level| {
            let round = SelectionRound { is_preferred_only: false, allow_exhausted: false, max_level };
            if !request.preferred.is_empty()
                && let Ok(reserved) =
                    try_round_then_exhausted(SelectionRound { is_preferred_only: true, ..round })
            {
                return Ok(reserved);
            }
            try_round_then_exhausted(round)
        };
        let unrestricted = try_preferred_first(None);
        let Err(blocked) = unrestricted else { return unrestricted };
        // If a key without restrictions is only busy, the request waits for it and tries no restricted key.
        if matches!(blocked.reason, Unavailable::Full { .. }) || request.restricted.is_empty() {
            return unrestricted;
        }
        for max_level in MAX_LEVELS
            .into_iter()
            .filter(|level| *level == RestrictionLevel::Inferred || !request.was_refused)
        {
            match try_preferred_first(Some(max_level)) {
                // The other refused keys are tried before the request waits for the key that was refused longest ago.
                Err(SelectionFailure { reason: Unavailable::Full { .. }, .. })
                    if max_level == RestrictionLevel::RefusedLongest => {}
                // A request also waits for a restricted key that is only busy.
                result @ (Ok(_) | Err(SelectionFailure { reason: Unavailable::Full { .. }, .. })) => {
                    return result;
                }
                Err(_) => {}
            }
        }
        unrestricted
    }

    /// Selects and reserves one of the keys that `round` considers.
    fn try_round(
        self: &Arc<Self>,
        roster: &Arc<Roster>,
        request: &KeyRequest,
        round: SelectionRound,
        now: UnixMs,
    ) -> TryReserveResult {
        let strategy = roster.settings.strategy;
        let last_turn = self.last_turn.load(Ordering::Acquire);
        for _ in 0..MAX_LOST_RACES {
            let has_shortfall = Cell::new(false);
            let evaluate = |position: usize, key: &Arc<Key>| {
                let candidate = evaluate_key(key, position, request, round, last_turn, now);
                has_shortfall.set(has_shortfall.get() || is_short_of_credits(&candidate));
                candidate
            };
            let is_unavailable =
                |position: usize, key: &Key| is_unavailable(key, position, request, round, now);
            let (choice, overcommits) =
                match find_best_usable(roster, last_turn, now, is_unavailable, evaluate) {
                    Some(position) => (Choice::Use(position), false),
                    None => {
                        let all = roster.keys().iter().enumerate();
                        let candidates: Vec<Candidate> =
                            all.map(|(position, key)| evaluate(position, key)).collect();
                        // A key that was busy in the first evaluation may have capacity in the second evaluation.
                        let choice = select(strategy, candidates.iter().copied())?;
                        (choice, candidates[choice.position()].affordability != Affordability::Enough)
                    }
                };
            let position = choice.position();
            let key = &roster.keys()[position];
            let probe_delay = roster.settings.probe_after;
            if matches!(choice, Choice::Probe(_)) && !claim_probe(key, request, probe_delay, now) {
                continue;
            }
            let Some(lease) = Lease::try_acquire(self, key, request, overcommits, now) else { continue };
            if strategy.uses_turns {
                self.advance_turn(key, last_turn);
            }
            let mut transitions = Vec::new();
            if has_shortfall.get() {
                transitions = record_skips(roster, request, position, now);
            }
            transitions.extend(key_transition(roster, key, now));
            // A request that only some keys may serve does not change the key in use.
            if request.ineligible.is_empty() && request.preferred.is_empty() {
                transitions.extend(self.record_key_in_use(roster, key, position, now));
            }
            return Ok(Reserved { lease, transitions });
        }
        let retry_at = Some(now.plus(MIN_RETRY_DELAY));
        Err(SelectionFailure {
            reason: Unavailable::Full { until: retry_at },
            retry_at,
            blocks_costlier: false,
        })
    }

    /// Advances the turn of the selected `key` in the weighted round robin. The higher the weight of the key, the
    /// smaller the step.
    fn advance_turn(&self, key: &Key, last_turn: u64) {
        let turn = key.turn.load(Ordering::Acquire).max(last_turn);
        key.turn.store(turn + TURN / u64::from(key.weight), Ordering::Release);
        self.last_turn.fetch_max(turn, Ordering::AcqRel);
    }

    /// Records `key` as the key in use. Returns the state change, or `None` if the key was already in use or is not
    /// recorded. A key is not recorded if it is not usable, or only substitutes for another usable key, which is busy
    /// or cannot pay for this request.
    fn record_key_in_use(
        &self,
        roster: &Roster,
        key: &Arc<Key>,
        position: usize,
        now: UnixMs,
    ) -> Option<Transition> {
        let address = Arc::as_ptr(key).addr();
        let previous_address = self.key_in_use_address.load(Ordering::Acquire);
        let is_usable =
            |key: &Arc<Key>| key.selection_state(&key.workspace().quota(now), now) == KeyState::Usable;
        if previous_address == address || !is_usable(key) {
            return None;
        }
        let is_substitute = if roster.settings.strategy.stays_on_key {
            roster.keys()[..position].iter().any(is_usable)
        } else {
            roster.keys().iter().any(|key| Arc::as_ptr(key).addr() == previous_address && is_usable(key))
        };
        if is_substitute {
            return None;
        }
        self.key_in_use_address
            .compare_exchange(previous_address, address, Ordering::AcqRel, Ordering::Acquire)
            .ok()?;
        let rotated_to = (previous_address != 0).then_some(position);
        let change = StateChange::InUse { quota: key.workspace().quota(now), rotated_to };
        Some(Transition { key: Arc::clone(key), change })
    }
}

/// Returns the position of the best-ranked key that can serve. Only keys that rank better than the best key so far
/// are fully evaluated.
fn find_best_usable(
    roster: &Roster,
    last_turn: u64,
    now: UnixMs,
    is_unavailable: impl Fn(usize, &Key) -> bool,
    evaluate: impl Fn(usize, &Arc<Key>) -> Candidate,
) -> Option<usize> {
    let strategy = roster.settings.strategy;
    let (min_rank, uses_credits) = ((strategy.min_rank)(last_turn), strategy.uses_credits);
    let mut best: Option<(u64, usize)> = None;
    let mut is_first = true;
    for (position, key) in roster.keys().iter().enumerate() {
        let quota = uses_credits.then(|| key.workspace().quota(now));
        let rank = (strategy.rank)(&ranking_inputs(key, quota.as_ref(), last_turn));
        let is_outranked = best.is_some_and(|(best_rank, _)| best_rank <= rank);
        // The first key usually serves, so it is evaluated without this check.
        if is_outranked || (!is_first && is_unavailable(position, key)) {
            continue;
        }
        is_first = false;
        if evaluate(position, key).is_able() {
            best = Some((rank, position));
            if rank <= min_rank {
                break;
            }
        }
    }
    best.map(|(_, position)| position)
}

/// Whether a key is usable and eligible for a request, but its credits do not suffice.
fn is_short_of_credits(candidate: &Candidate) -> bool {
    candidate.is_eligible
        && candidate.state == KeyState::Usable
        && matches!(candidate.affordability, Affordability::Short { .. } | Affordability::Refused)
}

/// Records the workspaces that were skipped for too few credits when the key at the position `selected` was selected.
/// Returns the skips that were not reported before.
fn record_skips(roster: &Roster, request: &KeyRequest, selected: usize, now: UnixMs) -> Vec<Transition> {
    let credits = request.estimate.unwrap_or(0);
    let mut transitions = Vec::new();
    for (position, key) in roster.keys().iter().enumerate().filter(|(position, _)| *position != selected) {
        let workspace = key.workspace();
        let quota = workspace.quota(now);
        // Other requests may return the credits that they have reserved, so only spent credits count.
        let spendable = quota.spendable().map(|credits| credits.saturating_sub(key.kept_credits));
        let reported_credits = workspace.quota_cell.reported_remaining.credits(now);
        let Some(remaining) = reported_credits.or(spendable).filter(|remaining| *remaining < credits) else {
            continue;
        };
        let is_usable = key.selection_state(&quota, now) == KeyState::Usable;
        if is_usable && !request.tried.contains(&position) && !request.is_ineligible(position) {
            let cooldown = roster.settings.exhausted_cooldown;
            let until = quota.resets_at.unwrap_or_else(|| now.plus(cooldown));
            if workspace.record_skip(until, now) {
                let change = StateChange::Skipped { left: remaining, needed: credits };
                transitions.push(Transition { key: Arc::clone(key), change });
            }
        }
    }
    transitions
}

#[cfg(test)]
#[cfg(not(keychoir_model))]
mod tests {
    use proptest::prelude::*;

    use super::super::Settings;
    use super::*;
    use crate::policy::client::ClientName;
    use crate::policy::concurrency_group::ConcurrencyGroup;
    use crate::policy::key_state::{Cooldown, CooldownReason};
    use crate::policy::quota::Quota;
    use crate::policy::select::select;
    use crate::policy::strategy::STRATEGIES;
    use crate::secret::ApiKey;

    const NOW: UnixMs = UnixMs(1_000);

    const LEVELS: [RestrictionLevel; 3] =
        [RestrictionLevel::Inferred, RestrictionLevel::Refused, RestrictionLevel::Until(UnixMs(1_500))];

    const REASONS: [CooldownReason; 4] = [
        CooldownReason::RateLimited,
        CooldownReason::Exhausted,
        CooldownReason::Billing,
        CooldownReason::Invalid,
    ];

    /// The state of a generated key, whose workspace has a limit of 20 credits.
    #[derive(Clone, Copy, Debug)]
    struct KeyCondition {
        cooldown: Option<Cooldown>,
        spent: u64,
        turn: u64,
        running: u32,
        max_concurrent: u32,
        reported_remaining: Option<u64>,
    }

    fn key_condition() -> impl proptest::strategy::Strategy<Value = KeyCondition> {
        let cooldown = proptest::option::weighted(0.4, (0_usize..4, 900..1_100_u64));
        let reported_remaining = proptest::option::weighted(0.3, 0..20_u64);
        proptest::strategy::Strategy::prop_map(
            (cooldown, 0..25_u64, 0..4_u64, 0..3_u32, 0..4_u32, reported_remaining),
            |(cooldown, spent, turn, running, max_concurrent, reported_remaining)| KeyCondition {
                cooldown: cooldown
                    .map(|(reason, until)| Cooldown { reason: REASONS[reason], until: UnixMs(until) }),
                spent,
                turn,
                running,
                max_concurrent,
                reported_remaining,
            },
        )
    }

    fn apply_condition(key: &Key, condition: KeyCondition) {
        let workspace = key.workspace();
        let quota = Quota {
            count: condition.spent,
            limit: Some(20),
            resets_at: Some(UnixMs(2_000 + condition.spent)),
            ..Quota::default()
        };
        workspace.restore(quota, NOW);
        if let Some(cooldown) = condition.cooldown {
            key.set_cooldown(cooldown);
        }
        if let Some(remaining) = condition.reported_remaining {
            key.reported_remaining.report(remaining, UnixMs(9_000), NOW);
        }
        key.turn.store(condition.turn * TURN, Ordering::Release);
        workspace.limiter(ConcurrencyGroup::SPEECH).set_reported_max(condition.max_concurrent);
        for _ in 0..condition.running {
            key.add_in_flight();
            workspace.limiter(ConcurrencyGroup::SPEECH).try_acquire();
        }
    }

    proptest! {
        #[test]
        fn the_best_usable_key_is_the_key_that_a_selection_among_all_keys_chooses(
            keys in prop::collection::vec(key_condition(), 1..9),
            credits in proptest::option::of(0..20_u64),
            turn in 0..4_u64,
            tried in prop::collection::vec(0_usize..9, 0..3),
            ineligible in prop::collection::btree_set(0_usize..9, 0..3),
            preferred in prop::collection::btree_set(0_usize..9, 0..5),
            is_preferred_only: bool,
            allow_exhausted: bool,
            restricted in prop::collection::btree_set(0_usize..9, 0..3),
            max_level in 0..3_usize,
        ) {
            for strategy in &STRATEGIES {
                let entries = (0..keys.len()).map(|number| {
                    ApiKey::new(&format!("sk_{number:04}_of_the_pool")).unwrap().into()
                });
                let pool = Pool::new(entries.collect(), Settings { strategy, ..Settings::FOR_TESTS });
                let roster = pool.roster();
                roster.keys().iter().zip(&keys).for_each(|(key, condition)| apply_condition(key, *condition));
                let mut request = KeyRequest::new(ClientName::new("app"), credits, Some(ConcurrencyGroup::SPEECH));
                request.tried.clone_from(&tried);
                request.ineligible = ineligible.iter().copied().collect();
                request.preferred = preferred.iter().copied().collect();
                request.restricted = restricted.iter().map(|position| (*position, LEVELS[*position % 3])).collect();
                let max_level = [None, Some(RestrictionLevel::Inferred), Some(RestrictionLevel::Refused)][max_level];
                let round = SelectionRound { is_preferred_only, allow_exhausted, max_level };
                let is_unavailable = |position, key: &Key| is_unavailable(key, position, &request, round, NOW);
                let evaluate =
                    |position, key: &Arc<Key>| evaluate_key(key, position, &request, round, turn * TURN, NOW);
                let candidates = roster.keys().iter().enumerate().map(|(position, key)| evaluate(position, key));
                let selected = match select(strategy, candidates) {
                    Ok(Choice::Use(position)) => Some(position),
                    Ok(Choice::Overcommit(_) | Choice::Probe(_)) | Err(_) => None,
                };
                let best = find_best_usable(&roster, turn * TURN, NOW, is_unavailable, evaluate);
                prop_assert_eq!(best, selected, "both searches must agree with the strategy {:?}", strategy);
            }
        }
    }
}
