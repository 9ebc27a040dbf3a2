//! Collects the refusals of one request, and concludes from them about keys and accounts.
//!
//! One faulty request must not disable all keys, so a refusal is attributed before it counts. A refusal that contains
//! the account's credits, or has a message that can only concern the account, is evidence about the account
//! immediately. Any other refusal is evidence about the account until a second account refuses the same request in
//! the same way. The second refusal shows that the request is the reason. If another account serves the request, the
//! refusal was about the account. A refusal that matches none of the provider's known refusals is unexplained, and is
//! never evidence. It only restricts its account, which is then tried last for similar requests.

use std::collections::HashSet;
use std::mem::{self, discriminant};
use std::sync::Arc;
use std::time::Duration;

use crate::elevenlabs::features::RequestFeatures;
use crate::policy::evidence::RefusalSource;
use crate::policy::quota::Extension;
use crate::policy::units::UnixMs;
use crate::policy::verdict::{UnexplainedRefusal, Verdict};
use crate::pool::{Key, KeyRequest, Pool, RefusedAttempt, Restriction, Roster, Transition};

/// Maximum age of a poll that may contradict the credits that a refusal reports. After an older poll, another
/// program may have spent credits. Accounts are polled every ten minutes by default.
const MAX_POLL_AGE: Duration = Duration::from_secs(15 * 60);

/// The refusals of one request.
#[derive(Debug, Default)]
pub(super) struct Refusals(Vec<RecordedRefusal>);

/// One refusal of the request, and the conclusions from it.
#[derive(Debug)]
struct RecordedRefusal {
    verdict: Verdict,
    key: Arc<Key>,
    key_request: KeyRequest,
    source: RefusalSource,
    /// Whether the refusal is recorded as evidence about the key or its workspace.
    is_recorded: bool,
    /// Whether another account has refused this request in the same way.
    is_repeated_elsewhere: bool,
    /// Whether several other accounts, or this account, have refused similar requests in the same way.
    is_repeated: bool,
    /// Whether a poll or a served request has refuted this account's refusal of a similar request.
    was_refuted: bool,
    /// The verdict with the reported credits, if a recent poll contradicts them.
    contradicted_verdict: Option<Verdict>,
}

/// The conclusions from a refusal or from a success.
#[derive(Debug, Default)]
pub(super) struct Conclusions {
    /// Changes of the state of keys.
    pub(super) transitions: Vec<Transition>,
    /// Keys whose evidence was recorded or withdrawn, even if their state is the same.
    pub(super) evidence_changes: Vec<Arc<Key>>,
    /// Restrictions of accounts, each with a key of the account.
    pub(super) restricted: Vec<(Arc<Key>, Restriction)>,
}

/// The data for recording the refusals of one request in the pool.
pub(super) struct RefusalContext<'a> {
    pub(super) pool: &'a Arc<Pool>,
    pub(super) roster: &'a Roster,
    pub(super) features: &'a RequestFeatures,
    pub(super) now: UnixMs,
}

impl Refusals {
    /// Records a refusal by `key`, and updates the evidence about the key and its account.
    pub(super) fn record(
        &mut self,
        context: &RefusalContext<'_>,
        key: &Arc<Key>,
        verdict: Verdict,
        key_request: &KeyRequest,
        source: RefusalSource,
    ) -> Conclusions {
        let mut conclusions = Conclusions::default();
        let (verdict, contradicted_verdict) = check_reported_credits(key, verdict, context.now);
        let mut refusal = RecordedRefusal {
            verdict,
            key: Arc::clone(key),
            key_request: key_request.clone(),
            source,
            is_recorded: false,
            is_repeated_elsewhere: false,
            is_repeated: false,
            was_refuted: false,
            contradicted_verdict,
        };
        let mut has_agreement = false;
        for earlier in self.0.iter_mut().filter(|earlier| earlier.agrees_with(&refusal)) {
            has_agreement = true;
            earlier.record_agreement(context, &mut conclusions);
        }
        refusal.was_refuted = !has_agreement && refusal.was_refuted(context);
        refusal.is_repeated = !has_agreement && (refusal.was_refuted || refusal.repeats_others(context));
        if has_agreement || refusal.is_repeated {
            refusal.record_agreement(context, &mut conclusions);
        } else {
            refusal.record_evidence(context, &mut conclusions);
        }
        self.0.push(refusal);
        conclusions
    }

    /// Records that another key has served the request. This success shows that the refusals were about their accounts.
    pub(super) fn record_success(&mut self, context: &RefusalContext<'_>) -> Conclusions {
        let mut conclusions = Conclusions::default();
        // If only one account reported credits that a poll contradicts, its credits are newer than the poll.
        let is_only_contradiction =
            self.0.iter().filter(|refusal| refusal.contradicted_verdict.is_some()).count() == 1;
        for refusal in &mut self.0 {
            refusal.is_repeated_elsewhere = false;
            if is_only_contradiction && let Some(verdict) = refusal.contradicted_verdict.take() {
                refusal.verdict = verdict;
                refusal.is_recorded = false;
            }
            if refusal.verdict == Verdict::Unexplained(UnexplainedRefusal::Bodiless) {
                // The response to a `HEAD` request contains no message, so the refusal may have been about the
                // method.
                continue;
            }
            if matches!(refusal.verdict, Verdict::Unexplained(_)) {
                context.restrict(refusal, &mut conclusions);
                // A poll shows whether the account has a more general problem.
                context.pool.request_poll(&refusal.key);
            } else if !refusal.is_recorded && !refusal.was_refuted {
                refusal.record_evidence(context, &mut conclusions);
            }
        }
        conclusions
    }

    /// Returns the number of refusals of the request by `key`.
    pub(super) fn count_by_key(&self, key: &Key) -> usize {
        self.0.iter().filter(|refusal| std::ptr::eq(&*refusal.key, key)).count()
    }

    /// Returns whether the last refusal is about the request and not about its account, because another account has
    /// refused in the same way.
    pub(super) fn is_about_request(&self) -> bool {
        self.0.last().is_some_and(|last| last.is_repeated_elsewhere && !last.is_recorded)
    }

    /// Returns whether another account has refused in the same way as the last refusal.
    pub(super) fn is_repeated_elsewhere(&self) -> bool {
        self.0.last().is_some_and(|last| last.is_repeated_elsewhere)
    }

    /// Returns whether several other accounts, or the same account, have refused similar requests in the same way as
    /// the last refusal.
    pub(super) fn is_repeated(&self) -> bool {
        self.0.last().is_some_and(|last| last.is_repeated)
    }

    /// Returns the keys whose accounts refused in the same way as the last refusal, including the key of that refusal.
    pub(super) fn agreeing_keys(&self) -> impl Iterator<Item = &Key> {
        self.agreeing_refusals().map(|refusal| &*refusal.key)
    }

    /// Returns the number of workspaces that refused in the same way as the last refusal, including its workspace.
    pub(super) fn agreeing_workspaces(&self) -> u32 {
        count_workspaces(self.agreeing_refusals())
    }

    fn agreeing_refusals(&self) -> impl Iterator<Item = &RecordedRefusal> {
        let last = self.0.last();
        self.0.iter().filter(move |refusal| last.is_some_and(|last| refusal.is_same_kind(last)))
    }

    /// Returns the number of workspaces with an abuse verdict that have the same plan as the workspace of the
    /// last refusal.
    pub(super) fn abuse_suspicions(&self) -> u32 {
        let Some(last) = self.0.last() else { return 0 };
        let tier = last.key.workspace().tier();
        count_workspaces(
            self.0.iter().filter(|refusal| {
                refusal.verdict == Verdict::Abuse && refusal.key.workspace().tier() == tier
            }),
        )
    }

    /// Returns the keys of accounts whose plan does not allow the request, or that refused it for suspected abuse.
    pub(super) fn plan_refused_keys(&self) -> impl Iterator<Item = &Arc<Key>> {
        let is_refused_for_plan =
            |refusal: &&RecordedRefusal| matches!(refusal.verdict, Verdict::PlanFeature(_) | Verdict::Abuse);
        self.0.iter().filter(is_refused_for_plan).map(|refusal| &refusal.key)
    }
}

/// Returns the number of different workspaces among the accounts that refused.
fn count_workspaces<'a>(refusals: impl Iterator<Item = &'a RecordedRefusal>) -> u32 {
    let workspaces: HashSet<_> =
        refusals.map(|refusal| std::ptr::from_ref(refusal.key.workspace())).collect();
    u32::try_from(workspaces.len()).unwrap_or(u32::MAX)
}

impl RecordedRefusal {
    /// Returns whether the refusals differ only in their numbers of credits and their times.
    fn is_same_kind(&self, other: &Self) -> bool {
        let has_same_message = match (self.verdict, other.verdict) {
            (Verdict::Unexplained(this), Verdict::Unexplained(other)) => {
                discriminant(&this) == discriminant(&other)
            }
            (this, other) => this.is_conclusive() == other.is_conclusive(),
        };
        has_same_message && discriminant(&self.verdict) == discriminant(&other.verdict)
    }

    /// Returns whether a different account refused in the same way, without details that depend on one account.
    fn agrees_with(&self, other: &Self) -> bool {
        let is_other_workspace = !std::ptr::eq(self.key.workspace(), other.key.workspace());
        is_other_workspace && !self.verdict.is_conclusive() && self.is_same_kind(other)
    }

    /// Returns whether other accounts are known to refuse similar requests in the same way, so that this refusal is
    /// not about its account. Rate limits depend on the time, so each request attributes them again.
    fn repeats_others(&self, context: &RefusalContext<'_>) -> bool {
        let RefusalContext { pool, features, now, .. } = context;
        !self.verdict.is_conclusive()
            && !matches!(self.verdict, Verdict::RateLimited(_))
            && pool.restrictions().is_refused_by_others(features, &self.key, self.verdict, *now)
    }

    /// Returns whether the same account has refused similar requests in the same way, and was refuted.
    fn was_refuted(&self, context: &RefusalContext<'_>) -> bool {
        let RefusalContext { pool, features, now, .. } = context;
        !self.verdict.is_conclusive() && pool.was_refuted(features, &self.key, self.verdict, *now)
    }

    /// Describes the refusal for the pool.
    fn refused_attempt(&self) -> RefusedAttempt<'_> {
        let Self { verdict, key_request, source, is_repeated_elsewhere, .. } = self;
        RefusedAttempt {
            verdict: *verdict,
            request: Some(key_request),
            is_repeated_elsewhere: *is_repeated_elsewhere,
            source: source.clone(),
        }
    }

    /// Records the refusal as evidence about the key or its workspace, and about features that their plan
    /// lacks.
    fn record_evidence(&mut self, context: &RefusalContext<'_>, conclusions: &mut Conclusions) {
        if matches!(self.verdict, Verdict::Unexplained(_)) {
            return;
        }
        let RefusalContext { pool, roster, now, .. } = context;
        conclusions.transitions.extend(pool.record_refusal(roster, &self.key, self.refused_attempt(), *now));
        conclusions.evidence_changes.push(Arc::clone(&self.key));
        self.is_recorded = true;
        // The restriction remains after a poll or a served request refutes it, so that the same refusal of a
        // similar request is recognized.
        if !self.verdict.concerns_account() || !self.verdict.is_conclusive() {
            context.restrict(self, conclusions);
        }
    }

    /// Records that a second account refuses in the same way. After a rate limit, one request may probe
    /// whether the limit still holds. Any other refusal is withdrawn, because it is not about its account.
    /// Similar requests are restricted for the account, so that they do not try all accounts again. If a poll
    /// can decide, one is requested.
    fn record_agreement(&mut self, context: &RefusalContext<'_>, conclusions: &mut Conclusions) {
        let RefusalContext { pool, roster, now, .. } = context;
        let was_repeated_elsewhere = mem::replace(&mut self.is_repeated_elsewhere, true);
        if matches!(self.verdict, Verdict::RateLimited(_)) {
            if !was_repeated_elsewhere || !self.is_recorded {
                self.record_evidence(context, conclusions);
            }
            return;
        }
        if mem::replace(&mut self.is_recorded, false) {
            let transitions = pool.withdraw_refusal(roster, &self.key, &self.source, *now);
            conclusions.transitions.extend(transitions);
            conclusions.evidence_changes.push(Arc::clone(&self.key));
        }
        if self.verdict != Verdict::Unexplained(UnexplainedRefusal::Bodiless) {
            context.restrict(self, conclusions);
            pool.request_poll(&self.key);
        }
    }
}

/// Removes reported credits from `verdict` that are not the account's, or that a recent poll contradicts. In
/// the latter case, also returns the verdict with the reported credits.
fn check_reported_credits(key: &Key, verdict: Verdict, now: UnixMs) -> (Verdict, Option<Verdict>) {
    let Verdict::WorkspaceQuota(shortfall) = verdict else { return (verdict, None) };
    let workspace = key.workspace();
    let quota = workspace.quota(now);
    let extension = match quota.extension {
        Extension::Credits(credits) => credits,
        Extension::None | Extension::Unlimited => 0,
    };
    let shortfall = shortfall.if_quota_matches(quota.limit, extension);
    let is_recent = workspace.polled_at().is_some_and(|at| now.since(at) <= MAX_POLL_AGE);
    let reported_verdict = Verdict::WorkspaceQuota(shortfall);
    match (quota.spendable(), quota.limit) {
        (Some(remaining), Some(limit)) if is_recent => {
            let verdict = Verdict::WorkspaceQuota(shortfall.unless_contradicted(remaining, limit));
            (verdict, (verdict != reported_verdict).then_some(reported_verdict))
        }
        _ => (reported_verdict, None),
    }
}

impl RefusalContext<'_> {
    /// Records that the account is tried last for requests that are similar to the refused one.
    fn restrict(&self, refusal: &RecordedRefusal, conclusions: &mut Conclusions) {
        let restriction = self.pool.restrict(
            self.roster,
            &refusal.key,
            self.features,
            &refusal.refused_attempt(),
            self.now,
        );
        conclusions.restricted.extend(restriction.map(|restriction| (Arc::clone(&refusal.key), restriction)));
    }
}
