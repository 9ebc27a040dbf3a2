//! What happens on a session, one event after another. Everything that waits is in one place,
//! `poll_event`: both directions, a place among those that speak, and the bounds of time.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;

use super::Bounds;
use super::down::{Downwards, Told};
use super::ending::Ending;
use super::leg::{Leg, READ_BYTES};
use super::speaking::{Given, Speaking};
use super::up::Upwards;
use crate::clock;
use crate::policy::classify::Verdict;
use crate::policy::replay::Progress;
use crate::policy::socket::{Dialect, Heard, Said, conversation_id, say};
use crate::proxy::attempt::Attempt;
use crate::proxy::books::Place;
use crate::proxy::exchange::Errand;
use crate::proxy::journal::RequestLog;
use crate::proxy::{Proxy, Terms};
use crate::secret::Redactor;
use crate::telemetry::SocketOpen;
use crate::upstream::{Connect, Switched, Wire};

/// What a session begins with.
pub(super) struct Start<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) terms: Arc<Terms>,
    pub(super) dialect: Dialect,
    /// Whether the client brought a token of the provider's own.
    pub(super) has_token: bool,
    pub(super) audio_format: Option<String>,
    pub(super) redactor: Option<Arc<Redactor>>,
    pub(super) pooled: Option<Pooled>,
    pub(super) attempt: Box<Attempt>,
    pub(super) upstream: Switched,
}

/// What a session of the pool has beyond that: another key can take its place.
pub(super) struct Pooled {
    pub(super) errand: Errand,
    /// A place for what becomes known of whose things are.
    pub(super) lessons: Option<Place>,
}

/// A session. Dropping it closes both ends, releases its key, and writes down what became of it.
pub(super) struct Session<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) terms: Arc<Terms>,
    pub(super) dialect: Dialect,
    pub(super) pooled: Option<Pooled>,
    pub(super) attempt: Box<Attempt>,
    pub(super) log: RequestLog,
    pub(super) upstream: Wire,
    pub(super) up: Leg,
    pub(super) down: Leg,
    pub(super) upwards: Upwards,
    pub(super) downwards: Downwards,
    /// What the client has said so far, while it may have to be said again; `None` when it was too much
    /// or need not.
    pub(super) opening: Option<Vec<u8>>,
    pub(super) speaking: Speaking,
    /// Since when it looks for another key.
    pub(super) moving_since: Option<Instant>,
    /// Why it was refused, when the client has heard that.
    pub(super) refusal: Option<Verdict>,
    /// The provider's name of it, when it is a conversation with an agent.
    pub(super) conversation: Option<Arc<str>>,
    /// The provider takes no more; what it says may tell why.
    pub(super) is_deaf: bool,
    began: Instant,
    moved_at: Instant,
    timer: Option<Pin<Box<Sleep>>>,
    _open: SocketOpen,
}

/// What happens next.
pub(super) enum Event {
    /// The client has said a message that waits for leave, and so much is in it.
    Said(Said),
    /// A key that was waited for.
    Given(Given),
    /// The provider has said something that matters.
    Told(Told),
    /// Nothing was said for a while by a socket that speaks.
    Quiet,
    /// It is over.
    Over(Ending),
}

impl<C> Session<C> {
    pub(super) fn opened(start: Start<C>, log: RequestLog) -> Self {
        let Start { proxy, terms, dialect, has_token, audio_format, redactor, pooled, attempt, upstream } =
            start;
        let Bounds { frame_bytes_max, .. } = terms.limits.sockets;
        let now = clock::instant();
        Self {
            upwards: Upwards::new(dialect, frame_bytes_max),
            downwards: Downwards::new(dialect, has_token, redactor),
            opening: (pooled.is_some() && dialect != Dialect::Foreign).then(Vec::new),
            speaking: Speaking::new(dialect, audio_format.as_deref()),
            _open: proxy.meters.socket_opened(dialect),
            upstream: upstream.stream,
            up: Leg::default(),
            // The provider may have begun to speak with its 101.
            down: Leg::having_read(upstream.heard),
            moving_since: None,
            refusal: None,
            conversation: None,
            is_deaf: false,
            began: now,
            moved_at: now,
            timer: None,
            proxy,
            terms,
            dialect,
            pooled,
            attempt,
            log,
        }
    }
}

impl<C: Connect> Session<C> {
    /// Speaks with `client`, who has already sent `early`, to the end.
    pub(super) async fn run<S>(mut self: Box<Self>, mut client: S, early: Bytes)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.up.inbox.extend_from_slice(&early);
        // Also when it is empty, it holds the buffer that the handshake was read into.
        drop(early);
        if self.dialect == Dialect::Foreign {
            self.served();
        }
        let mut cut = pin!(self.proxy.cut.clone().cancelled_owned());
        let ending = loop {
            let next = async {
                let event = poll_fn(|cx| self.poll_event(cx, &mut client)).await;
                self.meet(event).await
            };
            tokio::select! {
                biased;
                // Whatever it waits for.
                () = cut.as_mut() => break Ending::Cut,
                ending = next => if let Some(ending) = ending { break ending },
            }
        };
        self.end(ending, client).await;
    }

    /// Does what an event asks for; how the session ends, when it does.
    async fn meet(&mut self, event: Event) -> Option<Ending> {
        match event {
            Event::Said(said) if self.may_say(said) => self.said(said).await,
            Event::Said(_) => return Some(Ending::Spent),
            Event::Given(given) => self.given(given).await,
            Event::Told(Told::Message(Heard::Aside)) => {}
            Event::Told(Told::Message(Heard::Useful)) => self.served(),
            Event::Told(Told::Message(Heard::Refused(verdict)) | Told::Close(Some(verdict))) => {
                self.refused(verdict).await;
            }
            Event::Told(Told::Close(None)) => self.downwards.open(&mut self.down.outbox),
            Event::Quiet => self.attempt.rest(),
            // Nothing useful was heard of this key: another may be asked, if nothing is lost by it.
            Event::Over(Ending::UpstreamBroke)
                if !self.downwards.is_open() && self.move_on(Progress::Unanswered).await => {}
            Event::Over(ending) => return Some(ending),
        }
        None
    }

    /// The session is served: the client hears what was held, and what it said need not be kept.
    fn served(&mut self) {
        let first = self.downwards.first().to_vec();
        self.opening = None;
        if self.dialect == Dialect::Agent {
            self.conversation = conversation_id(&first).map(Into::into);
        }
        self.downwards.serve(&mut self.down.outbox);
        self.refusal = None;
        let journey = self.pooled.as_mut().map(|pooled| &mut pooled.errand.journey);
        self.attempt.heard(Verdict::Served, journey);
        if let (Some(Pooled { errand, lessons }), Some(key)) = (&mut self.pooled, self.attempt.key()) {
            let changes = errand.journey.settle(&self.proxy, key, &first);
            if let Some(place) = lessons.take() {
                place.teach(changes);
            }
        }
        self.book();
    }

    /// It is refused. Before anything useful was said, the next key may serve; else the client hears
    /// it, and the pool learns.
    async fn refused(&mut self, verdict: Verdict) {
        if !self.downwards.is_open() && self.move_on(Progress::Answered(verdict)).await {
            return;
        }
        // A message and the close behind it say the same.
        if self.refusal.is_none() {
            if self.downwards.is_open() {
                let journey = self.pooled.as_mut().map(|pooled| &mut pooled.errand.journey);
                self.attempt.heard(verdict, journey);
            }
            self.refusal = Some(verdict);
        }
        self.downwards.open(&mut self.down.outbox);
    }

    fn poll_event<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<Event>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        if let Poll::Ready(given) = self.speaking.poll_given(cx) {
            return Poll::Ready(Event::Given(given));
        }
        if let Poll::Ready(event) = self.poll_down(cx, client) {
            return Poll::Ready(event);
        }
        if let Poll::Ready(event) = self.poll_up(cx, client) {
            return Poll::Ready(event);
        }
        self.poll_timer(cx)
    }

    /// From the client to the provider.
    fn poll_up<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<Event>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            if self.is_deaf {
                return Poll::Pending;
            }
            if self.speaking.is_waiting() {
                // Who has left needs no key. So much is read ahead, and no more.
                if self.up.inbox.len() >= READ_BYTES {
                    return Poll::Pending;
                }
                if !ready!(self.poll_client(cx, client)) {
                    return Poll::Ready(Event::Over(Ending::ClientLeft));
                }
                continue;
            }
            if ready!(self.up.poll_send(cx, &mut self.upstream)).is_err() {
                self.is_deaf = true;
                return Poll::Pending;
            }
            if self.upwards.take(&mut self.up.inbox, &mut self.up.outbox) {
                self.keep_opening(0);
                return Poll::Ready(Event::Said(say(self.dialect, self.upwards.said())));
            }
            self.keep_opening(0);
            if !self.up.outbox.is_empty() {
                continue;
            }
            if !ready!(self.poll_client(cx, client)) {
                return Poll::Ready(Event::Over(Ending::ClientLeft));
            }
        }
    }

    /// Reads what the client says; whether it is still there.
    fn poll_client<S: AsyncRead + Unpin>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<bool> {
        let is_there = matches!(ready!(self.up.poll_fetch(cx, client)), Ok(1..));
        if is_there {
            self.moved_at = clock::instant();
        }
        Poll::Ready(is_there)
    }

    /// Keeps what goes on behind `from`, while it may have to be said again.
    pub(super) fn keep_opening(&mut self, from: usize) {
        let more = self.up.outbox.get(from..).unwrap_or_default();
        let max = self.terms.limits.sockets.opening_bytes_max;
        self.opening = self.opening.take().filter(|kept| kept.len() + more.len() <= max);
        if let Some(kept) = &mut self.opening {
            kept.extend_from_slice(more);
        }
    }

    /// From the provider to the client.
    fn poll_down<S>(&mut self, cx: &mut Context<'_>, client: &mut S) -> Poll<Event>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            if ready!(self.down.poll_send(cx, client)).is_err() {
                return Poll::Ready(Event::Over(Ending::ClientLeft));
            }
            if let Some(told) = self.downwards.take(&mut self.down.inbox, &mut self.down.outbox) {
                return Poll::Ready(Event::Told(told));
            }
            if !self.down.outbox.is_empty() {
                continue;
            }
            match ready!(self.down.poll_fetch(cx, &mut self.upstream)) {
                Ok(1..) => {
                    self.moved_at = clock::instant();
                    self.speaking.sounded(self.moved_at);
                }
                Ok(0) | Err(_) if self.downwards.has_closed() => {
                    return Poll::Ready(Event::Over(Ending::Closed));
                }
                Ok(0) | Err(_) => return Poll::Ready(Event::Over(Ending::UpstreamBroke)),
            }
        }
    }

    /// One timer for all bounds, set anew when it rings and not when something moves.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let Bounds { idle_max, lifetime_max, quiet_max, .. } = self.terms.limits.sockets;
        loop {
            let now = clock::instant();
            let idle_at = (!idle_max.is_zero()).then(|| self.moved_at + idle_max);
            let old_at = (!lifetime_max.is_zero()).then(|| self.began + lifetime_max);
            let quiet_at = self.attempt.has_place().then(|| self.speaking.quiet_at(quiet_max)).flatten();
            for (at, event) in [
                (quiet_at, Event::Quiet),
                (idle_at, Event::Over(Ending::Idle)),
                (old_at, Event::Over(Ending::Old)),
            ] {
                if at.is_some_and(|at| at <= now) {
                    return Poll::Ready(event);
                }
            }
            let Some(next) = [quiet_at, idle_at, old_at].into_iter().flatten().min() else {
                return Poll::Pending;
            };
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next.into())));
            // A later end is found out when it rings; an earlier one must be set.
            if timer.is_elapsed() || timer.deadline() > next.into() {
                timer.as_mut().reset(next.into());
            }
            ready!(timer.as_mut().poll(cx));
        }
    }
}
