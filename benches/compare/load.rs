//! Who asks: at a fixed rate, each request at its own moment whether the one before was answered or
//! not, so that a proxy that stalls cannot hide it; or as fast as it is answered. Every answer must be
//! a good one and arrive whole.

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

use crate::upstream::{EPOCH, STAMP};
use crate::wire;
use crate::workload::PACED_BYTES;

/// Bytes read at once.
const READ: usize = 256 * 1024;

/// What is asked, and how long the body of the answer is.
#[derive(Clone, Debug)]
pub struct Asked {
    pub request: Arc<[u8]>,
    pub answer_bytes: u64,
    /// Whether pieces of the answer tell when they were sent.
    pub is_stamped: bool,
}

/// What was answered. Times from the moment at which a request was due, in seconds.
#[derive(Debug, Default)]
pub struct Heard {
    pub requests: u64,
    /// To the first byte of an answer.
    pub first: Vec<f64>,
    /// To the last one; of paced streams, of each piece from when it was sent.
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
    connections: Vec<Connection>,
}

impl Load {
    pub async fn open(address: SocketAddr, tls: Option<&TlsConnector>, count: u32) -> Self {
        let mut connections = Vec::new();
        for _ in 0..count {
            connections.push(Connection::open(address, tls).await);
        }
        Self { connections }
    }

    /// So many requests a second by all of them together.
    pub async fn at_rate(&mut self, asked: &Asked, rate: u32, seconds: f64) -> Heard {
        let connections = u32::try_from(self.connections.len()).unwrap();
        let interval = Duration::from_secs(1) * connections / rate;
        let count = ((f64::from(rate) * seconds) as u32 / connections).max(1);
        let begin = Instant::now() + Duration::from_millis(1);
        self.run(|place, connection| {
            let begin = begin + interval / connections * place;
            connection.at_moments(asked.clone(), begin, interval, count)
        })
        .await
    }

    /// One request by each of them, as evenly over this span as can be.
    pub async fn once_each(&mut self, asked: &Asked, over: Duration) -> Heard {
        let connections = u32::try_from(self.connections.len()).unwrap();
        let begin = Instant::now() + Duration::from_millis(1);
        self.run(|place, connection| {
            connection.at_moments(asked.clone(), begin + over / connections * place, over, 1)
        })
        .await
    }

    /// As fast as it is answered, so long.
    pub async fn saturating(&mut self, asked: &Asked, seconds: f64) -> Heard {
        let end = Instant::now() + Duration::from_secs_f64(seconds);
        self.run(|_, connection| connection.until(asked.clone(), end)).await
    }

    async fn run<F>(&mut self, mut each: impl FnMut(u32, Connection) -> F) -> Heard
    where
        F: Future<Output = (Connection, Heard)> + Send + 'static,
    {
        let (tasks, began) = (Tasks::new(), Instant::now());
        let running: Vec<_> =
            (0..).zip(self.connections.drain(..)).map(|(place, own)| tasks.spawn(each(place, own))).collect();
        let mut heard = Heard::default();
        for one in running {
            let (connection, own) = one.await.unwrap();
            self.connections.push(connection);
            heard.add(own);
        }
        heard.took = began.elapsed();
        heard
    }
}

struct Connection {
    stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    buffer: Vec<u8>,
    clock: AsyncFd<OwnedFd>,
}

impl Connection {
    async fn open(address: SocketAddr, tls: Option<&TlsConnector>) -> Self {
        let tcp = TcpStream::connect(address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let stream = match tls {
            None => Either::Left(tcp),
            Some(connector) => {
                let name = "localhost".try_into().unwrap();
                Either::Right(Box::new(connector.connect(name, tcp).await.unwrap()))
            }
        };
        // The runtime's own timers go by milliseconds, which is many times what a proxy adds.
        let clock = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK).unwrap();
        #[expect(deprecated, reason = "an owned file is open as long as it is registered")]
        let clock = AsyncFd::new(clock).unwrap();
        Self { stream, buffer: vec![0; READ], clock }
    }

    /// A request at each of these moments, or at once where the one before took longer.
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

    /// Asks and hears the whole answer.
    async fn ask(&mut self, asked: &Asked, due: Instant, heard: &mut Heard) {
        self.stream.write_all(&asked.request).await.unwrap();
        self.stream.flush().await.unwrap();
        let (mut filled, mut first) = (0, None);
        let end = loop {
            filled += self.read(filled).await;
            first.get_or_insert_with(|| due.elapsed());
            if let Some(end) = wire::head_end(&self.buffer[..filled]) {
                break end;
            }
        };
        let head = &self.buffer[..end];
        assert!(head.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(head));
        let mut body = wire::body(head);
        let mut payload = Payload { bytes: 0, stamp: asked.is_stamped.then(Vec::new), heard };
        let taken = body.take(&self.buffer[end..filled], |piece| payload.take(piece));
        assert_eq!(taken, filled - end, "nothing follows an answer");
        while !body.is_whole() {
            let count = self.read(0).await;
            let taken = body.take(&self.buffer[..count], |piece| payload.take(piece));
            assert_eq!(taken, count, "nothing follows an answer");
        }
        assert_eq!(payload.bytes, asked.answer_bytes, "the answer came whole");
        heard.requests += 1;
        heard.first.push(first.unwrap().as_secs_f64());
        if !asked.is_stamped {
            heard.whole.push(due.elapsed().as_secs_f64());
        }
    }

    /// Reads behind so many bytes of the buffer.
    async fn read(&mut self, from: usize) -> usize {
        let count = self.stream.read(&mut self.buffer[from..]).await.unwrap();
        assert_ne!(count, 0, "the connection was closed");
        count
    }
}

/// Counts what an answer brings, and reads the moments in it.
struct Payload<'a> {
    bytes: u64,
    /// As much of a piece's moment as has come.
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
