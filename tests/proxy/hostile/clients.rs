//! Hostile clients. A case contains the bytes that a client sends, its behaviour after sending, and the expected
//! outcome for the client and for the provider. [`exchange`] runs a client on a connection, and [`check_outcome`]
//! compares the received bytes with the expected outcome.

mod cases;

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::http_parser;
use super::{EXCHANGE_TIMEOUT, escape_bytes};

pub use cases::{cases, valid_request};

/// The client token that all valid requests of these cases contain.
pub const TOKEN: &str = "hostile-token-canary-41c9";

/// A hostile client and its expected outcome.
pub struct ClientCase {
    pub name: &'static str,
    /// The bytes to send. Each chunk is written separately.
    pub chunks: Vec<Vec<u8>>,
    pub after_sending: AfterSending,
    pub outcome: ClientOutcome,
    pub forwarded: Forwarded,
    /// Whether the case is run with a proxy without configured clients, where local apps need no token.
    pub needs_no_token: bool,
}

/// The requests of a client that reach the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded {
    Nothing,
    /// Exactly this number of complete requests, or at most this number if the client does not read its responses.
    Complete(usize),
    /// At most one request, and incomplete.
    Partial,
}

/// The behaviour of a client after sending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterSending {
    /// Reads until the proxy closes the connection.
    ReadToEnd,
    /// Closes its write half, and reads until the proxy closes the connection.
    HalfClose,
    /// Reads the response, then sends a valid request on the same connection and reads to the end.
    SendAnotherRequest,
    /// Disconnects with a FIN, without reading.
    Disconnect,
    /// Disconnects with a reset, without reading.
    Reset,
}

/// The bytes that a client receives before the connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientOutcome {
    /// Complete responses with these statuses, in this order.
    Responses(&'static [u16]),
    /// An HTTP/2 GOAWAY.
    GoAway,
    /// An HTTP/2 GOAWAY, or a response with the status 400. If the preface arrives byte by byte, the proxy may refuse
    /// its HTTP version before the preface is complete.
    GoAwayOr400,
    /// A TLS alert.
    TlsAlert,
    /// The end of the connection, without any bytes.
    Closed,
    /// The client does not read.
    NotRead,
}

/// Runs a client on a new connection. Returns the received bytes.
///
/// # Errors
///
/// Returns an error if the proxy does not close the connection within the timeout.
pub async fn exchange(
    address: SocketAddr,
    chunks: &[Vec<u8>],
    after_sending: AfterSending,
) -> Result<Vec<u8>, String> {
    let mut received_bytes = Vec::new();
    let exchanged =
        timeout(EXCHANGE_TIMEOUT, run_exchange(address, chunks, after_sending, &mut received_bytes)).await;
    exchanged.map_err(|_| {
        format!("the proxy did not close the connection after {}", escape_bytes(&received_bytes))
    })?;
    Ok(received_bytes)
}

async fn run_exchange(
    address: SocketAddr,
    chunks: &[Vec<u8>],
    after_sending: AfterSending,
    received: &mut Vec<u8>,
) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut reader, mut writer) = stream.split();
    let send = async {
        for chunk in chunks {
            // A proxy that has refused a request need not read the rest of it.
            if writer.write_all(chunk).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
        if after_sending == AfterSending::HalfClose {
            let _ = writer.shutdown().await;
        }
    };
    // A reset also ends the connection.
    let read_response = async {
        match after_sending {
            AfterSending::ReadToEnd | AfterSending::HalfClose => drop(reader.read_to_end(received).await),
            AfterSending::SendAnotherRequest | AfterSending::Disconnect | AfterSending::Reset => {}
        }
    };
    tokio::join!(send, read_response);
    if after_sending == AfterSending::SendAnotherRequest {
        read_first_response(&mut reader, received).await;
        let _ = writer.write_all(valid_request("/v1/voices", "connection: close\r\n").as_bytes()).await;
        let _ = reader.read_to_end(received).await;
    }
    if after_sending == AfterSending::Reset {
        stream.set_zero_linger().unwrap();
    }
}

/// Reads until a final response is complete or the connection has ended.
async fn read_first_response(reader: &mut (impl AsyncReadExt + Unpin), received: &mut Vec<u8>) {
    let has_response = |received: &[u8]| {
        http_parser::parse_responses(received).is_ok_and(|responses| {
            responses.last().is_some_and(|last| last.status >= 200 && last.is_complete)
        })
    };
    while !has_response(received) && reader.read_buf(received).await.is_ok_and(|count| count > 0) {}
}

/// Compares the bytes that a client received with the expected outcome.
///
/// # Errors
///
/// Describes the difference.
pub fn check_outcome(
    received: &[u8],
    outcome: ClientOutcome,
    after_sending: AfterSending,
) -> Result<(), String> {
    let matches = match outcome {
        ClientOutcome::Responses(statuses) => {
            let mut responses = http_parser::parse_responses(received)?;
            // The proxy sends an interim 100 to check whether a client that has closed its write half is
            // still connected.
            responses.retain(|response| response.status != 100 || after_sending != AfterSending::HalfClose);
            let statuses_found: Vec<u16> = responses.iter().map(|response| response.status).collect();
            if statuses_found != statuses {
                return Err(format!(
                    "the statuses are {statuses_found:?} instead of {statuses:?}: {}",
                    escape_bytes(received)
                ));
            }
            responses.iter().all(|response| response.is_complete)
        }
        // A SETTINGS frame, and a GOAWAY frame with HTTP_1_1_REQUIRED.
        ClientOutcome::GoAway => {
            received.len() == 26 && received[3] == 4 && received[12] == 7 && received[25] == 0xd
        }
        ClientOutcome::GoAwayOr400 => [ClientOutcome::GoAway, ClientOutcome::Responses(&[400])]
            .into_iter()
            .any(|outcome| check_outcome(received, outcome, after_sending).is_ok()),
        ClientOutcome::TlsAlert => received.starts_with(b"\x15\x03"),
        ClientOutcome::Closed | ClientOutcome::NotRead => received.is_empty(),
    };
    if matches {
        Ok(())
    } else {
        Err(format!("the client must receive {outcome:?}, not {}", escape_bytes(received)))
    }
}

/// Returns whether a client may receive these bytes after a mutated request: no bytes, an HTTP response, an HTTP/2
/// refusal, or a TLS alert or handshake. The body is not checked, because the request may have been a HEAD request.
pub fn is_allowed_response(received: &[u8]) -> bool {
    let starts = [&b"HTTP/1.1 "[..], b"HTTP/1.0 ", b"\0\0\0\x04", b"\x15\x03", b"\x16\x03"];
    received.is_empty() || starts.iter().any(|start| received.starts_with(start))
}
