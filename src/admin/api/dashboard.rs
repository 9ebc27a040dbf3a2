//! Provides the admin API to the dashboard as functions: documents as types, changes, key checks and events. Also
//! provides the refusal of addresses that sent wrong codes, and the base URL of the browser. A form of the dashboard
//! and an API request pass the same checks.

use std::net::IpAddr;
use std::time::Duration;

use http::{HeaderMap, Method, Response, StatusCode, Uri};
use serde_json::{Map, Value};

use super::documents::{
    CheckDocument, ClientDocument, KeyDocument, OverviewDocument, client_document, key_document,
    overview_document, sorted_clients,
};
use super::error::ApiError;
use super::events::WantedKeys;
use super::json_members::JsonMembers;
use super::router::Resource;
use super::{API_PREFIX, ApiBody, BodyKind, changes};
use crate::admin::Admin;
use crate::admin::control::{Actor, ChangeOrigin, ChangeReceipt};
use crate::policy::units::UnixMs;
use crate::tasks;
use crate::telemetry::EventSelection;

/// The reason why an action of an operator failed, in a sentence for the operator.
#[derive(Debug)]
pub(crate) struct ActionError {
    pub(crate) status: StatusCode,
    pub(crate) message: String,
}

impl From<ApiError> for ActionError {
    fn from(error: ApiError) -> Self {
        Self { status: error.status_code(), message: error.into_message() }
    }
}

/// Runs work that takes milliseconds on a blocking thread, so that the worker serves requests meanwhile. Returns `None`
/// if the work panics or if the program ends before it.
pub(crate) async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tasks::spawn_blocking(work).await.ok()
}

impl Admin {
    /// Returns the state of the server and the keys in the order of the pool. Both are computed from one snapshot.
    pub(crate) fn overview_and_keys(&self, now: UnixMs) -> (OverviewDocument, Vec<KeyDocument>) {
        let snapshots = self.pool.snapshot(now);
        let keys = snapshots.iter().map(|snapshot| key_document(&self.pool, snapshot, now)).collect();
        (overview_document(self, &snapshots, self.generation(), now), keys)
    }

    /// Returns the keys in the order of the pool.
    pub(crate) fn keys(&self, now: UnixMs) -> Vec<KeyDocument> {
        self.pool.snapshot(now).iter().map(|snapshot| key_document(&self.pool, snapshot, now)).collect()
    }

    /// Returns the clients, sorted by name.
    pub(crate) fn clients(&self, now: UnixMs) -> Vec<ClientDocument> {
        let config = self.config.load();
        let document = |configured: &crate::policy::client::ConfiguredClient| {
            client_document(configured, &config.client_usage.totals(&configured.client.name, now), now)
        };
        sorted_clients(&config.clients).into_iter().map(document).collect()
    }

    /// Makes the change that an API request with `method`, `members` and the path `path` below [`API_PREFIX`] would
    /// make.
    pub(crate) async fn make_dashboard_change(
        &self,
        method: &Method,
        path: &str,
        members: Map<String, Value>,
        peer: Option<IpAddr>,
        now: UnixMs,
    ) -> Result<ChangeReceipt, ActionError> {
        let path = format!("{API_PREFIX}{path}");
        let resource = Resource::parse(&path).ok_or_else(ApiError::unknown_path)?;
        let change = changes::parse_change(resource, method, JsonMembers::new(members), &self.pool, now)?;
        let origin = ChangeOrigin { actor: Actor::Dashboard, address: peer };
        Ok(self.send_change(change, None, origin).await?)
    }

    /// Checks the key with the given `id` at the provider.
    pub(crate) async fn check_pool_key(&self, id: &str, now: UnixMs) -> Result<CheckDocument, ActionError> {
        Ok(self.check_key(id, now).await?)
    }

    /// Opens a stream of the selected events, or returns the refusal. The stream ends with the session that `token`
    /// identifies.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future opens no stream.
    pub(crate) async fn dashboard_events(
        &self,
        headers: &HeaderMap,
        token: &str,
        selection: EventSelection,
        keys: WantedKeys,
    ) -> Result<Response<ApiBody>, ActionError> {
        let stream = self.event_stream(headers, selection, keys).await?;
        let stream = stream.while_open(self.sessions.existence_check(token));
        let mut response = Response::new(ApiBody(BodyKind::Events(Some(Box::new(stream)))));
        super::set_event_headers(response.headers_mut());
        Ok(response)
    }

    /// Returns whether Keychoir refuses the credentials from an address, because too many of them were wrong.
    pub(crate) fn is_refused(&self, peer: Option<IpAddr>, now: UnixMs) -> bool {
        self.auth_failures.retry_after(peer, now).is_some()
    }

    /// Records and logs a wrong code of the dashboard.
    pub(crate) fn record_wrong_code(&self, peer: Option<IpAddr>, now: UnixMs) {
        self.record_auth_failure(peer, now, "A wrong or expired code of the dashboard was refused");
    }

    /// Returns the timeout for receiving a form.
    pub(crate) fn form_timeout(&self) -> Duration {
        self.request_body_timeout()
    }

    /// Returns the base URL at which the sender of these headers reached Keychoir, with `base_path` and without a final
    /// slash.
    pub(crate) fn base_url(&self, uri: &Uri, headers: &HeaderMap, is_https: bool) -> String {
        let host = headers.get(http::header::HOST).and_then(|host| host.to_str().ok()).or(uri.host());
        let scheme = if is_https { "https" } else { "http" };
        format!("{scheme}://{}{}", host.unwrap_or("127.0.0.1:11011"), self.config.load().base_path)
    }
}
