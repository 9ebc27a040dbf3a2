//! A simulated provider that costs much less than any proxy. It sends prepared responses and writes new identifiers
//! into their heads. It checks that each request has the key of the pool and no credential of the client.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use keychoir::tasks::{self, Tasks};
use memchr::memmem;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::tls::Certificates;
use crate::wire;
use crate::workload::{KEY, PACED_BYTES, PACED_MS, TEXT_BYTES, UPLOAD_BYTES, Workload};

/// The time base of paced streams: both ends are in this process.
pub static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
/// Digits of a piece's time, in nanoseconds since then.
pub const STAMP: usize = 16;

/// Bytes of a chunk, similar to the provider's writes.
const CHUNK: usize = 8 * 1024;
/// Maximum bytes per read: most of the input are uploads.
const READ: usize = 256 * 1024;
/// The placeholder for the digits of an identifier.
const BLANK: &[u8] = b"################";

/// Its addresses and counters.
#[derive(Clone, Debug)]
pub struct Upstream {
    pub address: SocketAddr,
    /// The address with TLS.
    pub tls_address: SocketAddr,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    invalid_requests: AtomicU64,
}

impl Upstream {
    /// Listens on a thread of its own until the program ends.
    pub fn start(certificates: &Certificates) -> Self {
        LazyLock::force(&EPOCH);
        let (listener, tls_listener) = (listener(), listener());
        let counters = Arc::new(Counters::default());
        let upstream = Self {
            address: listener.local_addr().unwrap(),
            tls_address: tls_listener.local_addr().unwrap(),
            counters: Arc::clone(&counters),
        };
        let acceptor = TlsAcceptor::from(certificates.server());
        tasks::spawn_thread("upstream", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let responses = Arc::new(PreparedResponses::new());
            runtime.block_on(async {
                let plain = accept(listener, None, Arc::clone(&responses), Arc::clone(&counters));
                tokio::join!(plain, accept(tls_listener, Some(acceptor), responses, counters));
            });
        })
        .unwrap();
        upstream
    }

    /// Requests so far.
    pub fn requests(&self) -> u64 {
        self.counters.requests.load(Relaxed)
    }

    /// Panics if a request had the wrong credentials.
    pub fn assert_credentials_were_replaced(&self, by: &str) {
        let invalid_requests = self.counters.invalid_requests.load(Relaxed);
        assert_eq!(
            invalid_requests, 0,
            "{by}: {invalid_requests} requests came without the key, with the client's, or in part"
        );
    }
}

fn listener() -> std::net::TcpListener {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

async fn accept(
    listener: std::net::TcpListener,
    acceptor: Option<TlsAcceptor>,
    responses: Arc<PreparedResponses>,
    counters: Arc<Counters>,
) {
    let (listener, tasks) = (TcpListener::from_std(listener).unwrap(), Tasks::new());
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (responses, counters) = (Arc::clone(&responses), Arc::clone(&counters));
        match &acceptor {
            None => drop(tasks.spawn(serve(stream, responses, counters))),
            Some(acceptor) => {
                let accepting = acceptor.accept(stream);
                tasks.spawn(async move { serve(accepting.await.ok()?, responses, counters).await });
            }
        }
    }
}

/// One prepared response: each connection copies its head, to write identifiers into it.
#[derive(Clone)]
struct PreparedResponse {
    begin: Vec<u8>,
    blanks: Vec<usize>,
    /// The part that is not copied.
    rest: Arc<[u8]>,
}

impl PreparedResponse {
    fn new(head: &str, body: &[u8]) -> Self {
        let own = body.len().min(2 * CHUNK);
        let begin = [head.as_bytes(), b"\r\n", &body[..own]].concat();
        let blanks = memmem::find_iter(&begin, BLANK).collect();
        Self { begin, blanks, rest: body[own..].into() }
    }

    async fn write(&mut self, stream: &mut (impl AsyncWrite + Unpin), number: u64) -> Option<()> {
        for at in &self.blanks {
            self.begin[*at..*at + BLANK.len()].copy_from_slice(format!("{number:016}").as_bytes());
        }
        stream.write_all(&self.begin).await.ok()?;
        if !self.rest.is_empty() {
            stream.write_all(&self.rest).await.ok()?;
        }
        stream.flush().await.ok()
    }
}

/// The prepared responses, by request.
#[derive(Clone)]
struct PreparedResponses {
    get: PreparedResponse,
    tts: PreparedResponse,
    stream: PreparedResponse,
    upload: PreparedResponse,
    paced: PreparedResponse,
}

impl PreparedResponses {
    fn new() -> Self {
        let bytes = |workload: Workload| usize::try_from(workload.response_bytes(0.0)).unwrap();
        let common = "HTTP/1.1 200 OK\r\ndate: Mon, 24 Nov 2025 10:00:00 GMT\r\nserver: uvicorn\r\n\
                      access-control-allow-origin: *\r\nstrict-transport-security: max-age=31536000\r\n\
                      x-trace-id: ################\r\nx-region: us-central1\r\nvia: 1.1 google\r\n\
                      alt-svc: h3=\":443\"; ma=2592000\r\n";
        let speech = format!(
            "{common}content-type: audio/mpeg\r\ncharacter-cost: 55\r\nrequest-id: Rq{blank}\r\n\
             history-item-id: Hi{blank}\r\ntts-latency-ms: 180\r\ncurrent-concurrent-requests: 1\r\n\
             maximum-concurrent-requests: 1000\r\ntransfer-encoding: chunked\r\n",
            blank = "################"
        );
        let json = |length: usize| {
            let body = format!("{{\"stability\":0.5,\"style\":\"{}\"}}", "x".repeat(length - 28));
            assert_eq!(body.len(), length);
            (format!("{common}content-type: application/json\r\ncontent-length: {length}\r\n"), body)
        };
        let (get, settings) = json(bytes(Workload::Get));
        let (upload, words) = json(bytes(Workload::Upload));
        let upload = upload + "character-cost: 90\r\nrequest-id: Rq################\r\n";
        Self {
            get: PreparedResponse::new(&get, settings.as_bytes()),
            tts: PreparedResponse::new(&speech, &chunked(bytes(Workload::Tts))),
            stream: PreparedResponse::new(&speech, &chunked(bytes(Workload::Stream))),
            upload: PreparedResponse::new(&upload, words.as_bytes()),
            paced: PreparedResponse::new(&speech, &[]),
        }
    }
}

/// Audio of this length in chunks, including the last chunk.
fn chunked(mut length: usize) -> Vec<u8> {
    let mut body = Vec::new();
    while length > 0 {
        let own = length.min(CHUNK);
        body.extend(format!("{own:x}\r\n").as_bytes());
        body.resize(body.len() + own, 0xaa);
        body.extend(b"\r\n");
        length -= own;
    }
    body.extend(b"0\r\n\r\n");
    body
}

/// Serves one connection until it ends.
async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    responses: Arc<PreparedResponses>,
    counters: Arc<Counters>,
) -> Option<()> {
    let mut responses = PreparedResponses::clone(&responses);
    let mut buffer = Vec::with_capacity(READ);
    loop {
        buffer.clear();
        let end = loop {
            some(stream.read_buf(&mut buffer).await.ok()?)?;
            if let Some(end) = wire::head_end(&buffer) {
                break end;
            }
        };
        let (head, behind) = buffer.split_at(end);
        let number = counters.requests.fetch_add(1, Relaxed);
        let (has_only_the_pool_key, mut body, received_request) =
            (has_only_the_pool_key(head), wire::body(head), ReceivedRequest::by(head));
        let (mut count, mut taken) = (behind.len(), 0);
        let mut payload = |chunk: &[u8]| taken += chunk.len();
        assert_eq!(body.take(behind, &mut payload), count, "nothing follows before the answer");
        while !body.is_complete() {
            buffer.clear();
            count = some(stream.read_buf(&mut buffer).await.ok()?)?;
            assert_eq!(body.take(&buffer, &mut payload), count, "nothing follows before the answer");
        }
        if !has_only_the_pool_key || taken != received_request.body_bytes() {
            counters.invalid_requests.fetch_add(1, Relaxed);
        }
        match received_request {
            ReceivedRequest::Get => responses.get.write(&mut stream, number).await?,
            ReceivedRequest::Tts => responses.tts.write(&mut stream, number).await?,
            ReceivedRequest::Stream => responses.stream.write(&mut stream, number).await?,
            ReceivedRequest::Upload => responses.upload.write(&mut stream, number).await?,
            ReceivedRequest::Paced(chunks) => {
                responses.paced.write(&mut stream, number).await?;
                pace(&mut stream, chunks).await?;
            }
        }
    }
}

/// `None` at the end of a connection.
fn some(count: usize) -> Option<usize> {
    (count > 0).then_some(count)
}

/// Writes `chunks` pieces, each at its time and with that time in it.
async fn pace(stream: &mut (impl AsyncWrite + Unpin), chunks: u32) -> Option<()> {
    let begin = Instant::now();
    let mut chunk = format!("{PACED_BYTES:x}\r\n").into_bytes();
    let stamp = chunk.len();
    chunk.resize(stamp + usize::try_from(PACED_BYTES).unwrap(), 0xaa);
    chunk.extend(b"\r\n");
    for number in 0..chunks {
        tokio::time::sleep_until((begin + Duration::from_millis(PACED_MS) * number).into()).await;
        let now = format!("{:016}", EPOCH.elapsed().as_nanos());
        chunk[stamp..stamp + STAMP].copy_from_slice(now.as_bytes());
        stream.write_all(&chunk).await.ok()?;
        stream.flush().await.ok()?;
    }
    stream.write_all(b"0\r\n\r\n").await.ok()?;
    stream.flush().await.ok()
}

/// Whether the head has the pool's key and no credential of the client.
fn has_only_the_pool_key(head: &[u8]) -> bool {
    let mut keys = 0;
    for (name, value) in wire::headers(head) {
        match name.len() {
            10 if name.eq_ignore_ascii_case(b"xi-api-key") => {
                keys += if value.starts_with(KEY.as_bytes()) { 1 } else { 100 };
            }
            13 if name.eq_ignore_ascii_case(b"authorization") => return false,
            16 if name.eq_ignore_ascii_case(b"x-keychoir-token") => return false,
            _ => {}
        }
    }
    keys == 1
}

#[derive(Clone, Copy)]
enum ReceivedRequest {
    Get,
    Tts,
    Stream,
    Upload,
    Paced(u32),
}

impl ReceivedRequest {
    fn body_bytes(self) -> usize {
        match self {
            Self::Get => 0,
            Self::Tts | Self::Stream | Self::Paced(_) => TEXT_BYTES,
            Self::Upload => UPLOAD_BYTES,
        }
    }

    fn by(head: &[u8]) -> Self {
        let line = std::str::from_utf8(&head[..memchr::memchr(b'\r', head).unwrap()]).unwrap();
        let target = line.split(' ').nth(1).unwrap();
        let chunks = target.split_once("pieces=").map(|(_, chunks)| chunks.parse().unwrap());
        match chunks {
            Some(chunks) => Self::Paced(chunks),
            None if line.starts_with("GET ") => Self::Get,
            None if target.starts_with("/v1/speech-to-text") => Self::Upload,
            None if target.contains("/stream") => Self::Stream,
            None => Self::Tts,
        }
    }
}
