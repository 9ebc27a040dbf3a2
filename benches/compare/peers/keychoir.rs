//! Writes a Keychoir configuration with all features that a request uses (client tokens, usage records in a file,
//! metrics and the access log), and prepares the command that starts Keychoir.

use std::fmt::Write;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use sha2::{Digest, Sha256};

use super::{PeerSetup, ProxyCommand};
use crate::machine;
use crate::workload::{CLIENT_TOKEN, POOL_KEY};

/// Writes the configuration into `directory`, and returns the command that starts Keychoir at `address`.
pub fn prepare_command(
    setup: &PeerSetup,
    address: SocketAddr,
    directory: &Path,
    program: &Path,
) -> ProxyCommand {
    let certificates = &setup.certificates;
    let client_tls = match setup.uses_tls_to_client() {
        true => format!(
            "tls = {{ cert = \"{}\", key = \"{}\" }}",
            certificates.certificate.display(),
            certificates.key.display()
        ),
        false => String::new(),
    };
    let base_url = match setup.uses_tls_to_provider() {
        true => format!("https://localhost:{}", setup.upstream_address().port()),
        false => format!("http://{}", setup.upstream_address()),
    };
    let mut config = format!(
        "[server]
listen = \"{address}\"
max_connections = 20_000
{client_tls}

[upstream]
base_url = \"{base_url}\"
ca_file = \"{ca_file}\"

[pool]
strategy = \"{strategy}\"

# Polling quotas is not measured.
[quota_polling]
enabled = false

[storage]
path = \"keychoir.db\"

[log]
format = \"json\"
level = \"info\"
",
        ca_file = certificates.ca_certificate.display(),
        strategy = setup.strategy,
    );
    for key in 0..setup.keys {
        // The simulated provider accepts all keys with this prefix.
        write!(config, "\n[[keys]]\nkey = \"{POOL_KEY}{}\"\n", credential_suffix(key)).unwrap();
    }
    // The clients are written as an inline array, because a configuration file is limited to 1 MiB.
    config.insert_str(0, &clients_setting(setup.clients));
    let path = directory.join("keychoir.toml");
    fs::write(&path, config).unwrap();
    let log = directory.join("keychoir.log");
    let mut command = machine::pinned_command(setup.processors, program);
    command.args(["serve", "--config"]).arg(path).env_clear().env("HOME", directory);
    command.stdout(Stdio::null()).stderr(File::create(&log).unwrap());
    ProxyCommand { command, log }
}

/// Returns the suffix of the key or token with the index `number`. The suffix of the first one is empty.
fn credential_suffix(number: u32) -> String {
    if number == 0 { String::new() } else { format!("_{number}") }
}

/// Returns the setting `clients` with `count` clients, as an inline TOML array.
fn clients_setting(count: u32) -> String {
    let mut list = "clients = [".to_owned();
    for client in 0..count {
        write!(list, "{{name=\"a{client}\",token_sha256=\"").unwrap();
        for byte in Sha256::digest(format!("{CLIENT_TOKEN}{}", credential_suffix(client))) {
            write!(list, "{byte:02x}").unwrap();
        }
        list.push_str("\"},");
    }
    list + "]\n\n"
}
