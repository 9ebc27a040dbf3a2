//! Holds the properties of a request that its attempts and usage records share: client, route, metering and permits.
//! Admits a request under its client's limits, estimates its cost and reserves it in the client's quota, and derives
//! the requirements for a key.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use hyper::body::Incoming;

use super::client_usage::{AdmissionRequest, ClientLimitExceeded, RequestUser};
use super::config::{Limits, RuntimeConfig};
use super::error::ProxyError;
use super::permits::RequestPermits;
use super::request_limiter::RequestPermit;
use crate::body::replay::Replay;
use crate::clock;
use crate::elevenlabs::affinity::{RequestIdentifiers, ResourceKind};
use crate::elevenlabs::endpoint::{Endpoint, Metering, Operation, Route};
use crate::elevenlabs::estimate::{credits_per_minute, estimate_credits};
use crate::elevenlabs::features::RequestFeatures;
use crate::elevenlabs::models::Models;
use crate::elevenlabs::request_body::{self, RequestBodyFeatures};
use crate::elevenlabs::socket::{ConcurrencyCounting, Dialect};
use crate::policy::charge::Billing;
use crate::policy::client::{Client, ClientName};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::headers;
use crate::policy::method::recorded_method;
use crate::pool::{KeyRequest, Roster};
use crate::secret::UserFingerprint;
use crate::upstream::UpstreamRequestHead;

/// The properties that all attempts of a request share.
#[derive(Debug)]
pub(super) struct RequestMeta {
    pub(super) request_id: Arc<str>,
    pub(super) client: ClientName,
    /// The end user that the request names.
    pub(super) user: Option<RequestUser>,
    pub(super) method: Method,
    pub(super) route: Route,
    pub(super) metering: Metering,
    /// The model and text length, if they were known before the request was sent.
    pub(super) body_features: Option<RequestBodyFeatures>,
    /// The permits that the request holds until its end. The client is charged through them.
    pub(super) permits: Arc<RequestPermits>,
    /// The protocol of the messages, if the request opens a WebSocket.
    pub(super) socket: Option<Dialect>,
    /// Credits per minute of a session that the provider charges by its duration, or `None` for any other request.
    pub(super) credits_per_minute: Option<u64>,
    /// The concurrency group of a text-to-speech session, which counts only while speech is generated.
    pub(super) speech_group: Option<ConcurrencyGroup>,
}

impl RequestMeta {
    pub(super) fn new(
        request_id: Arc<str>,
        client: ClientName,
        method: &Method,
        endpoint: &Endpoint,
        Admission { permits, user }: Admission,
    ) -> Self {
        Self {
            request_id,
            client,
            user,
            method: recorded_method(method),
            route: endpoint.route,
            metering: endpoint.metering,
            body_features: None,
            permits: Arc::new(permits),
            socket: endpoint.socket,
            credits_per_minute: endpoint.socket.and_then(|_| credits_per_minute(endpoint.operation)),
            speech_group: None,
        }
    }

    /// Estimates the cost of a request from its parameters and its body. Returns the requirements of the
    /// request for a key.
    pub(super) async fn estimate_cost(
        &mut self,
        endpoint: &Endpoint,
        upstream_head: &UpstreamRequestHead,
        body: &Replay<Incoming>,
        models: &Models,
        limits: &Limits,
    ) -> KeyRequest {
        let timeout = self.estimate_timeout(limits.cost_estimate_timeout);
        let body_features = match endpoint.socket {
            Some(dialect) => {
                let parameter = headers::query_parameter(upstream_head.target.query(), "model_id");
                let model = parameter.as_deref().and_then(request_body::parse_model);
                RequestBodyFeatures {
                    model: model.or(dialect.default_model().map(Into::into)),
                    ..RequestBodyFeatures::default()
                }
            }
            None if endpoint.operation.has_text() && !timeout.is_zero() => {
                let start = body.peek_body(request_body::MAX_PARSED_BODY_BYTES, timeout).await;
                let body_features = RequestBodyFeatures::parse(&start.bytes, start.is_complete);
                self.body_features = start.is_complete.then(|| body_features.clone());
                body_features
            }
            None => RequestBodyFeatures::default(),
        };
        let group = concurrency_group(endpoint.operation, &body_features, models);
        let key_request = KeyRequest::new(
            self.client.clone(),
            estimate_credits(endpoint.operation, &body_features, body.length(), models),
            group,
        );
        let Some(dialect) = endpoint.socket else { return key_request };
        self.body_features = Some(body_features);
        self.speech_group = group.filter(|_| dialect.generates_speech());
        match dialect.concurrency_counting() {
            ConcurrencyCounting::WholeSession => key_request,
            // The text is not known yet, and the concurrency slot is acquired when speech starts.
            ConcurrencyCounting::WhileSpeaking | ConcurrencyCounting::Never => {
                KeyRequest { estimate: Some(0), group: None, ..key_request }
            }
        }
    }

    /// Returns the properties of the request that an account's plan may not allow.
    pub(super) fn features(
        &self,
        endpoint: &Endpoint,
        upstream_head: &UpstreamRequestHead,
        identifiers: &RequestIdentifiers,
    ) -> RequestFeatures {
        let mut voices = identifiers.all().filter(|identifier| identifier.kind == ResourceKind::Voice);
        // A refusal does not name the voice, so it can only be attributed to a single voice.
        let voice = voices.next().filter(|_| voices.next().is_none()).map(|identifier| identifier.hash);
        let body_features = self.body_features.as_ref();
        let format = headers::query_parameter(upstream_head.target.query(), "output_format");
        RequestFeatures {
            route: endpoint.route,
            effect: endpoint.effect,
            voice,
            model: body_features.and_then(|body_features| body_features.model.clone()),
            output_format: format.filter(|format| is_output_format(format)).map(Into::into),
            characters: body_features.and_then(|body_features| body_features.characters),
            permission: endpoint.permission,
            adds_voice: endpoint.adds_voice,
        }
    }

    /// For a text-to-speech session, prefers keys with an available slot in the session's concurrency group, although
    /// the session acquires the slot only when speech starts.
    pub(super) fn prefer_available_slot(&self, key_request: &mut KeyRequest, roster: &Roster) {
        if let Some(group) = self.speech_group {
            key_request.preferred = roster.keys_with_capacity(group, clock::now());
        }
    }

    /// Returns the maximum wait for a text body to estimate its price: the configured timeout, but at least
    /// `MIN_TIMEOUT` if the client's quota needs a price. A short body arrives within that time.
    fn estimate_timeout(&self, configured: Duration) -> Duration {
        const MIN_TIMEOUT: Duration = Duration::from_millis(250);
        if self.permits.client.needs_price() { configured.max(MIN_TIMEOUT) } else { configured }
    }

    /// Reserves the estimated cost of `key_request` in the client's quota, or the configured amount if the price is
    /// unknown. A session that is charged by its duration reserves nothing. If the quota is shared with other
    /// replicas and the grant of this replica is insufficient, requests a larger grant from them.
    ///
    /// # Errors
    ///
    /// Fails when fewer credits are left in the quota than the request needs, or when too many requests of unknown
    /// price are in progress.
    pub(super) async fn reserve_credits(
        &self,
        key_request: &KeyRequest,
        limits: &Limits,
    ) -> Result<(), ClientLimitExceeded> {
        let (permit, now) = (&self.permits.client, clock::now());
        if self.credits_per_minute.is_some() {
            return Ok(());
        }
        let (unpriced_credits, max_unpriced) = (limits.unpriced_credits, limits.max_unpriced_requests);
        match (permit.billing(), key_request.estimate) {
            (Billing::Free, _) => Ok(()),
            (Billing::Metered, Some(estimate)) => permit.reserve(estimate, now).await,
            (Billing::Metered, None) | (Billing::Unlisted, _) => {
                permit.reserve_unpriced(unpriced_credits, max_unpriced, now).await
            }
        }
    }
}

/// An admitted request: its permits, and the user that it names.
#[derive(Debug)]
pub(super) struct Admission {
    permits: RequestPermits,
    user: Option<RequestUser>,
}

/// The parts of a request on which its admission depends.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdmissionFacts<'a> {
    pub(super) client: &'a Client,
    pub(super) endpoint: &'a Endpoint,
    pub(super) path: &'a str,
    /// The end user that the request names.
    pub(super) user: Option<UserFingerprint>,
    /// Whether the request is sent with the client's own key, so that the client is not charged.
    pub(super) has_own_key: bool,
}

/// Admits a request under its client's limits and the quota of its user.
///
/// # Errors
///
/// Fails when the client may not use the path, or has reached one of its limits. If the client has a quota per
/// user, also fails when the request names no user, or when the quota of its user is exhausted or cannot be checked.
pub(super) async fn admit(
    config: &RuntimeConfig,
    facts: AdmissionFacts<'_>,
    request_permit: RequestPermit,
) -> Result<Admission, ProxyError> {
    let AdmissionFacts { client, endpoint, path, user, has_own_key } = facts;
    if !client.rules.permit(path) {
        return Err(ProxyError::PathNotAllowed);
    }
    let admission = AdmissionRequest {
        billing: endpoint.billing,
        grants_direct_access: endpoint.grants_direct_access,
        is_charged: !has_own_key,
        max_concurrent: config.limits.max_requests_per_client,
    };
    let user_quota = client.rules.user_quota.filter(|_| !has_own_key);
    if user_quota.is_some() && user.is_none() && admission.counts_against_quotas() {
        return Err(ProxyError::UserRequired);
    }
    let permit = config.client_usage.admit(client, admission, clock::now()).await?;
    let mut permits = RequestPermits { client: permit, _request: request_permit };
    let user = match user.zip(user_quota) {
        None => user.map(RequestUser::new),
        Some((user, quota)) => {
            let max_cached_users = config.limits.max_cached_users;
            let load = config.client_usage.load_user(&client.name, user, max_cached_users, clock::now());
            // The future is boxed, so that it enlarges only the requests of clients with a quota per user.
            let user = Box::pin(load).await?;
            Box::pin(permits.client.admit_user(&user, quota, admission, clock::now())).await?;
            Some(user)
        }
    };
    Ok(Admission { permits, user })
}

/// Returns whether `format` has the syntax of the provider's output formats, such as `mp3_44100_128`. Other values
/// are errors of the client and are not recorded.
fn is_output_format(format: &str) -> bool {
    const MAX_LENGTH: usize = 32;
    (1..=MAX_LENGTH).contains(&format.len())
        && format.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// Returns the concurrency group of the request's model, or of its operation if the model is unknown.
fn concurrency_group(
    operation: Operation,
    body_features: &RequestBodyFeatures,
    models: &Models,
) -> Option<ConcurrencyGroup> {
    let operation_group = ConcurrencyGroup::for_operation(operation)?;
    let is_speech = operation_group == ConcurrencyGroup::SPEECH;
    let model = body_features.model.as_deref().or(is_speech.then_some(request_body::DEFAULT_MODEL));
    Some(model.and_then(|model| models.concurrency_group(model)).unwrap_or(operation_group))
}
