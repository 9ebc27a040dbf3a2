//! Lets several replicas of Keychoir share one pool of keys through Redis.
//!
//! [`LinkTask`] keeps one connection to Redis. At each beat, which is a round trip to Redis, it reports the use of this
//! replica and receives its grants of credits and slots. It also publishes the changes of this replica, and applies the
//! changes that other replicas publish. [`probe()`] tries a Redis for `keychoir check --online`, and
//! [`acl_setuser_command()`] builds the command that permits a replica to use it. Without `[redis]` in the
//! configuration, no task of this module runs.

mod beat_calls;
mod beat_replies;
mod changes;
mod clients;
mod connect_error;
mod connection;
mod credit_statement;
mod credits;
mod demand_pace;
mod envelope;
mod evidence;
mod link;
mod link_counts;
mod lookup_breaker;
mod maps;
mod members;
mod open_link;
mod overlay;
mod polls;
mod probe;
mod push;
mod quotas;
mod redis_acl;
mod replica;
mod replica_use;
mod reply;
mod scripts;
mod shared_clock;
#[cfg(test)]
#[cfg(not(keychoir_model))]
mod simulation;
mod slots;
mod task;
mod view;

use std::path::PathBuf;
use std::time::Duration;

use crate::policy::redis_url::RedisUrl;
use crate::policy::shared_pool_name::SharedPoolName;

pub use connect_error::{RedisConnectError, RedisRefusal};
pub use connection::{RedisConnection, RedisEndpoint, RedisServer};
pub use envelope::{OpenEnvelopeError, SealEnvelopeError, SecretDocument};
pub use link_counts::LinkCounts;
pub use overlay::{OverlayExchange, OverlayPort, OverlayVersion, SealedOverlay};
pub use probe::{RedisProbe, RedisProbeError, RedisProbeStep, probe};
pub use push::{Push, Pushes};
pub use redis_acl::acl_setuser_command;
pub use task::{LinkHandles, LinkInputs, LinkTask, new_replica_id};
pub use view::{LinkState, ListedReplica, PoolView, SharedPoolView};

/// The Redis that replicas share, and the timing of the connection to it.
#[derive(Clone, Debug)]
pub struct LinkSettings {
    /// The address of Redis, its sentinels or its Unix socket, with the credentials.
    pub url: RedisUrl,
    /// A PEM file of the only certificate authorities that are trusted for Redis. `None` if the public authorities
    /// are trusted.
    pub ca_file: Option<PathBuf>,
    /// The pool that the replicas share.
    pub pool: SharedPoolName,
    /// Maximum time that a client's request waits for a reply of Redis.
    pub wait_timeout: Duration,
    /// Interval between two beats of a replica while its use changes.
    pub beat_interval: Duration,
    /// Time without a response after which Redis counts as lost.
    pub response_timeout: Duration,
    /// Timeout for sentinels, DNS, TCP, TLS and authentication together.
    pub connect_timeout: Duration,
    /// Maximum delay between two attempts to connect.
    pub max_reconnect_delay: Duration,
}
