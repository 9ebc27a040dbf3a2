//! nginx, in an expert configuration.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{Prepared, Setup};
use crate::machine;
use crate::workload::KEY;

/// The buffering of bodies.
#[derive(Clone, Copy)]
pub enum Bodies {
    /// Streamed, as a streaming API requires.
    Stream,
    /// Streamed in larger pieces, for setups with large bodies and enough memory.
    StreamInLargePieces,
    /// Buffered ahead of the slower side, which is the default.
    AreBuffered,
}

pub fn program() -> PathBuf {
    machine::find_program("nginx").unwrap()
}

pub fn prepare(setup: &Setup, address: SocketAddr, folder: &Path, bodies: Bodies) -> Prepared {
    const OFF: &str = "proxy_buffering off; proxy_request_buffering off;";
    let buffers = match bodies {
        Bodies::Stream => OFF.to_owned(),
        // Doubling these sizes gains less than a tenth.
        Bodies::StreamInLargePieces => {
            format!("{OFF} proxy_buffer_size 64k; proxy_buffers 8 64k; client_body_buffer_size 512k;")
        }
        Bodies::AreBuffered => "proxy_buffering on; proxy_request_buffering on;".to_owned(),
    };
    let certificates = &setup.certificates;
    let (listen, target) = match setup.is_tls_to_client() {
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
    let (scheme, upstream_tls) = match setup.is_tls_to_provider() {
        true => (
            "https",
            format!(
                "proxy_ssl_verify on; proxy_ssl_trusted_certificate {}; proxy_ssl_name localhost; \
                 proxy_ssl_server_name on; proxy_ssl_protocols TLSv1.3;",
                certificates.authority.display()
            ),
        ),
        false => ("http", String::new()),
    };
    // Its workers drop root's rights, and could not write into the folder.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let folder_name = folder.display();
    let (upstream, threads) = (setup.upstream(), setup.threads);
    let config = format!(
        "{user}
worker_processes {threads};
daemon off;
pid {folder_name}/nginx.pid;
error_log {folder_name}/error.log warn;
events {{
    worker_connections 16000;
}}
http {{
    # Lines are gathered, so that a request does not wait for a write.
    access_log {folder_name}/access.log combined buffer=64k flush=1s;
    client_body_temp_path {folder_name}/client;
    proxy_temp_path {folder_name}/proxy;
    fastcgi_temp_path {folder_name}/fastcgi;
    uwsgi_temp_path {folder_name}/uwsgi;
    scgi_temp_path {folder_name}/scgi;
    # Without a bound of requests, or connections would be opened anew while it is measured.
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
        {target}
        location / {{
            proxy_pass {scheme}://provider;
            {upstream_tls}
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host api.elevenlabs.io;
            proxy_set_header xi-api-key {KEY};
            proxy_set_header Authorization \"\";
            proxy_set_header x-keychoir-token \"\";
            {buffers}
            proxy_read_timeout 300s;
        }}
    }}
}}
"
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, config).unwrap();
    let mut command = machine::program_on(setup.processors, &program());
    command.arg("-e").arg(folder.join("error.log")).arg("-c").arg(path).arg("-p").arg(folder);
    command.stdout(File::create(folder.join("out.log")).unwrap());
    command.stderr(File::create(folder.join("err.log")).unwrap());
    Prepared { command, log: folder.join("access.log") }
}
