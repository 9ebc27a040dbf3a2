//! Keychoir's own endpoints: the status of the keys, health, metrics, and a front page for
//! browsers. They read snapshots and never delay a request.

mod details;
mod health;
mod metrics;
mod status;
mod usage;

use std::sync::Arc;

use bytes::Bytes;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, RETRY_AFTER, VARY,
};
use http::{HeaderMap, Method, Response, StatusCode, Uri};
use serde::Serialize;

use crate::mirror;
use crate::policy::client::{Client, Unidentified, authenticate};
use crate::policy::units::UnixMs;
use crate::pool::Pool;
use crate::proxy::{ProxyError, SharedConfig};
use crate::server::ConnectionLimiter;
use crate::store;
use crate::telemetry::{Exposition, Meters};
use crate::upstream::ReachCell;

pub use details::KeyDetails;
pub use health::{Draining, Readiness};
pub use status::StatusDocument;
pub use usage::ClientUsageReport;

/// The state that the endpoints read.
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
    /// Whether the shutdown has begun.
    pub draining: Draining,
    /// The counters of the proxy.
    pub meters: Meters,
    /// The client connections and their limit.
    pub connections: ConnectionLimiter,
    /// Whether the provider can be reached.
    pub reach: ReachCell,
    /// When the program was started.
    pub started_at: UnixMs,
}

const FRONT_PAGE: &str = include_str!("front_page.html");

/// The Content-Security-Policy of the front page, which loads no resources.
const NO_RESOURCES: &str = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const ROBOTS: &str = "User-agent: *\nDisallow: /\n";

/// Every client may read its own usage there, whatever its paths are.
const USAGE: &str = "/api/keychoir-usage";

impl Admin {
    /// The response, if the path is one of Keychoir's; every other path is the provider's.
    #[must_use]
    pub fn response(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        now: UnixMs,
    ) -> Option<Response<Bytes>> {
        let page: fn(&Self, &HeaderMap, UnixMs) -> Response<Bytes> = match uri.path() {
            "/api/elevenlabs-status" => |admin, _, now| admin.status(now),
            "/api/keychoir-keys" => |admin, _, now| admin.details(now),
            "/metrics" => Self::metrics,
            USAGE => return Some(self.usage(method, uri, headers, now)),
            "/livez" | "/healthz" => |_, _, _| live(),
            "/readyz" => |admin, _, now| admin.ready(now),
            // Browsers request these from every origin; otherwise they would be sent to the
            // provider with a key.
            "/" => |_, _, _| front_page(),
            "/favicon.ico" => |_, _, _| nothing(),
            "/robots.txt" => |_, _, _| page(StatusCode::OK, "text/plain; charset=utf-8", ROBOTS),
            _ => return None,
        };
        if let Some(refusal) = only_reading(method) {
            return Some(refusal);
        }
        // If clients have tokens, the state of the keys requires one.
        let is_for_clients =
            ["/api/elevenlabs-status", "/api/keychoir-keys", "/metrics"].contains(&uri.path());
        if is_for_clients {
            let refusal = match self.client(uri, headers) {
                // A client with limited paths may not read the state of the pool, unless its paths
                // include it.
                Ok(client) if client.rules.permit(uri.path()) => None,
                Ok(_) => Some(ProxyError::PathNotAllowed),
                Err(refusal) => Some(refusal.into()),
            };
            if let Some(refusal) = refusal {
                return Some(refusal.response("", now));
            }
        }
        Some(page(self, headers, now))
    }

    /// The client that sent the request, if it may read Keychoir's own pages.
    fn client(&self, uri: &Uri, headers: &HeaderMap) -> Result<Arc<Client>, Unidentified> {
        let clients = &self.config.load().clients;
        let caller = authenticate(clients, headers, uri.query())?;
        if clients.include(&caller) { Ok(caller.client) } else { Err(Unidentified::Wrong) }
    }

    /// The usage of the client that sent the request.
    fn usage(&self, method: &Method, uri: &Uri, headers: &HeaderMap, now: UnixMs) -> Response<Bytes> {
        if let Some(refusal) = only_reading(method) {
            return refusal;
        }
        match self.client(uri, headers) {
            Ok(client) => {
                let used = self.config.load().client_usage.used(&client.name, now);
                json(StatusCode::OK, &ClientUsageReport::of(&client, &used, now))
            }
            Err(refusal) => ProxyError::Unidentified(refusal).response("", now),
        }
    }

    fn status(&self, now: UnixMs) -> Response<Bytes> {
        json(StatusCode::OK, &StatusDocument::of(&self.pool.snapshot(now)))
    }

    fn details(&self, now: UnixMs) -> Response<Bytes> {
        json(StatusCode::OK, &KeyDetails::of(&self.pool, now))
    }

    fn metrics(&self, headers: &HeaderMap, now: UnixMs) -> Response<Bytes> {
        let sources = metrics::MetricSources {
            keys: &self.pool.snapshot(now),
            queued: self.pool.waiting(),
            mirror: self.mirror.as_ref(),
            store_health: &self.store_health,
            connections: &self.connections,
            buffers: &self.config.load().limits.buffers,
            started_at: self.started_at,
        };
        let form = Exposition::accepted(headers);
        let text = form.page(&[self.meters.registry(), &metrics::registry(&sources, now)]);
        let mut response = page(StatusCode::OK, form.content_type(), text);
        response.headers_mut().insert(VARY, HeaderValue::from_static("accept"));
        response
    }

    fn ready(&self, now: UnixMs) -> Response<Bytes> {
        let keys = self.pool.snapshot(now);
        let (mirror, reach) = (self.mirror.as_ref(), self.reach.get());
        let readiness = Readiness::of(&keys, &self.store_health, mirror, reach, self.draining.is_set());
        let status = if readiness.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut response = json(status, &readiness);
        if self.draining.is_set() {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// The process is alive, whatever the state of its parts.
fn live() -> Response<Bytes> {
    json(StatusCode::OK, &serde_json::json!({"status": "live"}))
}

/// The front page, with a link to the status.
fn front_page() -> Response<Bytes> {
    let mut response = page(StatusCode::OK, "text/html; charset=utf-8", FRONT_PAGE);
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(NO_RESOURCES));
    response
}

fn nothing() -> Response<Bytes> {
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

/// The refusal of any method but GET and HEAD.
fn only_reading(method: &Method) -> Option<Response<Bytes>> {
    if method == Method::GET || method == Method::HEAD {
        return None;
    }
    let mut response = Response::new(Bytes::from_static(b"only GET and HEAD\n"));
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    Some(response)
}

fn json(status: StatusCode, document: &impl Serialize) -> Response<Bytes> {
    // These documents consist of numbers and plain words, so serializing cannot fail.
    page(status, "application/json", serde_json::to_vec(document).unwrap_or_default())
}

fn page(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Bytes> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
