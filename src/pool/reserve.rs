//! Reserving a key: select one, take it before another request does, and queue the request when all keys
//! are busy.
//!
//! Selection reads atomics without a lock, so another request may take the selected key in between; the
//! selection is then repeated.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::candidate::{SelectionRound, candidate, claim_probe, is_closed, traits};
use super::key::Key;
use super::lease::Lease;
use super::restrictions::Restraint;
use super::roster::Roster;
use super::sync::Ordering;
use super::wait_queue::{KeyRequest, ReserveResult, TryReserveResult};
use super::{Pool, Transition, transitions_of};
use crate::clock;
use crate::policy::key_state::{KeyState, StateChange};
use crate::policy::select::{Affordability, Blocked, Candidate, Choice, Unavailable, select};
use crate::policy::strategy::TURN;
use crate::policy::units::UnixMs;

/// A lease, with the state changes that reserving it has caused.
#[derive(Debug)]
pub struct Reserved {
    /// The lease on the selected key.
    pub lease: Lease,
    /// State changes to be logged.
    pub transitions: Vec<Transition>,
}

/// Maximum selections per call that lose a race to another request. Each lost race means that another
/// request was served.
const RACES_MAX: usize = 64;
/// The restraint up to which keys are tried, round by round.
const LEVELS: [Restraint; 3] = [Restraint::Inferred, Restraint::RefusedLongest, Restraint::Refused];
/// The pause after [`RACES_MAX`] lost races, and the shortest wait for a retry.
const MIN_PAUSE: Duration = Duration::from_millis(1);

impl Pool {
    /// Reserves a key of `roster` for `request`. Queues the request, up to the pool's `queue_timeout`, when
    /// the keys that could serve it are only busy.
    ///
    /// # Errors
    ///
    /// When no key can serve the request, with the reason.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future removes the request from the queue; a key that was assigned meanwhile is
    /// released.
    pub async fn reserve(self: &Arc<Self>, roster: &Arc<Roster>, request: &KeyRequest) -> ReserveResult {
        if self.queue.is_empty() {
            let now = clock::now();
            match self.try_reserve(roster, request, now) {
                Err(blocked) if blocked.is_worth_waiting(now) => {}
                result => return result.map_err(|blocked| blocked.reason),
            }
        }
        self.wait(roster, request).await
    }

    async fn wait(self: &Arc<Self>, roster: &Arc<Roster>, request: &KeyRequest) -> ReserveResult {
        let settings = roster.settings();
        let Some((waiter, mut result)) = self.queue.join(roster, request, settings.max_queued) else {
            // The queue is full. A request that needs nothing the queued ones wait for is still served.
            let result = self.try_reserve(roster, request, clock::now()).map_err(|blocked| blocked.reason);
            if result.is_ok() {
                self.dispatch_waiters_now();
            }
            return result;
        };
        let busy = || Err(Unavailable::Full { until: None });
        let waiting = async {
            loop {
                self.dispatch_waiters(clock::now());
                // Some keys become available without a release, when a cooldown ends. Which one ends
                // first may change while the request is queued.
                loop {
                    let now = clock::now();
                    let retry_in = waiter.until().map(|until| until.since(now).max(MIN_PAUSE));
                    tokio::select! {
                        biased;
                        result = &mut result => return result.unwrap_or_else(|_| busy()),
                        () = waiter.earlier() => {}
                        () = sleep(retry_in.unwrap_or(settings.queue_timeout)) => break,
                    }
                }
            }
        };
        match timeout(settings.queue_timeout, waiting).await {
            Ok(result) => result,
            Err(_) => {
                drop(waiter);
                // A key may have been assigned at the same moment as the timeout.
                result.try_recv().unwrap_or_else(|_| busy())
            }
        }
    }

    /// Assigns available keys to queued requests.
    pub(super) fn dispatch_waiters(self: &Arc<Self>, now: UnixMs) {
        if !self.queue.is_empty() {
            self.queue.serve(now, |roster, request| self.try_reserve(roster, request, now));
        }
    }

    /// The same at the present time; the clock is read only when requests are queued.
    pub(super) fn dispatch_waiters_now(self: &Arc<Self>) {
        if !self.queue.is_empty() {
            self.dispatch_waiters(clock::now());
        }
    }

    /// Reserves a key without waiting, or returns the reason why none can be reserved.
    pub(super) fn try_reserve(
        self: &Arc<Self>,
        roster: &Arc<Roster>,
        request: &KeyRequest,
        now: UnixMs,
    ) -> TryReserveResult {
        let rounds = |is_preferred_only, up_to| {
            let round = |allow_exhausted| SelectionRound { is_preferred_only, allow_exhausted, up_to };
            match self.try_round(roster, request, round(false), now) {
                Err(blocked) if request.allow_exhausted => {
                    let with_exhausted = self.try_round(roster, request, round(true), now);
                    with_exhausted.map_err(|with_exhausted| blocked.or_earlier(with_exhausted.again_at))
                }
                result => result,
            }
        };
        let preferred_first = |up_to| {
            if !request.preferred.is_empty()
                && let Ok(reserved) = rounds(true, up_to)
            {
                return Ok(reserved);
            }
            rounds(false, up_to)
        };
        let first = preferred_first(None);
        let Err(blocked) = first else { return first };
        // A key that is only busy is waited for; keys restricted for this kind of request come after
        // that.
        if matches!(blocked.reason, Unavailable::Full { .. }) || request.restricted.is_empty() {
            return first;
        }
        for up_to in LEVELS.into_iter().filter(|level| *level == Restraint::Inferred || !request.was_refused)
        {
            match preferred_first(Some(up_to)) {
                // A restricted key that is only busy is waited for, too.
                Err(Blocked { reason: Unavailable::Full { .. }, .. })
                    if up_to == Restraint::RefusedLongest => {}
                result @ (Ok(_) | Err(Blocked { reason: Unavailable::Full { .. }, .. })) => return result,
                Err(_) => {}
            }
        }
        first
    }

    fn try_round(
        self: &Arc<Self>,
        roster: &Arc<Roster>,
        request: &KeyRequest,
        round: SelectionRound,
        now: UnixMs,
    ) -> TryReserveResult {
        let strategy = roster.settings().strategy;
        let turn = self.turn.load(Ordering::Acquire);
        for _ in 0..RACES_MAX {
            let has_shortfall = Cell::new(false);
            let evaluate = |position: usize, key: &Arc<Key>| {
                let candidate = candidate(key, position, request, round, turn, now);
                has_shortfall.set(has_shortfall.get() || is_skipped(&candidate));
                candidate
            };
            let is_closed = |position: usize, key: &Key| is_closed(key, position, request, round, now);
            let (choice, overcommits) = match best_serviceable(roster, turn, now, is_closed, evaluate) {
                Some(position) => (Choice::Use(position), false),
                None => {
                    let all = roster.keys().iter().enumerate();
                    let candidates: Vec<Candidate> =
                        all.map(|(position, key)| evaluate(position, key)).collect();
                    // A key that was busy a moment ago may be free by now.
                    let choice = select(strategy, candidates.iter().copied())?;
                    (choice, candidates[choice.position()].affordability != Affordability::Enough)
                }
            };
            let position = choice.position();
            let key = &roster.keys()[position];
            let pause = roster.settings().probe_after;
            if matches!(choice, Choice::Probe(_)) && !claim_probe(key, request, pause, now) {
                continue;
            }
            let Some(lease) = Lease::take(self, key, request, overcommits, now) else { continue };
            if strategy.takes_turns {
                self.take_turn(key, turn);
            }
            let mut transitions = Vec::new();
            if has_shortfall.get() {
                transitions = record_skipped(roster, request, position, now);
            }
            transitions.extend(transitions_of(roster, key, now));
            // A request that is bound to some keys says nothing about the order of the pool.
            if request.ineligible.is_empty() && request.preferred.is_empty() {
                transitions.extend(self.note_use(roster, key, position, now));
            }
            return Ok(Reserved { lease, transitions });
        }
        let again_at = Some(now.plus(MIN_PAUSE));
        Err(Blocked { reason: Unavailable::Full { until: again_at }, again_at, blocks_costlier: false })
    }

    fn take_turn(&self, key: &Key, turn: u64) {
        let own = key.turn().load(Ordering::Acquire).max(turn);
        key.turn().store(own + TURN / u64::from(key.weight()), Ordering::Release);
        self.turn.fetch_max(own, Ordering::AcqRel);
    }

    /// Notes which key is in use, and reports a change when it is another than before. A substitute,
    /// because the key in use is busy or cannot pay for this one request, is not noted.
    fn note_use(&self, roster: &Roster, key: &Arc<Key>, position: usize, now: UnixMs) -> Option<Transition> {
        let address = Arc::as_ptr(key).addr();
        let before = self.in_use.load(Ordering::Acquire);
        let is_usable = |key: &Arc<Key>| key.state_with(&key.workspace().quota(now), now) == KeyState::Usable;
        if before == address || !is_usable(key) {
            return None;
        }
        let stands_in = if roster.settings().strategy.fills {
            roster.keys()[..position].iter().any(is_usable)
        } else {
            roster.keys().iter().any(|key| Arc::as_ptr(key).addr() == before && is_usable(key))
        };
        if stands_in {
            return None;
        }
        self.in_use.compare_exchange(before, address, Ordering::AcqRel, Ordering::Acquire).ok()?;
        let rotated_to = (before != 0).then_some(position);
        let change = StateChange::InUse { quota: key.workspace().quota(now), rotated_to };
        Some(Transition { key: Arc::clone(key), change })
    }
}

/// The position of the best-ranked key that can serve. Only keys that rank better than the best one so
/// far are examined in detail.
fn best_serviceable(
    roster: &Roster,
    turn: u64,
    now: UnixMs,
    is_closed: impl Fn(usize, &Key) -> bool,
    evaluate: impl Fn(usize, &Arc<Key>) -> Candidate,
) -> Option<usize> {
    let strategy = roster.settings().strategy;
    let (least, counts_credits) = ((strategy.least)(turn), strategy.counts_credits);
    let mut best: Option<(u64, usize)> = None;
    let mut is_first = true;
    for (position, key) in roster.keys().iter().enumerate() {
        let quota = counts_credits.then(|| key.workspace().quota(now));
        let rank = (strategy.rank)(&traits(key, quota.as_ref(), turn));
        let is_beaten = best.is_some_and(|(lowest, _)| lowest <= rank);
        // The first key is usually the one that serves. Keys in cooldown are skipped without examining
        // them in detail.
        if is_beaten || (!is_first && is_closed(position, key)) {
            continue;
        }
        is_first = false;
        if evaluate(position, key).is_able() {
            best = Some((rank, position));
            if rank <= least {
                break;
            }
        }
    }
    best.map(|(_, position)| position)
}

/// Whether a key would serve if its credits sufficed.
fn is_skipped(key: &Candidate) -> bool {
    key.is_eligible
        && key.state == KeyState::Usable
        && matches!(key.affordability, Affordability::Short { .. } | Affordability::Refused)
}

/// Records which workspaces were skipped for the key at `chosen` because they have too few credits.
fn record_skipped(roster: &Roster, request: &KeyRequest, chosen: usize, now: UnixMs) -> Vec<Transition> {
    let credits = request.estimate.unwrap_or(0);
    let mut transitions = Vec::new();
    for (position, key) in roster.keys().iter().enumerate().filter(|(at, _)| *at != chosen) {
        let workspace = key.workspace();
        let quota = workspace.quota(now);
        // Reservations of other requests may be returned, so only spent credits count.
        let spendable = quota.spendable().map(|left| left.saturating_sub(key.kept_credits()));
        let reported = workspace.cell().reported().left(now);
        let Some(left) = reported.or(spendable).filter(|left| *left < credits) else { continue };
        let is_usable = key.state_with(&quota, now) == KeyState::Usable;
        if is_usable && !request.tried.contains(&position) && !request.is_ineligible(position) {
            let cooldown = roster.settings().exhausted_cooldown;
            let until = quota.resets_at.unwrap_or_else(|| now.plus(cooldown));
            if workspace.record_skip(until, now) {
                let change = StateChange::PassedOver { left, needed: credits };
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
    use crate::policy::budget::Quota;
    use crate::policy::client::ClientName;
    use crate::policy::concurrency_group::ConcurrencyGroup;
    use crate::policy::key_state::{Cooldown, CooldownReason};
    use crate::policy::select::select;
    use crate::policy::strategy::STRATEGIES;
    use crate::secret::ApiKey;

    const NOW: UnixMs = UnixMs(1_000);

    const RESTRAINTS: [Restraint; 3] =
        [Restraint::Inferred, Restraint::Refused, Restraint::Until(UnixMs(1_500))];

    /// The state of a generated key: its cooldown, the credits spent of 20, its turn, its running
    /// requests and their maximum, and the remaining credits reported by the provider.
    type KeyCondition = (Option<(usize, u64)>, u64, u64, u32, u32, Option<u64>);

    fn condition() -> impl proptest::strategy::Strategy<Value = KeyCondition> {
        let cooldown = proptest::option::weighted(0.4, (0_usize..4, 900..1_100_u64));
        let reported = proptest::option::weighted(0.3, 0..20_u64);
        (cooldown, 0..25_u64, 0..4_u64, 0..3_u32, 0..4_u32, reported)
    }

    fn apply(key: &Key, (cooldown, spent, turn, running, slots, reported): KeyCondition) {
        const REASONS: [CooldownReason; 4] = [
            CooldownReason::RateLimited,
            CooldownReason::Exhausted,
            CooldownReason::Billing,
            CooldownReason::Invalid,
        ];
        let workspace = key.workspace();
        let quota = Quota {
            count: spent,
            limit: Some(20),
            resets_at: Some(UnixMs(2_000 + spent)),
            ..Quota::default()
        };
        workspace.restore(quota, NOW);
        if let Some((reason, until)) = cooldown {
            key.set_cooldown(Cooldown { reason: REASONS[reason], until: UnixMs(until) });
        }
        if let Some(left) = reported {
            key.reported().report(left, UnixMs(9_000), NOW);
        }
        key.turn().store(turn * TURN, Ordering::Release);
        workspace.limiter(ConcurrencyGroup::SPEECH).set_reported_max(slots);
        for _ in 0..running {
            key.add_in_flight();
            workspace.limiter(ConcurrencyGroup::SPEECH).try_acquire();
        }
    }

    proptest! {
        #[test]
        fn the_short_selection_equals_a_full_comparison(
            keys in prop::collection::vec(condition(), 1..9),
            credits in proptest::option::of(0..20_u64),
            turn in 0..4_u64,
            tried in prop::collection::vec(0_usize..9, 0..3),
            ineligible in prop::collection::btree_set(0_usize..9, 0..3),
            preferred in prop::collection::btree_set(0_usize..9, 0..5),
            is_preferred_only: bool,
            allow_exhausted: bool,
            restricted in prop::collection::btree_set(0_usize..9, 0..3),
            up_to in 0..3_usize,
        ) {
            for strategy in &STRATEGIES {
                let entries = (0..keys.len()).map(|number| {
                    ApiKey::new(&format!("sk_{number:04}_of_the_pool")).unwrap().into()
                });
                let pool = Pool::new(entries.collect(), Settings { strategy, ..Settings::STILL });
                let roster = pool.roster();
                roster.keys().iter().zip(&keys).for_each(|(key, condition)| apply(key, *condition));
                let mut request = KeyRequest::new(ClientName::new("app"), credits, Some(ConcurrencyGroup::SPEECH));
                request.tried.clone_from(&tried);
                request.ineligible = ineligible.iter().copied().collect();
                request.preferred = preferred.iter().copied().collect();
                request.restricted = restricted.iter().map(|at| (*at, RESTRAINTS[*at % 3])).collect();
                let up_to = [None, Some(Restraint::Inferred), Some(Restraint::Refused)][up_to];
                let round = SelectionRound { is_preferred_only, allow_exhausted, up_to };
                let is_closed = |at, key: &Key| is_closed(key, at, &request, round, NOW);
                let evaluate = |at, key: &Arc<Key>| candidate(key, at, &request, round, turn * TURN, NOW);
                let all = roster.keys().iter().enumerate().map(|(at, key)| evaluate(at, key));
                let compared = match select(strategy, all) {
                    Ok(Choice::Use(position)) => Some(position),
                    Ok(Choice::Overcommit(_) | Choice::Probe(_)) | Err(_) => None,
                };
                prop_assert_eq!(best_serviceable(&roster, turn * TURN, NOW, is_closed, evaluate), compared, "{:?}", strategy);
            }
        }
    }
}
