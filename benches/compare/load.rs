//! Generates load: clients send requests at a fixed rate, or each request after the previous response. At a fixed rate,
//! the time of a request starts at its scheduled time, so that delays of a stalled proxy are measured. The load
//! generator panics unless each response is complete and has status 200.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keychoir::tasks::Tasks;
use rustix::fd::OwnedFd;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use crate::http1;
use crate::peers::Target;
use crate::upstream::{EPOCH, TIMESTAMP_DIGITS};
use crate::workload::{PACED_CHUNK_BYTES, Workload};

/// The maximum number of bytes per read.
const MAX_READ_BYTES: usize = 256 * 1024;

/// A request, and the length of its response's body.
#[derive(Clone, Debug)]
pub struct RequestSpec {
    pub request: Arc<[u8]>,
    pub response_bytes: u64,
    /// Whether each chunk of the response contains the time at which it was sent.
    pub has_timestamps: bool,
}

impl RequestSpec {
    /// Returns a request with the given `key`. The response to a paced request takes `seconds`.
    pub fn new(workload: Workload, key: &str, seconds: f64) -> Self {
        Self {
            request: workload.request(key, seconds),
            response_bytes: workload.response_bytes(seconds),
            has_timestamps: workload == Workload::Paced,
        }
    }
}

/// The results of a run. Times are in seconds from the scheduled time of the request.
#[derive(Debug, Default)]
pub struct LoadResults {
    pub requests: u64,
    /// Times to the first byte of a response.
    pub first_byte_times: Vec<f64>,
    /// Times to the last byte. For paced streams, the time from sending to receiving each chunk.
    pub total_times: Vec<f64>,
    pub elapsed: Duration,
}

impl LoadResults {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.first_byte_times.extend(other.first_byte_times);
        self.total_times.extend(other.total_times);
    }
}

/// A group of clients whose connections stay open between runs.
pub struct LoadGenerator {
    load_clients: Vec<LoadClient>,
}

impl LoadGenerator {
    /// Opens clients with one request at a time. Each client uses its connections in rotation.
    pub async fn open(target: &Target, load_clients: u32, connections_per_client: u32) -> Self {
        let connector = target.tls.clone().map(TlsConnector::from);
        let mut load = Self { load_clients: Vec::new() };
        for _ in 0..load_clients {
            let mut streams = Vec::new();
            for _ in 0..connections_per_client {
                streams.push(connect(target.address, connector.as_ref()).await);
            }
            load.load_clients.push(LoadClient::new(streams));
        }
        load
    }

    /// Sends `rate` requests per second, distributed over all clients.
    pub async fn send_at_rate(&mut self, request_spec: &RequestSpec, rate: u32, seconds: f64) -> LoadResults {
        let load_clients = u32::try_from(self.load_clients.len()).unwrap();
        let interval = Duration::from_secs(1) * load_clients / rate;
        let count = ((f64::from(rate) * seconds) as u32 / load_clients).max(1);
        let first_at = Instant::now() + Duration::from_millis(1);
        self.run(|index, load_client| {
            load_client.send_at_interval(
                request_spec.clone(),
                first_at + interval / load_clients * index,
                interval,
                count,
            )
        })
        .await
    }

    /// Sends one request per client. Their start times are spread evenly over `interval`.
    pub async fn send_once_per_client(
        &mut self,
        request_spec: &RequestSpec,
        interval: Duration,
    ) -> LoadResults {
        let load_clients = u32::try_from(self.load_clients.len()).unwrap();
        let first_at = Instant::now() + Duration::from_millis(1);
        self.run(|index, load_client| {
            load_client.send_at_interval(
                request_spec.clone(),
                first_at + interval / load_clients * index,
                interval,
                1,
            )
        })
        .await
    }

    /// Sends one request on each connection.
    pub async fn send_once_per_connection(&mut self, request_spec: &RequestSpec) -> LoadResults {
        let now = Instant::now();
        self.run(|_, load_client| {
            let count = u32::try_from(load_client.streams.len()).unwrap();
            load_client.send_at_interval(request_spec.clone(), now, Duration::ZERO, count)
        })
        .await
    }

    /// Sends `count` requests per client, one client after the other. Calls `after_client` with the index of each
    /// client after its requests.
    pub async fn send_alternating(
        &mut self,
        request_spec: &RequestSpec,
        count: u32,
        mut after_client: impl FnMut(usize),
    ) {
        for (index, load_client) in self.load_clients.iter_mut().enumerate() {
            for _ in 0..count {
                load_client.send_request(request_spec, Instant::now(), &mut LoadResults::default()).await;
            }
            after_client(index);
        }
    }

    /// Adds the clients of another group.
    pub fn append(&mut self, other: Self) {
        self.load_clients.extend(other.load_clients);
    }

    /// Removes the clients at `indices` and returns them in this order. The other clients keep their indices.
    pub fn take_clients(&mut self, indices: &[usize]) -> Self {
        Self {
            load_clients: indices
                .iter()
                .map(|index| std::mem::replace(&mut self.load_clients[*index], LoadClient::new(Vec::new())))
                .collect(),
        }
    }

    /// Sends requests for `seconds`. Each client sends its next request when it has received the previous response.
    pub async fn send_saturating(&mut self, request_spec: &RequestSpec, seconds: f64) -> LoadResults {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        self.run(|_, load_client| load_client.send_until(request_spec.clone(), end)).await
    }

    /// Runs the future that `start` returns for each client in a separate task. Returns the results of all clients.
    async fn run<F>(&mut self, mut start: impl FnMut(u32, LoadClient) -> F) -> LoadResults
    where
        F: Future<Output = (LoadClient, LoadResults)> + Send + 'static,
    {
        let (tasks, started_at) = (Tasks::new(), Instant::now());
        let client_tasks: Vec<_> = (0..)
            .zip(self.load_clients.drain(..))
            .map(|(index, load_client)| tasks.spawn(start(index, load_client)))
            .collect();
        let mut results = LoadResults::default();
        for client_task in client_tasks {
            let (load_client, client_results) = client_task.await.unwrap();
            self.load_clients.push(load_client);
            results.add(client_results);
        }
        results.elapsed = started_at.elapsed();
        results
    }
}

/// A connection with or without TLS.
type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

async fn connect(address: SocketAddr, tls: Option<&TlsConnector>) -> Stream {
    let tcp = TcpStream::connect(address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    match tls {
        None => Either::Left(tcp),
        Some(connector) => {
            let name = "localhost".try_into().unwrap();
            Either::Right(Box::new(connector.connect(name, tcp).await.unwrap()))
        }
    }
}

/// A client with one request at a time.
struct LoadClient {
    streams: Vec<Stream>,
    /// The index of the last used connection.
    last_stream: usize,
    buffer: Vec<u8>,
    timer: AsyncFd<OwnedFd>,
}

impl LoadClient {
    fn new(streams: Vec<Stream>) -> Self {
        // The timers of tokio have a resolution of a millisecond. The time that a proxy adds is much shorter.
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK).unwrap();
        #[expect(deprecated, reason = "an owned file descriptor stays open while it is registered")]
        let timer = AsyncFd::new(timer).unwrap();
        Self { streams, last_stream: 0, buffer: Vec::with_capacity(MAX_READ_BYTES), timer }
    }

    /// Sends `count` requests at their scheduled times, or immediately if the previous request took longer.
    async fn send_at_interval(
        mut self,
        request_spec: RequestSpec,
        first_at: Instant,
        interval: Duration,
        count: u32,
    ) -> (Self, LoadResults) {
        let mut results = LoadResults::default();
        for number in 0..count {
            let scheduled_at = first_at + interval * number;
            self.wait_until(scheduled_at).await;
            self.send_request(&request_spec, scheduled_at, &mut results).await;
        }
        (self, results)
    }

    async fn send_until(mut self, request_spec: RequestSpec, end: Instant) -> (Self, LoadResults) {
        let mut results = LoadResults::default();
        loop {
            let now = Instant::now();
            if now >= end {
                return (self, results);
            }
            self.send_request(&request_spec, now, &mut results).await;
        }
    }

    /// Waits with the resolution of the system timer.
    async fn wait_until(&self, scheduled_at: Instant) {
        let delay = scheduled_at.saturating_duration_since(Instant::now());
        if delay.is_zero() {
            return;
        }
        let expiration = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec { tv_sec: delay.as_secs() as i64, tv_nsec: i64::from(delay.subsec_nanos()) },
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &expiration).unwrap();
        loop {
            let mut ready = self.timer.readable().await.unwrap();
            let timer_result = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut [0_u8; 8])?));
            if timer_result.is_ok() {
                return;
            }
        }
    }

    /// Sends a request and reads the whole response.
    async fn send_request(
        &mut self,
        request_spec: &RequestSpec,
        scheduled_at: Instant,
        results: &mut LoadResults,
    ) {
        self.last_stream = (self.last_stream + 1) % self.streams.len();
        let stream = &mut self.streams[self.last_stream];
        stream.write_all(&request_spec.request).await.unwrap();
        stream.flush().await.unwrap();
        let (buffer, mut first_byte_time) = (&mut self.buffer, None);
        buffer.clear();
        let end = loop {
            read_bytes(stream, buffer).await;
            first_byte_time.get_or_insert_with(|| scheduled_at.elapsed());
            if let Some(end) = http1::head_length(buffer) {
                break end;
            }
        };
        let (head, first_bytes) = buffer.split_at(end);
        assert!(
            head.starts_with(b"HTTP/1.1 200 "),
            "the request must be served: {}",
            String::from_utf8_lossy(head)
        );
        let mut body = http1::parse_body_framing(head);
        let mut payload =
            PayloadCounter { bytes: 0, timestamp: request_spec.has_timestamps.then(Vec::new), results };
        let consumed_bytes = body.consume(first_bytes, &mut |chunk| payload.record(chunk));
        assert_eq!(consumed_bytes, first_bytes.len(), "no bytes must follow the response");
        while !body.is_complete() {
            buffer.clear();
            read_bytes(stream, buffer).await;
            let consumed_bytes = body.consume(buffer, &mut |chunk| payload.record(chunk));
            assert_eq!(consumed_bytes, buffer.len(), "no bytes must follow the response");
        }
        assert_eq!(payload.bytes, request_spec.response_bytes, "the response must be complete");
        results.requests += 1;
        results.first_byte_times.push(first_byte_time.unwrap().as_secs_f64());
        if !request_spec.has_timestamps {
            results.total_times.push(scheduled_at.elapsed().as_secs_f64());
        }
    }
}

async fn read_bytes(stream: &mut Stream, buffer: &mut Vec<u8>) {
    assert_ne!(stream.read_buf(buffer).await.unwrap(), 0, "the connection must stay open");
}

/// Counts the payload bytes of a response, and records the delay of each chunk with a timestamp.
struct PayloadCounter<'a> {
    bytes: u64,
    /// The received digits of the current chunk's timestamp.
    timestamp: Option<Vec<u8>>,
    results: &'a mut LoadResults,
}

impl PayloadCounter<'_> {
    fn record(&mut self, mut chunk: &[u8]) {
        let Some(timestamp) = &mut self.timestamp else {
            self.bytes += chunk.len() as u64;
            return;
        };
        while !chunk.is_empty() {
            let offset = usize::try_from(self.bytes % PACED_CHUNK_BYTES).unwrap();
            let is_in_timestamp = offset < TIMESTAMP_DIGITS;
            let end =
                if is_in_timestamp { TIMESTAMP_DIGITS } else { usize::try_from(PACED_CHUNK_BYTES).unwrap() };
            let length = (end - offset).min(chunk.len());
            if is_in_timestamp {
                timestamp.extend(&chunk[..length]);
                if timestamp.len() == TIMESTAMP_DIGITS {
                    let sent_nanos: u64 = std::str::from_utf8(timestamp).unwrap().parse().unwrap();
                    let delay = EPOCH.elapsed().saturating_sub(Duration::from_nanos(sent_nanos));
                    self.results.total_times.push(delay.as_secs_f64());
                    timestamp.clear();
                }
            }
            self.bytes += length as u64;
            chunk = &chunk[length..];
        }
    }
}
