//! Shares the limits of clients with the other replicas. `shared` calls this module at regular intervals. In each such
//! exchange, this module returns the quota statements and the client activity of this replica, and applies the grants
//! and shares that this replica receives. Before a report about a user, it also looks up the user's usage at the other
//! replicas.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::ClientUsage;
use super::client_share::{ClientActivity, ClientShare};
use super::counters::UsageCounters;
use super::quota_share::{ActiveQuotas, QuotaShare};
use crate::policy::client::{Client, ClientName, Clients};
use crate::policy::units::UnixMs;
use crate::proxy::replica_link::{QuotaReply, QuotaStatement, ReplicaLink};
use crate::secret::UserFingerprint;

/// Maximum number of quotas in one exchange. The remaining quotas follow in the next exchanges.
const MAX_STATEMENTS_PER_EXCHANGE: usize = 2_000;

/// Maximum age of the other replicas' usage in a report about a user. It limits the lookups for a client that reads its
/// usage repeatedly.
const USER_REFRESH_INTERVAL: Duration = Duration::from_secs(1);

/// The quotas in a regular exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatementScope {
    /// The quotas that were used in the last 30 s or hold a grant, and the quota of each other client once in 30 s.
    Active,
    /// The quotas of all clients and of the users in memory, because Redis may have lost these quotas.
    All,
}

/// The link to the other replicas, and the active quotas.
#[derive(Clone, Debug)]
pub(super) struct SharedUsage {
    pub(super) link: Arc<dyn ReplicaLink>,
    active: Arc<ActiveQuotas>,
}

impl SharedUsage {
    /// Returns this replica's share in the quota of a client, or of the client's user `user`.
    pub(super) fn share<'a>(
        &self,
        counters: &'a UsageCounters,
        client: &ClientName,
        user: Option<UserFingerprint>,
    ) -> &'a QuotaShare {
        counters.share_with(|| {
            QuotaShare::new(Arc::clone(&self.link), Arc::clone(&self.active), client.clone(), user)
        })
    }
}

impl ClientUsage {
    /// Returns the counters of a replica whose clients also use other replicas. `link` connects it to them.
    #[must_use]
    pub fn with_link(mut self, link: Arc<dyn ReplicaLink>, clients: &Clients, now: UnixMs) -> Self {
        self.shared = Some(SharedUsage { link, active: Arc::default() });
        self.configure_shares(clients, now);
        self
    }

    /// Creates the shares of the clients with a quota.
    pub(super) fn configure_shares(&self, clients: &Clients, now: UnixMs) {
        let Some(shared) = &self.shared else { return };
        for client in clients.with_token().map(|configured| &configured.client) {
            if let (Some(quota), Some(counters)) = (client.rules.quota, self.by_name.get(&client.name)) {
                let share = shared.share(&counters.usage, &client.name, None);
                share.configure(&counters.usage, quota, now);
            }
        }
    }

    /// Returns the statements of the regular exchange. Reduces the grants to the parts that are needed soon, so every
    /// statement must be sent. The caller passes the replies to [`apply_grant`](Self::apply_grant).
    #[must_use]
    pub fn quota_statements(&self, scope: StatementScope, now: UnixMs) -> Vec<QuotaStatement> {
        let Some(shared) = &self.shared else { return Vec::new() };
        let mut statements = Vec::new();
        let mut active_counters = shared.active.take(MAX_STATEMENTS_PER_EXCHANGE);
        active_counters.retain(|counters| {
            let Some(counters) = counters.upgrade() else { return false };
            let statement = counters.share().and_then(|share| share.active_statement(&counters, now));
            let is_active = statement.is_some();
            statements.extend(statement);
            is_active
        });
        shared.active.put_back(active_counters);
        let mut add_idle = |counters: &UsageCounters| {
            if statements.len() < MAX_STATEMENTS_PER_EXCHANGE {
                let share = counters.share();
                statements.extend(share.and_then(|share| share.idle_statement(counters, scope, now)));
            }
        };
        for counters in self.by_name.values() {
            add_idle(&counters.usage);
        }
        for counters in self.by_name.values().filter(|_| scope == StatementScope::All) {
            counters.users().counters().for_each(&mut add_idle);
        }
        statements
    }

    /// Applies the reply to a statement. A reply about a user that is not in memory is ignored.
    pub fn apply_grant(&self, statement: &QuotaStatement, reply: QuotaReply) {
        let Some(counters) = self.by_name.get(&statement.key.client) else { return };
        match statement.key.user {
            None => apply_reply(&counters.usage, statement, reply),
            Some(user) => {
                if let Some(usage) = counters.users().find(user) {
                    apply_reply(&usage, statement, reply);
                }
            }
        }
    }

    /// Sets the share of this replica in the rate limit and the concurrency limit of a client.
    pub fn set_share(&self, client: &ClientName, share: ClientShare) {
        if let Some(counters) = self.by_name.get(client) {
            counters.share.set(share);
        }
    }

    /// Returns the activity of the clients with a rate limit or a concurrency limit since the last call. The next
    /// call measures from this call on.
    #[must_use]
    pub fn take_activity(&self) -> Vec<ClientActivity> {
        let elapsed_ns = self.elapsed_ns();
        let report = |(name, counters): (&ClientName, &Arc<super::ClientCounters>)| {
            counters.share.report(name, counters.in_progress.load(Ordering::Acquire), elapsed_ns)
        };
        self.by_name.iter().filter_map(report).collect()
    }

    /// Looks up the other replicas' usage of a user quota, unless the last reply is recent.
    pub(super) async fn refresh_user(&self, client: &Client, counters: &UsageCounters, now: UnixMs) {
        if let (Some(share), Some(quota)) = (counters.share(), client.rules.user_quota) {
            share.refresh(counters, quota, USER_REFRESH_INTERVAL, now).await;
        }
    }
}

fn apply_reply(counters: &UsageCounters, statement: &QuotaStatement, reply: QuotaReply) {
    if let Some(share) = counters.share() {
        share.apply_reply(statement, reply);
    }
}
