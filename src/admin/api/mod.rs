//! Serves the admin API below `/api/keychoir/v1/`, with which operators read and change the state as JSON.
//! `docs/openapi.json` describes the API, and a test compares both.
//!
//! Documents are built from the state of the running server and from the usage database. Changes are sent through
//! [`ControlSender`](super::control::ControlSender) to the task that makes them. Each successful response, apart from a
//! stream of events, contains an `ETag` with the generation, which increases with each change.

mod auth;
mod changes;
mod dashboard;
mod documents;
mod error;
mod events;
mod json_members;
mod request;
mod router;

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{
    CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName, HeaderValue, IF_NONE_MATCH, X_CONTENT_TYPE_OPTIONS,
};
use http::request::Parts;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::{Body, Frame, SizeHint};
use serde::Serialize;

use super::Admin;
use crate::clock;
use crate::policy::headers::USER_HEADER;
use crate::policy::units::UnixMs;
use crate::policy::user::identify_user;
use crate::pool::KeySnapshot;
use crate::proxy::AttemptRecord;
use crate::telemetry::EventSelection;
pub use auth::AuthFailureTable;
pub(in crate::admin) use auth::{AdminTokenCheck, too_many_failures};
pub(crate) use dashboard::{ActionError, run_blocking};
pub use documents::describe_refusal;
pub(crate) use documents::{CheckDocument, ClientDocument, KeyDocument, OverviewDocument, QuotaDocument};
use documents::{
    check_document, client_document, config_document, key_document, overview_document, own_document,
    read_attempts, read_changes, read_usage,
};
use error::ApiError;
use events::EventStream;
pub use events::{EventSource, record_change_event};
use request::Query;
pub(crate) use request::{BodyError, contains_tag, read_body};
use router::{KeyAction, Resource};

/// The prefix of all paths of the API.
const API_PREFIX: &str = "/api/keychoir/v1/";

/// The body of a response of the API: a complete document, or a stream of events.
#[derive(Debug)]
pub struct ApiBody(BodyKind);

#[derive(Debug)]
enum BodyKind {
    /// The complete body.
    Document(Bytes),
    /// A stream of events, or `None` in the response to a HEAD request.
    Events(Option<Box<EventStream>>),
}

/// The successful response to a request.
struct ApiResponse {
    status: StatusCode,
    body: BodyKind,
    /// Whether the document changes only with the generation, so that a request with `If-None-Match` may get a 304
    /// response.
    is_versioned: bool,
    /// The generation in the `ETag`. If it is `None`, the `ETag` contains the generation that was read before the
    /// document.
    generation: Option<u64>,
}

impl ApiResponse {
    fn ok(document: &impl Serialize) -> Self {
        Self::new(StatusCode::OK, document)
    }

    fn new(status: StatusCode, document: &impl Serialize) -> Self {
        // Serializing these documents cannot fail, because they consist of numbers, strings and lists.
        let body = BodyKind::Document(serde_json::to_vec(document).unwrap_or_default().into());
        Self { status, body, is_versioned: false, generation: None }
    }

    fn events(stream: Option<EventStream>) -> Self {
        let body = BodyKind::Events(stream.map(Box::new));
        Self { status: StatusCode::OK, body, is_versioned: false, generation: None }
    }

    fn versioned(self) -> Self {
        Self { is_versioned: true, ..self }
    }

    /// Returns the HTTP response. `generation` is the current generation.
    fn into_http(self, generation: u64, if_none_match: Option<&HeaderValue>) -> Response<BodyKind> {
        let tag = etag(self.generation.unwrap_or(generation));
        let is_unchanged = self.is_versioned && if_none_match.is_some_and(|list| contains_tag(list, &tag));
        let (status, body) = match self.body {
            BodyKind::Document(_) if is_unchanged => {
                (StatusCode::NOT_MODIFIED, BodyKind::Document(Bytes::new()))
            }
            body @ (BodyKind::Document(_) | BodyKind::Events(_)) => (self.status, body),
        };
        let is_events = matches!(body, BodyKind::Events(_));
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        if is_events {
            set_event_headers(headers);
        } else {
            if status != StatusCode::NOT_MODIFIED {
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            }
            headers.insert(ETAG, tag);
        }
        response
    }
}

/// Sets the headers of a response with a stream of events.
fn set_event_headers(headers: &mut HeaderMap) {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    // Without this header, nginx collects the events in a buffer before it sends them.
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
}

impl ApiBody {
    /// Returns a body with the given `content`.
    pub(crate) fn document(content: impl Into<Bytes>) -> Self {
        Self(BodyKind::Document(content.into()))
    }
}

impl Body for ApiBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.0 {
            BodyKind::Document(document) if document.is_empty() => Poll::Ready(None),
            BodyKind::Document(document) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(document))))),
            BodyKind::Events(Some(stream)) => Pin::new(&mut **stream).poll_frame(cx),
            BodyKind::Events(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            BodyKind::Document(document) => document.is_empty(),
            BodyKind::Events(stream) => stream.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            BodyKind::Document(document) => SizeHint::with_exact(document.len() as u64),
            BodyKind::Events(_) => SizeHint::default(),
        }
    }
}

impl Admin {
    /// Returns whether a path belongs to the admin API.
    #[must_use]
    pub fn is_api_path(path: &str) -> bool {
        path.starts_with(API_PREFIX) || path == API_PREFIX.trim_end_matches('/')
    }

    /// Returns whether this is the path of the API that clients may read with their own tokens.
    pub(super) fn is_client_api_path(path: &str) -> bool {
        Resource::parse(path) == Some(Resource::Me)
    }

    /// Returns the response to a path for operators on a listener that serves only clients.
    #[must_use]
    pub fn served_elsewhere() -> Response<Bytes> {
        unserved_path_response(&ApiError::served_elsewhere())
    }

    /// Returns the response to a path of the provider on a listener that serves only Keychoir's own paths.
    #[must_use]
    pub fn not_proxied() -> Response<Bytes> {
        unserved_path_response(&ApiError::not_proxied())
    }

    /// Responds to a request to the admin API. The request is refused if `is_foreign_page` is true, because a web page
    /// of another origin has sent it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future does not cancel a change that the task for changes has received.
    pub async fn api<B>(
        &self,
        request: Request<B>,
        peer: Option<IpAddr>,
        is_foreign_page: bool,
    ) -> Response<ApiBody>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let request_id = AttemptRecord::new_id(clock::now()).to_string();
        let if_none_match = request.headers().get(IF_NONE_MATCH).cloned();
        // The generation is read before the document. If a change is made in between, the tag is older than the
        // document, so that a later request with `If-Match` fails.
        let generation = self.generation();
        let result = if is_foreign_page {
            Err(ApiError::foreign_page())
        } else {
            self.route(request, peer, generation).await
        };
        let mut response = match result {
            Ok(response) => response.into_http(generation, if_none_match.as_ref()),
            Err(error) => error.response(&request_id).map(BodyKind::Document),
        };
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if let Ok(id) = HeaderValue::from_str(&request_id) {
            headers.insert(HeaderName::from_static("x-request-id"), id);
        }
        response.map(ApiBody)
    }

    /// Authorizes a request, and reads or changes the resource at its path.
    async fn route<B>(
        &self,
        request: Request<B>,
        peer: Option<IpAddr>,
        generation: u64,
    ) -> Result<ApiResponse, ApiError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (head, body) = request.into_parts();
        let resource = Resource::parse(head.uri.path());
        if resource == Some(Resource::Me) {
            // This is the only resource that a client may read with its token.
            router::require_method(Resource::Me, &head.method)?;
            return self.me(&head, clock::now()).await;
        }
        // The token is checked before the path and the method, so that a request without the token does not find out
        // which paths exist.
        self.authorize(&head.uri, &head.headers, peer, clock::now())?;
        let resource = resource.ok_or_else(ApiError::unknown_path)?;
        router::require_method(resource, &head.method)?;
        let query = Query::parse(head.uri.query());
        if head.method == Method::GET || head.method == Method::HEAD {
            return self.read_resource(resource, query, &head, generation, clock::now()).await;
        }
        query.validate_names(&[])?;
        let origin = changes::change_origin(peer);
        let members = request::read_members(&head, body, self.request_body_timeout()).await?;
        let now = clock::now();
        if let Resource::KeyAction(id, KeyAction::Check) = resource {
            members.reject_unknown(&[])?;
            return self.check_key(id, now).await.map(|document| ApiResponse::ok(&document));
        }
        if resource == Resource::DashboardCodes {
            members.reject_unknown(&[])?;
            return self.create_dashboard_code(now);
        }
        let change = changes::parse_change(resource, &head.method, members, &self.pool, now)?;
        let expected = request::expected_generation(&head.headers, generation)?;
        self.make_change(change, expected, origin).await
    }

    /// Returns the document of a resource, or a stream of events.
    async fn read_resource(
        &self,
        resource: Resource<'_>,
        query: Query,
        head: &Parts,
        generation: u64,
        now: UnixMs,
    ) -> Result<ApiResponse, ApiError> {
        let has_parameters = matches!(resource, Resource::Usage | Resource::Attempts | Resource::Changes);
        if !has_parameters {
            query.validate_names(&[])?;
        }
        match resource {
            Resource::Overview => {
                Ok(ApiResponse::ok(&overview_document(self, &self.pool.snapshot(now), generation, now)))
            }
            Resource::Keys => {
                let keys = self.keys(now);
                Ok(ApiResponse::ok(&serde_json::json!({"generation": generation, "keys": keys})))
            }
            Resource::Key(id) => {
                Ok(ApiResponse::ok(&key_document(&self.pool, &self.find_key(id, now)?, now)))
            }
            Resource::Clients => {
                let clients = self.clients(now);
                Ok(ApiResponse::ok(&serde_json::json!({"generation": generation, "clients": clients})))
            }
            Resource::Client(name) => {
                let config = self.config.load();
                let configured =
                    config.clients.with_token().find(|configured| configured.client.name.as_str() == name);
                let configured = configured.ok_or_else(ApiError::client_not_found)?;
                Ok(ApiResponse::ok(&client_document(
                    configured,
                    &config.client_usage.totals(&configured.client.name, now),
                    now,
                )))
            }
            Resource::Usage => {
                read_usage(&self.history, &query, now).await.map(|document| ApiResponse::ok(&document))
            }
            Resource::Attempts => {
                read_attempts(&self.history, &query).await.map(|document| ApiResponse::ok(&document))
            }
            Resource::Changes => {
                // A reload that changes nothing is recorded without a new generation.
                read_changes(&self.history, &query).await.map(|document| ApiResponse::ok(&document))
            }
            Resource::Config => {
                Ok(ApiResponse::ok(&config_document(&self.settings.load(), generation)).versioned())
            }
            Resource::Events => {
                // The stream of a HEAD request would never be read.
                let stream = if head.method == Method::GET {
                    Some(self.event_stream(&head.headers, EventSelection::All, None).await?)
                } else {
                    None
                };
                Ok(ApiResponse::events(stream))
            }
            Resource::Me
            | Resource::KeyAction(..)
            | Resource::ClientRotation(_)
            | Resource::Reload
            | Resource::DashboardCodes => Err(ApiError::unknown_path()),
        }
    }

    /// Returns the usage and the limits of the client that sent the request, even when the limits are exhausted. If the
    /// request names an end user, the document also contains the user's usage and limits.
    async fn me(&self, head: &Parts, now: UnixMs) -> Result<ApiResponse, ApiError> {
        let query = head.uri.query();
        Query::parse(query).validate_names(&[
            "xi-api-key",
            "xi_api_key",
            "authorization",
            USER_HEADER.as_str(),
        ])?;
        let caller =
            self.authenticate_client(&head.uri, &head.headers, now).map_err(ApiError::unauthenticated)?;
        let config = self.config.load_full();
        let user = match identify_user(&caller.name, &head.headers, query)? {
            None => None,
            Some(user) => {
                let max_cached_users = config.limits.max_cached_users;
                let totals = config.client_usage.user_totals(&caller, user, max_cached_users, now).await?;
                Some((user, totals))
            }
        };
        Ok(ApiResponse::ok(&own_document(&caller, &config.client_usage.totals(&caller.name, now), user, now)))
    }

    /// Checks the key with the given `id` at the provider.
    async fn check_key(&self, id: &str, now: UnixMs) -> Result<CheckDocument, ApiError> {
        let snapshot = self.find_key(id, now)?;
        let result = self.key_checker.check(&snapshot.key).await;
        let result = result.map_err(|_| ApiError::check_in_progress())?;
        Ok(check_document(&snapshot.key, &result))
    }

    /// Creates a one-time code that opens the dashboard.
    fn create_dashboard_code(&self, now: UnixMs) -> Result<ApiResponse, ApiError> {
        let (code, expires_at) = self.sessions.create_code(now).ok_or_else(ApiError::no_random_numbers)?;
        let document = serde_json::json!({"code": code.expose(), "expires_at": expires_at.rfc3339()});
        Ok(ApiResponse::new(StatusCode::CREATED, &document))
    }

    /// Returns the key with the given `id`, the first digits of its fingerprint.
    fn find_key(&self, id: &str, now: UnixMs) -> Result<KeySnapshot, ApiError> {
        let mut matching_keys = self.pool.snapshot_of(now, |key| documents::key_id(key) == id);
        matching_keys.pop().ok_or_else(ApiError::key_not_found)
    }

    /// Returns the current generation, or 0 if no task makes changes.
    fn generation(&self) -> u64 {
        self.control.as_ref().map_or(0, super::control::ControlSender::generation)
    }

    fn request_body_timeout(&self) -> std::time::Duration {
        self.config.load().limits.request_body_timeout
    }
}

/// Returns the entity tag of a generation.
fn etag(generation: u64) -> HeaderValue {
    let quoted = format!("\"{generation}\"");
    HeaderValue::from_str(&quoted).unwrap_or_else(|_| HeaderValue::from_static("\"0\""))
}

/// Returns the response to a request for a path that the listener does not serve.
fn unserved_path_response(error: &ApiError) -> Response<Bytes> {
    let mut response = error.response("");
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
