//! The compared proxies. Each is configured for the same work: it replaces the credential of the client by the key
//! of the pool, keeps connections alive on both sides, streams bodies in both directions, logs one line per request,
//! and uses one thread.

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
use crate::workload::{KEY, TOKEN};

/// A proxy of the comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// No proxy.
    Direct,
    Nginx,
    /// nginx with larger buffers.
    NginxTuned,
    /// nginx with its default buffering.
    NginxBuffered,
    Haproxy,
    Envoy,
    Pingora,
    /// A build of Keychoir, with its label.
    Keychoir(String, PathBuf),
}

/// The setup of a proxy.
#[derive(Clone, Debug)]
pub struct Setup {
    pub upstream: Upstream,
    pub certificates: Certificates,
    pub tls_mode: TlsMode,
    /// The processors that the proxy is pinned to.
    pub processors: &'static str,
    pub threads: u32,
    /// Number of keys, for Keychoir only.
    pub keys: u32,
    pub strategy: &'static str,
    pub clients: u32,
}

/// Which of a request's two connections use TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    Plain,
    TlsToProvider,
    TlsOnBothSides,
}

impl Setup {
    /// One core, one key, one client.
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

    pub fn is_tls_to_client(&self) -> bool {
        self.tls_mode == TlsMode::TlsOnBothSides
    }

    pub fn is_tls_to_provider(&self) -> bool {
        self.tls_mode != TlsMode::Plain
    }

    /// The address of the provider.
    pub fn upstream(&self) -> SocketAddr {
        if self.is_tls_to_provider() { self.upstream.tls_address } else { self.upstream.address }
    }

    /// The address, TLS setting and key for a client. Without a proxy, the client connects to the
    /// provider as a proxy would, with the provider's key.
    pub fn target(&self, started_peer: Option<&StartedPeer>) -> Target {
        let (address, is_tls, key) = match started_peer {
            Some(started_peer) => (started_peer.address, self.is_tls_to_client(), TOKEN),
            None => (self.upstream(), self.is_tls_to_provider(), KEY),
        };
        Target { address, tls: is_tls.then(|| self.certificates.client()), key }
    }
}

/// The connection data of a client.
#[derive(Clone)]
pub struct Target {
    pub address: SocketAddr,
    pub tls: Option<Arc<ClientConfig>>,
    pub key: &'static str,
}

/// A proxy that is ready.
#[derive(Debug)]
pub struct StartedPeer {
    pub address: SocketAddr,
    pub running: PeerProcess,
    /// Its log with one line per request.
    pub log: PathBuf,
    /// From its start to its first response.
    pub ready: Duration,
}

impl Peer {
    /// All installed peers, and the names of the missing ones.
    pub fn all() -> (Vec<Self>, Vec<&'static str>) {
        let mut missing = Vec::new();
        let mut peers = vec![Self::Direct];
        match machine::find_program("nginx") {
            Some(_) => peers.extend([Self::Nginx, Self::NginxTuned, Self::NginxBuffered]),
            None => missing.push("nginx"),
        }
        match machine::find_program("haproxy") {
            Some(_) => peers.push(Self::Haproxy),
            None => missing.push("haproxy"),
        }
        match envoy::program() {
            Some(_) => peers.push(Self::Envoy),
            None => missing.push("envoy"),
        }
        match pingora::program() {
            Some(_) => peers.push(Self::Pingora),
            None => missing.push("pingora"),
        }
        peers.push(Self::Keychoir("keychoir".to_owned(), env!("CARGO_BIN_EXE_keychoir").into()));
        for path in
            std::env::var("BENCH_KEYCHOIR").unwrap_or_default().split(',').filter(|path| !path.is_empty())
        {
            let path = PathBuf::from(path);
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            peers.push(Self::Keychoir(name, path));
        }
        (peers, missing)
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

    /// Whether it supports this setup.
    pub fn supports(&self, tls_mode: TlsMode) -> bool {
        tls_mode == TlsMode::Plain || *self != Self::Pingora
    }

    /// Its version, as it prints it.
    pub fn version(&self) -> Option<String> {
        match self {
            Self::Direct | Self::NginxTuned | Self::NginxBuffered => None,
            Self::Nginx => Some(machine::first_line(&nginx::program(), "-v")),
            Self::Haproxy => Some(machine::first_line(&haproxy::program(), "-v")),
            Self::Envoy => {
                let line = machine::first_line(&envoy::program()?, "--version");
                // The text before that contains its path.
                line.split_once("version: ").map(|(_, version)| version.to_owned())
            }
            Self::Pingora => Some(pingora::version().to_owned()),
            Self::Keychoir(_, path) => Some(machine::first_line(path, "--version")),
        }
    }

    /// Starts it and waits until it responds.
    pub fn start(&self, setup: &Setup, folder: &Path) -> Option<StartedPeer> {
        fs::create_dir_all(folder).unwrap();
        let address = free_port();
        let prepared = match self {
            Self::Direct => return None,
            Self::Nginx => nginx::prepare(setup, address, folder, nginx::Bodies::Stream),
            Self::NginxTuned => nginx::prepare(setup, address, folder, nginx::Bodies::StreamInLargePieces),
            Self::NginxBuffered => nginx::prepare(setup, address, folder, nginx::Bodies::AreBuffered),
            Self::Haproxy => haproxy::prepare(setup, address, folder),
            Self::Envoy => envoy::prepare(setup, address, folder),
            Self::Pingora => pingora::prepare(setup, address, folder),
            Self::Keychoir(_, program) => keychoir::prepare(setup, address, folder, program),
        };
        Some(prepared.start(self.name(), setup, address, folder))
    }
}

impl StartedPeer {
    /// Panics unless the log has one line per request, plus those of the readiness check.
    pub fn assert_requests_are_logged(&self, name: &str, requests: u64) {
        // Some proxies also log requests before they are ready.
        const BEFORE: u64 = 100;
        let started_at = Instant::now();
        loop {
            let text = fs::read(&self.log).unwrap();
            let lines =
                text.split(|byte| *byte == b'\n').filter(|line| memmem::find(line, b"/v1/").is_some());
            let lines = lines.count() as u64;
            let median_of = format!("{name}: {lines} lines for {requests} requests");
            assert!(lines <= requests + BEFORE, "{median_of}");
            if lines > requests {
                return;
            }
            // Buffered log lines may be written a second later.
            assert!(started_at.elapsed() < Duration::from_secs(5), "{median_of}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A command that is ready to be started.
struct Prepared {
    command: Command,
    log: PathBuf,
}

impl Prepared {
    fn start(mut self, name: &str, setup: &Setup, address: SocketAddr, folder: &Path) -> StartedPeer {
        let tls = setup.is_tls_to_client().then(|| setup.certificates.client());
        let (started_at, mut running) = (Instant::now(), PeerProcess::start(&mut self.command));
        while !is_ready(address, tls.as_ref()) {
            if !running.is_alive() || started_at.elapsed() > Duration::from_secs(20) {
                panic!("{name} does not answer:\n{}", log_tail(folder));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        StartedPeer { address, running, log: self.log, ready: started_at.elapsed() }
    }
}

/// An unused address.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Whether a request with every kind of client credential is served.
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

fn is_served(mut stream: impl Read + Write) -> bool {
    let request = format!(
        "GET /v1/voices/a/settings HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n\
         authorization: Bearer {TOKEN}\r\nconnection: close\r\n\r\n"
    );
    let mut response = Vec::new();
    let sent = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_end(&mut response));
    sent.is_ok() && response.starts_with(b"HTTP/1.1 200")
}

/// The end of the log of a program that does not respond.
fn log_tail(folder: &Path) -> String {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
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
