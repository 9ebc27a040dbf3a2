//! What a request has met so far: the facts of its next decision.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;

use super::bond::Bond;
use super::books::Ownership;
use super::error::ProxyError;
use super::{Limits, Proxy};
use crate::body::replay::Replay;
use crate::clock;
use crate::policy::affinity::claim::TwoOwners;
use crate::policy::classify::{Concern, Verdict};
use crate::policy::client::{Client, Pins, Rules};
use crate::policy::lane::Lane;
use crate::policy::replay::{Effect, Facts, Progress};
use crate::policy::select::Unavailable;
use crate::pool::{Ask, Fit, Key, Lease, Owners, Roster};
use crate::telemetry::announce;

/// A request under way.
#[derive(Debug)]
pub(super) struct Journey {
    roster: Arc<Roster>,
    client: Arc<Client>,
    effect: Effect,
    /// What binds it to an account.
    bond: Bond,
    attempts: u32,
    blameless_replays: u32,
    /// What it needs of a key; the keys that were refused for it are not asked again.
    ask: Ask,
    last: Option<Verdict>,
    /// Ambiguous verdicts, each with a key that got it.
    unclear: Vec<(Verdict, Arc<Key>)>,
}

fn is_same(one: &Key, other: &Key) -> bool {
    std::ptr::eq(one, other)
}

impl<C> Proxy<C> {
    /// Reserves a key that this request has not tried, and tells the news that come with it.
    pub(super) async fn reserve(&self, journey: &Journey) -> Result<Lease, Unavailable> {
        let reserved = self.pool.reserve(&journey.roster, &journey.bound_ask()).await?;
        announce(&reserved.news);
        Ok(reserved.lease)
    }
}

impl Journey {
    pub(super) fn begin(
        roster: Arc<Roster>,
        client: Arc<Client>,
        effect: Effect,
        ask: Ask,
        bond: Bond,
    ) -> Self {
        Self {
            roster,
            client,
            effect,
            bond,
            attempts: 0,
            blameless_replays: 0,
            ask,
            last: None,
            unclear: Vec::new(),
        }
    }

    /// Whether `key` may serve it, apart from how it stands: for its client, and for what binds it.
    fn fit(&self, key: &Key) -> Fit {
        let workspace = key.workspace().belonging();
        let may = self.client.rules.pins.permit(key.name(), workspace.name());
        if may { self.bond.fit(key) } else { Fit::No }
    }

    /// Counts an attempt; returns its number, from 1.
    pub(super) fn next_attempt(&mut self) -> u32 {
        self.attempts += 1;
        self.attempts
    }

    pub(super) fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// What its client may do.
    pub(super) fn rules(&self) -> &Rules {
        &self.client.rules
    }

    /// What it needs of a key.
    pub(super) fn ask(&self) -> &Ask {
        &self.ask
    }

    /// The same, with what binds it now: after every attempt that may be another account.
    fn bound_ask(&self) -> Cow<'_, Ask> {
        if !self.bond.binds() && self.client.rules.pins == Pins::default() {
            return Cow::Borrowed(&self.ask);
        }
        let mut ask = self.ask.clone();
        let keys = || self.roster.keys().iter().enumerate();
        // What bars nobody is the same for all of them.
        let is_for_all = self.client.rules.pins == Pins::default() && self.bond.bars_nobody();
        for (position, key) in keys().take(if is_for_all { 1 } else { usize::MAX }) {
            match self.fit(key) {
                Fit::No => ask.barred.push(position),
                Fit::Yes => {}
                Fit::EvenWithoutCredits => ask.spares_credits = true,
            }
        }
        if let Some(home) = self.bond.home() {
            let at_home = keys().filter(|(_, key)| key.workspace().identity() == home);
            ask.home.extend(at_home.map(|(position, _)| position));
            ask.home.sort_unstable();
        }
        Cow::Owned(ask)
    }

    /// The same for speech that has been said on a socket: so many credits, and a place where those
    /// run that speak. With a key that `must` serve it, because it has begun to, or one that should.
    pub(super) fn speaking(&self, credits: u64, lane: Option<Lane>, with: &Key, must: bool) -> Ask {
        let mut ask = self.bound_ask().into_owned();
        (ask.estimate, ask.lane) = (Some(credits), lane);
        let others =
            |position: &usize| self.roster.keys().get(*position).is_some_and(|key| !is_same(key, with));
        if must {
            // That it was refused for something else before says nothing of this.
            ask.excluded.clear();
            ask.home.clear();
            ask.barred = (0..self.roster.keys().len()).filter(others).collect();
        } else {
            ask.home = self.roster.position_of(with).into_iter().collect();
        }
        ask
    }

    /// From here on it needs so many credits, and a place where those run that speak.
    pub(super) fn speaks(&mut self, credits: u64, lane: Option<Lane>) {
        (self.ask.estimate, self.ask.lane) = (Some(credits), lane);
    }

    /// Takes in what a message on a socket names; whether `key` may still serve it.
    pub(super) fn names(&mut self, message: &[u8], owners: &Owners, key: &Key) -> Result<bool, TwoOwners> {
        self.bond.add_message(message, &self.roster, owners)?;
        Ok(self.fit(key) != Fit::No)
    }

    /// What binds it learns from a session that has begun with `key`.
    pub(super) fn settle<C>(&mut self, proxy: &Proxy<C>, key: &Key, first: &[u8]) -> Vec<Ownership> {
        self.bond.settle_socket(proxy, key, first)
    }

    /// Why it is not served, when no key can: of its owner, if it has one.
    pub(super) fn refusal(&self, unavailable: Unavailable) -> ProxyError {
        match self.bond.owned() {
            Some(kind) => ProxyError::OwnerUnavailable { kind, unavailable },
            None => ProxyError::Unavailable(unavailable),
        }
    }

    /// It is over: what binds it learns from its answer.
    pub(super) fn end(self) -> Bond {
        self.bond
    }

    /// The facts after an attempt with `key` got so far.
    pub(super) fn facts(
        &mut self,
        progress: Progress,
        body: &Replay<Incoming>,
        key: &Arc<Key>,
        limits: &Limits,
    ) -> Facts {
        self.last = match progress {
            Progress::Answered(verdict) => Some(verdict),
            Progress::Unsent | Progress::Unanswered => None,
        };
        if let Some(verdict) = self.last
            && verdict.concern() == Concern::Unclear
        {
            self.unclear.push((verdict, Arc::clone(key)));
        }
        let is_missing = progress == Progress::Answered(Verdict::NotFound);
        let may_be_elsewhere = is_missing && self.bond.is_not_with(key, &self.roster);
        Facts {
            progress,
            may_be_elsewhere,
            effect: self.effect,
            body: body.holding(),
            // A long upload is not waiting: the span begins when the last of it has come.
            is_late: clock::since(body.arrived_at()) >= limits.replay_max,
            attempts: self.attempts,
            attempts_max: limits.attempts_max,
            blameless_replays: self.blameless_replays,
            ambiguous_workspaces: self.agreeing_workspaces(),
        }
    }

    /// What the unclear verdicts mean, each of its key, now that another key was served.
    pub(super) fn shown_by_contrast(&self) -> impl Iterator<Item = (&Key, Verdict)> {
        self.unclear.iter().filter_map(|(verdict, key)| Some((&**key, verdict.by_contrast()?)))
    }

    /// Workspaces that gave the last ambiguous verdict.
    fn agreeing_workspaces(&self) -> u32 {
        let Some((last, _)) = self.unclear.last() else { return 0 };
        let mut seen: Vec<&Key> = Vec::new();
        for (_, key) in self.unclear.iter().filter(|(verdict, _)| verdict == last) {
            if !seen.iter().any(|seen| std::ptr::eq(seen.workspace(), key.workspace())) {
                seen.push(key);
            }
        }
        u32::try_from(seen.len()).unwrap_or(u32::MAX)
    }

    /// This request does not ask with `key` again, unless it was only busy and will be waited for.
    pub(super) fn leave(&mut self, key: &Key) {
        let is_waited_for = self.ask.lane.is_some();
        if !(matches!(self.last, Some(Verdict::Concurrency { .. })) && is_waited_for) {
            self.ask.excluded.extend(self.roster.position_of(key));
        }
    }

    /// A replay that is no key's fault: counted, and after a pause that differs from request to
    /// request, so that they do not come back all at once.
    pub(super) async fn pause(&mut self, pause: Duration) {
        self.blameless_replays += 1;
        let chance = RandomState::new().hash_one(self.attempts) % 1_000;
        tokio::time::sleep(pause + pause.mul_f64(chance as f64 / 1_000.0)).await;
    }
}
