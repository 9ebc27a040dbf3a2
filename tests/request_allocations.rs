//! Checks that a GET request and a speech request through Keychoir do not exceed their maximum mean number of
//! allocations. All threads count, from the request head to the last byte of the response, with a client token, the
//! pool, usage records and the access log. The client and the provider of the test do not allocate during the count.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test panics if an expectation fails, and the measured numbers are printed"
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

/// The number of requests before the allocations are counted. During these requests, buffers and tables grow to their
/// final size.
const WARM_UP_REQUESTS: usize = 2_000;
const COUNTED_REQUESTS: usize = 2_000;
/// The maximum mean number of allocations of each request.
const MAX_GET_ALLOCATIONS: usize = 19;
const MAX_SPEECH_ALLOCATIONS: usize = 30;

/// Reads a response whose head and body have `length` bytes together.
fn read_response(stream: &mut TcpStream, length: usize) {
    let mut buffer = [0; 32 * 1024];
    stream.read_exact(&mut buffer[..length]).unwrap();
}

/// Starts a provider that sends a constant response when a request ends with `request_end`.
fn start_provider(request_end: &'static [u8], response: Vec<u8>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    tasks::spawn_thread("provider", move || {
        // Keychoir opens one connection, because the client sends its requests one after the other.
        for stream in listener.incoming() {
            let (mut stream, mut buffer, mut filled) = (stream.unwrap(), [0; 8 * 1024], 0);
            stream.set_nodelay(true).unwrap();
            while let Ok(read @ 1..) = stream.read(&mut buffer[filled..]) {
                filled += read;
                if buffer[..filled].ends_with(request_end) {
                    stream.write_all(&response).unwrap();
                    filled = 0;
                }
            }
        }
    })
    .unwrap();
    address
}

/// Reads the first response, whose length is not known in advance. Returns its length, including its head.
fn read_first_response(stream: &mut TcpStream, body_bytes: usize) -> usize {
    let (mut buffer, mut filled) = ([0; 32 * 1024], 0);
    loop {
        filled += stream.read(&mut buffer[filled..]).unwrap();
        if let Some(head_end) = buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n")
            && filled >= head_end + 4 + body_bytes
        {
            assert!(
                buffer.starts_with(b"HTTP/1.1 200 OK\r\n"),
                "the response must have the status 200: {}",
                String::from_utf8_lossy(&buffer[..head_end])
            );
            return filled;
        }
    }
}

/// Checks that a request causes at most `max_allocations` allocations and reallocations on average. The provider sends
/// a response with the headers `head` and `body_bytes` bytes when a request ends with `request_end`.
async fn check_allocations(
    request: String,
    request_end: &'static [u8],
    head: &str,
    body_bytes: usize,
    max_allocations: usize,
) {
    let response = [
        format!("HTTP/1.1 200 OK\r\n{head}content-length: {body_bytes}\r\n\r\n").into_bytes(),
        vec![b'x'; body_bytes],
    ];
    let upstream = start_provider(request_end, response.concat());
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 1_000_000)]), |config| {
        config.upstream.base_url = format!("http://{upstream}").parse().unwrap();
        config.quota_polling.enabled = false;
        config.clients =
            vec![ClientConfig::new("app".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), Rules::default())];
    })
    .await;
    let address = proxy.app.address();
    let client_task = tasks::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let response_length = read_first_response(&mut stream, body_bytes);
        let mut send_requests = |count: usize| {
            for _ in 0..count {
                stream.write_all(request.as_bytes()).unwrap();
                read_response(&mut stream, response_length);
            }
        };
        send_requests(WARM_UP_REQUESTS);
        let region = Region::new(ALLOCATOR);
        send_requests(COUNTED_REQUESTS);
        let counted = region.change();
        (counted.allocations + counted.reallocations).div_ceil(COUNTED_REQUESTS)
    });
    let allocations = client_task.await.unwrap();
    println!("{allocations} allocations per request");
    assert!(
        allocations <= max_allocations,
        "a request must cause at most {max_allocations} allocations, not {allocations}"
    );
    // `close` would compare the usage records with the ledger of the simulator, which received no request.
    drop(proxy);
}

#[tokio::test]
async fn a_request_does_not_exceed_its_maximum_number_of_allocations() {
    telemetry::start(LineFormat::Json, "info", LogSink::queued(std::io::sink(), LineFormat::Json).unwrap())
        .unwrap();
    let request = format!(
        "GET /v1/voices/{VOICE_ID}/settings HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {CLIENT_TOKEN}\r\naccept: */*\r\n\r\n"
    );
    check_allocations(request, b"\r\n\r\n", "content-type: application/json\r\n", 200, MAX_GET_ALLOCATIONS)
        .await;
    let text = format!(r#"{{"text":"{}","model_id":"eleven_multilingual_v2"}}"#, "hello ".repeat(25));
    let request = format!(
        "POST {SPEECH_PATH} HTTP/1.1\r\nhost: localhost\r\nxi-api-key: {CLIENT_TOKEN}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{text}",
        text.len()
    );
    let head = "content-type: audio/mpeg\r\ncharacter-cost: 1\r\n";
    check_allocations(request, b"\"}", head, 16 * 1024, MAX_SPEECH_ALLOCATIONS).await;
}
