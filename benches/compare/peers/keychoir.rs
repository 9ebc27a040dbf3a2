//! Keychoir with everything that it does for a request: a client's token, usage records in a file,
//! metrics, and a line in the log.

use std::fmt::Write;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use sha2::{Digest, Sha256};

use super::{Prepared, Setup};
use crate::machine;
use crate::workload::{KEY, TOKEN};

pub fn prepare(setup: &Setup, address: SocketAddr, folder: &Path, program: &Path) -> Prepared {
    let certificates = &setup.certificates;
    let target = match setup.is_tls_to_client() {
        true => format!(
            "tls = {{ cert = \"{}\", key = \"{}\" }}",
            certificates.certificate.display(),
            certificates.key.display()
        ),
        false => String::new(),
    };
    let base_url = match setup.is_tls_to_provider() {
        true => format!("https://localhost:{}", setup.upstream().port()),
        false => format!("http://{}", setup.upstream()),
    };
    let mut config = format!(
        "[server]
listen = \"{address}\"
max_connections = 20_000
{target}

[upstream]
base_url = \"{base_url}\"
ca_file = \"{authority}\"

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
        authority = certificates.authority.display(),
        strategy = setup.strategy,
    );
    for key in 0..setup.keys {
        // The stand-in accepts all of them as keys of the pool.
        write!(config, "\n[[keys]]\nkey = \"{KEY}{}\"\n", number(key)).unwrap();
    }
    // In a short form, because a configuration file is limited to 1 MiB.
    config.insert_str(0, &clients(setup.clients));
    let path = folder.join("keychoir.toml");
    fs::write(&path, config).unwrap();
    let log = folder.join("keychoir.log");
    let mut command = machine::program_on(setup.processors, program);
    command.args(["serve", "--config"]).arg(path).env_clear().env("HOME", folder);
    command.stdout(Stdio::null()).stderr(File::create(&log).unwrap());
    Prepared { command, log }
}

/// The suffix of a key or token; empty for the first.
fn number(number: u32) -> String {
    if number == 0 { String::new() } else { format!("_{number}") }
}

/// The list of clients in TOML.
fn clients(count: u32) -> String {
    let mut list = "clients = [".to_owned();
    for client in 0..count {
        write!(list, "{{name=\"a{client}\",token_sha256=\"").unwrap();
        for byte in Sha256::digest(format!("{TOKEN}{}", number(client))) {
            write!(list, "{byte:02x}").unwrap();
        }
        list.push_str("\"},");
    }
    list + "]\n\n"
}
