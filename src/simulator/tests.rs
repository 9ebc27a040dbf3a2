//! Tests the simulator over real connections, and contains the HTTP client of these tests. `refusals` checks every
//! refusal byte for byte, `serving` the common operations, `operations` the other operations, `ownership` the objects
//! of workspaces, `plans` the features of plans, `faults` the scripted faults, `ledger` the ledger and its violations,
//! and the modules `sockets…` the WebSockets of the provider.

mod faults;
mod ledger;
mod operations;
mod ownership;
mod plans;
mod refusals;
mod serving;
mod sockets;
mod sockets_agent;
mod sockets_dialogue;
mod sockets_faults;
mod sockets_refusals;
mod sockets_scribe;
mod sockets_speech;

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};

use super::{Plan, Simulator};
use crate::tasks::Tasks;

/// Maximum wait for a response or a message, which is much longer than any of them needs.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);

/// The path for speech with a public voice.
const SPEECH_PATH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM";

/// Starts a simulator of the plan.
async fn start(plan: Plan) -> Simulator {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    Simulator::start(listener, plan).await.unwrap()
}

/// Starts a simulator of keys in the notation of [`Plan::parse`].
async fn start_with_keys(keys: &str) -> Simulator {
    start(Plan::parse(keys).unwrap()).await
}

/// A request before it is sent.
struct SimulatorCall {
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Bytes,
}

/// A received response.
#[derive(Debug)]
struct SimulatorReply {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
    /// Number of received chunks of the body.
    chunk_count: usize,
    /// Whether the connection broke before the end of the body.
    is_broken: bool,
}

fn get(path: &str) -> SimulatorCall {
    SimulatorCall { method: "GET", path: path.to_owned(), headers: Vec::new(), body: Bytes::new() }
}

fn post(path: &str, body: impl Into<Bytes>) -> SimulatorCall {
    SimulatorCall { method: "POST", body: body.into(), ..get(path) }
}

/// Creates a speech request with the given `text`.
fn speech_call(text: &str) -> SimulatorCall {
    post(SPEECH_PATH, serde_json::json!({ "text": text }).to_string())
}

impl SimulatorCall {
    fn key(self, key: &str) -> Self {
        self.header("xi-api-key", key)
    }

    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    /// Sends the request on a new connection. Returns an error if the connection ends without a response.
    async fn try_send(self, simulator: &Simulator) -> Result<SimulatorReply, hyper::Error> {
        let exchange = async {
            let stream = TcpStream::connect(simulator.address()).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            let _connection_task = Tasks::new().spawn_guarded(async move {
                let _ended = connection.await;
            });
            let mut request =
                Request::builder().method(self.method).uri(self.path).header("host", "simulator");
            for (name, value) in self.headers {
                request = request.header(name, value);
            }
            let (parts, mut body) =
                sender.send_request(request.body(Full::new(self.body)).unwrap()).await?.into_parts();
            let mut reply = SimulatorReply {
                status: parts.status.as_u16(),
                headers: parts.headers,
                body: Bytes::new(),
                chunk_count: 0,
                is_broken: false,
            };
            let mut bytes = BytesMut::new();
            while let Some(frame) = body.frame().await {
                match frame {
                    Ok(frame) => bytes.extend_from_slice(&frame.into_data().unwrap()),
                    Err(_) => {
                        reply.is_broken = true;
                        break;
                    }
                }
                reply.chunk_count += 1;
            }
            reply.body = bytes.freeze();
            Ok(reply)
        };
        tokio::time::timeout(RESPONSE_TIMEOUT, exchange).await.expect("the response must arrive in time")
    }

    /// Sends the request on a new connection, and returns its response.
    async fn send_to(self, simulator: &Simulator) -> SimulatorReply {
        self.try_send(simulator).await.expect("the connection must not end without a response")
    }
}

impl SimulatorReply {
    /// Returns the value of a header, or an empty text if the header is missing.
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}
