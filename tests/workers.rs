//! Connections on several workers: their distribution, their common shutdown, and the isolation of
//! a worker that panics.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use keychoir::policy::min_rate::MinRate;
use keychoir::server::{
    ConnectionLimiter, Drain, Limits, Listener, REST_AFTER, Reply, Server, Service, Tls, WorkerThreads,
};
use keychoir::tasks::Tasks;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;

const LIMITS: Limits = Limits {
    request_headers_timeout: Duration::from_secs(30),
    keepalive_timeout: Duration::from_secs(75),
    linger_timeout: Duration::from_secs(10),
    max_linger_size: 1024 * 1024,
    send_timeout: Duration::from_secs(60),
    min_response_rate: MinRate { bytes_per_second: 0 },
    response_grace: Duration::ZERO,
    max_request_headers_size: 8192,
    max_connections: 100,
    rest_after: REST_AFTER,
};

/// Responds with the name of its thread; at `/hold`, only when it is released.
#[derive(Clone, Debug)]
struct Named {
    held: Arc<Semaphore>,
    released: Arc<Semaphore>,
}

impl Service for Named {
    type Body = Full<Bytes>;

    async fn answer(&self, request: Request<Incoming>) -> Reply<Full<Bytes>> {
        match request.uri().path() {
            "/panic" => panic!("this request was meant to break"),
            "/hold" => {
                self.held.add_permits(1);
                self.released.acquire().await.unwrap().forget();
            }
            _ => {}
        }
        let name = std::thread::current().name().unwrap().to_owned();
        Response::new(Full::new(name.into())).into()
    }
}

struct Stage {
    server: Arc<Server<Named>>,
    workers: WorkerThreads,
    held: Arc<Semaphore>,
    released: Arc<Semaphore>,
}

impl Stage {
    fn of(count: usize) -> Self {
        Self::with(count, LIMITS)
    }

    fn with(count: usize, limits: Limits) -> Self {
        let (held, released) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let service = Named { held: Arc::clone(&held), released: Arc::clone(&released) };
        let workers = WorkerThreads::start(count).unwrap();
        let drain = Drain::default();
        let server = Arc::new(Server {
            crew: workers.crew(&drain, || service.clone()),
            limits,
            room: ConnectionLimiter::new(limits.max_connections),
            drain,
            accepting: Tasks::new(),
            connections: Tasks::new(),
        });
        Self { server, workers, held, released }
    }

    fn port(&self) -> SocketAddr {
        let listener = Listener::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let keychoir::server::Address::Tcp(address) = listener.address().unwrap() else { panic!("no port") };
        self.server.listen(listener, Tls::new().unwrap()).unwrap();
        address
    }

    fn unix(&self, path: &Path) {
        self.server.listen(Listener::unix(path, 0o600).unwrap(), Tls::new().unwrap()).unwrap();
    }

    /// Waits until a number of further requests are held.
    async fn held(&self, count: u32) {
        self.held.acquire_many(count).await.unwrap().forget();
    }
}

/// A connection of a client.
struct Client<S>(S);

async fn connect(address: SocketAddr) -> Client<TcpStream> {
    Client(TcpStream::connect(address).await.unwrap())
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    async fn send(&mut self, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: k\r\n\r\n");
        self.0.write_all(request.as_bytes()).await.unwrap();
    }

    /// The number of the worker that responds.
    async fn answer(&mut self) -> u8 {
        const NAME: &str = "keychoir-";
        let mut answer = String::new();
        loop {
            if let Some((_, number)) = answer.split_once(NAME)
                && !number.is_empty()
            {
                return number.parse().unwrap();
            }
            assert_ne!(self.0.read_to_string_once(&mut answer).await, 0, "it is closed: {answer:?}");
        }
    }

    async fn ask(&mut self) -> u8 {
        self.send("/").await;
        self.answer().await
    }

    async fn assert_closed(&mut self) {
        // A reset is an end, too.
        assert_eq!(self.0.read(&mut [0; 256]).await.unwrap_or(0), 0, "it is still open");
    }
}

trait ReadOnce: AsyncRead + Unpin {
    async fn read_to_string_once(&mut self, text: &mut String) -> usize {
        let mut bytes = [0; 1024];
        let count = self.read(&mut bytes).await.unwrap();
        text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        count
    }
}

impl<S: AsyncRead + Unpin> ReadOnce for S {}

#[tokio::test]
async fn as_many_connections_as_workers_have_one_each() {
    let stage = Stage::of(4);
    let address = stage.port();
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(connect(address).await);
    }
    let mut workers = BTreeSet::new();
    for client in &mut clients {
        workers.insert(client.ask().await);
    }
    assert_eq!(workers, BTreeSet::from([0, 1, 2, 3]));
    for client in &mut clients {
        let worker = client.ask().await;
        assert_eq!(client.ask().await, worker, "a connection that is not in anybody's way stays");
    }
}

#[tokio::test]
async fn a_unix_socket_has_all_workers_too() {
    let stage = Stage::of(2);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("k.sock");
    stage.unix(&path);
    let mut one = Client(UnixStream::connect(&path).await.unwrap());
    let mut other = Client(UnixStream::connect(&path).await.unwrap());
    assert_eq!(BTreeSet::from([one.ask().await, other.ask().await]), BTreeSet::from([0, 1]));
    stage.server.drain.stop.cancel();
    stage.server.accepting.ended().await;
    assert!(!path.exists(), "its file goes with who accepts");
}

#[tokio::test]
async fn connections_that_the_system_has_let_in_are_served_at_the_end() {
    let stage = Stage::of(1);
    let address = stage.port();
    stage.server.drain.ending.cancel();
    // Whether the only worker is busy with this task's connections or not, waiting connections are
    // accepted.
    let mut clients = Vec::new();
    for _ in 0..LIMITS.max_connections {
        clients.push(connect(address).await);
    }
    stage.server.drain.stop.cancel();
    for client in &mut clients {
        client.ask().await;
    }
    stage.server.accepting.ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "then nothing listens there");
}

#[tokio::test]
async fn two_listeners_share_one_place() {
    let stage = Stage::with(1, Limits { max_connections: 1, ..LIMITS });
    let (first, second) = (stage.port(), stage.port());
    for _ in 0..3 {
        for address in [first, second] {
            // Each is closed before the next one is opened, and no other connection holds a permit.
            connect(address).await.ask().await;
        }
    }
    // An open connection keeps the others waiting, and only until it is closed.
    let open = connect(first).await;
    let mut waiting = connect(second).await;
    drop(open);
    waiting.ask().await;
}

#[tokio::test]
async fn who_has_requests_under_way_gets_no_more() {
    let stage = Stage::of(2);
    let address = stage.port();
    let mut busy = connect(address).await;
    let worker = busy.ask().await;
    busy.send("/hold").await;
    stage.held(1).await;
    let mut others = Vec::new();
    for _ in 0..3 {
        let mut other = connect(address).await;
        assert_ne!(other.ask().await, worker, "the other one has nothing under way");
        others.push(other);
    }
    stage.released.add_permits(1);
    assert_eq!(busy.answer().await, worker);
    let mut next = connect(address).await;
    assert_eq!(next.ask().await, worker, "now it has fewer connections");
}

#[tokio::test]
async fn who_has_not_asked_yet_is_expected_to() {
    let stage = Stage::of(2);
    let address = stage.port();
    let mut first = connect(address).await;
    let worker = first.ask().await;
    // Four concurrent connections are spread over the workers before any of them has sent a
    // request.
    let mut fresh = Vec::new();
    for _ in 0..4 {
        fresh.push(connect(address).await);
    }
    let mut there = 0;
    for client in &mut fresh {
        there += usize::from(client.ask().await == worker);
    }
    assert_eq!(there, 2);
}

#[tokio::test]
async fn who_asks_after_a_rest_is_served_by_who_has_less_to_do() {
    let stage = Stage::with(2, Limits { rest_after: Duration::ZERO, ..LIMITS });
    let address = stage.port();
    let (mut one, mut two, mut three) =
        (connect(address).await, connect(address).await, connect(address).await);
    let numbers = [one.ask().await, two.ask().await, three.ask().await];
    // Two of three have the same worker; one of these two keeps it busy for long.
    let (busy, other, worker) = match numbers {
        [a, b, _] if a == b => (&mut one, &mut two, a),
        [a, _, b] if a == b => (&mut one, &mut three, a),
        [_, a, _] => (&mut two, &mut three, a),
    };
    busy.send("/hold").await;
    stage.held(1).await;
    // The time until the connection moves is not bounded here; it moves.
    let moved = async { while other.ask().await == worker {} };
    tokio::time::timeout(Duration::from_secs(30), moved).await.expect("it waits behind the other");
    assert_eq!(stage.server.room.open(), 3, "it keeps its place");
    stage.released.add_permits(1);
    busy.answer().await;
}

#[tokio::test]
async fn one_worker_does_everything() {
    let stage = Stage::of(1);
    assert_eq!(stage.workers.count(), 1);
    let address = stage.port();
    for _ in 0..3 {
        assert_eq!(connect(address).await.ask().await, 0);
    }
}

#[tokio::test]
async fn a_drain_waits_for_the_requests_of_all_workers() {
    let stage = Stage::of(2);
    let address = stage.port();
    let (mut one, mut other, mut idle) =
        (connect(address).await, connect(address).await, connect(address).await);
    idle.ask().await;
    for client in [&mut one, &mut other] {
        client.ask().await;
        client.send("/hold").await;
    }
    stage.held(2).await;
    stage.server.drain.stop.cancel();
    stage.server.accepting.ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "nobody is let in any more");
    {
        let mut ended = std::pin::pin!(stage.server.crew.requests_ended());
        stage.released.add_permits(1);
        let answered = tokio::select! {
            _ = one.answer() => &mut other,
            _ = other.answer() => &mut one,
        };
        let is_pending = poll_fn(|cx| Poll::Ready(ended.as_mut().poll(cx).is_pending())).await;
        assert!(is_pending, "one is under way");
        stage.released.add_permits(1);
        answered.answer().await;
        ended.await;
    }
    stage.server.drain.close.cancel();
    stage.server.connections.ended().await;
    for client in [&mut one, &mut other, &mut idle] {
        client.assert_closed().await;
    }
    stage.workers.end().await;
}

#[tokio::test]
async fn what_is_cut_is_cut_on_all_workers() {
    let stage = Stage::of(2);
    let address = stage.port();
    let (mut one, mut other) = (connect(address).await, connect(address).await);
    for client in [&mut one, &mut other] {
        client.send("/hold").await;
    }
    stage.held(2).await;
    stage.server.drain.stop.cancel();
    stage.server.drain.cut.cancel();
    stage.server.connections.ended().await;
    one.assert_closed().await;
    other.assert_closed().await;
}

#[tokio::test]
async fn a_request_that_breaks_ends_its_connection_and_no_other() {
    let stage = Stage::of(1);
    let address = stage.port();
    let (mut steady, mut broken) = (connect(address).await, connect(address).await);
    steady.ask().await;
    broken.ask().await;
    broken.send("/panic").await;
    broken.assert_closed().await;
    assert_eq!(steady.ask().await, 0);
    assert_eq!(connect(address).await.ask().await, 0);
    assert_eq!(stage.server.room.open(), 2, "its place is free again");
}

#[tokio::test]
async fn workers_that_are_dropped_close_what_they_have() {
    let stage = Stage::of(2);
    let address = stage.port();
    let mut client = connect(address).await;
    client.ask().await;
    drop(stage);
    client.assert_closed().await;
}
