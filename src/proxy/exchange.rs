//! The request's way, from top to bottom. The order of the steps is the security property: strip
//! before send, reserve before send. So it is a plain function and not a tower of layers.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;

use super::answer::Answer;
use super::attempt::Attempt;
use super::bond::Bond;
use super::case::{self, Case};
use super::error::ProxyError;
use super::head::{look_up, strip};
use super::journal::RequestLog;
use super::journey::Journey;
use super::redaction::Veil;
use super::relay::{ResponseBody, ours, relay};
use super::socket::{Introduction, Opened, Socket};
use super::{Limits, Proxy, Terms};
use crate::body::replay::{Replay, Slow};
use crate::policy::asked;
use crate::policy::client::{self, Caller};
use crate::policy::mend::without_base;
use crate::policy::origin::{Visit, admit};
use crate::policy::replay::{Decision, Progress, decide};
use crate::pool::{Key, Lease};
use crate::secret::ApiKey;
use crate::upstream::{Connect, Outbound, SendError, SendErrorKind};

/// What a request meets at the end of its way.
pub struct Exchanged<C> {
    /// The answer.
    pub answer: Response<ResponseBody>,
    /// Who speaks on the connection from then on, when the answer is a 101.
    pub socket: Option<Socket<C>>,
}

/// What was found for a request.
pub(super) enum Found<C> {
    Answer(Box<Answer>, Box<Attempt>),
    Socket(Box<Opened<C>>),
}

/// What is asked and what it has met: all that an attempt needs.
#[derive(Debug)]
pub(super) struct Errand {
    pub(super) terms: Arc<Terms>,
    pub(super) case: Case,
    pub(super) journey: Journey,
    pub(super) outbound: Outbound,
    pub(super) body: Replay<Incoming>,
}

impl<C: Connect> Proxy<C> {
    /// Answers a request: with the provider's answer, or with one of ours.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the attempt that is under way: its connection is closed, its key
    /// released, and what became of it is written down.
    pub async fn exchange(self: &Arc<Self>, request: Request<Incoming>) -> Exchanged<C> {
        let mut log = RequestLog::begin(&request, &self.meters);
        if let Some(introduction) = Introduction::of(self, &request) {
            return introduction.begin(request, log);
        }
        let found = self.find_answer(request, &mut log).await;
        match found {
            // 10. Account when the relay ends, however it ends.
            Ok(Found::Answer(answer, attempt)) => {
                Exchanged::of(relay(*answer, attempt, log, &self.terms.load().limits.buffers))
            }
            Ok(Found::Socket(opened)) => opened.begin(log),
            Err(error) => Exchanged::of(ours(&error, log)),
        }
    }

    /// Lets a request in, without the base path that is before its own, and says where it comes
    /// from.
    ///
    /// # Errors
    ///
    /// The answer, when it was sent to a foreign name, by a page that is not listed, or by this program.
    pub fn admit(&self, request: &mut Request<Incoming>) -> Result<Visit, Box<Response<ResponseBody>>> {
        let terms = self.terms.load();
        if let Some(target) = without_base(request.uri(), &terms.base_path) {
            *request.uri_mut() = target;
        }
        if self.upstream.has_sent(request.headers()) {
            return Err(Box::new(ours(&ProxyError::Loop, RequestLog::begin(request, &self.meters))));
        }
        let asks_for_tokens = terms.clients.are_known();
        admit(&terms.doors, asks_for_tokens, request.method(), request.headers())
            .map_err(|stranger| Box::new(ours(&stranger.into(), RequestLog::begin(request, &self.meters))))
    }

    pub(super) async fn find_answer(
        self: &Arc<Self>,
        request: Request<Incoming>,
        log: &mut RequestLog,
    ) -> Result<Found<C>, ProxyError> {
        let (mut head, body) = request.into_parts();
        let terms = self.terms.load_full();
        let Terms { clients, accounts, limits, .. } = &*terms;
        let permit = self.limiter.take(limits.requests_max)?;
        // 1. Identify: who is asking?
        let Caller { client, own_key } = client::identify(clients, &head.headers, head.uri.query())?;
        // 2. Look up: what is it, and may this client of the pool do it?
        let (endpoint, names, mistake) = look_up(&mut head, limits.denies_dangerous && own_key.is_none())?;
        self.hints.tell(&client.name, mistake);
        log.opened(&client.name, endpoint.route);
        let brings_key = own_key.is_some();
        let permits = case::admit(accounts, &client, &endpoint, head.uri.path(), brings_key, limits, permit)?;
        let mut case = Case::open(log.request_id(), client.name.clone(), &head.method, &endpoint, permits);
        let mut bond = Bond::of(&head, &endpoint, names);
        // 3. Strip: no credential of the client goes on.
        let mut outbound = strip(head, endpoint.socket, &limits.forwarded)?;
        // 4. Hold: the body streams on, and what passes is kept for a replay.
        let body = Replay::hold(body, &limits.buffers);
        if let Some(key) = own_key {
            return Box::pin(self.ask_with(key, &terms, case, &outbound, &body, log)).await;
        }
        // 5. Reserve: a key that stands well, can pay, has room, and opens the account that has what is
        // named.
        self.retries.count();
        let roster = self.pool.roster();
        let veil = Veil::over(&mut outbound, &endpoint, roster.redactor(), limits);
        bond.tie(&roster, &self.owners, &self.misses, &body, || self.homes.of(&case.client)).await?;
        let lessons = if bond.may_teach(&endpoint) { Some(self.books.place().await?) } else { None };
        read_short(&body, limits).await?;
        let span = case.foresight(limits.foresee_max);
        let mut ask = case.foresee(&endpoint, &outbound, &body, &self.pool.models(), span).await;
        case.reserve_credits(&ask, limits)?;
        case.prefer_room(&mut ask, &roster);
        let features = case.features(&endpoint, &outbound, bond.names());
        let mut journey = Journey::begin(roster, client, features, ask, bond);
        journey.look_for_restrictions(&self.pool);
        let lease = self.reserve(&mut journey).await.map_err(|unavailable| journey.refusal(unavailable))?;
        let mut errand = Errand { terms: Arc::clone(&terms), case, journey, outbound, body };
        let (answer, key, mut attempt) = self.ask(&mut errand, lease, log).await?;
        if answer.is_switched() {
            return Opened::with_pool(self, errand, *answer, attempt, veil, lessons).map(Found::Socket);
        }
        // What the answer gives is known before the client can name it.
        if let Some(place) = lessons {
            let Errand { case, journey, .. } = errand;
            attempt.teaches(journey.end().learn(self, &case, limits, &answer, &key, place));
        }
        // 9. Relay, but for what is nobody else's business.
        let answer = match &veil {
            Some(veil) => Box::pin(answer.behind(veil, limits)).await?,
            None => answer,
        };
        Ok(Found::Answer(answer, attempt))
    }

    /// Asks with one key after another, from `lease` on, until there is something to relay.
    ///
    /// # Errors
    ///
    /// When there is no answer, or when what is left to say is ours.
    pub(super) async fn ask(
        &self,
        errand: &mut Errand,
        mut lease: Lease,
        log: &mut RequestLog,
    ) -> Result<(Box<Answer>, Arc<Key>, Box<Attempt>), ProxyError> {
        let Errand { terms, case, journey, outbound, body } = errand;
        let limits = &terms.limits;
        loop {
            let place = self.books.place().await?;
            // 6. Send: the key goes in here and nowhere else.
            let sending = body.attempt();
            let key = Arc::clone(lease.key());
            let mut attempt = Attempt::begin(self, case, journey, lease, place, sending.upload());
            let sent = self.upstream.send(attempt.authority(), attempt.api_key(), outbound, sending).await;
            // 7. Classify: whose fault is it, and how far did it get?
            let result = Answer::read(sent, &outbound.method, limits).await;
            let progress = attempt.learn(&result, Some(journey), log);
            // 8. Decide: replay, relay, or give up.
            log.lost(body.loss());
            match decide(&journey.facts(progress, body, &key, limits)) {
                Decision::NextKey => journey.leave(&key),
                Decision::Again { pause } if self.retries.take() => journey.pause(pause).await,
                Decision::Relay | Decision::Fail | Decision::Again { .. } => {
                    return Ok((result?, key, attempt));
                }
            }
            attempt.release();
            match self.reserve(journey).await {
                Ok(next) => {
                    attempt.failed_over();
                    lease = next;
                }
                Err(unavailable) => return Ok((result?.or_ours(journey, unavailable)?, key, attempt)),
            }
        }
    }

    /// The way of a client that has brought its own key: to where the pool's keys go, once, and
    /// back as it comes. The pool learns nothing of it.
    async fn ask_with(
        self: &Arc<Self>,
        key: ApiKey,
        terms: &Arc<Terms>,
        case: Case,
        outbound: &Outbound,
        body: &Replay<Incoming>,
        log: &mut RequestLog,
    ) -> Result<Found<C>, ProxyError> {
        let place = self.books.place().await?;
        let sending = body.attempt();
        let mut attempt = Attempt::with_own_key(self, &case, key, place, sending.upload());
        // Nobody will send it again, so nothing of it is kept.
        attempt.relaying();
        let sent = self.upstream.send(attempt.authority(), attempt.api_key(), outbound, sending).await;
        let answer = Answer::read(sent, &outbound.method, &terms.limits).await;
        attempt.learn(&answer, None, log);
        let answer = answer?;
        if answer.is_switched() {
            return Opened::with_own_key(self, terms, &case, *answer, attempt).map(Found::Socket);
        }
        Ok(Found::Answer(answer, attempt))
    }
}

/// Waits for a short body before a key is reserved: a client that trickles it holds no place that others need.
async fn read_short(body: &Replay<Incoming>, limits: &Limits) -> Result<(), SendError> {
    let Limits { body_idle_max, body_min_rate, .. } = *limits;
    let read = body.gather_short(asked::BODY_BYTES_MAX, body_idle_max, body_min_rate).await;
    let kind = match read {
        Ok(()) => return Ok(()),
        Err(Slow::Stalled) => SendErrorKind::ClientStalled(body_idle_max),
        Err(Slow::Trickles) => SendErrorKind::ClientSlow(body_min_rate.bytes_per_second),
    };
    Err(SendError { progress: Progress::Unsent, kind })
}

impl<C> Exchanged<C> {
    pub(super) fn of(answer: Response<ResponseBody>) -> Self {
        Self { answer, socket: None }
    }
}
