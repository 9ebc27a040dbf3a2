//! Writes the nginx configuration, which keeps connections alive on both sides and buffers bodies in one of three ways,
//! and prepares the command that starts nginx.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{PeerSetup, ProxyCommand};
use crate::machine;
use crate::workload::POOL_KEY;

/// The way in which nginx buffers the bodies of requests and responses.
#[derive(Clone, Copy)]
pub enum Buffering {
    /// Bodies are streamed, as a streaming API requires.
    Streaming,
    /// Bodies are streamed with larger buffers, for large bodies and enough memory.
    LargeBuffers,
    /// Bodies are buffered completely for the slower side. This is the default of nginx.
    Full,
}

pub fn program_path() -> PathBuf {
    machine::find_program("nginx").unwrap()
}

/// Writes the configuration into `directory`, and returns the command that starts nginx at `address`.
pub fn prepare_command(
    setup: &PeerSetup,
    address: SocketAddr,
    directory: &Path,
    buffering: Buffering,
) -> ProxyCommand {
    const BUFFERING_OFF: &str = "proxy_buffering off; proxy_request_buffering off;";
    let buffer_settings = match buffering {
        Buffering::Streaming => BUFFERING_OFF.to_owned(),
        // Twice these sizes would save less than a tenth of the time.
        Buffering::LargeBuffers => {
            format!(
                "{BUFFERING_OFF} proxy_buffer_size 64k; proxy_buffers 8 64k; client_body_buffer_size 512k;"
            )
        }
        Buffering::Full => "proxy_buffering on; proxy_request_buffering on;".to_owned(),
    };
    let certificates = &setup.certificates;
    let (listen, client_tls) = match setup.uses_tls_to_client() {
        true => (
            format!("{address} ssl"),
            format!(
                "ssl_certificate {}; ssl_certificate_key {}; ssl_protocols TLSv1.3;",
                certificates.certificate.display(),
                certificates.key.display()
            ),
        ),
        false => (address.to_string(), String::new()),
    };
    let (scheme, upstream_tls) = match setup.uses_tls_to_provider() {
        true => (
            "https",
            format!(
                "proxy_ssl_verify on; proxy_ssl_trusted_certificate {}; proxy_ssl_name localhost; \
                 proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;",
                certificates.ca_certificate.display()
            ),
        ),
        false => ("http", String::new()),
    };
    // Without this setting, the workers of a root user run as another user and cannot write to the directory.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let directory_path = directory.display();
    let (upstream, threads) = (setup.upstream_address(), setup.threads);
    let config = format!(
        "{user}
worker_processes {threads};
daemon off;
pid {directory_path}/nginx.pid;
error_log {directory_path}/error.log warn;
events {{
    worker_connections 16000;
}}
http {{
    # Log lines are buffered, so that a request does not wait for a write.
    access_log {directory_path}/access.log combined buffer=64k flush=1s;
    client_body_temp_path {directory_path}/client;
    proxy_temp_path {directory_path}/proxy;
    fastcgi_temp_path {directory_path}/fastcgi;
    uwsgi_temp_path {directory_path}/uwsgi;
    scgi_temp_path {directory_path}/scgi;
    # The limits are never reached, so that no connection is opened during the measurement.
    keepalive_requests 1000000000;
    keepalive_timeout 3600s;
    keepalive_time 24h;
    client_max_body_size 0;
    tcp_nodelay on;
    upstream provider {{
        server {upstream};
        keepalive 256;
        keepalive_requests 1000000000;
        keepalive_timeout 3600s;
        keepalive_time 24h;
    }}
    server {{
        listen {listen} backlog=4096;
        {client_tls}
        location / {{
            proxy_pass {scheme}://provider;
            {upstream_tls}
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host api.elevenlabs.io;
            proxy_set_header xi-api-key {POOL_KEY};
            proxy_set_header Authorization \"\";
            proxy_set_header x-keychoir-token \"\";
            {buffer_settings}
            proxy_read_timeout 300s;
        }}
    }}
}}
"
    );
    let path = directory.join("nginx.conf");
    fs::write(&path, config).unwrap();
    let mut command = machine::pinned_command(setup.processors, &program_path());
    command.arg("-e").arg(directory.join("error.log")).arg("-c").arg(path).arg("-p").arg(directory);
    command.stdout(File::create(directory.join("out.log")).unwrap());
    command.stderr(File::create(directory.join("err.log")).unwrap());
    ProxyCommand { command, log: directory.join("access.log") }
}
