//! Simulates the provider with much less processor time than any proxy needs, with and without TLS. The provider sends
//! prepared responses with new identifiers in their heads. It counts the requests, and checks that each one contains
//! the key of the pool, no client credential, and a complete body.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use keychoir::tasks::{self, Tasks};
use memchr::memmem;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use crate::http1;
use crate::tls::Certificates;
use crate::workload::{
    PACED_CHUNK_BYTES, PACED_INTERVAL_MS, POOL_KEY, SPEECH_BODY_BYTES, UPLOAD_BODY_BYTES, Workload,
};

/// The time base of the timestamps in paced streams. The provider and the clients are in the same process.
pub static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
/// The number of digits of a timestamp, which is the time of a chunk in nanoseconds since `EPOCH`.
pub const TIMESTAMP_DIGITS: usize = 16;

/// Bytes per chunk, similar to the chunks of the provider.
const CHUNK_BYTES: usize = 8 * 1024;
/// The maximum number of bytes per read. It is large, because uploads are most of the input.
const MAX_READ_BYTES: usize = 256 * 1024;
/// The placeholder for the digits of an identifier.
const PLACEHOLDER: &[u8] = b"################";

/// The addresses and counters of the simulated provider.
#[derive(Clone, Debug)]
pub struct Upstream {
    pub address: SocketAddr,
    /// The address with TLS.
    pub tls_address: SocketAddr,
    counters: Arc<Counters>,
}

/// The counters of all connections.
#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    invalid_requests: AtomicU64,
}

impl Upstream {
    /// Starts the provider on a separate thread. It runs until the program ends.
    pub fn start(certificates: &Certificates) -> Self {
        LazyLock::force(&EPOCH);
        let (listener, tls_listener) = (bind_listener(), bind_listener());
        let counters = Arc::new(Counters::default());
        let upstream = Self {
            address: listener.local_addr().unwrap(),
            tls_address: tls_listener.local_addr().unwrap(),
            counters: Arc::clone(&counters),
        };
        let acceptor = TlsAcceptor::from(certificates.server_config());
        tasks::spawn_thread("upstream", move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let responses = Arc::new(PreparedResponses::new());
            runtime.block_on(async {
                let plain = accept_connections(listener, None, Arc::clone(&responses), Arc::clone(&counters));
                tokio::join!(plain, accept_connections(tls_listener, Some(acceptor), responses, counters));
            });
        })
        .unwrap();
        upstream
    }

    /// Returns the number of requests since startup.
    pub fn request_count(&self) -> u64 {
        self.counters.requests.load(Relaxed)
    }

    /// Panics if a request had wrong credentials or an incomplete body.
    pub fn assert_requests_were_valid(&self, peer_name: &str) {
        let invalid_requests = self.counters.invalid_requests.load(Relaxed);
        assert_eq!(
            invalid_requests, 0,
            "{peer_name} must replace the credentials and forward complete bodies"
        );
    }
}

fn bind_listener() -> std::net::TcpListener {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

async fn accept_connections(
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
                let handshake = acceptor.accept(stream);
                tasks.spawn(async move { serve(handshake.await.ok()?, responses, counters).await });
            }
        }
    }
}

/// A prepared response. Each connection has a copy of its start, to write identifiers into the head.
#[derive(Clone)]
struct PreparedResponse {
    /// The head and the first bytes of the body.
    start: Vec<u8>,
    /// The indices of the placeholders in `start`.
    placeholders: Vec<usize>,
    /// The remaining body, which all connections share.
    rest: Arc<[u8]>,
}

impl PreparedResponse {
    fn new(head: &str, body: &[u8]) -> Self {
        let (body_start, rest) = body.split_at(body.len().min(2 * CHUNK_BYTES));
        let start = [head.as_bytes(), b"\r\n", body_start].concat();
        let placeholders = memmem::find_iter(&start, PLACEHOLDER).collect();
        Self { start, placeholders, rest: rest.into() }
    }

    /// Writes the response with `number` in its identifiers. Returns `None` at the end of the connection.
    async fn write(&mut self, stream: &mut (impl AsyncWrite + Unpin), number: u64) -> Option<()> {
        for index in &self.placeholders {
            self.start[*index..*index + PLACEHOLDER.len()]
                .copy_from_slice(format!("{number:016}").as_bytes());
        }
        stream.write_all(&self.start).await.ok()?;
        if !self.rest.is_empty() {
            stream.write_all(&self.rest).await.ok()?;
        }
        stream.flush().await.ok()
    }
}

/// The prepared responses, by workload.
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
        let common_headers = "HTTP/1.1 200 OK\r\ndate: Mon, 24 Nov 2025 10:00:00 GMT\r\nserver: uvicorn\r\n\
                      access-control-allow-origin: *\r\nstrict-transport-security: max-age=31536000\r\n\
                      x-trace-id: ################\r\nx-region: us-central1\r\nvia: 1.1 google\r\n\
                      alt-svc: h3=\":443\"; ma=2592000\r\n";
        let speech_head = format!(
            "{common_headers}content-type: audio/mpeg\r\ncharacter-cost: 55\r\nrequest-id: Rq{blank}\r\n\
             history-item-id: Hi{blank}\r\ntts-latency-ms: 180\r\ncurrent-concurrent-requests: 1\r\n\
             maximum-concurrent-requests: 1000\r\ntransfer-encoding: chunked\r\n",
            blank = "################"
        );
        let json_response = |length: usize| {
            let body = format!("{{\"stability\":0.5,\"style\":\"{}\"}}", "x".repeat(length - 28));
            assert_eq!(body.len(), length);
            (format!("{common_headers}content-type: application/json\r\ncontent-length: {length}\r\n"), body)
        };
        let (get_head, get_body) = json_response(bytes(Workload::Get));
        let (upload_head, upload_body) = json_response(bytes(Workload::Upload));
        let upload_head = upload_head + "character-cost: 90\r\nrequest-id: Rq################\r\n";
        Self {
            get: PreparedResponse::new(&get_head, get_body.as_bytes()),
            tts: PreparedResponse::new(&speech_head, &chunked_audio(bytes(Workload::Tts))),
            stream: PreparedResponse::new(&speech_head, &chunked_audio(bytes(Workload::Stream))),
            upload: PreparedResponse::new(&upload_head, upload_body.as_bytes()),
            paced: PreparedResponse::new(&speech_head, &[]),
        }
    }
}

/// Encodes `length` bytes of audio in chunks, including the last chunk.
fn chunked_audio(mut length: usize) -> Vec<u8> {
    let mut body = Vec::new();
    while length > 0 {
        let chunk_length = length.min(CHUNK_BYTES);
        body.extend(format!("{chunk_length:x}\r\n").as_bytes());
        body.resize(body.len() + chunk_length, 0xaa);
        body.extend(b"\r\n");
        length -= chunk_length;
    }
    body.extend(b"0\r\n\r\n");
    body
}

/// Serves one connection until it ends. Returns `None` at its end.
async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    responses: Arc<PreparedResponses>,
    counters: Arc<Counters>,
) -> Option<()> {
    let mut responses = PreparedResponses::clone(&responses);
    let mut buffer = Vec::with_capacity(MAX_READ_BYTES);
    loop {
        buffer.clear();
        let end = loop {
            read_bytes(&mut stream, &mut buffer).await?;
            if let Some(end) = http1::head_length(&buffer) {
                break end;
            }
        };
        let (head, first_bytes) = buffer.split_at(end);
        let number = counters.requests.fetch_add(1, Relaxed);
        let (has_only_the_pool_key, mut body, received_request) =
            (has_only_the_pool_key(head), http1::parse_body_framing(head), ReceivedRequest::parse(head));
        let mut body_bytes = 0;
        let mut payload = |chunk: &[u8]| body_bytes += chunk.len();
        let consumed_bytes = body.consume(first_bytes, &mut payload);
        assert_eq!(consumed_bytes, first_bytes.len(), "requests must not be pipelined");
        while !body.is_complete() {
            buffer.clear();
            read_bytes(&mut stream, &mut buffer).await?;
            let consumed_bytes = body.consume(&buffer, &mut payload);
            assert_eq!(consumed_bytes, buffer.len(), "requests must not be pipelined");
        }
        if !has_only_the_pool_key || body_bytes != received_request.body_bytes() {
            counters.invalid_requests.fetch_add(1, Relaxed);
        }
        match received_request {
            ReceivedRequest::Get => responses.get.write(&mut stream, number).await?,
            ReceivedRequest::Tts => responses.tts.write(&mut stream, number).await?,
            ReceivedRequest::Stream => responses.stream.write(&mut stream, number).await?,
            ReceivedRequest::Upload => responses.upload.write(&mut stream, number).await?,
            ReceivedRequest::Paced(chunks) => {
                responses.paced.write(&mut stream, number).await?;
                write_paced_chunks(&mut stream, chunks).await?;
            }
        }
    }
}

/// Reads at least one byte. Returns `None` at the end of the connection.
async fn read_bytes(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Option<()> {
    (stream.read_buf(buffer).await.ok()? > 0).then_some(())
}

/// Writes this number of chunks, each at its scheduled time and with a timestamp of its actual time.
async fn write_paced_chunks(stream: &mut (impl AsyncWrite + Unpin), chunks: u32) -> Option<()> {
    let started_at = Instant::now();
    let mut chunk = format!("{PACED_CHUNK_BYTES:x}\r\n").into_bytes();
    let timestamp_start = chunk.len();
    chunk.resize(timestamp_start + usize::try_from(PACED_CHUNK_BYTES).unwrap(), 0xaa);
    chunk.extend(b"\r\n");
    for number in 0..chunks {
        tokio::time::sleep_until((started_at + Duration::from_millis(PACED_INTERVAL_MS) * number).into())
            .await;
        let now = format!("{:016}", EPOCH.elapsed().as_nanos());
        chunk[timestamp_start..timestamp_start + TIMESTAMP_DIGITS].copy_from_slice(now.as_bytes());
        stream.write_all(&chunk).await.ok()?;
        stream.flush().await.ok()?;
    }
    stream.write_all(b"0\r\n\r\n").await.ok()?;
    stream.flush().await.ok()
}

/// Returns whether the head contains the key of the pool and no client credential.
fn has_only_the_pool_key(head: &[u8]) -> bool {
    let mut key_count = 0;
    for (name, value) in http1::headers(head) {
        match name.len() {
            10 if name.eq_ignore_ascii_case(b"xi-api-key") => {
                if !value.starts_with(POOL_KEY.as_bytes()) {
                    return false;
                }
                key_count += 1;
            }
            13 if name.eq_ignore_ascii_case(b"authorization") => return false,
            16 if name.eq_ignore_ascii_case(b"x-keychoir-token") => return false,
            _ => {}
        }
    }
    key_count == 1
}

/// A request by the workload that its head identifies.
#[derive(Clone, Copy)]
enum ReceivedRequest {
    Get,
    Tts,
    Stream,
    Upload,
    /// A paced stream with this number of chunks.
    Paced(u32),
}

impl ReceivedRequest {
    fn body_bytes(self) -> usize {
        match self {
            Self::Get => 0,
            Self::Tts | Self::Stream | Self::Paced(_) => SPEECH_BODY_BYTES,
            Self::Upload => UPLOAD_BODY_BYTES,
        }
    }

    fn parse(head: &[u8]) -> Self {
        let line = std::str::from_utf8(&head[..memchr::memchr(b'\r', head).unwrap()]).unwrap();
        let target = line.split(' ').nth(1).unwrap();
        let chunks = target.split_once("chunks=").map(|(_, chunks)| chunks.parse().unwrap());
        match chunks {
            Some(chunks) => Self::Paced(chunks),
            None if line.starts_with("GET ") => Self::Get,
            None if target.starts_with("/v1/speech-to-text") => Self::Upload,
            None if target.contains("/stream") => Self::Stream,
            None => Self::Tts,
        }
    }
}
