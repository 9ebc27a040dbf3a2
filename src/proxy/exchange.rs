//! The processing of a request from its head to its response, in ten numbered steps.
//!
//! The steps are one plain function and not a tower of layers, because their order is a security
//! property: client credentials are stripped before anything is sent, and a key is reserved before
//! it is used.

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
use super::reply::{ProxyResponse, UpstreamReply};
use super::request_context::RequestContext;
use super::request_meta::{self, RequestMeta};
use super::request_summary::RequestSummary;
use super::response_redaction::ResponseRedaction;
use super::retry_state::RetryState;
use super::socket::{FirstMessageAuth, Handshake};
use super::state::Proxy;
use super::upstream_response::UpstreamResponse;
use crate::body::replay::{Replay, Slow};
use crate::elevenlabs::request_body;
use crate::policy::client::{self, Caller};
use crate::policy::origin::{RequestOrigin, admit};
use crate::policy::path::without_base;
use crate::policy::replay::{Decision, Progress, decide};
use crate::pool::{Key, Lease};
use crate::secret::ApiKey;
use crate::upstream::{Connect, SendError, SendErrorKind, UpstreamRequestHead};

impl<C: Connect> Proxy<C> {
    /// Serves a request of the client at `peer`: relays the provider's response, or returns an error response
    /// of the proxy.
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
        let mut log = AccessLog::begin(&request, peer, &self.meters);
        if let Some(first_message_auth) = FirstMessageAuth::of(self, &request) {
            let (response, session) = first_message_auth.begin(request, log);
            return ProxyResponse::unauthenticated(response, session);
        }
        let reply = self.find_reply(request, &mut log.summary).await;
        match reply {
            // 10. Record: the access log and the usage record are completed when the relay ends,
            // however it ends.
            Ok(UpstreamReply::Response { response, attempt, ownership }) => {
                let buffers = &self.config.load().limits.buffers;
                ProxyResponse::of(relay(*response, attempt, ownership, log, buffers))
            }
            Ok(UpstreamReply::Socket(opened)) => {
                let (response, session) = opened.begin(log);
                ProxyResponse::switched(response, session)
            }
            Err(error) => ProxyResponse::of(error_response(&error, log)),
        }
    }

    /// Strips the configured base path, checks for a proxy loop and applies the access rules;
    /// returns the origin of the request.
    ///
    /// # Errors
    ///
    /// Returns the error response for a request that this proxy sent itself, that names a foreign
    /// host, or that comes from a web page which is not listed.
    pub fn admit(
        &self,
        request: &mut Request<Incoming>,
        peer: Option<IpAddr>,
    ) -> Result<RequestOrigin, Box<Response<ResponseBody>>> {
        let config = self.config.load();
        if let Some(target) = without_base(request.uri(), &config.base_path) {
            *request.uri_mut() = target;
        }
        if self.upstream.has_sent(request.headers()) {
            return Err(Box::new(error_response(
                &ProxyError::Loop,
                AccessLog::begin(request, peer, &self.meters),
            )));
        }
        let requires_tokens = config.clients.are_known();
        admit(&config.access_rules, requires_tokens, request.method(), request.headers()).map_err(
            |rejected| {
                Box::new(error_response(&rejected.into(), AccessLog::begin(request, peer, &self.meters)))
            },
        )
    }

    pub(super) async fn find_reply(
        self: &Arc<Self>,
        request: Request<Incoming>,
        summary: &mut RequestSummary,
    ) -> Result<UpstreamReply<C>, ProxyError> {
        let (mut head, body) = request.into_parts();
        let config = self.config.load_full();
        let RuntimeConfig { clients, client_usage, limits, .. } = &*config;
        let permit = self.limiter.try_acquire(limits.max_requests)?;
        // 1. Authenticate the client by its credentials.
        let Caller { client, own_key } = client::authenticate(clients, &head.headers, head.uri.query())?;
        // 2. Route: the endpoint, which this client must be allowed to use, within its limits.
        let (endpoint, names, path_fix) =
            head::route(&mut head, limits.blocks_admin_endpoints && own_key.is_none())?;
        self.base_url_hints.log_once(&client.name, path_fix);
        summary.set_route(&client.name, endpoint.route);
        let brings_key = own_key.is_some();
        let permits = request_meta::admit(
            client_usage,
            &client,
            &endpoint,
            head.uri.path(),
            brings_key,
            limits,
            permit,
        )?;
        let mut meta =
            RequestMeta::open(summary.request_id(), client.name.clone(), &head.method, &endpoint, permits);
        let mut affinity = AccountAffinity::of(&head, &endpoint, names);
        // 3. Sanitize: no credential of the client and no hop-by-hop header is forwarded.
        let mut upstream_head = head::sanitize(head, endpoint.socket, &limits.forwarded_headers)?;
        // 4. Buffer: the body streams on, and what was streamed is kept so that it can be sent
        // again.
        let body = Replay::hold(body, &limits.buffers);
        if let Some(key) = own_key {
            return Box::pin(self.send_with_own_key(key, &config, meta, &upstream_head, &body, summary))
                .await;
        }
        // 5. Select a key: it is usable, has the credits and a free concurrency slot, and belongs
        // to the account that owns the named resources. They are reserved before it is used.
        self.retry_budget.count();
        let roster = self.pool.roster();
        let redaction = ResponseRedaction::new(&mut upstream_head, &endpoint, roster.redactor(), limits);
        let preferred = || self.list_affinity.of(&meta.client);
        summary.waiting(affinity.resolve(&roster, &self.owners, &self.misses, &body, preferred)).await?;
        let ownership_permit = if affinity.may_record(&endpoint) {
            Some(summary.waiting(self.usage.permit()).await?)
        } else {
            None
        };
        summary.waiting(await_short_body(&body, limits)).await?;
        let span = meta.estimate_timeout(limits.cost_estimate_timeout);
        let models = self.pool.models();
        let estimate = meta.estimate_cost(&endpoint, &upstream_head, &body, &models, span);
        let mut key_request = summary.waiting(estimate).await;
        meta.reserve_credits(&key_request, limits)?;
        meta.prefer_free_slot(&mut key_request, &roster);
        let features = meta.features(&endpoint, &upstream_head, affinity.names());
        let mut retry = RetryState::begin(roster, client, features, key_request, affinity);
        retry.find_restrictions(&self.pool);
        let lease = summary
            .waiting(self.reserve(&mut retry))
            .await
            .map_err(|unavailable| retry.refusal(unavailable))?;
        let mut context =
            RequestContext { config: Arc::clone(&config), meta, retry, head: upstream_head, body };
        let (response, key, attempt) = self.send_with_pool(&mut context, lease, summary).await?;
        if response.is_switched() {
            return Handshake::with_pool(self, context, *response, attempt, redaction, ownership_permit)
                .map(UpstreamReply::Socket);
        }
        // Ownership is recorded before the client receives the response, and so before it can name
        // the identifiers in it.
        let RequestContext { meta, retry, .. } = context;
        let ownership = ownership_permit.and_then(|usage_permit| {
            retry.into_affinity().record(self, &meta, limits, &response, &key, usage_permit)
        });
        // 9. Relay, without keys and data about the account's owner.
        let response = match &redaction {
            Some(redaction) => Box::pin(response.redact(redaction, limits)).await?,
            None => response,
        };
        Ok(UpstreamReply::Response { response, attempt, ownership })
    }

    /// Sends the request with one key after another, beginning with `lease`, until a response can
    /// be relayed or the retry policy gives up.
    ///
    /// # Errors
    ///
    /// When no attempt got a response, or when the client is to get an error response of the proxy.
    pub(super) async fn send_with_pool(
        &self,
        context: &mut RequestContext,
        mut lease: Lease,
        summary: &mut RequestSummary,
    ) -> Result<(Box<UpstreamResponse>, Arc<Key>, Box<Attempt>), ProxyError> {
        let RequestContext { config, meta, retry, head: upstream_head, body } = context;
        let limits = &config.limits;
        loop {
            let usage_permit = summary.waiting(self.usage.permit()).await?;
            // 6. Send: the only place where the key is added to the request.
            let sending = body.attempt();
            let key = Arc::clone(lease.key());
            let mut attempt = Attempt::begin(self, meta, retry, lease, usage_permit, sending.upload());
            let sent = self
                .upstream
                .send(Some(attempt.authority()), attempt.api_key(), upstream_head, sending)
                .await;
            // 7. Classify: which side failed, and how far the attempt got.
            let result = UpstreamResponse::read(sent, &upstream_head.method, limits).await;
            let progress = attempt.record_result(&result, Some(retry), summary);
            // 8. Retry with another key, relay the response, or give up.
            summary.record_replay_loss(body.loss());
            match decide(&retry.facts(progress, body, &key, limits)) {
                Decision::NextKey => retry.exclude(&key),
                Decision::Again { pause } if self.retry_budget.take() => retry.pause(pause).await,
                Decision::Relay | Decision::Fail | Decision::Again { .. } => {
                    return Ok((result?, key, attempt));
                }
            }
            attempt.release();
            match summary.waiting(self.reserve(retry)).await {
                Ok(next) => {
                    summary.record_retry(attempt.failed_over());
                    lease = next;
                }
                Err(unavailable) => return Ok((retry.last_response(result?, unavailable)?, key, attempt)),
            }
        }
    }

    /// Sends a request with the client's own key, once, to the configured upstream, and returns the
    /// response without redaction. Nothing about it is recorded in the pool.
    async fn send_with_own_key(
        self: &Arc<Self>,
        key: ApiKey,
        config: &Arc<RuntimeConfig>,
        meta: RequestMeta,
        upstream_head: &UpstreamRequestHead,
        body: &Replay<Incoming>,
        summary: &mut RequestSummary,
    ) -> Result<UpstreamReply<C>, ProxyError> {
        let usage_permit = summary.waiting(self.usage.permit()).await?;
        let sending = body.attempt();
        let mut attempt = Attempt::with_own_key(self, &meta, key, usage_permit, sending.upload());
        // The request is never sent again, so its body is not buffered.
        attempt.relaying();
        let sent =
            self.upstream.send(Some(attempt.authority()), attempt.api_key(), upstream_head, sending).await;
        let response = UpstreamResponse::read(sent, &upstream_head.method, &config.limits).await;
        attempt.record_result(&response, None, summary);
        let response = response?;
        if response.is_switched() {
            return Handshake::with_own_key(self, config, &meta, *response, attempt)
                .map(UpstreamReply::Socket);
        }
        Ok(UpstreamReply::Response { response, attempt, ownership: None })
    }
}

/// Waits for a short body before a key is reserved, so that a client which trickles its body does
/// not occupy a concurrency slot of a key.
async fn await_short_body(body: &Replay<Incoming>, limits: &Limits) -> Result<(), SendError> {
    let Limits { request_body_timeout: body_idle_max, min_request_body_rate: body_min_rate, .. } = *limits;
    let read = body.wait_for_short_body(request_body::BODY_BYTES_MAX, body_idle_max, body_min_rate).await;
    let kind = match read {
        Ok(()) => return Ok(()),
        Err(Slow::Stalled) => SendErrorKind::ClientStalled(body_idle_max),
        Err(Slow::Trickles) => SendErrorKind::ClientSlow(body_min_rate.bytes_per_second),
    };
    Err(SendError { progress: Progress::Unsent, kind })
}
