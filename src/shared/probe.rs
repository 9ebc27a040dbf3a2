//! Tries for `keychoir check --online` whether a replica can use a Redis: connects, runs a script with all commands of
//! the replicas' scripts, and publishes and receives a message. The only trace of a probe is a key that expires after
//! 5,000 ms.

use std::fmt;
use std::io;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{RedisError, RedisResult};

use super::LinkSettings;
use super::connect_error::{RedisConnectError, RedisRefusal};
use super::connection::{RedisConnection, RedisEndpoint, RedisServer};
use super::push::Push;
use crate::clock;
use crate::policy::units::UnixMs;
use crate::tasks::Tasks;
use crate::upstream::TlsError;

/// Uses every command of a replica's scripts on one key, and returns the time of Redis in milliseconds.
const SCRIPT: &str = "
local time = redis.call('TIME')
redis.call('SET', KEYS[1], ARGV[1], 'PX', 5000)
redis.call('GET', KEYS[1])
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'a', ARGV[1])
redis.call('PEXPIRE', KEYS[1], 5000)
redis.call('PTTL', KEYS[1])
redis.call('HINCRBY', KEYS[1], 'b', 1)
redis.call('HLEN', KEYS[1])
redis.call('HGET', KEYS[1], 'a')
redis.call('HMGET', KEYS[1], 'a', 'b')
redis.call('HGETALL', KEYS[1])
redis.call('HDEL', KEYS[1], 'a', 'b')
redis.call('PUBLISH', ARGV[2], ARGV[1])
return time[1] * 1000 + math.floor(time[2] / 1000)";

/// The beginning of the message that a probe publishes. Replicas ignore it.
const MESSAGE_PREFIX: &str = "check ";
/// Maximum number of nodes of a cluster that are tried. In a stable cluster, the first node names the right one.
const MAX_TRIED_NODES: usize = 3;
/// The number of measured round trips.
const MEASURED_ROUND_TRIPS: usize = 5;

/// The result of a probe.
#[derive(Clone, Debug)]
pub struct RedisProbe {
    /// The server. In a cluster, it is the node that has the keys of the pool.
    pub server: RedisServer,
    /// The shortest of several round trips.
    pub round_trip: Duration,
    /// The time of the Redis server.
    pub server_time: UnixMs,
    /// The time of this machine when the response with the time of the Redis server arrived.
    pub local_time: UnixMs,
}

/// The reason why a probe failed.
#[derive(Debug, thiserror::Error)]
pub enum RedisProbeError {
    /// `redis.ca_file` cannot be used.
    #[error("redis.ca_file: {0}")]
    Tls(#[from] TlsError),
    /// No connection could be opened.
    #[error(transparent)]
    Connect(#[from] RedisConnectError),
    /// Redis refused a step.
    #[error("{step}: {server} {refusal}")]
    Refused {
        /// The address of the server.
        server: String,
        /// The step that was refused.
        step: RedisProbeStep,
        /// The reason that Redis has returned.
        refusal: RedisRefusal,
    },
    /// A step had no response in time, the connection ended, or the published message was not delivered in time.
    #[error(
        "{step}: {server} does not respond within {} ms: raise redis.response_timeout if it is far away",
        .timeout.as_millis()
    )]
    NoResponse {
        /// The address of the server.
        server: String,
        /// The step without a response.
        step: RedisProbeStep,
        /// The configured timeout.
        timeout: Duration,
    },
}

impl RedisProbeError {
    /// Returns the reason why Redis refused the connection or a step, or `None` for any other failure.
    #[must_use]
    pub fn refusal(&self) -> Option<&RedisRefusal> {
        match self {
            Self::Refused { refusal, .. } | Self::Connect(RedisConnectError::Refused { refusal, .. }) => {
                Some(refusal)
            }
            Self::Tls(_) | Self::Connect(_) | Self::NoResponse { .. } => None,
        }
    }
}

/// A step of a probe. Its text names the commands that need a permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisProbeStep {
    /// Commands without a script.
    Commands,
    /// The script with the commands on keys.
    Script,
    /// The subscription to the channel.
    Subscribe,
    /// The delivery of a message on the channel.
    Publish,
}

impl fmt::Display for RedisProbeStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Commands => "PING, GET and SET",
            Self::Script => "EVAL with the commands of the scripts",
            Self::Subscribe => "SUBSCRIBE",
            Self::Publish => "PUBLISH",
        })
    }
}

/// Tries the Redis of `settings`. `redis.connect_timeout` bounds the connection, and `redis.response_timeout` bounds
/// each other step.
///
/// # Errors
///
/// Fails when a replica with these settings could not use Redis.
pub async fn probe(settings: &LinkSettings) -> Result<RedisProbe, RedisProbeError> {
    let tasks = Tasks::new();
    let mut endpoint = RedisEndpoint::new(settings)?;
    let mut connection = endpoint.open(&tasks).await?;
    for _ in 0..MAX_TRIED_NODES {
        let failure = match try_connection(settings, &mut connection).await {
            Ok(probe) => return Ok(probe),
            Err(failure) => failure,
        };
        match endpoint.redirect(&failure.error) {
            Some(node) => endpoint = node,
            None => return Err(failure.into_probe_error(settings, &connection.server)),
        }
        connection = endpoint.open(&tasks).await?;
    }
    let refusal = RedisRefusal::Cluster("MOVED".to_owned());
    Err(RedisProbeError::Refused { server: connection.server.address, step: RedisProbeStep::Script, refusal })
}

/// An error of a command, and the step in which it occurred.
struct StepFailure {
    step: RedisProbeStep,
    error: RedisError,
}

impl StepFailure {
    fn into_probe_error(self, settings: &LinkSettings, server: &RedisServer) -> RedisProbeError {
        let (server, step) = (server.address.clone(), self.step);
        match RedisRefusal::from_error(&self.error) {
            Some(refusal) => RedisProbeError::Refused { server, step, refusal },
            None => RedisProbeError::NoResponse { server, step, timeout: settings.response_timeout },
        }
    }
}

/// Returns a function that adds the step to an error.
fn fail_in(step: RedisProbeStep) -> impl Fn(RedisError) -> StepFailure {
    move |error| StepFailure { step, error }
}

/// Runs all steps of a probe on an open connection.
async fn try_connection(
    settings: &LinkSettings,
    connection: &mut RedisConnection,
) -> Result<RedisProbe, StepFailure> {
    let commands = &mut connection.commands;
    let key = format!("{}check", settings.pool.key_prefix());
    let channel = settings.pool.changes_channel();
    let token = format!("{MESSAGE_PREFIX}{:016x}", fastrand::u64(..));
    commands.subscribe(&channel).await.map_err(fail_in(RedisProbeStep::Subscribe))?;
    let server_time: u64 = redis::cmd("EVAL")
        .arg(SCRIPT)
        .arg(1)
        .arg(&key)
        .arg(&token)
        .arg(&channel)
        .query_async(commands)
        .await
        .map_err(fail_in(RedisProbeStep::Script))?;
    let local_time = clock::now();
    let round_trip = try_commands(commands, &key, &token).await.map_err(fail_in(RedisProbeStep::Commands))?;
    let delivery = tokio::time::timeout(settings.response_timeout, async {
        while let Some(push) = connection.pushes.next().await {
            if push == Push::Message(token.clone().into_bytes()) {
                return true;
            }
        }
        false
    });
    if !delivery.await.unwrap_or(false) {
        let error = RedisError::from(io::Error::from(io::ErrorKind::TimedOut));
        return Err(StepFailure { step: RedisProbeStep::Publish, error });
    }
    Ok(RedisProbe {
        server: connection.server.clone(),
        round_trip,
        server_time: UnixMs(server_time),
        local_time,
    })
}

/// Sends the commands that replicas send without a script, and returns the shortest round trip.
async fn try_commands(commands: &mut MultiplexedConnection, key: &str, value: &str) -> RedisResult<Duration> {
    redis::cmd("SET").arg(key).arg(value).arg("PX").arg(5_000).exec_async(commands).await?;
    redis::cmd("GET").arg(key).exec_async(commands).await?;
    let mut shortest = Duration::MAX;
    for _ in 0..MEASURED_ROUND_TRIPS {
        let start = clock::instant();
        redis::cmd("PING").exec_async(commands).await?;
        shortest = shortest.min(clock::elapsed_since(start));
    }
    Ok(shortest)
}
