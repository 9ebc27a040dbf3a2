//! Serves Keychoir's own endpoints: pages for programs and browsers, and the admin API in `api`. The pages are the
//! state of the keys, the usage of a client, the health checks, the metrics, a front page and constant files for
//! browsers. `app::router` gives a request to one of these endpoints before it considers the proxy. The pages read
//! snapshots and never block a proxied request. The module also owns the sessions of the dashboard and the channel for
//! changes.

pub mod control;

mod api;
mod details;
mod health;
mod metrics;
mod sessions;
mod status;
mod usage;

use std::net::IpAddr;
use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, RETRY_AFTER, VARY,
};
use http::{HeaderMap, Method, Response, StatusCode, Uri};
use serde::Serialize;
use serde_json::Value;

use control::ControlSender;

use crate::mirror;
use crate::policy::client::{Client, Unauthenticated, authenticate};
use crate::policy::page_access::{PageAccess, page_access};
use crate::policy::units::UnixMs;
use crate::poller::KeyChecker;
use crate::pool::Pool;
use crate::proxy::{ProxyError, SharedConfig};
use crate::secret::AdminTokenFingerprint;
use crate::server::ConnectionLimiter;
use crate::shared::{PoolView, SharedPoolView};
use crate::store;
use crate::telemetry::{ExpositionFormat, RequestMetrics, TimelineHandle};
use crate::upstream::{ReachabilityCell, TcpTlsConnector};

use api::AdminTokenCheck;
pub(crate) use api::{
    ActionError, BodyError, CheckDocument, ClientDocument, KeyDocument, OverviewDocument, QuotaDocument,
    contains_tag, read_body, run_blocking,
};
pub use api::{ApiBody, AuthFailureTable, EventSource, describe_refusal, record_change_event};
pub use details::KeyDetailsDocument;
pub use health::{DrainFlag, Readiness};
pub use sessions::{DashboardSecret, Sessions};
pub use status::StatusDocument;
pub use usage::ClientUsageDocument;

/// The parts of the running server that the endpoints read. Clones share them.
#[derive(Clone, Debug)]
pub struct Admin {
    /// The clients and access rules.
    pub config: SharedConfig,
    /// The pool of keys.
    pub pool: Arc<Pool>,
    /// The state of the usage store.
    pub store_health: store::Health,
    /// The state of the mirror, if there is one.
    pub mirror: Option<mirror::MirrorHealth>,
    /// The replicas and the connection to Redis, or `None` without `[redis]`.
    pub shared: Option<SharedPoolView>,
    /// Whether the shutdown has started.
    pub draining: DrainFlag,
    /// The metrics of requests.
    pub metrics: RequestMetrics,
    /// The counts of the requests of the last 24 hours, for the charts of the dashboard.
    pub timeline: TimelineHandle,
    /// The number of client connections and its limit.
    pub connections: ConnectionLimiter,
    /// The result of the last attempt to connect to the provider.
    pub reachability: ReachabilityCell,
    /// The time at which Keychoir was started.
    pub started_at: UnixMs,
    /// Sends the changes of operators to the task that makes them. It is `None` if no task makes changes.
    pub control: Option<ControlSender>,
    /// The digest of the admin token. A reload replaces it.
    pub admin_token: SharedAdminToken,
    /// The pages that may be read without a token.
    pub public_pages: PublicPages,
    /// Reads stored records.
    pub history: store::History,
    /// Checks keys at the provider.
    pub key_checker: KeyChecker<TcpTlsConnector>,
    /// The settings in force. A reload replaces them.
    pub settings: SharedSettings,
    /// The number of wrong admin tokens and dashboard codes from each address.
    pub auth_failures: AuthFailureTable,
    /// The events that `GET events` and the dashboard send to browsers and programs.
    pub events: EventSource,
    /// The sessions of the dashboard.
    pub sessions: Sessions,
}

/// The pages that may be read without a token on every address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublicPages {
    /// Whether the two documents with the state of the keys are public.
    pub status: bool,
    /// Whether the metrics are public.
    pub metrics: bool,
}

/// The list of settings in force for operators, without secrets. It is shared with the task that reloads them.
pub type SharedSettings = Arc<ArcSwap<Value>>;

/// The digest of the admin token, shared with the task that reloads it. Without a token, the admin API is disabled.
pub type SharedAdminToken = Arc<ArcSwapOption<AdminTokenFingerprint>>;

const FRONT_PAGE: &str = include_str!("front_page.html");

/// The Content-Security-Policy of the front page, which loads no resources.
const NO_RESOURCES: &str = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const ROBOTS_TXT: &str = "User-agent: *\nDisallow: /\n";

/// The path of the status document.
const STATUS_PATH: &str = "/api/elevenlabs-status";

/// The path of the document with the details of the keys.
const KEYS_PATH: &str = "/api/keychoir-keys";

/// The path of the metrics.
const METRICS_PATH: &str = "/metrics";

/// The path at which every client may read its own usage, even if its allowed paths do not include it.
const USAGE_PATH: &str = "/api/keychoir-usage";

impl Admin {
    /// Returns the state of the replicas and of the connection to Redis, or `None` without `[redis]`.
    fn pool_view(&self) -> Option<Arc<PoolView>> {
        self.shared.as_ref().map(SharedPoolView::get)
    }

    /// Returns the response if a page has the path of `uri`, and `None` otherwise. The admin API is not a page.
    #[must_use]
    pub fn response(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        now: UnixMs,
    ) -> Option<Response<Bytes>> {
        let render: fn(&Self, &HeaderMap, UnixMs) -> Response<Bytes> = match uri.path() {
            STATUS_PATH => {
                |admin, _, now| json_response(StatusCode::OK, &StatusDocument::new(&admin.pool.snapshot(now)))
            }
            KEYS_PATH => {
                |admin, _, now| json_response(StatusCode::OK, &KeyDetailsDocument::new(&admin.pool, now))
            }
            METRICS_PATH => Self::metrics_response,
            USAGE_PATH => return Some(self.usage_response(method, uri, headers, now)),
            "/livez" | "/healthz" => |_, _, _| liveness_response(),
            "/readyz" => |admin, _, now| admin.readiness_response(now),
            // Browsers request these paths from every origin. If Keychoir did not answer these requests, it would
            // send them to the provider with a key.
            "/" => |_, _, _| front_page_response(),
            "/favicon.ico" => |_, _, _| no_content_response(),
            "/robots.txt" => |_, _, _| page_response(StatusCode::OK, "text/plain; charset=utf-8", ROBOTS_TXT),
            _ => return None,
        };
        if let Some(refusal) = method_refusal(method) {
            return Some(refusal);
        }
        let is_public = match uri.path() {
            STATUS_PATH | KEYS_PATH => self.public_pages.status,
            METRICS_PATH => self.public_pages.metrics,
            _ => true,
        };
        let refusal = match page_access(is_public, peer) {
            PageAccess::Open => None,
            PageAccess::Client if !self.config.load().clients.require_token() => None,
            PageAccess::Client => self.client_page_refusal(uri, headers, peer, now),
            PageAccess::Operator => self.operator_page_refusal(uri, headers, peer, now),
        };
        if refusal.is_some() {
            return refusal;
        }
        Some(render(self, headers, now))
    }

    /// Returns the response that refuses a page for clients, or `None` if the request presents the admin token or the
    /// token of a client that may read the page.
    fn client_page_refusal(
        &self,
        uri: &Uri,
        headers: &HeaderMap,
        peer: Option<IpAddr>,
        now: UnixMs,
    ) -> Option<Response<Bytes>> {
        let check = self.check_admin_token(headers, peer, now);
        if check == AdminTokenCheck::Accepted {
            return None;
        }
        match self.authenticate_client(uri, headers, now) {
            // A client with allowed paths may read the state of the pool only if they include the page.
            Ok(client) if client.rules.permit(uri.path()) => None,
            Ok(_) => Some(ProxyError::PathNotAllowed.response("", now)),
            Err(refusal) => Some(match check {
                AdminTokenCheck::TooManyFailures(retry_after) => api::too_many_failures(retry_after),
                AdminTokenCheck::Accepted
                | AdminTokenCheck::Absent
                | AdminTokenCheck::ClientToken
                | AdminTokenCheck::Wrong => ProxyError::from(refusal).response("", now),
            }),
        }
    }

    /// Returns whether a path is for operators. If `admin.listen` is set, only the listener at that address serves such
    /// a path.
    #[must_use]
    pub fn is_operator_path(path: &str) -> bool {
        [STATUS_PATH, KEYS_PATH, METRICS_PATH, "/"].contains(&path)
            || (Self::is_api_path(path) && !Self::is_client_api_path(path))
    }

    /// Returns the configured client whose token the request contains.
    fn authenticate_client(
        &self,
        uri: &Uri,
        headers: &HeaderMap,
        now: UnixMs,
    ) -> Result<Arc<Client>, Unauthenticated> {
        let clients = &self.config.load().clients;
        let caller = authenticate(clients, headers, uri.query(), now)?;
        if clients.is_authenticated(&caller) { Ok(caller.client) } else { Err(Unauthenticated::UnknownToken) }
    }

    /// Returns the document with the usage of the client that sent the request, or the refusal of the request.
    fn usage_response(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        now: UnixMs,
    ) -> Response<Bytes> {
        if let Some(refusal) = method_refusal(method) {
            return refusal;
        }
        match self.authenticate_client(uri, headers, now) {
            Ok(client) => {
                let totals = self.config.load().client_usage.totals(&client.name, now);
                json_response(StatusCode::OK, &ClientUsageDocument::new(&client, &totals, now))
            }
            Err(refusal) => ProxyError::Unauthenticated(refusal).response("", now),
        }
    }

    /// Returns all metrics, in the text format that the request prefers.
    fn metrics_response(&self, headers: &HeaderMap, now: UnixMs) -> Response<Bytes> {
        let format = ExpositionFormat::negotiate(headers);
        let text = format.write_page(&[self.metrics.registry(), &metrics::registry(self, now)]);
        let mut response = page_response(StatusCode::OK, format.content_type(), text);
        response.headers_mut().insert(VARY, HeaderValue::from_static("accept"));
        response
    }

    /// Returns the readiness of the process, with the status 503 if it is not ready.
    fn readiness_response(&self, now: UnixMs) -> Response<Bytes> {
        let keys = self.pool.snapshot(now);
        let (mirror, reachability) = (self.mirror.as_ref(), self.reachability.get());
        let readiness = Readiness::new(
            &keys,
            &self.store_health,
            mirror,
            reachability,
            self.draining.is_set(),
            self.pool_view().as_deref(),
        );
        let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut response = json_response(status, &readiness);
        if self.draining.is_set() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// Returns the constant response of `/livez` and `/healthz`: a process that responds is live, whatever the state of its
/// parts.
fn liveness_response() -> Response<Bytes> {
    json_response(StatusCode::OK, &serde_json::json!({"status": "live"}))
}

/// Returns the page at `/`, which has links to the dashboard, the status of the keys and the readiness.
fn front_page_response() -> Response<Bytes> {
    let mut response = page_response(StatusCode::OK, "text/html; charset=utf-8", FRONT_PAGE);
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(NO_RESOURCES));
    response
}

fn no_content_response() -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// Returns a 405 response if the method is neither GET nor HEAD, and `None` otherwise.
fn method_refusal(method: &Method) -> Option<Response<Bytes>> {
    if method == Method::GET || method == Method::HEAD {
        return None;
    }
    let mut response = Response::new(Bytes::from_static(b"only GET and HEAD\n"));
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    Some(response)
}

fn json_response(status: StatusCode, document: &impl Serialize) -> Response<Bytes> {
    // Serializing these documents cannot fail, because they consist of numbers and strings.
    page_response(status, "application/json", serde_json::to_vec(document).unwrap_or_default())
}

fn page_response(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
