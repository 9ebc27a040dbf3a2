//! The request's way, from top to bottom. The order of the steps is the security property: strip
//! before send, reserve before send. So it is a plain function and not a tower of layers.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;

use super::access_log::AccessLog;
use super::account_affinity::AccountAffinity;
use super::answer::Answer;
use super::attempt::Attempt;
use super::error::ProxyError;
use super::head::{look_up, strip};
use super::relay::{ResponseBody, ours, relay};
use super::request_meta::{self, RequestMeta};
use super::response_redaction::ResponseRedaction;
use super::retry_state::RetryState;
use super::socket::{FirstMessageAuth, Handshake, Socket};
use super::{Limits, Proxy, RuntimeConfig};
use crate::body::replay::{Replay, Slow};
use crate::policy::client::{self, Caller};
use crate::policy::normalize_path::without_base;
use crate::policy::origin::{RequestOrigin, admit};
use crate::policy::replay::{Decision, Progress, decide};
use crate::policy::request_body;
use crate::pool::{Key, Lease};
use crate::secret::ApiKey;
use crate::upstream::{Connect, SendError, SendErrorKind, UpstreamRequestHead};

/// What a request meets at the end of its way.
pub struct ProxyResponse<C> {
    /// The answer.
    pub answer: Response<ResponseBody>,
    /// Who speaks on the connection from then on, when the answer is a 101.
    pub socket: Option<Socket<C>>,
}

/// What was found for a request.
pub(super) enum UpstreamReply<C> {
    Response(Box<Answer>, Box<Attempt>),
    Socket(Box<Handshake<C>>),
}

/// What is asked and what it has met: all that an attempt needs.
#[derive(Debug)]
pub(super) struct RequestContext {
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) meta: RequestMeta,
    pub(super) retry: RetryState,
    pub(super) head: UpstreamRequestHead,
    pub(super) body: Replay<Incoming>,
}

impl<C: Connect> Proxy<C> {
    /// Answers a request: with the provider's answer, or with one of ours.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the attempt that is under way: its connection is closed, its key
    /// released, and what became of it is written down.
    pub async fn exchange(self: &Arc<Self>, request: Request<Incoming>) -> ProxyResponse<C> {
        let mut log = AccessLog::begin(&request, &self.meters);
        if let Some(introduction) = FirstMessageAuth::of(self, &request) {
            return introduction.begin(request, log);
        }
        let found = self.find_reply(request, &mut log).await;
        match found {
            // 10. Account when the relay ends, however it ends.
            Ok(UpstreamReply::Response(answer, attempt)) => {
                ProxyResponse::of(relay(*answer, attempt, log, &self.config.load().limits.buffers))
            }
            Ok(UpstreamReply::Socket(opened)) => opened.begin(log),
            Err(error) => ProxyResponse::of(ours(&error, log)),
        }
    }

    /// Lets a request in, without the base path that is before its own, and says where it comes
    /// from.
    ///
    /// # Errors
    ///
    /// The answer, when it was sent to a foreign name, by a page that is not listed, or by this program.
    pub fn admit(
        &self,
        request: &mut Request<Incoming>,
    ) -> Result<RequestOrigin, Box<Response<ResponseBody>>> {
        let config = self.config.load();
        if let Some(target) = without_base(request.uri(), &config.base_path) {
            *request.uri_mut() = target;
        }
        if self.upstream.has_sent(request.headers()) {
            return Err(Box::new(ours(&ProxyError::Loop, AccessLog::begin(request, &self.meters))));
        }
        let asks_for_tokens = config.clients.are_known();
        admit(&config.doors, asks_for_tokens, request.method(), request.headers())
            .map_err(|stranger| Box::new(ours(&stranger.into(), AccessLog::begin(request, &self.meters))))
    }

    pub(super) async fn find_reply(
        self: &Arc<Self>,
        request: Request<Incoming>,
        log: &mut AccessLog,
    ) -> Result<UpstreamReply<C>, ProxyError> {
        let (mut head, body) = request.into_parts();
        let config = self.config.load_full();
        let RuntimeConfig { clients, accounts, limits, .. } = &*config;
        let permit = self.limiter.try_acquire(limits.requests_max)?;
        // 1. Identify: who is asking?
        let Caller { client, own_key } = client::identify(clients, &head.headers, head.uri.query())?;
        // 2. Look up: what is it, and may this client of the pool do it?
        let (endpoint, names, mistake) = look_up(&mut head, limits.denies_dangerous && own_key.is_none())?;
        self.hints.log_once(&client.name, mistake);
        log.opened(&client.name, endpoint.route);
        let brings_key = own_key.is_some();
        let permits =
            request_meta::admit(accounts, &client, &endpoint, head.uri.path(), brings_key, limits, permit)?;
        let mut meta =
            RequestMeta::open(log.request_id(), client.name.clone(), &head.method, &endpoint, permits);
        let mut affinity = AccountAffinity::of(&head, &endpoint, names);
        // 3. Strip: no credential of the client goes on.
        let mut upstream_head = strip(head, endpoint.socket, &limits.forwarded)?;
        // 4. Hold: the body streams on, and what passes is kept for a replay.
        let body = Replay::hold(body, &limits.buffers);
        if let Some(key) = own_key {
            return Box::pin(self.send_with_own_key(key, &config, meta, &upstream_head, &body, log)).await;
        }
        // 5. Reserve: a key that stands well, can pay, has room, and opens the account that has what is
        // named.
        self.retries.count();
        let roster = self.pool.roster();
        let redaction = ResponseRedaction::over(&mut upstream_head, &endpoint, roster.redactor(), limits);
        affinity.resolve(&roster, &self.owners, &self.misses, &body, || self.homes.of(&meta.client)).await?;
        let ownership_permit =
            if affinity.may_record(&endpoint) { Some(self.books.place().await?) } else { None };
        await_short_body(&body, limits).await?;
        let span = meta.estimate_timeout(limits.foresee_max);
        let mut key_request =
            meta.estimate_cost(&endpoint, &upstream_head, &body, &self.pool.models(), span).await;
        meta.reserve_credits(&key_request, limits)?;
        meta.prefer_room(&mut key_request, &roster);
        let features = meta.features(&endpoint, &upstream_head, affinity.names());
        let mut retry = RetryState::begin(roster, client, features, key_request, affinity);
        retry.find_restrictions(&self.pool);
        let lease = self.reserve(&mut retry).await.map_err(|unavailable| retry.refusal(unavailable))?;
        let mut context =
            RequestContext { config: Arc::clone(&config), meta, retry, head: upstream_head, body };
        let (answer, key, mut attempt) = self.send_with_pool(&mut context, lease, log).await?;
        if answer.is_switched() {
            return Handshake::with_pool(self, context, *answer, attempt, redaction, ownership_permit)
                .map(UpstreamReply::Socket);
        }
        // What the answer gives is known before the client can name it.
        if let Some(place) = ownership_permit {
            let RequestContext { meta, retry, .. } = context;
            attempt.set_ownership_recorder(
                retry.into_affinity().record(self, &meta, limits, &answer, &key, place),
            );
        }
        // 9. Relay, but for what is nobody else's business.
        let answer = match &redaction {
            Some(redaction) => Box::pin(answer.redact(redaction, limits)).await?,
            None => answer,
        };
        Ok(UpstreamReply::Response(answer, attempt))
    }

    /// Asks with one key after another, from `lease` on, until there is something to relay.
    ///
    /// # Errors
    ///
    /// When there is no answer, or when what is left to say is ours.
    pub(super) async fn send_with_pool(
        &self,
        context: &mut RequestContext,
        mut lease: Lease,
        log: &mut AccessLog,
    ) -> Result<(Box<Answer>, Arc<Key>, Box<Attempt>), ProxyError> {
        let RequestContext { config, meta, retry, head: upstream_head, body } = context;
        let limits = &config.limits;
        loop {
            let place = self.books.place().await?;
            // 6. Send: the key goes in here and nowhere else.
            let sending = body.attempt();
            let key = Arc::clone(lease.key());
            let mut attempt = Attempt::begin(self, meta, retry, lease, place, sending.upload());
            let sent =
                self.upstream.send(attempt.authority(), attempt.api_key(), upstream_head, sending).await;
            // 7. Classify: whose fault is it, and how far did it get?
            let result = Answer::read(sent, &upstream_head.method, limits).await;
            let progress = attempt.record_result(&result, Some(retry), log);
            // 8. Decide: replay, relay, or give up.
            log.lost(body.loss());
            match decide(&retry.facts(progress, body, &key, limits)) {
                Decision::NextKey => retry.exclude(&key),
                Decision::Again { pause } if self.retries.take() => retry.pause(pause).await,
                Decision::Relay | Decision::Fail | Decision::Again { .. } => {
                    return Ok((result?, key, attempt));
                }
            }
            attempt.release();
            match self.reserve(retry).await {
                Ok(next) => {
                    attempt.failed_over();
                    lease = next;
                }
                Err(unavailable) => return Ok((result?.or_ours(retry, unavailable)?, key, attempt)),
            }
        }
    }

    /// The way of a client that has brought its own key: to where the pool's keys go, once, and
    /// back as it comes. The pool learns nothing of it.
    async fn send_with_own_key(
        self: &Arc<Self>,
        key: ApiKey,
        config: &Arc<RuntimeConfig>,
        meta: RequestMeta,
        upstream_head: &UpstreamRequestHead,
        body: &Replay<Incoming>,
        log: &mut AccessLog,
    ) -> Result<UpstreamReply<C>, ProxyError> {
        let place = self.books.place().await?;
        let sending = body.attempt();
        let mut attempt = Attempt::with_own_key(self, &meta, key, place, sending.upload());
        // Nobody will send it again, so nothing of it is kept.
        attempt.relaying();
        let sent = self.upstream.send(attempt.authority(), attempt.api_key(), upstream_head, sending).await;
        let answer = Answer::read(sent, &upstream_head.method, &config.limits).await;
        attempt.record_result(&answer, None, log);
        let answer = answer?;
        if answer.is_switched() {
            return Handshake::with_own_key(self, config, &meta, *answer, attempt).map(UpstreamReply::Socket);
        }
        Ok(UpstreamReply::Response(answer, attempt))
    }
}

/// Waits for a short body before a key is reserved: a client that trickles it holds no place that others need.
async fn await_short_body(body: &Replay<Incoming>, limits: &Limits) -> Result<(), SendError> {
    let Limits { body_idle_max, body_min_rate, .. } = *limits;
    let read = body.wait_for_short_body(request_body::BODY_BYTES_MAX, body_idle_max, body_min_rate).await;
    let kind = match read {
        Ok(()) => return Ok(()),
        Err(Slow::Stalled) => SendErrorKind::ClientStalled(body_idle_max),
        Err(Slow::Trickles) => SendErrorKind::ClientSlow(body_min_rate.bytes_per_second),
    };
    Err(SendError { progress: Progress::Unsent, kind })
}

impl<C> ProxyResponse<C> {
    pub(super) fn of(answer: Response<ResponseBody>) -> Self {
        Self { answer, socket: None }
    }
}
