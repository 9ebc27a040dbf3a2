//! Tests retries of uploads: if a key is refused at any moment of an upload, the next key receives the complete
//! body, in both framings. The refusal is relayed if the body exceeds the buffers. Without a writable spill directory,
//! an upload is sent without a retry. A client that expects `100 Continue` receives it.

use crate::support::{FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, join_all, start_proxy, start_proxy_with};
use keychoir::simulator::{Ledger, Plan};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

fn funded_plan() -> Plan {
    Plan::with_keys(KEYS.map(|key| (key, 100_000_000)))
}

/// Returns a body of this length without repetitions near each other, so that a lost or repeated chunk changes it.
fn body_of_length(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|index| u8::try_from(index * 31 % 251).unwrap()).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The framing of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    ContentLength,
    Chunked,
}

/// Sends `body` in chunks as fast as the proxy accepts them. Returns the status line of the response.
async fn upload(proxy: &TestProxy, body: &[u8], framing: Framing, extra_headers: &str) -> String {
    let (reader, mut writer) = TcpStream::connect(proxy.app.address()).await.unwrap().into_split();
    let length = match framing {
        Framing::ContentLength => format!("content-length: {}", body.len()),
        Framing::Chunked => "transfer-encoding: chunked".to_owned(),
    };
    let head = format!(
        "POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: multipart/form-data; boundary=x\r\n{extra_headers}{length}\r\n\r\n"
    );
    let body = body.to_vec();
    let sender = async move {
        writer.write_all(head.as_bytes()).await?;
        for chunk in body.chunks(30_011) {
            if framing == Framing::Chunked {
                writer.write_all(format!("{:x}\r\n", chunk.len()).as_bytes()).await?;
            }
            writer.write_all(chunk).await?;
            if framing == Framing::Chunked {
                writer.write_all(b"\r\n").await?;
            }
        }
        if framing == Framing::Chunked {
            writer.write_all(b"0\r\n\r\n").await?;
        }
        Ok::<_, std::io::Error>(writer)
    };
    // The proxy may close the connection before the whole body is sent, so only the response is checked.
    let (_upload_result, response) = tokio::join!(sender, read_status_line(reader));
    response
}

/// Reads to the end of the connection and returns the first line.
async fn read_status_line(mut reader: OwnedReadHalf) -> String {
    let mut response = Vec::new();
    let _ = reader.read_to_end(&mut response).await;
    String::from_utf8_lossy(&response).lines().next().unwrap_or_default().to_owned()
}

/// Returns the SHA-256 of the body of each upload that the provider has served, in order.
fn served_bodies(ledger: &Ledger) -> Vec<&str> {
    let uploads = ledger.requests_to("/v1/simulator/echo");
    uploads.filter(|upload| upload.status == Some(200)).map(|upload| &*upload.body_sha256).collect()
}

/// Uploads bodies of the given `sizes` while the provider refuses the first keys with the given `faults`.
async fn check_retried_uploads(faults: [&str; 2], sizes: &[usize]) {
    let proxy = start_proxy(funded_plan()).await;
    let mut expected = Vec::new();
    for &bytes in sizes {
        for framing in [Framing::ContentLength, Framing::Chunked] {
            // The faults are queued for each upload, and start no cooldown, so that every key is tried.
            let body = body_of_length(bytes);
            for (key, fault) in KEYS.iter().zip(faults) {
                proxy.simulator.queue_faults(key, vec![fault.parse().unwrap()]);
            }
            let response = upload(&proxy, &body, framing, "").await;
            assert_eq!(
                response, "HTTP/1.1 200 OK",
                "{faults:?}: the upload of {bytes} bytes must be served with {framing:?}"
            );
            expected.push(sha256(&body));
        }
    }
    let (ledger, _) = proxy.close().await;
    assert_eq!(served_bodies(&ledger), expected);
}

const SIZES: [usize; 5] = [0, 10_000, 200_000, 2_000_000, 32_000_000];

#[tokio::test]
async fn an_upload_is_retried_after_a_refusal_at_its_end() {
    check_retried_uploads(["missing_permissions", "pass"], &SIZES).await;
}

#[tokio::test]
async fn an_upload_is_retried_after_a_refusal_before_its_body() {
    check_retried_uploads(["early:missing_permissions", "pass"], &SIZES).await;
}

#[tokio::test]
async fn an_upload_is_retried_after_a_refusal_in_the_middle_of_its_body() {
    check_retried_uploads(["mid=5000:missing_permissions", "pass"], &SIZES).await;
    check_retried_uploads(["mid=1000000:missing_permissions", "pass"], &SIZES[3..]).await;
}

#[tokio::test]
async fn an_upload_is_retried_after_a_refusal_that_starts_a_cooldown() {
    for fault in
        ["quota", "early:quota", "insufficient_credits", "early:quota_403", "rate_limit", "early:concurrency"]
    {
        let proxy = start_proxy(funded_plan()).await;
        proxy.set_fault(FIRST_KEY, fault);
        proxy.set_fault(SECOND_KEY, fault);
        let body = body_of_length(3_000_000);
        assert_eq!(
            upload(&proxy, &body, Framing::Chunked, "").await,
            "HTTP/1.1 200 OK",
            "{fault}: the upload must be served"
        );
        assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1], "{fault}: each key must be tried once");
        let (ledger, _) = proxy.close().await;
        assert_eq!(
            served_bodies(&ledger),
            [sha256(&body)],
            "{fault}: the last key must receive the complete body"
        );
    }
}

#[tokio::test]
async fn a_client_that_expects_100_continue_receives_it() {
    let proxy = start_proxy(funded_plan()).await;
    proxy.set_fault(FIRST_KEY, "quota");
    let body = body_of_length(500_000);
    let response = upload(&proxy, &body, Framing::ContentLength, "expect: 100-continue\r\n").await;
    assert_eq!(response, "HTTP/1.1 100 Continue", "the interim response must come first");
    let (ledger, _) = proxy.close().await;
    assert_eq!(served_bodies(&ledger), [sha256(&body)]);
}

#[tokio::test]
async fn an_upload_above_the_buffer_sizes_is_sent_and_its_refusal_is_relayed() {
    let proxy = start_proxy_with(funded_plan(), |config| {
        config.retry.buffer_size = 1_000;
        config.retry.spill_size = 1_000_000;
    })
    .await;
    let body = body_of_length(5_000_000);
    assert_eq!(upload(&proxy, &body, Framing::Chunked, "").await, "HTTP/1.1 200 OK");
    proxy.set_fault(FIRST_KEY, "quota");
    assert_eq!(upload(&proxy, &body, Framing::Chunked, "").await, "HTTP/1.1 401 Unauthorized");
    assert_eq!(proxy.request_counts(&KEYS), [2, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn an_unwritable_spill_directory_disables_retries_but_not_the_request() {
    let proxy = start_proxy_with(funded_plan(), |config| {
        config.retry.buffer_size = 1_000;
        config.retry.spill_directory = "/nonexistent".into();
    })
    .await;
    let body = body_of_length(5_000_000);
    assert_eq!(upload(&proxy, &body, Framing::ContentLength, "").await, "HTTP/1.1 200 OK");
    let (ledger, _) = proxy.close().await;
    assert_eq!(served_bodies(&ledger), [sha256(&body)]);
}

#[tokio::test]
async fn concurrent_uploads_are_not_mixed_up() {
    let proxy = start_proxy_with(funded_plan(), |config| config.retry.buffer_size = 10_000).await;
    proxy.set_fault(FIRST_KEY, "early:missing_permissions");
    let bodies: Vec<Vec<u8>> = (0..8).map(|index| body_of_length(1_000_000 + index)).collect();
    let uploads = bodies.iter().map(|body| upload(&proxy, body, Framing::Chunked, ""));
    for response in join_all(uploads).await {
        assert_eq!(response, "HTTP/1.1 200 OK");
    }
    let (ledger, _) = proxy.close().await;
    let mut received: Vec<String> = served_bodies(&ledger).into_iter().map(str::to_owned).collect();
    let mut expected: Vec<String> = bodies.iter().map(|body| sha256(body)).collect();
    received.sort();
    expected.sort();
    assert_eq!(received, expected);
}
