//! The gateway in front of PostgREST at Supabase: it checks the project's keys, replaces the new
//! kind by a token, and strips `/rest/v1`. Here it also injects faults.

use std::collections::VecDeque;
use std::path::PathBuf;
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

/// The fault of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No fault.
    None,
    /// The connection is closed before the request is executed.
    Closed,
    /// The request is executed, and the connection is closed without a response.
    AnswerLost,
    /// There is no response, and the request is not executed.
    Silent,
    /// This status, from an intermediary.
    Status(u16),
}

/// A received request.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub api_key: Option<String>,
    pub authorization: Option<String>,
    pub prefer: Option<String>,
    pub body: String,
}

impl Seen {
    /// The number of rows in it.
    pub fn rows(&self) -> usize {
        serde_json::from_str::<Vec<serde_json::Value>>(&self.body).unwrap().len()
    }
}

/// The gateway.
pub struct Gateway {
    address: std::net::SocketAddr,
    shared: Arc<Shared>,
    _serving: AbortOnDrop,
}

struct Shared {
    api: PathBuf,
    service_token: String,
    /// The faults of the next requests, and the fault of all later ones.
    script: Mutex<VecDeque<Fault>>,
    fault: Mutex<Fault>,
    /// Faults apply only to requests with this in their path.
    place: Mutex<&'static str>,
    seen: Mutex<Vec<Seen>>,
}

impl Gateway {
    pub(super) async fn start(api: PathBuf, service_token: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            api,
            service_token,
            script: Mutex::default(),
            fault: Mutex::new(Fault::None),
            place: Mutex::default(),
            seen: Mutex::default(),
        });
        let serving = Tasks::new().spawn_guarded(serve(listener, Arc::clone(&shared)));
        Self { address, shared, _serving: serving }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Sets the fault of all requests from now on.
    pub fn meet(&self, fault: Fault) {
        self.meet_at("", fault);
    }

    /// Sets the fault of requests with `place` in their path; all others have none.
    pub fn meet_at(&self, place: &'static str, fault: Fault) {
        *self.shared.place.lock().unwrap() = place;
        *self.shared.fault.lock().unwrap() = fault;
    }

    /// Sets the faults of the next requests, in order.
    pub fn meet_first(&self, faults: &[Fault]) {
        self.shared.script.lock().unwrap().extend(faults);
    }

    /// Whether all of them have occurred.
    pub fn has_met_all(&self) -> bool {
        self.shared.script.lock().unwrap().is_empty()
    }

    /// The received requests, including those whose response was lost.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    let tasks = Tasks::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let shared = Arc::clone(&shared);
        tasks.spawn(async move {
            let service = service_fn(|request| answer(request, Arc::clone(&shared)));
            // A connection closed by a fault is expected.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

/// The connection is to be closed without a response.
#[derive(Debug, thiserror::Error)]
#[error("as the test wants it")]
struct Wanted;

async fn answer(request: Request<Incoming>, shared: Arc<Shared>) -> Result<Response<Body>, Wanted> {
    let (mut head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Wanted)?.to_bytes();
    let text = |name: &str| head.headers.get(name).map(|value| value.to_str().unwrap().to_owned());
    let seen = Seen {
        path: head.uri.to_string(),
        api_key: text("apikey"),
        authorization: text("authorization"),
        prefer: text("prefer"),
        body: String::from_utf8(body.to_vec()).unwrap(),
    };
    shared.seen.lock().unwrap().push(seen.clone());
    let scripted = shared.script.lock().unwrap().pop_front();
    let is_there = seen.path.contains(*shared.place.lock().unwrap());
    let usual = if is_there { *shared.fault.lock().unwrap() } else { Fault::None };
    let fault = scripted.unwrap_or(usual);
    match fault {
        Fault::None | Fault::AnswerLost => {}
        Fault::Closed => return Err(Wanted),
        Fault::Silent => std::future::pending::<()>().await,
        Fault::Status(status) => return Ok(status_only(status)),
    }
    let authorization = match (seen.api_key.as_deref(), &seen.authorization) {
        (Some(SECRET_KEY), None) => Some(format!("Bearer {}", shared.service_token)),
        // It stands in the place of a token and is none.
        (Some(SECRET_KEY), Some(_)) => None,
        (Some(key), Some(authorization)) if key.starts_with("eyJ") => Some(authorization.clone()),
        _ => None,
    };
    let Some(authorization) = authorization else { return Ok(status_only(401)) };
    head.headers.insert(AUTHORIZATION, HeaderValue::from_str(&authorization).unwrap());
    let path = head.uri.to_string();
    let path = path.strip_prefix("/rest/v1").expect("the API is below /rest/v1").to_owned();
    head.uri = path.parse().unwrap();
    let stream = UnixStream::connect(&shared.api).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Body>(TokioIo::new(stream)).await.unwrap();
    let _running = Tasks::new().spawn_guarded(async { drop(connection.await) });
    let (mut head, body) =
        sender.send_request(Request::from_parts(head, Full::new(body))).await.unwrap().into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    if fault == Fault::AnswerLost {
        return Err(Wanted);
    }
    head.headers.remove("transfer-encoding");
    Ok(Response::from_parts(head, Full::new(body)))
}

fn status_only(status: u16) -> Response<Body> {
    let mut answer = Response::new(Full::new(Bytes::from_static(b"{\"message\":\"no\"}")));
    *answer.status_mut() = StatusCode::from_u16(status).unwrap();
    answer
}
