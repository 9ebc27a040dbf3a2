//! Pingora, as the small program in `benches/compare/pingora`, without TLS.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{Prepared, Setup};
use crate::machine;
use crate::workload::KEY;

/// The program that the Makefile builds.
pub fn program() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?.join("pingora/release/beside-pingora");
    program.is_file().then_some(program)
}

/// The version in its lock file.
pub fn version() -> &'static str {
    let (_, rest) = include_str!("../pingora/Cargo.lock").split_once("name = \"pingora-proxy\"").unwrap();
    rest.split('"').nth(1).unwrap()
}

pub fn prepare(setup: &Setup, address: SocketAddr, folder: &Path) -> Prepared {
    let log = folder.join("access.log");
    let mut command = machine::program_on(setup.processors, &program().unwrap());
    command.args([address.to_string(), setup.upstream().to_string(), KEY.to_owned()]);
    command.arg(&log).arg(setup.threads.to_string());
    command.stdout(File::create(folder.join("out.log")).unwrap());
    command.stderr(File::create(folder.join("err.log")).unwrap());
    Prepared { command, log }
}
