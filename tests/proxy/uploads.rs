//! Bodies of any size and timing survive the refusal of a key at any moment before the response
//! starts: the next key receives every byte, once.

use crate::support::{FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, join_all, start_proxy, start_proxy_with};
use keychoir::simulator::{Ledger, Plan};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

fn rich() -> Plan {
    Plan::of(KEYS.map(|key| (key, 100_000_000)))
}

fn content(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How the length of a body is announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Length,
    Chunked,
}

/// Sends `body` in pieces as fast as it is accepted; returns the status line of the response.
async fn upload(proxy: &TestProxy, body: &[u8], framing: Framing, extra: &str) -> String {
    let (read, mut write) = TcpStream::connect(proxy.app.address()).await.unwrap().into_split();
    let length = match framing {
        Framing::Length => format!("content-length: {}", body.len()),
        Framing::Chunked => "transfer-encoding: chunked".to_owned(),
    };
    let head = format!(
        "POST /v1/simulator/echo HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: multipart/form-data; boundary=x\r\n{extra}{length}\r\n\r\n"
    );
    let body = body.to_vec();
    let sending = async move {
        write.write_all(head.as_bytes()).await?;
        for piece in body.chunks(30_011) {
            if framing == Framing::Chunked {
                write.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await?;
            }
            write.write_all(piece).await?;
            if framing == Framing::Chunked {
                write.write_all(b"\r\n").await?;
            }
        }
        if framing == Framing::Chunked {
            write.write_all(b"0\r\n\r\n").await?;
        }
        Ok::<_, std::io::Error>(write)
    };
    // An early end of the response may stop the sending; only the response counts.
    let (_sent, answer) = tokio::join!(sending, first_line(read));
    answer
}

async fn first_line(mut read: OwnedReadHalf) -> String {
    let mut answer = Vec::new();
    let _ = read.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

/// Hashes of the bodies that were completely received and served.
fn served(ledger: &Ledger) -> Vec<&str> {
    let uploads = ledger.requests_to("/v1/simulator/echo");
    uploads.filter(|upload| upload.status == Some(200)).map(|upload| &*upload.body_sha256).collect()
}

async fn check(faults: [&str; 2], sizes: &[usize]) {
    let proxy = start_proxy(rich()).await;
    let mut expected = Vec::new();
    for &bytes in sizes {
        for framing in [Framing::Length, Framing::Chunked] {
            // Keys in a cooldown would not be tried again: each upload meets two new refusals.
            let body = content(bytes);
            for (key, fault) in KEYS.iter().zip(faults) {
                proxy.simulator.script(key, vec![fault.parse().unwrap()]);
            }
            let answer = upload(&proxy, &body, framing, "").await;
            assert_eq!(answer, "HTTP/1.1 200 OK", "{faults:?} {bytes} {framing:?}");
            expected.push(sha256(&body));
        }
    }
    let (ledger, _) = proxy.close().await;
    assert_eq!(served(&ledger), expected);
}

const SIZES: [usize; 5] = [0, 10_000, 200_000, 2_000_000, 32_000_000];

#[tokio::test]
async fn an_upload_is_sent_again_after_a_refusal_at_its_end() {
    check(["missing_permissions", "pass"], &SIZES).await;
}

#[tokio::test]
async fn an_upload_is_sent_again_after_a_refusal_before_its_end() {
    check(["early:missing_permissions", "pass"], &SIZES).await;
}

#[tokio::test]
async fn an_upload_is_sent_again_after_a_refusal_in_its_middle() {
    check(["mid=5000:missing_permissions", "pass"], &SIZES).await;
    check(["mid=1000000:missing_permissions", "pass"], &SIZES[3..]).await;
}

#[tokio::test]
async fn an_upload_is_sent_again_after_a_refusal_that_puts_the_key_in_cooldown() {
    for fault in
        ["quota", "early:quota", "insufficient_credits", "early:quota_403", "rate_limit", "early:concurrency"]
    {
        let proxy = start_proxy(rich()).await;
        proxy.set_fault(FIRST_KEY, fault);
        proxy.set_fault(SECOND_KEY, fault);
        let body = content(3_000_000);
        assert_eq!(upload(&proxy, &body, Framing::Chunked, "").await, "HTTP/1.1 200 OK", "{fault}");
        assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1], "{fault}");
        let (ledger, _) = proxy.close().await;
        assert_eq!(served(&ledger), [sha256(&body)], "{fault}");
    }
}

#[tokio::test]
async fn a_client_that_expects_100_gets_it() {
    let proxy = start_proxy(rich()).await;
    proxy.set_fault(FIRST_KEY, "quota");
    let body = content(500_000);
    let answer = upload(&proxy, &body, Framing::Length, "expect: 100-continue\r\n").await;
    assert_eq!(answer, "HTTP/1.1 100 Continue");
    let (ledger, _) = proxy.close().await;
    assert_eq!(served(&ledger), [sha256(&body)]);
}

#[tokio::test]
async fn a_request_beyond_the_buffer_is_sent_and_its_refusal_is_relayed() {
    let proxy = start_proxy_with(rich(), |config| {
        config.retry.buffer_size = 1_000;
        config.retry.spill_size = 1_000_000;
    })
    .await;
    let body = content(5_000_000);
    assert_eq!(upload(&proxy, &body, Framing::Chunked, "").await, "HTTP/1.1 200 OK");
    proxy.set_fault(FIRST_KEY, "quota");
    assert_eq!(upload(&proxy, &body, Framing::Chunked, "").await, "HTTP/1.1 401 Unauthorized");
    assert_eq!(proxy.request_counts(&KEYS), [2, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_disk_that_cannot_be_written_costs_the_replay_and_not_the_request() {
    let proxy = start_proxy_with(rich(), |config| {
        config.retry.buffer_size = 1_000;
        config.retry.spill_directory = "/nonexistent".into();
    })
    .await;
    let body = content(5_000_000);
    assert_eq!(upload(&proxy, &body, Framing::Length, "").await, "HTTP/1.1 200 OK");
    let (ledger, _) = proxy.close().await;
    assert_eq!(served(&ledger), [sha256(&body)]);
}

#[tokio::test]
async fn uploads_at_once_do_not_mix() {
    let proxy = start_proxy_with(rich(), |config| config.retry.buffer_size = 10_000).await;
    proxy.set_fault(FIRST_KEY, "early:missing_permissions");
    let bodies: Vec<Vec<u8>> = (0..8).map(|n| content(1_000_000 + n)).collect();
    let uploads = bodies.iter().map(|body| upload(&proxy, body, Framing::Chunked, ""));
    for answer in join_all(uploads).await {
        assert_eq!(answer, "HTTP/1.1 200 OK");
    }
    let (ledger, _) = proxy.close().await;
    let mut arrived: Vec<String> = served(&ledger).into_iter().map(str::to_owned).collect();
    let mut expected: Vec<String> = bodies.iter().map(|body| sha256(body)).collect();
    arrived.sort();
    expected.sort();
    assert_eq!(arrived, expected);
}
