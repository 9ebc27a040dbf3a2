//! Raises the limit of open files, and determines the maximum number of client connections that this limit allows.

use std::fmt;

use tracing::debug;

use super::{open_files_limit, raise_open_files_limit};
use crate::config::Config;
use crate::policy::file_limit::{self, RequestedLimits};

/// The maximum number of client connections, as it is configured and as the limit of open files allows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimit {
    /// The limit of open files of this process.
    pub open_files: u64,
    /// The value of `server.max_connections`.
    pub configured: usize,
    /// The number of connections that the limit of open files allows, at most `configured`.
    pub allowed: usize,
}

impl ConnectionLimit {
    /// Raises the limit of open files as far as the system allows, and determines the maximum for `config`.
    #[must_use]
    pub fn determine(config: &Config) -> Self {
        let open_files = raise_open_files_limit().unwrap_or_else(|error| {
            debug!("the limit of open files cannot be raised: {error}");
            open_files_limit()
        });
        let (connections, requests) = (config.server.max_connections, config.server.max_requests);
        let idle_connections = config.upstream.max_idle_connections;
        let requested_limits = RequestedLimits { connections, requests, idle_connections };
        let allowed = file_limit::max_connections(open_files, requested_limits);
        Self { open_files, configured: connections, allowed }
    }

    /// Returns whether fewer connections are allowed than configured.
    #[must_use]
    pub fn is_reduced(&self) -> bool {
        self.allowed < self.configured
    }
}

/// Formats the warning about a reduced limit, with advice.
impl fmt::Display for ConnectionLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { open_files, configured, allowed } = self;
        write!(
            f,
            "The system allows {open_files} open files, so at most {allowed} clients can be connected instead of \
             {configured} (server.max_connections); raise the hard limit (LimitNOFILE in a unit, ulimit -Hn in a shell)"
        )
    }
}
