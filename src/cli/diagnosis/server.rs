//! Checks whether a Keychoir server runs with this configuration, and compares its version with the version of this
//! command.

use super::Finding;
use crate::cli::server::{ServerAddress, ServerRequestError, StatusClient};
use crate::config::Config;

/// Requests the readiness of the server at `address`, and its version with the admin token if there is one.
pub(in crate::cli) async fn examine_server(
    config: &Config,
    address: Result<ServerAddress, ServerRequestError>,
    admin_token: Option<&str>,
) -> Vec<Finding> {
    let client =
        address.and_then(|address| StatusClient::new(address, None, config.local_ca_file().as_deref()));
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
        "unready" => Finding::problem("server", message).next("run `keychoir status`"),
        _ => Finding::warning("server", message).next("run `keychoir status`"),
    }
}

/// Compares the version of the server with the version of this command.
async fn compare_version(client: &StatusClient, address: &str, admin_token: Option<&str>) -> Finding {
    const THIS: &str = env!("CARGO_PKG_VERSION");
    match client.version(admin_token).await {
        Some(version) if version == THIS => {
            Finding::ok("server", format_args!("its version is {version}, as that of this program"))
        }
        Some(version) => {
            let message = format!("its version is {version}, and this program is {THIS}");
            Finding::warning("server", message).next("restart the server, or install its version here")
        }
        None => {
            Finding::ok("server", format_args!("{address} does not tell its version without the admin token"))
        }
    }
}
