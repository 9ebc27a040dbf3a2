//! The billable text of a session: it needs a concurrency slot while speech is generated, credits
//! for its characters, and the account that owns the resources it names.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use super::session::{PooledSession, Session};
use crate::clock;
use crate::elevenlabs::socket::{Dialect, SpokenText, audio_bytes_per_second, brings_token};
use crate::policy::replay::Progress;
use crate::policy::select::Unavailable;
use crate::pool::Reserved;
use crate::telemetry::announce;
use crate::upstream::Connect;

/// The result of a reservation: a lease, or why there is none.
pub(super) type Given = Result<Reserved, Unavailable>;

/// The text and audio of a session so far, and the reservation that it waits for.
pub(super) struct SpeechPermit {
    /// Characters that were forwarded.
    characters: u64,
    /// Characters that were forwarded or wait for a key.
    asked: u64,
    /// Bytes per second of the audio to transcribe.
    audio_bytes_per_second: u64,
    is_spoken: bool,
    /// When text was last sent, or data last received from the provider.
    sounded_at: Option<Instant>,
    /// The reservation for a message that is held until it completes.
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

    /// Cancels the reservation; returns whether there was one.
    pub(super) fn stop_waiting(&mut self) -> bool {
        self.waiting.take().is_some()
    }

    pub(super) fn poll_given(&mut self, cx: &mut Context<'_>) -> Poll<Given> {
        let Some(waiting) = &mut self.waiting else { return Poll::Pending };
        let given = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(given)
    }

    /// Records that a concurrency slot is taken for text that may follow.
    pub(super) fn claimed(&mut self, now: Instant) {
        self.sounded_at.get_or_insert(now);
    }

    /// Records data from the provider.
    pub(super) fn sounded(&mut self, now: Instant) {
        if self.sounded_at.is_some() {
            self.sounded_at = Some(now);
        }
    }

    /// When the session counts as idle, if the provider sends nothing more.
    pub(super) fn quiet_at(&self, quiet_max: Duration) -> Option<Instant> {
        self.sounded_at.map(|at| at + quiet_max)
    }

    /// Characters of text that were forwarded.
    pub(super) fn characters(&self) -> u64 {
        self.characters
    }

    /// The duration of that many bytes of audio.
    pub(super) fn length_of(&self, audio_bytes: u64) -> Duration {
        Duration::from_millis(audio_bytes.saturating_mul(1_000) / self.audio_bytes_per_second.max(1))
    }
}

impl<C: Connect> Session<C> {
    /// Whether the client's credit quota covers all text so far, with the message that waits. Its
    /// price is reserved then, so that parallel sessions cannot each spend the same rest of the
    /// quota.
    pub(super) fn may_say(&self, said: SpokenText) -> bool {
        let Some(PooledSession { request: context, .. }) =
            self.pooled.as_ref().filter(|_| said.characters > 0)
        else {
            return true;
        };
        let total = self.price(self.speech.asked.saturating_add(said.characters));
        context.meta.permits.client().reserve(total, clock::now()).is_ok()
    }

    /// Whether the client's credit quota has anything left. A quota of requests does not end a
    /// session, which was counted when it began.
    pub(super) fn may_spend(&mut self) -> bool {
        self.pooled.is_none() || self.attempt.may_go_on()
    }

    /// Processes a message of the client. Text to speak needs a concurrency slot and credits, and a
    /// message may name a resource of another account; all other messages are forwarded.
    pub(super) async fn said(&mut self, SpokenText { characters, .. }: SpokenText) {
        // An earlier failover has a deadline of its own.
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
        // A served session stays with its account.
        if !is_begun && self.speech.is_spoken {
            let named = context.retry.add_names(self.client_to_upstream.said(), &self.proxy, &key);
            if named == Ok(false) && characters == 0 {
                return self.find_key_again().await;
            }
            // When the resources belong to two accounts, no key is right: the provider reports the
            // missing one.
        }
        if characters == 0 {
            return self.let_go();
        }
        self.speech.sounded_at = Some(clock::instant());
        if self.attempt.has_place() {
            return self.let_go();
        }
        if !is_begun {
            // From here on, every key for this session needs these credits and a concurrency slot.
            context.retry.set_speech(credits, context.meta.speech_lane);
        }
        let due = credits.saturating_sub(self.attempt.credits());
        let key_request = context.retry.speech_request(due, context.meta.speech_lane, &key, is_begun);
        let (pool, roster) = (Arc::clone(&self.proxy.pool), Arc::clone(context.retry.roster()));
        self.speech.waiting = Some(Box::pin(async move { pool.reserve(&roster, &key_request).await }));
    }

    /// Continues with the reserved key, or with the current one if there is none: then the provider
    /// decides.
    pub(super) async fn given(&mut self, given: Given) {
        if let Ok(Reserved { lease, news }) = given {
            announce(&news);
            let is_same = self.attempt.key().is_some_and(|key| Arc::ptr_eq(key, lease.key()));
            if is_same {
                self.attempt.renew(lease);
            } else if !self.upstream_to_client.is_open() {
                // Nothing was sent that the former key is charged for.
                self.attempt.abandon_unanswered(Progress::Unsent, false);
                self.change_key(lease).await;
            }
        }
        self.let_go();
    }

    /// Reserves a key that may serve the named resources.
    async fn find_key_again(&mut self) {
        let Some(PooledSession { request: context, .. }) = &mut self.pooled else { return self.let_go() };
        if let Ok(lease) = self.proxy.reserve(&mut context.retry).await {
            self.attempt.abandon_unanswered(Progress::Unsent, false);
            self.change_key(lease).await;
        }
        self.let_go();
    }

    /// Forwards the message that is held.
    pub(super) fn let_go(&mut self) {
        let from = self.to_upstream.bytes.len();
        self.client_to_upstream.release(&mut self.to_upstream.bytes);
        self.speech.characters = self.speech.asked;
        self.attempt.said(self.price(self.speech.characters));
        self.keep_opening(from);
        if self.upstream_to_client.is_served() {
            // The refusal was about one of several contexts: the session continues.
            self.refusal = None;
            self.book();
        }
    }

    /// Charges the text so far by its characters: no message of the provider reports the cost.
    pub(super) fn book(&mut self) {
        if self.speech.is_spoken && self.speech.characters > 0 {
            let credits = self.price(self.speech.characters);
            self.attempt.spoken(self.speech.characters, credits);
        }
    }

    /// The maximum cost of that many characters.
    pub(super) fn price(&self, characters: u64) -> u64 {
        let model = self.attempt.model().or(self.dialect.default_model()).unwrap_or_default();
        self.proxy.pool.models().credits(model, characters)
    }
}
