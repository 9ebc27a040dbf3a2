//! Writes the configuration of HAProxy, which splices bodies and sends all bytes without delay, and prepares the
//! command that starts HAProxy.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{PeerSetup, ProxyCommand};
use crate::machine;
use crate::workload::POOL_KEY;

pub fn program_path() -> PathBuf {
    machine::find_program("haproxy").unwrap()
}

/// Writes the configuration into `directory`, and returns the command that starts HAProxy at `address`.
pub fn prepare_command(setup: &PeerSetup, address: SocketAddr, directory: &Path) -> ProxyCommand {
    let certificates = &setup.certificates;
    let client_tls = match setup.uses_tls_to_client() {
        true => format!(" ssl crt {}", certificates.pair.display()),
        false => String::new(),
    };
    let upstream_tls = match setup.uses_tls_to_provider() {
        true => format!(
            " ssl verify required ca-file {} sni str(localhost) verifyhost localhost",
            certificates.ca_certificate.display()
        ),
        false => String::new(),
    };
    let config = format!(
        "global
    nbthread {threads}
    maxconn 12000
    # HAProxy requests more file descriptors than the machine may allow, but works with fewer.
    no strict-limits
    log stdout format raw daemon

defaults
    mode http
    log global
    option httplog
    # Bodies are spliced instead of copied, because they are not inspected.
    option splice-auto
    # Without this option, chunks of a stream may wait up to 200 ms for more data.
    option http-no-delay
    # All clients share the connections to the provider.
    http-reuse always
    timeout connect 10s
    timeout client 1h
    timeout server 5m
    timeout http-keep-alive 1h

frontend clients
    bind {address} backlog 4096{client_tls}
    http-request del-header authorization
    http-request del-header x-keychoir-token
    http-request set-header xi-api-key {POOL_KEY}
    http-request set-header host api.elevenlabs.io
    default_backend provider

backend provider
    # The number of idle connections is unlimited, so that no connection is opened during the measurement.
    server one {upstream} pool-max-conn -1 pool-purge-delay 1h{upstream_tls}
",
        threads = setup.threads,
        upstream = setup.upstream_address(),
    );
    let path = directory.join("haproxy.cfg");
    fs::write(&path, config).unwrap();
    let log = directory.join("access.log");
    let mut command = machine::pinned_command(setup.processors, &program_path());
    // `-db` keeps HAProxy in the foreground as one process.
    command.arg("-db").arg("-f").arg(path);
    command.stdout(File::create(&log).unwrap()).stderr(File::create(directory.join("err.log")).unwrap());
    ProxyCommand { command, log }
}
