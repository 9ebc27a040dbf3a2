//! Simulates a pool of replicas in memory for the tests in `replicas`. The pool divides quotas into grants by the rules
//! of the Redis script `quotas.lua`, loses its data, or does not reply. Each test replica sends requests and makes the
//! regular exchange.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Mutex, MutexGuard};

use super::*;
use crate::elevenlabs::affinity::Identifier;
use crate::pool::OwnerId;
use crate::proxy::replica_link::{
    FoundOwner, LinkFuture, LookupResult, QuotaGrant, QuotaKey, QuotaReply, QuotaStatement, ReplicaLink,
};

/// Time for which a replica uses a grant. It is shorter than [`LEASE_DURATION`], so that the replica stops first.
pub(super) const GRANT_DURATION: Duration = Duration::from_secs(9);
/// Time for which the pool reserves a grant for its replica.
const LEASE_DURATION: Duration = Duration::from_secs(10);

/// The usage and the grant of one replica.
#[derive(Clone, Copy, Debug)]
struct ReplicaUse {
    total: u64,
    granted: u64,
    generation: u64,
    expires_at: Instant,
}

/// The quotas that all replicas share.
#[derive(Debug, Default)]
pub(super) struct ReplicaPool {
    quotas: Mutex<HashMap<QuotaKey, HashMap<usize, ReplicaUse>>>,
    /// The number of lookups by requests.
    pub(super) lookups: AtomicUsize,
}

impl ReplicaPool {
    fn lock(&self) -> MutexGuard<'_, HashMap<QuotaKey, HashMap<usize, ReplicaUse>>> {
        self.quotas.lock().unwrap()
    }

    /// Returns the reply to a statement of `replica`, by the rules of `quotas.lua`.
    fn reply(&self, replica: usize, replicas: u32, statement: &QuotaStatement) -> QuotaReply {
        let now = clock::instant();
        let mut quotas = self.lock();
        let usage_by_replica = quotas.entry(statement.key.clone()).or_default();
        let other_replicas =
            || usage_by_replica.iter().filter(|(other, _)| **other != replica).map(|(_, other)| other);
        let used_by_others: u64 = other_replicas().map(|other| other.total).sum();
        let held_by_others: u64 = other_replicas()
            .map(|other| if now < other.expires_at { other.granted.max(other.total) } else { other.total })
            .sum();
        let available = statement.limit.saturating_sub(held_by_others);
        let former = usage_by_replica.get(&replica).filter(|own| now < own.expires_at);
        let held = match former {
            Some(own) if own.generation >= statement.generation => own.granted.max(statement.held),
            Some(_) | None => statement.held,
        };
        let held = held.min(available).max(statement.used);
        let is_granted = statement.used.saturating_add(statement.needed) <= available;
        let remaining = statement.limit.saturating_sub(used_by_others + statement.used);
        let part = if statement.needed > 0 { remaining / (2 * u64::from(replicas)) } else { 0 };
        let wanted = statement.used.saturating_add(statement.wanted.max(part)).min(available);
        let granted = if is_granted { held.max(wanted) } else { held };
        let generation = former.map_or(statement.generation, |own| own.generation.max(statement.generation));
        let own = ReplicaUse { total: statement.used, granted, generation, expires_at: now + LEASE_DURATION };
        usage_by_replica.insert(replica, own);
        let grant = QuotaGrant { granted, used_by_others, valid_until: now + GRANT_DURATION };
        if is_granted || statement.needed == 0 {
            QuotaReply::Granted(grant)
        } else {
            QuotaReply::Denied(grant)
        }
    }

    /// Loses all data, like a server that is restarted.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }
}

/// The link of one replica to the pool.
#[derive(Debug)]
pub(super) struct PoolLink {
    pool: Arc<ReplicaPool>,
    replica: usize,
    replicas: u32,
    pub(super) is_down: AtomicBool,
}

impl ReplicaLink for PoolLink {
    fn replicas(&self) -> u32 {
        self.replicas
    }

    fn find_owners<'a>(&'a self, _: &'a [Identifier]) -> LinkFuture<'a, LookupResult<Vec<FoundOwner>>> {
        Box::pin(async { LookupResult::Unknown })
    }

    fn record_owner(&self, _: Identifier, _: &OwnerId) {}

    fn remove_owner(&self, _: Identifier) {}

    fn find_list_account<'a>(&'a self, _: &'a ClientName) -> LinkFuture<'a, LookupResult<OwnerId>> {
        Box::pin(async { LookupResult::Unknown })
    }

    fn record_list_account(&self, _: &ClientName, _: &OwnerId) {}

    fn extend_grant<'a>(&'a self, statement: &'a QuotaStatement) -> LinkFuture<'a, QuotaReply> {
        self.pool.lookups.fetch_add(1, Ordering::AcqRel);
        Box::pin(async {
            // Other requests run during the round trip, before and after the pool decides.
            tokio::task::yield_now().await;
            let reply = self.reply(statement);
            tokio::task::yield_now().await;
            reply
        })
    }
}

impl PoolLink {
    fn reply(&self, statement: &QuotaStatement) -> QuotaReply {
        match self.is_down.load(Ordering::Acquire) {
            true => QuotaReply::Unknown,
            false => self.pool.reply(self.replica, self.replicas, statement),
        }
    }
}

/// One replica: its counters and its link.
#[derive(Clone, Debug)]
pub(super) struct TestReplica {
    pub(super) usage: ClientUsage,
    pub(super) link: Arc<PoolLink>,
}

impl TestReplica {
    /// Sends the regular statements, and applies the replies. Returns the number of statements.
    pub(super) fn exchange(&self, scope: StatementScope, now: UnixMs) -> usize {
        let statements = self.usage.quota_statements(scope, now);
        for statement in &statements {
            self.usage.apply_grant(statement, self.link.reply(statement));
        }
        statements.len()
    }

    /// Admits a request of the client `app`, and counts it.
    pub(super) async fn admit(
        &self,
        rules: &Rules,
        now: UnixMs,
    ) -> Result<ClientPermit, ClientLimitExceeded> {
        self.usage.admit(&Client { name: app_name(), rules: rules.clone() }, METERED, now).await
    }

    /// Sends a request that is served and costs no credits. Fails if the request is not admitted.
    pub(super) async fn serve(&self, rules: &Rules, now: UnixMs) -> Result<(), ClientLimitExceeded> {
        self.admit(rules, now).await?.charge(ChargeOutcome::Served, Some(0), now);
        Ok(())
    }

    /// Sends a request that is served and costs `credits`. Fails if the request is not admitted.
    pub(super) async fn spend(
        &self,
        rules: &Rules,
        credits: u64,
        now: UnixMs,
    ) -> Result<(), ClientLimitExceeded> {
        let permit = self.admit(rules, now).await?;
        permit.reserve(credits, now).await?;
        permit.charge(ChargeOutcome::Served, Some(credits), now);
        Ok(())
    }
}

/// Starts `count` replicas of one pool, whose client `app` has `rules`. The usage store of each contains
/// `stored_usage`.
pub(super) fn start_replicas(
    count: usize,
    rules: &Rules,
    stored_usage: &[UsageTotals],
) -> (Arc<ReplicaPool>, Vec<TestReplica>) {
    let pool = Arc::new(ReplicaPool::default());
    let client = Client { name: app_name(), rules: rules.clone() };
    let clients = Clients::new(vec![(client, TokenFingerprint::new("app").into())], AnonymousAccess::Refused);
    let replicas = u32::try_from(count).unwrap();
    let start_replica = |replica| {
        let link = Arc::new(PoolLink {
            pool: Arc::clone(&pool),
            replica,
            replicas,
            is_down: AtomicBool::new(false),
        });
        let usage = ClientUsage::new(&clients, stored_usage, Arc::new(NoStoredUsage), NOW).with_link(
            link.clone(),
            &clients,
            NOW,
        );
        TestReplica { usage, link }
    };
    let replicas = (0..count).map(start_replica).collect();
    (pool, replicas)
}
