//! Reserving: a choice, and the attempt to take what was chosen before somebody else does; when all
//! are busy, a place in the line.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::candidate::{Round, candidate};
use super::key::Key;
use super::lease::Lease;
use super::line::{Ask, Given};
use super::roster::Roster;
use super::sync::Ordering;
use super::{Pool, Transition, news_of, news_of_workspace};
use crate::clock;
use crate::policy::select::{Candidate, Choice, Means, Unavailable, select};
use crate::policy::standing::{Change, Standing};
use crate::policy::strategy::TURN;
use crate::policy::units::UnixMs;

/// A lease and the news that came with it.
#[derive(Debug)]
pub struct Reserved {
    /// The key to ask with.
    pub lease: Lease,
    /// What people are told.
    pub news: Vec<Transition>,
}

/// Somebody else may be faster that often; each time one of them is served.
const RACES_MAX: usize = 64;
/// After so many races, a breath.
const BREATH: Duration = Duration::from_millis(1);

impl Pool {
    /// Reserves a key of `roster` for what is asked. Waits, up to the pool's bound, when those that
    /// could serve are only busy.
    ///
    /// # Errors
    ///
    /// When no key can serve, with what stands in the way.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future leaves the line; a key that was given meanwhile is released.
    pub async fn reserve(self: &Arc<Self>, roster: &Arc<Roster>, ask: &Ask) -> Given {
        if self.line.is_empty() {
            match self.try_reserve(roster, ask, clock::now()) {
                Err(Unavailable::Full { .. }) => {}
                done => return done,
            }
        }
        self.wait(roster, ask).await
    }

    async fn wait(self: &Arc<Self>, roster: &Arc<Roster>, ask: &Ask) -> Given {
        let settings = roster.settings();
        let Some((ticket, mut given)) = self.line.join(roster, ask, settings.waiting_max) else {
            // The line is as long as it may be. Who needs nothing that others wait for is served.
            return self.try_reserve(roster, ask, clock::now());
        };
        let busy = || Err(Unavailable::Full { until: None });
        let waiting = async {
            loop {
                let now = clock::now();
                self.serve_line(now);
                // Some of what is waited for comes back by itself: a cooldown ends.
                let again = ticket.until().map(|until| until.since(now).max(BREATH));
                tokio::select! {
                    biased;
                    given = &mut given => return given.unwrap_or_else(|_| busy()),
                    () = sleep(again.unwrap_or(settings.wait_max)) => {}
                }
            }
        };
        match timeout(settings.wait_max, waiting).await {
            Ok(given) => given,
            Err(_) => {
                drop(ticket);
                // It may have been given in this moment.
                given.try_recv().unwrap_or_else(|_| busy())
            }
        }
    }

    /// Gives those who wait what there is.
    pub(super) fn serve_line(self: &Arc<Self>, now: UnixMs) {
        if !self.line.is_empty() {
            self.line.serve(|roster, ask| self.try_reserve(roster, ask, now));
        }
    }

    /// Reserves a key, or says why not, without waiting.
    pub(super) fn try_reserve(self: &Arc<Self>, roster: &Arc<Roster>, ask: &Ask, now: UnixMs) -> Given {
        let rounds = |is_at_home| {
            let given = self.try_round(roster, ask, Round { is_at_home, spares_credits: false }, now);
            match given {
                Err(why) if ask.spares_credits => {
                    let round = Round { is_at_home, spares_credits: true };
                    self.try_round(roster, ask, round, now).map_err(|_| why)
                }
                given => given,
            }
        };
        if !ask.home.is_empty()
            && let Ok(reserved) = rounds(true)
        {
            return Ok(reserved);
        }
        rounds(false)
    }

    fn try_round(self: &Arc<Self>, roster: &Arc<Roster>, ask: &Ask, round: Round, now: UnixMs) -> Given {
        let strategy = roster.settings().strategy;
        let turn = self.turn.load(Ordering::Acquire);
        for _ in 0..RACES_MAX {
            let too_poor = Cell::new(false);
            let candidates = roster.keys().iter().enumerate().map(|(position, key)| {
                let seen = candidate(key, position, ask, round, turn, now);
                too_poor.set(too_poor.get() || is_passed_over(&seen));
                seen
            });
            let choice = select(strategy, candidates)?;
            let (position, stretches) = (choice.position(), matches!(choice, Choice::Stretch(_)));
            let key = &roster.keys()[position];
            let Some(lease) = Lease::take(self, key, ask, stretches, now) else { continue };
            if strategy.takes_turns() {
                self.take_turn(key, turn);
            }
            let mut news = Vec::new();
            if too_poor.get() {
                news = pass_over(roster, ask, position, now);
            }
            news.extend(news_of(roster, key, now));
            // A request that is not free to choose says nothing of the pool.
            if ask.barred.is_empty() && ask.home.is_empty() {
                news.extend(self.note_use(roster, key, position, now));
            }
            return Ok(Reserved { lease, news });
        }
        Err(Unavailable::Full { until: Some(now.plus(BREATH)) })
    }

    fn take_turn(&self, key: &Key, turn: u64) {
        let own = key.turn().load(Ordering::Acquire).max(turn);
        key.turn().store(own + TURN / u64::from(key.weight()), Ordering::Release);
        self.turn.fetch_max(own, Ordering::AcqRel);
    }

    /// Notes which key is in use, and says so when it is another than before. A key that only stands
    /// in, because the one in use is busy or cannot pay for this one request, is not noted.
    fn note_use(&self, roster: &Roster, key: &Arc<Key>, position: usize, now: UnixMs) -> Option<Transition> {
        let address = Arc::as_ptr(key).addr();
        let before = self.in_use.load(Ordering::Acquire);
        if before == address || key.standing(now) != Standing::Usable {
            return None;
        }
        let is_usable = |key: &Arc<Key>| key.standing(now) == Standing::Usable;
        let stands_in = if roster.settings().strategy.fills() {
            roster.keys()[..position].iter().any(is_usable)
        } else {
            roster.keys().iter().any(|key| Arc::as_ptr(key).addr() == before && is_usable(key))
        };
        if stands_in {
            return None;
        }
        self.in_use.compare_exchange(before, address, Ordering::AcqRel, Ordering::Acquire).ok()?;
        let rotated_to = (before != 0).then_some(position);
        let change = Change::InUse { quota: key.workspace().quota(now), rotated_to };
        Some(Transition { key: Arc::clone(key), change })
    }
}

/// Whether a key would serve, if it could pay.
fn is_passed_over(key: &Candidate) -> bool {
    key.is_eligible
        && key.standing == Standing::Usable
        && matches!(key.means, Means::Short { .. } | Means::Refused)
}

/// Notes the workspaces that were passed over for the key at `chosen` because they are too poor.
fn pass_over(roster: &Roster, ask: &Ask, chosen: usize, now: UnixMs) -> Vec<Transition> {
    let credits = ask.estimate.unwrap_or(0);
    let mut news = Vec::new();
    for (position, key) in roster.keys().iter().enumerate().filter(|(at, _)| *at != chosen) {
        let workspace = key.workspace();
        let quota = workspace.quota(now);
        // What others have reserved may come back: only what is spent counts.
        let spendable = quota.spendable().map(|left| left.saturating_sub(key.kept_credits()));
        let is_poor = spendable.is_some_and(|left| left < credits);
        let is_usable = key.standing_with(&quota, now) == Standing::Usable;
        if is_poor && is_usable && !ask.excluded.contains(&position) && !ask.barred.contains(&position) {
            let cooldown = roster.settings().exhausted_cooldown;
            workspace.fall_short(quota.resets_at.unwrap_or_else(|| now.plus(cooldown)));
            news.extend(news_of_workspace(roster, workspace, now));
        }
    }
    news
}
