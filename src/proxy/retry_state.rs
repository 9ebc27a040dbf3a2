//! The state of a request across its attempts, from which the next attempt is decided.
//!
//! It combines what binds the request to an account ([`AccountAffinity`]), the keys it has tried,
//! and the refusals it got, into the key request for the next reservation and the facts for the
//! retry policy.

mod last_response;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;

use super::account_affinity::AccountAffinity;
use super::config::Limits;
use super::refusals::{Conclusions, RefusalContext, Refusals};
use super::state::Proxy;
use super::usage::OwnershipUpdate;
use crate::body::replay::Replay;
use crate::clock;
use crate::elevenlabs::affinity::claim::TwoOwners;
use crate::elevenlabs::features::RequestFeatures;
use crate::elevenlabs::plan;
use crate::policy::client::{AllowedKeys, Client, Rules};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::policy::replay::{Effect, Facts, Progress};
use crate::policy::select::Unavailable;
use crate::policy::verdict::{Concern, Verdict};
use crate::pool::{Eligibility, Key, KeyRequest, Lease, OwnerId, Pool, Restraint, Roster};
use crate::telemetry::log_transitions;

/// The keys, refusals and attempt counters of one request.
#[derive(Debug)]
pub(super) struct RetryState {
    roster: Arc<Roster>,
    client: Arc<Client>,
    effect: Effect,
    /// The account that must or should serve the request.
    affinity: AccountAffinity,
    attempts: u32,
    blameless_replays: u32,
    /// What the request needs of a key, and the keys that are not to be tried again.
    key_request: KeyRequest,
    /// The properties of the request that depend on the account's plan.
    features: RequestFeatures,
    last: Option<Verdict>,
    /// The refusals it has got so far.
    refusals: Refusals,
    /// Accounts that were overloaded, busy or failing in consecutive attempts: the next attempt
    /// prefers a key of another account.
    overloaded: Vec<OwnerId>,
}

fn is_same(one: &Key, other: &Key) -> bool {
    std::ptr::eq(one, other)
}

impl<C> Proxy<C> {
    /// Reserves a key that this request has not tried, and logs the key transitions that the
    /// reservation caused. When the keys are replaced while the request waits, it continues with
    /// the new keys.
    pub(super) async fn reserve(&self, retry: &mut RetryState) -> Result<Lease, Unavailable> {
        loop {
            match self.pool.reserve(&retry.roster, &retry.bound_request()).await {
                Ok(reserved) => {
                    log_transitions(&reserved.transitions);
                    return Ok(reserved.lease);
                }
                Err(Unavailable::Outdated) => retry.adopt_new_keys(&self.pool),
                Err(unavailable) => return Err(unavailable),
            }
        }
    }
}

impl RetryState {
    pub(super) fn begin(
        roster: Arc<Roster>,
        client: Arc<Client>,
        features: RequestFeatures,
        key_request: KeyRequest,
        affinity: AccountAffinity,
    ) -> Self {
        Self {
            roster,
            client,
            effect: features.effect,
            affinity,
            attempts: 0,
            blameless_replays: 0,
            key_request,
            features,
            last: None,
            refusals: Refusals::default(),
            overloaded: Vec::new(),
        }
    }

    /// Updates the restricted keys: of accounts that refused similar requests, and of accounts
    /// whose plan is known to lack what this request needs.
    pub(super) fn find_restrictions(&mut self, pool: &Pool) {
        let restrictions = pool.restrictions();
        let models = pool.models();
        let is_limited = self.features.may_be_limited(&models);
        if restrictions.is_empty() && !is_limited {
            self.key_request.restricted.clear();
            return;
        }
        let mut restricted = restrictions.matching(&self.features, &self.roster, clock::now());
        let known = restricted.len();
        for (position, key) in self.roster.keys().iter().enumerate().filter(|_| is_limited) {
            let workspace = key.workspace();
            let tier = workspace.tier();
            let tier = tier.as_ref().map(|tier| tier.as_str());
            if plan::lacks(tier, workspace.capabilities(), &self.features, &models).is_some()
                && restricted[..known].binary_search_by_key(&position, |(at, _)| *at).is_err()
            {
                restricted.push((position, Restraint::Inferred));
            }
        }
        restricted.sort_unstable_by_key(|(position, _)| *position);
        self.key_request.restricted = restricted;
    }

    /// Replaces the roster by the current one. Tried keys are found again by their fingerprints.
    fn adopt_new_keys(&mut self, pool: &Pool) {
        let before = std::mem::replace(&mut self.roster, pool.roster());
        let tried = self.key_request.tried.iter().filter_map(|position| before.keys().get(*position));
        let fingerprints: Vec<_> = tried.map(|key| key.api_key().fingerprint()).collect();
        let is_tried = |key: &Key| fingerprints.contains(&key.api_key().fingerprint());
        let all = self.roster.keys().iter().enumerate();
        self.key_request.tried = all.filter(|(_, key)| is_tried(key)).map(|(position, _)| position).collect();
        self.key_request.preferred.clear();
        self.find_restrictions(pool);
    }

    /// Records that `key` refused the request; `key_request` is what the request needed of it.
    pub(super) fn refused(
        &mut self,
        pool: &Arc<Pool>,
        key: &Arc<Key>,
        verdict: Verdict,
        key_request: &KeyRequest,
        source: RefusalSource,
    ) -> Conclusions {
        let now = clock::now();
        let context = RefusalContext { pool, roster: &self.roster, features: &self.features, now };
        let conclusions = self.refusals.add(&context, key, verdict, key_request, source);
        self.key_request.was_refused |= match verdict.concern() {
            Concern::Key | Concern::Capability | Concern::Unclear => true,
            Concern::Nothing | Concern::Request | Concern::Refusing | Concern::Failing => false,
        };
        let is_account_trouble =
            matches!(verdict, Verdict::Busy | Verdict::ServerError | Verdict::Concurrency { .. });
        if is_account_trouble {
            self.overloaded.push(key.workspace().identity().clone());
        } else {
            self.overloaded.clear();
        }
        self.find_restrictions(pool);
        conclusions
    }

    /// Whether several accounts refused it in the same words, which prove nothing about an account:
    /// then the provider's refusal is relayed.
    pub(super) fn is_refused_itself(&self) -> bool {
        self.refusals.is_about_request()
    }

    /// Whether several accounts, or this account, refused similar requests in the same way before.
    pub(super) fn is_refused_repeatedly(&self) -> bool {
        self.refusals.is_repeated()
    }

    /// Whether a success refutes or confirms restrictions: accounts refused this request or similar
    /// ones.
    pub(super) fn has_met_refusals(&self) -> bool {
        !self.refusals.is_empty() || !self.key_request.restricted.is_empty()
    }

    /// Records that `key` served the request, and refutes the restrictions which say otherwise.
    pub(super) fn served(&mut self, pool: &Arc<Pool>, key: &Key) -> Conclusions {
        let now = clock::now();
        if !self.key_request.restricted.is_empty() {
            pool.refute_restrictions(&self.features, key);
        }
        self.refusals.served(&RefusalContext { pool, roster: &self.roster, features: &self.features, now })
    }

    /// Whether `key` may serve the request by the client's allowed keys and by the affinity; the
    /// state of the key is not considered.
    fn eligibility(&self, key: &Key) -> Eligibility {
        let workspace = key.workspace().membership();
        let may = self.client.rules.pins.permit(key.name(), workspace.name());
        if may { self.affinity.eligibility(key) } else { Eligibility::No }
    }

    /// Counts an attempt; returns its number, from 1.
    pub(super) fn next_attempt(&mut self) -> u32 {
        self.attempts += 1;
        self.attempts
    }

    pub(super) fn roster(&self) -> &Arc<Roster> {
        &self.roster
    }

    /// The permissions of its client.
    pub(super) fn rules(&self) -> &Rules {
        &self.client.rules
    }

    /// What it needs of a key, without the affinity.
    pub(super) fn key_request(&self) -> &KeyRequest {
        &self.key_request
    }

    /// What it needs of a key, with the current affinity, which every attempt may change.
    fn bound_request(&self) -> Cow<'_, KeyRequest> {
        let is_unbound = !self.affinity.binds() && self.client.rules.pins == AllowedKeys::default();
        let preferred = self.preferred();
        if is_unbound && preferred.is_empty() {
            return Cow::Borrowed(&self.key_request);
        }
        let mut key_request = self.key_request.clone();
        let keys = || self.roster.keys().iter().enumerate();
        // An unrestricted affinity gives the same eligibility for all keys, so one key is enough.
        let is_for_all = self.client.rules.pins == AllowedKeys::default() && self.affinity.is_unrestricted();
        for (position, key) in keys().take(if is_for_all { 1 } else { usize::MAX }) {
            match self.eligibility(key) {
                Eligibility::No => key_request.ineligible.push(position),
                Eligibility::Yes => {}
                Eligibility::EvenExhausted => key_request.allow_exhausted = true,
            }
        }
        if let Some(preferred_account) = self.affinity.preferred() {
            let of_account = keys().filter(|(_, key)| key.workspace().identity() == preferred_account);
            key_request.preferred.extend(of_account.map(|(position, _)| position));
            key_request.preferred.sort_unstable();
        }
        if !preferred.is_empty() {
            key_request.preferred = preferred;
        }
        Cow::Owned(key_request)
    }

    /// Positions of the keys that are tried first, whatever the strategy; empty for no preference.
    /// After a refusal for the account's plan: keys of other plans, the cheapest first. After an
    /// overload, a failure or a concurrency limit: keys of other accounts, including keys that may
    /// only be probed.
    fn preferred(&self) -> Vec<usize> {
        let is_untried = |position: &usize| {
            !self.key_request.tried.contains(position)
                && !self.key_request.restricted.iter().any(|(at, _)| at == position)
        };
        let all = || self.roster.keys().iter().enumerate().filter(|(position, _)| is_untried(position));
        if !self.overloaded.is_empty() {
            let others = all().filter(|(_, key)| !self.overloaded.contains(key.workspace().identity()));
            return others.map(|(position, _)| position).collect();
        }
        let refused: Vec<_> = self.refusals.plan_refused_keys().map(|key| key.workspace().tier()).collect();
        if refused.is_empty() {
            return Vec::new();
        }
        let others = || all().filter(|(_, key)| !refused.contains(&key.workspace().tier()));
        let rank = |key: &Key| plan::price_rank(key.workspace().tier().as_ref().map(|tier| tier.as_str()));
        let cheapest = others().map(|(_, key)| rank(key)).min();
        others().filter(|(_, key)| Some(rank(key)) == cheapest).map(|(position, _)| position).collect()
    }

    /// A key request for text that is spoken on a socket: `credits`, and a concurrency slot of
    /// `group`. With `is_required`, only `session_key` may serve it, because the session has begun with
    /// it; else that key is preferred.
    pub(super) fn speech_request(
        &self,
        credits: u64,
        group: Option<ConcurrencyGroup>,
        session_key: &Key,
        is_required: bool,
    ) -> KeyRequest {
        let mut key_request = self.bound_request().into_owned();
        (key_request.estimate, key_request.group) = (Some(credits), group);
        let others = |position: &usize| {
            self.roster.keys().get(*position).is_some_and(|key| !is_same(key, session_key))
        };
        if is_required {
            // Earlier refusals of this key were about other requests.
            key_request.tried.clear();
            key_request.preferred.clear();
            key_request.ineligible = (0..self.roster.keys().len()).filter(others).collect();
        } else {
            key_request.preferred = self.roster.position_of(session_key).into_iter().collect();
        }
        key_request
    }

    /// Sets the credits and the concurrency group that later reservations of this request need.
    pub(super) fn set_speech(&mut self, credits: u64, group: Option<ConcurrencyGroup>) {
        (self.key_request.estimate, self.key_request.group) = (Some(credits), group);
    }

    /// Adds the identifiers that a message on a socket names; returns whether `key` may still serve
    /// it.
    pub(super) fn add_names<C>(
        &mut self,
        message: &[u8],
        proxy: &Proxy<C>,
        key: &Key,
    ) -> Result<bool, TwoOwners> {
        self.affinity.add_message_names(message, &self.roster, &proxy.owners, &proxy.misses)?;
        Ok(self.eligibility(key) != Eligibility::No)
    }

    /// Remembers that the resources named on a session exist in no account.
    pub(super) fn remember_miss<C>(&self, proxy: &Proxy<C>, limits: &Limits) {
        self.affinity.remember_miss(&proxy.misses, limits.not_found_ttl, clock::now());
    }

    /// Records which resources a session that has begun with `key` proves to be of its account.
    pub(super) fn record_session<C>(
        &mut self,
        proxy: &Proxy<C>,
        key: &Key,
        first: &[u8],
    ) -> Vec<OwnershipUpdate> {
        self.affinity.record_session(proxy, key, first)
    }

    /// Ends the attempts; the affinity then records ownership from the response.
    pub(super) fn into_affinity(self) -> AccountAffinity {
        self.affinity
    }

    /// The facts for the retry decision after an attempt with `key`.
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
        let may_be_elsewhere = is_missing && self.affinity.record_missing(key, &self.roster);
        Facts {
            progress,
            may_be_elsewhere,
            effect: self.effect,
            body: body.holding(),
            // The upload itself does not count as waiting: the span begins when the last of the
            // body has come.
            is_late: clock::since(body.arrived_at()) >= limits.retry_timeout,
            attempts: self.attempts,
            max_attempts: limits.max_attempts,
            blameless_replays: self.blameless_replays,
            ambiguous_workspaces: self.refusals.agreeing_workspaces(),
            suspected_of_plan: self.refusals.suspected_of_plan(),
        }
    }

    /// Excludes `key` from further attempts, unless it is likely to recover while the request may
    /// wait: it was at its concurrency limit, or it alone is rate limited and the provider has
    /// named until when. A second refusal by the same key is about the request.
    pub(super) fn exclude(&mut self, key: &Key) {
        let may_recover = match self.last {
            Some(Verdict::Concurrency { .. }) => self.key_request.group.is_some(),
            Some(Verdict::RateLimited(Some(span))) => {
                span <= self.roster.queue_timeout() && !self.refusals.is_agreed()
            }
            _ => false,
        };
        if !may_recover || self.refusals.count_by_key(key) > 1 {
            self.key_request.tried.extend(self.roster.position_of(key));
        }
        // A rate limit that a second account names is about the request: the first one is not waited for either.
        if matches!(self.last, Some(Verdict::RateLimited(_))) && self.refusals.is_agreed() {
            let agreeing = self.refusals.agreeing_keys().filter_map(|key| self.roster.position_of(key));
            let more: Vec<usize> = agreeing.filter(|at| !self.key_request.tried.contains(at)).collect();
            self.key_request.tried.extend(more);
        }
    }

    /// Counts a retry that no key is to blame for, and waits with a jitter of up to the same span,
    /// so that retries of many requests do not arrive at once.
    pub(super) async fn pause(&mut self, pause: Duration) {
        self.blameless_replays += 1;
        tokio::time::sleep(pause + pause.mul_f64(fastrand::f64())).await;
    }
}
