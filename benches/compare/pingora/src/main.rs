//! A proxy built with Pingora, which `cargo bench --bench compare` measures. It does the same work as the other
//! compared proxies: it replaces the client credential with the key of the pool, and logs one line per request.
//!
//! ```text
//! beside-pingora LISTEN UPSTREAM KEY LOG THREADS
//! ```

use std::fs::File;
use std::io::Write;

use async_trait::async_trait;
use pingora_core::Result;
use pingora_core::server::Server;
use pingora_core::server::configuration::ServerConf;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_http::RequestHeader;
use pingora_proxy::{ProxyHttp, Session, http_proxy_service};

/// The settings and the log of the proxy.
struct Gateway {
    /// The address of the provider.
    upstream: String,
    key: String,
    log: File,
}

#[async_trait]
impl ProxyHttp for Gateway {
    type CTX = ();

    fn new_ctx(&self) {}

    async fn upstream_peer(&self, _: &mut Session, _: &mut ()) -> Result<Box<HttpPeer>> {
        Ok(Box::new(HttpPeer::new(&self.upstream, false, String::new())))
    }

    async fn upstream_request_filter(
        &self,
        _: &mut Session,
        request: &mut RequestHeader,
        _: &mut (),
    ) -> Result<()> {
        request.remove_header("authorization");
        request.remove_header("x-keychoir-token");
        request.insert_header("xi-api-key", &self.key)?;
        request.insert_header("host", "api.elevenlabs.io")
    }

    async fn logging(&self, session: &mut Session, _: Option<&pingora_core::Error>, _: &mut ()) {
        let status = session.response_written().map_or(0, |response| response.status.as_u16());
        let line = format!("{} {status} {}\n", session.request_summary(), session.body_bytes_sent());
        // An error of the log must not fail the request.
        let _ = (&self.log).write_all(line.as_bytes());
    }
}

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [listen, upstream, key, log, threads] = arguments.as_slice() else {
        return Err(std::io::Error::other("usage: beside-pingora LISTEN UPSTREAM KEY LOG THREADS"));
    };
    let server_conf = ServerConf {
        threads: threads.parse().map_err(std::io::Error::other)?,
        // The maximum number of concurrent requests, so that no connection is opened during the measurement.
        upstream_keepalive_pool_size: 256,
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, server_conf);
    server.bootstrap();
    let gateway = Gateway { upstream: upstream.clone(), key: key.clone(), log: File::create(log)? };
    let mut service = http_proxy_service(&server.configuration, gateway);
    service.add_tcp(listen);
    server.add_service(service);
    server.run_forever()
}
