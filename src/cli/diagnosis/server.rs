//! Examines for `keychoir doctor` whether a Keychoir responds at the configured address, whether it is ready, and
//! whether it has the same version as this program.

use super::Finding;
use crate::cli::server::{KeychoirClient, ServerAddress, ServerRequestError};
use crate::config::Config;

/// Requests the readiness and the version of the Keychoir at `address`, the version with the admin token if there is
/// one.
pub(in crate::cli) async fn examine_server(
    config: &Config,
    address: Result<ServerAddress, ServerRequestError>,
    admin_token: Option<&str>,
) -> Vec<Finding> {
    let client =
        address.and_then(|address| KeychoirClient::new(address, None, config.local_ca_file().as_deref()));
    let client = match client {
        Ok(client) => client,
        Err(error) => return vec![Finding::warning("server", error)],
    };
    let address = client.address_text();
    match client.readiness().await {
        Ok(status) => {
            vec![describe_readiness(&address, &status), compare_version(&client, &address, admin_token).await]
        }
        Err(error) => vec![Finding::warning("server", error)],
    }
}

fn describe_readiness(address: &str, status: &str) -> Finding {
    let message = format!("a Keychoir responds at {address} and is {status}");
    match status {
        "ready" => Finding::ok("server", message),
        "unready" => Finding::problem("server", message).with_next_step("run `keychoir status`"),
        _ => Finding::warning("server", message).with_next_step("run `keychoir status`"),
    }
}

/// Compares the version of the running Keychoir with the version of this program.
async fn compare_version(client: &KeychoirClient, address: &str, admin_token: Option<&str>) -> Finding {
    const OWN_VERSION: &str = env!("CARGO_PKG_VERSION");
    match client.version(admin_token).await {
        Some(version) if version == OWN_VERSION => {
            Finding::ok("server", format_args!("its version is {version}, as that of this program"))
        }
        Some(version) => {
            let message = format!("its version is {version}, and this program is {OWN_VERSION}");
            Finding::warning("server", message)
                .with_next_step("restart the server, or install its version here")
        }
        None => Finding::ok(
            "server",
            format_args!("{address} does not report its version without the admin token"),
        ),
    }
}
