//! Pooled connections to the provider, HTTP/1.1, TLS or plain: to one authority, or to the one that
//! a key belongs to (a region's keys work at their own host only). A key enters the head here and nowhere else, and a fault says how far the request got.
//!
//! Redirects are answers like any other: nothing here follows them.

mod answer;
mod connect;
mod idle;
mod side;

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::header::{HOST, HeaderName, HeaderValue, UPGRADE};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri};
use http_body::Body;
use hyper::body::Incoming;
use hyper::client::conn::http1;

use crate::body::replay::{Attempt, Upload, Waiting};
use crate::clock;
use crate::policy::authority::Authority;
use crate::policy::replay::Progress;
use crate::secret::ApiKey;
use crate::tasks::Tasks;

pub use answer::{AnswerBody, AnswerError};
pub use connect::{Connect, ConnectError, Direct, TlsError};
use idle::{Connection, Idle};
pub use side::side_calls;

/// How the upstream behaves.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// For the name, the connection and the TLS handshake together.
    pub connect_max: Duration,
    /// From the last byte of the request to the head of the answer.
    pub first_byte_max: Duration,
    /// Between two pieces of an answer.
    pub stream_idle_max: Duration,
    /// Between two pieces of a request's body, whoever is slow.
    pub body_idle_max: Duration,
    /// Connections kept open without a request.
    pub idle_connections_max: usize,
    /// How long they are kept.
    pub idle_max: Duration,
    /// How long a connection takes new requests, so that a new address of the name is followed.
    pub connection_age_max: Duration,
}

/// A request's head as it goes to the provider, but for its key.
#[derive(Clone, Debug)]
pub struct Outbound {
    /// The method, whatever it is.
    pub method: Method,
    /// Path and query, without the client's credentials, every other byte as received.
    pub target: Uri,
    /// Headers that were stripped for the upstream.
    pub headers: HeaderMap,
}

impl Outbound {
    /// Copies what is still part of the buffer that the client's head came in, so that the buffer can
    /// go although this head is kept for long.
    pub fn settle(&mut self) {
        if let Ok(copied) = Uri::try_from(self.target.to_string()) {
            self.target = copied;
        }
        for value in self.headers.values_mut() {
            let Ok(mut copied) = HeaderValue::from_bytes(value.as_bytes()) else { continue };
            copied.set_sensitive(value.is_sensitive());
            *value = copied;
        }
    }

    /// Whether it asks for a socket: then, and only then, 101 is an answer.
    #[must_use]
    pub fn asks_for_socket(&self) -> bool {
        self.headers.contains_key(UPGRADE)
    }
}

/// An attempt that ended without an answer.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct SendError {
    /// How far it got.
    pub progress: Progress,
    /// What happened.
    pub kind: SendErrorKind,
}

/// What happened to an attempt without an answer.
#[derive(Debug, thiserror::Error)]
pub enum SendErrorKind {
    /// There is no connection.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// There was no connection in time.
    #[error("no connection within {} ms", .0.as_millis())]
    ConnectTimeout(Duration),
    /// The connection broke before a complete head.
    #[error("the connection broke before an answer: {0}")]
    Broken(#[source] hyper::Error),
    /// No head came in time.
    #[error("no answer within {} ms", .0.as_millis())]
    AnswerTimeout(Duration),
    /// The upstream stopped taking the body.
    #[error("the upstream took no more of the request's body for {} ms", .0.as_millis())]
    UploadStalled(Duration),
    /// The client stopped sending the body.
    #[error("the client sent no more of its request's body for {} ms", .0.as_millis())]
    ClientStalled(Duration),
    /// The client's body broke off or was malformed.
    #[error("the client's request body broke off or was malformed")]
    ClientBroke,
    /// The connection stopped to speak HTTP, which nobody had asked for.
    #[error("the upstream left HTTP with {0}, which it was not asked for")]
    Switched(StatusCode),
    /// The request cannot be written.
    #[error("the request cannot be sent upstream: {0}")]
    Unsendable(#[source] http::Error),
}

const KEY_HEADER: HeaderName = HeaderName::from_static("xi-api-key");

/// The provider, with its open connections. Cheap to clone.
#[derive(Debug)]
pub struct Upstream<B, C = Direct> {
    inner: Arc<Inner<B, C>>,
}

#[derive(Debug)]
struct Inner<B, C> {
    connector: C,
    /// Where keys go that have no place of their own.
    home: Place<B>,
    /// Where the others go. Few, and found once each.
    others: ArcSwap<Vec<Place<B>>>,
    settings: Settings,
    tasks: Tasks,
}

/// One authority and the connections to it that wait.
#[derive(Debug)]
struct Place<B> {
    authority: Arc<Authority>,
    idle: Arc<Idle<Attempt<B>>>,
}

impl<B> Clone for Place<B> {
    fn clone(&self) -> Self {
        Self { authority: Arc::clone(&self.authority), idle: Arc::clone(&self.idle) }
    }
}

impl<B> Place<B> {
    fn new(authority: Arc<Authority>, settings: &Settings) -> Self {
        let idle = Idle::new(settings.idle_connections_max, settings.idle_max, settings.connection_age_max);
        Self { authority, idle: Arc::new(idle) }
    }
}

impl<B, C> Clone for Upstream<B, C> {
    fn clone(&self) -> Self {
        Self { inner: Arc::clone(&self.inner) }
    }
}

impl<B, C> Upstream<B, C>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    C: Connect,
{
    /// An upstream at `authority`. Connections are opened when they are needed.
    pub fn new(authority: Authority, connector: C, settings: Settings, tasks: Tasks) -> Self {
        let home = Place::new(Arc::new(authority), &settings);
        Self { inner: Arc::new(Inner { connector, home, others: ArcSwap::default(), settings, tasks }) }
    }

    /// The same upstream for one of so many cores: with connections of its own, which nobody on
    /// another core waits for, and with its share of those that may wait for a request.
    #[must_use]
    pub fn for_core(&self, cores: usize) -> Self
    where
        C: Clone,
    {
        let Inner { connector, home, settings, tasks, .. } = &*self.inner;
        let idle_connections_max = settings.idle_connections_max.div_ceil(cores.max(1));
        let settings = Settings { idle_connections_max, ..*settings };
        let home = Place::new(Arc::clone(&home.authority), &settings);
        let (connector, tasks) = (connector.clone(), tasks.clone());
        Self { inner: Arc::new(Inner { connector, home, others: ArcSwap::default(), settings, tasks }) }
    }

    /// The place of a key: its own, or the common one.
    fn place(&self, own: Option<&Arc<Authority>>) -> Place<B> {
        let Inner { home, others, settings, .. } = &*self.inner;
        let Some(own) = own.filter(|own| ***own != *home.authority) else { return home.clone() };
        let known = |places: &[Place<B>]| places.iter().find(|place| place.authority == *own).cloned();
        if let Some(place) = known(&others.load()) {
            return place;
        }
        let new = Place::new(Arc::clone(own), settings);
        // Whoever comes second finds the first one's.
        others.rcu(|places| {
            let mut places = places.to_vec();
            if known(&places).is_none() {
                places.push(new.clone());
            }
            places
        });
        known(&others.load()).unwrap_or(new)
    }

    /// Sends one attempt with `key`, to `own` authority if the key has one, and waits for the head
    /// of its answer.
    ///
    /// A connection kept open may have been closed meanwhile. When it hands the request back
    /// unstarted, the next connection takes it.
    ///
    /// # Errors
    ///
    /// When no complete head came, with how far the attempt got.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the connection: the provider sees that nobody waits any more.
    pub async fn send(
        &self,
        own: Option<&Arc<Authority>>,
        key: &ApiKey,
        outbound: &Outbound,
        body: Attempt<B>,
    ) -> Result<Response<AnswerBody<B>>, SendError> {
        let place = self.place(own);
        let upload = body.upload();
        let mut request = request(&place.authority, key, outbound, body)?;
        loop {
            let (mut connection, is_reused) = match place.idle.take(clock::instant()) {
                Some(connection) => (connection, true),
                None => (self.open(&place.authority).await?, false),
            };
            match self.answer(&mut connection, request, &upload).await {
                Ok(answer) if answer.status().is_informational() && !is_switch(&answer, outbound) => {
                    let kind = SendErrorKind::Switched(answer.status());
                    return Err(SendError { progress: Progress::Unanswered, kind });
                }
                Ok(answer) => {
                    let idle_max = self.inner.settings.stream_idle_max;
                    let home = Arc::clone(&place.idle);
                    return Ok(answer.map(|body| AnswerBody::new(body, connection, home, upload, idle_max)));
                }
                Err(Unanswered::HandedBack(unstarted)) if is_reused => request = *unstarted,
                Err(Unanswered::HandedBack(_)) => {
                    // A new connection that takes nothing is as good as none.
                    return Err(unsent(ConnectError::ClosedAtOnce.into()));
                }
                Err(Unanswered::Failed(kind)) => {
                    return Err(SendError { progress: Progress::Unanswered, kind });
                }
            }
        }
    }

    async fn open(&self, authority: &Authority) -> Result<Connection<Attempt<B>>, SendError> {
        let Inner { connector, settings, tasks, .. } = &*self.inner;
        let opening = async {
            let io = connector.connect(authority).await?;
            let (sender, driver) =
                http1::handshake(io).await.map_err(|error| ConnectError::Handshake(error.to_string()))?;
            // How the connection ended is told to whoever waits for its answer.
            let driver = tasks.spawn_guarded(async move {
                let _ = driver.with_upgrades().await;
            });
            Ok::<_, ConnectError>(Connection::new(sender, driver))
        };
        match tokio::time::timeout(settings.connect_max, opening).await {
            Ok(opened) => opened.map_err(|error| unsent(error.into())),
            Err(_) => Err(unsent(SendErrorKind::ConnectTimeout(settings.connect_max))),
        }
    }

    async fn answer(
        &self,
        connection: &mut Connection<Attempt<B>>,
        request: Request<Attempt<B>>,
        upload: &Upload<B>,
    ) -> Result<Response<Incoming>, Unanswered<B>> {
        let mut answer = std::pin::pin!(connection.sender().try_send_request(request));
        loop {
            let (deadline, stalled) = self.deadline(upload);
            match tokio::time::timeout_at(deadline.into(), &mut answer).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(mut error)) => {
                    return Err(match error.take_message() {
                        Some(request) => Unanswered::HandedBack(Box::new(request)),
                        None if upload.waiting() == Waiting::Never => {
                            Unanswered::Failed(SendErrorKind::ClientBroke)
                        }
                        None => Unanswered::Failed(SendErrorKind::Broken(error.into_error())),
                    });
                }
                // Something moved since the timer was set: it is set anew, once per span and not
                // once per piece.
                Err(_) if self.deadline(upload).0 > deadline => {}
                Err(_) => return Err(Unanswered::Failed(stalled)),
            }
        }
    }

    /// By when something must move, and what it means if nothing does.
    fn deadline(&self, upload: &Upload<B>) -> (Instant, SendErrorKind) {
        let Settings { first_byte_max, body_idle_max, .. } = self.inner.settings;
        let (span, kind) = match upload.waiting() {
            Waiting::ForAnswer => (first_byte_max, SendErrorKind::AnswerTimeout(first_byte_max)),
            Waiting::ForUpstream => (body_idle_max, SendErrorKind::UploadStalled(body_idle_max)),
            Waiting::ForClient => (body_idle_max, SendErrorKind::ClientStalled(body_idle_max)),
            Waiting::Never => (body_idle_max, SendErrorKind::ClientBroke),
        };
        (upload.moved_at() + span, kind)
    }
}

/// The request with its key: the one place where a key enters a head.
fn request<B>(
    authority: &Authority,
    key: &ApiKey,
    outbound: &Outbound,
    body: Attempt<B>,
) -> Result<Request<Attempt<B>>, SendError> {
    let unsendable = |error| unsent(SendErrorKind::Unsendable(error));
    let target = authority.target(&outbound.target).map_err(unsendable)?;
    let mut secret = HeaderValue::from_str(key.expose()).map_err(|error| unsendable(error.into()))?;
    secret.set_sensitive(true);
    let mut request = Request::new(body);
    *request.method_mut() = outbound.method.clone();
    *request.uri_mut() = target;
    let headers = request.headers_mut();
    headers.insert(HOST, authority.host_header().clone());
    headers.extend(outbound.headers.clone());
    headers.insert(KEY_HEADER, secret);
    Ok(request)
}

fn is_switch<B>(answer: &Response<B>, outbound: &Outbound) -> bool {
    answer.status() == StatusCode::SWITCHING_PROTOCOLS && outbound.asks_for_socket()
}

/// An attempt on one connection that brought no answer.
enum Unanswered<B> {
    /// The connection was closed before it took the request.
    HandedBack(Box<Request<Attempt<B>>>),
    /// It took some or all of it.
    Failed(SendErrorKind),
}

fn unsent(kind: SendErrorKind) -> SendError {
    SendError { progress: Progress::Unsent, kind }
}

#[cfg(test)]
mod tests;
