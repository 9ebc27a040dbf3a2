//! Forwards TCP connections and delays the bytes of each direction, like a network with a high latency.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use keychoir::clock;
use keychoir::tasks::{AbortOnDrop, Tasks};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::bind_loopback;

const CHUNK_BYTES: usize = 16 * 1024;
/// The maximum number of delayed chunks in one direction of a connection.
const MAX_CHUNKS: usize = 1_000;

/// A listener that forwards each connection to a port of this machine. Dropping it closes all connections.
pub struct SlowForwarder {
    address: SocketAddr,
    delay_ms: Arc<AtomicU64>,
    _listening: AbortOnDrop,
}

impl SlowForwarder {
    /// Starts a forwarder to the port `target_port` of this machine. It delays the bytes of each direction by `delay`.
    pub async fn start(target_port: u16, delay: Duration) -> Self {
        let listener = bind_loopback().await;
        let address = listener.local_addr().unwrap();
        let delay_ms = Arc::new(AtomicU64::new(delay_in_ms(delay)));
        let delay_of_connections = Arc::clone(&delay_ms);
        let _listening = Tasks::new().spawn_guarded(async move {
            let mut connections = Vec::new();
            while let Ok((client, _)) = listener.accept().await {
                let forwarding = forward(client, target_port, Arc::clone(&delay_of_connections));
                connections.push(Tasks::new().spawn_guarded(forwarding));
            }
        });
        Self { address, delay_ms, _listening }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the delay of bytes that arrive after this call. They never overtake earlier bytes.
    pub fn set_delay(&self, delay: Duration) {
        self.delay_ms.store(delay_in_ms(delay), Ordering::Relaxed);
    }
}

fn delay_in_ms(delay: Duration) -> u64 {
    u64::try_from(delay.as_millis()).unwrap()
}

async fn forward(client: TcpStream, target_port: u16, delay_ms: Arc<AtomicU64>) {
    // If nothing listens on the port, the client's connection is closed.
    let Ok(server) = TcpStream::connect(("127.0.0.1", target_port)).await else { return };
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let (client_reader, client_writer) = client.into_split();
    let (server_reader, server_writer) = server.into_split();
    tokio::join!(
        forward_direction(client_reader, server_writer, &delay_ms),
        forward_direction(server_reader, client_writer, &delay_ms),
    );
}

async fn forward_direction(
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    delay_ms: &AtomicU64,
) {
    let (sender, mut receiver) = mpsc::channel(MAX_CHUNKS);
    let reading = async move {
        let mut chunk = vec![0; CHUNK_BYTES];
        while let Ok(length @ 1..) = reader.read(&mut chunk).await {
            let delay = Duration::from_millis(delay_ms.load(Ordering::Relaxed));
            if sender.send((clock::instant() + delay, chunk[..length].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let writing = async move {
        while let Some((due_at, chunk)) = receiver.recv().await {
            tokio::time::sleep_until(due_at.into()).await;
            if writer.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = writer.shutdown().await;
    };
    tokio::join!(reading, writing);
}
