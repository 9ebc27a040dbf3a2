//! Opens a connection to Redis: finds the master with sentinels, and opens a stream over TCP, TLS or a Unix socket.
//! Performs the handshake of the protocol, and refuses a server that replicas cannot use. Also finds the node of a
//! cluster to which a MOVED error refers.
//!
//! This file opens the stream instead of the client library. TLS then uses the same library and settings as the rest of
//! the program, and each reason for a failure has a separate message.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ProtocolVersion, RedisConnectionInfo, RedisError, Value};
use rustls::pki_types::ServerName;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::LinkSettings;
use super::connect_error::{RedisConnectError, RedisRefusal};
use super::push::{self, Pushes};
use crate::platform::sockets::UnixStream;
use crate::policy::redis_url::{RedisAddress, RedisLocation, RedisTransport, RedisUrl, SentinelGroup};
use crate::tasks::{AbortOnDrop, Tasks};
use crate::upstream::{BoxedStream, TcpError, TlsError, connect_tcp, private_tls_config};

/// The oldest version of Redis with RESP3, access control of channels, and all commands that replicas use. All versions
/// of Valkey have higher numbers.
const MIN_VERSION: (u32, u32) = (6, 2);

/// The address and the settings with which connections to a Redis are opened. `Debug` prints no credentials.
#[derive(Clone)]
pub struct RedisEndpoint {
    url: RedisUrl,
    tls: TlsConnector,
    connect_timeout: Duration,
    response_timeout: Duration,
}

/// An open connection. Dropping it closes the connection, so that clones of `commands` fail.
#[derive(Debug)]
pub struct RedisConnection {
    /// Sends commands. All clones use the same connection. A command fails after `redis.response_timeout` without a
    /// response.
    pub commands: MultiplexedConnection,
    /// Receives the messages of subscribed channels.
    pub pushes: Pushes,
    /// The server of the connection.
    pub server: RedisServer,
    /// Ends the task that reads and writes the stream.
    _driver: AbortOnDrop,
}

/// The address, the product and the version of a Redis server, from its response to HELLO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisServer {
    /// The address of the server, without credentials. With sentinels, it is the address of the master.
    pub address: String,
    /// `redis`, `valkey` or another product.
    pub product: String,
    /// The version, such as `7.0.15`.
    pub version: String,
}

impl RedisEndpoint {
    /// Creates an endpoint from settings. [`RedisEndpoint::open`] opens connections.
    ///
    /// # Errors
    ///
    /// Fails when `redis.ca_file` cannot be used, or the TLS library supports no protocol version.
    pub fn new(settings: &LinkSettings) -> Result<Self, TlsError> {
        Ok(Self {
            url: settings.url.clone(),
            tls: TlsConnector::from(Arc::new(private_tls_config(settings.ca_file.as_deref())?)),
            connect_timeout: settings.connect_timeout,
            response_timeout: settings.response_timeout,
        })
    }

    /// Opens a connection within `redis.connect_timeout`. `tasks` spawns the task that reads and writes the stream.
    ///
    /// When this function returns, the server is a master and has loaded its data. If the server becomes a replica or
    /// loads data later, a command fails with an error of Redis.
    ///
    /// # Errors
    ///
    /// Fails when no Redis that replicas can use responds in time.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection.
    pub async fn open(&self, tasks: &Tasks) -> Result<RedisConnection, RedisConnectError> {
        let timeout = self.connect_timeout;
        // The future is large. In a box, it does not enlarge the futures that contain it.
        let opening = Box::pin(self.open_without_timeout(tasks));
        tokio::time::timeout(timeout, opening)
            .await
            .unwrap_or_else(|_| Err(RedisConnectError::Timeout { server: self.url.to_string(), timeout }))
    }

    /// Returns the endpoint of the node that a cluster names in a MOVED error. Returns `None` for any other error, and
    /// for an endpoint with a Unix socket or sentinels, which is not a node of a cluster.
    #[must_use]
    pub fn redirect(&self, error: &RedisError) -> Option<Self> {
        let RedisLocation::Server(current, transport) = &self.url.location else { return None };
        let errors = error.clone().into_server_errors()?;
        let (_, moved_error) = errors.iter().find(|(_, error)| error.code() == "MOVED")?;
        // The details are `SLOT HOST:PORT`. An empty host means the current host, and an IPv6 address has no brackets.
        let (host, port) = moved_error.details()?.split_ascii_whitespace().nth(1)?.rsplit_once(':')?;
        let host = if matches!(host, "" | "?") { &current.host } else { host };
        let address = RedisAddress { host: host.to_owned(), port: port.parse().ok()? };
        let url = RedisUrl { location: RedisLocation::Server(address, *transport), ..self.url.clone() };
        Some(Self { url, ..self.clone() })
    }

    async fn open_without_timeout(&self, tasks: &Tasks) -> Result<RedisConnection, RedisConnectError> {
        let (stream, address) = match &self.url.location {
            RedisLocation::Server(address, transport) => {
                (self.open_tcp(address, *transport).await?, address.to_string())
            }
            RedisLocation::Unix(path) => {
                let stream = UnixStream::connect(path).await;
                let server = format!("unix:{path}");
                let stream = stream
                    .map_err(|source| RedisConnectError::Unreachable { server: server.clone(), source })?;
                (Box::new(stream) as BoxedStream, server)
            }
            RedisLocation::Sentinel(sentinels) => {
                let address = self.find_master(sentinels).await?;
                (self.open_tcp(&address, sentinels.transport).await?, address.to_string())
            }
        };
        self.perform_handshake(stream, address, tasks).await
    }

    /// Opens a TCP connection, and performs the TLS handshake if `transport` requires it.
    async fn open_tcp(
        &self,
        address: &RedisAddress,
        transport: RedisTransport,
    ) -> Result<BoxedStream, RedisConnectError> {
        let server = || address.to_string();
        let tcp = connect_tcp(&address.host, address.port).await.map_err(|error| match error {
            TcpError::Name(source) => RedisConnectError::Name { host: address.host.clone(), source },
            TcpError::Connect(source) => RedisConnectError::Unreachable { server: server(), source },
        })?;
        if transport == RedisTransport::Plain {
            return Ok(Box::new(tcp));
        }
        let tls_error = |source| RedisConnectError::Tls { server: server(), source };
        let name =
            ServerName::try_from(address.host.clone()).map_err(|error| tls_error(io::Error::other(error)))?;
        Ok(Box::new(self.tls.connect(name, tcp).await.map_err(tls_error)?))
    }

    /// Performs the handshake of the protocol. Fails if replicas cannot use the server.
    async fn perform_handshake(
        &self,
        stream: BoxedStream,
        address: String,
        tasks: &Tasks,
    ) -> Result<RedisConnection, RedisConnectError> {
        let failed = |error: RedisError| connect_error(&address, &error);
        let (push, pushes) = push::create_queue();
        let config = connection_config().set_push_sender(push);
        let (mut commands, driver) =
            MultiplexedConnection::new_with_config(&self.connection_info(), stream, config)
                .await
                .map_err(failed)?;
        let driver = tasks.spawn_guarded(driver);
        // Without an argument, HELLO only returns the product, the version and the role. It requires no permission.
        let hello: HashMap<String, Value> =
            redis::cmd("HELLO").query_async(&mut commands).await.map_err(failed)?;
        let server = parse_hello(&hello, &address)?;
        if self.url.database != 0 {
            let selection = redis::cmd("SELECT").arg(self.url.database).exec_async(&mut commands).await;
            selection.map_err(|error| match RedisRefusal::from_error(&error) {
                Some(RedisRefusal::Other(_)) => {
                    RedisConnectError::Refused { server: address.clone(), refusal: RedisRefusal::Database }
                }
                Some(_) | None => failed(error),
            })?;
        }
        // Redis responds to HELLO while it loads its data, and refuses PING.
        redis::cmd("PING").exec_async(&mut commands).await.map_err(failed)?;
        commands.set_response_timeout(self.response_timeout);
        Ok(RedisConnection { commands, pushes, server, _driver: driver })
    }

    /// Returns the settings of the handshake. The client library must not send `CLIENT SETINFO`: it would need a
    /// permission, but Redis before 7.2 refuses an `ACL SETUSER` command that permits a command unknown to it.
    fn connection_info(&self) -> RedisConnectionInfo {
        let mut info =
            RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP3).set_skip_set_lib_name();
        if let Some(credentials) = &self.url.credentials {
            info = info.set_password(credentials.expose_password());
            if let Some(user) = credentials.expose_user() {
                info = info.set_username(user);
            }
        }
        info
    }

    /// Queries all sentinels at the same time, because a sentinel that is down may not respond. Returns the first
    /// address of a master. A sentinel without contact to the others may return the address of a former master. If that
    /// server is a replica, the handshake refuses it.
    async fn find_master(&self, group: &SentinelGroup) -> Result<RedisAddress, RedisConnectError> {
        let mut queries = JoinSet::new();
        for sentinel in &group.sentinels {
            let (endpoint, sentinel, group) = (self.clone(), sentinel.clone(), group.clone());
            queries.spawn(async move { endpoint.query_sentinel(&sentinel, &group).await });
        }
        let (mut has_response, mut failure) = (false, None);
        while let Some(query) = queries.join_next().await {
            match query {
                Ok(Ok(Some(address))) => return Ok(address),
                Ok(Ok(None)) => has_response = true,
                Ok(Err(error)) => failure = Some(error),
                // A query that has panicked has no reply.
                Err(_) => {}
            }
        }
        match failure {
            Some(error) if !has_response => Err(RedisConnectError::NoSentinel(Box::new(error))),
            Some(_) | None => Err(RedisConnectError::UnknownMaster { master: group.master.clone() }),
        }
    }

    /// Queries one sentinel for the address of the master without authentication. Returns `None` if the sentinel does
    /// not know the master.
    async fn query_sentinel(
        &self,
        sentinel: &RedisAddress,
        group: &SentinelGroup,
    ) -> Result<Option<RedisAddress>, RedisConnectError> {
        let stream = self.open_tcp(sentinel, group.transport).await?;
        let info =
            RedisConnectionInfo::default().set_protocol(ProtocolVersion::RESP2).set_skip_set_lib_name();
        let name = sentinel.to_string();
        let failed = |error: RedisError| {
            let refusal = match RedisRefusal::from_error(&error) {
                Some(RedisRefusal::PasswordRequired) => RedisRefusal::SentinelPassword,
                // The error for an unknown command means here that the server does not know SENTINEL.
                Some(RedisRefusal::TooOld) => RedisRefusal::NotSentinel,
                Some(_) | None => return connect_error(&name, &error),
            };
            RedisConnectError::Refused { server: name.clone(), refusal }
        };
        let (mut commands, driver) =
            MultiplexedConnection::new_with_config(&info, stream, connection_config())
                .await
                .map_err(failed)?;
        let mut query = redis::cmd("SENTINEL");
        query.arg("GET-MASTER-ADDR-BY-NAME").arg(&group.master);
        let address: Option<(String, u16)> = tokio::select! {
            address = query.query_async(&mut commands) => address.map_err(failed)?,
            () = driver => return Err(RedisConnectError::Broken { server: name }),
        };
        Ok(address.map(|(host, port)| RedisAddress { host, port }))
    }
}

impl fmt::Debug for RedisEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RedisEndpoint").field(&self.url).finish()
    }
}

/// Returns settings of the client library without timeouts, because `redis.connect_timeout` bounds the handshake.
fn connection_config() -> AsyncConnectionConfig {
    AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None)
}

/// Converts an error of the handshake with the server at `address`.
fn connect_error(address: &str, error: &RedisError) -> RedisConnectError {
    let server = address.to_owned();
    match RedisRefusal::from_error(error) {
        Some(refusal) => RedisConnectError::Refused { server, refusal },
        None => RedisConnectError::Broken { server },
    }
}

/// Parses the response to HELLO. Fails if the server is a sentinel, too old, or a replica.
fn parse_hello(hello: &HashMap<String, Value>, address: &str) -> Result<RedisServer, RedisConnectError> {
    let text = |name: &str| match hello.get(name) {
        Some(Value::BulkString(bytes)) => String::from_utf8_lossy(bytes).into_owned(),
        Some(Value::SimpleString(text) | Value::VerbatimString { text, .. }) => text.clone(),
        Some(_) | None => String::new(),
    };
    let server =
        RedisServer { address: address.to_owned(), product: text("server"), version: text("version") };
    let refusal = if text("mode") == "sentinel" {
        RedisRefusal::Sentinel
    } else if parse_version(&server.version).is_some_and(|version| version < MIN_VERSION) {
        RedisRefusal::TooOld
    } else if text("role") == "replica" {
        RedisRefusal::ReadOnly
    } else {
        return Ok(server);
    };
    Err(RedisConnectError::Refused { server: server.address, refusal })
}

/// Returns the first two numbers of a version, or `None` for any other notation, which other products may have.
fn parse_version(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use redis::parse_redis_value;

    use super::*;
    use crate::policy::shared_pool_name::SharedPoolName;
    use crate::secret::RedisCredentials;

    fn settings() -> LinkSettings {
        let address = RedisAddress { host: "node-1".to_owned(), port: 7000 };
        LinkSettings {
            url: RedisUrl {
                location: RedisLocation::Server(address, RedisTransport::Tls),
                credentials: Some(RedisCredentials::new(Some("alice"), "hunter2")),
                database: 0,
            },
            ca_file: None,
            pool: SharedPoolName::default(),
            wait_timeout: Duration::from_millis(20),
            beat_interval: Duration::from_millis(200),
            response_timeout: Duration::from_millis(250),
            connect_timeout: Duration::from_secs(2),
            max_reconnect_delay: Duration::from_secs(1),
        }
    }

    #[test]
    fn an_endpoint_is_printed_without_its_credentials() {
        let endpoint = RedisEndpoint::new(&settings()).unwrap();
        let printed = format!("{endpoint:?}{endpoint:#?}{:?}", settings());
        assert!(!printed.contains("alice"), "{printed} must not contain the user");
        assert!(!printed.contains("hunter2"), "{printed} must not contain the password");
    }

    #[test]
    fn a_moved_error_names_the_next_node_with_the_same_credentials_and_tls() {
        let endpoint = RedisEndpoint::new(&settings()).unwrap();
        for (response, expected) in [
            ("-MOVED 12182 10.0.0.2:7001\r\n", Some("rediss://10.0.0.2:7001")),
            ("-MOVED 12182 :7002\r\n", Some("rediss://node-1:7002")),
            ("-MOVED 12182 ?:7002\r\n", Some("rediss://node-1:7002")),
            ("-MOVED 12182 2001:db8::1:7003\r\n", Some("rediss://[2001:db8::1]:7003")),
            ("-MOVED 12182\r\n", None),
            ("-MOVED 12182 host:port\r\n", None),
            ("-MOVED\r\n", None),
            ("-ASK 12182 10.0.0.2:7001\r\n", None),
            ("-ERR MOVED 12182 10.0.0.2:7001\r\n", None),
        ] {
            let error = parse_redis_value(response.as_bytes()).unwrap().extract_error().unwrap_err();
            let next = endpoint.redirect(&error);
            assert_eq!(
                next.as_ref().map(|next| next.url.to_string()).as_deref(),
                expected,
                "the next node must be the node that {response:?} names"
            );
            assert!(
                next.is_none_or(|next| next.url.credentials == endpoint.url.credentials),
                "{response:?} must not change the credentials"
            );
        }
        let mut unix = settings();
        unix.url.location = RedisLocation::Unix("/r".to_owned());
        let error = parse_redis_value(b"-MOVED 1 h:1\r\n").unwrap().extract_error().unwrap_err();
        let redirected = RedisEndpoint::new(&unix).unwrap().redirect(&error);
        assert!(redirected.is_none(), "a Unix socket must not be redirected to a node of a cluster");
    }

    #[test]
    fn a_server_must_be_a_master_of_a_recent_version() {
        let check_hello = |version: &str, mode: &str, role: &str| {
            let fields = [("server", "redis"), ("version", version), ("mode", mode), ("role", role)];
            let hello = fields.map(|(name, value)| (name.to_owned(), Value::SimpleString(value.to_owned())));
            match parse_hello(&hello.into(), "h:1") {
                Ok(server) => Ok(server.version),
                Err(RedisConnectError::Refused { refusal, .. }) => Err(refusal),
                Err(other) => panic!("the server must be accepted or refused, not {other}"),
            }
        };
        assert_eq!(check_hello("6.2.0", "standalone", "master"), Ok("6.2.0".to_owned()));
        assert_eq!(check_hello("10.0.1", "cluster", "master"), Ok("10.0.1".to_owned()));
        assert_eq!(check_hello("unknown", "", ""), Ok("unknown".to_owned()));
        assert_eq!(check_hello("6.0.16", "standalone", "master"), Err(RedisRefusal::TooOld));
        assert_eq!(check_hello("5.9.9", "standalone", "master"), Err(RedisRefusal::TooOld));
        assert_eq!(check_hello("7.0.15", "standalone", "replica"), Err(RedisRefusal::ReadOnly));
        assert_eq!(check_hello("7.0.15", "sentinel", ""), Err(RedisRefusal::Sentinel));
    }
}
