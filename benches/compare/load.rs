//! The load generator. It sends requests at a fixed rate, or in sequence. At a fixed rate, the time of a request
//! counts from its scheduled time, so that a stalling proxy does not hide delays. Each response must be a complete
//! success.

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

use crate::peers::Target;
use crate::upstream::{EPOCH, STAMP};
use crate::wire;
use crate::workload::{PACED_BYTES, Workload};

/// The maximum number of bytes per read.
const READ: usize = 256 * 1024;

/// A request, and the length of its response's body.
#[derive(Clone, Debug)]
pub struct RequestSpec {
    pub request: Arc<[u8]>,
    pub response_bytes: u64,
    /// Whether pieces of the response contain the time at which they were sent.
    pub is_stamped: bool,
}

impl RequestSpec {
    /// Returns a request with this key. A paced response takes `seconds`.
    pub fn new(workload: Workload, key: &str, seconds: f64) -> Self {
        Self {
            request: workload.request(key, seconds),
            response_bytes: workload.response_bytes(seconds),
            is_stamped: workload == Workload::Paced,
        }
    }
}

/// The results. Times in seconds from the scheduled time of the request.
#[derive(Debug, Default)]
pub struct LoadResults {
    pub requests: u64,
    /// Times to the first byte of a response.
    pub first_byte_times: Vec<f64>,
    /// Times to the last byte. For paced streams, the time of each chunk since it was sent.
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

/// Connections that stay open between runs.
pub struct Load {
    load_clients: Vec<LoadClient>,
}

impl Load {
    /// Opens `load_clients` clients with one request at a time, each of which uses its connections in
    /// turns.
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

    /// Sends `rate` requests per second, by all clients together.
    pub async fn at_rate(&mut self, request_spec: &RequestSpec, rate: u32, seconds: f64) -> LoadResults {
        let load_clients = u32::try_from(self.load_clients.len()).unwrap();
        let interval = Duration::from_secs(1) * load_clients / rate;
        let count = ((f64::from(rate) * seconds) as u32 / load_clients).max(1);
        let begin = Instant::now() + Duration::from_millis(1);
        self.run(|index, load_client| {
            load_client.send_at_interval(
                request_spec.clone(),
                begin + interval / load_clients * index,
                interval,
                count,
            )
        })
        .await
    }

    /// One request by each client, spread evenly over this time.
    pub async fn once_each(&mut self, request_spec: &RequestSpec, over: Duration) -> LoadResults {
        let load_clients = u32::try_from(self.load_clients.len()).unwrap();
        let begin = Instant::now() + Duration::from_millis(1);
        self.run(|index, load_client| {
            load_client.send_at_interval(request_spec.clone(), begin + over / load_clients * index, over, 1)
        })
        .await
    }

    /// One request on each connection.
    pub async fn once_per_connection(&mut self, request_spec: &RequestSpec) -> LoadResults {
        let now = Instant::now();
        self.run(|_, load_client| {
            let count = u32::try_from(load_client.streams.len()).unwrap();
            load_client.send_at_interval(request_spec.clone(), now, Duration::ZERO, count)
        })
        .await
    }

    /// Sends `each` requests on each client's connection, one client after the other; `then` runs
    /// after each client.
    pub async fn in_turns(&mut self, request_spec: &RequestSpec, each: u32, mut then: impl FnMut(usize)) {
        for (index, load_client) in self.load_clients.iter_mut().enumerate() {
            for _ in 0..each {
                load_client.request(request_spec, Instant::now(), &mut LoadResults::default()).await;
            }
            then(index);
        }
    }

    /// Adds the clients of another load.
    pub fn join(&mut self, other: Self) {
        self.load_clients.extend(other.load_clients);
    }

    /// Takes the clients at these indices out, in this order. The other clients keep their indices.
    pub fn part(&mut self, places: &[usize]) -> Self {
        Self {
            load_clients: places
                .iter()
                .map(|index| std::mem::replace(&mut self.load_clients[*index], LoadClient::new(Vec::new())))
                .collect(),
        }
    }

    /// Sends the next request after each response, for `seconds`.
    pub async fn saturating(&mut self, request_spec: &RequestSpec, seconds: f64) -> LoadResults {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        self.run(|_, load_client| load_client.send_until(request_spec.clone(), end)).await
    }

    async fn run<F>(&mut self, mut each: impl FnMut(u32, LoadClient) -> F) -> LoadResults
    where
        F: Future<Output = (LoadClient, LoadResults)> + Send + 'static,
    {
        let (tasks, started_at) = (Tasks::new(), Instant::now());
        let running: Vec<_> = (0..)
            .zip(self.load_clients.drain(..))
            .map(|(index, own)| tasks.spawn(each(index, own)))
            .collect();
        let mut results = LoadResults::default();
        for one in running {
            let (load_client, own) = one.await.unwrap();
            self.load_clients.push(load_client);
            results.add(own);
        }
        results.elapsed = started_at.elapsed();
        results
    }
}

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
    turn: usize,
    buffer: Vec<u8>,
    clock: AsyncFd<OwnedFd>,
}

impl LoadClient {
    fn new(streams: Vec<Stream>) -> Self {
        // The timers of tokio have a resolution of a millisecond, which is much more than the time that a proxy adds.
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK).unwrap();
        #[expect(deprecated, reason = "an owned file is open as long as it is registered")]
        let clock = AsyncFd::new(clock).unwrap();
        Self { streams, turn: 0, buffer: Vec::with_capacity(READ), clock }
    }

    /// Sends a request at each of these times, or immediately if the previous request took longer.
    async fn send_at_interval(
        mut self,
        request_spec: RequestSpec,
        begin: Instant,
        interval: Duration,
        count: u32,
    ) -> (Self, LoadResults) {
        let mut results = LoadResults::default();
        for number in 0..count {
            let scheduled_at = begin + interval * number;
            self.wait(scheduled_at).await;
            self.request(&request_spec, scheduled_at, &mut results).await;
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
            self.request(&request_spec, now, &mut results).await;
        }
    }

    async fn wait(&self, scheduled_at: Instant) {
        let left = scheduled_at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) },
        };
        timerfd_settime(&self.clock, TimerfdTimerFlags::empty(), &once).unwrap();
        loop {
            let mut ready = self.clock.readable().await.unwrap();
            let read = ready.try_io(|clock| Ok(rustix::io::read(clock, &mut [0_u8; 8])?));
            if read.is_ok() {
                return;
            }
        }
    }

    /// Sends a request and reads the whole response.
    async fn request(
        &mut self,
        request_spec: &RequestSpec,
        scheduled_at: Instant,
        results: &mut LoadResults,
    ) {
        self.turn = (self.turn + 1) % self.streams.len();
        let stream = &mut self.streams[self.turn];
        stream.write_all(&request_spec.request).await.unwrap();
        stream.flush().await.unwrap();
        let (buffer, mut first) = (&mut self.buffer, None);
        buffer.clear();
        let end = loop {
            read(stream, buffer).await;
            first.get_or_insert_with(|| scheduled_at.elapsed());
            if let Some(end) = wire::head_end(buffer) {
                break end;
            }
        };
        let (head, behind) = buffer.split_at(end);
        assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(head));
        let mut body = wire::body(head);
        let mut payload = Payload { bytes: 0, stamp: request_spec.is_stamped.then(Vec::new), results };
        let taken = body.take(behind, &mut |chunk| payload.take(chunk));
        assert_eq!(taken, behind.len(), "no bytes follow a response");
        while !body.is_complete() {
            buffer.clear();
            read(stream, buffer).await;
            let taken = body.take(buffer, &mut |chunk| payload.take(chunk));
            assert_eq!(taken, buffer.len(), "no bytes follow a response");
        }
        assert_eq!(payload.bytes, request_spec.response_bytes, "the response is complete");
        results.requests += 1;
        results.first_byte_times.push(first.unwrap().as_secs_f64());
        if !request_spec.is_stamped {
            results.total_times.push(scheduled_at.elapsed().as_secs_f64());
        }
    }
}

async fn read(stream: &mut Stream, buffer: &mut Vec<u8>) {
    assert_ne!(stream.read_buf(buffer).await.unwrap(), 0, "the connection was closed");
}

/// Counts the payload of a response, and parses the times in it.
struct Payload<'a> {
    bytes: u64,
    /// The digits of a piece's time received so far.
    stamp: Option<Vec<u8>>,
    results: &'a mut LoadResults,
}

impl Payload<'_> {
    fn take(&mut self, mut chunk: &[u8]) {
        let Some(stamp) = &mut self.stamp else {
            self.bytes += chunk.len() as u64;
            return;
        };
        while !chunk.is_empty() {
            let at = usize::try_from(self.bytes % PACED_BYTES).unwrap();
            let own = if at < STAMP { STAMP - at } else { usize::try_from(PACED_BYTES).unwrap() - at };
            let own = own.min(chunk.len());
            if at < STAMP {
                stamp.extend(&chunk[..own]);
                if stamp.len() == STAMP {
                    let sent: u64 = std::str::from_utf8(stamp).unwrap().parse().unwrap();
                    let span = EPOCH.elapsed().saturating_sub(Duration::from_nanos(sent));
                    self.results.total_times.push(span.as_secs_f64());
                    stamp.clear();
                }
            }
            self.bytes += own as u64;
            chunk = &chunk[own..];
        }
    }
}
