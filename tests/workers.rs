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
use std::net::IpAddr;
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
    ConnectionLimiter, ConnectionLimits, Drain, IDLE_AFTER, Listener, Reply, Server, Service, Tls,
    WorkerThreads,
};
use keychoir::tasks::Tasks;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Semaphore;

const LIMITS: ConnectionLimits = ConnectionLimits {
    request_headers_timeout: Duration::from_secs(30),
    keepalive_timeout: Duration::from_secs(75),
    linger_timeout: Duration::from_secs(10),
    max_linger_size: 1024 * 1024,
    send_timeout: Duration::from_secs(60),
    min_response_rate: MinRate { bytes_per_second: 0 },
    response_grace: Duration::ZERO,
    max_request_headers_size: 8192,
    max_connections: 100,
    idle_after: IDLE_AFTER,
};

/// Responds with the name of its thread; at `/hold`, only when it is released.
#[derive(Clone, Debug)]
struct ThreadName {
    held: Arc<Semaphore>,
    released: Arc<Semaphore>,
}

impl Service for ThreadName {
    type Body = Full<Bytes>;

    async fn respond(&self, request: Request<Incoming>, _: Option<IpAddr>) -> Reply<Full<Bytes>> {
        match request.uri().path() {
            "/panic" => panic!("this request panics on purpose"),
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

struct TestServer {
    server: Arc<Server<ThreadName>>,
    workers: WorkerThreads,
    held: Arc<Semaphore>,
    released: Arc<Semaphore>,
}

impl TestServer {
    fn of(count: usize) -> Self {
        Self::with(count, LIMITS)
    }

    fn with(count: usize, limits: ConnectionLimits) -> Self {
        let (held, released) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let service = ThreadName { held: Arc::clone(&held), released: Arc::clone(&released) };
        let workers = WorkerThreads::start(count).unwrap();
        let drain = Drain::default();
        let server = Arc::new(Server {
            worker_pool: workers.create_pool(&drain, || service.clone()),
            limits,
            connection_limiter: ConnectionLimiter::new(limits.max_connections),
            drain,
            accept_tasks: Tasks::new(),
            connection_tasks: Tasks::new(),
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
    async fn responding_worker(&mut self) -> u8 {
        const NAME: &str = "keychoir-";
        let mut response = String::new();
        loop {
            if let Some((_, number)) = response.split_once(NAME)
                && !number.is_empty()
            {
                return number.parse().unwrap();
            }
            assert_ne!(
                self.0.read_to_string_once(&mut response).await,
                0,
                "the connection is closed: {response:?}"
            );
        }
    }

    async fn get(&mut self) -> u8 {
        self.send("/").await;
        self.responding_worker().await
    }

    async fn assert_closed(&mut self) {
        // A reset is an end, too.
        assert_eq!(self.0.read(&mut [0; 256]).await.unwrap_or(0), 0, "the connection is still open");
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
async fn connections_are_spread_evenly() {
    let test = TestServer::of(4);
    let address = test.port();
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(connect(address).await);
    }
    let mut workers = BTreeSet::new();
    for client in &mut clients {
        workers.insert(client.get().await);
    }
    assert_eq!(workers, BTreeSet::from([0, 1, 2, 3]));
    for client in &mut clients {
        let worker = client.get().await;
        assert_eq!(client.get().await, worker, "a connection stays on a worker without other requests");
    }
}

#[tokio::test]
async fn connections_of_a_unix_socket_are_spread_too() {
    let test = TestServer::of(2);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("k.sock");
    test.unix(&path);
    let mut one = Client(UnixStream::connect(&path).await.unwrap());
    let mut other = Client(UnixStream::connect(&path).await.unwrap());
    assert_eq!(BTreeSet::from([one.get().await, other.get().await]), BTreeSet::from([0, 1]));
    test.server.drain.stop_accepting.cancel();
    test.server.accept_tasks.ended().await;
    assert!(!path.exists(), "the socket file is removed with its acceptor");
}

#[tokio::test]
async fn connections_in_the_accept_queue_are_served_during_the_drain() {
    let test = TestServer::of(1);
    let address = test.port();
    test.server.drain.draining.cancel();
    // Whether the only worker is busy with this task's connections or not, waiting connections are
    // accepted.
    let mut clients = Vec::new();
    for _ in 0..LIMITS.max_connections {
        clients.push(connect(address).await);
    }
    test.server.drain.stop_accepting.cancel();
    for client in &mut clients {
        client.get().await;
    }
    test.server.accept_tasks.ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "the port is closed");
}

#[tokio::test]
async fn two_listeners_share_the_connection_limit() {
    let test = TestServer::with(1, ConnectionLimits { max_connections: 1, ..LIMITS });
    let (first, second) = (test.port(), test.port());
    for _ in 0..3 {
        for address in [first, second] {
            // Each is closed before the next one is opened, and no other connection holds a permit.
            connect(address).await.get().await;
        }
    }
    // An open connection keeps the others waiting, and only until it is closed.
    let open = connect(first).await;
    let mut waiting = connect(second).await;
    drop(open);
    waiting.get().await;
}

#[tokio::test]
async fn new_connections_go_to_the_worker_without_requests() {
    let test = TestServer::of(2);
    let address = test.port();
    let mut busy = connect(address).await;
    let worker = busy.get().await;
    busy.send("/hold").await;
    test.held(1).await;
    let mut others = Vec::new();
    for _ in 0..3 {
        let mut other = connect(address).await;
        assert_ne!(other.get().await, worker, "the other worker has no request under way");
        others.push(other);
    }
    test.released.add_permits(1);
    assert_eq!(busy.responding_worker().await, worker);
    let mut next = connect(address).await;
    assert_eq!(next.get().await, worker, "now it has fewer connections");
}

#[tokio::test]
async fn a_connection_without_a_request_counts_as_an_imminent_one() {
    let test = TestServer::of(2);
    let address = test.port();
    let mut first = connect(address).await;
    let worker = first.get().await;
    // Four concurrent connections are spread over the workers before any of them has sent a
    // request.
    let mut new_clients = Vec::new();
    for _ in 0..4 {
        new_clients.push(connect(address).await);
    }
    let mut on_the_same = 0;
    for client in &mut new_clients {
        on_the_same += usize::from(client.get().await == worker);
    }
    assert_eq!(on_the_same, 2);
}

#[tokio::test]
async fn an_idle_connection_moves_to_the_worker_with_less_to_do() {
    let test = TestServer::with(2, ConnectionLimits { idle_after: Duration::ZERO, ..LIMITS });
    let address = test.port();
    let (mut one, mut two, mut three) =
        (connect(address).await, connect(address).await, connect(address).await);
    let numbers = [one.get().await, two.get().await, three.get().await];
    // Two of three have the same worker; one of these two keeps it busy for long.
    let (busy, other, worker) = match numbers {
        [a, b, _] if a == b => (&mut one, &mut two, a),
        [a, _, b] if a == b => (&mut one, &mut three, a),
        [_, a, _] => (&mut two, &mut three, a),
    };
    busy.send("/hold").await;
    test.held(1).await;
    // The time until the connection moves is not bounded here; it moves.
    let moving = async { while other.get().await == worker {} };
    tokio::time::timeout(Duration::from_secs(30), moving).await.expect("it stays on the busy worker");
    assert_eq!(test.server.connection_limiter.open(), 3, "it keeps its permit");
    test.released.add_permits(1);
    busy.responding_worker().await;
    // Its requests count for its new worker.
    other.send("/hold").await;
    test.held(1).await;
    assert_eq!(connect(address).await.get().await, worker, "the other worker has a request under way");
    test.released.add_permits(1);
    other.responding_worker().await;
}

#[tokio::test]
async fn one_worker_serves_all_connections() {
    let test = TestServer::of(1);
    assert_eq!(test.workers.count(), 1);
    let address = test.port();
    for _ in 0..3 {
        assert_eq!(connect(address).await.get().await, 0);
    }
}

#[tokio::test]
async fn a_drain_waits_for_the_requests_of_all_workers() {
    let test = TestServer::of(2);
    let address = test.port();
    let (mut one, mut other, mut idle) =
        (connect(address).await, connect(address).await, connect(address).await);
    idle.get().await;
    for client in [&mut one, &mut other] {
        client.get().await;
        client.send("/hold").await;
    }
    test.held(2).await;
    test.server.drain.stop_accepting.cancel();
    test.server.accept_tasks.ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "no connection is accepted any more");
    {
        let mut ended = std::pin::pin!(test.server.worker_pool.requests_ended());
        test.released.add_permits(1);
        let answered = tokio::select! {
            _ = one.responding_worker() => &mut other,
            _ = other.responding_worker() => &mut one,
        };
        let is_pending = poll_fn(|cx| Poll::Ready(ended.as_mut().poll(cx).is_pending())).await;
        assert!(is_pending, "one request is under way");
        test.released.add_permits(1);
        answered.responding_worker().await;
        ended.await;
    }
    test.server.drain.close_idle.cancel();
    test.server.connection_tasks.ended().await;
    for client in [&mut one, &mut other, &mut idle] {
        client.assert_closed().await;
    }
    test.workers.shut_down().await;
}

#[tokio::test]
async fn a_cut_ends_the_requests_of_all_workers() {
    let test = TestServer::of(2);
    let address = test.port();
    let (mut one, mut other) = (connect(address).await, connect(address).await);
    for client in [&mut one, &mut other] {
        client.send("/hold").await;
    }
    test.held(2).await;
    test.server.drain.stop_accepting.cancel();
    test.server.drain.abort.cancel();
    test.server.connection_tasks.ended().await;
    one.assert_closed().await;
    other.assert_closed().await;
}

#[tokio::test]
async fn a_panic_ends_its_connection_and_no_other() {
    let test = TestServer::of(1);
    let address = test.port();
    let (mut steady, mut broken) = (connect(address).await, connect(address).await);
    steady.get().await;
    broken.get().await;
    broken.send("/panic").await;
    broken.assert_closed().await;
    assert_eq!(steady.get().await, 0);
    assert_eq!(connect(address).await.get().await, 0);
    assert_eq!(test.server.connection_limiter.open(), 2, "its permit is released");
}

#[tokio::test]
async fn dropped_workers_close_their_connections() {
    let test = TestServer::of(2);
    let address = test.port();
    let mut client = connect(address).await;
    client.get().await;
    drop(test);
    client.assert_closed().await;
}
