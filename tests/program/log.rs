//! The log of the program: an unread log delays no request, and no line is lost at shutdown.

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
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Their log lines exceed the buffer of a pipe.
const REQUESTS: usize = 600;

/// A program whose log is not read after the line that it serves.
struct Unread {
    child: Child,
    log: BufReader<ChildStderr>,
    _simulator: Simulator,
}

impl Unread {
    /// Starts a program with this log level and sends the requests.
    async fn after_requests(level: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let simulator = Simulator::start(listener, Plan::of([(KEY, 1_000_000)])).await.unwrap();
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
        let client = keychoir::upstream::http_client().unwrap().timeout(WAIT_MAX).build().unwrap();
        for name in 0..REQUESTS {
            let request = client.get(format!("http://{address}/v1/simulator/echo"));
            let answer = request.header("x-request-id", format!("name-{name}")).send().await.unwrap();
            assert_eq!(answer.status(), 200);
            answer.bytes().await.unwrap();
        }
        Self { child, log, _simulator: simulator }
    }

    /// Stops it; returns its exit code.
    async fn end(mut child: Child) -> Option<i32> {
        assert!(Command::new("kill").arg(child.id().to_string()).status().unwrap().success());
        let ended = tokio::task::spawn_blocking(move || child.wait().unwrap().code());
        tokio::time::timeout(WAIT_MAX, ended).await.unwrap().unwrap()
    }
}

/// The log after all requests, read when they were answered.
async fn said(level: &str) -> Vec<Value> {
    let Unread { child, mut log, _simulator } = Unread::after_requests(level).await;
    let reading = keychoir::tasks::spawn_thread("log", move || {
        let mut text = String::new();
        log.read_to_string(&mut text).map(|_| text)
    });
    assert_eq!(Unread::end(child).await, Some(0));
    let text = reading.unwrap().join().unwrap().unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn an_unread_pipe_stops_no_request_and_keeps_the_order() {
    let events = said("info").await;
    let ended: Vec<&Value> = events.iter().filter(|event| event["event"] == "request_ended").collect();
    let names: Vec<String> = (0..REQUESTS).map(|name| format!("name-{name}")).collect();
    assert_eq!(ended.iter().map(|event| event["request_id"].as_str().unwrap()).collect::<Vec<_>>(), names);
    assert_eq!(events.last().unwrap()["event"], "server_ended");
    for event in ended {
        assert_eq!(event["upstream_host"], "127.0.0.1");
        assert_eq!(event["client_address"], "127.0.0.1");
        assert!(event["user_agent"].is_string() && event["client"] == "local", "{event}");
    }
}

#[tokio::test]
async fn requests_are_not_logged_where_the_level_excludes_them() {
    let events = said("info,keychoir::proxy=warn").await;
    assert_eq!(events.iter().filter(|event| event["event"] == "request_ended").count(), 0);
    assert_eq!(events.last().unwrap()["event"], "server_ended");
}

#[tokio::test]
async fn an_unread_log_does_not_delay_the_end() {
    let Unread { child, log, _simulator } = Unread::after_requests("debug").await;
    assert_eq!(Unread::end(child).await, Some(0));
    drop(log);
}

/// Set for the test that another test runs in a process of its own.
const CHILD: &str = "KEYCHOIR_TEST_PANICS";

/// A value that logs while it is formatted.
struct Talkative;

impl fmt::Display for Talkative {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        info!(event = "aside", "aside");
        f.write_str("to the point")
    }
}

#[test]
fn a_program_that_panics() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    telemetry::start(LineFormat::Json, "info", LogSink::stderr(LineFormat::Json).unwrap()).unwrap();
    // The first one wakes the writing thread, and the others would wait for its next wake.
    (0..3).for_each(|number| info!(event = "before", number, "it comes {Talkative}"));
    panic!("on purpose");
}

#[test]
fn lines_before_a_panic_are_written_before_it() {
    let test = std::env::current_exe().unwrap();
    let arguments = ["--exact", "log::a_program_that_panics", "--nocapture"];
    let output = Command::new(test).args(arguments).env(CHILD, "1").output().unwrap();
    let said = crate::support::program::stderr(&output);
    let (before, after) = said.split_once("on purpose").unwrap_or_else(|| panic!("{said}"));
    assert!(!output.status.success());
    let count = |text: &str, word: &str| text.matches(word).count();
    assert_eq!((count(before, "\"number\":"), count(after, "\"number\":")), (3, 0), "{said}");
    assert_eq!(count(before, "\"it comes to the point\""), 3, "{said}");
    assert_eq!(count(before, "\"event\":\"aside\""), 3, "{said}");
}
