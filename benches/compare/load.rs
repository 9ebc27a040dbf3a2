//! The load generator: requests at a fixed rate, each at its scheduled time whether the previous
//! one was answered or not, so that a stalling proxy cannot hide it; or one after the other. Every
//! response must be a success and complete.

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

use crate::peers::Front;
use crate::upstream::{EPOCH, STAMP};
use crate::wire;
use crate::workload::{PACED_BYTES, Workload};

/// Maximum bytes per read.
const READ: usize = 256 * 1024;

/// A request, and the length of its response's body.
#[derive(Clone, Debug)]
pub struct Asked {
    pub request: Arc<[u8]>,
    pub answer_bytes: u64,
    /// Whether pieces of the response contain the time at which they were sent.
    pub is_stamped: bool,
}

impl Asked {
    /// A request with this key; a paced response takes `seconds`.
    pub fn new(workload: Workload, key: &str, seconds: f64) -> Self {
        Self {
            request: workload.request(key, seconds),
            answer_bytes: workload.answer_bytes(seconds),
            is_stamped: workload == Workload::Paced,
        }
    }
}

/// The results. Times in seconds from the scheduled time of the request.
#[derive(Debug, Default)]
pub struct Heard {
    pub requests: u64,
    /// Times to the first byte of a response.
    pub first: Vec<f64>,
    /// Times to the last byte; for paced streams, of each piece from its sending.
    pub whole: Vec<f64>,
    pub took: Duration,
}

impl Heard {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.first.extend(other.first);
        self.whole.extend(other.whole);
    }
}

/// Connections that stay open between runs.
pub struct Load {
    askers: Vec<Asker>,
}

impl Load {
    /// Opens `askers` clients with one request at a time, each of which uses its connections in
    /// turns.
    pub async fn open(front: &Front, askers: u32, connections_each: u32) -> Self {
        let connector = front.tls.clone().map(TlsConnector::from);
        let mut load = Self { askers: Vec::new() };
        for _ in 0..askers {
            let mut streams = Vec::new();
            for _ in 0..connections_each {
                streams.push(connect(front.address, connector.as_ref()).await);
            }
            load.askers.push(Asker::new(streams));
        }
        load
    }

    /// Sends `rate` requests per second, by all clients together.
    pub async fn at_rate(&mut self, asked: &Asked, rate: u32, seconds: f64) -> Heard {
        let askers = u32::try_from(self.askers.len()).unwrap();
        let interval = Duration::from_secs(1) * askers / rate;
        let count = ((f64::from(rate) * seconds) as u32 / askers).max(1);
        let begin = Instant::now() + Duration::from_millis(1);
        self.run(|place, asker| {
            asker.at_moments(asked.clone(), begin + interval / askers * place, interval, count)
        })
        .await
    }

    /// One request by each client, spread evenly over this time.
    pub async fn once_each(&mut self, asked: &Asked, over: Duration) -> Heard {
        let askers = u32::try_from(self.askers.len()).unwrap();
        let begin = Instant::now() + Duration::from_millis(1);
        self.run(|place, asker| asker.at_moments(asked.clone(), begin + over / askers * place, over, 1)).await
    }

    /// One request on each connection.
    pub async fn everywhere(&mut self, asked: &Asked) -> Heard {
        let now = Instant::now();
        self.run(|_, asker| {
            let count = u32::try_from(asker.streams.len()).unwrap();
            asker.at_moments(asked.clone(), now, Duration::ZERO, count)
        })
        .await
    }

    /// Sends `each` requests on each client's connection, one client after the other; `then` runs
    /// after each client.
    pub async fn in_turns(&mut self, asked: &Asked, each: u32, mut then: impl FnMut(usize)) {
        for (place, asker) in self.askers.iter_mut().enumerate() {
            for _ in 0..each {
                asker.ask(asked, Instant::now(), &mut Heard::default()).await;
            }
            then(place);
        }
    }

    /// Adds the clients of another load.
    pub fn join(&mut self, other: Self) {
        self.askers.extend(other.askers);
    }

    /// Takes the clients at these places out, in this order; the others keep their places.
    pub fn part(&mut self, places: &[usize]) -> Self {
        Self {
            askers: places
                .iter()
                .map(|place| std::mem::replace(&mut self.askers[*place], Asker::new(Vec::new())))
                .collect(),
        }
    }

    /// Sends the next request after each response, for `seconds`.
    pub async fn saturating(&mut self, asked: &Asked, seconds: f64) -> Heard {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        self.run(|_, asker| asker.until(asked.clone(), end)).await
    }

    async fn run<F>(&mut self, mut each: impl FnMut(u32, Asker) -> F) -> Heard
    where
        F: Future<Output = (Asker, Heard)> + Send + 'static,
    {
        let (tasks, began) = (Tasks::new(), Instant::now());
        let running: Vec<_> =
            (0..).zip(self.askers.drain(..)).map(|(place, own)| tasks.spawn(each(place, own))).collect();
        let mut heard = Heard::default();
        for one in running {
            let (asker, own) = one.await.unwrap();
            self.askers.push(asker);
            heard.add(own);
        }
        heard.took = began.elapsed();
        heard
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
struct Asker {
    streams: Vec<Stream>,
    /// The index of the last used connection.
    turn: usize,
    buffer: Vec<u8>,
    clock: AsyncFd<OwnedFd>,
}

impl Asker {
    fn new(streams: Vec<Stream>) -> Self {
        // The runtime's timers have a resolution of milliseconds, many times the time that a proxy
        // adds.
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK).unwrap();
        #[expect(deprecated, reason = "an owned file is open as long as it is registered")]
        let clock = AsyncFd::new(clock).unwrap();
        Self { streams, turn: 0, buffer: Vec::with_capacity(READ), clock }
    }

    /// Sends a request at each of these times, or at once if the previous one took longer.
    async fn at_moments(
        mut self,
        asked: Asked,
        begin: Instant,
        interval: Duration,
        count: u32,
    ) -> (Self, Heard) {
        let mut heard = Heard::default();
        for number in 0..count {
            let due = begin + interval * number;
            self.wait(due).await;
            self.ask(&asked, due, &mut heard).await;
        }
        (self, heard)
    }

    async fn until(mut self, asked: Asked, end: Instant) -> (Self, Heard) {
        let mut heard = Heard::default();
        loop {
            let now = Instant::now();
            if now >= end {
                return (self, heard);
            }
            self.ask(&asked, now, &mut heard).await;
        }
    }

    async fn wait(&self, due: Instant) {
        let left = due.saturating_duration_since(Instant::now());
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
    async fn ask(&mut self, asked: &Asked, due: Instant, heard: &mut Heard) {
        self.turn = (self.turn + 1) % self.streams.len();
        let stream = &mut self.streams[self.turn];
        stream.write_all(&asked.request).await.unwrap();
        stream.flush().await.unwrap();
        let (buffer, mut first) = (&mut self.buffer, None);
        buffer.clear();
        let end = loop {
            read(stream, buffer).await;
            first.get_or_insert_with(|| due.elapsed());
            if let Some(end) = wire::head_end(buffer) {
                break end;
            }
        };
        let (head, behind) = buffer.split_at(end);
        assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(head));
        let mut body = wire::body(head);
        let mut payload = Payload { bytes: 0, stamp: asked.is_stamped.then(Vec::new), heard };
        let taken = body.take(behind, &mut |piece| payload.take(piece));
        assert_eq!(taken, behind.len(), "nothing follows an answer");
        while !body.is_whole() {
            buffer.clear();
            read(stream, buffer).await;
            let taken = body.take(buffer, &mut |piece| payload.take(piece));
            assert_eq!(taken, buffer.len(), "nothing follows an answer");
        }
        assert_eq!(payload.bytes, asked.answer_bytes, "the answer came whole");
        heard.requests += 1;
        heard.first.push(first.unwrap().as_secs_f64());
        if !asked.is_stamped {
            heard.whole.push(due.elapsed().as_secs_f64());
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
    heard: &'a mut Heard,
}

impl Payload<'_> {
    fn take(&mut self, mut piece: &[u8]) {
        let Some(stamp) = &mut self.stamp else {
            self.bytes += piece.len() as u64;
            return;
        };
        while !piece.is_empty() {
            let at = usize::try_from(self.bytes % PACED_BYTES).unwrap();
            let own = if at < STAMP { STAMP - at } else { usize::try_from(PACED_BYTES).unwrap() - at };
            let own = own.min(piece.len());
            if at < STAMP {
                stamp.extend(&piece[..own]);
                if stamp.len() == STAMP {
                    let sent: u64 = std::str::from_utf8(stamp).unwrap().parse().unwrap();
                    let span = EPOCH.elapsed().saturating_sub(Duration::from_nanos(sent));
                    self.heard.whole.push(span.as_secs_f64());
                    stamp.clear();
                }
            }
            self.bytes += own as u64;
            piece = &piece[own..];
        }
    }
}
