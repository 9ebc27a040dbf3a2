//! Describes where the Redis is that the replicas of a pool share, and the names that they use in it.

use std::fmt;

use super::forward_proxy::host_and_port;
use crate::secret::RedisCredentials;

/// The port of Redis in a URL that contains none.
pub const REDIS_PORT: u16 = 6379;
/// The port of a sentinel in a URL that contains none.
pub const SENTINEL_PORT: u16 = 26379;

/// The host and port of a Redis or a sentinel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisAddress {
    /// The name or address, without the brackets of an IPv6 address.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl fmt::Display for RedisAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&host_and_port(&self.host, self.port))
    }
}

/// Whether a TCP connection is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedisTransport {
    /// TCP without encryption.
    Plain,
    /// TLS over TCP.
    Tls,
}

/// The way to the Redis that accepts writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RedisRoute {
    /// A server, or a node of a cluster.
    Server(RedisAddress, RedisTransport),
    /// The absolute path of a Unix socket.
    Unix(String),
    /// Sentinels that know the server.
    Sentinel(SentinelRoute),
}

/// Sentinels and the name by which they know the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SentinelRoute {
    /// The sentinels. Any of them may be down.
    pub sentinels: Vec<RedisAddress>,
    /// The name of the master in the configuration of the sentinels.
    pub master: String,
    /// Whether the connections to the sentinels and to the master are encrypted.
    pub transport: RedisTransport,
}

/// The URL of a Redis. `Display` and `Debug` print no credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisUrl {
    /// The way to the server.
    pub route: RedisRoute,
    /// The user and password, if the server requires them.
    pub credentials: Option<RedisCredentials>,
    /// The number of the database.
    pub database: u32,
}

impl RedisUrl {
    /// Formats the URL with `...` in place of the credentials, if it has any.
    #[must_use]
    pub fn format_masked(&self) -> String {
        let url = self.to_string();
        match (&self.credentials, &self.route) {
            (None, _) => url,
            (Some(_), RedisRoute::Server(..) | RedisRoute::Sentinel(_)) => url.replacen("://", "://...@", 1),
            (Some(_), RedisRoute::Unix(_)) => {
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
        let separator = match &self.route {
            RedisRoute::Server(address, transport) => {
                write!(f, "{}://{address}", scheme(transport))?;
                "/"
            }
            RedisRoute::Unix(path) => {
                write!(f, "unix:{path}")?;
                "?db="
            }
            RedisRoute::Sentinel(SentinelRoute { sentinels, master, transport }) => {
                let sentinels: Vec<String> = sentinels.iter().map(ToString::to_string).collect();
                write!(f, "{}+sentinel://{}/{master}", scheme(transport), sentinels.join(","))?;
                "/"
            }
        };
        if self.database == 0 { Ok(()) } else { write!(f, "{separator}{}", self.database) }
    }
}

/// The maximum length of the name of a shared pool.
const MAX_NAME_LENGTH: usize = 64;

/// The name of a pool that replicas share. Pools with different names share nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPoolName(String);

impl SharedPoolName {
    /// Validates a name: 1 to 64 characters of `a`-`z`, `0`-`9`, `_`, `.` and `-`. None of them has a meaning in a
    /// key of Redis or in a pattern of its access control.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let is_name_byte = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'.' | b'-')
        };
        let is_valid = (1..=MAX_NAME_LENGTH).contains(&name.len()) && name.bytes().all(is_name_byte);
        is_valid.then(|| Self(name.to_owned()))
    }

    /// Returns the beginning of every key of the pool in Redis. The part in braces puts all keys into one slot of a
    /// cluster, and the number is the version of their format.
    #[must_use]
    pub fn key_prefix(&self) -> String {
        format!("{{keychoir:{}}}:1:", self.0)
    }

    /// Returns the channel on which replicas publish changes.
    #[must_use]
    pub fn changes_channel(&self) -> String {
        format!("{}changes", self.key_prefix())
    }

    /// Returns the pattern of the keys and channels of the pool in all versions of their format, for the access
    /// control of Redis.
    #[must_use]
    pub fn access_pattern(&self) -> String {
        format!("{{keychoir:{}}}:*", self.0)
    }
}

impl Default for SharedPoolName {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl fmt::Display for SharedPoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_no_character_with_a_meaning_in_redis() {
        for name in ["a", "default", "a-b_c.9", &"a".repeat(64)] {
            assert!(SharedPoolName::new(name).is_some(), "{name}");
        }
        for name in ["", "A", "a b", "a*", "{a}", "a:b", "\u{e4}", &"a".repeat(65)] {
            assert!(SharedPoolName::new(name).is_none(), "{name}");
        }
    }

    #[test]
    fn all_names_of_a_pool_are_in_one_slot_and_match_its_pattern() {
        let name = SharedPoolName::new("studio").unwrap();
        assert_eq!(name.key_prefix(), "{keychoir:studio}:1:");
        assert_eq!(name.changes_channel(), "{keychoir:studio}:1:changes");
        assert_eq!(name.access_pattern(), "{keychoir:studio}:*");
    }
}
