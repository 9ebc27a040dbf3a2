//! Prepares the command that starts the Pingora proxy in `benches/compare/pingora`. It does not use TLS.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{PeerSetup, ProxyCommand};
use crate::machine;
use crate::workload::POOL_KEY;

/// Returns the program that the Makefile builds, or `None` if it was not built.
pub fn find_program() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?.join("pingora/release/beside-pingora");
    program.is_file().then_some(program)
}

/// Returns the Pingora version in the lock file of the program.
pub fn version() -> &'static str {
    let (_, after_name) =
        include_str!("../pingora/Cargo.lock").split_once("name = \"pingora-proxy\"").unwrap();
    after_name.split('"').nth(1).unwrap()
}

/// Returns the command that starts the proxy at `address`.
pub fn prepare_command(setup: &PeerSetup, address: SocketAddr, directory: &Path) -> ProxyCommand {
    let log = directory.join("access.log");
    let mut command = machine::pinned_command(setup.processors, &find_program().unwrap());
    command.args([address.to_string(), setup.upstream_address().to_string(), POOL_KEY.to_owned()]);
    command.arg(&log).arg(setup.threads.to_string());
    command.stdout(File::create(directory.join("out.log")).unwrap());
    command.stderr(File::create(directory.join("err.log")).unwrap());
    ProxyCommand { command, log }
}
