//! Keychoir, with all that it does for a request: a client's token, books in a file, metrics, and a
//! line in the log.

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
    let fingerprint = Sha256::digest(TOKEN).iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    });
    let config = format!(
        "[server]
listen = \"{address}\"
connections_max = 20_000

[upstream]
base_url = \"http://{upstream}\"

# Whoever asks for quotas is not measured.
[watch]
enabled = false

[storage]
path = \"keychoir.db\"

[log]
format = \"json\"
level = \"info\"

[[keys]]
key = \"{KEY}\"

[[clients]]
name = \"app\"
token_sha256 = \"{fingerprint}\"
",
        upstream = scene.upstream
    );
    let path = folder.join("keychoir.toml");
    fs::write(&path, config).unwrap();
    let log = folder.join("keychoir.log");
    let mut command = machine::program_on(&scene.processors, program);
    command.args(["serve", "--config"]).arg(path).env_clear().env("HOME", folder);
    command.stdout(Stdio::null()).stderr(File::create(&log).unwrap());
    Prepared { command, log }
}
