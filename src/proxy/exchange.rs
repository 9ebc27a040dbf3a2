//! The request's way, from top to bottom. The order of the steps is the security property: strip
//! before send, reserve before send. So it is a plain function and not a tower of layers.

use std::sync::Arc;

use http::{Request, Response};
use hyper::body::Incoming;

use super::answer::Answer;
use super::attempt::Attempt;
use super::bond::Bond;
use super::case::Case;
use super::error::ProxyError;
use super::head::{look_up, strip};
use super::journal::RequestLog;
use super::journey::Journey;
use super::redaction::Veil;
use super::relay::{ResponseBody, ours, relay};
use super::{Limits, Proxy, Terms};
use crate::body::replay::Replay;
use crate::policy::classify::Verdict;
use crate::policy::client::{self, Caller};
use crate::policy::mend::without_base;
use crate::policy::origin::{Visit, admit};
use crate::policy::replay::{Decision, Progress, decide};
use crate::secret::ApiKey;
use crate::upstream::{Connect, Outbound, SendError};

impl<C: Connect> Proxy<C> {
    /// Answers a request: with the provider's answer, or with one of ours.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the attempt that is under way: its connection is closed, its key
    /// released, and what became of it is written down.
    pub async fn exchange(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let mut log = RequestLog::begin(&request, &self.meters);
        let found = self.find_answer(request, &mut log).await;
        if !may_be_charged(&found) {
            log.unserved();
        }
        match found {
            // 10. Account when the relay ends, however it ends.
            Ok((answer, attempt)) => relay(answer, attempt, log),
            Err(error) => ours(&error, log),
        }
    }

    /// Lets a request in, without the base path that is before its own, and says where it comes
    /// from.
    ///
    /// # Errors
    ///
    /// The answer, when it was sent to a foreign name or by a page that is not listed.
    pub fn admit(&self, request: &mut Request<Incoming>) -> Result<Visit, Box<Response<ResponseBody>>> {
        let terms = self.terms.load();
        if let Some(target) = without_base(request.uri(), &terms.base_path) {
            *request.uri_mut() = target;
        }
        let asks_for_tokens = terms.clients.are_known();
        admit(&terms.doors, asks_for_tokens, request.method(), request.headers())
            .map_err(|stranger| Box::new(ours(&stranger.into(), RequestLog::begin(request, &self.meters))))
    }

    /// Answers a request that comes when the program ends: another instance will take it.
    pub fn decline(&self, request: &Request<Incoming>) -> Response<ResponseBody> {
        ours(&ProxyError::Draining, RequestLog::begin(request, &self.meters))
    }

    async fn find_answer(
        &self,
        request: Request<Incoming>,
        log: &mut RequestLog,
    ) -> Result<(Answer, Attempt), ProxyError> {
        let (mut head, body) = request.into_parts();
        let terms = self.terms.load_full();
        let Terms { clients, accounts, limits, .. } = &*terms;
        log.seated(self.seats.take(limits.requests_max)?);
        // 1. Identify: who is asking?
        let Caller { client, own_key } = client::identify(clients, &head.headers, head.uri.query())?;
        // 2. Look up: what is it, and may this client of the pool do it?
        let (endpoint, mistake) = look_up(&mut head, limits.denies_dangerous && own_key.is_none())?;
        self.hints.tell(&client.name, mistake);
        let mut case = Case::open(log, client.name.clone(), &head.method, &endpoint);
        case.admit(accounts, &client, head.uri.path(), own_key.is_some(), log)?;
        let mut bond = Bond::of(&head, &endpoint);
        // 3. Strip: no credential of the client goes on.
        let mut outbound = strip(head)?;
        // 4. Hold: the body streams on, and what passes is kept for a replay.
        let body = Replay::hold(body, &limits.room);
        if let Some(key) = own_key {
            return self.ask_with(key, &case, &outbound, &body, limits, log).await;
        }
        // 5. Reserve: a key that stands well, can pay, has room, and opens the account that has what is
        // named.
        self.retries.count();
        let roster = self.pool.roster();
        let veil = Veil::over(&mut outbound, &endpoint, roster.redactor(), limits);
        bond.tie(&roster, &self.owners, &body, || self.homes.of(&case.client)).await?;
        let lessons = if bond.may_teach(&endpoint) { Some(self.books.place().await?) } else { None };
        let ask = case.foresee(&endpoint, &body, &self.pool.models(), limits.foresee_max).await;
        let mut journey = Journey::begin(roster, client, endpoint.effect, ask, bond);
        let mut lease = self.reserve(&journey).await.map_err(|unavailable| journey.refusal(unavailable))?;
        let (answer, key, mut attempt) = loop {
            let place = self.books.place().await?;
            // 6. Send: the key goes in here and nowhere else.
            let sending = body.attempt();
            let key = Arc::clone(lease.key());
            let mut attempt = Attempt::begin(self, &case, &mut journey, lease, place, sending.upload());
            let sent = self.upstream.send(attempt.authority(), attempt.api_key(), &outbound, sending).await;
            // 7. Classify: whose fault is it, and how far did it get?
            let result = Answer::read(sent, &outbound.method, limits).await;
            let progress = attempt.learn(&result, Some(&journey), log);
            // 8. Decide: replay, relay, or give up.
            log.lost(body.loss());
            match decide(&journey.facts(progress, &body, &key, limits)) {
                Decision::NextKey => journey.leave(&key),
                Decision::Again { pause } if self.retries.take() => journey.pause(pause).await,
                Decision::Relay | Decision::Fail | Decision::Again { .. } => break (result?, key, attempt),
            }
            attempt.release();
            match self.reserve(&journey).await {
                Ok(next) => {
                    attempt.failed_over();
                    lease = next;
                }
                Err(unavailable) => break (result?.or_ours(&journey, unavailable)?, key, attempt),
            }
        };
        // What the answer gives is known before the client can name it.
        if let Some(place) = lessons {
            attempt.teaches(journey.end().learn(self, &case, limits, &answer, &key, place));
        }
        // 9. Relay, but for what is nobody else's business.
        Ok((answer.behind(veil.as_ref(), limits).await?, attempt))
    }
}

impl<C: Connect> Proxy<C> {
    /// The way of a client that has brought its own key: to where the pool's keys go, once, and
    /// back as it comes. The pool learns nothing of it.
    async fn ask_with(
        &self,
        key: ApiKey,
        case: &Case,
        outbound: &Outbound,
        body: &Replay<Incoming>,
        limits: &Limits,
        log: &mut RequestLog,
    ) -> Result<(Answer, Attempt), ProxyError> {
        let place = self.books.place().await?;
        let sending = body.attempt();
        let mut attempt = Attempt::with_own_key(self, case, key, place, sending.upload());
        // Nobody will send it again, so nothing of it is kept.
        attempt.relaying();
        let sent = self.upstream.send(attempt.authority(), attempt.api_key(), outbound, sending).await;
        let result = Answer::read(sent, &outbound.method, limits).await;
        attempt.learn(&result, None, log);
        Ok((result?, attempt))
    }
}

/// Whether the provider has served the request, or may have: then it counts for its client.
fn may_be_charged(found: &Result<(Answer, Attempt), ProxyError>) -> bool {
    match found {
        Ok((answer, _)) => matches!(answer.verdict, Verdict::Served | Verdict::ServerError),
        Err(ProxyError::Upstream(SendError { progress, .. })) => *progress != Progress::Unsent,
        Err(error) => matches!(error, ProxyError::Unredacted(_)),
    }
}
