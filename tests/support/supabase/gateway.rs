//! A gateway in front of PostgREST that behaves like Supabase's gateway: it checks the API key, replaces a secret key
//! with a token and strips `/rest/v1`. It records all requests and injects faults.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use keychoir::tasks::{AbortOnDrop, Tasks};
use tokio::net::{TcpListener, UnixStream};

use super::{Body, SECRET_KEY};

/// The fault that the gateway injects into a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request is forwarded to PostgREST if its API key is valid.
    None,
    /// The connection is closed before the request is executed.
    Closed,
    /// The request is executed, and the connection is closed without a response.
    ResponseLost,
    /// The request is not executed, and the connection stays open without a response.
    NoResponse,
    /// The request is not executed, and the response has this status, as if an intermediary had sent it.
    Status(u16),
}

/// A request as the gateway received it.
#[derive(Clone, Debug)]
pub struct ReceivedRequest {
    pub path: String,
    pub api_key: Option<String>,
    pub authorization: Option<String>,
    pub prefer: Option<String>,
    pub body: String,
}

impl ReceivedRequest {
    /// Returns the number of rows in the body.
    pub fn row_count(&self) -> usize {
        serde_json::from_str::<Vec<serde_json::Value>>(&self.body).unwrap().len()
    }
}

/// A running gateway. It is stopped on drop.
pub struct Gateway {
    address: std::net::SocketAddr,
    state: Arc<GatewayState>,
    _task: AbortOnDrop,
}

struct GatewayState {
    api_socket: PathBuf,
    service_token: String,
    /// The faults of the next requests on any path.
    queued_faults: Mutex<VecDeque<Fault>>,
    /// The fault of all later requests whose path contains `faulty_path`.
    fault: Mutex<Fault>,
    faulty_path: Mutex<&'static str>,
    received: Mutex<Vec<ReceivedRequest>>,
}

impl Gateway {
    pub(super) async fn start(api_socket: PathBuf, service_token: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(GatewayState {
            api_socket,
            service_token,
            queued_faults: Mutex::default(),
            fault: Mutex::new(Fault::None),
            faulty_path: Mutex::default(),
            received: Mutex::default(),
        });
        let task = Tasks::new().spawn_guarded(serve(listener, Arc::clone(&state)));
        Self { address, state, _task: task }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sets the fault of all following requests.
    pub fn set_fault(&self, fault: Fault) {
        self.set_path_fault("", fault);
    }

    /// Sets the fault of all following requests whose path contains `path`. Other requests have no fault.
    pub fn set_path_fault(&self, path: &'static str, fault: Fault) {
        *self.state.faulty_path.lock().unwrap() = path;
        *self.state.fault.lock().unwrap() = fault;
    }

    /// Queues the faults of the next requests, in this order.
    pub fn queue_faults(&self, faults: &[Fault]) {
        self.state.queued_faults.lock().unwrap().extend(faults);
    }

    /// Returns whether all queued faults have been injected.
    pub fn has_injected_all(&self) -> bool {
        self.state.queued_faults.lock().unwrap().is_empty()
    }

    /// Returns the received requests, including those whose response was lost.
    pub fn received_requests(&self) -> Vec<ReceivedRequest> {
        self.state.received.lock().unwrap().clone()
    }
}

async fn serve(listener: TcpListener, state: Arc<GatewayState>) {
    let tasks = Tasks::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let state = Arc::clone(&state);
        tasks.spawn(async move {
            let service = service_fn(|request| respond(request, Arc::clone(&state)));
            // An injected fault closes the connection, which hyper reports as an error.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// The error that the gateway returns to make hyper close the connection without a response.
#[derive(Debug, thiserror::Error)]
#[error("the test closes the connection")]
struct ConnectionClosed;

async fn respond(
    request: Request<Incoming>,
    state: Arc<GatewayState>,
) -> Result<Response<Body>, ConnectionClosed> {
    let (mut head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| ConnectionClosed)?.to_bytes();
    let header = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let received_request = ReceivedRequest {
        path: head.uri.to_string(),
        api_key: header("apikey"),
        authorization: header("authorization"),
        prefer: header("prefer"),
        body: String::from_utf8(body.to_vec()).unwrap(),
    };
    state.received.lock().unwrap().push(received_request.clone());
    let queued_fault = state.queued_faults.lock().unwrap().pop_front();
    let is_faulty_path = received_request.path.contains(*state.faulty_path.lock().unwrap());
    let path_fault = if is_faulty_path { *state.fault.lock().unwrap() } else { Fault::None };
    let fault = queued_fault.unwrap_or(path_fault);
    match fault {
        Fault::None | Fault::ResponseLost => {}
        Fault::Closed => return Err(ConnectionClosed),
        Fault::NoResponse => std::future::pending::<()>().await,
        Fault::Status(status) => return Ok(status_response(status)),
    }
    let Some(authorization) = upstream_authorization(&received_request, &state.service_token) else {
        return Ok(status_response(401));
    };
    head.headers.insert(AUTHORIZATION, HeaderValue::from_str(&authorization).unwrap());
    let path = received_request.path.strip_prefix("/rest/v1").expect("the path must start with /rest/v1");
    head.uri = path.parse().unwrap();
    let response = forward(&state.api_socket, Request::from_parts(head, Full::new(body))).await;
    if fault == Fault::ResponseLost { Err(ConnectionClosed) } else { Ok(response) }
}

/// Returns the `authorization` header for PostgREST, or `None` if the request is not authorized.
fn upstream_authorization(request: &ReceivedRequest, service_token: &str) -> Option<String> {
    match (request.api_key.as_deref(), &request.authorization) {
        (Some(SECRET_KEY), None) => Some(format!("Bearer {service_token}")),
        // A secret key is not a token, so it must not be sent with an `authorization` header.
        (Some(SECRET_KEY), Some(_)) => None,
        (Some(key), Some(authorization)) if key.starts_with("eyJ") => Some(authorization.clone()),
        _ => None,
    }
}

/// Sends a request to PostgREST and returns its buffered response.
async fn forward(api_socket: &Path, request: Request<Body>) -> Response<Body> {
    let stream = UnixStream::connect(api_socket).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await.unwrap();
    let _connection_task = Tasks::new().spawn_guarded(async { drop(connection.await) });
    let (mut head, body) = sender.send_request(request).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    head.headers.remove("transfer-encoding");
    Response::from_parts(head, Full::new(body))
}

fn status_response(status: u16) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from_static(b"{\"message\":\"no\"}")));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response
}
