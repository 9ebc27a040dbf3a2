//! Allocations of a whole request: from a client's head to the last byte of its response, with a
//! client token, the pool, usage records and a log, on every thread of the program. The client and
//! the provider of this test allocate nothing themselves.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test ends at its first surprise"
)]

mod support;

use std::alloc::System;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use keychoir::config::ClientConfig;
use keychoir::policy::client::Rules;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::Plan;
use keychoir::tasks;
use keychoir::telemetry::{self, LineFormat, LogSink};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::{CLIENT_TOKEN, FIRST_KEY, SPEECH_PATH, VOICE_ID, start_proxy_with};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Requests before the count, until every buffer has its size and every table its entries.
const WARM: usize = 2_000;
const COUNTED: usize = 2_000;

/// Reads a message of known length.
fn read(stream: &mut TcpStream, bytes: usize) {
    let mut room = [0; 32 * 1024];
    stream.read_exact(&mut room[..bytes]).unwrap();
}

/// A provider with a constant response, sent as soon as a request ends with `end`.
fn provider(end: &'static [u8], answer: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    tasks::spawn_thread("provider", move || {
        // A client that sends requests in sequence uses one connection here.
        for stream in listener.incoming() {
            let (mut stream, mut room, mut filled) = (stream.unwrap(), [0; 8 * 1024], 0);
            stream.set_nodelay(true).unwrap();
            while let Ok(read @ 1..) = stream.read(&mut room[filled..]) {
                filled += read;
                if room[..filled].ends_with(end) {
                    stream.write_all(&answer).unwrap();
                    filled = 0;
                }
            }
        }
    })
    .unwrap();
    address
}

/// The length of a response, head and body, as the client receives it.
fn first_answer(stream: &mut TcpStream, body_bytes: usize) -> usize {
    let (mut room, mut filled) = ([0; 32 * 1024], 0);
    loop {
        filled += stream.read(&mut room[filled..]).unwrap();
        if let Some(head) = room[..filled].windows(4).position(|end| end == b"\r\n\r\n")
            && filled >= head + 4 + body_bytes
        {
            assert!(room.starts_with(b"HTTP/1.1 200 OK\r\n"), "{}", String::from_utf8_lossy(&room[..head]));
            return filled;
        }
    }
}

/// Checks the allocations per request, for `request` with the given response.
async fn check(request: String, end: &'static [u8], head: &str, body_bytes: usize, most: usize) {
    let answer = [
        format!("HTTP/1.1 200 OK\r\n{head}content-length: {body_bytes}\r\n\r\n").into_bytes(),
        vec![b'x'; body_bytes],
    ];
    let upstream = provider(end, answer.concat());
    let proxy = start_proxy_with(Plan::of([(FIRST_KEY, 1_000_000)]), |config| {
        config.upstream.base_url = format!("http://{upstream}").parse().unwrap();
        config.quota_polling.enabled = false;
        config.clients = vec![ClientConfig {
            name: "app".to_owned(),
            token: TokenFingerprint::new(CLIENT_TOKEN),
            rules: Rules::default(),
        }];
    })
    .await;
    let address = proxy.app.address();
    let counting = tasks::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let bytes = first_answer(&mut stream, body_bytes);
        let mut ask = |times: usize| {
            for _ in 0..times {
                stream.write_all(request.as_bytes()).unwrap();
                read(&mut stream, bytes);
            }
        };
        ask(WARM);
        let counted = Region::new(ALLOCATOR);
        ask(COUNTED);
        let change = counted.change();
        (change.allocations + change.reallocations).div_ceil(COUNTED)
    });
    let allocations = counting.await.unwrap();
    println!("{allocations} allocations a request");
    assert!(allocations <= most, "{allocations} allocations a request; it was at most {most}");
    // This provider has no ledger to compare the records with.
    drop(proxy);
}

#[tokio::test]
async fn a_request_asks_for_little_memory() {
    telemetry::start(LineFormat::Json, "info", LogSink::queued(std::io::sink(), LineFormat::Json).unwrap())
        .unwrap();
    let request = format!(
        "GET /v1/voices/{VOICE_ID}/settings HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {CLIENT_TOKEN}\r\naccept: */*\r\n\r\n"
    );
    check(request, b"\r\n\r\n", "content-type: application/json\r\n", 200, 19).await;
    let text = format!(r#"{{"text":"{}","model_id":"eleven_multilingual_v2"}}"#, "hello ".repeat(25));
    let request = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {CLIENT_TOKEN}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{text}",
        text.len()
    );
    let head = "content-type: audio/mpeg\r\ncharacter-cost: 1\r\n";
    check(request, b"\"}", head, 16 * 1024, 30).await;
}
