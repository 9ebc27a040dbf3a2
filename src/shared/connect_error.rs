//! Classifies the failures to open a connection to Redis, and the errors that Redis returns for commands. The message
//! of each class names the correction, except that of [`RedisRefusal::OtherNode`], after which the program connects to
//! the other node. No message contains a text of Redis, because the text may quote a password. For example, the error
//! for an unknown command contains the arguments of the command.

use std::io;
use std::time::Duration;

use redis::{ErrorKind, RedisError};

/// The reason why no connection to Redis could be opened.
#[derive(Debug, thiserror::Error)]
pub enum RedisConnectError {
    /// The host has no address.
    #[error(
        "the name {host} cannot be resolved ({source}): correct the host in redis.url, or the DNS of this machine"
    )]
    Name {
        /// The host of the URL or of a sentinel.
        host: String,
        /// The error of the resolver.
        source: io::Error,
    },
    /// No address of the host accepts a connection, or the Unix socket does not exist.
    #[error("{server} accepts no connection ({source}): start Redis, or correct redis.url")]
    Unreachable {
        /// The address without credentials.
        server: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The connection was not ready within `redis.connect_timeout`.
    #[error(
        "{server} does not respond within {} ms: correct the address and the scheme in redis.url (rediss:// for TLS \
         only) or the firewall, or raise redis.connect_timeout",
        .timeout.as_millis()
    )]
    Timeout {
        /// The URL without credentials.
        server: String,
        /// The configured timeout.
        timeout: Duration,
    },
    /// The TLS handshake failed.
    #[error(
        "the TLS handshake with {server} failed ({source}): set redis.ca_file to the authority of its certificate, or \
         write redis:// if it does not use TLS"
    )]
    Tls {
        /// The address without credentials.
        server: String,
        /// The error of the TLS library.
        source: io::Error,
    },
    /// The connection ended before it was ready, or the server does not speak the protocol of Redis.
    #[error(
        "{server} closed the connection or is not a Redis: correct redis.url, or write rediss:// if it uses TLS"
    )]
    Broken {
        /// The address without credentials.
        server: String,
    },
    /// Redis refused the connection.
    #[error("{server} {refusal}")]
    Refused {
        /// The address without credentials.
        server: String,
        /// The reason of Redis.
        refusal: RedisRefusal,
    },
    /// No sentinel knows the master.
    #[error(
        "the sentinels do not know the master {master}: write its name in their configuration at the end of redis.url"
    )]
    UnknownMaster {
        /// The name in the URL.
        master: String,
    },
    /// No sentinel responded. The error is that of the last sentinel.
    #[error("no sentinel returned the address of the master: {0}")]
    NoSentinel(Box<RedisConnectError>),
}

/// The reason why Redis refuses a connection or a command. The text continues a sentence that names the server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedisRefusal {
    /// Redis requires a password, and none is configured.
    #[error("requires a password: write USER:PASSWORD@ or :PASSWORD@ before the host in redis.url")]
    PasswordRequired,
    /// The user or the password is wrong.
    #[error(
        "refuses the user or the password: correct them in redis.url, and check that the user is on (ACL LIST)"
    )]
    WrongPassword,
    /// The user may not use a command, a key or a channel.
    #[error(
        "denies a command, key or channel of the pool: run the line `ACL SETUSER` that `keychoir check --online` prints"
    )]
    PermissionDenied,
    /// The server is older than the oldest supported version, or does not know a command or RESP3, the protocol of
    /// Redis.
    #[error("is too old or has no RESP3: Redis 6.2, Valkey 7.2 or a later version is required")]
    TooOld,
    /// The server is still loading its data.
    #[error("is still loading its data: wait until it is ready")]
    Loading,
    /// The server is a replica of another Redis server, or has lost the connection to its master.
    #[error(
        "is a read-only replica: write the address of the master, or that of the sentinels (redis+sentinel://)"
    )]
    ReadOnly,
    /// The server is a sentinel.
    #[error("is a sentinel: write redis+sentinel://HOST:PORT/MASTER in redis.url")]
    Sentinel,
    /// The server is listed as a sentinel in the URL, but is not a sentinel.
    #[error("is not a sentinel: correct its port in redis.url, or write redis://HOST:PORT without sentinels")]
    NotSentinel,
    /// The sentinel requires a password.
    #[error(
        "is a sentinel that requires a password, but a password in redis.url is only for the master: permit its \
         user default the command SENTINEL GET-MASTER-ADDR-BY-NAME"
    )]
    SentinelPassword,
    /// The server has no password and refuses connections from other machines.
    #[error("accepts connections of its own machine only (protected mode): set a password in Redis")]
    ProtectedMode,
    /// The server has its maximum number of connections.
    #[error("has its maximum number of connections: raise maxclients in Redis")]
    TooManyClients,
    /// The database does not exist.
    #[error(
        "has no database of this number, or is a cluster, which has only database 0: correct the end of redis.url"
    )]
    Database,
    /// The key belongs to another node of the cluster.
    #[error("is not the node of the cluster that has the pool")]
    OtherNode,
    /// The cluster cannot serve the key, or redirects more often than a probe follows. Contains the code of the error.
    #[error("is in a cluster that cannot serve the pool ({0}): check it with `redis-cli cluster info`")]
    Cluster(String),
    /// Another error, of which only the code is shown.
    #[error("refuses the connection ({0}): see the log of Redis")]
    Other(String),
}

impl RedisRefusal {
    /// Classifies an error that Redis returned. Returns `None` for an error of the connection.
    #[must_use]
    pub fn from_error(error: &RedisError) -> Option<Self> {
        if error.kind() == ErrorKind::RESP3NotSupported {
            return Some(Self::TooOld);
        }
        // The first error decides, because the error of a pipeline contains the errors of all its commands.
        let server_error = error.clone().into_server_errors()?.first()?.1.clone();
        let detail = server_error.details().unwrap_or_default();
        Some(match server_error.code() {
            "NOAUTH" => Self::PasswordRequired,
            "WRONGPASS" => Self::WrongPassword,
            "NOPERM" => Self::PermissionDenied,
            // Redis before version 7 reports a command that is denied in a script only by this text.
            _ if detail.contains("user executing the script") => Self::PermissionDenied,
            "NOPROTO" => Self::TooOld,
            _ if detail.starts_with("unknown command") => Self::TooOld,
            "LOADING" => Self::Loading,
            "READONLY" | "MASTERDOWN" => Self::ReadOnly,
            "DENIED" => Self::ProtectedMode,
            "MOVED" | "ASK" => Self::OtherNode,
            code @ ("CLUSTERDOWN" | "TRYAGAIN" | "CROSSSLOT") => Self::Cluster(code.to_owned()),
            _ if detail.starts_with("max number of clients") => Self::TooManyClients,
            code => Self::Other(code.to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use redis::parse_redis_value;

    use super::*;

    #[track_caller]
    fn check_refusal(response: &str, expected: Option<RedisRefusal>) {
        let error = parse_redis_value(response.as_bytes()).unwrap().extract_error().unwrap_err();
        let refusal = RedisRefusal::from_error(&error);
        assert_eq!(refusal, expected, "{response:?} must have this reason");
        let message = refusal.unwrap().to_string();
        assert!(!message.contains("hunter2"), "the message for {response:?} must not contain the password");
    }

    #[test]
    fn each_error_of_redis_has_a_reason_and_shows_no_password() {
        for (response, expected) in [
            ("-NOAUTH Authentication required.\r\n", RedisRefusal::PasswordRequired),
            ("-WRONGPASS invalid username-password pair\r\n", RedisRefusal::WrongPassword),
            (
                "-NOPERM User alice has no permissions to run the 'eval' command\r\n",
                RedisRefusal::PermissionDenied,
            ),
            (
                "-ERR The user executing the script can't run this command or subcommand\r\n",
                RedisRefusal::PermissionDenied,
            ),
            ("-NOPROTO unsupported protocol version\r\n", RedisRefusal::TooOld),
            (
                "-ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'a' 'hunter2'\r\n",
                RedisRefusal::TooOld,
            ),
            ("-ERR unknown command `HELLO`, with args beginning with: `hunter2`\r\n", RedisRefusal::TooOld),
            ("-LOADING Redis is loading the dataset in memory\r\n", RedisRefusal::Loading),
            ("-READONLY You can't write against a read only replica.\r\n", RedisRefusal::ReadOnly),
            ("-MASTERDOWN Link with MASTER is down\r\n", RedisRefusal::ReadOnly),
            ("-DENIED Redis is running in protected mode\r\n", RedisRefusal::ProtectedMode),
            ("-MOVED 1 10.0.0.1:7000\r\n", RedisRefusal::OtherNode),
            ("-CLUSTERDOWN Hash slot not served\r\n", RedisRefusal::Cluster("CLUSTERDOWN".to_owned())),
            ("-ERR max number of clients reached\r\n", RedisRefusal::TooManyClients),
            ("-ERR hunter2\r\n", RedisRefusal::Other("ERR".to_owned())),
        ] {
            check_refusal(response, Some(expected));
        }
    }

    #[test]
    fn an_error_of_the_connection_is_not_a_refusal() {
        let error = RedisError::from(io::Error::from(io::ErrorKind::ConnectionReset));
        assert_eq!(RedisRefusal::from_error(&error), None);
    }
}
