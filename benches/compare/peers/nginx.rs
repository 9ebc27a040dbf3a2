//! nginx, as somebody would set it up who knows it.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{Prepared, Scene};
use crate::machine;
use crate::workload::KEY;

/// What it does with bodies.
#[derive(Clone, Copy)]
pub enum Bodies {
    /// Passed on as they come, as an API that streams needs it.
    Stream,
    /// Read ahead of whoever is slower, as it does by itself.
    AreBuffered,
}

pub fn program() -> PathBuf {
    machine::found("nginx").unwrap()
}

pub fn prepare(scene: &Scene, address: SocketAddr, folder: &Path, bodies: Bodies) -> Prepared {
    let buffering = match bodies {
        Bodies::Stream => "off",
        Bodies::AreBuffered => "on",
    };
    // Its workers give up root's rights, and could not write into the folder.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let folder_name = folder.display();
    let Scene { upstream, threads, .. } = scene;
    let config = format!(
        "{user}
worker_processes {threads};
daemon off;
pid {folder_name}/nginx.pid;
error_log {folder_name}/error.log warn;
worker_rlimit_nofile 65536;
events {{
    worker_connections 30000;
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
        listen {address} backlog=4096;
        location / {{
            proxy_pass http://provider;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host api.elevenlabs.io;
            proxy_set_header xi-api-key {KEY};
            proxy_set_header Authorization \"\";
            proxy_set_header x-keychoir-token \"\";
            proxy_buffering {buffering};
            proxy_request_buffering {buffering};
            proxy_read_timeout 300s;
        }}
    }}
}}
"
    );
    let path = folder.join("nginx.conf");
    fs::write(&path, config).unwrap();
    let mut command = machine::program_on(&scene.processors, &program());
    command.arg("-e").arg(folder.join("error.log")).arg("-c").arg(path).arg("-p").arg(folder);
    command.stdout(File::create(folder.join("out.log")).unwrap());
    command.stderr(File::create(folder.join("err.log")).unwrap());
    Prepared { command, log: folder.join("access.log") }
}
