//! Tests `keychoir::server` with several worker threads: the distribution of new and idle connections to workers, the
//! connection limit, the drain and the abort, a request that panics, and the end of dropped workers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test panics if an expectation fails"
)]

use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
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

const CONNECTION_LIMITS: ConnectionLimits = ConnectionLimits {
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

/// Responds with the name of its thread. A request to `/hold` waits until the test releases it, and a request to
/// `/panic` panics.
#[derive(Clone, Debug)]
struct ThreadNameService {
    /// Has a permit for each held request that the test has not yet waited for.
    held_requests: Arc<Semaphore>,
    /// The test adds a permit for each request that it releases.
    release: Arc<Semaphore>,
}

impl Service for ThreadNameService {
    type Body = Full<Bytes>;

    async fn respond(&self, request: Request<Incoming>, _: Option<IpAddr>) -> Reply<Full<Bytes>> {
        match request.uri().path() {
            "/panic" => panic!("this request panics on purpose"),
            "/hold" => {
                self.held_requests.add_permits(1);
                self.release.acquire().await.unwrap().forget();
            }
            _ => {}
        }
        let name = std::thread::current().name().unwrap().to_owned();
        Response::new(Full::new(name.into())).into()
    }
}

/// A server whose requests the test can hold and release.
struct TestServer {
    server: Arc<Server<ThreadNameService>>,
    workers: WorkerThreads,
    held_requests: Arc<Semaphore>,
    release: Arc<Semaphore>,
}

impl TestServer {
    fn start(worker_count: usize) -> Self {
        Self::start_with(worker_count, CONNECTION_LIMITS)
    }

    fn start_with(worker_count: usize, limits: ConnectionLimits) -> Self {
        let (held_requests, release) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let service =
            ThreadNameService { held_requests: Arc::clone(&held_requests), release: Arc::clone(&release) };
        let workers = WorkerThreads::start(worker_count).unwrap();
        let drain = Drain::default();
        let server = Arc::new(Server {
            worker_pool: workers.create_pool(&drain, || service.clone()),
            limits,
            connection_limiter: ConnectionLimiter::new(limits.max_connections),
            drain,
            accept_tasks: Tasks::new(),
            connection_tasks: Tasks::new(),
        });
        Self { server, workers, held_requests, release }
    }

    fn listen_on_port(&self) -> SocketAddr {
        let listener = Listener::tcp(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let keychoir::server::Address::Tcp(address) = listener.address().unwrap() else {
            panic!("the listener must have a TCP address")
        };
        self.server.listen(listener, Tls::new().unwrap()).unwrap();
        address
    }

    fn listen_on_unix_socket(&self, path: &Path) {
        self.server.listen(Listener::unix(path, 0o600).unwrap(), Tls::new().unwrap()).unwrap();
    }

    /// Waits until `count` more requests are held.
    async fn wait_for_held_requests(&self, count: u32) {
        self.held_requests.acquire_many(count).await.unwrap().forget();
    }
}

/// A client with one connection. It reads the number of the serving worker from each response.
struct WorkerClient<S>(S);

async fn connect(address: SocketAddr) -> WorkerClient<TcpStream> {
    WorkerClient(TcpStream::connect(address).await.unwrap())
}

impl<S: AsyncRead + AsyncWrite + Unpin> WorkerClient<S> {
    async fn send(&mut self, path: &str) {
        let request = format!("GET {path} HTTP/1.1\r\nhost: k\r\n\r\n");
        self.0.write_all(request.as_bytes()).await.unwrap();
    }

    /// Reads a response. Returns the number of the worker that sent it.
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
                self.0.read_available(&mut response).await,
                0,
                "the response must be complete: {response:?}"
            );
        }
    }

    /// Sends a request, and returns the number of the worker that served it.
    async fn serving_worker(&mut self) -> u8 {
        self.send("/").await;
        self.responding_worker().await
    }

    async fn assert_closed(&mut self) {
        // A reset also ends the connection.
        assert_eq!(self.0.read(&mut [0; 256]).await.unwrap_or(0), 0, "the connection must be closed");
    }
}

trait ReadAvailable: AsyncRead + Unpin {
    /// Reads the bytes that have arrived, and waits if there are none. Returns their number, or 0 at the end of the
    /// connection.
    async fn read_available(&mut self, text: &mut String) -> usize {
        let mut bytes = [0; 1024];
        let count = self.read(&mut bytes).await.unwrap();
        text.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
        count
    }
}

impl<S: AsyncRead + Unpin> ReadAvailable for S {}

#[tokio::test]
async fn connections_are_distributed_evenly() {
    let test = TestServer::start(4);
    let address = test.listen_on_port();
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(connect(address).await);
    }
    let mut workers = BTreeSet::new();
    for client in &mut clients {
        workers.insert(client.serving_worker().await);
    }
    assert_eq!(workers, BTreeSet::from([0, 1, 2, 3]));
    for client in &mut clients {
        let worker = client.serving_worker().await;
        assert_eq!(
            client.serving_worker().await,
            worker,
            "a connection must stay on its worker while the worker has no other requests"
        );
    }
}

#[tokio::test]
async fn connections_of_a_unix_socket_are_distributed_evenly() {
    let test = TestServer::start(2);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("k.sock");
    test.listen_on_unix_socket(&path);
    let mut first = WorkerClient(UnixStream::connect(&path).await.unwrap());
    let mut second = WorkerClient(UnixStream::connect(&path).await.unwrap());
    assert_eq!(
        BTreeSet::from([first.serving_worker().await, second.serving_worker().await]),
        BTreeSet::from([0, 1])
    );
    test.server.drain.stop_accepting.cancel();
    test.server.accept_tasks.wait_until_ended().await;
    assert!(!path.exists(), "the socket file must be removed when its acceptor stops");
}

#[tokio::test]
async fn connections_in_the_accept_queue_are_served_during_the_drain() {
    let test = TestServer::start(1);
    let address = test.listen_on_port();
    test.server.drain.draining.cancel();
    // Connections in the accept queue are accepted, even if the only worker is busy with other connections.
    let mut clients = Vec::new();
    for _ in 0..CONNECTION_LIMITS.max_connections {
        clients.push(connect(address).await);
    }
    test.server.drain.stop_accepting.cancel();
    for client in &mut clients {
        client.serving_worker().await;
    }
    test.server.accept_tasks.wait_until_ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "the port must be closed");
}

#[tokio::test]
async fn two_listeners_share_the_connection_limit() {
    let test = TestServer::start_with(1, ConnectionLimits { max_connections: 1, ..CONNECTION_LIMITS });
    let (first, second) = (test.listen_on_port(), test.listen_on_port());
    for _ in 0..3 {
        for address in [first, second] {
            // Each connection is closed before the next is opened, so only one holds a permit.
            connect(address).await.serving_worker().await;
        }
    }
    // A second connection waits until the open connection is closed.
    let open = connect(first).await;
    let mut waiting = connect(second).await;
    drop(open);
    waiting.serving_worker().await;
}

#[tokio::test]
async fn new_connections_go_to_the_worker_without_requests() {
    let test = TestServer::start(2);
    let address = test.listen_on_port();
    let mut busy = connect(address).await;
    let worker = busy.serving_worker().await;
    busy.send("/hold").await;
    test.wait_for_held_requests(1).await;
    let mut new_clients = Vec::new();
    for _ in 0..3 {
        let mut second = connect(address).await;
        assert_ne!(
            second.serving_worker().await,
            worker,
            "the connection must go to the worker without a request"
        );
        new_clients.push(second);
    }
    test.release.add_permits(1);
    assert_eq!(busy.responding_worker().await, worker);
    let mut new_client = connect(address).await;
    assert_eq!(
        new_client.serving_worker().await,
        worker,
        "the connection must go to the worker with fewer connections"
    );
}

#[tokio::test]
async fn a_connection_without_a_request_counts_as_an_expected_request() {
    let test = TestServer::start(2);
    let address = test.listen_on_port();
    let mut first = connect(address).await;
    let worker = first.serving_worker().await;
    // Four connections are opened before any of them sends a request.
    let mut new_clients = Vec::new();
    for _ in 0..4 {
        new_clients.push(connect(address).await);
    }
    let mut count_on_first_worker = 0;
    for client in &mut new_clients {
        count_on_first_worker += usize::from(client.serving_worker().await == worker);
    }
    assert_eq!(count_on_first_worker, 2, "each worker must get two of the new connections");
}

#[tokio::test]
async fn an_idle_connection_moves_to_the_worker_with_fewer_requests() {
    let test =
        TestServer::start_with(2, ConnectionLimits { idle_after: Duration::ZERO, ..CONNECTION_LIMITS });
    let address = test.listen_on_port();
    let (mut first, mut second, mut third) =
        (connect(address).await, connect(address).await, connect(address).await);
    let numbers = [first.serving_worker().await, second.serving_worker().await, third.serving_worker().await];
    // Two of the three connections have the same worker. One of these two sends a request that is held.
    let (busy, idle, worker) = match numbers {
        [shared, other, _] if shared == other => (&mut first, &mut second, shared),
        [shared, _, other] if shared == other => (&mut first, &mut third, shared),
        [_, shared, _] => (&mut second, &mut third, shared),
    };
    busy.send("/hold").await;
    test.wait_for_held_requests(1).await;
    // The connection may move only after several requests.
    let wait_for_move = async { while idle.serving_worker().await == worker {} };
    tokio::time::timeout(Duration::from_secs(30), wait_for_move)
        .await
        .expect("the connection must move to the other worker");
    assert_eq!(test.server.connection_limiter.open(), 3, "the moved connection must keep its permit");
    test.release.add_permits(1);
    busy.responding_worker().await;
    // The requests of the moved connection count for its new worker.
    idle.send("/hold").await;
    test.wait_for_held_requests(1).await;
    assert_eq!(
        connect(address).await.serving_worker().await,
        worker,
        "the connection must go to the worker without a request"
    );
    test.release.add_permits(1);
    idle.responding_worker().await;
}

#[tokio::test]
async fn one_worker_serves_all_connections() {
    let test = TestServer::start(1);
    assert_eq!(test.workers.count(), 1);
    let address = test.listen_on_port();
    for _ in 0..3 {
        assert_eq!(connect(address).await.serving_worker().await, 0);
    }
}

#[tokio::test]
async fn a_drain_waits_for_the_requests_of_all_workers() {
    let test = TestServer::start(2);
    let address = test.listen_on_port();
    let (mut first, mut second, mut idle) =
        (connect(address).await, connect(address).await, connect(address).await);
    idle.serving_worker().await;
    for client in [&mut first, &mut second] {
        client.serving_worker().await;
        client.send("/hold").await;
    }
    test.wait_for_held_requests(2).await;
    test.server.drain.stop_accepting.cancel();
    test.server.accept_tasks.wait_until_ended().await;
    assert!(TcpStream::connect(address).await.is_err(), "the port must be closed");
    {
        let mut requests_ended = std::pin::pin!(test.server.worker_pool.wait_until_requests_ended());
        test.release.add_permits(1);
        let remaining = tokio::select! {
            _ = first.responding_worker() => &mut second,
            _ = second.responding_worker() => &mut first,
        };
        let is_pending = poll_fn(|cx| Poll::Ready(requests_ended.as_mut().poll(cx).is_pending())).await;
        assert!(is_pending, "the drain must wait for the second request");
        test.release.add_permits(1);
        remaining.responding_worker().await;
        requests_ended.await;
    }
    test.server.drain.close_idle.cancel();
    test.server.connection_tasks.wait_until_ended().await;
    for client in [&mut first, &mut second, &mut idle] {
        client.assert_closed().await;
    }
    test.workers.shut_down().await;
}

#[tokio::test]
async fn an_abort_ends_the_requests_of_all_workers() {
    let test = TestServer::start(2);
    let address = test.listen_on_port();
    let (mut first, mut second) = (connect(address).await, connect(address).await);
    for client in [&mut first, &mut second] {
        client.send("/hold").await;
    }
    test.wait_for_held_requests(2).await;
    test.server.drain.stop_accepting.cancel();
    test.server.drain.abort.cancel();
    test.server.connection_tasks.wait_until_ended().await;
    first.assert_closed().await;
    second.assert_closed().await;
}

#[tokio::test]
async fn a_panic_closes_only_its_connection() {
    let test = TestServer::start(1);
    let address = test.listen_on_port();
    let (mut steady, mut broken) = (connect(address).await, connect(address).await);
    steady.serving_worker().await;
    broken.serving_worker().await;
    broken.send("/panic").await;
    broken.assert_closed().await;
    assert_eq!(steady.serving_worker().await, 0);
    assert_eq!(connect(address).await.serving_worker().await, 0);
    assert_eq!(
        test.server.connection_limiter.open(),
        2,
        "the connection with the panic must release its permit"
    );
}

#[tokio::test]
async fn dropped_workers_close_their_connections() {
    let test = TestServer::start(2);
    let address = test.listen_on_port();
    let mut client = connect(address).await;
    client.serving_worker().await;
    drop(test);
    client.assert_closed().await;
}
