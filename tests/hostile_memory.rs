//! Checks that the binary releases its memory after attacks by clients and by its provider, with the allocator settings
//! of `systemd/keychoir.service`. Within ten seconds after the attacks, the memory must be at most 20 MiB above its
//! value before the attacks. The binary must then still serve requests and stop with exit code 0.
//!
//! Without these settings, glibc raises its thresholds for the return of memory to the system when the first large
//! buffers are freed, and the process then keeps 20 to 60 MiB.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test panics if an expectation fails, and the measured memory is printed"
)]

#[path = "proxy/hostile/mod.rs"]
mod hostile;
mod support;

use std::net::SocketAddr;
use std::time::Duration;

use hostile::clients::{self, AfterSending, exchange};
use hostile::providers::{
    self, ConnectionEnd, Provider, RequestKind, ResponseOutcome, ScriptedResponse, VALID_REQUEST_MARK,
    request,
};
use support::program::{Program, keychoir_command};
use support::{FIRST_KEY, SECOND_KEY, SPEECH_PATH, join_all};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

const MIB: u64 = 1024 * 1024;
const MAX_RETAINED_BYTES: u64 = 20 * MIB;
/// The number of concurrent clients per case.
const CLIENTS_PER_CASE: usize = 4;
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns the bytes in a memory field of `/proc/PID/status` of Keychoir: `VmRSS` is the resident memory, and `VmHWM`
/// is its maximum since the start.
fn memory_bytes(program: &Program, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

async fn assert_valid_requests_are_served(address: SocketAddr) {
    for request_kind in [RequestKind::Voices, RequestKind::Speech] {
        let received =
            exchange(address, &[request(request_kind, VALID_REQUEST_MARK)], AfterSending::ReadToEnd)
                .await
                .unwrap();
        providers::check_outcome(&received, ResponseOutcome::Complete(200)).unwrap();
    }
}

/// Opens `count` connections, sends `bytes` on each of them, and returns the open connections.
async fn open_connections(address: SocketAddr, count: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let connecting = (0..count).map(|_| async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Keychoir may stop reading, so the write has a timeout.
        let _ = timeout(Duration::from_secs(1), stream.write_all(bytes)).await;
        stream
    });
    join_all(connecting).await
}

/// Attacks Keychoir with large and incomplete requests, and with all cases of hostile clients.
async fn attack_as_clients(address: SocketAddr, provider: &Provider) {
    let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {MIB}\r\n\r\n{}", "a".repeat(1024 * 1024));
    provider
        .set_script(ScriptedResponse { chunks: vec![response.into_bytes()], ..ScriptedResponse::default() });
    let incomplete_head =
        format!("GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nx-a: {}", "a".repeat(60_000));
    let body = "a".repeat(1_000_000);
    let incomplete_upload =
        format!("POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2000000\r\n\r\n{body}");
    let chunked_upload = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{}",
        "1;a=b\r\nx\r\n".repeat(20_000)
    );
    let pipelined_requests = String::from_utf8(request(RequestKind::Voices, ""))
        .unwrap()
        .replace("connection: close\r\n", "")
        .repeat(20);
    let mut connections = Vec::new();
    for (count, bytes) in
        [(300, &incomplete_head), (60, &incomplete_upload), (60, &chunked_upload), (60, &pipelined_requests)]
    {
        connections.extend(open_connections(address, count, bytes.as_bytes()).await);
    }
    drop(connections);
    for case in clients::cases() {
        // A client that waits for a timeout of Keychoir would make the test slow, and does not need more memory than
        // other clients.
        let after_sending = if case.after_sending == AfterSending::ReadToEnd {
            AfterSending::HalfClose
        } else {
            case.after_sending
        };
        join_all((0..CLIENTS_PER_CASE).map(|_| exchange(address, &case.chunks, after_sending))).await;
    }
}

/// Responds to requests with all cases of hostile providers.
async fn attack_as_provider(address: SocketAddr, provider: &Provider) {
    for case in providers::cases(FIRST_KEY) {
        let script = ScriptedResponse {
            end: if case.script.end == ConnectionEnd::KeepOpen {
                ConnectionEnd::Close
            } else {
                case.script.end
            },
            ..case.script
        };
        provider.set_script(script);
        let request_bytes = request(case.request_kind, "");
        join_all(
            (0..CLIENTS_PER_CASE)
                .map(|_| exchange(address, std::slice::from_ref(&request_bytes), AfterSending::HalfClose)),
        )
        .await;
    }
    provider.set_script(ScriptedResponse::default());
}

#[tokio::test]
async fn memory_is_released_after_attacks() {
    let directory = tempfile::tempdir().unwrap();
    let provider = Provider::start().await;
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("KEYCHOIR_STORAGE__PATH", directory.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", &provider.url)
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json")
        .env("KEYCHOIR_LOG__LEVEL", "error,keychoir::cli=info")
        .envs(allocator_settings())
        // Refused keys are usable again after a millisecond, so that every attack uses them.
        .envs(COOLDOWNS.map(|name| (format!("KEYCHOIR_POOL__{name}"), "1ms")))
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"));
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address().parse().unwrap();
    assert_valid_requests_are_served(address).await;
    let idle_bytes = memory_bytes(&program, "VmRSS");

    attack_as_clients(address, &provider).await;
    attack_as_provider(address, &provider).await;
    let attacked_bytes = memory_bytes(&program, "VmRSS");
    let recovery = timeout(RECOVERY_TIMEOUT, async {
        while memory_bytes(&program, "VmRSS") > idle_bytes + MAX_RETAINED_BYTES {
            assert_valid_requests_are_served(address).await;
        }
    });
    let is_memory_released = recovery.await.is_ok();
    let (final_bytes, peak_bytes) = (memory_bytes(&program, "VmRSS"), memory_bytes(&program, "VmHWM"));
    let [idle_mib, attacked_mib, final_mib, peak_mib] =
        [idle_bytes, attacked_bytes, final_bytes, peak_bytes].map(|bytes| bytes / MIB);
    println!(
        "memory: {idle_mib} MiB idle, {peak_mib} MiB at the peak, {attacked_mib} MiB after the attacks, \
         {final_mib} MiB at the end"
    );
    assert!(
        is_memory_released,
        "the memory must be released: {final_mib} MiB at the end, {peak_mib} MiB at the peak, {idle_mib} MiB idle"
    );
    assert!(peak_bytes > idle_bytes, "the attacks must increase the memory of the process");
    assert_valid_requests_are_served(address).await;
    assert_eq!(program.terminate().0, Some(0));
}

/// Returns the allocator settings of the systemd unit.
fn allocator_settings() -> Vec<(&'static str, &'static str)> {
    let lines = include_str!("../systemd/keychoir.service").lines();
    let settings: Vec<_> = lines
        .filter_map(|line| line.strip_prefix("Environment="))
        .flat_map(|line| line.split(' '))
        .filter(|setting| setting.starts_with("MALLOC_"))
        .map(|setting| setting.split_once('=').unwrap())
        .collect();
    assert_eq!(settings.len(), 2, "the unit must contain two allocator settings: {settings:?}");
    settings
}

/// The settings of `[pool]` that determine how long a refused key is not used.
const COOLDOWNS: [&str; 8] = [
    "MAX_RETRY_AFTER",
    "RATE_LIMITED_COOLDOWN",
    "EXHAUSTED_COOLDOWN",
    "INVALID_CONFIRM_COOLDOWN",
    "INVALID_COOLDOWN",
    "UNPROVEN_COOLDOWN",
    "BILLING_COOLDOWN",
    "PROBE_AFTER",
];
