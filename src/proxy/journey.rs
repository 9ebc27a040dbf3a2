//! What a request has met so far: the facts of its next decision.

use std::borrow::Cow;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;

use super::bond::Bond;
use super::books::Ownership;
use super::error::ProxyError;
use super::refusals::{Concluded, Learner, Refusals};
use super::{Limits, Proxy};
use crate::body::replay::Replay;
use crate::clock;
use crate::policy::affinity::claim::TwoOwners;
use crate::policy::classify::{Concern, Verdict};
use crate::policy::client::{Client, Pins, Rules};
use crate::policy::evidence::Source;
use crate::policy::features::RequestFeatures;
use crate::policy::lane::Lane;
use crate::policy::plan;
use crate::policy::replay::{Effect, Facts, Progress};
use crate::policy::select::Unavailable;
use crate::policy::standing::Standing;
use crate::pool::{Ask, Fit, Identity, Key, Lease, Pool, Restraint, Roster};
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
    /// What it asks for, as far as plans differ in it.
    features: RequestFeatures,
    last: Option<Verdict>,
    /// What it was refused for.
    refusals: Refusals,
    /// The accounts that were overloaded or busy, or have failed, one after the other: the next attempt goes
    /// to another, if one can serve.
    overloaded: Vec<Identity>,
}

fn is_same(one: &Key, other: &Key) -> bool {
    std::ptr::eq(one, other)
}

impl<C> Proxy<C> {
    /// Reserves a key that this request has not tried, and tells the news that come with it. One that
    /// waits when the keys are replaced chooses among the new ones.
    pub(super) async fn reserve(&self, journey: &mut Journey) -> Result<Lease, Unavailable> {
        loop {
            match self.pool.reserve(&journey.roster, &journey.bound_ask()).await {
                Ok(reserved) => {
                    announce(&reserved.news);
                    return Ok(reserved.lease);
                }
                Err(Unavailable::Outdated) => journey.adopt(&self.pool),
                Err(unavailable) => return Err(unavailable),
            }
        }
    }
}

impl Journey {
    pub(super) fn begin(
        roster: Arc<Roster>,
        client: Arc<Client>,
        features: RequestFeatures,
        ask: Ask,
        bond: Bond,
    ) -> Self {
        Self {
            roster,
            client,
            effect: features.effect,
            bond,
            attempts: 0,
            blameless_replays: 0,
            ask,
            features,
            last: None,
            refusals: Refusals::default(),
            overloaded: Vec::new(),
        }
    }

    /// Finds out which accounts were refused for the like of it, or are known not to have what it needs.
    pub(super) fn look_for_restrictions(&mut self, pool: &Pool) {
        let restrictions = pool.restrictions();
        let models = pool.models();
        let is_limited = self.features.may_be_limited(&models);
        if restrictions.is_empty() && !is_limited {
            self.ask.restricted.clear();
            return;
        }
        let mut restricted = restrictions.matching(&self.features, &self.roster, clock::now());
        let met = restricted.len();
        for (position, key) in self.roster.keys().iter().enumerate().filter(|_| is_limited) {
            let workspace = key.workspace();
            let tier = workspace.tier();
            let tier = tier.as_ref().map(|tier| tier.as_str());
            if plan::lacks(tier, workspace.capabilities(), &self.features, &models).is_some()
                && restricted[..met].binary_search_by_key(&position, |(at, _)| *at).is_err()
            {
                restricted.push((position, Restraint::Inferred));
            }
        }
        restricted.sort_unstable_by_key(|(position, _)| *position);
        self.ask.restricted = restricted;
    }

    /// Goes on with the keys as they are now.
    fn adopt(&mut self, pool: &Pool) {
        let before = std::mem::replace(&mut self.roster, pool.roster());
        let tried = self.ask.excluded.iter().filter_map(|position| before.keys().get(*position));
        let prints: Vec<_> = tried.map(|key| key.api_key().fingerprint()).collect();
        let is_tried = |key: &Key| prints.contains(&key.api_key().fingerprint());
        let all = self.roster.keys().iter().enumerate();
        self.ask.excluded = all.filter(|(_, key)| is_tried(key)).map(|(position, _)| position).collect();
        self.ask.home.clear();
        self.look_for_restrictions(pool);
    }

    /// Takes in a refusal of `key`; `ask` is what it needed of it.
    pub(super) fn refused(
        &mut self,
        pool: &Arc<Pool>,
        key: &Arc<Key>,
        verdict: Verdict,
        ask: &Ask,
        source: Source,
    ) -> Concluded {
        let now = clock::now();
        let learner = Learner { pool, roster: &self.roster, features: &self.features, now };
        let concluded = self.refusals.add(&learner, key, verdict, ask, source);
        self.ask.was_refused |= match verdict.concern() {
            Concern::Key | Concern::Capability | Concern::Unclear => true,
            Concern::Nothing | Concern::Request | Concern::Refusing | Concern::Failing => false,
        };
        let is_its_trouble =
            matches!(verdict, Verdict::Busy | Verdict::ServerError | Verdict::Concurrency { .. });
        if is_its_trouble {
            self.overloaded.push(key.workspace().identity().clone());
        } else {
            self.overloaded.clear();
        }
        self.look_for_restrictions(pool);
        concluded
    }

    /// Whether several accounts have refused it in the same words, which prove nothing of them: then it is
    /// better told by the provider.
    pub(super) fn is_refused_itself(&self) -> bool {
        self.refusals.is_about_request()
    }

    /// Whether the like of it was refused so by several accounts before.
    pub(super) fn is_refused_again(&self) -> bool {
        self.refusals.is_repeated()
    }

    /// Whether being served says more than that: some accounts were refused for it, or for the like of it.
    pub(super) fn has_met_refusals(&self) -> bool {
        !self.refusals.is_empty() || !self.ask.restricted.is_empty()
    }

    /// It was served with `key`.
    pub(super) fn served(&mut self, pool: &Arc<Pool>, key: &Key) -> Concluded {
        let now = clock::now();
        if !self.ask.restricted.is_empty() {
            pool.refute_restrictions(&self.features, key);
        }
        self.refusals.served(&Learner { pool, roster: &self.roster, features: &self.features, now })
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
        let is_free = !self.bond.binds() && self.client.rules.pins == Pins::default();
        let preferred = self.preferred();
        if is_free && preferred.is_empty() {
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
        if !preferred.is_empty() {
            ask.home = preferred;
        }
        Cow::Owned(ask)
    }

    /// Positions of the keys that are asked next, whatever the strategy; empty for no preference. After an
    /// account that cannot do it: one of another plan, the cheapest first. After an overload, a
    /// failure, or too much at once: another account, also one that is only tried.
    fn preferred(&self) -> Vec<usize> {
        let is_left = |position: &usize| {
            !self.ask.excluded.contains(position) && !self.ask.restricted.iter().any(|(at, _)| at == position)
        };
        let all = || self.roster.keys().iter().enumerate().filter(|(position, _)| is_left(position));
        if !self.overloaded.is_empty() {
            let others = all().filter(|(_, key)| !self.overloaded.contains(key.workspace().identity()));
            return others.map(|(position, _)| position).collect();
        }
        let refused: Vec<_> = self.refusals.of_plans().map(|key| key.workspace().tier()).collect();
        if refused.is_empty() {
            return Vec::new();
        }
        let others = || all().filter(|(_, key)| !refused.contains(&key.workspace().tier()));
        let rank = |key: &Key| plan::price_rank(key.workspace().tier().as_ref().map(|tier| tier.as_str()));
        let cheapest = others().map(|(_, key)| rank(key)).min();
        others().filter(|(_, key)| Some(rank(key)) == cheapest).map(|(position, _)| position).collect()
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
    pub(super) fn names<C>(
        &mut self,
        message: &[u8],
        proxy: &Proxy<C>,
        key: &Key,
    ) -> Result<bool, TwoOwners> {
        self.bond.add_message(message, &self.roster, &proxy.owners, &proxy.misses)?;
        Ok(self.fit(key) != Fit::No)
    }

    /// A session was told at last that what it names does not exist.
    pub(super) fn remember_miss<C>(&self, proxy: &Proxy<C>, limits: &Limits) {
        self.bond.remember_miss(&proxy.misses, limits.not_found_ttl, clock::now());
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

    /// No account has the credits for it.
    pub(super) fn exhausted(&self) -> Unavailable {
        let now = clock::now();
        let keys = || self.roster.keys().iter();
        let usable = keys().filter(|key| key.standing(now) == Standing::Usable);
        let left = usable.filter_map(|key| key.workspace().quota(now).spendable()).max();
        Unavailable::Exhausted {
            resets_at: keys().filter_map(|key| key.workspace().quota(now).resets_at).min(),
            left: left.filter(|&credits| credits > 0),
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
            ambiguous_workspaces: self.refusals.agreeing_workspaces(),
            suspected_of_plan: self.refusals.suspected_of_plan(),
        }
    }

    /// This request does not ask with `key` again, unless the key comes back while the request may wait: it was
    /// only busy, or it alone is rate limited and the provider has named until when. What one key refuses
    /// twice is about the request.
    pub(super) fn leave(&mut self, key: &Key) {
        let comes_back = match self.last {
            Some(Verdict::Concurrency { .. }) => self.ask.lane.is_some(),
            Some(Verdict::RateLimited(Some(span))) => {
                span <= self.roster.queue_timeout() && !self.refusals.is_agreed()
            }
            _ => false,
        };
        if !comes_back || self.refusals.of_key(key) > 1 {
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
