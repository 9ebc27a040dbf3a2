//! Enforces a quota of a client or of a user that all replicas of the pool share. Requests use the grant of this
//! replica without waiting. Only a request for which the grant is insufficient waits for a lookup in the other
//! replicas, which may extend the grant. Also prepares the regular statements, in which this replica reports its usage
//! of the quota and returns the part of its grant that it does not need.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::time::timeout;

use super::counters::UsageCounters;
use super::grant::{GrantUse, SharedQuota};
use super::period_counters::{AmountRange, PeriodCounters, PeriodNumbers};
use super::permit::ReservationRefused;
use super::replicas::StatementScope;
use crate::clock;
use crate::policy::client::ClientName;
use crate::policy::client_quota::ClientQuota;
use crate::policy::units::UnixMs;
use crate::proxy::replica_link::{QuotaKey, QuotaReply, QuotaStatement, ReplicaLink};
use crate::secret::UserFingerprint;

/// Time without a request after which a quota without a grant is idle. The statement of an idle quota is sent only once
/// in this time.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Maximum wait for the lookups of other requests for the same quota. A lookup requests the amounts of all waiting
/// requests together, so that a request waits for more than two lookups only if they are slow and refuse most requests.
const TURN_TIMEOUT: Duration = Duration::from_millis(100);

/// Time after a lookup without a reply in which requests send no lookup and use only this replica's share.
const NO_REPLY_TTL: Duration = Duration::from_millis(100);

/// The quotas whose statements are sent regularly, because the quotas were used or hold a grant.
#[derive(Debug, Default)]
pub(super) struct ActiveQuotas(Mutex<Vec<Weak<UsageCounters>>>);

impl ActiveQuotas {
    fn add(&self, counters: &Arc<UsageCounters>) {
        self.lock().push(Arc::downgrade(counters));
    }

    /// Takes up to `max` quotas off the start of the list, where the quotas are that have waited longest.
    pub(super) fn take(&self, max: usize) -> Vec<Weak<UsageCounters>> {
        let mut list = self.lock();
        let count = list.len().min(max);
        list.drain(..count).collect()
    }

    /// Puts quotas back at the end of the list.
    pub(super) fn put_back(&self, quotas: Vec<Weak<UsageCounters>>) {
        self.lock().extend(quotas);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<UsageCounters>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// This replica's share in one quota.
#[derive(Debug)]
pub(super) struct QuotaShare {
    link: Arc<dyn ReplicaLink>,
    active: Arc<ActiveQuotas>,
    client: ClientName,
    user: Option<UserFingerprint>,
    state: Mutex<ShareState>,
    /// The lock of the request that extends the grant. The requests that wait for the lock use the extended grant, too.
    extension: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct ShareState {
    /// The quota and its grant, or `None` before the quota is configured or used.
    quota: Option<SharedQuota>,
    /// The time at which a request last used the quota.
    used_at: Option<Instant>,
    /// The time of the last regular statement.
    reported_at: Option<Instant>,
    /// Whether the quota is among the [`ActiveQuotas`].
    is_listed: bool,
    /// The sum of the maximum amounts that the requests that extend the grant, or wait for its extension, may take.
    wanted: u64,
    /// The time until which no lookup is sent, because the last lookup had no reply.
    alone_until: Option<Instant>,
}

impl ShareState {
    /// Returns whether requests use only this replica's share at `now`, without a lookup.
    fn is_alone(&self, now: Instant) -> bool {
        self.alone_until.is_some_and(|alone_until| now < alone_until)
    }

    /// Returns the state of `quota` in the period that contains `now`.
    fn quota(
        &mut self,
        quota: ClientQuota,
        period_counters: &PeriodCounters,
        now: UnixMs,
    ) -> &mut SharedQuota {
        let is_current = |shared: &SharedQuota| {
            (shared.quota.unit, shared.quota.period) == (quota.unit, quota.period) && shared.is_current(now)
        };
        if !self.quota.as_ref().is_some_and(is_current) {
            self.quota = None;
        }
        let shared = self
            .quota
            .get_or_insert_with(|| SharedQuota::new(quota, period_counters.used(quota.period, now), now));
        if shared.quota.amount != quota.amount {
            shared.change_amount(quota.amount);
        }
        shared
    }
}

/// The amount of one request in [`ShareState::wanted`]. Dropping the value subtracts the amount.
struct WaitingDemand<'a> {
    share: &'a QuotaShare,
    amount: u64,
}

impl Drop for WaitingDemand<'_> {
    fn drop(&mut self) {
        let mut state = self.share.state();
        state.wanted = state.wanted.saturating_sub(self.amount);
    }
}

impl QuotaShare {
    pub(super) fn new(
        link: Arc<dyn ReplicaLink>,
        active: Arc<ActiveQuotas>,
        client: ClientName,
        user: Option<UserFingerprint>,
    ) -> Self {
        Self { link, active, client, user, state: Mutex::default(), extension: tokio::sync::Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, ShareState> {
        // Every change is complete before the lock is released.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the key of the current period of the quota.
    fn key(&self, shared: &SharedQuota) -> QuotaKey {
        QuotaKey {
            client: self.client.clone(),
            user: self.user,
            unit: shared.quota.unit,
            period: shared.quota.period,
            period_start: shared.period_start,
        }
    }

    /// Sets the configured quota, so that its usage is reported before the first request uses it.
    pub(super) fn configure(&self, counters: &UsageCounters, quota: ClientQuota, now: UnixMs) {
        self.state().quota(quota, counters.period_counters(quota.unit), now);
    }

    /// Adds as much of `demand` to the usage of `quota` as the grant allows. The lock on the state ensures that no
    /// request uses a part of the grant that this replica has returned.
    ///
    /// # Errors
    ///
    /// Fails when the grant does not allow the minimum. If `grant_use` permits it and the other replicas may extend
    /// the grant, also fails when the grant does not allow the maximum.
    pub(super) fn try_add(
        &self,
        counters: &Arc<UsageCounters>,
        quota: ClientQuota,
        demand: AmountRange,
        now: UnixMs,
        grant_use: GrantUse,
    ) -> Result<(u64, PeriodNumbers), ReservationRefused> {
        self.use_grant(counters, quota, demand, now, grant_use, |limit| {
            counters.period_counters(quota.unit).try_add(quota.period, limit, demand, now)
        })
    }

    /// Checks that a part of `quota` remains.
    ///
    /// # Errors
    ///
    /// Fails in the same cases as [`try_add`](Self::try_add) for the amount 1.
    pub(super) fn check_not_exhausted(
        &self,
        counters: &Arc<UsageCounters>,
        quota: ClientQuota,
        now: UnixMs,
        grant_use: GrantUse,
    ) -> Result<(), ReservationRefused> {
        self.use_grant(counters, quota, AmountRange::exactly(1), now, grant_use, |limit| {
            let used_amount = counters.period_counters(quota.unit).used(quota.period, now);
            if used_amount < limit { Ok(()) } else { Err(used_amount) }
        })
    }

    /// Calls `take` with the amount up to which `grant_use` allows this replica to use the quota.
    ///
    /// # Errors
    ///
    /// Fails when `take` fails with the used amount, or when the grant should be extended first.
    fn use_grant<T>(
        &self,
        counters: &Arc<UsageCounters>,
        quota: ClientQuota,
        demand: AmountRange,
        now: UnixMs,
        grant_use: GrantUse,
        take: impl FnOnce(u64) -> Result<T, u64>,
    ) -> Result<T, ReservationRefused> {
        let (period_counters, time) = (counters.period_counters(quota.unit), clock::instant());
        let mut state = self.state();
        state.used_at = Some(time);
        let is_listed = std::mem::replace(&mut state.is_listed, true);
        let grant_use = match grant_use {
            GrantUse::Extensible if state.is_alone(time) => GrantUse::Alone,
            GrantUse::Extensible | GrantUse::Current | GrantUse::Alone => grant_use,
        };
        let shared = state.quota(quota, period_counters, now);
        let limit = shared.limit(grant_use, self.link.replicas(), time);
        let used_amount = period_counters.used(quota.period, now);
        let remaining = limit.saturating_sub(used_amount);
        let take_result =
            if grant_use == GrantUse::Extensible && shared.may_extend(used_amount, remaining, demand, time) {
                let exceeded = shared.exceeded(used_amount, remaining, demand, now);
                Err(ReservationRefused::Grant { demand, exceeded })
            } else {
                take(limit).map_err(|used_amount| {
                    let remaining = limit.saturating_sub(used_amount);
                    ReservationRefused::Quota(shared.exceeded(used_amount, remaining, demand, now))
                })
            };
        drop(state);
        if !is_listed {
            self.active.add(counters);
        }
        take_result
    }

    /// Requests an extension of the grant for `demand` from the other replicas, including the demand of requests that
    /// wait for the reply. Returns the part of the quota that the request may use now.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the wait. A reply is then lost, and the next reply repeats the grant.
    pub(super) async fn extend_grant(
        &self,
        counters: &UsageCounters,
        quota: ClientQuota,
        demand: AmountRange,
        now: UnixMs,
    ) -> GrantUse {
        let period_counters = counters.period_counters(quota.unit);
        {
            let mut state = self.state();
            state.wanted = state.wanted.saturating_add(demand.max);
        }
        let _waiting = WaitingDemand { share: self, amount: demand.max };
        let Ok(_extension_guard) = timeout(TURN_TIMEOUT, self.extension.lock()).await else {
            return GrantUse::Current;
        };
        let statement = {
            let (mut state, time) = (self.state(), clock::instant());
            if state.is_alone(time) {
                return GrantUse::Alone;
            }
            let (wanted, shared) = (state.wanted, *state.quota(quota, period_counters, now));
            let used_amount = period_counters.used(quota.period, now);
            let limit = shared.limit(GrantUse::Extensible, self.link.replicas(), time);
            // Another request may have extended the grant during the wait.
            if !shared.may_extend(used_amount, limit.saturating_sub(used_amount), demand, time) {
                return GrantUse::Extensible;
            }
            shared.statement(self.key(&shared), used_amount, demand.min, wanted, time)
        };
        let reply = self.link.extend_grant(&statement).await;
        self.apply_reply(&statement, reply);
        match reply {
            QuotaReply::Granted(_) | QuotaReply::Denied(_) => GrantUse::Extensible,
            QuotaReply::Unknown => GrantUse::Alone,
        }
    }

    /// Looks up the other replicas' usage of the quota, unless the last reply is at most `max_age` old.
    pub(super) async fn refresh(
        &self,
        counters: &UsageCounters,
        quota: ClientQuota,
        max_age: Duration,
        now: UnixMs,
    ) {
        let statement = {
            let (mut state, time) = (self.state(), clock::instant());
            let period_counters = counters.period_counters(quota.unit);
            let shared = *state.quota(quota, period_counters, now);
            if shared.reply_age(time).is_some_and(|age| age <= max_age) {
                return;
            }
            shared.statement(self.key(&shared), period_counters.used(quota.period, now), 0, 0, time)
        };
        let reply = self.link.extend_grant(&statement).await;
        self.apply_reply(&statement, reply);
    }

    /// Applies the reply of the other replicas to `statement`.
    pub(super) fn apply_reply(&self, statement: &QuotaStatement, reply: QuotaReply) {
        let mut state = self.state();
        let time = clock::instant();
        state.alone_until = (reply == QuotaReply::Unknown).then(|| time + NO_REPLY_TTL);
        if let Some(shared) = &mut state.quota
            && self.key(shared) == statement.key
        {
            shared.apply_reply(statement, reply, time);
        }
    }

    /// Returns the regular statement of a quota that was used recently or holds a grant. Reduces the grant to the
    /// part that is needed soon. Returns `None` for an idle quota, and removes it from the list.
    pub(super) fn active_statement(&self, counters: &UsageCounters, now: UnixMs) -> Option<QuotaStatement> {
        let time = clock::instant();
        let mut state = self.state();
        let is_idle = state.used_at.is_none_or(|used_at| time.duration_since(used_at) >= IDLE_TIMEOUT);
        let is_granted = state.quota.as_ref().is_some_and(|shared| shared.is_granted(time));
        let is_active = !is_idle || is_granted;
        state.is_listed = is_active;
        if is_active { self.regular_statement(&mut state, counters, now, time) } else { None }
    }

    /// Returns the statement of a quota that is not listed, if none was sent within [`IDLE_TIMEOUT`], or if `scope`
    /// contains all quotas.
    pub(super) fn idle_statement(
        &self,
        counters: &UsageCounters,
        scope: StatementScope,
        now: UnixMs,
    ) -> Option<QuotaStatement> {
        let time = clock::instant();
        let mut state = self.state();
        let is_statement_due =
            state.reported_at.is_none_or(|reported_at| time.duration_since(reported_at) >= IDLE_TIMEOUT);
        let is_included = !state.is_listed && (is_statement_due || scope == StatementScope::All);
        if is_included { self.regular_statement(&mut state, counters, now, time) } else { None }
    }

    /// Returns the statement of the quota, and reduces the grant. Returns `None` before the first use of the quota.
    fn regular_statement(
        &self,
        state: &mut ShareState,
        counters: &UsageCounters,
        now: UnixMs,
        time: Instant,
    ) -> Option<QuotaStatement> {
        let quota = state.quota.as_ref()?.quota;
        let (period_counters, waiting) = (counters.period_counters(quota.unit), state.wanted);
        state.reported_at = Some(time);
        let shared = state.quota(quota, period_counters, now);
        let used_amount = period_counters.used(quota.period, now);
        let wanted = shared.prepare_regular_statement(used_amount, waiting, self.link.replicas(), time);
        Some(shared.statement(self.key(shared), used_amount, 0, wanted, time))
    }

    /// Returns whether a running session may use more credits of `quota`.
    pub(super) fn may_spend(&self, counters: &UsageCounters, quota: ClientQuota, now: UnixMs) -> bool {
        let period_counters = counters.period_counters(quota.unit);
        let shared = *self.state().quota(quota, period_counters, now);
        shared.may_spend(period_counters.used(quota.period, now), self.link.replicas(), clock::instant())
    }

    /// Returns the quota and the usage of the other replicas, if this usage is known for the period that contains
    /// `now`.
    pub(super) fn used_by_others(&self, now: UnixMs) -> Option<(ClientQuota, u64)> {
        let state = self.state();
        let shared = state.quota.as_ref()?;
        shared.is_current(now).then(|| (shared.quota, shared.used_by_others()))
    }
}
