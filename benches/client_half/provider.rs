//! Simulates the provider and a client of the benchmark. When time is measured, the provider serves each TCP connection
//! on a thread. When instructions are counted, a deterministic stream in memory replaces the connection. The client
//! reads the responses that hyper's server relays.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes};
use keychoir::policy::authority::Authority;
use keychoir::upstream::{Connect, ConnectError};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::cases::{CASES, RequestCase};

/// The end of the data of a chunk, and the last chunk.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";
const END_OF_HEAD: &[u8] = b"\r\n\r\n";

/// Starts a provider on a free port. Returns its address, and the number of connections that it has accepted.
pub fn start() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let opened_connections = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&opened_connections);
    keychoir::tasks::spawn_thread("provider", move || {
        for connection in listener.incoming() {
            counter.fetch_add(1, Ordering::Relaxed);
            keychoir::tasks::spawn_thread("connection", move || serve_connection(connection.unwrap()))
                .unwrap();
        }
    })
    .unwrap();
    (address, opened_connections)
}

/// Serves the requests of a connection. The path of a request contains the index of its case.
fn serve_connection(mut connection: TcpStream) {
    connection.set_nodelay(true).unwrap();
    let (mut request_bytes, mut buffer) = (Vec::new(), vec![0; 256 * 1024]);
    loop {
        request_bytes.clear();
        let head_end = loop {
            let Ok(bytes @ 1..) = connection.read(&mut buffer) else { return };
            request_bytes.extend_from_slice(&buffer[..bytes]);
            if let Some(head_end) = find_head_end(&request_bytes) {
                break head_end;
            }
        };
        let head = String::from_utf8_lossy(&request_bytes[..head_end]).into_owned();
        let path = head.split(' ').nth(1).unwrap().trim_start_matches('/');
        let case = &CASES[path.parse::<usize>().unwrap()];
        let mut remaining = case.body_bytes - (request_bytes.len() - head_end);
        while remaining > 0 {
            let Ok(bytes @ 1..) = connection.read(&mut buffer) else { return };
            remaining -= bytes;
        }
        let block = case.response_block();
        let mut first_write = case.response_head().into_bytes();
        if case.pause.is_none() {
            first_write.extend_from_slice(&block);
        }
        connection.write_all(&first_write).unwrap();
        for _ in usize::from(case.pause.is_none())..case.blocks {
            if let Some(pause) = case.pause {
                std::thread::sleep(pause);
            }
            connection.write_all(&block).unwrap();
        }
        connection.write_all(case.response_end()).unwrap();
    }
}

/// Sends this number of requests as a client, and reads their chunked responses.
pub fn send_requests(address: SocketAddr, requests: usize) {
    let mut connection = TcpStream::connect(address).unwrap();
    connection.set_nodelay(true).unwrap();
    let mut buffer = vec![0; 256 * 1024];
    for _ in 0..requests {
        connection.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut last_bytes = Vec::new();
        while !last_bytes.ends_with(LAST_CHUNK) {
            let bytes = connection.read(&mut buffer).unwrap();
            assert_ne!(bytes, 0, "the response must be complete");
            last_bytes.extend_from_slice(&buffer[bytes.saturating_sub(LAST_CHUNK.len())..bytes]);
            last_bytes.drain(..last_bytes.len().saturating_sub(LAST_CHUNK.len()));
        }
    }
}

/// Returns the length of the head at the start of `bytes`, or `None` if the head is incomplete.
fn find_head_end(bytes: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, END_OF_HEAD).map(|index| index + END_OF_HEAD.len())
}

/// Opens streams in memory that respond to the requests of one case.
#[derive(Clone)]
pub struct MemoryConnector {
    pub case: &'static RequestCase,
    response: Bytes,
}

impl MemoryConnector {
    pub fn new(case: &'static RequestCase) -> Self {
        let mut response = case.response_head().into_bytes();
        for _ in 0..case.counted_blocks {
            response.extend_from_slice(&case.response_block());
        }
        response.extend_from_slice(case.response_end());
        Self { case, response: response.into() }
    }
}

impl Connect for MemoryConnector {
    type Io = MemoryStream;

    async fn connect(&self, _: &Authority) -> Result<MemoryStream, ConnectError> {
        let burst_bytes = match self.case.pause {
            Some(_) => self.case.response_block().len(),
            None => 256 * 1024,
        };
        Ok(MemoryStream {
            body_bytes: self.case.body_bytes,
            burst_bytes,
            response: self.response.clone(),
            remaining_request: None,
            remaining_response: Bytes::new(),
            readable_bytes: 0,
            reader: None,
        })
    }
}

/// A stream in memory that sends the response after it has received the complete request.
pub struct MemoryStream {
    body_bytes: usize,
    /// Number of response bytes that become readable at once.
    burst_bytes: usize,
    response: Bytes,
    /// The number of remaining bytes of the request body, or `None` while no request is being received.
    remaining_request: Option<usize>,
    remaining_response: Bytes,
    /// Number of readable bytes of `remaining_response`.
    readable_bytes: usize,
    /// The task that waits for the response.
    reader: Option<Waker>,
}

impl MemoryStream {
    fn receive_request(&mut self, bytes: &[u8]) {
        let body_bytes = match self.remaining_request {
            None => bytes.len() - find_head_end(bytes).expect("the head must be written at once"),
            Some(_) => bytes.len(),
        };
        let remaining = self.remaining_request.unwrap_or(self.body_bytes) - body_bytes;
        self.remaining_request = (remaining > 0).then_some(remaining);
        if remaining == 0 {
            (self.remaining_response, self.readable_bytes) = (self.response.clone(), 0);
            if let Some(reader) = self.reader.take() {
                reader.wake();
            }
        }
    }
}

impl AsyncRead for MemoryStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.remaining_response.is_empty() {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if self.readable_bytes == 0 {
            self.readable_bytes = self.burst_bytes.min(self.remaining_response.len());
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let bytes = self.readable_bytes.min(buffer.remaining());
        buffer.put_slice(&self.remaining_response[..bytes]);
        self.remaining_response.advance(bytes);
        self.readable_bytes -= bytes;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for MemoryStream {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.receive_request(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let filled_slices = slices.iter().filter(|slice| !slice.is_empty());
        Poll::Ready(Ok(filled_slices.map(|slice| (self.receive_request(slice), slice.len()).1).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
