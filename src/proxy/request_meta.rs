//! The properties of a request that all its attempts and usage records share: client, route,
//! metering, permits, and the cost estimate that a key reservation needs.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use hyper::body::Incoming;

use super::client_usage::{ClientLimitExceeded, ClientUsage, LimitRequest};
use super::config::Limits;
use super::error::ProxyError;
use super::permits::RequestPermits;
use super::request_limiter::RequestPermit;
use crate::body::replay::Replay;
use crate::clock;
use crate::elevenlabs::affinity::{Kind, Names};
use crate::elevenlabs::endpoint::{Endpoint, Metering, Operation, Route};
use crate::elevenlabs::estimate::{credits_per_minute, estimate};
use crate::elevenlabs::features::RequestFeatures;
use crate::elevenlabs::models::Models;
use crate::elevenlabs::request_body::{self, RequestBodyFeatures};
use crate::elevenlabs::socket::{CountedWhile, Dialect};
use crate::policy::charge::Billing;
use crate::policy::client::{Client, ClientName};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::headers;
use crate::policy::method::recorded;
use crate::pool::{KeyRequest, Roster};
use crate::upstream::UpstreamRequestHead;

/// The common fields of a request's attempts and usage records.
#[derive(Debug)]
pub(super) struct RequestMeta {
    pub(super) request_id: Arc<str>,
    pub(super) client: ClientName,
    pub(super) method: Method,
    pub(super) route: Route,
    pub(super) metering: Metering,
    /// Model and text length from the request, if they were known before it was sent.
    pub(super) body_features: Option<RequestBodyFeatures>,
    /// The permits that the request holds until its end; its client is charged through them.
    pub(super) permits: Arc<RequestPermits>,
    /// The protocol of the messages, when the request opens a socket.
    pub(super) socket: Option<Dialect>,
    /// Credits per minute of a session that the provider charges by its duration.
    pub(super) credits_per_minute: Option<u64>,
    /// The concurrency group of a text-to-speech socket; it counts only while speech is generated.
    pub(super) speech_group: Option<ConcurrencyGroup>,
}

impl RequestMeta {
    /// Describes a request that was admitted.
    pub(super) fn open(
        request_id: Arc<str>,
        client: ClientName,
        method: &Method,
        endpoint: &Endpoint,
        permits: RequestPermits,
    ) -> Self {
        Self {
            request_id,
            client,
            method: recorded(method),
            route: endpoint.route,
            metering: endpoint.metering,
            body_features: None,
            permits: Arc::new(permits),
            socket: endpoint.socket,
            credits_per_minute: endpoint.socket.and_then(|_| credits_per_minute(endpoint.operation)),
            speech_group: None,
        }
    }

    /// Estimates the cost of a request from its parameters and, within `span`, its body; returns
    /// what it needs of a key.
    pub(super) async fn estimate_cost(
        &mut self,
        endpoint: &Endpoint,
        upstream_head: &UpstreamRequestHead,
        body: &Replay<Incoming>,
        models: &Models,
        span: Duration,
    ) -> KeyRequest {
        let body_features = match endpoint.socket {
            Some(dialect) => {
                let model = headers::parameter(upstream_head.target.query(), "model_id");
                let model = model.as_deref().and_then(request_body::model);
                RequestBodyFeatures {
                    model: model.or(dialect.default_model().map(Into::into)),
                    ..RequestBodyFeatures::default()
                }
            }
            None if endpoint.operation.has_text() && !span.is_zero() => {
                let (start, is_whole) = body.peek_body(request_body::BODY_BYTES_MAX, span).await;
                let body_features = RequestBodyFeatures::of(&start, is_whole);
                self.body_features = is_whole.then(|| body_features.clone());
                body_features
            }
            None => RequestBodyFeatures::default(),
        };
        let group = group(endpoint.operation, &body_features, models);
        let key_request = KeyRequest::new(
            self.client.clone(),
            estimate(endpoint.operation, &body_features, body.length(), models),
            group,
        );
        let Some(dialect) = endpoint.socket else { return key_request };
        self.body_features = Some(body_features);
        self.speech_group = group.filter(|_| dialect.is_spoken());
        match dialect.counted() {
            CountedWhile::Open => key_request,
            // The text of the session is not known yet, and no concurrency slot is taken until
            // speech begins.
            CountedWhile::Speaking | CountedWhile::Never => {
                KeyRequest { estimate: Some(0), group: None, ..key_request }
            }
        }
    }

    /// The properties of the request that depend on the account's plan.
    pub(super) fn features(
        &self,
        endpoint: &Endpoint,
        upstream_head: &UpstreamRequestHead,
        names: &Names,
    ) -> RequestFeatures {
        let mut voices = names.all().filter(|named| named.kind == Kind::Voice);
        // A refusal does not name the voice, so it can only be attributed when there is exactly
        // one.
        let voice = voices.next().filter(|_| voices.next().is_none()).map(|named| named.tag);
        let body_features = self.body_features.as_ref();
        let format = headers::parameter(upstream_head.target.query(), "output_format");
        RequestFeatures {
            route: endpoint.route,
            effect: endpoint.effect,
            voice,
            model: body_features.and_then(|body_features| body_features.model.clone()),
            output_format: format.filter(|format| is_format(format)).map(Into::into),
            characters: body_features.and_then(|body_features| body_features.characters),
            permission: endpoint.permission,
            adds_voice: endpoint.adds_voice,
        }
    }

    /// Prefers keys with a free slot in the session's concurrency group: the session takes the slot
    /// only when it begins to speak.
    pub(super) fn prefer_free_slot(&self, key_request: &mut KeyRequest, roster: &Roster) {
        if let Some(group) = self.speech_group {
            key_request.preferred = roster.keys_with_capacity(group, clock::now());
        }
    }

    /// How long a text body is waited for to estimate its price: the configured span, or at least
    /// 250 ms when the client's quota needs a price. A short body has arrived by then.
    pub(super) fn estimate_timeout(&self, configured: Duration) -> Duration {
        const LEAST: Duration = Duration::from_millis(250);
        if self.permits.client().needs_price() { configured.max(LEAST) } else { configured }
    }

    /// Reserves in the client's quota the estimated cost of `key_request`, or the configured amount
    /// when the price is unknown. A session that is charged by its duration reserves nothing here.
    ///
    /// # Errors
    ///
    /// When less than that is left in the quota.
    pub(super) fn reserve_credits(
        &self,
        key_request: &KeyRequest,
        limits: &Limits,
    ) -> Result<(), ClientLimitExceeded> {
        let (permit, now) = (self.permits.client(), clock::now());
        if self.credits_per_minute.is_some() {
            return Ok(());
        }
        match (permit.billing(), key_request.estimate) {
            (Billing::Free, _) => Ok(()),
            (Billing::Metered, Some(estimate)) => Ok(permit.reserve(estimate, now)?),
            (Billing::Metered, None) | (Billing::Unlisted, _) => {
                permit.reserve_unpriced(limits.unpriced_credits, limits.max_unpriced_requests, now)
            }
        }
    }
}

/// Admits a request by its client's limits. The client is charged unless it brings its own key.
///
/// # Errors
///
/// When the client may not use the path, or has reached one of its limits.
pub(super) fn admit(
    usage: &ClientUsage,
    client: &Client,
    endpoint: &Endpoint,
    path: &str,
    brings_key: bool,
    limits: &Limits,
    request: RequestPermit,
) -> Result<RequestPermits, ProxyError> {
    if !client.rules.permit(path) {
        return Err(ProxyError::PathNotAllowed);
    }
    let limit_request = LimitRequest {
        billing: endpoint.billing,
        gives_access: endpoint.gives_access,
        is_charged: !brings_key,
        max_concurrent: limits.max_requests_per_client,
    };
    let permit = usage.admit(client, limit_request, clock::now())?;
    Ok(RequestPermits::new(request, permit))
}

/// Whether `value` has the form of the provider's output formats, as in `mp3_44100_128`. Other
/// values are errors of the client and are not recorded.
fn is_format(value: &str) -> bool {
    (1..=32).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// The concurrency group of a request: by its model, if that is known, else by its operation.
fn group(
    operation: Operation,
    body_features: &RequestBodyFeatures,
    models: &Models,
) -> Option<ConcurrencyGroup> {
    let of_operation = ConcurrencyGroup::of_operation(operation)?;
    let speaks = of_operation == ConcurrencyGroup::SPEECH;
    let model = body_features.model.as_deref().or(speaks.then_some(request_body::DEFAULT_MODEL));
    Some(model.and_then(|model| models.group(model)).unwrap_or(of_operation))
}
