//! HAProxy, in an expert configuration.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{Prepared, Setup};
use crate::machine;
use crate::workload::KEY;

pub fn program() -> PathBuf {
    machine::find_program("haproxy").unwrap()
}

pub fn prepare(setup: &Setup, address: SocketAddr, folder: &Path) -> Prepared {
    let certificates = &setup.certificates;
    let target = match setup.is_tls_to_client() {
        true => format!(" ssl crt {}", certificates.pair.display()),
        false => String::new(),
    };
    let upstream_tls = match setup.is_tls_to_provider() {
        true => format!(
            " ssl verify required ca-file {} sni str(localhost) verifyhost localhost",
            certificates.authority.display()
        ),
        false => String::new(),
    };
    let config = format!(
        "global
    nbthread {threads}
    maxconn 12000
    # It asks for more open files than a machine may allow, and can do with fewer.
    no strict-limits
    log stdout format raw daemon

defaults
    mode http
    log global
    option httplog
    # Bodies that nobody looks at need not be copied.
    option splice-auto
    # Speech is listened to as it comes: without this, pieces wait up to a fifth of a second for more.
    option http-no-delay
    # Connections to the provider are everybody's.
    http-reuse always
    timeout connect 10s
    timeout client 1h
    timeout server 5m
    timeout http-keep-alive 1h

frontend clients
    bind {address} backlog 4096{target}
    http-request del-header authorization
    http-request del-header x-keychoir-token
    http-request set-header xi-api-key {KEY}
    http-request set-header host api.elevenlabs.io
    default_backend provider

backend provider
    # As many idle connections as there are: none is opened anew while it is measured.
    server one {upstream} pool-max-conn -1 pool-purge-delay 1h{upstream_tls}
",
        threads = setup.threads,
        upstream = setup.upstream(),
    );
    let path = folder.join("haproxy.cfg");
    fs::write(&path, config).unwrap();
    let log = folder.join("access.log");
    let mut command = machine::program_on(setup.processors, &program());
    // In the foreground, as one process.
    command.arg("-db").arg("-f").arg(path);
    command.stdout(File::create(&log).unwrap()).stderr(File::create(folder.join("err.log")).unwrap());
    Prepared { command, log }
}
