//! Processes a request, from its head to its response, in ten numbered steps. Before these steps, the caller applies
//! the access rules with [`Proxy::check_access`].
//!
//! The steps are plain function calls and not a stack of middleware, because security depends on their order. The
//! credentials of the client are removed before the request is sent, and a key is reserved before it is used.

use std::net::IpAddr;
use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;

use super::access_log::AccessLog;
use super::account_affinity::AccountAffinity;
use super::attempt::Attempt;
use super::config::{Limits, RuntimeConfig};
use super::error::ProxyError;
use super::head;
use super::relay::{ResponseBody, error_response, relay};
use super::reply::{ProxyResponse, SocketStage, UpstreamReply};
use super::request_context::RequestContext;
use super::request_meta::{self, AdmissionFacts, RequestMeta};
use super::request_summary::RequestSummary;
use super::response_redaction::ResponseRedaction;
use super::retry_state::RetryState;
use super::socket::{FirstMessageAuth, Handshake};
use super::state::Proxy;
use super::upstream_response::UpstreamResponse;
use crate::body::replay::{Replay, SlowUploadError};
use crate::clock;
use crate::elevenlabs::request_body::MAX_PARSED_BODY_BYTES;
use crate::policy::client::{self, Caller};
use crate::policy::origin::{RequestOrigin, check_origin};
use crate::policy::path::strip_base_path;
use crate::policy::replay::{Decision, Progress, decide};
use crate::policy::user::identify_user;
use crate::pool::{Key, Lease};
use crate::secret::ApiKey;
use crate::upstream::{Connect, SendError, SendErrorKind, UpstreamRequestHead};

/// The response to a request that was sent with a key of the pool.
pub(super) struct PoolResponse {
    pub(super) response: Box<UpstreamResponse>,
    /// The key of the last attempt.
    key: Arc<Key>,
    pub(super) attempt: Box<Attempt>,
}

impl<C: Connect> Proxy<C> {
    /// Serves a request from the client at `peer`: relays the provider's response, accepts a WebSocket handshake, or
    /// returns an error response of the proxy.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the current attempt: its connection is closed, its key is released,
    /// and its usage record is written.
    pub async fn exchange(
        self: &Arc<Self>,
        request: Request<Incoming>,
        peer: Option<IpAddr>,
    ) -> ProxyResponse<C> {
        let mut log = AccessLog::new(&request, peer, &self.metrics, &self.events);
        if let Some(first_message_auth) = FirstMessageAuth::detect(self, &request) {
            let (response, session) = first_message_auth.accept(request, log);
            return ProxyResponse::new(response, Some(SocketStage::Unauthenticated(session)));
        }
        match self.forward_request(request, &mut log.summary).await {
            // 10. Record: the access log and the usage record are written when the relay ends, whatever its
            // outcome.
            Ok(UpstreamReply::Response { response, attempt, ownership }) => {
                let buffers = &self.config.load().limits.buffers;
                ProxyResponse::new(relay(*response, attempt, ownership, log, buffers), None)
            }
            Ok(UpstreamReply::Handshake(handshake)) => {
                let (response, session) = handshake.accept(log);
                ProxyResponse::new(response, Some(SocketStage::Open(session)))
            }
            Err(error) => ProxyResponse::new(error_response(&error, log), None),
        }
    }

    /// Removes the configured base path from the request, rejects proxy loops and applies the access rules. Returns
    /// the origin of the request.
    ///
    /// # Errors
    ///
    /// Returns the error response if this proxy sent the request itself, if the request names a foreign host,
    /// or if it comes from a web page whose origin is not allowed.
    pub fn check_access(
        &self,
        request: &mut Request<Incoming>,
        peer: Option<IpAddr>,
    ) -> Result<RequestOrigin, Box<Response<ResponseBody>>> {
        let config = self.config.load();
        if let Some(target) = strip_base_path(request.uri(), &config.base_path) {
            *request.uri_mut() = target;
        }
        let access_result = if self.upstream.has_sent(request.headers()) {
            Err(ProxyError::LoopDetected)
        } else {
            let requires_token = config.clients.require_token();
            check_origin(&config.access_rules, requires_token, request.method(), request.headers())
                .map_err(ProxyError::from)
        };
        access_result.map_err(|error| {
            let log = AccessLog::new(request, peer, &self.metrics, &self.events);
            Box::new(error_response(&error, log))
        })
    }

    /// Steps 1 to 9: returns the provider's response, ready to be relayed, or an accepted WebSocket
    /// handshake.
    ///
    /// # Errors
    ///
    /// Returns the reason for the error response if the request is refused, or if no response of the provider can be
    /// relayed.
    pub(super) async fn forward_request(
        self: &Arc<Self>,
        request: Request<Incoming>,
        summary: &mut RequestSummary,
    ) -> Result<UpstreamReply<C>, ProxyError> {
        let (mut head, body) = request.into_parts();
        let config = self.config.load_full();
        let limits = &config.limits;
        let permit = self.request_limiter.try_acquire(limits.max_requests)?;
        // 1. Authenticate the client by its credentials.
        let Caller { client, own_key } =
            client::authenticate(&config.clients, &head.headers, head.uri.query(), clock::now())?;
        let user = identify_user(&client.name, &head.headers, head.uri.query())?;
        // 2. Route: look up the endpoint, and check that the client may use it and is within its limits.
        let (endpoint, identifiers, path_fix) =
            head::route(&mut head, limits.blocks_admin_endpoints && own_key.is_none())?;
        self.base_url_hints.log_once(&client.name, path_fix);
        summary.set_client_and_route(&client.name, user, endpoint.route);
        let admission_facts = AdmissionFacts {
            client: &client,
            endpoint: &endpoint,
            path: head.uri.path(),
            user,
            has_own_key: own_key.is_some(),
        };
        let admission = summary.count_wait(request_meta::admit(&config, admission_facts, permit)).await?;
        let mut meta =
            RequestMeta::new(summary.request_id(), client.name.clone(), &head.method, &endpoint, admission);
        let mut affinity = AccountAffinity::new(&head, &endpoint, identifiers);
        // 3. Sanitize: remove the client's credentials and the hop-by-hop headers.
        let mut upstream_head = head::sanitize(head, endpoint.socket, &limits.forwarded_headers)?;
        // 4. Buffer: the attempts stream the body, and the streamed bytes are kept for retries.
        let body = Replay::new(body, &limits.buffers);
        if let Some(key) = own_key {
            return Box::pin(self.send_with_own_key(key, &config, meta, &upstream_head, &body, summary))
                .await;
        }
        // 5. Select a key that is usable, has enough credits and an available concurrency slot, and belongs to the
        // account that owns the named resources. The credits and the slot are reserved before the key is used.
        self.retry_budget.count_request();
        let roster = self.pool.roster();
        let redaction = ResponseRedaction::new(&mut upstream_head, &endpoint, roster.redactor(), limits);
        summary.count_wait(affinity.resolve(self, &roster, &meta.client, &body)).await?;
        let ownership_permit = match affinity.may_record(&endpoint) {
            true => Some(summary.count_wait(self.usage.acquire_permit()).await?),
            false => None,
        };
        summary.count_wait(await_short_body(&body, limits)).await?;
        let models = self.pool.models();
        let estimate = meta.estimate_cost(&endpoint, &upstream_head, &body, &models, limits);
        let mut key_request = summary.count_wait(estimate).await;
        summary.count_wait(meta.reserve_credits(&key_request, limits)).await?;
        meta.prefer_available_slot(&mut key_request, &roster);
        let features = meta.features(&endpoint, &upstream_head, &affinity.identifiers);
        let mut retry = RetryState::new(
            &self.pool,
            roster,
            client,
            features,
            key_request,
            affinity,
            self.upstream.authority(),
        );
        let reserve_result = summary.count_wait(self.reserve(&mut retry)).await;
        let lease = reserve_result.map_err(|unavailable| retry.unavailable_error(unavailable))?;
        let mut context =
            RequestContext { config: Arc::clone(&config), meta, retry, head: upstream_head, body };
        let PoolResponse { response, key, attempt } =
            self.send_with_pool(&mut context, lease, summary).await?;
        if response.is_switched() {
            return Handshake::with_pool_key(self, context, *response, attempt, redaction, ownership_permit)
                .map(UpstreamReply::Handshake);
        }
        // Ownership is recorded before the client receives the response, because its next request may name
        // the identifiers in it.
        let RequestContext { meta, retry, .. } = context;
        let ownership = ownership_permit.and_then(|usage_permit| {
            retry.affinity.record_response(self, &meta, limits, &response, &key, usage_permit)
        });
        // 9. Relay: redact keys and the data of the account holder in the response.
        let response = match &redaction {
            Some(redaction) => Box::pin(response.redact(redaction, limits)).await?,
            None => response,
        };
        Ok(UpstreamReply::Response { response, attempt, ownership })
    }

    /// Steps 6 to 8: sends the request with one key after another, starting with the key of `lease`, until a
    /// response can be relayed or the retry policy gives up.
    ///
    /// # Errors
    ///
    /// Returns an error if the queue of usage records is full, if the last attempt received no response, or if an
    /// error of the proxy replaces the provider's last refusal.
    pub(super) async fn send_with_pool(
        &self,
        context: &mut RequestContext,
        mut lease: Lease,
        summary: &mut RequestSummary,
    ) -> Result<PoolResponse, ProxyError> {
        let RequestContext { config, meta, retry, head: upstream_head, body } = context;
        let limits = &config.limits;
        loop {
            let usage_permit = summary.count_wait(self.usage.acquire_permit()).await?;
            // 6. Send: the only place where the key is added to the request.
            let attempt_body = body.start_attempt();
            let key = Arc::clone(lease.key());
            let upload = attempt_body.upload();
            let mut attempt = Attempt::with_pool_key(self, meta, retry, lease, usage_permit, upload);
            let send_result = self
                .upstream
                .send(Some(attempt.authority()), attempt.api_key(), upstream_head, attempt_body)
                .await;
            // 7. Classify: determine which side failed, and how far the attempt got.
            let response_result = UpstreamResponse::read(send_result, &upstream_head.method, limits).await;
            let progress = attempt.record_result(&response_result, Some(retry), summary);
            // 8. Retry with another key, relay the response, or give up.
            summary.replay_loss = body.loss();
            match decide(&retry.retry_facts(progress, body, &key, limits)) {
                Decision::NextKey => retry.exclude(&key),
                Decision::RetryAfter { pause } if self.retry_budget.try_take() => {
                    retry.wait_before_retry(pause).await;
                }
                Decision::Relay | Decision::Fail | Decision::RetryAfter { .. } => {
                    return Ok(PoolResponse { response: response_result?, key, attempt });
                }
            }
            attempt.release_key();
            match summary.count_wait(self.reserve(retry)).await {
                // The refused response is dropped. Its drop closes a connection whose upload has not ended.
                Ok(next_lease) => {
                    summary.retry_reasons.push(attempt.record_failover());
                    lease = next_lease;
                }
                Err(unavailable) => {
                    let response = retry.choose_last_response(response_result?, unavailable)?;
                    return Ok(PoolResponse { response, key, attempt });
                }
            }
        }
    }

    /// Sends a request once, with the client's own key, and returns the response without redaction. The
    /// result is not recorded in the pool.
    async fn send_with_own_key(
        self: &Arc<Self>,
        key: ApiKey,
        config: &Arc<RuntimeConfig>,
        meta: RequestMeta,
        upstream_head: &UpstreamRequestHead,
        body: &Replay<Incoming>,
        summary: &mut RequestSummary,
    ) -> Result<UpstreamReply<C>, ProxyError> {
        let usage_permit = summary.count_wait(self.usage.acquire_permit()).await?;
        let attempt_body = body.start_attempt();
        let mut attempt = Attempt::with_own_key(self, &meta, key, usage_permit, attempt_body.upload());
        // The request is never retried, so its body is not buffered.
        attempt.release_replay_buffer();
        let send_result = self
            .upstream
            .send(Some(attempt.authority()), attempt.api_key(), upstream_head, attempt_body)
            .await;
        let response_result =
            UpstreamResponse::read(send_result, &upstream_head.method, &config.limits).await;
        attempt.record_result(&response_result, None, summary);
        let response = response_result?;
        if response.is_switched() {
            return Handshake::with_own_key(self, config, &meta, *response, attempt)
                .map(UpstreamReply::Handshake);
        }
        Ok(UpstreamReply::Response { response, attempt, ownership: None })
    }
}

/// Waits until a short body has arrived, before a key is reserved. Otherwise a client that uploads slowly
/// would occupy a concurrency slot of a key.
async fn await_short_body(body: &Replay<Incoming>, limits: &Limits) -> Result<(), SendError> {
    let (timeout, min_rate) = (limits.request_body_timeout, limits.min_request_body_rate);
    let kind = match body.wait_for_short_body(MAX_PARSED_BODY_BYTES, timeout, min_rate).await {
        Ok(()) => return Ok(()),
        Err(SlowUploadError::Stalled) => SendErrorKind::ClientStalled(timeout),
        Err(SlowUploadError::BelowMinRate) => SendErrorKind::ClientTooSlow(min_rate.bytes_per_second),
    };
    Err(SendError { progress: Progress::Unsent, kind })
}
