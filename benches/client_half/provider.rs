//! The other end of the connections: a thread for each TCP connection where time is measured, and a stream in
//! memory that always does the same where instructions are counted.

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

use crate::cases::{CASES, Case};

/// The end of a chunked body, behind a chunk.
const LAST_CHUNK: &[u8] = b"\r\n0\r\n\r\n";
const END_OF_HEAD: &[u8] = b"\r\n\r\n";

/// Answers requests on a port of its own, and counts the connections.
pub fn start() -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let opened = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&opened);
    keychoir::tasks::spawn_thread("provider", move || {
        for connection in listener.incoming() {
            count.fetch_add(1, Ordering::Relaxed);
            keychoir::tasks::spawn_thread("connection", move || answer(connection.unwrap())).unwrap();
        }
    })
    .unwrap();
    (address, opened)
}

/// Answers the requests of a connection, by the case whose number is the path.
fn answer(mut connection: TcpStream) {
    connection.set_nodelay(true).unwrap();
    let (mut read, mut buffer) = (Vec::new(), vec![0; 256 * 1024]);
    loop {
        read.clear();
        let end = loop {
            let Ok(bytes @ 1..) = connection.read(&mut buffer) else { return };
            read.extend_from_slice(&buffer[..bytes]);
            if let Some(end) = find_end(&read) {
                break end;
            }
        };
        let head = String::from_utf8_lossy(&read[..end]).into_owned();
        let path = head.split(' ').nth(1).unwrap().trim_start_matches('/');
        let case = &CASES[path.parse::<usize>().unwrap()];
        let mut left = case.body_bytes - (read.len() - end);
        while left > 0 {
            let Ok(bytes @ 1..) = connection.read(&mut buffer) else { return };
            left -= bytes;
        }
        let block = case.block();
        let mut first = case.head().into_bytes();
        if case.pause.is_none() {
            first.extend_from_slice(&block);
        }
        connection.write_all(&first).unwrap();
        for _ in usize::from(case.pause.is_none())..case.blocks {
            if let Some(pause) = case.pause {
                std::thread::sleep(pause);
            }
            connection.write_all(&block).unwrap();
        }
        connection.write_all(case.tail()).unwrap();
    }
}

/// A client that sends this number of requests and reads their chunked answers.
pub fn ask(address: SocketAddr, requests: usize) {
    let mut connection = TcpStream::connect(address).unwrap();
    connection.set_nodelay(true).unwrap();
    let mut buffer = vec![0; 256 * 1024];
    for _ in 0..requests {
        connection.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").unwrap();
        let mut end = Vec::new();
        while !end.ends_with(LAST_CHUNK) {
            let bytes = connection.read(&mut buffer).unwrap();
            assert_ne!(bytes, 0, "the answer is complete");
            end.extend_from_slice(&buffer[bytes.saturating_sub(LAST_CHUNK.len())..bytes]);
            end.drain(..end.len().saturating_sub(LAST_CHUNK.len()));
        }
    }
}

fn find_end(read: &[u8]) -> Option<usize> {
    memchr::memmem::find(read, END_OF_HEAD).map(|at| at + END_OF_HEAD.len())
}

/// Opens streams in memory that answer by one case.
#[derive(Clone)]
pub struct Memory {
    pub case: &'static Case,
    answer: Bytes,
}

impl Memory {
    pub fn new(case: &'static Case) -> Self {
        let mut answer = case.head().into_bytes();
        for _ in 0..case.counted_blocks {
            answer.extend_from_slice(&case.block());
        }
        answer.extend_from_slice(case.tail());
        Self { case, answer: answer.into() }
    }
}

impl Connect for Memory {
    type Io = Pipe;

    async fn connect(&self, _: &Authority) -> Result<Pipe, ConnectError> {
        let arrives = match self.case.pause {
            Some(_) => self.case.block().len(),
            None => 256 * 1024,
        };
        let answer = self.answer.clone();
        Ok(Pipe {
            body_bytes: self.case.body_bytes,
            arrives,
            answer,
            rest: None,
            left: Bytes::new(),
            arrived: 0,
            reader: None,
        })
    }
}

/// A stream in memory.
pub struct Pipe {
    body_bytes: usize,
    /// Bytes that arrive at once.
    arrives: usize,
    answer: Bytes,
    /// Bytes of the request that are still to come, once its head is complete.
    rest: Option<usize>,
    /// What is left of the answer, and how much of it has arrived.
    left: Bytes,
    arrived: usize,
    /// The task that waits for the answer.
    reader: Option<Waker>,
}

impl Pipe {
    fn take(&mut self, bytes: &[u8]) {
        let body = match self.rest {
            None => bytes.len() - find_end(bytes).expect("a head comes in one piece"),
            Some(_) => bytes.len(),
        };
        let rest = self.rest.unwrap_or(self.body_bytes) - body;
        self.rest = Some(rest);
        if rest == 0 {
            (self.rest, self.left, self.arrived) = (None, self.answer.clone(), 0);
            if let Some(reader) = self.reader.take() {
                reader.wake();
            }
        }
    }
}

impl AsyncRead for Pipe {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.left.is_empty() {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if self.arrived == 0 {
            self.arrived = self.arrives.min(self.left.len());
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let bytes = self.arrived.min(to.remaining());
        to.put_slice(&self.left[..bytes]);
        self.left.advance(bytes);
        self.arrived -= bytes;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.take(from);
        Poll::Ready(Ok(from.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let filled = from.iter().filter(|slice| !slice.is_empty());
        Poll::Ready(Ok(filled.map(|slice| (self.take(slice), slice.len()).1).sum()))
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
