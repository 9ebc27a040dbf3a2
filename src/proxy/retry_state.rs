//! Keeps the state of a request across its attempts with keys of the pool.
//!
//! From the affinity to an account ([`AccountAffinity`]), the tried keys and the refusals, the state determines
//! the key request for the next reservation and the facts for the retry policy.

mod last_response;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;

use super::account_affinity::AccountAffinity;
use super::config::Limits;
use super::refusals::{Conclusions, RefusalContext, Refusals};
use super::state::Proxy;
use crate::body::replay::Replay;
use crate::clock;
use crate::elevenlabs::affinity::required_owner::ConflictingOwners;
use crate::elevenlabs::features::RequestFeatures;
use crate::elevenlabs::plan;
use crate::policy::authority::Authority;
use crate::policy::client::{AllowedKeys, Client};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::policy::replay::{AttemptFacts, Progress};
use crate::policy::select::Unavailable;
use crate::policy::verdict::{Concern, Verdict};
use crate::pool::{Eligibility, Key, KeyRequest, Lease, OwnerId, Pool, RestrictionLevel, Roster};
use crate::telemetry::log_transitions;

/// The keys, refusals and attempt counters of one request.
#[derive(Debug)]
pub(super) struct RetryState {
    pub(super) roster: Arc<Roster>,
    pub(super) client: Arc<Client>,
    /// The account that must or should serve the request.
    pub(super) affinity: AccountAffinity,
    /// Number of attempts so far.
    pub(super) attempts: u32,
    /// Number of retries after failures that are independent of the key.
    non_key_retries: u32,
    /// The request's requirements for a key without the affinity, and the keys that are not tried again.
    pub(super) key_request: KeyRequest,
    /// The properties of the request that an account's plan may not allow.
    features: RequestFeatures,
    last_verdict: Option<Verdict>,
    refusals: Refusals,
    /// The network route to the provider, of keys that have no route of their own.
    default_route: Arc<Authority>,
    /// The network routes by which this request could not be sent.
    failed_routes: Vec<Arc<Authority>>,
    /// Accounts that were overloaded, failing or at their concurrency limit in the last consecutive attempts. The next
    /// attempt prefers a key of another account.
    overloaded_accounts: Vec<OwnerId>,
}

/// Whether the text of a session may use a key other than the session's key.
#[derive(Clone, Copy, Debug)]
pub(super) enum SessionKeyUse {
    /// The provider serves the session with its key, so the text needs the same key.
    Required,
    /// The text may use another key if the key of the session is not available.
    Preferred,
}

impl<C> Proxy<C> {
    /// Reserves a key that this request has not tried, and logs the state changes that the reservation
    /// causes. If a reload replaces the keys while the request waits, it continues with the new keys.
    pub(super) async fn reserve(&self, retry: &mut RetryState) -> Result<Lease, Unavailable> {
        loop {
            match self.pool.reserve(&retry.roster, &retry.key_request_with_affinity()).await {
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
    pub(super) fn new(
        pool: &Pool,
        roster: Arc<Roster>,
        client: Arc<Client>,
        features: RequestFeatures,
        key_request: KeyRequest,
        affinity: AccountAffinity,
        default_route: &Arc<Authority>,
    ) -> Self {
        let mut retry = Self {
            roster,
            client,
            affinity,
            attempts: 0,
            non_key_retries: 0,
            key_request,
            features,
            last_verdict: None,
            refusals: Refusals::default(),
            default_route: Arc::clone(default_route),
            failed_routes: Vec::new(),
            overloaded_accounts: Vec::new(),
        };
        retry.update_restricted_keys(pool);
        retry
    }

    /// Updates the restricted keys: keys of accounts that refused similar requests, and keys of accounts
    /// whose plan is known to lack a feature that this request needs.
    fn update_restricted_keys(&mut self, pool: &Pool) {
        let restrictions = pool.restrictions();
        let models = pool.models();
        let may_be_limited = self.features.may_be_limited_by_plan(&models);
        if restrictions.is_empty() && !may_be_limited {
            self.key_request.restricted.clear();
            return;
        }
        let mut restricted = restrictions.restricted_keys(&self.features, &self.roster, clock::now());
        let recorded_count = restricted.len();
        for (position, key) in self.roster.keys().iter().enumerate().filter(|_| may_be_limited) {
            let workspace = key.workspace();
            let stored_tier = workspace.tier();
            let tier_name = stored_tier.as_ref().map(|tier| tier.as_str());
            if plan::missing_feature(tier_name, workspace.capabilities(), &self.features, &models).is_some()
                && restricted[..recorded_count]
                    .binary_search_by_key(&position, |(restricted_position, _)| *restricted_position)
                    .is_err()
            {
                restricted.push((position, RestrictionLevel::Inferred));
            }
        }
        restricted.sort_unstable_by_key(|(position, _)| *position);
        self.key_request.restricted = restricted;
    }

    /// Replaces the roster with the current roster, in which the tried keys are identified by their fingerprints.
    fn adopt_new_keys(&mut self, pool: &Pool) {
        let former_roster = std::mem::replace(&mut self.roster, pool.roster());
        let tried = self.key_request.tried.iter().filter_map(|position| former_roster.keys().get(*position));
        let fingerprints: Vec<_> = tried.map(|key| key.api_key().fingerprint()).collect();
        let is_tried = |key: &Key| fingerprints.contains(&key.api_key().fingerprint());
        let current_keys = self.roster.keys().iter().enumerate();
        self.key_request.tried =
            current_keys.filter(|(_, key)| is_tried(key)).map(|(position, _)| position).collect();
        self.key_request.preferred.clear();
        self.update_restricted_keys(pool);
    }

    /// Records that `key` refused the request. `key_request` contains the requirements of that attempt.
    pub(super) fn record_refusal(
        &mut self,
        pool: &Arc<Pool>,
        key: &Arc<Key>,
        verdict: Verdict,
        key_request: &KeyRequest,
        source: RefusalSource,
    ) -> Conclusions {
        let now = clock::now();
        let context = RefusalContext { pool, roster: &self.roster, features: &self.features, now };
        let conclusions = self.refusals.record(&context, key, verdict, key_request, source);
        self.key_request.was_refused |= match verdict.concern() {
            Concern::Key | Concern::Capability | Concern::Unclear => true,
            Concern::Nothing | Concern::Request | Concern::Overload | Concern::Failure => false,
        };
        if matches!(verdict, Verdict::Busy | Verdict::ServerError | Verdict::Concurrency { .. }) {
            self.overloaded_accounts.push(key.workspace().identity().clone());
        } else {
            self.overloaded_accounts.clear();
        }
        self.update_restricted_keys(pool);
        conclusions
    }

    /// Records that `key` served the request: the restrictions that its success contradicts are refuted, and
    /// earlier refusals are attributed to their accounts.
    pub(super) fn record_success(&mut self, pool: &Arc<Pool>, key: &Key) -> Conclusions {
        if !self.key_request.restricted.is_empty() {
            pool.restrictions().refute(&self.features, key);
        }
        let (roster, features, now) = (&self.roster, &self.features, clock::now());
        self.refusals.record_success(&RefusalContext { pool, roster, features, now })
    }

    /// Returns the eligibility of `key` under the client's allowed keys and the affinity, whatever the state of the
    /// key.
    fn eligibility(&self, key: &Key) -> Eligibility {
        let membership = key.workspace().membership();
        let is_allowed = self.client.rules.allowed_keys.permit(key.name(), membership.name());
        if is_allowed { self.affinity.eligibility(key) } else { Eligibility::No }
    }

    /// Returns the requirements for a key, with the current affinity, which every attempt may change.
    fn key_request_with_affinity(&self) -> Cow<'_, KeyRequest> {
        let has_no_preference =
            !self.affinity.affects_selection() && self.client.rules.allowed_keys == AllowedKeys::default();
        let preferred = self.preferred_positions();
        if has_no_preference && preferred.is_empty() {
            return Cow::Borrowed(&self.key_request);
        }
        let mut key_request = self.key_request.clone();
        let keys = || self.roster.keys().iter().enumerate();
        // Without a restriction, all keys have the same eligibility, so only one is checked.
        let is_same_for_all =
            self.client.rules.allowed_keys == AllowedKeys::default() && self.affinity.is_unrestricted();
        for (position, key) in keys().take(if is_same_for_all { 1 } else { usize::MAX }) {
            match self.eligibility(key) {
                Eligibility::No => key_request.ineligible.push(position),
                Eligibility::Yes => {}
                Eligibility::EvenExhausted => key_request.allow_exhausted = true,
            }
        }
        if let Some(preferred_account) = self.affinity.preferred_account() {
            let account_keys = keys().filter(|(_, key)| key.workspace().identity() == preferred_account);
            key_request.preferred.extend(account_keys.map(|(position, _)| position));
            key_request.preferred.sort_unstable();
        }
        if !preferred.is_empty() {
            key_request.preferred = preferred;
        }
        Cow::Owned(key_request)
    }

    /// Returns the positions of the keys that are tried first, whatever the strategy. An empty list means no
    /// preference. After a failure to connect, these are the keys with other routes. After an overload, a failure or
    /// a concurrency limit, these are the keys of other accounts, including keys that may only be probed. After a
    /// refusal because of the account's plan, these are the keys of the cheapest other plan.
    fn preferred_positions(&self) -> Vec<usize> {
        let is_candidate = |position: &usize| {
            !self.key_request.tried.contains(position)
                && !self.key_request.restricted.iter().any(|(restricted, _)| restricted == position)
        };
        let candidates =
            || self.roster.keys().iter().enumerate().filter(|(position, _)| is_candidate(position));
        if !self.failed_routes.is_empty() {
            let other_routes = candidates().filter(|(_, key)| !self.failed_routes.contains(self.route(key)));
            return other_routes.map(|(position, _)| position).collect();
        }
        if !self.overloaded_accounts.is_empty() {
            let other_accounts = candidates()
                .filter(|(_, key)| !self.overloaded_accounts.contains(key.workspace().identity()));
            return other_accounts.map(|(position, _)| position).collect();
        }
        let refused_plans: Vec<_> =
            self.refusals.plan_refused_keys().map(|key| key.workspace().tier()).collect();
        if refused_plans.is_empty() {
            return Vec::new();
        }
        let other_plans = || candidates().filter(|(_, key)| !refused_plans.contains(&key.workspace().tier()));
        let rank = |key: &Key| plan::price_rank(key.workspace().tier().as_ref().map(|tier| tier.as_str()));
        let cheapest = other_plans().map(|(_, key)| rank(key)).min();
        other_plans().filter(|(_, key)| Some(rank(key)) == cheapest).map(|(position, _)| position).collect()
    }

    /// Returns a key request for the text of a text-to-speech session: `credits`, and a concurrency slot of `group`.
    /// `key_use` determines whether a key other than `session_key` may serve the text.
    pub(super) fn speech_request(
        &self,
        credits: u64,
        group: Option<ConcurrencyGroup>,
        session_key: &Key,
        key_use: SessionKeyUse,
    ) -> KeyRequest {
        let mut key_request = self.key_request_with_affinity().into_owned();
        (key_request.estimate, key_request.group) = (Some(credits), group);
        let session_position = self.roster.position_of(session_key);
        match key_use {
            SessionKeyUse::Required => {
                // Earlier refusals of this key were about other requests.
                key_request.tried.clear();
                key_request.preferred.clear();
                let positions = 0..self.roster.keys().len();
                key_request.ineligible =
                    positions.filter(|position| Some(*position) != session_position).collect();
            }
            SessionKeyUse::Preferred => key_request.preferred = session_position.into_iter().collect(),
        }
        key_request
    }

    /// Sets the credits and the concurrency group that later reservations of this request need.
    pub(super) fn set_speech_requirements(&mut self, credits: u64, group: Option<ConcurrencyGroup>) {
        (self.key_request.estimate, self.key_request.group) = (Some(credits), group);
    }

    /// Adds the identifiers in a client's message, and returns whether `key` may still serve the session.
    ///
    /// # Errors
    ///
    /// Fails when the session names resources of two accounts.
    pub(super) async fn add_message_identifiers<C>(
        &mut self,
        message: &[u8],
        proxy: &Proxy<C>,
        key: &Key,
    ) -> Result<bool, ConflictingOwners> {
        self.affinity.add_message_identifiers(message, proxy, &self.roster).await?;
        Ok(self.eligibility(key) != Eligibility::No)
    }

    /// Returns the facts for the retry decision after an attempt with `key`.
    pub(super) fn retry_facts(
        &mut self,
        progress: Progress,
        body: &Replay<Incoming>,
        key: &Arc<Key>,
        limits: &Limits,
    ) -> AttemptFacts {
        self.last_verdict = match progress {
            Progress::Responded(verdict) => Some(verdict),
            Progress::Unsent | Progress::ProxyAuthenticationFailed | Progress::NoResponse => None,
        };
        let has_other_route = match progress {
            Progress::Unsent | Progress::ProxyAuthenticationFailed => self.record_failed_route(key, progress),
            Progress::NoResponse | Progress::Responded(_) => false,
        };
        let is_missing = progress == Progress::Responded(Verdict::NotFound);
        let may_be_elsewhere = is_missing && self.affinity.record_not_found(key, &self.roster);
        AttemptFacts {
            progress,
            has_other_route,
            may_be_elsewhere,
            effect: self.features.effect,
            body: body.replayable_body(),
            // The retry timeout starts when the whole body has arrived, so the upload does not count.
            is_past_deadline: clock::elapsed_since(body.last_received_at()) >= limits.retry_timeout,
            attempts: self.attempts,
            max_attempts: limits.max_attempts,
            non_key_retries: self.non_key_retries,
            ambiguous_workspaces: self.refusals.agreeing_workspaces(),
            abuse_suspicions: self.refusals.abuse_suspicions(),
        }
    }

    /// Returns the route to the provider of requests with `key`.
    fn route<'a>(&'a self, key: &'a Key) -> &'a Arc<Authority> {
        key.destination().unwrap_or(&self.default_route)
    }

    /// Records that this request could not be sent by the route of `key`, and excludes the keys that would fail in the
    /// same way. If the proxy refused Keychoir's credentials, these are all keys with that proxy. Otherwise, these are
    /// the keys with the same route after its second failure, because the first failure may concern only a single
    /// connection. Returns whether the request may use another route, which has not failed.
    fn record_failed_route(&mut self, key: &Key, progress: Progress) -> bool {
        let failed_route = Arc::clone(self.route(key));
        let is_repeated = self.failed_routes.contains(&failed_route);
        let is_excluded = |route: &Authority| match progress {
            Progress::ProxyAuthenticationFailed => route.proxy() == failed_route.proxy(),
            Progress::Unsent | Progress::NoResponse | Progress::Responded(_) => {
                is_repeated && *route == *failed_route
            }
        };
        let roster = Arc::clone(&self.roster);
        for (position, other) in roster.keys().iter().enumerate() {
            let route = Arc::clone(self.route(other));
            if is_excluded(&route) {
                self.exclude_position(position);
                self.add_failed_route(route);
            }
        }
        self.add_failed_route(failed_route);
        roster.keys().iter().enumerate().any(|(position, other)| {
            !self.key_request.tried.contains(&position)
                && !self.failed_routes.contains(self.route(other))
                && self.eligibility(other) != Eligibility::No
        })
    }

    fn add_failed_route(&mut self, route: Arc<Authority>) {
        if !self.failed_routes.contains(&route) {
            self.failed_routes.push(route);
        }
    }

    fn exclude_position(&mut self, position: usize) {
        if !self.key_request.tried.contains(&position) {
            self.key_request.tried.push(position);
        }
    }

    /// Excludes `key` from further attempts, unless it is likely to recover while the request waits. A key may recover
    /// from its concurrency limit, and from a rate limit of only this key whose end is known. After a second refusal, a
    /// key is always excluded, because the refusal is about the request. After an attempt without a response, excludes
    /// nothing, because `record_failed_route` excludes keys by their routes.
    pub(super) fn exclude(&mut self, key: &Key) {
        if self.last_verdict.is_none() {
            return;
        }
        let may_recover = match self.last_verdict {
            Some(Verdict::Concurrency { .. }) => self.key_request.group.is_some(),
            Some(Verdict::RateLimited(Some(retry_after))) => {
                retry_after <= self.roster.queue_timeout() && !self.refusals.is_repeated_elsewhere()
            }
            _ => false,
        };
        if !may_recover || self.refusals.count_by_key(key) > 1 {
            self.key_request.tried.extend(self.roster.position_of(key));
        }
        // A rate limit that a second account reports is about the request, so the first key is also excluded.
        if matches!(self.last_verdict, Some(Verdict::RateLimited(_))) && self.refusals.is_repeated_elsewhere()
        {
            let agreeing_positions =
                self.refusals.agreeing_keys().filter_map(|key| self.roster.position_of(key));
            let untried: Vec<usize> =
                agreeing_positions.filter(|position| !self.key_request.tried.contains(position)).collect();
            self.key_request.tried.extend(untried);
        }
    }

    /// Counts a retry that is independent of the key, and waits for `pause` plus a random time of up to
    /// `pause`, which spreads the retries of many requests.
    pub(super) async fn wait_before_retry(&mut self, pause: Duration) {
        self.non_key_retries += 1;
        tokio::time::sleep(pause + pause.mul_f64(fastrand::f64())).await;
    }
}
