//! Describes the address of the Redis server that the replicas of a pool share, and formats it as a URL without its
//! credentials. Instead of the server, the URL may name sentinels, which monitor Redis servers and report the master.

use std::fmt;

use super::forward_proxy::host_and_port;
use crate::secret::RedisCredentials;

/// The default port of a Redis server.
pub const REDIS_PORT: u16 = 6379;
/// The default port of a sentinel.
pub const SENTINEL_PORT: u16 = 26379;

/// The host and port of a Redis server or a sentinel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisAddress {
    /// The host name or IP address. An IPv6 address has no brackets.
    pub host: String,
    /// The TCP port.
    pub port: u16,
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&host_and_port(&self.host, self.port))
    }
}

/// Whether TCP connections to Redis are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisTransport {
    /// TCP without encryption.
    Plain,
    /// TLS over TCP.
    Tls,
}

/// The location of the Redis server that accepts writes, which Redis calls the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisLocation {
    /// A server, or a node of a cluster.
    Server(RedisAddress, RedisTransport),
    /// The absolute path of a Unix socket.
    Unix(String),
    /// Sentinels that report the address of the master.
    Sentinel(SentinelGroup),
}

/// Sentinels, and the name under which they monitor the master.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentinelGroup {
    /// The sentinels. Any of them may be down.
    pub sentinels: Vec<RedisAddress>,
    /// The master name in the configuration of the sentinels.
    pub master: String,
    /// Whether the connections to the sentinels and to the master are encrypted.
    pub transport: RedisTransport,
}

/// The URL of a Redis server. `Display` and `Debug` print no credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisUrl {
    /// The server, its Unix socket, or its sentinels.
    pub location: RedisLocation,
    /// The user and password, if the server requires them.
    pub credentials: Option<RedisCredentials>,
    /// The database number.
    pub database: u32,
}

impl RedisUrl {
    /// Formats the URL with `...` in place of the credentials, if it has any.
    #[must_use]
    pub fn format_masked(&self) -> String {
        let url = self.to_string();
        match (&self.credentials, &self.location) {
            (None, _) => url,
            (Some(_), RedisLocation::Server(..) | RedisLocation::Sentinel(_)) => {
                url.replacen("://", "://...@", 1)
            }
            (Some(_), RedisLocation::Unix(_)) => {
                let separator = if self.database == 0 { '?' } else { '&' };
                format!("{url}{separator}pass=...")
            }
        }
    }
}

/// The URL without credentials, for logs and errors.
impl fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = |transport: &RedisTransport| match transport {
            RedisTransport::Plain => "redis",
            RedisTransport::Tls => "rediss",
        };
        let separator = match &self.location {
            RedisLocation::Server(address, transport) => {
                write!(f, "{}://{address}", scheme(transport))?;
                "/"
            }
            RedisLocation::Unix(path) => {
                write!(f, "unix:{path}")?;
                "?db="
            }
            RedisLocation::Sentinel(SentinelGroup { sentinels, master, transport }) => {
                let sentinels: Vec<String> = sentinels.iter().map(ToString::to_string).collect();
                write!(f, "{}+sentinel://{}/{master}", scheme(transport), sentinels.join(","))?;
                "/"
            }
        };
        if self.database == 0 { Ok(()) } else { write!(f, "{separator}{}", self.database) }
    }
}
