//! Tests the listeners on ports and Unix sockets, the graceful shutdown, and the limit of connections for the maximum
//! of open files. A graceful shutdown completes running requests, serves each open connection once more, and ends at
//! its timeouts or at a second signal.

use std::fs;
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use super::environment::{
    FIRST_KEY, KeepAliveConnection, ProgramEnvironment, STEP_TIMEOUT, assert_head_contains, read_head,
    start_simulator,
};
use crate::support::program::{Program, run, stderr};

/// An upstream that sends half of a response. The test sends the other half.
struct PausedUpstream {
    listener: TcpListener,
}

impl PausedUpstream {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // With this timeout of the listening socket, `accept` fails if no request arrives.
        let socket = TcpStream::from(OwnedFd::from(listener.try_clone().unwrap()));
        socket.set_read_timeout(Some(STEP_TIMEOUT)).unwrap();
        Self { listener }
    }

    fn environment(&self) -> ProgramEnvironment {
        let environment = ProgramEnvironment::new(&format!("http://{}", self.listener.local_addr().unwrap()));
        environment.configure(&[FIRST_KEY], "");
        environment
    }

    /// Accepts the request and sends the first half of the response.
    fn accept_request(&self) -> TcpStream {
        let (mut stream, _) = self.listener.accept().unwrap();
        read_head(&mut BufReader::new(stream.try_clone().unwrap()));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nfirst").unwrap();
        stream
    }
}

#[test]
fn a_stream_completes_after_the_signal_and_open_connections_are_served() {
    let paused_upstream = PausedUpstream::new();
    let environment = paused_upstream.environment();
    let (mut program, address) = environment.start();
    let mut streaming = KeepAliveConnection::open(&address);
    streaming.send("/v1/voices");
    let mut upstream = paused_upstream.accept_request();
    let (mut probe, mut keep_alive) =
        (KeepAliveConnection::open(&address), KeepAliveConnection::open(&address));
    assert_head_contains(&probe.request("/readyz").0, &["http/1.1 200"]);
    assert_head_contains(&keep_alive.request("/livez").0, &["http/1.1 200"]);

    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    // The event is logged shortly before the drain starts.
    let (readyz_head, readyz_body) = loop {
        let response = probe.request("/readyz");
        if response.0[0].contains("503") {
            break response;
        }
    };
    assert_head_contains(&readyz_head, &["http/1.1 503", "retry-after: 1", "connection: close"]);
    assert!(readyz_body.contains(r#""draining":"yes""#), "the page must report the drain: {readyz_body}");
    probe.assert_closed();
    // An open connection is served once more.
    keep_alive.send("/v1/voices");
    let mut upstream_of_keep_alive = paused_upstream.accept_request();
    upstream_of_keep_alive.write_all(b"after").unwrap();
    assert_head_contains(&read_head(&mut keep_alive.0), &["http/1.1 200", "connection: close"]);
    let mut body = [0; 10];
    keep_alive.0.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"firstafter");
    keep_alive.assert_closed();

    upstream.write_all(b"after").unwrap();
    assert_head_contains(&read_head(&mut streaming.0), &["http/1.1 200"]);
    streaming.0.read_exact(&mut body).unwrap();
    assert_eq!(&body, b"firstafter");
    streaming.assert_closed();
    let (code, stderr) = program.wait_for_exit();
    assert_eq!(code, Some(0), "the program must exit without an error: {stderr}");
    assert!(stderr.contains(r#""message":"Ended""#), "the drain must complete: {stderr}");
    assert_eq!(recorded_verdicts(&environment), ["served", "served"]);
}

/// Returns the verdicts of the usage records, oldest first.
fn recorded_verdicts(environment: &ProgramEnvironment) -> Vec<String> {
    let database = rusqlite::Connection::open(environment.path("keychoir.db")).unwrap();
    let mut statement = database.prepare("SELECT verdict FROM attempts ORDER BY id").unwrap();
    let rows = statement.query_map([], |row| row.get(0)).unwrap();
    rows.map(Result::unwrap).collect()
}

#[test]
fn a_second_signal_exits_immediately_after_the_usage_records_are_written() {
    let paused_upstream = PausedUpstream::new();
    let environment = paused_upstream.environment();
    let (mut program, address) = environment.start();
    let mut streaming = KeepAliveConnection::open(&address);
    streaming.send("/v1/voices");
    let _upstream = paused_upstream.accept_request();
    assert_head_contains(&read_head(&mut streaming.0), &["http/1.1 200"]);
    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    program.send_signal("INT");
    let (code, stderr) = program.wait_for_exit();
    assert_eq!(code, Some(1), "an aborted drain must be an error: {stderr}");
    assert!(
        stderr.contains("running requests were aborted"),
        "the log must contain `running requests were aborted`: {stderr}"
    );
    assert_eq!(recorded_verdicts(&environment), ["shutdown"]);
}

#[test]
fn the_drain_timeout_closes_connections() {
    let paused_upstream = PausedUpstream::new();
    let environment = paused_upstream.environment();
    environment.configure(&[FIRST_KEY], "[server]\ndrain_timeout = \"1ms\"\n");
    let (program, address) = environment.start();
    let mut streaming = KeepAliveConnection::open(&address);
    streaming.send("/v1/voices");
    let _upstream = paused_upstream.accept_request();
    assert_head_contains(&read_head(&mut streaming.0), &["http/1.1 200"]);
    let (code, stderr) = program.terminate();
    assert_eq!(code, Some(0), "the program must exit without an error: {stderr}");
    assert!(
        stderr.contains("running requests were aborted"),
        "the log must contain `running requests were aborted`: {stderr}"
    );
}

/// Requests `/livez` on a Unix socket. Returns the response.
fn request_livez(path: &Path) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response
}

#[test]
fn the_program_listens_on_ports_and_unix_sockets() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let socket = environment.path("keychoir.sock");
    let socket_address = format!("unix:{}", socket.display());
    let start = || {
        let mut program = Program::start(&mut environment.command(&[
            "--listen",
            "127.0.0.1:0",
            "--listen",
            &socket_address,
        ]));
        let address = program.wait_for_address();
        assert!(address.starts_with("127.0.0.1:"), "the address must start with `127.0.0.1:`: {address}");
        assert_eq!(program.wait_for_address(), socket_address);
        (program, address)
    };
    let (program, address) = start();
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(request_livez(&socket).starts_with("HTTP/1.1 200"));
    assert_head_contains(&KeepAliveConnection::open(&address).request("/livez").0, &["http/1.1 200"]);

    let second_program = run(&mut environment.command(&["--listen", &socket_address]));
    assert_eq!(second_program.status.code(), Some(1));
    for expected in [&socket_address, "Another program listens there", "--listen unix:/PATH"] {
        assert!(
            stderr(&second_program).contains(expected),
            "the error message must contain {expected:?}: {}",
            stderr(&second_program)
        );
    }
    assert!(
        request_livez(&socket).starts_with("HTTP/1.1 200"),
        "the second process must not affect the first"
    );

    // The socket file of a killed program is replaced.
    program.send_signal("KILL");
    assert_eq!(program.wait_for_exit().0, None);
    assert!(socket.exists());
    let (program, _) = start();
    assert!(request_livez(&socket).starts_with("HTTP/1.1 200"));
    assert_eq!(program.terminate().0, Some(0));
    assert!(!socket.exists(), "the socket file must be removed at the exit");
}

#[test]
fn open_connections_are_served_during_the_drain_without_a_passed_socket() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let (mut program, address) = environment.start();
    let mut connections: Vec<KeepAliveConnection> =
        (0..20).map(|_| KeepAliveConnection::open(&address)).collect();
    for connection in &mut connections {
        assert_head_contains(&connection.request("/livez").0, &["http/1.1 200"]);
    }
    let mut probe = KeepAliveConnection::open(&address);
    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    // The event is logged shortly before the drain starts.
    while !probe.request("/readyz").0[0].contains("503") {}
    for connection in &mut connections {
        let (head, _) = connection.request("/livez");
        assert_head_contains(&head, &["http/1.1 200", "connection: close"]);
    }
    connections.into_iter().for_each(KeepAliveConnection::assert_closed);
    assert_eq!(program.wait_for_exit().0, Some(0));
}

#[test]
fn idle_connections_delay_the_exit_only_until_the_drain_idle_timeout() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "[server]\ndrain_idle_timeout = \"1ms\"\n");
    let (program, address) = environment.start();
    let mut idle_connection = KeepAliveConnection::open(&address);
    assert_head_contains(&idle_connection.request("/livez").0, &["http/1.1 200"]);
    let (code, stderr) = program.terminate();
    assert_eq!(code, Some(0), "the program must exit without an error: {stderr}");
    assert!(stderr.contains(r#""message":"Ended""#), "no request must be aborted: {stderr}");
    idle_connection.assert_closed();
}

#[test]
fn the_exit_does_not_wait_for_a_provider_without_a_response() {
    let paused_upstream = PausedUpstream::new();
    let environment = paused_upstream.environment();
    let mut command = environment.command(&["--listen", "127.0.0.1:0"]);
    let mut program = Program::start(command.env("KEYCHOIR_QUOTA_POLLING__ENABLED", "true"));
    // The program has polled the quota of its key, and the provider has not responded.
    let (_poll, _) = paused_upstream.listener.accept().unwrap();
    program.send_signal("TERM");
    program.wait_for_event("server_ending");
    let (code, stderr) = program.wait_for_exit();
    assert_eq!(code, Some(0));
    assert!(!stderr.contains("server_started"), "the exit must not wait for the first poll: {stderr}");
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_do_not_use_up_the_file_descriptors() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let environment = ProgramEnvironment::new(&simulator.base_url());
    // Each request opens a connection to the provider.
    environment.configure(&[FIRST_KEY], "[upstream]\nmax_idle_connections = 0\n");
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", "ulimit -S -n 64; ulimit -H -n 256; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_keychoir")])
        .args(["serve", "--listen", "127.0.0.1:0", "--config"])
        .arg(environment.path("keychoir.toml"))
        .env_clear();
    environment.set_environment(&mut command);
    let mut program = Program::start(&mut command);
    let limits = program.wait_for_event("connections_limited");
    // The program raises the soft limit to the hard limit.
    assert_eq!(
        (limits["open_files_max"].as_u64(), limits["max_connections"].as_u64()),
        (Some(256), Some(64))
    );
    let address = program.wait_for_address();
    let mut active: Vec<KeepAliveConnection> = (0..20).map(|_| KeepAliveConnection::open(&address)).collect();
    for client in &mut active {
        assert_head_contains(&client.request("/v1/voices").0, &["http/1.1 200"]);
    }
    let idle_connections: Vec<TcpStream> = (0..400).map(|_| TcpStream::connect(&address).unwrap()).collect();
    for round in 0..10 {
        active.iter_mut().for_each(|client| client.send("/v1/voices"));
        for client in &mut active {
            let (head, body) = client.receive();
            assert!(head[0].contains("200"), "round {round} must be served: {head:#?} {body}");
        }
    }
    // A client in the accept queue is accepted after the other clients have disconnected.
    drop(idle_connections);
    assert_head_contains(&KeepAliveConnection::open(&address).request("/v1/voices").0, &["http/1.1 200"]);
    drop(active);
    assert_eq!(program.terminate().0, Some(0));
}
