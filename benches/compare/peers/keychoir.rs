//! Keychoir with everything that it does for a request: a client's token, usage records in a file,
//! metrics, and a line in the log.

use std::fmt::Write;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;

use sha2::{Digest, Sha256};

use super::{Prepared, Scene};
use crate::machine;
use crate::workload::{KEY, TOKEN};

pub fn prepare(scene: &Scene, address: SocketAddr, folder: &Path, program: &Path) -> Prepared {
    let certificates = &scene.certificates;
    let front = match scene.is_tls_in_front() {
        true => format!(
            "tls = {{ cert = \"{}\", key = \"{}\" }}",
            certificates.certificate.display(),
            certificates.key.display()
        ),
        false => String::new(),
    };
    let base_url = match scene.is_tls_behind() {
        true => format!("https://localhost:{}", scene.upstream().port()),
        false => format!("http://{}", scene.upstream()),
    };
    let mut config = format!(
        "[server]
listen = \"{address}\"
max_connections = 20_000
{front}

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
        strategy = scene.strategy,
    );
    for key in 0..scene.keys {
        // The stand-in accepts all of them as keys of the pool.
        write!(config, "\n[[keys]]\nkey = \"{KEY}{}\"\n", number(key)).unwrap();
    }
    // In a short form, because a configuration file is limited to 1 MiB.
    config.insert_str(0, &clients(scene.clients));
    let path = folder.join("keychoir.toml");
    fs::write(&path, config).unwrap();
    let log = folder.join("keychoir.log");
    let mut command = machine::program_on(scene.processors, program);
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
