//! Tests the log of Keychoir: requests and the exit do not wait for a reader of the log, the log contains the ended
//! requests in their order unless its level excludes them, and neither a shutdown nor a panic loses lines.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::Duration;

use crate::support::program::keychoir_command;
use keychoir::simulator::{Plan, Simulator};
use keychoir::telemetry::{self, LineFormat, LogSink};
use serde_json::Value;
use tracing::info;

const KEY: &str = "sk_key_number_one_000000000000000000000000000000001";
/// The timeout of a request and of the exit.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// The number of requests. Their log lines exceed the buffer of a pipe.
const REQUEST_COUNT: usize = 600;

/// A program whose log is not read after the event `server_started`.
struct ProgramWithUnreadLog {
    child: Child,
    log: BufReader<ChildStderr>,
    _simulator: Simulator,
}

impl ProgramWithUnreadLog {
    /// Starts Keychoir with the log level `level`, and sends [`REQUEST_COUNT`] requests.
    async fn start_and_send_requests(level: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let simulator = Simulator::start(listener, Plan::with_keys([(KEY, 1_000_000)])).await.unwrap();
        let mut child = keychoir_command(&["serve", "--listen", "127.0.0.1:0", "--ephemeral"])
            .env("ELEVENLABS_API_KEYS", KEY)
            .env("KEYCHOIR_UPSTREAM__BASE_URL", simulator.base_url())
            .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
            .env("KEYCHOIR_LOG__LEVEL", level)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let address = loop {
            let mut line = String::new();
            log.read_line(&mut line).unwrap();
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["event"] == "server_started" {
                break event["address"].as_str().unwrap().to_owned();
            }
        };
        let client = keychoir::upstream::http_client().unwrap().timeout(STEP_TIMEOUT).build().unwrap();
        for index in 0..REQUEST_COUNT {
            let request = client.get(format!("http://{address}/v1/simulator/echo"));
            let response = request.header("x-request-id", format!("name-{index}")).send().await.unwrap();
            assert_eq!(response.status(), 200);
            response.bytes().await.unwrap();
        }
        Self { child, log, _simulator: simulator }
    }

    /// Terminates Keychoir. Returns its exit code.
    async fn terminate(mut child: Child) -> Option<i32> {
        assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
        let exit = tokio::task::spawn_blocking(move || child.wait().unwrap().code());
        tokio::time::timeout(STEP_TIMEOUT, exit).await.unwrap().unwrap()
    }
}

/// Returns the events of a program with the log level `level`, whose log is read only after all requests are served.
async fn read_log_after_requests(level: &str) -> Vec<Value> {
    let ProgramWithUnreadLog { child, mut log, _simulator } =
        ProgramWithUnreadLog::start_and_send_requests(level).await;
    let reader = keychoir::tasks::spawn_thread("log", move || {
        let mut text = String::new();
        log.read_to_string(&mut text).map(|_| text)
    });
    assert_eq!(ProgramWithUnreadLog::terminate(child).await, Some(0));
    let text = reader.unwrap().join().unwrap().unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn requests_are_served_while_the_log_is_unread_and_the_log_keeps_their_order() {
    let events = read_log_after_requests("info").await;
    let request_events: Vec<&Value> =
        events.iter().filter(|event| event["event"] == "request_ended").collect();
    let request_ids: Vec<String> = (0..REQUEST_COUNT).map(|index| format!("name-{index}")).collect();
    assert_eq!(
        request_events.iter().map(|event| event["request_id"].as_str().unwrap()).collect::<Vec<_>>(),
        request_ids
    );
    assert_eq!(events.last().unwrap()["event"], "server_ended");
    for event in request_events {
        assert_eq!(event["upstream_host"], "127.0.0.1");
        assert_eq!(event["client_address"], "127.0.0.1");
        assert!(
            event["user_agent"].is_string() && event["client"] == "local",
            "the event must describe the client: {event}"
        );
    }
}

#[tokio::test]
async fn requests_are_not_logged_if_the_level_excludes_them() {
    let events = read_log_after_requests("info,keychoir::proxy=warn").await;
    assert_eq!(events.iter().filter(|event| event["event"] == "request_ended").count(), 0);
    assert_eq!(events.last().unwrap()["event"], "server_ended");
}

#[tokio::test]
async fn an_unread_log_does_not_delay_the_exit() {
    let ProgramWithUnreadLog { child, log, _simulator } =
        ProgramWithUnreadLog::start_and_send_requests("debug").await;
    assert_eq!(ProgramWithUnreadLog::terminate(child).await, Some(0));
    drop(log);
}

/// The environment variable that enables `the_child_process_panics_after_its_events`, which another test runs as a
/// child process.
const CHILD_VARIABLE: &str = "KEYCHOIR_TEST_PANICS";

/// A value that logs while it is formatted.
struct LoggingValue;

impl fmt::Display for LoggingValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        info!(event = "aside", "aside");
        f.write_str("to the point")
    }
}

#[test]
fn the_child_process_panics_after_its_events() {
    if std::env::var_os(CHILD_VARIABLE).is_none() {
        return;
    }
    telemetry::start(LineFormat::Json, "info", LogSink::stderr(LineFormat::Json).unwrap()).unwrap();
    // The first event wakes the writer thread. The other events would be written when it wakes again.
    (0..3).for_each(|number| info!(event = "before", number, "it comes {LoggingValue}"));
    panic!("on purpose");
}

#[test]
fn log_lines_before_a_panic_are_written_before_its_message() {
    let test = std::env::current_exe().unwrap();
    let arguments = ["--exact", "log::the_child_process_panics_after_its_events", "--nocapture"];
    let output = Command::new(test).args(arguments).env(CHILD_VARIABLE, "1").output().unwrap();
    let stderr = crate::support::program::stderr(&output);
    let (before, after) = stderr
        .split_once("on purpose")
        .unwrap_or_else(|| panic!("the panic message must be printed: {stderr}"));
    assert!(!output.status.success(), "a panic must be a failure");
    let count = |text: &str, pattern: &str| text.matches(pattern).count();
    assert_eq!(
        (count(before, "\"number\":"), count(after, "\"number\":")),
        (3, 0),
        "all events must be written before the panic message: {stderr}"
    );
    assert_eq!(
        count(before, "\"it comes to the point\""),
        3,
        "every message must be formatted completely: {stderr}"
    );
    assert_eq!(
        count(before, "\"event\":\"aside\""),
        3,
        "every event that is logged while a message is formatted must be written: {stderr}"
    );
}
