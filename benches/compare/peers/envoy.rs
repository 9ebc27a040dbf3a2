//! Writes the configuration of Envoy, in which optional features are disabled and no limit is ever reached, and
//! prepares the command that starts Envoy.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::{PeerSetup, ProxyCommand};
use crate::machine;
use crate::workload::POOL_KEY;

/// Returns the program that the Makefile installs, without its wrapper script, or the program in `PATH`.
pub fn find_program() -> Option<PathBuf> {
    let library_directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/compare/.venv/lib");
    let python_directories =
        fs::read_dir(library_directory).into_iter().flatten().map(|entry| entry.unwrap().path());
    let mut programs = python_directories.map(|directory| directory.join("site-packages/envoy/_bin/envoy"));
    programs.find(|path| path.is_file()).or_else(|| machine::find_program("envoy"))
}

/// Writes the configuration into `directory`, and returns the command that starts Envoy at `address`.
pub fn prepare_command(setup: &PeerSetup, address: SocketAddr, directory: &Path) -> ProxyCommand {
    let certificates = &setup.certificates;
    let client_tls = match setup.uses_tls_to_client() {
        true => format!(
            "
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            tls_params: {{tls_maximum_protocol_version: TLSv1_3}}
            tls_certificates:
            - certificate_chain: {{filename: {certificate}}}
              private_key: {{filename: {key}}}",
            certificate = certificates.certificate.display(),
            key = certificates.key.display(),
        ),
        false => String::new(),
    };
    let upstream_tls = match setup.uses_tls_to_provider() {
        true => format!(
            "
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: localhost
        common_tls_context:
          tls_params: {{tls_maximum_protocol_version: TLSv1_3}}
          validation_context:
            trusted_ca: {{filename: {ca_file}}}
            match_typed_subject_alt_names:
            - san_type: DNS
              matcher: {{exact: localhost}}",
            ca_file = certificates.ca_certificate.display(),
        ),
        false => String::new(),
    };
    let log = directory.join("access.log");
    // Optional statistics, tracing and request identifiers are disabled, and the limits are never reached.
    let config = format!(
        "static_resources:
  listeners:
  - address:
      socket_address: {{address: {host}, port_value: {port}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: clients
          codec_type: HTTP1
          generate_request_id: false
          common_http_protocol_options: {{idle_timeout: 3600s}}
          access_log:
          - name: envoy.access_loggers.file
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {log}
          http_filters:
          - name: envoy.filters.http.router
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              suppress_envoy_headers: true
              dynamic_stats: false
          route_config:
            request_headers_to_remove: [authorization, x-keychoir-token]
            request_headers_to_add:
            - header: {{key: xi-api-key, value: {POOL_KEY}}}
              append_action: OVERWRITE_IF_EXISTS_OR_ADD
            virtual_hosts:
            - name: all
              domains: [\"*\"]
              routes:
              - match: {{prefix: /}}
                route: {{cluster: provider, timeout: 0s, host_rewrite_literal: api.elevenlabs.io}}{client_tls}
  clusters:
  - name: provider
    type: STATIC
    connect_timeout: 10s
    circuit_breakers:
      thresholds:
      - {{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000}}
    load_assignment:
      cluster_name: provider
      endpoints:
      - lb_endpoints:
        - endpoint:
            address:
              socket_address: {{address: {upstream_host}, port_value: {upstream_port}}}{upstream_tls}
",
        host = address.ip(),
        port = address.port(),
        log = log.display(),
        upstream_host = setup.upstream_address().ip(),
        upstream_port = setup.upstream_address().port(),
    );
    let path = directory.join("envoy.yaml");
    fs::write(&path, config).unwrap();
    let mut command = machine::pinned_command(setup.processors, &find_program().unwrap());
    command.arg("-c").arg(path).args(["--concurrency", &setup.threads.to_string()]);
    command.args(["--disable-hot-restart", "--log-level", "error", "--file-flush-interval-msec", "1000"]);
    command.stdout(File::create(directory.join("out.log")).unwrap());
    command.stderr(File::create(directory.join("err.log")).unwrap());
    ProxyCommand { command, log }
}
