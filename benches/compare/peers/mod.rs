//! The proxies that are compared: each is given the same job, in the words of its own configuration.
//! The client's credential is taken out and the pool's key put in, connections are kept on both sides,
//! bodies stream both ways, one line is logged for a request, and one thread does the work.

mod keychoir;
mod nginx;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use memchr::memmem;

use crate::machine::{self, Running};
use crate::workload::TOKEN;

/// Who is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Nothing in between.
    Direct,
    Nginx,
    /// With its buffers, as it is installed.
    NginxBuffered,
    /// A build of ours, and what it is called.
    Keychoir(String, PathBuf),
}

/// What a proxy is started for.
#[derive(Clone, Debug)]
pub struct Scene {
    pub upstream: SocketAddr,
    /// The processors of the proxy.
    pub processors: String,
    pub threads: u32,
}

/// A proxy that answers.
#[derive(Debug)]
pub struct House {
    pub address: SocketAddr,
    pub running: Running,
    /// Its own line for each request.
    pub log: PathBuf,
}

impl Peer {
    /// All that are here, and those that are not.
    pub fn all() -> (Vec<Self>, Vec<&'static str>) {
        let mut missing = Vec::new();
        let mut peers = vec![Self::Direct];
        match machine::found("nginx") {
            Some(_) => peers.extend([Self::Nginx, Self::NginxBuffered]),
            None => missing.push("nginx"),
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
            Self::NginxBuffered => "nginx-buffered",
            Self::Keychoir(name, _) => name,
        }
    }

    /// What it says it is.
    pub fn version(&self) -> Option<String> {
        match self {
            Self::Direct | Self::NginxBuffered => None,
            Self::Nginx => Some(machine::first_line(&nginx::program(), "-v")),
            Self::Keychoir(_, path) => Some(machine::first_line(path, "--version")),
        }
    }

    /// Starts it and waits until it answers.
    pub fn start(&self, scene: &Scene, folder: &Path) -> Option<House> {
        fs::create_dir_all(folder).unwrap();
        let address = free_port();
        let prepared = match self {
            Self::Direct => return None,
            Self::Nginx => nginx::prepare(scene, address, folder, nginx::Bodies::Stream),
            Self::NginxBuffered => nginx::prepare(scene, address, folder, nginx::Bodies::AreBuffered),
            Self::Keychoir(_, program) => keychoir::prepare(scene, address, folder, program),
        };
        Some(prepared.start(self.name(), address, folder))
    }
}

impl House {
    /// Ends the measurement if there is not a line for each request, and one for the first of all.
    pub fn has_logged(&self, name: &str, requests: u64) {
        let began = Instant::now();
        loop {
            let text = fs::read(&self.log).unwrap();
            let lines =
                text.split(|byte| *byte == b'\n').filter(|line| memmem::find(line, b"/v1/").is_some());
            let lines = lines.count() as u64;
            if lines > requests {
                return;
            }
            // What is gathered before it is written has a second.
            assert!(
                began.elapsed() < Duration::from_secs(3),
                "{name}: {lines} lines for {requests} requests"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A program that is ready to be started.
struct Prepared {
    command: Command,
    log: PathBuf,
}

impl Prepared {
    fn start(mut self, name: &str, address: SocketAddr, folder: &Path) -> House {
        let (began, mut running) = (Instant::now(), Running::start(&mut self.command));
        while !answers(address) {
            if !running.is_alive() || began.elapsed() > Duration::from_secs(20) {
                panic!("{name} does not answer:\n{}", said(folder));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        House { address, running, log: self.log }
    }
}

/// An address that nobody listens at.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Whether a request with every credential that a client may send is served.
fn answers(address: SocketAddr) -> bool {
    let ask = format!(
        "GET /v1/voices/a/settings HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {TOKEN}\r\n\
         authorization: Bearer {TOKEN}\r\nconnection: close\r\n\r\n"
    );
    let Ok(mut stream) = TcpStream::connect(address) else { return false };
    stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut answer = Vec::new();
    let asked = stream.write_all(ask.as_bytes()).and_then(|()| stream.read_to_end(&mut answer));
    asked.is_ok() && answer.starts_with(b"HTTP/1.1 200")
}

/// What a program that does not answer has written into its folder.
fn said(folder: &Path) -> String {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.map(|log| fs::read_to_string(log).unwrap_or_default()).collect()
}
