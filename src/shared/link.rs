//! Implements `proxy::ReplicaLink` with Redis: looks up owners and lists of other replicas for a client's request, and
//! extends the grant of a quota. Queues the owners of identifiers that responses of the provider prove. A lookup is a
//! pipeline of commands on the connection of the replica. It ends within `redis.wait_timeout`, with or without a reply.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use redis::aio::MultiplexedConnection;
use redis::{FromRedisValue, Pipeline, Value};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::link_counts::LinkCounts;
use super::lookup_breaker::LookupBreaker;
use super::quotas::{parse_quota_reply, quota_call};
use super::scripts::{Keyspace, OWNERS, ScriptCall};
use crate::clock;
use crate::elevenlabs::affinity::{Identifier, ResourceKind, RetentionLimits};
use crate::policy::client::ClientName;
use crate::policy::shared_id::{SharedId, SharedKind};
use crate::pool::{OwnerId, Pool};
use crate::proxy::{FoundOwner, LinkFuture, LookupResult, QuotaReply, QuotaStatement, ReplicaLink};

/// Maximum number of updates in each queue. An update beyond it is dropped. Other replicas then find the owner by
/// requests to the accounts.
const MAX_QUEUED_UPDATES: usize = 8_192;
/// Time to live of the account that served a list to a client.
const LIST_ACCOUNT_TTL: Duration = Duration::from_secs(7 * 24 * 3_600);
/// Maximum time to live of an owner. It is also the time to live of owners that the configuration keeps forever.
const MAX_OWNER_TTL: Duration = Duration::from_secs(400 * 24 * 3_600);

/// The connection to Redis that requests use for their lookups, and the queues of the owners that they prove.
pub(super) struct RedisLink {
    /// The connection for commands, or `None` while the replica is alone.
    commands: ArcSwapOption<MultiplexedConnection>,
    breaker: LookupBreaker,
    /// The number of live replicas at the last beat.
    live_replicas: AtomicU32,
    replica_id: ArcSwap<String>,
    keyspace: Keyspace,
    wait_timeout: Duration,
    pool: Arc<Pool>,
    owner_limits: RetentionLimits,
    urgent_updates: mpsc::Sender<OwnerUpdate>,
    frequent_updates: mpsc::Sender<OwnerUpdate>,
    counts: LinkCounts,
}

/// The receivers of the queued updates. The task of the link sends the updates to Redis.
#[derive(Debug)]
pub(super) struct OwnerUpdates {
    /// Updates that the next request of a client may need, such as a cloned voice or the cursor of a list.
    pub(super) urgent: mpsc::Receiver<OwnerUpdate>,
    /// Updates that every speech request causes. They are stored less often, and many with one call.
    pub(super) frequent: mpsc::Receiver<OwnerUpdate>,
}

impl OwnerUpdates {
    /// Waits for the next update and discards it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future discards no update.
    pub(super) async fn discard(&mut self) {
        tokio::select! {
            Some(_) = self.urgent.recv() => {}
            Some(_) = self.frequent.recv() => {}
            else => std::future::pending().await,
        }
    }
}

/// A new or removed owner of an identifier, or the account that has served a list to a client.
#[derive(Debug)]
pub(super) struct OwnerUpdate {
    subject: UpdateSubject,
    /// The account, or `None` if it is removed.
    account: Option<SharedId>,
    ttl: Duration,
}

/// The identifier or the client of an update. The task of the link computes its key in Redis, which needs a digest, so
/// that requests need not compute it.
#[derive(Debug)]
enum UpdateSubject {
    Owner(Identifier),
    List(ClientName),
}

impl UpdateSubject {
    fn redis_key(&self, keyspace: &Keyspace) -> String {
        match self {
            Self::Owner(identifier) => keyspace.owner(identifier_id(identifier)),
            Self::List(client) => keyspace.list_account(client_id(client)),
        }
    }
}

/// The settings of a [`RedisLink`].
#[derive(Debug)]
pub(super) struct RedisLinkSettings {
    pub(super) replica_id: String,
    pub(super) keyspace: Keyspace,
    pub(super) wait_timeout: Duration,
    pub(super) pool: Arc<Pool>,
    pub(super) owner_limits: RetentionLimits,
    pub(super) counts: LinkCounts,
}

impl RedisLink {
    /// Creates a link without a connection, and the receivers of its queues.
    pub(super) fn new(settings: RedisLinkSettings) -> (Self, OwnerUpdates) {
        let RedisLinkSettings { replica_id, keyspace, wait_timeout, pool, owner_limits, counts } = settings;
        let (urgent_updates, urgent) = mpsc::channel(MAX_QUEUED_UPDATES);
        let (frequent_updates, frequent) = mpsc::channel(MAX_QUEUED_UPDATES);
        let link = Self {
            commands: ArcSwapOption::empty(),
            breaker: LookupBreaker::default(),
            live_replicas: AtomicU32::new(1),
            replica_id: ArcSwap::from_pointee(replica_id),
            keyspace,
            wait_timeout,
            pool,
            owner_limits,
            urgent_updates,
            frequent_updates,
            counts,
        };
        (link, OwnerUpdates { urgent, frequent })
    }

    /// Replaces the connection, or removes it while the replica is alone.
    pub(super) fn set_connection(&self, commands: Option<MultiplexedConnection>) {
        self.commands.store(commands.map(Arc::new));
    }

    /// Sends the statements about quotas with a new replica id from this call on.
    pub(super) fn replace_id(&self, id: String) {
        self.replica_id.store(Arc::new(id));
    }

    /// Records the number of replicas that the reply to a beat contains, and its round trip.
    pub(super) fn record_beat(&self, live_replicas: u32, round_trip: Duration) {
        self.breaker.record_beat(round_trip < self.wait_timeout);
        self.live_replicas.store(live_replicas, Ordering::Relaxed);
    }

    /// Sends commands, and returns their replies. Returns `None` if the replies do not arrive within
    /// `redis.wait_timeout`, or without sending the commands if the replica is alone or the breaker is open.
    async fn look_up<T: FromRedisValue>(&self, pipeline: Pipeline) -> Option<T> {
        let mut commands = self.commands.load().as_deref()?.clone();
        if !self.breaker.try_start() {
            return None;
        }
        self.counts.record_commands(pipeline.len());
        match timeout(self.wait_timeout, pipeline.query_async(&mut commands)).await {
            Ok(Ok(reply)) => {
                self.breaker.record_reply();
                Some(reply)
            }
            Ok(Err(_)) | Err(_) => {
                self.breaker.record_failure();
                None
            }
        }
    }

    fn queue_urgent_update(&self, update: OwnerUpdate) {
        // If the queue is full, the update is dropped. Other replicas then find the owner by requests to the accounts.
        let _ = self.urgent_updates.try_send(update);
    }
}

/// Returns the digest by which replicas name an identifier in Redis.
fn identifier_id(identifier: &Identifier) -> SharedId {
    SharedId::new(SharedKind::Identifier, &[identifier.hash.bytes()])
}

/// Returns the digest by which replicas name a client in Redis.
pub(super) fn client_id(client: &ClientName) -> SharedId {
    SharedId::new(SharedKind::Client, &[client.as_str().as_bytes()])
}

impl ReplicaLink for RedisLink {
    fn replicas(&self) -> u32 {
        self.live_replicas.load(Ordering::Relaxed)
    }

    fn find_owners<'a>(
        &'a self,
        identifiers: &'a [Identifier],
    ) -> LinkFuture<'a, LookupResult<Vec<FoundOwner>>> {
        Box::pin(async move {
            let mut pipeline = redis::pipe();
            for identifier in identifiers {
                pipeline.cmd("GET").arg(self.keyspace.owner(identifier_id(identifier)));
            }
            let Some(accounts) = self.look_up::<Vec<Option<String>>>(pipeline).await else {
                return LookupResult::Unknown;
            };
            let roster = self.pool.roster();
            let owners: Vec<FoundOwner> = identifiers
                .iter()
                .zip(accounts)
                .filter_map(|(identifier, account)| {
                    let owner = roster.owner_with_shared_id(SharedId::parse(&account?)?)?;
                    Some(FoundOwner { identifier: *identifier, owner })
                })
                .collect();
            if owners.is_empty() { LookupResult::Absent } else { LookupResult::Known(owners) }
        })
    }

    fn record_owner(&self, identifier: Identifier, owner: &OwnerId) {
        let Some(account) = self.pool.roster().shared_id_of(owner) else { return };
        let max_idle = self.owner_limits.max_idle(identifier.kind.storage_class());
        let update = OwnerUpdate {
            subject: UpdateSubject::Owner(identifier),
            account: Some(account),
            ttl: max_idle.unwrap_or(MAX_OWNER_TTL).min(MAX_OWNER_TTL),
        };
        if [ResourceKind::Request, ResourceKind::HistoryItem].contains(&identifier.kind) {
            // If the queue is full, the update is dropped. Other replicas then find the owner by their own requests.
            let _ = self.frequent_updates.try_send(update);
        } else {
            self.queue_urgent_update(update);
        }
    }

    fn remove_owner(&self, identifier: Identifier) {
        let subject = UpdateSubject::Owner(identifier);
        self.queue_urgent_update(OwnerUpdate { subject, account: None, ttl: Duration::ZERO });
    }

    fn find_list_account<'a>(&'a self, client: &'a ClientName) -> LinkFuture<'a, LookupResult<OwnerId>> {
        Box::pin(async move {
            let mut pipeline = redis::pipe();
            pipeline.cmd("GET").arg(self.keyspace.list_account(client_id(client)));
            let Some([account]) = self.look_up::<[Option<String>; 1]>(pipeline).await else {
                return LookupResult::Unknown;
            };
            let account = account.and_then(|text| SharedId::parse(&text));
            match account.and_then(|account| self.pool.roster().owner_with_shared_id(account)) {
                Some(owner) => LookupResult::Known(owner),
                None => LookupResult::Absent,
            }
        })
    }

    fn record_list_account(&self, client: &ClientName, owner: &OwnerId) {
        let Some(account) = self.pool.roster().shared_id_of(owner) else { return };
        self.queue_urgent_update(OwnerUpdate {
            subject: UpdateSubject::List(client.clone()),
            account: Some(account),
            ttl: LIST_ACCOUNT_TTL,
        });
    }

    fn extend_grant<'a>(&'a self, statement: &'a QuotaStatement) -> LinkFuture<'a, QuotaReply> {
        Box::pin(async move {
            let sent_at = clock::instant();
            let statements = std::slice::from_ref(statement);
            let call = quota_call(&self.keyspace, &self.replica_id.load(), self.replicas(), statements);
            let mut pipeline = redis::pipe();
            pipeline.add_command(call.to_command());
            let Some([reply]) = self.look_up::<[Value; 1]>(pipeline).await else {
                return QuotaReply::Unknown;
            };
            let replies = super::reply::parse_list(&reply);
            replies
                .ok()
                .and_then(<[Value]>::first)
                .map_or(QuotaReply::Unknown, |reply| parse_quota_reply(reply, sent_at))
        })
    }
}

impl fmt::Debug for RedisLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLink").field("replica_id", &self.replica_id).finish_non_exhaustive()
    }
}

/// Returns the call of `owners.lua` that stores these updates.
pub(super) fn owners_call(keyspace: &Keyspace, updates: &[OwnerUpdate]) -> ScriptCall {
    let mut arguments = Vec::with_capacity(2 * updates.len());
    for OwnerUpdate { account, ttl, .. } in updates {
        let account = account.map(|id| id.to_string()).unwrap_or_default();
        arguments.extend([account, ttl.as_millis().max(1).to_string()]);
    }
    let keys = updates.iter().map(|update| update.subject.redis_key(keyspace)).collect();
    ScriptCall { script: OWNERS, keys, arguments }
}
