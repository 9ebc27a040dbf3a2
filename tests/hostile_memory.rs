//! Memory of the real binary, with the allocator settings of `systemd/keychoir.service`, after
//! attacks by clients and by its provider: within ten seconds it is back within 20 MiB of its value
//! before them.
//!
//! Without these settings glibc's thresholds grow with the first large buffers that are freed, and
//! 20 to 60 MiB stay with the process. Further attacks do not add to them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test ends at its first surprise, and this one prints what it measured"
)]

#[path = "proxy/hostile/mod.rs"]
mod hostile;
mod support;

use std::net::SocketAddr;
use std::time::Duration;

use hostile::clients::{self, Then, exchange};
use hostile::providers::{self, Ask, End, HONEST, Outcome, Provider, Says, request};
use support::program::{Program, keychoir_command};
use support::{FIRST_KEY, SECOND_KEY, SPEECH_PATH, join_all};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

const MIB: u64 = 1024 * 1024;
const LEFT_MAX: u64 = 20 * MIB;
/// Concurrent clients per row.
const AT_ONCE: usize = 4;
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(10);

/// A memory figure of a process in bytes, by the name of its line in `/proc/PID/status`.
fn memory(program: &Program, field: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

async fn serve_honestly(address: SocketAddr) {
    for ask in [Ask::Voices, Ask::Speech] {
        let got = exchange(address, &[request(ask, HONEST)], Then::Read).await.unwrap();
        providers::check(&got, Outcome::Whole(200)).unwrap();
    }
}

/// Connections that send bytes at once and are left open.
async fn held(address: SocketAddr, count: usize, bytes: &[u8]) -> Vec<TcpStream> {
    let holding = (0..count).map(|_| async move {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // Unread data is not waited for.
        let _ = timeout(Duration::from_secs(1), stream.write_all(bytes)).await;
        stream
    });
    join_all(holding).await
}

async fn attack_as_clients(address: SocketAddr, provider: &Provider) {
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {MIB}\r\n\r\n{}", "a".repeat(1024 * 1024));
    provider.says(Says { pieces: vec![answer.into_bytes()], ..Says::default() });
    let head = format!("GET /v1/voices HTTP/1.1\r\nhost: localhost\r\nx-a: {}", "a".repeat(60_000));
    let body = "a".repeat(1_000_000);
    let upload =
        format!("POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2000000\r\n\r\n{body}");
    let chunks = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n{}",
        "1;a=b\r\nx\r\n".repeat(20_000)
    );
    let unread =
        String::from_utf8(request(Ask::Voices, "")).unwrap().replace("connection: close\r\n", "").repeat(20);
    let mut open = Vec::new();
    for (count, bytes) in [(300, &head), (60, &upload), (60, &chunks), (60, &unread)] {
        open.extend(held(address, count, bytes.as_bytes()).await);
    }
    drop(open);
    for row in clients::table() {
        // Waiting for the program's timeouts would hold no more memory than other rows do.
        let then = if row.then == Then::Read { Then::HalfClose } else { row.then };
        join_all((0..AT_ONCE).map(|_| exchange(address, &row.pieces, then))).await;
    }
}

async fn attack_as_provider(address: SocketAddr, provider: &Provider) {
    for row in providers::table(FIRST_KEY) {
        let says =
            Says { end: if row.says.end == End::Open { End::Close } else { row.says.end }, ..row.says };
        provider.says(says);
        let asked = request(row.ask, "");
        join_all((0..AT_ONCE).map(|_| exchange(address, std::slice::from_ref(&asked), Then::HalfClose)))
            .await;
    }
    provider.says(Says::default());
}

#[tokio::test]
async fn memory_comes_back_after_attacks() {
    let folder = tempfile::tempdir().unwrap();
    let provider = Provider::start().await;
    let mut command = keychoir_command(&["serve", "--listen", "127.0.0.1:0"]);
    command
        .env("KEYCHOIR_STORAGE__PATH", folder.path().join("keychoir.db"))
        .env("KEYCHOIR_UPSTREAM__BASE_URL", &provider.url)
        .env("KEYCHOIR_QUOTA_POLLING__ENABLED", "false")
        .env("KEYCHOIR_LOG__FORMAT", "json")
        .env("KEYCHOIR_LOG__LEVEL", "error,keychoir::cli=info")
        .envs(allocator())
        // Refused keys return immediately, so that every attack finds them.
        .envs(COOLDOWNS.map(|name| (format!("KEYCHOIR_POOL__{name}"), "1ms")))
        .env("ELEVENLABS_API_KEYS", format!("{FIRST_KEY},{SECOND_KEY}"));
    let mut program = Program::start(&mut command);
    let address = program.wait_for_address().parse().unwrap();
    serve_honestly(address).await;
    let idle = memory(&program, "VmRSS");

    attack_as_clients(address, &provider).await;
    attack_as_provider(address, &provider).await;
    let attacked = memory(&program, "VmRSS");
    let recovered = timeout(RECOVERY_TIMEOUT, async {
        while memory(&program, "VmRSS") > idle + LEFT_MAX {
            serve_honestly(address).await;
        }
    });
    let is_recovered = recovered.await.is_ok();
    let (now, peak) = (memory(&program, "VmRSS"), memory(&program, "VmHWM"));
    let [idle, attacked, now, peak] = [idle, attacked, now, peak].map(|bytes| bytes / MIB);
    println!(
        "memory: {idle} MiB idle, {peak} MiB at the most, {attacked} MiB after the attacks, {now} MiB now"
    );
    assert!(is_recovered, "{now} MiB are left of {peak}, and {idle} were there before");
    assert!(peak > idle, "the attacks took something");
    serve_honestly(address).await;
    assert_eq!(program.terminate().0, Some(0));
}

/// The allocator settings of the unit.
fn allocator() -> Vec<(&'static str, &'static str)> {
    let lines = include_str!("../systemd/keychoir.service").lines();
    let settings: Vec<_> = lines
        .filter_map(|line| line.strip_prefix("Environment="))
        .flat_map(|line| line.split(' '))
        .filter(|setting| setting.starts_with("MALLOC_"))
        .map(|setting| setting.split_once('=').unwrap())
        .collect();
    assert_eq!(settings.len(), 2, "{settings:?}");
    settings
}

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
