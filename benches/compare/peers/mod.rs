//! Configures and starts the compared proxies, and checks that they log their requests. Each of them is configured for
//! the same work: it replaces the client credential with the key of the pool, keeps connections alive on both sides,
//! streams bodies in both directions, and logs one line per request. Only `nginx-buffered` buffers bodies instead.

mod envoy;
mod haproxy;
mod keychoir;
mod nginx;
mod pingora;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memchr::memmem;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use crate::machine::{self, PeerProcess};
use crate::tls::Certificates;
use crate::upstream::Upstream;
use crate::workload::{CLIENT_TOKEN, POOL_KEY};

/// A proxy that the benchmark compares, or no proxy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The clients connect to the provider without a proxy.
    Direct,
    Nginx,
    /// nginx with larger buffers.
    NginxTuned,
    /// nginx with its default buffering.
    NginxBuffered,
    Haproxy,
    Envoy,
    Pingora,
    /// A build of Keychoir, with its name and its path.
    Keychoir(String, PathBuf),
}

/// The settings of a proxy, and the provider to which it connects.
#[derive(Clone, Debug)]
pub struct PeerSetup {
    pub upstream: Upstream,
    pub certificates: Certificates,
    pub tls_mode: TlsMode,
    /// The processors to which the proxy is pinned.
    pub processors: &'static str,
    pub threads: u32,
    /// The number of keys, for Keychoir only.
    pub keys: u32,
    /// The key selection strategy, for Keychoir only.
    pub strategy: &'static str,
    /// The number of configured clients, for Keychoir only.
    pub clients: u32,
}

/// The connections of a request that use TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    Plain,
    TlsToProvider,
    TlsOnBothSides,
}

impl PeerSetup {
    /// Returns the setup with one processor, one key and one client, without TLS.
    pub fn new(upstream: Upstream, certificates: Certificates) -> Self {
        Self {
            upstream,
            certificates,
            tls_mode: TlsMode::Plain,
            processors: "0",
            threads: 1,
            keys: 1,
            strategy: "fill-first",
            clients: 1,
        }
    }

    pub fn uses_tls_to_client(&self) -> bool {
        self.tls_mode == TlsMode::TlsOnBothSides
    }

    pub fn uses_tls_to_provider(&self) -> bool {
        self.tls_mode != TlsMode::Plain
    }

    /// Returns the address of the provider.
    pub fn upstream_address(&self) -> SocketAddr {
        if self.uses_tls_to_provider() { self.upstream.tls_address } else { self.upstream.address }
    }

    /// Returns the address, TLS setting and key for a client. Without a proxy, the client connects to the provider with
    /// the key of the pool.
    pub fn target(&self, started_peer: Option<&StartedPeer>) -> Target {
        let (address, uses_tls, key) = match started_peer {
            Some(started_peer) => (started_peer.address, self.uses_tls_to_client(), CLIENT_TOKEN),
            None => (self.upstream_address(), self.uses_tls_to_provider(), POOL_KEY),
        };
        Target { address, tls: uses_tls.then(|| self.certificates.client_config()), key }
    }
}

/// The address, TLS settings and key with which a client connects.
#[derive(Clone)]
pub struct Target {
    pub address: SocketAddr,
    pub tls: Option<Arc<ClientConfig>>,
    pub key: &'static str,
}

/// A running proxy that has sent its first response.
#[derive(Debug)]
pub struct StartedPeer {
    pub address: SocketAddr,
    pub process: PeerProcess,
    /// The log file, to which the proxy writes one line per request.
    pub log: PathBuf,
    /// The time from startup to the first response.
    pub start_duration: Duration,
}

impl Peer {
    /// Returns the direct connection, the installed proxies, this build of Keychoir, and the builds in
    /// `BENCH_KEYCHOIR`. Prints the names of the missing proxies.
    pub fn find_installed() -> Vec<Self> {
        let mut peers = vec![Self::Direct];
        let candidates: [(&str, Option<PathBuf>, &[Self]); 4] = [
            ("nginx", machine::find_program("nginx"), &[Self::Nginx, Self::NginxTuned, Self::NginxBuffered]),
            ("haproxy", machine::find_program("haproxy"), &[Self::Haproxy]),
            ("envoy", envoy::find_program(), &[Self::Envoy]),
            ("pingora", pingora::find_program(), &[Self::Pingora]),
        ];
        for (name, program, variants) in candidates {
            match program {
                Some(_) => peers.extend_from_slice(variants),
                None => println!("{name} is not installed and is skipped"),
            }
        }
        peers.push(Self::Keychoir("keychoir".to_owned(), env!("CARGO_BIN_EXE_keychoir").into()));
        for path in
            std::env::var("BENCH_KEYCHOIR").unwrap_or_default().split(',').filter(|path| !path.is_empty())
        {
            let path = PathBuf::from(path);
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            peers.push(Self::Keychoir(name, path));
        }
        peers
    }

    pub fn name(&self) -> &str {
        match self {
            Self::Direct => "direct",
            Self::Nginx => "nginx",
            Self::NginxTuned => "nginx-tuned",
            Self::NginxBuffered => "nginx-buffered",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
            Self::Pingora => "pingora",
            Self::Keychoir(name, _) => name,
        }
    }

    /// Returns whether the configuration of this peer supports the TLS mode.
    pub fn supports(&self, tls_mode: TlsMode) -> bool {
        tls_mode == TlsMode::Plain || *self != Self::Pingora
    }

    /// Returns the version as the program prints it. Returns `None` for the direct connection and for the variants of
    /// nginx.
    pub fn version(&self) -> Option<String> {
        match self {
            Self::Direct | Self::NginxTuned | Self::NginxBuffered => None,
            Self::Nginx => Some(machine::first_output_line(&nginx::program_path(), "-v")),
            Self::Haproxy => Some(machine::first_output_line(&haproxy::program_path(), "-v")),
            Self::Envoy => {
                let line = machine::first_output_line(&envoy::find_program()?, "--version");
                // The text before the version contains the path of the program.
                line.split_once("version: ").map(|(_, version)| version.to_owned())
            }
            Self::Pingora => Some(pingora::version().to_owned()),
            Self::Keychoir(_, path) => Some(machine::first_output_line(path, "--version")),
        }
    }

    /// Starts the proxy and waits until it responds. Returns `None` for [`Peer::Direct`].
    pub fn start(&self, setup: &PeerSetup, directory: &Path) -> Option<StartedPeer> {
        fs::create_dir_all(directory).unwrap();
        let address = unused_address();
        let command = match self {
            Self::Direct => return None,
            Self::Nginx => nginx::prepare_command(setup, address, directory, nginx::Buffering::Streaming),
            Self::NginxTuned => {
                nginx::prepare_command(setup, address, directory, nginx::Buffering::LargeBuffers)
            }
            Self::NginxBuffered => nginx::prepare_command(setup, address, directory, nginx::Buffering::Full),
            Self::Haproxy => haproxy::prepare_command(setup, address, directory),
            Self::Envoy => envoy::prepare_command(setup, address, directory),
            Self::Pingora => pingora::prepare_command(setup, address, directory),
            Self::Keychoir(_, program) => keychoir::prepare_command(setup, address, directory, program),
        };
        Some(command.start(self.name(), setup, address, directory))
    }
}

impl StartedPeer {
    /// Panics unless the log has one line for each of the `requests`, in addition to those of the readiness checks.
    pub fn assert_requests_are_logged(&self, name: &str, requests: u64) {
        // One readiness check succeeds. Some proxies also log the failed checks before it.
        const MAX_READINESS_CHECKS: u64 = 100;
        let started_at = Instant::now();
        loop {
            let text = fs::read(&self.log).unwrap();
            let lines =
                text.split(|byte| *byte == b'\n').filter(|line| memmem::find(line, b"/v1/").is_some());
            let lines = lines.count() as u64;
            let message = format!("{name} must log each request once: {lines} lines for {requests} requests");
            assert!(lines <= requests + MAX_READINESS_CHECKS, "{message}");
            if lines > requests {
                return;
            }
            // Buffered log lines may be written a second later.
            assert!(started_at.elapsed() < Duration::from_secs(5), "{message}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The command that starts a proxy, and the log file of the proxy.
struct ProxyCommand {
    command: Command,
    log: PathBuf,
}

impl ProxyCommand {
    fn start(mut self, name: &str, setup: &PeerSetup, address: SocketAddr, directory: &Path) -> StartedPeer {
        let tls = setup.uses_tls_to_client().then(|| setup.certificates.client_config());
        let (started_at, mut process) = (Instant::now(), PeerProcess::start(&mut self.command));
        while !is_ready(address, tls.as_ref()) {
            if !process.is_running() || started_at.elapsed() > Duration::from_secs(20) {
                panic!("{name} does not respond:\n{}", log_tail(directory));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        StartedPeer { address, process, log: self.log, start_duration: started_at.elapsed() }
    }
}

/// Returns a loopback address with an unused port.
fn unused_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Returns whether the proxy at `address` serves a request with a client credential in two headers.
fn is_ready(address: SocketAddr, tls: Option<&Arc<ClientConfig>>) -> bool {
    let Ok(tcp) = TcpStream::connect(address) else { return false };
    tcp.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    match tls {
        None => is_served(tcp),
        Some(config) => {
            let name = "localhost".try_into().unwrap();
            is_served(StreamOwned::new(ClientConnection::new(Arc::clone(config), name).unwrap(), tcp))
        }
    }
}

/// Returns whether a request on this connection gets the status 200.
fn is_served(mut stream: impl Read + Write) -> bool {
    let request = format!(
        "GET /v1/voices/a/settings HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {CLIENT_TOKEN}\r\n\
         authorization: Bearer {CLIENT_TOKEN}\r\nconnection: close\r\n\r\n"
    );
    let mut response = Vec::new();
    let exchange = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_end(&mut response));
    exchange.is_ok() && response.starts_with(b"HTTP/1.1 200")
}

/// Returns the last lines of each log in a directory.
fn log_tail(directory: &Path) -> String {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    let mut log_tail = String::new();
    for log in logs {
        let text = fs::read_to_string(&log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(3)..] {
            log_tail += &format!("{}: {line}\n", log.file_name().unwrap().display());
        }
    }
    log_tail
}
