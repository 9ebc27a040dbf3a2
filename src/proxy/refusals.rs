//! The refusals of one request, and the conclusions from them about keys and accounts.
//!
//! A refusal with figures, or with a message that depends only on the refusing account, is evidence about the
//! account at once. A message alone is evidence only while no second account refuses the same request in the
//! same way: then the refusal is about the request. When another account serves the request, the refusal was
//! about the account. One faulty request thus cannot disable all keys.

use std::sync::Arc;
use std::time::Duration;

use crate::elevenlabs::features::RequestFeatures;
use crate::policy::budget::Extension;
use crate::policy::evidence::RefusalSource;
use crate::policy::units::UnixMs;
use crate::policy::verdict::{Refusal, Verdict};
use crate::pool::{Key, KeyRequest, Pool, Refused, Restriction, Roster, Transition};

/// Maximum age of a poll that may contradict the figures of a refusal: another program may have spent credits
/// since an older poll. Accounts are polled every ten minutes by default.
const FRESH_POLL_MAX: Duration = Duration::from_secs(15 * 60);

/// The refusals of one request.
#[derive(Debug, Default)]
pub(super) struct Refusals(Vec<RecordedRefusal>);

#[derive(Debug)]
struct RecordedRefusal {
    verdict: Verdict,
    key: Arc<Key>,
    key_request: KeyRequest,
    source: RefusalSource,
    /// Whether it is recorded as evidence about the key or its workspace.
    is_recorded: bool,
    /// Whether another account has refused this request in the same way.
    is_agreed: bool,
    /// Whether several other accounts, or this account, have refused similar requests in the same
    /// way.
    is_repeated: bool,
    /// Whether this account's refusal of a similar request was refuted by a poll or a served
    /// request.
    was_refuted: bool,
    /// The verdict with the figures that a fresh poll contradicts.
    contradicted: Option<Verdict>,
}

/// The conclusions from a refusal or from a success.
#[derive(Debug, Default)]
pub(super) struct Conclusions {
    /// Changes of the state of keys.
    pub(super) transitions: Vec<Transition>,
    /// Restrictions of accounts, each with a key of the account.
    pub(super) restricted: Vec<(Arc<Key>, Restriction)>,
}

/// The pool, the request's features and the time, for recording a refusal.
pub(super) struct RefusalContext<'a> {
    pub(super) pool: &'a Arc<Pool>,
    pub(super) roster: &'a Roster,
    pub(super) features: &'a RequestFeatures,
    pub(super) now: UnixMs,
}

impl Refusals {
    /// Adds a refusal by `key`, and records it as evidence if it proves something.
    pub(super) fn add(
        &mut self,
        context: &RefusalContext<'_>,
        key: &Arc<Key>,
        verdict: Verdict,
        key_request: &KeyRequest,
        source: RefusalSource,
    ) -> Conclusions {
        let mut conclusions = Conclusions::default();
        let (verdict, contradicted) = with_figures_of(key, verdict, context.now);
        let (key, key_request) = (Arc::clone(key), key_request.clone());
        let mut refusal = RecordedRefusal {
            verdict,
            key,
            key_request,
            source,
            is_recorded: false,
            is_agreed: false,
            is_repeated: false,
            was_refuted: false,
            contradicted,
        };
        let mut has_second = false;
        for earlier in self.0.iter_mut().filter(|earlier| earlier.agrees_with(&refusal)) {
            has_second = true;
            earlier.record_agreement(context, &mut conclusions);
        }
        refusal.was_refuted = !has_second && refusal.was_refuted(context);
        refusal.is_repeated = !has_second && (refusal.was_refuted || refusal.repeats(context));
        if has_second || refusal.is_repeated {
            refusal.record_agreement(context, &mut conclusions);
        } else {
            refusal.record(context, &mut conclusions);
        }
        self.0.push(refusal);
        conclusions
    }

    /// Records that another key has served the request: refusals by a message alone were about
    /// their accounts.
    pub(super) fn served(&mut self, context: &RefusalContext<'_>) -> Conclusions {
        let mut conclusions = Conclusions::default();
        // One account alone had these figures, and another has served: the figures are newer than the poll.
        let is_single = self.0.iter().filter(|refusal| refusal.contradicted.is_some()).count() == 1;
        for refusal in &mut self.0 {
            refusal.is_agreed = false;
            if is_single && let Some(with_figures) = refusal.contradicted.take() {
                refusal.verdict = with_figures;
                refusal.is_recorded = false;
            }
            if refusal.verdict == Verdict::Unexplained(Refusal::Bodiless) {
                // The response to a `HEAD` has no message, and the refusal may have been about the
                // method.
                continue;
            }
            if matches!(refusal.verdict, Verdict::Unexplained(_)) {
                context.restrict(refusal, &mut conclusions);
                // A poll shows whether the account has a more general problem.
                context.pool.want_poll(&refusal.key);
            } else if !refusal.is_recorded && !refusal.was_refuted {
                refusal.record(context, &mut conclusions);
            }
        }
        conclusions
    }

    /// Whether no account has refused the request yet.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of refusals of the request by `key`.
    pub(super) fn count_by_key(&self, key: &Key) -> usize {
        self.0.iter().filter(|refusal| std::ptr::eq(&*refusal.key, key)).count()
    }

    /// Whether the last refusal says nothing about its account, because other accounts gave the
    /// same one.
    pub(super) fn is_about_request(&self) -> bool {
        self.0.last().is_some_and(|last| last.is_agreed && !last.is_recorded)
    }

    /// Whether another account has given the same refusal as the last one.
    pub(super) fn is_agreed(&self) -> bool {
        self.0.last().is_some_and(|last| last.is_agreed)
    }

    /// Whether several other accounts, or the same one, gave the last refusal to similar requests
    /// before.
    pub(super) fn is_repeated(&self) -> bool {
        self.0.last().is_some_and(|last| last.is_repeated)
    }

    /// Keys that were refused in the same way as the last one.
    pub(super) fn agreeing_keys(&self) -> impl Iterator<Item = &Key> {
        let last = self.0.last();
        self.0
            .iter()
            .filter(move |refusal| last.is_some_and(|last| refusal.is_like(last)))
            .map(|refusal| &*refusal.key)
    }

    /// Number of workspaces that gave the last verdict.
    pub(super) fn agreeing_workspaces(&self) -> u32 {
        let Some(last) = self.0.last() else { return 0 };
        self.workspaces(|refusal| refusal.is_like(last))
    }

    /// Number of workspaces on the plan of the last one that got an abuse verdict.
    pub(super) fn suspected_of_plan(&self) -> u32 {
        let Some(last) = self.0.last() else { return 0 };
        let tier = last.key.workspace().tier();
        self.workspaces(|refusal| refusal.verdict == Verdict::Abuse && refusal.key.workspace().tier() == tier)
    }

    /// Keys whose plan does not allow the request.
    pub(super) fn plan_refused_keys(&self) -> impl Iterator<Item = &Arc<Key>> {
        let is_refused_for_plan =
            |refusal: &&RecordedRefusal| matches!(refusal.verdict, Verdict::PlanFeature(_) | Verdict::Abuse);
        self.0.iter().filter(is_refused_for_plan).map(|refusal| &refusal.key)
    }

    fn workspaces(&self, is_included: impl Fn(&RecordedRefusal) -> bool) -> u32 {
        let mut seen: Vec<&Key> = Vec::new();
        for refusal in self.0.iter().filter(|refusal| is_included(refusal)) {
            if !seen.iter().any(|key| std::ptr::eq(key.workspace(), refusal.key.workspace())) {
                seen.push(&refusal.key);
            }
        }
        u32::try_from(seen.len()).unwrap_or(u32::MAX)
    }
}

impl RecordedRefusal {
    /// Whether both refusals are the same apart from figures and time spans.
    fn is_like(&self, other: &Self) -> bool {
        match (self.verdict, other.verdict) {
            (Verdict::Unexplained(one), Verdict::Unexplained(other)) => {
                std::mem::discriminant(&one) == std::mem::discriminant(&other)
            }
            (one, other) => {
                std::mem::discriminant(&one) == std::mem::discriminant(&other)
                    && one.proves_itself() == other.proves_itself()
            }
        }
    }

    /// Whether another account gives the same refusal, without details that depend on one account.
    fn agrees_with(&self, other: &Self) -> bool {
        let is_other = !std::ptr::eq(self.key.workspace(), other.key.workspace());
        is_other && !self.verdict.proves_itself() && self.is_like(other)
    }

    /// Whether other accounts are known to refuse similar requests in the same way: then this refusal says
    /// nothing about its account. Rate limits depend on the time, so they are counted again for each request.
    fn repeats(&self, context: &RefusalContext<'_>) -> bool {
        let RefusalContext { pool, features, now, .. } = context;
        !self.verdict.proves_itself()
            && !matches!(self.verdict, Verdict::RateLimited(_))
            && pool.is_refused_by_others(features, &self.key, self.verdict, *now)
    }

    /// Whether the same account has refused similar requests in the same way before, and was
    /// refuted.
    fn was_refuted(&self, context: &RefusalContext<'_>) -> bool {
        let RefusalContext { pool, features, now, .. } = context;
        !self.verdict.proves_itself() && pool.was_refuted(features, &self.key, self.verdict, *now)
    }

    fn refused(&self) -> Refused<'_> {
        let Self { verdict, key_request, source, is_agreed, .. } = self;
        Refused {
            verdict: *verdict,
            request: Some(key_request),
            is_agreed: *is_agreed,
            source: source.clone(),
        }
    }

    /// Records it as evidence about the key or its workspace, and about features that their plan lacks.
    fn record(&mut self, context: &RefusalContext<'_>, conclusions: &mut Conclusions) {
        if matches!(self.verdict, Verdict::Unexplained(_)) {
            return;
        }
        let RefusalContext { pool, roster, now, .. } = context;
        conclusions.transitions.extend(pool.record_refusal(roster, &self.key, self.refused(), *now));
        self.is_recorded = true;
        // Refusals about credits, bills and the key itself concern only their account, until a
        // second account gives the same one.
        let is_of_account = matches!(
            self.verdict,
            Verdict::WorkspaceQuota(_)
                | Verdict::Billing
                | Verdict::Abuse
                | Verdict::InvalidKey
                | Verdict::WrongHost
        );
        // Kept as a restriction, so that after a poll or a served request refutes it, the same
        // refusal of a similar request is recognized.
        if !is_of_account || !self.verdict.proves_itself() {
            context.restrict(self, conclusions);
        }
    }

    /// Records that a second account gives the same refusal. For a rate limit, one request may probe whether
    /// the limit still holds; any other refusal then says nothing about its account and is withdrawn. Similar
    /// requests are restricted for the account, so that they do not try all accounts again, and a poll is
    /// requested where it can decide.
    fn record_agreement(&mut self, context: &RefusalContext<'_>, conclusions: &mut Conclusions) {
        let RefusalContext { pool, roster, now, .. } = context;
        let was_agreed = std::mem::replace(&mut self.is_agreed, true);
        if matches!(self.verdict, Verdict::RateLimited(_)) {
            if !was_agreed || !self.is_recorded {
                self.record(context, conclusions);
            }
            return;
        }
        if std::mem::replace(&mut self.is_recorded, false) {
            let transitions = pool.withdraw_refusal(roster, &self.key, &self.source, *now);
            conclusions.transitions.extend(transitions);
        }
        if self.verdict != Verdict::Unexplained(Refusal::Bodiless) {
            context.restrict(self, conclusions);
            pool.want_poll(&self.key);
        }
    }
}

/// The verdict without quota figures that are not the account's, and without figures that a fresh
/// poll contradicts; in the latter case also the verdict with them.
fn with_figures_of(key: &Key, verdict: Verdict, now: UnixMs) -> (Verdict, Option<Verdict>) {
    let Verdict::WorkspaceQuota(shortfall) = verdict else { return (verdict, None) };
    let workspace = key.workspace();
    let quota = workspace.quota(now);
    let extension = match quota.extension {
        Extension::Credits(credits) => credits,
        Extension::None | Extension::Unlimited => 0,
    };
    let shortfall = shortfall.of_account(quota.limit, extension);
    let is_fresh = workspace.polled_at().is_some_and(|at| now.since(at) <= FRESH_POLL_MAX);
    let with_figures = Verdict::WorkspaceQuota(shortfall);
    match (quota.spendable(), quota.limit) {
        (Some(left), Some(limit)) if is_fresh => {
            let verdict = Verdict::WorkspaceQuota(shortfall.unless_contradicted(left, limit));
            (verdict, (verdict != with_figures).then_some(with_figures))
        }
        _ => (with_figures, None),
    }
}

impl RefusalContext<'_> {
    fn restrict(&self, refusal: &RecordedRefusal, conclusions: &mut Conclusions) {
        let restriction =
            self.pool.restrict(self.roster, &refusal.key, self.features, &refusal.refused(), self.now);
        conclusions.restricted.extend(restriction.map(|restriction| (Arc::clone(&refusal.key), restriction)));
    }
}
