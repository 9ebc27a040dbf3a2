//! `keychoir healthcheck`: requests the readiness of a running Keychoir and reports it in the exit code. Container
//! runtimes and kubelets run it inside the container, because their own probes do not reach loopback or a Unix socket.
//!
//! It ignores mistakes in the configuration. A running Keychoir continues with its last valid configuration, but a
//! container that is reported as unhealthy would be restarted, and the mistake would then prevent its startup.

use std::time::Duration;

use clap::Args;
use serde::Deserialize;

use super::control::parse_duration;
use super::server::{KeychoirClient, ServerAddress, ServerRequestError};
use super::{CommandResult, ConfigSources, build_runtime, fail, print};
use crate::config::{self, KeyRequirement};
use crate::policy::quantity::duration::DisplayDuration;

/// Maximum timeout. A health check that takes longer reports too late.
const MAX_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    sources: ConfigSources,
    /// Send the request here instead of to the configured address: http://HOST:PORT, https://HOST:PORT or unix:/PATH.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Maximum time for the response.
    #[arg(long, value_name = "DURATION", default_value = "3s", value_parser = parse_timeout)]
    timeout: Duration,
}

/// The reason why Keychoir is not healthy.
#[derive(Debug, thiserror::Error)]
enum HealthError {
    #[error("no key can serve: `keychoir status` shows why")]
    NoUsableKey,
    #[error("Keychoir is shutting down")]
    Draining,
    #[error("Keychoir at {address} did not respond within {}", DisplayDuration(*.timeout))]
    Timeout { address: String, timeout: Duration },
    #[error(transparent)]
    Request(#[from] ServerRequestError),
}

/// The fields of `/readyz` that are examined.
#[derive(Debug, Deserialize)]
struct HealthReport {
    status: String,
    draining: String,
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        timeout if timeout.is_zero() || timeout > MAX_TIMEOUT => {
            Err(format!("the timeout must be more than 0s and at most {}", DisplayDuration(MAX_TIMEOUT)))
        }
        timeout => Ok(timeout),
    }
}

pub(super) fn run(arguments: Arguments) -> CommandResult {
    let runtime = build_runtime()?;
    let status = runtime.block_on(check_health(arguments)).map_err(fail)?;
    print(&status);
    Ok(())
}

/// Returns `ready` or `degraded`, in which requests are served.
async fn check_health(arguments: Arguments) -> Result<String, HealthError> {
    let Arguments { sources, url, timeout } = arguments;
    let config = config::load_ignoring_mistakes(&sources.into_overrides(KeyRequirement::Optional));
    let address = match url {
        Some(url) => ServerAddress::parse(&url)?,
        None => ServerAddress::for_clients(&config)?,
    };
    // No token is sent: the readiness is public.
    let client = KeychoirClient::new(address, None, config.local_ca_file().as_deref())?;
    let report = tokio::time::timeout(timeout, client.get::<HealthReport>("/readyz"));
    let (_, report) =
        report.await.map_err(|_| HealthError::Timeout { address: client.address_text(), timeout })??;
    match (report.status.as_str(), report.draining.as_str()) {
        ("ready" | "degraded", _) => Ok(report.status),
        (_, "yes") => Err(HealthError::Draining),
        (_, _) => Err(HealthError::NoUsableKey),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_positive_and_at_most_one_minute() {
        assert_eq!(parse_timeout("1s"), Ok(Duration::from_secs(1)));
        assert_eq!(parse_timeout("1m"), Ok(MAX_TIMEOUT));
        for text in ["0s", "61s", "3", "-1s", ""] {
            assert!(parse_timeout(text).is_err(), "{text} must be refused");
        }
    }
}
