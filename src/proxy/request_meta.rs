//! A request as its attempts and its records see it: who asks for what, in the books' words, and what
//! that needs of a key.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use hyper::body::Incoming;

use super::Limits;
use super::client_usage::{ClientLimitExceeded, ClientUsage, LimitRequest};
use super::error::ProxyError;
use super::permits::RequestPermits;
use super::request_limiter::RequestPermit;
use crate::body::replay::Replay;
use crate::clock;
use crate::policy::affinity::{Kind, Names};
use crate::policy::charge::Billing;
use crate::policy::client::{Client, ClientName};
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::endpoint::{Endpoint, Metering, Operation, Route};
use crate::policy::estimate::{credits_per_minute, estimate};
use crate::policy::features::RequestFeatures;
use crate::policy::headers;
use crate::policy::method::recorded;
use crate::policy::models::Models;
use crate::policy::request_body::{self, RequestBodyFeatures};
use crate::policy::socket::{CountedWhile, Dialect};
use crate::pool::{KeyRequest, Roster};
use crate::upstream::UpstreamRequestHead;

/// What all attempts of a request have in common in the books.
#[derive(Debug)]
pub(super) struct RequestMeta {
    pub(super) request_id: Arc<str>,
    pub(super) client: ClientName,
    pub(super) method: Method,
    pub(super) route: Route,
    pub(super) metering: Metering,
    /// What was asked for, where that was known before.
    pub(super) asked: Option<RequestBodyFeatures>,
    /// What it holds until its end, and by which its client is charged.
    pub(super) permits: Arc<RequestPermits>,
    /// What is spoken on it, when it is a socket.
    pub(super) socket: Option<Dialect>,
    /// Credits that a minute of it costs, when it is a session that is paid by its time.
    pub(super) credits_per_minute: Option<u64>,
    /// With what it counts while sound is made, when it is a socket for speech.
    pub(super) speech_lane: Option<ConcurrencyGroup>,
}

impl RequestMeta {
    /// Opens the case of a request that was let in.
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
            asked: None,
            permits: Arc::new(permits),
            socket: endpoint.socket,
            credits_per_minute: endpoint.socket.and_then(|_| credits_per_minute(endpoint.work)),
            speech_lane: None,
        }
    }

    /// Looks at what is asked for, as far as can be seen before it is sent; returns what that needs of
    /// a key.
    pub(super) async fn estimate_cost(
        &mut self,
        endpoint: &Endpoint,
        upstream_head: &UpstreamRequestHead,
        body: &Replay<Incoming>,
        models: &Models,
        span: Duration,
    ) -> KeyRequest {
        let asked = match endpoint.socket {
            Some(dialect) => {
                let model = headers::parameter(upstream_head.target.query(), "model_id");
                let model = model.as_deref().and_then(request_body::model);
                RequestBodyFeatures {
                    model: model.or(dialect.default_model().map(Into::into)),
                    ..RequestBodyFeatures::default()
                }
            }
            None if endpoint.work.has_text() && !span.is_zero() => {
                let (start, is_whole) = body.peek_body(request_body::BODY_BYTES_MAX, span).await;
                let asked = RequestBodyFeatures::of(&start, is_whole);
                self.asked = is_whole.then(|| asked.clone());
                asked
            }
            None => RequestBodyFeatures::default(),
        };
        let group = group(endpoint.work, &asked, models);
        let key_request = KeyRequest::new(
            self.client.clone(),
            estimate(endpoint.work, &asked, body.length(), models),
            group,
        );
        let Some(dialect) = endpoint.socket else { return key_request };
        self.asked = Some(asked);
        self.speech_lane = group.filter(|_| dialect.is_spoken());
        match dialect.counted() {
            CountedWhile::Open => key_request,
            // What will be said is not known yet, and until something is, nothing counts.
            CountedWhile::Speaking | CountedWhile::Never => {
                KeyRequest { estimate: Some(0), group: None, ..key_request }
            }
        }
    }

    /// What it asks for, as far as plans differ in it.
    pub(super) fn features(
        &self,
        endpoint: &Endpoint,
        upstream_head: &UpstreamRequestHead,
        names: &Names,
    ) -> RequestFeatures {
        let mut voices = names.all().filter(|named| named.kind == Kind::Voice);
        // Of several voices, a refusal does not say which it is about.
        let voice = voices.next().filter(|_| voices.next().is_none()).map(|named| named.tag);
        let asked = self.asked.as_ref();
        let format = headers::parameter(upstream_head.target.query(), "output_format");
        RequestFeatures {
            route: endpoint.route,
            effect: endpoint.effect,
            voice,
            model: asked.and_then(|asked| asked.model.clone()),
            output_format: format.filter(|format| is_format(format)).map(Into::into),
            characters: asked.and_then(|asked| asked.characters),
            permission: endpoint.permission,
            adds_voice: endpoint.adds_voice,
        }
    }

    /// What will speak later, and has no place until then, goes to a key that has one.
    pub(super) fn prefer_room(&self, key_request: &mut KeyRequest, roster: &Roster) {
        if let Some(group) = self.speech_lane {
            key_request.preferred = roster.with_room(group, clock::now());
        }
    }

    /// How long a text is waited for, to know its price: at least a moment when a quota needs that. A short
    /// body is there by then.
    pub(super) fn estimate_timeout(&self, configured: Duration) -> Duration {
        const LEAST: Duration = Duration::from_millis(250);
        if self.permits.client().needs_price() { configured.max(LEAST) } else { configured }
    }

    /// Reserves in the client's quota what the request may cost, as `ask` estimates it; for an
    /// unknown price, the configured amount. A session that is paid by its time is charged as it goes on.
    ///
    /// # Errors
    ///
    /// When the quota has less left.
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

/// Lets a request in by the limits of its client, which is charged unless it brings its own key.
///
/// # Errors
///
/// When it may not ask for that, or for no more now.
pub(super) fn admit(
    accounts: &ClientUsage,
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
    let claim = LimitRequest {
        billing: endpoint.billing,
        gives_access: endpoint.gives_access,
        is_charged: !brings_key,
        max_concurrent: limits.max_requests_per_client,
    };
    let permit = accounts.admit(client, claim, clock::now())?;
    Ok(RequestPermits::new(request, permit))
}

/// What the provider's formats are called: `mp3_44100_128`. Other values are the client's mistake, and are
/// not written down.
fn is_format(value: &str) -> bool {
    (1..=32).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// With what a request is counted when it runs at once.
fn group(work: Operation, asked: &RequestBodyFeatures, models: &Models) -> Option<ConcurrencyGroup> {
    let of_work = ConcurrencyGroup::of_work(work)?;
    let speaks = of_work == ConcurrencyGroup::SPEECH;
    let model = asked.model.as_deref().or(speaks.then_some(request_body::DEFAULT_MODEL));
    Some(model.and_then(|model| models.group(model)).unwrap_or(of_work))
}
