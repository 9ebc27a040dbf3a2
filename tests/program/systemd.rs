//! Tests the protocols of systemd: a restart with a passed socket refuses no client, unsafe or missing passed sockets
//! prevent the start, and the service manager and its watchdog are notified.

use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::environment::{
    FIRST_KEY, KeepAliveConnection, ProgramEnvironment, STEP_TIMEOUT, Traffic, assert_head_contains,
    start_simulator,
};
use crate::support::program::{Program, run, stderr};

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_with_a_passed_socket_does_not_refuse_clients() {
    let simulator = start_simulator(&[FIRST_KEY]).await;
    let environment = ProgramEnvironment::new(&simulator.base_url());
    environment.configure(&[FIRST_KEY], "");
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    let start = || {
        let mut program =
            Program::start(&mut environment.command_with_passed_socket(socket.try_clone().unwrap().into()));
        assert_eq!(program.wait_for_address(), address);
        program
    };
    let mut program = start();
    // Some clients keep their connections open, and other clients open a connection per request.
    let client_without_keepalive =
        keychoir::upstream::http_client().unwrap().pool_max_idle_per_host(0).build().unwrap();
    let mut traffic = Traffic::start(4, &address, &client_without_keepalive);
    let clients = start_keep_alive_clients(4, &address);
    for _ in 0..3 {
        traffic.wait_for_responses(20).await;
        let (code, stderr) = program.terminate();
        assert_eq!(code, Some(0), "the program must exit without an error: {stderr}");
        assert!(stderr.contains(r#""message":"Ended""#), "the drain must complete: {stderr}");
        program = start();
    }
    traffic.wait_for_responses(20).await;
    traffic.stop().await;
    clients.stop();
    assert_eq!(program.terminate().0, Some(0));
}

/// Clients that keep their connections open until a response closes them, pause between requests for various lengths
/// of time, and never retry.
struct KeepAliveClients {
    stop: Arc<AtomicBool>,
    clients: Vec<std::thread::JoinHandle<()>>,
}

fn start_keep_alive_clients(count: usize, address: &str) -> KeepAliveClients {
    let stop = Arc::new(AtomicBool::new(false));
    let clients = (0..count).map(|number| {
        let (stop, address) = (Arc::clone(&stop), address.to_owned());
        let send_requests = move || {
            let mut kept_connection = None;
            for round in 0.. {
                if stop.load(Ordering::Acquire) {
                    return;
                }
                let mut connection =
                    kept_connection.take().unwrap_or_else(|| KeepAliveConnection::open(&address));
                let (head, _) = connection.request("/v1/voices");
                assert_head_contains(&head, &["http/1.1 200"]);
                if !head.iter().any(|line| line == "connection: close") {
                    kept_connection = Some(connection);
                }
                // The length of the pause depends on the other threads and not on a clock.
                (0..(round * 7 + number) % 50).for_each(|_| std::thread::yield_now());
            }
        };
        keychoir::tasks::spawn_thread("client", send_requests).unwrap()
    });
    let clients = clients.collect();
    KeepAliveClients { stop, clients }
}

impl KeepAliveClients {
    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.clients.into_iter().for_each(|client| client.join().unwrap());
    }
}

#[test]
fn a_passed_socket_beyond_loopback_needs_client_tokens() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let socket = TcpListener::bind("0.0.0.0:0").unwrap();
    let output = run(&mut environment.command_with_passed_socket(socket.into()));
    assert_eq!(output.status.code(), Some(78));
    for expected in ["0.0.0.0:", "is open to other machines", "[[clients]]"] {
        assert!(
            stderr(&output).contains(expected),
            "the error message must contain {expected:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn missing_passed_sockets_are_reported() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let output = run(&mut environment.command(&["--listen", "systemd"]));
    assert_eq!(output.status.code(), Some(78));
    assert!(
        stderr(&output).contains("systemd passed no sockets"),
        "the error message must contain `systemd passed no sockets`: {}",
        stderr(&output)
    );
}

/// Receives the next notification that is not a watchdog keep-alive.
fn receive_notification(manager: &UnixDatagram) -> String {
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
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let manager = UnixDatagram::bind(environment.path("notify")).unwrap();
    manager.set_read_timeout(Some(STEP_TIMEOUT)).unwrap();
    let mut command = environment.command(&["--listen", "127.0.0.1:0"]);
    let mut program = Program::start(command.env("NOTIFY_SOCKET", environment.path("notify")));
    let ready = receive_notification(&manager);
    assert!(
        ready.starts_with("READY=1\nSTATUS=Serving with 1 key at 127.0.0.1:"),
        "the service manager must be notified of the readiness: {ready}"
    );
    program.wait_for_address();
    program.send_signal("HUP");
    let reloading = receive_notification(&manager);
    let monotonic_usec = reloading.trim_end().strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
    assert!(monotonic_usec.parse::<u64>().unwrap() > 0);
    assert!(receive_notification(&manager).starts_with("READY=1\n"));
    program.send_signal("TERM");
    let stopping = receive_notification(&manager);
    assert!(
        stopping.starts_with("STOPPING=1\n"),
        "the service manager must be notified of the shutdown: {stopping}"
    );
    assert!(
        stopping.contains("EXTEND_TIMEOUT_USEC=45000000"),
        "the notification must contain `EXTEND_TIMEOUT_USEC=45000000`: {stopping}"
    );
    assert_eq!(program.wait_for_exit().0, Some(0));
}

#[test]
fn the_watchdog_is_notified_repeatedly() {
    let environment = ProgramEnvironment::new("http://127.0.0.1:9");
    environment.configure(&[FIRST_KEY], "");
    let manager = UnixDatagram::bind(environment.path("notify")).unwrap();
    manager.set_read_timeout(Some(STEP_TIMEOUT)).unwrap();
    let mut command = environment.command(&["--listen", "127.0.0.1:0"]);
    command.env("NOTIFY_SOCKET", environment.path("notify")).env("WATCHDOG_USEC", "20000");
    let program = Program::start(&mut command);
    let mut keepalive_count = 0;
    while keepalive_count < 3 {
        let mut buffer = [0; 1024];
        let length = manager.recv(&mut buffer).unwrap();
        keepalive_count += usize::from(buffer[..length].starts_with(b"WATCHDOG=1"));
    }
    drop(program);
}
