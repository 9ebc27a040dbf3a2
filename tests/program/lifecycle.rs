//! The life cycle of the program: its listeners, reloads, and graceful shutdown, without a refused
//! request.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::program::{Program, keychoir_command, run, stderr};
use keychoir::simulator::{Plan, Simulator};
use tempfile::TempDir;
use tokio::sync::watch;

const FIRST_KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
const SECOND_KEY: &str = "sk_key_number_two_000000000000000000000000000000002";
const THIRD_KEY: &str = "sk_key_number_three_0000000000000000000000000000003";

const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM";
const WAIT_MAX: Duration = Duration::from_secs(30);

/// A folder with a configuration, and an upstream for it.
struct Stage {
    folder: TempDir,
    upstream: String,
}

impl Stage {
    fn before(upstream: &str) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), upstream: upstream.to_owned() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Replaces the configuration by one with these keys.
    fn configure(&self, keys: &[&str], rest: &str) {
        let keys: Vec<String> = keys.iter().map(|key| format!("[[keys]]\nkey = \"{key}\"\n")).collect();
        fs::write(self.path("new"), format!("{rest}\n{}", keys.concat())).unwrap();
        fs::rename(self.path("new"), self.path("keychoir.toml")).unwrap();
    }

    /// The program's arguments and environment, with files checked only on a signal.
    fn command(&self, more: &[&str]) -> Command {
        let config = self.path("keychoir.toml");
        let mut command =
            keychoir_command(&[&["serve", "--config", config.to_str().unwrap()], more].concat());
        self.environment(&mut command);
        command
    }

    fn environment(&self, command: &mut Command) {
        command
            .env("KEYCHOIR_STORAGE__PATH", self.path("keychoir.db"))
            .env("KEYCHOIR_UPSTREAM__BASE_URL", &self.upstream)
            .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "0s")
            .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
            .env("KEYCHOIR_LOG__FORMAT", "json");
    }

    fn start(&self) -> (Program, String) {
        let mut program = Program::start(&mut self.command(&["--listen", "127.0.0.1:0"]));
        let address = program.wait_for_address();
        (program, address)
    }

    /// The program with sockets as systemd passes them: from descriptor 3 on, for this process.
    fn activated(&self, socket: OwnedFd) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", "exec 3<&0 </dev/null; LISTEN_PID=$$; export LISTEN_PID; exec \"$0\" \"$@\""])
            .args([env!("CARGO_BIN_EXE_keychoir"), "serve", "--config"])
            .arg(self.path("keychoir.toml"))
            .env_clear()
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDNAMES", "keychoir")
            .stdin(Stdio::from(socket));
        self.environment(&mut command);
        command
    }
}

/// A simulator with these keys and plenty of credits.
async fn simulator(keys: &[&str]) -> Simulator {
    let plan = Plan::of(keys.iter().map(|key| (*key, 1_000_000)));
    Simulator::start(tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap(), plan).await.unwrap()
}

fn hits(simulator: &Simulator, key: &str) -> usize {
    let ledger = simulator.ledger();
    ledger.requests.iter().filter(|request| request.key.as_deref() == Some(key)).count()
}

fn client() -> reqwest::Client {
    keychoir::upstream::http_client().unwrap().build().unwrap()
}

async fn speak(client: &reqwest::Client, address: &str) -> reqwest::StatusCode {
    let body = serde_json::json!({"text": "hello", "model_id": "eleven_multilingual_v2"});
    let answer = client.post(format!("http://{address}{SPEECH_PATH}")).json(&body).send().await.unwrap();
    let status = answer.status();
    answer.bytes().await.unwrap();
    status
}

/// Clients that send requests without a pause until they are stopped. Each response must be audio.
struct Traffic {
    stop: Arc<AtomicBool>,
    answered: watch::Receiver<u64>,
    clients: Vec<tokio::task::JoinHandle<()>>,
}

impl Traffic {
    fn begin(count: usize, address: &str, client: &reqwest::Client) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, answered) = watch::channel(0);
        let sender = Arc::new(sender);
        let speak_on = || {
            let (stop, sender, client) = (Arc::clone(&stop), Arc::clone(&sender), client.clone());
            let address = address.to_owned();
            async move {
                while !stop.load(Ordering::Acquire) {
                    assert_eq!(speak(&client, &address).await, 200);
                    sender.send_modify(|count| *count += 1);
                }
            }
        };
        let tasks = keychoir::tasks::Tasks::new();
        let clients = (0..count).map(|_| tasks.spawn(speak_on())).collect();
        Self { stop, answered, clients }
    }

    /// Waits for a number of further responses.
    async fn flows(&mut self, more: u64) {
        let target = *self.answered.borrow() + more;
        let arrived = self.answered.wait_for(|&count| count >= target);
        tokio::time::timeout(WAIT_MAX, arrived).await.unwrap().unwrap();
    }

    /// Lets each client finish, and fails if one of them had a failure.
    async fn end(self) {
        self.stop.store(true, Ordering::Release);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_come_and_go_under_traffic_and_no_request_fails() {
    let simulator = simulator(&[FIRST_KEY, SECOND_KEY, THIRD_KEY]).await;
    let stage = Stage::before(&simulator.base_url());
    stage.configure(&[FIRST_KEY, SECOND_KEY], "");
    let (mut program, address) = stage.start();
    let mut traffic = Traffic::begin(4, &address, &client());
    traffic.flows(10).await;
    for (keys, added, removed) in [
        (&[SECOND_KEY] as &[&str], 0, 1),
        (&[THIRD_KEY, SECOND_KEY], 1, 0),
        (&[SECOND_KEY, THIRD_KEY, FIRST_KEY], 1, 0),
        (&[FIRST_KEY, SECOND_KEY, THIRD_KEY], 0, 0),
        (&[THIRD_KEY], 0, 2),
    ] {
        stage.configure(keys, "");
        program.send_signal("HUP");
        let event = program.wait_for_event("reloaded");
        let told = (event["keys"].as_u64(), event["added"].as_u64(), event["removed"].as_u64());
        assert_eq!(told, (Some(keys.len() as u64), Some(added), Some(removed)));
        traffic.flows(10).await;
    }
    traffic.end().await;
    let before = [FIRST_KEY, SECOND_KEY, THIRD_KEY].map(|key| hits(&simulator, key));
    assert_eq!(speak(&client(), &address).await, 200);
    let after = [FIRST_KEY, SECOND_KEY, THIRD_KEY].map(|key| hits(&simulator, key));
    assert_eq!(after, [before[0], before[1], before[2] + 1], "a key that is gone gets no new request");
    assert!(before.iter().all(|&hits| hits > 0), "{before:?}");
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_key_keeps_its_state_after_a_reload() {
    let simulator = simulator(&[FIRST_KEY, SECOND_KEY]).await;
    simulator.always(FIRST_KEY, Some("invalid".parse().unwrap()));
    let stage = Stage::before(&simulator.base_url());
    stage.configure(&[FIRST_KEY, SECOND_KEY], "");
    let (mut program, address) = stage.start();
    assert_eq!(speak(&client(), &address).await, 200);
    assert_eq!(hits(&simulator, FIRST_KEY), 1);
    for keys in [[SECOND_KEY, FIRST_KEY], [FIRST_KEY, SECOND_KEY]] {
        stage.configure(&keys, "");
        program.send_signal("HUP");
        program.wait_for_event("reloaded");
        assert_eq!(speak(&client(), &address).await, 200);
    }
    assert_eq!(hits(&simulator, FIRST_KEY), 1, "a refused key is not asked again because it moved");
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_file_is_reported_and_changes_nothing() {
    let simulator = simulator(&[FIRST_KEY]).await;
    let stage = Stage::before(&simulator.base_url());
    stage.configure(&[FIRST_KEY], "");
    let (mut program, address) = stage.start();
    stage.configure(&[SECOND_KEY], "[pool]\nstrateggy = \"fill-first\"\n[log]\nlevel = \"loud\"\n");
    program.send_signal("HUP");
    for words in ["keychoir.toml:2:1: unknown key `strateggy`", "did you mean `strategy`", "`loud`"] {
        program.wait_for_line(|line| line.contains(words).then_some(()));
    }
    program.wait_for_event("reload_failed");
    assert_eq!(speak(&client(), &address).await, 200);
    assert_eq!((hits(&simulator, FIRST_KEY), hits(&simulator, SECOND_KEY)), (1, 0));
    // A valid configuration is applied again.
    stage.configure(&[FIRST_KEY], "");
    program.send_signal("HUP");
    program.wait_for_event("reloaded");
    let (code, said) = program.terminate();
    assert_eq!(code, Some(0));
    assert!(!said.contains(FIRST_KEY) && !said.contains(SECOND_KEY), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_reloaded_and_settings_that_need_a_restart_are_named() {
    let simulator = simulator(&[FIRST_KEY]).await;
    let stage = Stage::before(&simulator.base_url());
    stage.configure(&[FIRST_KEY], "");
    let (mut program, address) = stage.start();
    assert_eq!(speak(&client(), &address).await, 200);
    let clients = "[[clients]]\nname = \"app\"\ntoken = \"a-token-of-the-test\"\n";
    stage.configure(
        &[FIRST_KEY],
        &format!("[server]\nmax_request_headers_size = \"8KiB\"\n[log]\nlevel = \"debug\"\n{clients}"),
    );
    program.send_signal("HUP");
    assert_eq!(program.wait_for_event("reload_incomplete")["settings"], "server.max_request_headers_size");
    assert_eq!(program.wait_for_event("reloaded")["clients"], 1);
    assert_eq!(speak(&client(), &address).await, 401);
    // The new level applies: malformed HTTP was not logged before.
    TcpStream::connect(&address).unwrap().write_all(b"\x16\x03\x01 no HTTP\r\n\r\n").unwrap();
    program.wait_for_line(|line| line.contains("a connection ended").then_some(()));
    assert_eq!(program.terminate().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_is_noticed_without_a_signal() {
    let simulator = simulator(&[FIRST_KEY, SECOND_KEY]).await;
    let stage = Stage::before(&simulator.base_url());
    fs::write(stage.path("list"), FIRST_KEY).unwrap();
    fs::write(stage.path("keychoir.toml"), "").unwrap();
    let mut command = stage.command(&["--listen", "127.0.0.1:0"]);
    command
        .env("KEYCHOIR_SERVER__RELOAD_INTERVAL", "20ms")
        .env("ELEVENLABS_API_KEYS_FILE", stage.path("list"));
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address();
    fs::write(stage.path("list"), format!("{SECOND_KEY}\n{FIRST_KEY}\n")).unwrap();
    assert_eq!(program.wait_for_event("reloaded")["added"], 1);
    assert_eq!(speak(&client(), &address).await, 200);
    assert_eq!(hits(&simulator, SECOND_KEY), 1);
    assert_eq!(program.terminate().0, Some(0));
}

/// An upstream whose response pauses in the middle until the test continues it.
struct Gate {
    listener: TcpListener,
}

impl Gate {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // The timeout is set on the listening socket.
        let socket = TcpStream::from(OwnedFd::from(listener.try_clone().unwrap()));
        socket.set_read_timeout(Some(WAIT_MAX)).unwrap();
        Self { listener }
    }

    fn stage(&self) -> Stage {
        let stage = Stage::before(&format!("http://{}", self.listener.local_addr().unwrap()));
        stage.configure(&[FIRST_KEY], "");
        stage
    }

    /// Accepts the request and sends the first half of the response.
    fn open(&self) -> TcpStream {
        let (mut stream, _) = self.listener.accept().unwrap();
        head(&mut BufReader::new(stream.try_clone().unwrap()));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst").unwrap();
        stream
    }
}

/// A head, line by line.
fn head(reader: &mut impl BufRead) -> Vec<String> {
    let lines = reader.by_ref().lines().map(|line| line.unwrap().to_lowercase());
    lines.take_while(|line| !line.is_empty()).collect()
}

/// A keep-alive connection.
struct Kept(BufReader<TcpStream>);

impl Kept {
    fn to(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(WAIT_MAX)).unwrap();
        Self(BufReader::new(stream))
    }

    fn send(&mut self, path: &str) {
        write!(self.0.get_mut(), "GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
    }

    /// Sends a request; returns the head and the body of the response.
    fn ask(&mut self, path: &str) -> (Vec<String>, String) {
        self.send(path);
        self.answer()
    }

    fn answer(&mut self) -> (Vec<String>, String) {
        let head = head(&mut self.0);
        let length = head.iter().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        let mut body = vec![0; length.parse().unwrap()];
        self.0.read_exact(&mut body).unwrap();
        (head, String::from_utf8(body).unwrap())
    }

    #[track_caller]
    fn assert_closed(mut self) {
        assert_eq!(self.0.read(&mut [0]).unwrap(), 0, "the connection is still open");
    }
}

#[track_caller]
fn assert_has(head: &[String], lines: &[&str]) {
    for line in lines {
        assert!(head.iter().any(|known| known.starts_with(line)), "{line:?} is not in {head:#?}");
    }
}

#[test]
fn a_stream_finishes_after_the_signal_and_kept_connections_are_served() {
    let gate = Gate::new();
    let stage = gate.stage();
    let (mut program, address) = stage.start();
    let mut streaming = Kept::to(&address);
    streaming.send("/v1/voices");
    let mut upstream = gate.open();
    let (mut one, mut other) = (Kept::to(&address), Kept::to(&address));
    assert_has(&one.ask("/readyz").0, &["http/1.1 200"]);
    assert_has(&other.ask("/livez").0, &["http/1.1 200"]);

    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    // The line is logged just before the drain begins.
    let (told, page) = loop {
        let probe = one.ask("/readyz");
        if probe.0[0].contains("503") {
            break probe;
        }
    };
    assert_has(&told, &["http/1.1 503", "retry-after: 1", "connection: close"]);
    assert!(page.contains(r#""draining":"yes""#), "{page}");
    one.assert_closed();
    // A keep-alive connection is served once more.
    other.send("/v1/voices");
    let mut served = gate.open();
    served.write_all(b"after").unwrap();
    assert_has(&head(&mut other.0), &["http/1.1 200", "connection: close"]);
    let mut body = [0; 10];
    other.0.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"firstafter");
    other.assert_closed();

    upstream.write_all(b"after").unwrap();
    assert_has(&head(&mut streaming.0), &["http/1.1 200"]);
    streaming.0.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"firstafter");
    streaming.assert_closed();
    let (code, said) = program.wait_for_exit();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(r#""message":"Ended""#), "{said}");
    assert_eq!(booked(&stage), ["served", "served"]);
}

/// The verdicts in the usage records.
fn booked(stage: &Stage) -> Vec<String> {
    let books = rusqlite::Connection::open(stage.path("keychoir.db")).unwrap();
    let mut statement = books.prepare("SELECT verdict FROM attempts ORDER BY id").unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

#[test]
fn a_second_signal_ends_the_program_at_once_with_its_records_written() {
    let gate = Gate::new();
    let stage = gate.stage();
    let (mut program, address) = stage.start();
    let mut streaming = Kept::to(&address);
    streaming.send("/v1/voices");
    let _upstream = gate.open();
    assert_has(&head(&mut streaming.0), &["http/1.1 200"]);
    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    program.send_signal("INT");
    let (code, said) = program.wait_for_exit();
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("requests that still ran were cut"), "{said}");
    assert_eq!(booked(&stage), ["shutdown"]);
}

#[test]
fn the_drain_timeout_ends_connections() {
    let gate = Gate::new();
    let stage = gate.stage();
    stage.configure(&[FIRST_KEY], "[server]\ndrain_timeout = \"1ms\"\n");
    let (program, address) = stage.start();
    let mut streaming = Kept::to(&address);
    streaming.send("/v1/voices");
    let _upstream = gate.open();
    assert_has(&head(&mut streaming.0), &["http/1.1 200"]);
    let (code, said) = program.terminate();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("requests that still ran were cut"), "{said}");
}

fn live_over(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn ports_and_unix_sockets_are_listened_on_at_once() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "");
    let socket = stage.path("keychoir.sock");
    let place = format!("unix:{}", socket.display());
    let start = || {
        let mut program =
            Program::start(&mut stage.command(&["--listen", "127.0.0.1:0", "--listen", &place]));
        let address = program.wait_for_address();
        assert!(address.starts_with("127.0.0.1:"), "{address}");
        assert_eq!(program.wait_for_address(), place);
        (program, address)
    };
    let (program, address) = start();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(live_over(&socket).starts_with("HTTP/1.1 200"));
    assert_has(&Kept::to(&address).ask("/livez").0, &["http/1.1 200"]);

    let late = run(&mut stage.command(&["--listen", &place]));
    assert_eq!(late.status.code(), Some(1));
    for words in [&place, "Another program listens there", "--listen unix:/PATH"] {
        assert!(stderr(&late).contains(words), "{}", stderr(&late));
    }
    assert!(live_over(&socket).starts_with("HTTP/1.1 200"), "the one that came late broke nothing");

    // The files of a killed program are replaced.
    program.send_signal("KILL");
    assert_eq!(program.wait_for_exit().0, None);
    assert!(socket.exists());
    let (program, _) = start();
    assert!(live_over(&socket).starts_with("HTTP/1.1 200"));
    assert_eq!(program.terminate().0, Some(0));
    assert!(!socket.exists(), "the socket goes with the program");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_a_socket_of_systemd_refuses_no_client() {
    let simulator = simulator(&[FIRST_KEY]).await;
    let stage = Stage::before(&simulator.base_url());
    stage.configure(&[FIRST_KEY], "");
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = socket.local_addr().unwrap().to_string();
    let start = || {
        let mut program = Program::start(&mut stage.activated(socket.try_clone().unwrap().into()));
        assert_eq!(program.wait_for_address(), place);
        program
    };
    let mut program = start();
    // Some clients keep their connections, others open one per request.
    let fresh = keychoir::upstream::http_client().unwrap().pool_max_idle_per_host(0).build().unwrap();
    let mut traffic = Traffic::begin(4, &place, &fresh);
    let keeping = keeping(4, &place);
    for _ in 0..3 {
        traffic.flows(20).await;
        let (code, said) = program.terminate();
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(r#""message":"Ended""#), "{said}");
        program = start();
    }
    traffic.flows(20).await;
    traffic.end().await;
    keeping.end();
    assert_eq!(program.terminate().0, Some(0));
}

/// Clients that keep their connection until a response closes it, send requests after pauses of all
/// lengths, and never retry.
struct Keeping {
    stop: Arc<AtomicBool>,
    clients: Vec<std::thread::JoinHandle<()>>,
}

fn keeping(count: usize, place: &str) -> Keeping {
    let stop = Arc::new(AtomicBool::new(false));
    let clients = (0..count).map(|number| {
        let (stop, place) = (Arc::clone(&stop), place.to_owned());
        let ask = move || {
            let mut kept = None;
            for round in 0.. {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let mut connection = kept.take().unwrap_or_else(|| Kept::to(&place));
                let (head, _) = connection.ask("/v1/voices");
                assert_has(&head, &["http/1.1 200"]);
                if !head.iter().any(|line| line == "connection: close") {
                    kept = Some(connection);
                }
                // The pause depends on events of other clients, and not on a clock.
                (0..(round * 7 + number) % 50).for_each(|_| std::thread::yield_now());
            }
        };
        keychoir::tasks::spawn_thread("client", ask).unwrap()
    });
    let clients = clients.collect();
    Keeping { stop, clients }
}

impl Keeping {
    fn end(self) {
        self.stop.store(true, Ordering::Release);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
    }
}

#[test]
fn kept_connections_are_served_at_the_end_without_a_passed_socket_too() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "");
    let (mut program, address) = stage.start();
    let mut kept: Vec<Kept> = (0..20).map(|_| Kept::to(&address)).collect();
    for connection in &mut kept {
        assert_has(&connection.ask("/livez").0, &["http/1.1 200"]);
    }
    let mut probe = Kept::to(&address);
    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    // The line is logged just before the drain begins.
    while !probe.ask("/readyz").0[0].contains("503") {}
    for connection in &mut kept {
        let (head, _) = connection.ask("/livez");
        assert_has(&head, &["http/1.1 200", "connection: close"]);
    }
    kept.into_iter().for_each(Kept::assert_closed);
    assert_eq!(program.wait_for_exit().0, Some(0));
}

#[test]
fn idle_connections_do_not_hold_the_end_for_longer_than_they_may() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "[server]\ndrain_idle_timeout = \"1ms\"\n");
    let (program, address) = stage.start();
    let mut kept = Kept::to(&address);
    assert_has(&kept.ask("/livez").0, &["http/1.1 200"]);
    let (code, said) = program.terminate();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(r#""message":"Ended""#), "nothing was cut: {said}");
    kept.assert_closed();
}

#[test]
fn a_passed_socket_beyond_loopback_needs_client_tokens() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "");
    let socket = TcpListener::bind("0.0.0.0:0").unwrap();
    let output = run(&mut stage.activated(socket.into()));
    assert_eq!(output.status.code(), Some(78));
    for words in ["0.0.0.0:", "is open to other machines", "[[clients]]"] {
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
    }
}

#[test]
fn a_reload_does_not_open_the_pool_to_other_machines() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "[[clients]]\nname = \"app\"\ntoken = \"a-token-of-the-test\"\n");
    let socket = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let mut program = Program::start(&mut stage.activated(socket.into()));
    program.wait_for_address();
    stage.configure(&[FIRST_KEY], "");
    program.send_signal("HUP");
    let told = program.wait_for_event("reload_failed");
    assert!(told["message"].as_str().unwrap().contains("is open to other machines"), "{told}");
    let (answer, _) = Kept::to(&format!("127.0.0.1:{port}")).ask("/v1/voices");
    assert_has(&answer, &["http/1.1 401", "x-keychoir-error: client_token_missing"]);
    assert_eq!(program.terminate().0, Some(0));
}

#[test]
fn missing_sockets_of_systemd_are_reported() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "");
    let output = run(&mut stage.command(&["--listen", "systemd"]));
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("systemd passed no sockets"), "{}", stderr(&output));
}

/// The next message to the service manager that is no watchdog keep-alive.
fn heard(manager: &UnixDatagram) -> String {
    loop {
        let mut buffer = [0; 1024];
        let length = manager.recv(&mut buffer).unwrap();
        let message = String::from_utf8(buffer[..length].to_vec()).unwrap();
        if message.trim_end() != "WATCHDOG=1" {
            return message;
        }
    }
}

#[test]
fn the_service_manager_is_notified_of_every_step() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "");
    let manager = UnixDatagram::bind(stage.path("notify")).unwrap();
    manager.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let mut command = stage.command(&["--listen", "127.0.0.1:0"]);
    let mut program = Program::start(command.env("NOTIFY_SOCKET", stage.path("notify")));
    let ready = heard(&manager);
    assert!(ready.starts_with("READY=1\nSTATUS=Serving with 1 key at 127.0.0.1:"), "{ready}");
    program.wait_for_address();
    program.send_signal("HUP");
    let reloading = heard(&manager);
    let since = reloading.trim_end().strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    assert!(since.parse::<u64>().unwrap() > 0);
    assert!(heard(&manager).starts_with("READY=1\n"));
    program.send_signal("TERM");
    let stopping = heard(&manager);
    assert!(stopping.starts_with("STOPPING=1\n"), "{stopping}");
    assert!(stopping.contains("EXTEND_TIMEOUT_USEC=45000000"), "{stopping}");
    assert_eq!(program.wait_for_exit().0, Some(0));
}

#[test]
fn the_end_does_not_wait_for_a_silent_provider() {
    let gate = Gate::new();
    let stage = gate.stage();
    let mut command = stage.command(&["--listen", "127.0.0.1:0"]);
    let mut program = Program::start(command.env("KEYCHOIR_QUOTA_POLLING__ENABLED", "true"));
    // The program has polled the quota of its key, without a response.
    let (_asked, _) = gate.listener.accept().unwrap();
    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    let (code, said) = program.wait_for_exit();
    assert_eq!(code, Some(0));
    assert!(!said.contains("server_started"), "the welcome was waited for: {said}");
}

#[test]
fn the_watchdog_is_notified_repeatedly() {
    let stage = Stage::before("http://127.0.0.1:9");
    stage.configure(&[FIRST_KEY], "");
    let manager = UnixDatagram::bind(stage.path("notify")).unwrap();
    manager.set_read_timeout(Some(WAIT_MAX)).unwrap();
    let mut command = stage.command(&["--listen", "127.0.0.1:0"]);
    command.env("NOTIFY_SOCKET", stage.path("notify")).env("WATCHDOG_USEC", "20000");
    let program = Program::start(&mut command);
    let mut beats = 0;
    while beats < 3 {
        let mut buffer = [0; 1024];
        let length = manager.recv(&mut buffer).unwrap();
        beats += usize::from(buffer[..length].starts_with(b"WATCHDOG=1"));
    }
    drop(program);
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_do_not_use_up_the_file_descriptors() {
    let simulator = simulator(&[FIRST_KEY]).await;
    let stage = Stage::before(&simulator.base_url());
    // Each request opens a connection to the provider.
    stage.configure(&[FIRST_KEY], "[upstream]\nmax_idle_connections = 0\n");
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "ulimit -S -n 64; ulimit -H -n 256; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_keychoir")])
        .args(["serve", "--listen", "127.0.0.1:0", "--config"])
        .arg(stage.path("keychoir.toml"))
        .env_clear();
    stage.environment(&mut command);
    let mut program = Program::start(&mut command);
    let limited = program.wait_for_event("connections_limited");
    // The soft limit does not count: it is raised.
    assert_eq!(
        (limited["open_files_max"].as_u64(), limited["max_connections"].as_u64()),
        (Some(256), Some(64))
    );
    let address = program.wait_for_address();
    let mut first: Vec<Kept> = (0..20).map(|_| Kept::to(&address)).collect();
    for client in &mut first {
        assert_has(&client.ask("/v1/voices").0, &["http/1.1 200"]);
    }
    let idle: Vec<TcpStream> = (0..400).map(|_| TcpStream::connect(&address).unwrap()).collect();
    for round in 0..10 {
        first.iter_mut().for_each(|client| client.send("/v1/voices"));
        for client in &mut first {
            let (head, body) = client.answer();
            assert!(head[0].contains("200"), "round {round}: {head:#?} {body}");
        }
    }
    // A client in the backlog is accepted when others have disconnected.
    drop(idle);
    assert_has(&Kept::to(&address).ask("/v1/voices").0, &["http/1.1 200"]);
    drop(first);
    assert_eq!(program.terminate().0, Some(0));
}
