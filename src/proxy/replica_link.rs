//! Defines the interface to the other replicas of the pool, which `shared` implements: the lookups that a request
//! waits for, and the changes that it publishes. Without `[redis]`, there is no link, and requests send nothing.
//!
//! A lookup finds a value, finds none, or has no valid reply in time. Without a reply, the request decides by the data
//! of this replica, and uses at most this replica's share of a quota.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::time::Instant;

use crate::elevenlabs::affinity::Identifier;
use crate::policy::client::ClientName;
use crate::policy::client_quota::{Period, QuotaUnit};
use crate::policy::units::UnixMs;
use crate::pool::OwnerId;
use crate::secret::UserFingerprint;

/// The result of a lookup in the other replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookupResult<T> {
    /// The replicas know the value.
    Known(T),
    /// No replica knows the value.
    Absent,
    /// There is no link, or no valid reply in time.
    Unknown,
}

/// A lookup in the other replicas, which ends within `redis.wait_timeout`.
pub type LinkFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// The other replicas of the pool, as requests use them.
///
/// The implementation ends every lookup within `redis.wait_timeout`, and drops a reply that arrives later. The
/// methods that return no future never wait.
///
/// # Cancel safety
///
/// A lookup whose future is dropped may still take effect. If it extended a grant, the next reply contains that
/// grant again.
pub trait ReplicaLink: fmt::Debug + Send + Sync {
    /// Returns the last known number of replicas of the pool, including this replica. It is at least 1.
    fn replicas(&self) -> u32;

    /// Looks up the owners of `identifiers`, whose owners this replica does not know. The result contains only the
    /// owners that another replica knows.
    fn find_owners<'a>(
        &'a self,
        identifiers: &'a [Identifier],
    ) -> LinkFuture<'a, LookupResult<Vec<FoundOwner>>>;

    /// Publishes the owner of an identifier that a response proved.
    fn record_owner(&self, identifier: Identifier, owner: &OwnerId);

    /// Publishes that the recorded owner of an identifier does not have the resource.
    fn remove_owner(&self, identifier: Identifier);

    /// Looks up the account that last served a list to `client`.
    fn find_list_account<'a>(&'a self, client: &'a ClientName) -> LinkFuture<'a, LookupResult<OwnerId>>;

    /// Publishes the account that served a list to `client`, if it differs from the previous account.
    fn record_list_account(&self, client: &ClientName, owner: &OwnerId);

    /// Reports this replica's usage of a quota, and requests a grant for [`QuotaStatement::needed`] in addition to that
    /// usage.
    fn extend_grant<'a>(&'a self, statement: &'a QuotaStatement) -> LinkFuture<'a, QuotaReply>;
}

/// The owner of an identifier, as another replica has recorded it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundOwner {
    /// The identifier that was looked up.
    pub identifier: Identifier,
    /// The account that owns the resource.
    pub owner: OwnerId,
}

/// Identifies one period of the quota of a client, or of one of its users.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct QuotaKey {
    /// The client whose quota or whose user's quota is counted.
    pub client: ClientName,
    /// The user, if the quota is a user quota.
    pub user: Option<UserFingerprint>,
    /// The unit that the quota counts.
    pub unit: QuotaUnit,
    /// The period after which the count is reset.
    pub period: Period,
    /// The start of the current period.
    pub period_start: UnixMs,
}

/// This replica's usage of a shared quota, in absolute amounts. All amounts are in the unit of the quota and count
/// from the start of the period.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaStatement {
    /// The period of the quota of a client or user.
    pub key: QuotaKey,
    /// The maximum of all replicas together.
    pub limit: u64,
    /// The amount that this replica has used or reserved. It falls when a reservation is refunded.
    pub used: u64,
    /// The amount that this replica may use by its current grant, or `used` if it has no grant.
    pub held: u64,
    /// A number that increases when the replica returns a part of its grant or all of it. The grant of a replica is
    /// `held` if the generation is newer than the generation of its last statement. Otherwise, it is the maximum of
    /// `held` and its last grant, because the reply that extended the grant may still be in transit.
    pub generation: u64,
    /// The amount in addition to `used` that a request needs. It is granted as a whole or not at all. It is 0 in a
    /// statement that no request waits for, and such a statement is never denied.
    pub needed: u64,
    /// The amount in addition to `used` that this replica wants to hold, at least `needed`. As much of it is granted
    /// as is left. For a request, a larger amount may be granted far from the limit.
    pub wanted: u64,
}

/// The reply to a [`QuotaStatement`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuotaReply {
    /// The replica may use the amount that it requested.
    Granted(QuotaGrant),
    /// The limit does not allow the amount that the replica needs. Its grant is not larger than before.
    Denied(QuotaGrant),
    /// There is no link, or no valid reply in time.
    Unknown,
}

/// The part of a quota that one replica may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaGrant {
    /// The amount that the replica may use in the period, including the used amount.
    pub granted: u64,
    /// The amount that the other replicas have used or reserved.
    pub used_by_others: u64,
    /// The end of the grant on the monotonic clock of this replica.
    pub valid_until: Instant,
}
