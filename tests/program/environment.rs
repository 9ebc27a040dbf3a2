//! Starts Keychoir with a configuration file in a temporary directory, in front of a simulator, and sends requests to
//! it: single requests, continuous traffic, and requests on a connection that stays open.

#![allow(unreachable_pub, reason = "other modules of this test target use the items")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use keychoir::simulator::{Plan, Simulator};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

use crate::support::SPEECH_PATH;
use crate::support::program::{Program, keychoir_command};

pub use crate::support::{FIRST_KEY, SECOND_KEY, THIRD_KEY};

/// The timeout of a step of a test. It is much longer than any step takes.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(30);

/// The files and the settings of a program: a directory with a configuration file, and the base URL of the upstream.
pub struct ProgramEnvironment {
    directory: TempDir,
    upstream: String,
}

impl ProgramEnvironment {
    pub fn new(upstream: &str) -> Self {
        Self { directory: tempfile::tempdir().unwrap(), upstream: upstream.to_owned() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces the configuration with one that contains `keys` and `other_settings`, both in TOML.
    pub fn configure(&self, keys: &[&str], other_settings: &str) {
        let keys: Vec<String> = keys.iter().map(|key| format!("[[keys]]\nkey = \"{key}\"\n")).collect();
        fs::write(self.path("new"), format!("{other_settings}\n{}", keys.concat())).unwrap();
        fs::rename(self.path("new"), self.path("keychoir.toml")).unwrap();
    }

    /// Returns a command that runs `keychoir serve` with further arguments. Keychoir rereads its files only on a
    /// signal.
    pub fn command(&self, more_arguments: &[&str]) -> Command {
        let config = self.path("keychoir.toml");
        let mut command =
            keychoir_command(&[&["serve", "--config", config.to_str().unwrap()], more_arguments].concat());
        self.set_environment(&mut command);
        command
    }

    pub fn set_environment(&self, command: &mut Command) {
        command
            .env("KEYCHOIR_STORAGE__PATH", self.path("keychoir.db"))
            .env("KEYCHOIR_UPSTREAM__BASE_URL", &self.upstream)
            .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "0s")
            .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
            .env("KEYCHOIR_LOG__FORMAT", "json");
    }

    /// Starts Keychoir. Returns it and its address.
    pub fn start(&self) -> (Program, String) {
        let mut program = Program::start(&mut self.command(&["--listen", "127.0.0.1:0"]));
        let address = program.wait_for_address();
        (program, address)
    }

    /// Returns a command that starts Keychoir with a listening socket as descriptor 3, like systemd.
    pub fn command_with_passed_socket(&self, socket: OwnedFd) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$; export LISTEN_PID; exec \"$0\" \"$@\""])
            .args([env!("CARGO_BIN_EXE_keychoir"), "serve", "--config"])
            .arg(self.path("keychoir.toml"))
            .env_clear()
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDNAMES", "keychoir")
            .stdin(Stdio::from(socket));
        self.set_environment(&mut command);
        command
    }
}

/// Starts a simulator whose keys have more credits than any test uses.
pub async fn start_simulator(keys: &[&str]) -> Simulator {
    let plan = Plan::with_keys(keys.iter().map(|key| (*key, 1_000_000)));
    Simulator::start(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap(), plan).await.unwrap()
}

/// Returns the number of requests that the provider received with `key`.
pub fn request_count(simulator: &Simulator, key: &str) -> usize {
    let ledger = simulator.ledger();
    ledger.requests.iter().filter(|request| request.key.as_deref() == Some(key)).count()
}

pub fn new_client() -> reqwest::Client {
    keychoir::upstream::http_client().unwrap().build().unwrap()
}

/// Requests speech, and returns the status of the response.
pub async fn request_speech(client: &reqwest::Client, address: &str) -> reqwest::StatusCode {
    let body = serde_json::json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
    let response = client.post(format!("http://{address}{SPEECH_PATH}")).json(&body).send().await.unwrap();
    let status = response.status();
    response.bytes().await.unwrap();
    status
}

/// Clients that send requests in sequence until they are stopped. Each response must have the status 200.
pub struct Traffic {
    stop: Arc<AtomicBool>,
    response_count: watch::Receiver<u64>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Traffic {
    pub fn start(count: usize, address: &str, client: &reqwest::Client) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, response_count) = watch::channel(0);
        let sender = Arc::new(sender);
        let send_until_stopped = || {
            let (stop, sender, client) = (Arc::clone(&stop), Arc::clone(&sender), client.clone());
            let address = address.to_owned();
            async move {
                while !stop.load(Ordering::Acquire) {
                    assert_eq!(request_speech(&client, &address).await, 200);
                    sender.send_modify(|count| *count += 1);
                }
            }
        };
        let tasks = keychoir::tasks::Tasks::new();
        let clients = (0..count).map(|_| tasks.spawn(send_until_stopped())).collect();
        Self { stop, response_count, clients }
    }

    /// Waits for `count` further responses.
    pub async fn wait_for_responses(&mut self, count: u64) {
        let target = *self.response_count.borrow() + count;
        let expected_responses = self.response_count.wait_for(|&received_count| received_count >= target);
        tokio::time::timeout(STEP_TIMEOUT, expected_responses).await.unwrap().unwrap();
    }

    /// Stops the clients. Panics if a request of a client has failed.
    pub async fn stop(self) {
        self.stop.store(true, Ordering::Release);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

/// Reads the head of a message. Returns its lines in lower case.
pub fn read_head(reader: &mut impl BufRead) -> Vec<String> {
    let lines = reader.by_ref().lines().map(|line| line.unwrap().to_lowercase());
    lines.take_while(|line| !line.is_empty()).collect()
}

/// A connection of a client, which stays open after a response.
pub struct KeepAliveConnection(pub BufReader<TcpStream>);

impl KeepAliveConnection {
    pub fn open(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(STEP_TIMEOUT)).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn send(&mut self, path: &str) {
        write!(self.0.get_mut(), "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    }

    /// Sends a request. Returns the head and the body of the response.
    pub fn request(&mut self, path: &str) -> (Vec<String>, String) {
        self.send(path);
        self.receive()
    }

    pub fn receive(&mut self) -> (Vec<String>, String) {
        let head = read_head(&mut self.0);
        let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        self.0.read_exact(&mut body).unwrap();
        (head, String::from_utf8(body).unwrap())
    }

    #[track_caller]
    pub fn assert_closed(mut self) {
        assert_eq!(self.0.read(&mut [0]).unwrap(), 0, "the connection must be closed");
    }
}

#[track_caller]
pub fn assert_head_contains(head: &[String], lines: &[&str]) {
    for line in lines {
        assert!(head.iter().any(|head_line| head_line.starts_with(line)), "{line:?} must be in {head:#?}");
    }
}

/// Returns the actions in the document of `GET changes`, the earliest first.
pub fn recorded_actions(changes: &Value) -> Vec<&str> {
    let changes = changes["changes"].as_array().unwrap();
    changes.iter().rev().map(|change| change["action"].as_str().unwrap()).collect()
}
