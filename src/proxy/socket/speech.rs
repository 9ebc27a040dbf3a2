//! What a session says that is charged: a place among those that speak while it is spoken, credits for
//! its characters, and the account that has what it names.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::session::{PooledSession, Session};
use crate::clock;
use crate::policy::replay::Progress;
use crate::policy::select::Unavailable;
use crate::policy::socket::{Dialect, SpokenText, audio_bytes_per_second, brings_token};
use crate::pool::Reserved;
use crate::telemetry::announce;
use crate::upstream::Connect;

/// A key that was waited for, or why there is none.
pub(super) type Given = Result<Reserved, Unavailable>;

/// What was said so far.
pub(super) struct SpeechPermit {
    /// Characters that went on.
    characters: u64,
    /// The same with those that wait for a key.
    asked: u64,
    /// Bytes of a second of the sound that is to be written down.
    audio_bytes_per_second: u64,
    is_spoken: bool,
    /// When text was last sent, or sound last came.
    sounded_at: Option<Instant>,
    /// A key is waited for, before what was said goes on.
    waiting: Option<Pin<Box<dyn Future<Output = Given> + Send>>>,
}

impl SpeechPermit {
    pub(super) fn new(dialect: Dialect, audio_format: Option<&str>) -> Self {
        Self {
            characters: 0,
            asked: 0,
            audio_bytes_per_second: audio_bytes_per_second(audio_format),
            is_spoken: dialect.is_spoken(),
            sounded_at: None,
            waiting: None,
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Waits no more; whether it did.
    pub(super) fn stop_waiting(&mut self) -> bool {
        self.waiting.take().is_some()
    }

    pub(super) fn poll_given(&mut self, cx: &mut Context<'_>) -> Poll<Given> {
        let Some(waiting) = &mut self.waiting else { return Poll::Pending };
        let given = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(given)
    }

    /// A place is taken for what may be said soon.
    pub(super) fn claimed(&mut self, now: Instant) {
        self.sounded_at.get_or_insert(now);
    }

    /// Something came from the provider.
    pub(super) fn sounded(&mut self, now: Instant) {
        if self.sounded_at.is_some() {
            self.sounded_at = Some(now);
        }
    }

    /// When it counts as quiet, if nothing more is heard.
    pub(super) fn quiet_at(&self, quiet_max: Duration) -> Option<Instant> {
        self.sounded_at.map(|at| at + quiet_max)
    }

    /// Characters of text so far.
    pub(super) fn characters(&self) -> u64 {
        self.characters
    }

    /// How long that much sound is.
    pub(super) fn length_of(&self, audio_bytes: u64) -> Duration {
        Duration::from_millis(audio_bytes.saturating_mul(1_000) / self.audio_bytes_per_second.max(1))
    }
}

impl<C: Connect> Session<C> {
    /// Whether the client's quota of credits has room for the message that waits, with all that was said before
    /// it. That much is reserved then: sessions side by side cannot each spend what is left.
    pub(super) fn may_say(&self, said: SpokenText) -> bool {
        let Some(PooledSession { request: context, .. }) =
            self.pooled.as_ref().filter(|_| said.characters > 0)
        else {
            return true;
        };
        let total = self.price(self.speech.asked.saturating_add(said.characters));
        context.meta.permits.client().reserve(total, clock::now()).is_ok()
    }

    /// Whether the client's quota of credits leaves room for anything. A quota of requests always does:
    /// the session was counted when it began.
    pub(super) fn may_spend(&mut self) -> bool {
        self.pooled.is_none() || self.attempt.may_go_on()
    }

    /// A message of the client is shown. What is to be spoken needs a place and credits, and what it
    /// names may bind it to another account; everything else goes on.
    pub(super) async fn said(&mut self, SpokenText { characters, .. }: SpokenText) {
        // What was refused before has its own span.
        self.moving_since = None;
        self.speech.asked += characters;
        let is_begun = self.upstream_to_client.is_open();
        if !is_begun && brings_token(self.client_to_upstream.said()) {
            self.upstream_to_client.judge_token();
        }
        let credits = if characters > 0 { self.price(self.speech.asked) } else { 0 };
        let Some((PooledSession { request: context, .. }, key)) =
            self.pooled.as_mut().zip(self.attempt.key().cloned())
        else {
            return self.let_go();
        };
        // Once it is served, it stays where it is.
        if !is_begun && self.speech.is_spoken {
            let named = context.retry.add_names(self.client_to_upstream.said(), &self.proxy, &key);
            if named == Ok(false) && characters == 0 {
                return self.find_key_again().await;
            }
            // What two accounts own is no key's matter: the provider says which one it does not have.
        }
        if characters == 0 {
            return self.let_go();
        }
        self.speech.sounded_at = Some(clock::instant());
        if self.attempt.has_place() {
            return self.let_go();
        }
        if !is_begun {
            // From here on, every key that is asked needs so much and a place.
            context.retry.set_speech(credits, context.meta.speech_lane);
        }
        let due = credits.saturating_sub(self.attempt.credits());
        let key_request = context.retry.speech_request(due, context.meta.speech_lane, &key, is_begun);
        let (pool, roster) = (Arc::clone(&self.proxy.pool), Arc::clone(context.retry.roster()));
        self.speech.waiting = Some(Box::pin(async move { pool.reserve(&roster, &key_request).await }));
    }

    /// A key was given for what was said, or there is none: then the provider has the last word.
    pub(super) async fn given(&mut self, given: Given) {
        if let Ok(Reserved { lease, news }) = given {
            announce(&news);
            let is_same = self.attempt.key().is_some_and(|key| Arc::ptr_eq(key, lease.key()));
            if is_same {
                self.attempt.renew(lease);
            } else if !self.upstream_to_client.is_open() {
                // Nothing was asked of the one before.
                self.attempt.abandon_unanswered(Progress::Unsent, false);
                self.change_key(lease).await;
            }
        }
        self.let_go();
    }

    /// Looks for a key that may serve what is named.
    async fn find_key_again(&mut self) {
        let Some(PooledSession { request: context, .. }) = &mut self.pooled else { return self.let_go() };
        if let Ok(lease) = self.proxy.reserve(&mut context.retry).await {
            self.attempt.abandon_unanswered(Progress::Unsent, false);
            self.change_key(lease).await;
        }
        self.let_go();
    }

    /// The message that was shown goes on.
    pub(super) fn let_go(&mut self) {
        let from = self.to_upstream.bytes.len();
        self.client_to_upstream.release(&mut self.to_upstream.bytes);
        self.speech.characters = self.speech.asked;
        self.attempt.said(self.price(self.speech.characters));
        self.keep_opening(from);
        if self.upstream_to_client.is_served() {
            // What was refused was one of several contexts: the session goes on.
            self.refusal = None;
            self.book();
        }
    }

    /// Books what was spoken so far, by its characters: no message of the provider says what it costs.
    pub(super) fn book(&mut self) {
        if self.speech.is_spoken && self.speech.characters > 0 {
            let credits = self.price(self.speech.characters);
            self.attempt.spoken(self.speech.characters, credits);
        }
    }

    /// What that many characters cost, at the most.
    pub(super) fn price(&self, characters: u64) -> u64 {
        let model = self.attempt.model().or(self.dialect.default_model()).unwrap_or_default();
        self.proxy.pool.models().credits(model, characters)
    }
}
