//! Records what changes the state of keys: refusals, served requests, charges and polls.
//!
//! Each fact is kept where it holds: in the key, its workspace, a concurrency group of that, or the
//! restrictions of plans and endpoints.

use std::sync::Arc;
use std::time::Duration;

use super::cells::SettledReservation;
use super::key::Key;
use super::lease::Lease;
use super::refusal::RefusalRecord;
use super::restrictions::{Force, Holder, Restriction};
use super::roster::Roster;
use super::wait_queue::KeyRequest;
use super::{Observation, Pool, Settings, Transition, news_of_charge, news_of_workspace};
use crate::elevenlabs::features::{Remembered, RequestFeatures};
use crate::policy::evidence::{
    ClaimedFault, Evidence, Poll, PollResult, RefusalSource, is_refuted_by_service, poll_decides_at,
};
use crate::policy::units::UnixMs;
use crate::policy::verdict::Verdict;

/// A refusal of the provider, with the request's needs and its source.
#[derive(Clone, Debug)]
pub struct Refused<'a> {
    /// The classification of the response.
    pub verdict: Verdict,
    /// What the request needed of a key.
    pub request: Option<&'a KeyRequest>,
    /// Whether another account has refused the same request in the same words.
    pub is_agreed: bool,
    /// Route, status and words of the response.
    pub source: RefusalSource,
}

/// A request that was served.
#[derive(Clone, Copy, Debug)]
pub struct Served<'a> {
    /// What the request needed of a key.
    pub request: Option<&'a KeyRequest>,
    /// When the attempt began.
    pub began_at: UnixMs,
    /// Whether it costs credits.
    pub is_charged: bool,
}

impl Pool {
    /// Records a refusal as evidence about the key or its workspace, and returns the state changes. A
    /// refusal about anything narrower records nothing here: see [`restrict`](Self::restrict).
    pub fn record_refusal(
        &self,
        roster: &Roster,
        key: &Key,
        refused: Refused<'_>,
        now: UnixMs,
    ) -> Vec<Transition> {
        let settings = roster.settings();
        let workspace = key.workspace();
        let Refused { verdict, request, is_agreed, source } = refused;
        let group = request.and_then(|request| request.group);
        if let Verdict::Concurrency { maximum } = verdict {
            if let Some(group) = group {
                workspace.limiter(group).record_refusal(maximum, now.plus(settings.concurrency_cooldown));
            }
            return Vec::new();
        }
        let Some(claim) = ClaimedFault::of(verdict, request.and_then(|request| request.estimate), group)
        else {
            return Vec::new();
        };
        let named_span = if let Verdict::RateLimited(span) = verdict { span } else { None };
        let evidence = Evidence { claim, at: now, named_span, is_agreed, source };
        let is_of_key = claim.is_of_key(matches!(verdict, Verdict::KeyQuota(_)));
        let cell = if is_of_key { key.evidence_cell() } else { workspace.evidence_cell() };
        let wants_poll = poll_decides_at(&evidence, cell.poll(), &settings.cooldowns()) == Some(now);
        cell.add(evidence);
        if is_of_key {
            key.weigh(settings, now);
        } else {
            workspace.weigh(settings, now);
        }
        if wants_poll {
            self.want_poll(key);
        }
        news_of_workspace(roster, workspace, now)
    }

    /// Withdraws the evidence about `key` that was recorded with this source: another account has refused
    /// the request in the same words, so the refusal was about the request.
    pub fn withdraw_refusal(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        source: &RefusalSource,
        now: UnixMs,
    ) -> Vec<Transition> {
        // Clients choose request identifiers and may reuse one, so the evidence is matched by the address
        // of its identifier.
        let is_its_own = |known: &Evidence| Arc::ptr_eq(&known.source.request_id, &source.request_id);
        self.drop_evidence(roster, key, is_its_own, now)
    }

    /// Records that a request was served with this key: evidence that this refutes is dropped.
    pub fn record_service(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        served: Served<'_>,
        now: UnixMs,
    ) -> Vec<Transition> {
        // Usually there is no evidence.
        if key.evidence_cell().is_empty() && key.workspace().evidence_cell().is_empty() {
            return Vec::new();
        }
        let Served { request, began_at, is_charged } = served;
        let group = request.and_then(|request| request.group);
        let is_refuted = |known: &Evidence| is_refuted_by_service(known, began_at, is_charged, group);
        let of_others = self.refuted_elsewhere(roster, key, is_refuted, now);
        let mut transitions = self.drop_evidence(roster, key, is_refuted, now);
        transitions.extend(of_others);
        transitions
    }

    /// Several accounts have named a rate limit for one request. When one of them serves the group, the
    /// limit was about the request, and the evidence of the other accounts is dropped, too.
    fn refuted_elsewhere(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        is_refuted: impl Fn(&Evidence) -> bool,
        now: UnixMs,
    ) -> Vec<Transition> {
        let of_workspace = key.workspace().evidence();
        let is_shared = |known: &&Evidence| {
            known.is_agreed && matches!(known.claim, ClaimedFault::RateLimited(_)) && is_refuted(known)
        };
        let Some(refuted) = of_workspace.iter().find(is_shared) else { return Vec::new() };
        let is_same = |known: &Evidence| {
            known.claim.is_same(refuted.claim)
                && known.is_agreed
                && known.source.request_id == refuted.source.request_id
        };
        let others = roster.keys().iter().filter(|other| !std::ptr::eq(other.workspace(), key.workspace()));
        others.flat_map(|other| self.drop_evidence(roster, other, is_same, now)).collect()
    }

    fn drop_evidence(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        is_over: impl Fn(&Evidence) -> bool,
        now: UnixMs,
    ) -> Vec<Transition> {
        let (settings, workspace) = (roster.settings(), key.workspace());
        let of_key = key.evidence_cell().drop_if(&is_over);
        let of_workspace = workspace.evidence_cell().drop_if(&is_over);
        if of_key {
            key.weigh(settings, now);
        }
        if of_workspace {
            workspace.weigh(settings, now);
        }
        if !of_key && !of_workspace {
            return Vec::new();
        }
        self.dispatch_waiters(now);
        news_of_workspace(roster, workspace, now)
    }

    /// Records what a refusal proves that an account cannot do, as narrowly as its words say. Returns the
    /// restriction if it is new.
    pub fn restrict(
        &self,
        roster: &Roster,
        key: &Key,
        features: &RequestFeatures,
        refused: &Refused<'_>,
        now: UnixMs,
    ) -> Option<Restriction> {
        let record = RefusalRecord::new(key, features, refused, now);
        let own = Self::restriction(record.clone(), roster.settings())?;
        let is_new = self.restrictions.record(&own, now);
        let of_plan = RefusalRecord { is_of_plan: true, ..record };
        if let Some(of_plan) = Self::restriction(of_plan, roster.settings()) {
            self.restrictions.record(&of_plan, now);
        }
        is_new.then_some(own)
    }

    /// Computes the restriction that follows from a refusal, when it is received and when it is read from
    /// the database.
    pub(super) fn restriction(record: RefusalRecord, settings: &Settings) -> Option<Restriction> {
        let RefusalRecord { verdict, is_agreed, .. } = &record;
        let (limit, memory) = record.features.refused(*verdict)?;
        let has_group = record.is_in_group;
        let rate = |span: Option<Duration>| span.unwrap_or(settings.rate_limited_cooldown);
        let (span, force) = match memory {
            Remembered::RateLimit(_) | Remembered::Concurrency if has_group => return None,
            Remembered::RateLimit(span) | Remembered::Throttle(span) => {
                (rate(span).min(settings.max_retry_after), Force::Strict)
            }
            Remembered::Concurrency => (settings.concurrency_cooldown, Force::Strict),
            Remembered::Permission => (settings.permission_cooldown, Force::Refused),
            Remembered::Plan | Remembered::Slots => (settings.feature_cooldown, Force::Refused),
            Remembered::Endpoint => (settings.endpoint_cooldown, Force::Refused),
            Remembered::Unproven => (settings.unproven_cooldown, Force::Refused),
        };
        let is_unclear = matches!(verdict, Verdict::Unexplained(_));
        let is_of_account = matches!(memory, Remembered::Unproven) && !is_agreed;
        let force = if is_of_account {
            Force::Noted
        } else if *is_agreed && is_unclear {
            Force::Suspected
        } else {
            force
        };
        let holder = match memory {
            Remembered::Plan if record.is_of_plan => Holder::Plan(record.tier.clone()?),
            _ if record.is_of_plan => return None,
            Remembered::Permission => Holder::Key(record.key),
            Remembered::Plan
            | Remembered::Slots
            | Remembered::Endpoint
            | Remembered::Unproven
            | Remembered::RateLimit(_)
            | Remembered::Throttle(_)
            | Remembered::Concurrency => Holder::Workspace(record.workspace.clone()),
        };
        let mut restriction = Restriction {
            number: 0,
            holder,
            limit,
            verdict: verdict.word(),
            since: record.at,
            refused_at: record.at,
            until: record.at.plus(span),
            force,
            is_agreed: *is_agreed,
            source: Arc::clone(&record.source),
            record: Arc::new(record),
        };
        if let Some(earlier) = restriction.record.earlier {
            restriction.follow(earlier);
        }
        Some(restriction)
    }

    /// Whether several accounts other than that of `key` have refused a request with these features with
    /// this verdict.
    #[must_use]
    pub fn is_refused_by_others(
        &self,
        features: &RequestFeatures,
        key: &Key,
        verdict: Verdict,
        now: UnixMs,
    ) -> bool {
        self.restrictions.is_refused_by_others(features, key, verdict.word(), now)
    }

    /// Whether the account of `key` has refused a request with these features with this verdict before,
    /// and that was refuted since: by a poll, or by another request that was served.
    #[must_use]
    pub fn was_refuted(&self, features: &RequestFeatures, key: &Key, verdict: Verdict, now: UnixMs) -> bool {
        let Some(claim) = ClaimedFault::of(verdict, None, None) else { return false };
        let holds = |known: &Evidence| known.claim.is_same(claim);
        self.restrictions.is_known_of(features, key, verdict.word(), now)
            && !key.evidence().iter().any(holds)
            && !key.workspace().evidence().iter().any(holds)
    }

    /// Charges the cost of the request that holds `lease`.
    pub fn settle(&self, roster: &Roster, lease: &mut Lease, credits: u64, now: UnixMs) -> Vec<Transition> {
        lease.settle(credits, now);
        if credits == 0 { Vec::new() } else { news_of_charge(roster, lease.key().workspace(), now) }
    }

    /// Charges credits that were spent with a key and are reported only after its lease has ended.
    pub fn spend(&self, roster: &Roster, key: &Key, credits: u64, now: UnixMs) -> Vec<Transition> {
        key.workspace().cell().settle(SettledReservation { reserved: 0, spent: credits }, now);
        key.workspace().spending().add(credits, now);
        news_of_charge(roster, key.workspace(), now)
    }

    /// Applies the result of a poll with `key`, and returns the state changes.
    pub fn observe(
        self: &Arc<Self>,
        roster: &Roster,
        key: &Key,
        observation: Observation,
        now: UnixMs,
    ) -> Vec<Transition> {
        let (settings, workspace) = (roster.settings(), key.workspace());
        key.want_poll(false);
        let result = match observation {
            Observation::Quota { quota, tier, is_paid, capabilities } => {
                workspace.observe(quota, tier, capabilities, now, settings.quota_lag);
                if capabilities.voices_left.is_some_and(|left| left > 0) {
                    self.restrictions.lift(workspace.identity(), Verdict::Slots.word());
                }
                let result = PollResult::Figures { left: quota.spendable(), is_paid };
                workspace.evidence_cell().polled(Poll { at: now, result });
                result
            }
            Observation::Unreadable => PollResult::Unreadable,
            Observation::Invalid { verdict, source } => {
                let claim = if verdict == Verdict::WrongHost {
                    ClaimedFault::WrongHost
                } else {
                    ClaimedFault::InvalidKey
                };
                key.evidence_cell().add(Evidence {
                    claim,
                    at: now,
                    named_span: None,
                    is_agreed: false,
                    source,
                });
                PollResult::Invalid
            }
        };
        key.evidence_cell().polled(Poll { at: now, result });
        key.weigh(settings, now);
        workspace.weigh(settings, now);
        self.dispatch_waiters(now);
        news_of_workspace(roster, workspace, now)
    }

    /// When a poll with `key` can decide about a refusal; `None` when there is nothing to decide.
    #[must_use]
    pub fn poll_due_at(roster: &Roster, key: &Key) -> Option<UnixMs> {
        let cooldowns = roster.settings().cooldowns();
        let of_key = key.evidence().into_iter().map(|known| (known, key.evidence_cell().poll()));
        let of_workspace = key.workspace().evidence().into_iter();
        let of_workspace = of_workspace.map(|known| (known, key.workspace().evidence_cell().poll()));
        of_key.chain(of_workspace).filter_map(|(known, poll)| poll_decides_at(&known, poll, &cooldowns)).min()
    }
}
