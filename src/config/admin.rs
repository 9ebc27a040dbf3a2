//! Defines the section `[admin]`, parses the address for operators, and finds the admin token. Only the fingerprint of
//! the token is kept.

use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::StateDirectory;
use super::host_port::HostPort;
use super::keys::CREDENTIALS;
use super::listen::ListenAddress;
use super::problem::{Report, SourceSpan, ValueError, ValueOrigin};
use super::source::{ReadFileError, ValueSources};
use super::value_file::unreadable_file_error;
use super::variables;
use crate::secret::AdminTokenFingerprint;

/// The access to the admin API and to the status pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// The address of the admin API and of the status pages.
    pub listen: AdminListen,
    /// The file of the admin token. If it is `None`, the token is in the systemd credential `admin_token`, or in the
    /// generated file beside the usage database. `KEYCHOIR_ADMIN_TOKEN` has precedence over all files.
    pub token_file: Option<PathBuf>,
    /// The pages that may be read without a token: `status` or `metrics`.
    pub public: Vec<String>,
    /// Maximum number of event listeners.
    pub max_event_listeners: usize,
    /// The time without a request after which a session of the dashboard ends.
    pub session_idle_timeout: Duration,
    /// The time after which a session of the dashboard ends, even if it is used.
    pub max_session_duration: Duration,
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            listen: AdminListen::default(),
            token_file: None,
            public: Vec::new(),
            max_event_listeners: 32,
            session_idle_timeout: Duration::from_secs(12 * 3_600),
            max_session_duration: Duration::from_secs(7 * 24 * 3_600),
        }
    }
}

/// An address for operators, or none if the addresses of `server.listen` serve them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AdminListen(Option<ListenAddress>);

impl AdminListen {
    /// Returns the address: a TCP address or a Unix socket.
    #[must_use]
    pub fn address(&self) -> Option<&ListenAddress> {
        self.0.as_ref()
    }

    /// Returns the address, if other machines can reach it.
    pub(super) fn exposed_address(&self) -> Option<&HostPort> {
        match &self.0 {
            Some(ListenAddress::Tcp(address)) if !address.is_loopback() => Some(address),
            Some(ListenAddress::Tcp(_) | ListenAddress::Unix(_) | ListenAddress::Systemd) | None => None,
        }
    }
}

impl FromStr for AdminListen {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        match text.parse()? {
            ListenAddress::Systemd => {
                let error = ValueError::new("sockets that systemd passes are for clients");
                Err(error.advise("write HOST:PORT or unix:/PATH"))
            }
            address @ (ListenAddress::Tcp(_) | ListenAddress::Unix(_)) => Ok(Self(Some(address))),
        }
    }
}

impl fmt::Display for AdminListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |address| address.fmt(f))
    }
}

/// The names of the pages that can be public.
pub(super) const PUBLIC_PAGES: [&str; 2] = ["status", "metrics"];

/// The name of the systemd credential that contains the admin token.
const TOKEN_CREDENTIAL: &str = "admin_token";

/// Minimum number of characters in an admin token. A shorter token could be guessed.
const MIN_TOKEN_LENGTH: usize = 16;

impl AdminConfig {
    /// Returns whether `page` may be read without a token.
    #[must_use]
    pub fn is_public(&self, page: &str) -> bool {
        self.public.iter().any(|name| name == page)
    }

    /// Finds the admin token: in the environment, in the file that the setting at `span` names, in the service's
    /// credential, or else in the state directory, where the first startup generates it.
    pub(super) fn find_token(
        &self,
        directory: Option<&StateDirectory>,
        sources: &ValueSources<'_>,
        span: &SourceSpan,
        report: &mut Report,
    ) -> Option<AdminTokenFingerprint> {
        let environment = &sources.environment;
        if let Some(token) = environment.value(variables::ADMIN_TOKEN) {
            let span = SourceSpan::new(ValueOrigin::Variable(variables::ADMIN_TOKEN.to_owned()));
            return parse_token(token, &span, report);
        }
        if let Some(path) = &self.token_file {
            return match (sources.read_file)(path) {
                Ok(text) => parse_token(&text, span, report),
                Err(reason) => {
                    let error = unreadable_file_error("the file of the admin token", &reason);
                    report.problems.push(span.problem(error));
                    None
                }
            };
        }
        let credential_path =
            environment.value(CREDENTIALS).map(|directory| Path::new(directory).join(TOKEN_CREDENTIAL));
        let generated_token_path = directory.map(StateDirectory::admin_token_path);
        for path in [credential_path, generated_token_path].into_iter().flatten() {
            let span = SourceSpan::new(ValueOrigin::File(path.clone()));
            match (sources.read_file)(&path) {
                Ok(text) => return parse_token(&text, &span, report),
                Err(ReadFileError::Missing | ReadFileError::Other(ErrorKind::NotADirectory)) => {}
                Err(reason) => {
                    let message =
                        format!("the admin token cannot be read: {reason}; the admin API is disabled");
                    report.warnings.push(span.warning(message));
                    return None;
                }
            }
        }
        None
    }
}

/// Parses the content of a file or variable with the token. Reports an invalid token at `span`.
fn parse_token(text: &str, span: &SourceSpan, report: &mut Report) -> Option<AdminTokenFingerprint> {
    let token = text.trim();
    if token.len() >= MIN_TOKEN_LENGTH && token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Some(AdminTokenFingerprint::new(token));
    }
    let error = ValueError::new("this is not a valid admin token")
        .advise(format!("use at least {MIN_TOKEN_LENGTH} random letters and digits"));
    report.problems.push(span.problem(error));
    None
}
