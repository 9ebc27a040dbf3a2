//! Starts real Redis servers in temporary directories: single servers, a Redis Cluster, and a master with sentinels.
//! They are killed on drop. Tests can pause, restart and query a server, and receive the commands that it executes.
//!
//! Each server has a Unix socket and a TCP port. The tests themselves use the Unix socket as the user `default`.

mod cluster;
mod sentinels;

pub use cluster::RedisCluster;
pub use sentinels::Sentinels;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use redis::{Connection, ConnectionLike, FromRedisValue, Value};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::POLL_INTERVAL;

/// The user and the password of the programs under test, if the server requires them.
pub const USER: &str = "keychoir";
pub const PASSWORD: &str = "redis-password-canary-91d2";
/// The password of the user `default` of a server that requires authentication.
const ADMIN_PASSWORD: &str = "redis-admin-password-canary-5e0c";

/// The maximum time until a server accepts connections, or until a cluster or the sentinels know all servers.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The maximum time of a command that a test sends.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
/// The ports of the servers. The system assigns ports from 32,768 on to clients and to listeners with port 0, so that
/// clients and such listeners never take a port of this range.
const PORTS: std::ops::Range<u16> = 20_000..32_000;
/// The maximum number of ports that are tried for a server. Only other servers of the tests use ports of the range.
const MAX_START_ATTEMPTS: usize = 50;

/// The authentication that a server requires before the first command.
#[derive(Clone, Debug, Default)]
pub enum RedisAuth {
    /// No authentication.
    #[default]
    Open,
    /// [`PASSWORD`], without a user.
    Password,
    /// [`USER`] and [`PASSWORD`]. The user has these rules, such as `~{keychoir:* +eval`.
    AclUser(String),
}

/// The settings of a server. By default it requires no authentication and no TLS.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    pub auth: RedisAuth,
    /// Whether the TCP port requires TLS. The certificate is valid for `localhost`.
    pub requires_tls: bool,
    /// Further lines of the configuration file.
    pub config: String,
}

/// A running `redis-server`. It keeps no data on the disk, so that a restart loses everything.
pub struct RedisServer {
    process: ServerProcess,
    options: RedisOptions,
    directory: TempDir,
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::start_with(RedisOptions::default()).await
    }

    pub async fn start_with(options: RedisOptions) -> Self {
        let directory = tempfile::tempdir().unwrap();
        if options.requires_tls {
            let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            fs::write(directory.path().join("ca.pem"), certified.cert.pem()).unwrap();
            fs::write(directory.path().join("key.pem"), certified.signing_key.serialize_pem()).unwrap();
        }
        fs::write(directory.path().join("redis.conf"), config_file(&options, directory.path())).unwrap();
        let process = ServerProcess::start("redis-server", directory.path(), options.requires_tls, || {
            connect(&admin_url(&options, directory.path())).is_some()
        })
        .await;
        Self { process, options, directory }
    }

    pub fn port(&self) -> u16 {
        self.process.port
    }

    /// Returns the URL of the TCP port, with the credentials and the scheme that it requires.
    pub fn url(&self) -> String {
        let credentials = match &self.options.auth {
            RedisAuth::Open => String::new(),
            RedisAuth::Password => format!(":{PASSWORD}@"),
            RedisAuth::AclUser(_) => format!("{USER}:{PASSWORD}@"),
        };
        let scheme = if self.options.requires_tls { "rediss" } else { "redis" };
        let host = if self.options.requires_tls { "localhost" } else { "127.0.0.1" };
        format!("{scheme}://{credentials}{host}:{}", self.process.port)
    }

    pub fn socket_path(&self) -> PathBuf {
        socket_path(self.directory.path())
    }

    /// Returns the URL of the Unix socket, with the credentials that it requires.
    pub fn unix_url(&self) -> String {
        let credentials = match &self.options.auth {
            RedisAuth::Open => String::new(),
            RedisAuth::Password => format!("?pass={PASSWORD}"),
            RedisAuth::AclUser(_) => format!("?user={USER}&pass={PASSWORD}"),
        };
        format!("unix:{}{credentials}", self.socket_path().display())
    }

    /// Returns the path of the certificate that clients must trust. It exists if the server requires TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Kills the server (SIGKILL) and waits for its end.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Kills the server, and starts it again on the same port without its data.
    pub async fn restart(&mut self) {
        let (options, directory) = (&self.options, self.directory.path());
        self.process.restart(|| connect(&admin_url(options, directory)).is_some()).await;
    }

    /// Stops the server (SIGSTOP). Connections to it stay open, and it responds to no command.
    pub fn pause(&self) {
        self.process.send_signal(Signal::STOP);
    }

    /// Continues a server (SIGCONT) after [`pause`](Self::pause).
    pub fn resume(&self) {
        self.process.send_signal(Signal::CONT);
    }

    /// Deletes all data (FLUSHALL).
    pub fn flush(&self) {
        self.command::<()>(&["FLUSHALL"]);
    }

    /// Runs a command as the user `default`.
    #[track_caller]
    pub fn command<T: FromRedisValue>(&self, words: &[&str]) -> T {
        query(&mut self.connect(), words)
    }

    /// Returns the number of commands that the server has executed. Commands within scripts count as well, and so
    /// does each call of this function.
    pub fn commands_processed(&self) -> u64 {
        self.info("stats", "total_commands_processed").unwrap().parse().unwrap()
    }

    /// Returns the number of executions of a command such as `eval`, including executions within scripts.
    pub fn calls(&self, command: &str) -> u64 {
        let Some(statistics) = self.info("commandstats", &format!("cmdstat_{command}")) else { return 0 };
        statistics.strip_prefix("calls=").unwrap().split(',').next().unwrap().parse().unwrap()
    }

    /// Returns a field of a section of INFO, or `None` if the section does not contain the field.
    pub fn info(&self, section: &str, field: &str) -> Option<String> {
        info_field(&self.command::<String>(&["INFO", section]), field)
    }

    /// Starts to record all commands.
    pub fn monitor(&self) -> Monitor<'_> {
        let mut connection = self.connect();
        connection.send_packed_command(&redis::cmd("MONITOR").get_packed_command()).unwrap();
        assert_eq!(connection.recv_response().unwrap(), Value::Okay, "MONITOR must be accepted");
        Monitor { server: self, connection, marker_count: 0 }
    }

    fn connect(&self) -> Connection {
        let url = admin_url(&self.options, self.directory.path());
        connect(&url).unwrap_or_else(|| panic!("the server must accept a connection: {}", self.process.log()))
    }
}

/// Receives the commands that a server executes.
pub struct Monitor<'a> {
    server: &'a RedisServer,
    connection: Connection,
    marker_count: usize,
}

impl Monitor<'_> {
    /// Returns the text of all commands since the last call, one per line, up to those that were executed before
    /// this call. Commands within scripts are included. The server hides the arguments of AUTH.
    pub fn read_commands(&mut self) -> String {
        self.marker_count += 1;
        let marker = format!("end-of-commands-{}", self.marker_count);
        self.server.command::<()>(&["ECHO", &marker]);
        let mut commands = String::new();
        loop {
            let Value::SimpleString(line) = self.connection.recv_response().unwrap() else {
                panic!("MONITOR must send lines");
            };
            if line.contains(&marker) {
                return commands;
            }
            commands.push_str(&line);
            commands.push('\n');
        }
    }
}

/// A server process that listens on a port of [`PORTS`]. It is killed on drop.
struct ServerProcess {
    program: &'static str,
    directory: PathBuf,
    requires_tls: bool,
    port: u16,
    child: Child,
}

impl ServerProcess {
    /// Starts `program` with `redis.conf` in `directory`, on the first tried port that is free. Waits for `is_ready`.
    async fn start(
        program: &'static str,
        directory: &Path,
        requires_tls: bool,
        is_ready: impl Fn() -> bool,
    ) -> Self {
        for _ in 0..MAX_START_ATTEMPTS {
            let port = fastrand::u16(PORTS);
            let child = spawn(program, directory, requires_tls, port);
            let mut process = Self { program, directory: directory.to_owned(), requires_tls, port, child };
            if process.wait_until_ready(&is_ready).await {
                return process;
            }
        }
        panic!("{program} must find a free port in {MAX_START_ATTEMPTS} attempts");
    }

    async fn restart(&mut self, is_ready: impl Fn() -> bool) {
        self.kill();
        self.child = spawn(self.program, &self.directory, self.requires_tls, self.port);
        assert!(self.wait_until_ready(is_ready).await, "the port must still be free: {}", self.log());
    }

    /// Waits until the server is ready. Returns `false` if its port was not free.
    async fn wait_until_ready(&mut self, is_ready: impl Fn() -> bool) -> bool {
        let polling = async {
            loop {
                if self.child.try_wait().unwrap().is_some() {
                    let log = self.log();
                    assert!(log.contains("in use"), "{} must start: {log}", self.program);
                    return false;
                }
                if is_ready() {
                    return true;
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        let result = tokio::time::timeout(START_TIMEOUT, polling).await;
        result.unwrap_or_else(|_| panic!("{} must be ready within the timeout: {}", self.program, self.log()))
    }

    fn send_signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn kill(&mut self) {
        // The kill fails if the child has already ended.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &str, directory: &Path, requires_tls: bool, port: u16) -> Child {
    // The socket of a killed server would refuse connections until the new server replaces it.
    let _ = fs::remove_file(socket_path(directory));
    let log = File::create(directory.join("log")).unwrap();
    let mut command = Command::new(program);
    command
        .arg(directory.join("redis.conf"))
        .args([if requires_tls { "--tls-port" } else { "--port" }, &port.to_string()]);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    command.spawn().unwrap_or_else(|error| panic!("{program} must be installed: {error}"))
}

fn config_file(options: &RedisOptions, directory: &Path) -> String {
    let directory = directory.display();
    let mut lines = format!(
        "bind 127.0.0.1\ndir {directory}\nunixsocket {directory}/redis.sock\nsave \"\"\nappendonly no\n{}\n",
        options.config
    );
    if options.requires_tls {
        lines += &format!(
            "port 0\ntls-cert-file {directory}/ca.pem\ntls-key-file {directory}/key.pem\n\
             tls-ca-cert-file {directory}/ca.pem\ntls-auth-clients no\n"
        );
    }
    match &options.auth {
        RedisAuth::Open => {}
        RedisAuth::Password => {
            lines += &format!("user default on >{ADMIN_PASSWORD} >{PASSWORD} ~* &* +@all\n");
        }
        RedisAuth::AclUser(rules) => {
            lines += &format!("user default on >{ADMIN_PASSWORD} ~* &* +@all\n");
            lines += &format!("user {USER} on >{PASSWORD} {rules}\n");
        }
    }
    lines
}

fn socket_path(directory: &Path) -> PathBuf {
    directory.join("redis.sock")
}

fn admin_url(options: &RedisOptions, directory: &Path) -> String {
    let socket = socket_path(directory);
    match options.auth {
        RedisAuth::Open => format!("redis+unix://{}", socket.display()),
        RedisAuth::Password | RedisAuth::AclUser(_) => {
            format!("redis+unix://{}?user=default&pass={ADMIN_PASSWORD}", socket.display())
        }
    }
}

/// Returns a connection, or `None` if the server does not respond.
fn connect(url: &str) -> Option<Connection> {
    let client = redis::Client::open(url).unwrap();
    let mut connection = client.get_connection_with_timeout(COMMAND_TIMEOUT).ok()?;
    connection.set_read_timeout(Some(COMMAND_TIMEOUT)).unwrap();
    connection.check_connection().then_some(connection)
}

#[track_caller]
fn query<T: FromRedisValue>(connection: &mut Connection, words: &[&str]) -> T {
    let mut command = redis::cmd(words[0]);
    command.arg(&words[1..]);
    command.query(connection).unwrap_or_else(|error| panic!("{words:?} must succeed: {error}"))
}

fn info_field(info: &str, field: &str) -> Option<String> {
    let mut values = info.lines().filter_map(|line| line.split_once(':'));
    values.find(|(name, _)| *name == field).map(|(_, value)| value.to_owned())
}

/// Polls `condition` until it holds. `event` describes the awaited event.
async fn wait_for(event: &str, condition: impl Fn() -> bool) {
    let polling = async {
        while !condition() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    let result = tokio::time::timeout(START_TIMEOUT, polling).await;
    assert!(result.is_ok(), "the wait for {event} must end within {} s", START_TIMEOUT.as_secs());
}
