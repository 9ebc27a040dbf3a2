//! Connects to a running Keychoir and reads its status documents. All commands use this module, so
//! that they choose the same address and report the same errors.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::de::DeserializeOwned;

use super::{ConfigSources, load};
use crate::config::{Config, HostPort, Listen, Need};
use crate::upstream::{TlsError, http_client};

/// The options with the address of a running Keychoir.
#[derive(Clone, Debug, Args)]
pub(super) struct ServerOptions {
    #[command(flatten)]
    sources: ConfigSources,
    /// Connect here instead of to the configured address: http://HOST:PORT or unix:/PATH.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// A file with a client token, if Keychoir requires one.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

/// The address of a running Keychoir: a base URL without a trailing slash, or a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ServerAddress {
    Url(String),
    Unix(PathBuf),
}

/// A connection to a running Keychoir.
#[derive(Debug)]
pub(super) struct RunningServer {
    address: ServerAddress,
    client: reqwest::Client,
    token: Option<String>,
}

/// The errors of a request to a running Keychoir. Each message contains advice.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServerRequestError {
    #[error("{0} is no address of a Keychoir: write http://HOST:PORT or unix:/PATH")]
    InvalidUrl(String),
    #[error("use http://: Keychoir serves it on the same port as https")]
    Https,
    #[error("the configuration names no fixed port: give the address with --url http://HOST:PORT")]
    NoKnownPort,
    #[error("the client token cannot be read from {}: {source}", .path.display())]
    Token { path: PathBuf, source: std::io::Error },
    #[error("{} contains no client token: it is empty or has a character that is invalid in a header", .0.display())]
    NoToken(PathBuf),
    #[error(
        "Keychoir does not answer at {address}: {reason}. Is it running (`keychoir serve`)? Another address is given with --url."
    )]
    NoResponse { address: String, reason: String },
    #[error("Keychoir at {0} requires a client token: give a file that contains one with --token-file")]
    TokenRequired(String),
    #[error("Keychoir at {0} refuses the client token of --token-file")]
    TokenUnknown(String),
    #[error("the server at {address} is no Keychoir, or one of another version ({reason})")]
    NotKeychoir { address: String, reason: String },
    #[error("{0}")]
    Client(#[from] reqwest::Error),
    #[error("{0}")]
    Tls(#[from] TlsError),
}

/// Timeout of a request. Keychoir serves these documents from memory, so a slower response means
/// that it hangs.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);

impl ServerOptions {
    /// Creates the client. If the configuration is invalid, its mistakes are printed and the exit
    /// code is returned.
    pub(super) fn client(self) -> Result<Result<RunningServer, ServerRequestError>, ExitCode> {
        let address = match &self.url {
            Some(url) => ServerAddress::parse(url),
            None => {
                let mut overrides = self.sources.overrides(false);
                overrides.keys = Need::Optional;
                ServerAddress::of(&load(&overrides)?.config)
            }
        };
        Ok(address.and_then(|address| RunningServer::connect_to(address, self.token_file)))
    }
}

impl ServerAddress {
    fn parse(text: &str) -> Result<Self, ServerRequestError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if text.starts_with("https://") {
            return Err(ServerRequestError::Https);
        }
        let url = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let is_http =
            url.strip_prefix("http://").is_some_and(|rest| !rest.is_empty() && !rest.starts_with('/'));
        if !is_http || reqwest::Url::parse(&url).is_err() {
            return Err(ServerRequestError::InvalidUrl(text.to_owned()));
        }
        Ok(Self::Url(url.trim_end_matches('/').to_owned()))
    }

    /// The first configured TCP port other than 0, or else the Unix socket.
    fn of(config: &Config) -> Result<Self, ServerRequestError> {
        let port = config.server.listen.iter().find_map(|listen| match listen {
            Listen::Port(port) if port.port() != 0 => Some(Self::Url(base_url(port))),
            Listen::Port(_) | Listen::Unix(_) | Listen::Systemd => None,
        });
        let socket = || {
            config.server.listen.iter().find_map(|listen| match listen {
                Listen::Unix(path) => Some(Self::Unix(path.clone())),
                Listen::Port(_) | Listen::Systemd => None,
            })
        };
        port.or_else(socket).ok_or(ServerRequestError::NoKnownPort)
    }
}

/// The base URL of a TCP listener over loopback, which reaches every listening address of this
/// machine.
pub(super) fn base_url(port: &HostPort) -> String {
    let mut address =
        port.socket_addresses().first().copied().unwrap_or_else(|| ([127, 0, 0, 1], port.port()).into());
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    format!("http://{address}")
}

impl RunningServer {
    fn connect_to(address: ServerAddress, token_file: Option<PathBuf>) -> Result<Self, ServerRequestError> {
        let token = token_file.map(read_token).transpose()?;
        let builder = http_client()?.timeout(RESPONSE_TIMEOUT);
        let client = match &address {
            ServerAddress::Url(_) => builder.build()?,
            ServerAddress::Unix(path) => builder.unix_socket(path.clone()).build()?,
        };
        Ok(Self { address, client, token })
    }

    /// Creates a client without a token for the Keychoir that runs with this configuration.
    pub(super) fn of(config: &Config) -> Result<Self, ServerRequestError> {
        Self::connect_to(ServerAddress::of(config)?, None)
    }

    /// The address, for messages.
    fn name(&self) -> String {
        match &self.address {
            ServerAddress::Url(url) => url.clone(),
            ServerAddress::Unix(path) => format!("unix:{}", path.display()),
        }
    }

    /// Requests `path` and returns the body as text and as `T`. Keychoir responds with 503 when it
    /// is not ready; any status other than 200 and 503 is an error.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<(String, T), ServerRequestError> {
        let base = match &self.address {
            ServerAddress::Url(url) => url,
            // The host is ignored on a Unix socket.
            ServerAddress::Unix(_) => "http://localhost",
        };
        let mut request = self.client.get(format!("{base}{path}"));
        if let Some(token) = &self.token {
            request = request.header("xi-api-key", token);
        }
        let no_response = |error: reqwest::Error| ServerRequestError::NoResponse {
            address: self.name(),
            reason: root_cause(&error),
        };
        let not_keychoir = |reason: String| ServerRequestError::NotKeychoir { address: self.name(), reason };
        let response = request.send().await.map_err(no_response)?;
        match response.status().as_u16() {
            200 | 503 => {}
            401 if self.token.is_some() => return Err(ServerRequestError::TokenUnknown(self.name())),
            401 => return Err(ServerRequestError::TokenRequired(self.name())),
            status => return Err(not_keychoir(format!("status {status}"))),
        }
        let text = response.text().await.map_err(no_response)?;
        let document = serde_json::from_str(&text).map_err(|error| not_keychoir(error.to_string()))?;
        Ok((text, document))
    }
}

/// Whether a Keychoir responds at the address `listen`.
pub(super) async fn is_keychoir_at(listen: &Listen) -> bool {
    let address = match listen {
        Listen::Port(port) => ServerAddress::Url(base_url(port)),
        Listen::Unix(path) => ServerAddress::Unix(path.clone()),
        Listen::Systemd => return false,
    };
    let Ok(server) = RunningServer::connect_to(address, None) else { return false };
    let page = server.get::<serde_json::Map<String, serde_json::Value>>("/readyz").await;
    // The document of another program has none of these members.
    page.is_ok_and(|(_, page)| ["keys", "store", "draining"].iter().all(|name| page.contains_key(*name)))
}

/// The innermost cause, which is the most specific part of the message.
fn root_cause(error: &reqwest::Error) -> String {
    if error.is_timeout() {
        return format!("no response within {} s", RESPONSE_TIMEOUT.as_secs());
    }
    let mut root: &dyn std::error::Error = error;
    while let Some(source) = root.source() {
        root = source;
    }
    root.to_string()
}

fn read_token(path: PathBuf) -> Result<String, ServerRequestError> {
    let text = fs::read_to_string(&path)
        .map_err(|source| ServerRequestError::Token { path: path.clone(), source })?;
    let token = text.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(ServerRequestError::NoToken(path));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: Option<ServerAddress>) {
        assert_eq!(ServerAddress::parse(text).ok(), expected, "{text}");
    }

    #[test]
    fn an_address_is_a_url_or_a_socket() {
        let url = |text: &str| Some(ServerAddress::Url(text.to_owned()));
        check("http://127.0.0.1:11011/", url("http://127.0.0.1:11011"));
        check("127.0.0.1:11011", url("http://127.0.0.1:11011"));
        check("http://keychoir.lan/elevenlabs", url("http://keychoir.lan/elevenlabs"));
        check("unix:/run/keychoir.sock", Some(ServerAddress::Unix(PathBuf::from("/run/keychoir.sock"))));
        for text in ["", "http://", "ftp://x", "http:///path", "https://127.0.0.1:11011"] {
            check(text, None);
        }
    }

    #[test]
    fn the_address_comes_from_the_configuration() {
        let address = |listen: &[&str]| {
            let mut config = Config::default();
            config.server.listen = crate::config::Listens::parse(listen).unwrap();
            ServerAddress::of(&config).ok()
        };
        let url = |text: &str| Some(ServerAddress::Url(text.to_owned()));
        assert_eq!(address(&["127.0.0.1:11011"]), url("http://127.0.0.1:11011"));
        assert_eq!(address(&["unix:/s", "127.0.0.1:0", "0.0.0.0:80"]), url("http://127.0.0.1:80"));
        assert_eq!(address(&["[::]:80"]), url("http://[::1]:80"));
        assert_eq!(address(&["127.0.0.1:0", "unix:/s"]), Some(ServerAddress::Unix(PathBuf::from("/s"))));
        assert_eq!(address(&["systemd"]), None);
    }
}
