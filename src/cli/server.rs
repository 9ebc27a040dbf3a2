//! Sends the requests of commands to a running Keychoir: for its status documents, readiness and version, and to its
//! admin API. All commands that need a running Keychoir use this module, so that they select the same address and
//! report the same errors.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use http::Method;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::admin_token::find_admin_token;
use super::{ConfigSources, fail, fail_with, load};
use crate::config::{self, BaseUrl, Config, HostPort, KeyRequirement, ListenAddress, ListenAddresses};
use crate::platform::sockets::with_unix_socket;
use crate::upstream::{TlsError, http_client_trusting};

/// The options with the address of a running Keychoir.
#[derive(Clone, Debug, Args)]
pub(super) struct ServerOptions {
    #[command(flatten)]
    sources: ConfigSources,
    /// Connect here instead of to the configured address: http://HOST:PORT, https://HOST:PORT or unix:/PATH.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// A file with a client token. By default, the admin token is used.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// A file with the admin token. By default: KEYCHOIR_ADMIN_TOKEN, then the file of admin.token_file, or else the
    /// token in the directory of the usage database.
    #[arg(long, value_name = "FILE", conflicts_with = "token_file")]
    admin_token_file: Option<PathBuf>,
}

/// The address of a running Keychoir.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ServerAddress {
    /// A base URL without a trailing slash.
    Url(String),
    Unix(PathBuf),
}

/// An HTTP client for a running Keychoir.
#[derive(Debug)]
pub(super) struct KeychoirClient {
    address: ServerAddress,
    client: reqwest::Client,
    /// The client token of `--token-file`.
    token: Option<String>,
    /// The admin token, which is sent if there is no client token.
    admin_token: Option<String>,
}

/// The reason why a request to a running Keychoir failed. The message contains advice.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServerRequestError {
    #[error("{0} is not the address of a Keychoir: write http://HOST:PORT, https://HOST:PORT or unix:/PATH")]
    InvalidUrl(String),
    #[error("the configuration names no fixed port: use --url http://HOST:PORT")]
    NoFixedPort,
    #[error("the client token cannot be read from {}: {source}", .path.display())]
    UnreadableToken { path: PathBuf, source: std::io::Error },
    #[error("{} contains no valid client token: the token is empty or not valid in a header", .0.display())]
    InvalidToken(PathBuf),
    #[error(
        "Keychoir does not respond at {address}: {reason}. Is it running (`keychoir serve`)? Use --url for another address."
    )]
    NoResponse { address: String, reason: String },
    #[error(
        "Keychoir at {0} requires a token: use --admin-token-file, KEYCHOIR_ADMIN_TOKEN, or --token-file with the token of a client"
    )]
    TokenRequired(String),
    #[error("Keychoir at {0} rejects the client token of --token-file")]
    TokenRefused(String),
    #[error("Keychoir at {0} rejects the admin token")]
    AdminTokenRefused(String),
    #[error("the server at {address} is not a Keychoir, or has a different version ({reason})")]
    NotKeychoir { address: String, reason: String },
    #[error("{0}")]
    UnixSocket(std::io::Error),
    #[error("{0}")]
    Client(#[from] reqwest::Error),
    #[error("{0}")]
    Tls(#[from] TlsError),
}

/// Timeout of a request for a status document. Keychoir serves these documents from memory, so a process that does not
/// respond in time hangs.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeout of a request to the admin API. Keychoir waits at most 10 s for a change.
const ADMIN_API_TIMEOUT: Duration = Duration::from_secs(15);

impl ServerOptions {
    /// Creates the client. If that fails, prints the error and returns the exit code: `error_code`, or another one if
    /// the configuration is invalid or the admin token cannot be read.
    pub(super) fn into_client(self, error_code: u8) -> Result<KeychoirClient, ExitCode> {
        let fail_with_code = |error: ServerRequestError| fail_with(error_code, error);
        let overrides = self.sources.into_overrides(KeyRequirement::Optional);
        let (address, config) = match &self.url {
            Some(url) => {
                // The configuration names the local CA and the admin token. An invalid configuration is ignored.
                let config = config::load(&overrides).ok().map(|loaded| loaded.config);
                (ServerAddress::parse(url), config)
            }
            None => {
                let config = load(&overrides)?.config;
                (ServerAddress::from_config(&config), Some(config))
            }
        };
        let address = address.map_err(fail_with_code)?;
        let admin_token = match self.token_file {
            Some(_) => None,
            None => {
                // The token of this machine is not sent to other machines.
                let config = config.as_ref().filter(|_| address.is_local());
                find_admin_token(self.admin_token_file.as_deref(), config).map_err(fail)?
            }
        };
        let ca_file = config.and_then(|config| config.local_ca_file());
        let client =
            KeychoirClient::new(address, self.token_file, ca_file.as_deref()).map_err(fail_with_code)?;
        Ok(KeychoirClient { admin_token, ..client })
    }
}

impl ServerAddress {
    /// Parses the value of `--url`. A text without a scheme is an address for HTTP.
    pub(super) fn parse(text: &str) -> Result<Self, ServerRequestError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let authority_and_path = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        let has_authority = authority_and_path.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
        if !has_authority || reqwest::Url::parse(&url).is_err() {
            return Err(ServerRequestError::InvalidUrl(text.to_owned()));
        }
        Ok(Self::Url(url.trim_end_matches('/').to_owned()))
    }

    /// Returns whether the address is on this machine.
    pub(super) fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Url(url) => url.parse::<BaseUrl>().is_ok_and(|url| url.is_loopback()),
        }
    }

    /// Returns whether the connection uses TLS, so that Keychoir's certificate is verified.
    pub(super) fn is_https(&self) -> bool {
        match self {
            Self::Url(url) => url.starts_with("https://"),
            Self::Unix(_) => false,
        }
    }

    /// Returns the address for operators. If there is none, returns the first configured TCP address with a fixed
    /// port, or else the first Unix socket.
    pub(super) fn from_config(config: &Config) -> Result<Self, ServerRequestError> {
        if let Some(address) = config.admin.listen.address() {
            return Self::from_listener(address).ok_or(ServerRequestError::NoFixedPort);
        }
        Self::from_client_listeners(&config.server.listen).ok_or(ServerRequestError::NoFixedPort)
    }

    /// Returns the first configured TCP address for clients with a fixed port, or else the first Unix socket. If
    /// there is neither, returns the address for operators.
    pub(super) fn for_clients(config: &Config) -> Result<Self, ServerRequestError> {
        Self::from_client_listeners(&config.server.listen).map_or_else(|| Self::from_config(config), Ok)
    }

    /// Returns the first TCP address with a fixed port, or else the first Unix socket.
    fn from_client_listeners(listen: &ListenAddresses) -> Option<Self> {
        let is_unix_socket = |address: &&ListenAddress| matches!(address, ListenAddress::Unix(_));
        let url = listen.fixed_tcp_address().map(|address| Self::Url(base_url(address)));
        url.or_else(|| listen.iter().find(is_unix_socket).and_then(Self::from_listener))
    }

    /// Returns the address of a listener, or `None` if the system or systemd chooses the address.
    fn from_listener(listener: &ListenAddress) -> Option<Self> {
        match listener {
            ListenAddress::Tcp(address) if address.port() != 0 => Some(Self::Url(base_url(address))),
            ListenAddress::Unix(path) => Some(Self::Unix(path.clone())),
            ListenAddress::Tcp(_) | ListenAddress::Systemd => None,
        }
    }
}

/// Returns the base URL of a TCP listener for clients on this machine. A wildcard address is replaced with
/// the loopback address.
pub(super) fn base_url(listen: &HostPort) -> String {
    let mut address =
        listen.socket_addresses().first().copied().unwrap_or_else(|| ([127, 0, 0, 1], listen.port()).into());
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    format!("http://{address}")
}

impl KeychoirClient {
    /// Creates a client. `ca_file` is the certificate of the local CA, which an `https` address may need.
    pub(super) fn new(
        address: ServerAddress,
        token_file: Option<PathBuf>,
        ca_file: Option<&Path>,
    ) -> Result<Self, ServerRequestError> {
        let token = token_file.map(read_token).transpose()?;
        let ca_file = ca_file.filter(|_| address.is_https());
        let builder = http_client_trusting(ca_file)?.timeout(RESPONSE_TIMEOUT);
        let client = match &address {
            ServerAddress::Url(_) => builder.build()?,
            ServerAddress::Unix(path) => {
                with_unix_socket(builder, path).map_err(ServerRequestError::UnixSocket)?.build()?
            }
        };
        Ok(Self { address, client, token, admin_token: None })
    }

    /// Creates a client without a token for the Keychoir that runs with `config`.
    pub(super) fn from_config(config: &Config) -> Result<Self, ServerRequestError> {
        Self::new(ServerAddress::from_config(config)?, None, None)
    }

    /// Formats the address for messages.
    pub(super) fn address_text(&self) -> String {
        match &self.address {
            ServerAddress::Url(url) => url.clone(),
            ServerAddress::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// Returns the URL before the path of a request.
    fn url_prefix(&self) -> &str {
        match &self.address {
            ServerAddress::Url(url) => url,
            // The host is ignored on a Unix socket.
            ServerAddress::Unix(_) => "http://localhost",
        }
    }

    /// Sends an admin API request with the admin token. Returns the status and the JSON body.
    pub(super) async fn call_admin(
        &self,
        method: Method,
        path: &str,
        token: &str,
        body: Option<Value>,
    ) -> Result<(u16, Value), ServerRequestError> {
        let mut request = self
            .client
            .request(method, format!("{}{path}", self.url_prefix()))
            .bearer_auth(token)
            .timeout(ADMIN_API_TIMEOUT);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let no_response = |error| self.no_response(&error, ADMIN_API_TIMEOUT);
        let response = request.send().await.map_err(no_response)?;
        let status = response.status().as_u16();
        let text = response.text().await.map_err(no_response)?;
        let document = serde_json::from_str(&text).map_err(|_| ServerRequestError::NotKeychoir {
            address: self.address_text(),
            reason: format!("status {status}"),
        })?;
        Ok((status, document))
    }

    /// Returns the readiness of Keychoir: `ready`, `degraded` or `unready`.
    pub(super) async fn readiness(&self) -> Result<String, ServerRequestError> {
        #[derive(Deserialize)]
        struct Readiness {
            status: String,
        }
        self.get::<Readiness>("/readyz").await.map(|(_, page)| page.status)
    }

    /// Returns the version of the running Keychoir from its metrics. Returns `None` if the metrics cannot be read, for
    /// example because they require the admin token.
    pub(super) async fn version(&self, admin_token: Option<&str>) -> Option<String> {
        const LABEL: &str = "keychoir_build_info{version=\"";
        let mut request = self.client.get(format!("{}/metrics", self.url_prefix()));
        if let Some(token) = admin_token {
            request = request.bearer_auth(token);
        }
        let page = request.send().await.ok()?.error_for_status().ok()?.text().await.ok()?;
        let (_, rest) = page.split_once(LABEL)?;
        rest.split_once('"').map(|(version, _)| version.to_owned())
    }

    /// Returns whether a Keychoir responds at the address.
    pub(super) async fn is_keychoir(&self) -> bool {
        let page = self.get::<serde_json::Map<String, Value>>("/readyz").await;
        // Another program does not send a document with these members.
        page.is_ok_and(|(_, page)| ["keys", "store", "draining"].iter().all(|name| page.contains_key(*name)))
    }

    /// Requests `path` and returns the body as text and parsed as `T`. Keychoir responds with 503 when
    /// it is not ready. Any status other than 200 and 503 is an error.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<(String, T), ServerRequestError> {
        let mut request = self.client.get(format!("{}{path}", self.url_prefix()));
        match (&self.token, &self.admin_token) {
            (Some(token), _) => request = request.header("xi-api-key", token),
            (None, Some(admin_token)) => request = request.bearer_auth(admin_token),
            (None, None) => {}
        }
        let not_keychoir =
            |reason: String| ServerRequestError::NotKeychoir { address: self.address_text(), reason };
        let no_response = |error| self.no_response(&error, RESPONSE_TIMEOUT);
        let response = request.send().await.map_err(no_response)?;
        match response.status().as_u16() {
            200 | 503 => {}
            401 if self.token.is_some() => return Err(ServerRequestError::TokenRefused(self.address_text())),
            401 | 429 if self.admin_token.is_some() => {
                return Err(ServerRequestError::AdminTokenRefused(self.address_text()));
            }
            401 => return Err(ServerRequestError::TokenRequired(self.address_text())),
            status => return Err(not_keychoir(format!("status {status}"))),
        }
        let text = response.text().await.map_err(no_response)?;
        let document = serde_json::from_str(&text).map_err(|error| not_keychoir(error.to_string()))?;
        Ok((text, document))
    }

    fn no_response(&self, error: &reqwest::Error, timeout: Duration) -> ServerRequestError {
        ServerRequestError::NoResponse {
            address: self.address_text(),
            reason: describe_cause(error, timeout),
        }
    }
}

/// Returns whether a Keychoir responds at the address `listen`.
pub(super) async fn is_keychoir_at(listen: &ListenAddress) -> bool {
    let address = match listen {
        ListenAddress::Tcp(address) => ServerAddress::Url(base_url(address)),
        ListenAddress::Unix(path) => ServerAddress::Unix(path.clone()),
        ListenAddress::Systemd => return false,
    };
    let Ok(client) = KeychoirClient::new(address, None, None) else { return false };
    client.is_keychoir().await
}

/// Describes why a request with `timeout` got no response: the timeout, or the innermost source of the error, which is
/// the most specific one.
fn describe_cause(error: &reqwest::Error, timeout: Duration) -> String {
    if error.is_timeout() {
        return format!("no response within {} s", timeout.as_secs());
    }
    let mut root: &dyn std::error::Error = error;
    while let Some(source) = root.source() {
        root = source;
    }
    root.to_string()
}

fn read_token(path: PathBuf) -> Result<String, ServerRequestError> {
    let content = fs::read_to_string(&path)
        .map_err(|source| ServerRequestError::UnreadableToken { path: path.clone(), source })?;
    let token = content.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ServerRequestError::InvalidToken(path));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_address(text: &str, expected: Option<ServerAddress>) {
        assert_eq!(ServerAddress::parse(text).ok(), expected, "{text:?} must be parsed as expected");
    }

    #[test]
    fn an_address_is_a_url_or_a_unix_socket() {
        let url = |text: &str| Some(ServerAddress::Url(text.to_owned()));
        check_address("http://127.0.0.1:11011/", url("http://127.0.0.1:11011"));
        check_address("127.0.0.1:11011", url("http://127.0.0.1:11011"));
        check_address("http://keychoir.lan/elevenlabs", url("http://keychoir.lan/elevenlabs"));
        check_address(
            "unix:/run/keychoir.sock",
            Some(ServerAddress::Unix(PathBuf::from("/run/keychoir.sock"))),
        );
        check_address("https://localhost:11011/", url("https://localhost:11011"));
        for text in ["", "http://", "ftp://x", "http:///path", "https://"] {
            check_address(text, None);
        }
    }

    #[test]
    fn a_wildcard_address_is_reached_over_loopback() {
        for (listen, expected) in [
            ("127.0.0.1:1", "http://127.0.0.1:1"),
            ("localhost:2", "http://127.0.0.1:2"),
            ("0.0.0.0:3", "http://127.0.0.1:3"),
            ("[::]:4", "http://[::1]:4"),
            ("10.0.0.1:5", "http://10.0.0.1:5"),
        ] {
            assert_eq!(base_url(&listen.parse().unwrap()), expected);
        }
    }

    #[test]
    fn the_address_comes_from_the_configuration() {
        let address = |listen: &[&str]| {
            let mut config = Config::default();
            config.server.listen = ListenAddresses::parse(listen).unwrap();
            ServerAddress::from_config(&config).ok()
        };
        let url = |text: &str| Some(ServerAddress::Url(text.to_owned()));
        assert_eq!(address(&["127.0.0.1:11011"]), url("http://127.0.0.1:11011"));
        assert_eq!(address(&["unix:/s", "127.0.0.1:0", "0.0.0.0:80"]), url("http://127.0.0.1:80"));
        assert_eq!(address(&["[::]:80"]), url("http://[::1]:80"));
        assert_eq!(address(&["127.0.0.1:0", "unix:/s"]), Some(ServerAddress::Unix(PathBuf::from("/s"))));
        assert_eq!(address(&["systemd"]), None);
    }

    #[test]
    fn the_address_for_operators_comes_first() {
        let address = |listen: &str| {
            let mut config = Config::default();
            config.admin.listen = listen.parse().unwrap();
            ServerAddress::from_config(&config).ok()
        };
        assert_eq!(address("127.0.0.1:9"), Some(ServerAddress::Url("http://127.0.0.1:9".to_owned())));
        assert_eq!(address("unix:/s"), Some(ServerAddress::Unix(PathBuf::from("/s"))));
        assert_eq!(address("127.0.0.1:0"), None);
    }

    #[test]
    fn a_health_check_requests_the_address_for_clients_first() {
        let address = |listen: &str, operators: &str| {
            let mut config = Config::default();
            config.server.listen = ListenAddresses::parse(&[listen]).unwrap();
            config.admin.listen = operators.parse().unwrap();
            ServerAddress::for_clients(&config).ok()
        };
        let url = |text: &str| Some(ServerAddress::Url(text.to_owned()));
        let socket = |path: &str| Some(ServerAddress::Unix(PathBuf::from(path)));
        assert_eq!(address("0.0.0.0:80", "127.0.0.1:9"), url("http://127.0.0.1:80"));
        assert_eq!(address("unix:/s", "127.0.0.1:9"), socket("/s"));
        assert_eq!(address("127.0.0.1:0", "127.0.0.1:9"), url("http://127.0.0.1:9"));
        assert_eq!(address("systemd", "unix:/o"), socket("/o"));
        assert_eq!(address("systemd", ""), None);
    }
}
