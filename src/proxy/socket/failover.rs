//! Failover of a session to another key: the provider has refused the current key and has sent no useful
//! message yet. The client's opening messages are sent again.

use tokio::time::timeout;

use super::buffers::ReadBuffer;
use super::handshake::switched;
use super::session::{PooledSession, Session};
use crate::body::replay::Replay;
use crate::clock;
use crate::policy::frame::Sender;
use crate::policy::replay::{Decision, Effect, Facts, Progress, Replayable, decide};
use crate::policy::verdict::Verdict;
use crate::pool::Lease;
use crate::upstream::Connect;

impl<C: Connect> Session<C> {
    /// Moves the session to the next key, if that is safe and may help; returns whether it moved.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future while it waits releases its position in the wait queue, its key and its
    /// connection; the attempt that was left keeps its verdict.
    pub(super) async fn fail_over(&mut self, progress: Progress) -> bool {
        // The client has closed, so it would not receive the reply to another key.
        if self.client_to_upstream.has_closed() {
            return false;
        }
        let has_moved = self.fail_over_to_next(progress).await;
        self.is_between_keys = false;
        has_moved
    }

    async fn fail_over_to_next(&mut self, progress: Progress) -> bool {
        let Some((PooledSession { request: context, .. }, key)) =
            self.pooled.as_mut().zip(self.attempt.key().cloned())
        else {
            return false;
        };
        match progress {
            Progress::Answered(verdict) => self.attempt.record_verdict(verdict, Some(&mut context.retry)),
            Progress::Unsent | Progress::Unanswered => {
                self.attempt.abandon_unanswered(progress, self.speech.characters() > 0);
            }
        }
        self.is_between_keys = true;
        let limits = &context.config.limits;
        let since = *self.failover_since.get_or_insert_with(clock::instant);
        let facts = context.retry.facts(progress, &context.body, &key, limits);
        let facts = Facts {
            body: if self.opening.is_some() { Replayable::Whole } else { Replayable::Lost },
            // A client may connect long before it sends text, so the timeout begins at the first refusal.
            is_late: clock::since(since) >= limits.retry_timeout,
            // The provider may have generated and charged speech for the text that was sent.
            effect: if self.speech.characters() > 0 { Effect::Some } else { Effect::None },
            ..facts
        };
        match decide(&facts) {
            Decision::NextKey => context.retry.exclude(&key),
            Decision::Again { pause } if self.proxy.retry_budget.take() => context.retry.pause(pause).await,
            Decision::Relay | Decision::Fail | Decision::Again { .. } => return false,
        }
        if let (Progress::Answered(Verdict::Concurrency { .. }), group @ Some(_)) =
            (progress, context.meta.speech_group)
        {
            // The next key is reserved together with a concurrency slot, which is released if no text
            // follows.
            context.retry.set_speech(context.retry.key_request().estimate.unwrap_or(0), group);
            self.speech.hold_slot(clock::instant());
        }
        // Leaves the wait queue before entering it again; the next lease also covers the waiting
        // message.
        let was_reserving = self.speech.cancel_reservation();
        self.attempt.release();
        let has_moved = match self.proxy.reserve(&mut context.retry).await {
            Ok(lease) => self.change_key(lease).await,
            Err(_) => false,
        };
        if was_reserving {
            self.forward_held();
        }
        has_moved
    }

    /// Continues the session with another key; returns whether that worked. Else the session keeps
    /// its current upstream connection.
    pub(super) async fn change_key(&mut self, lease: Lease) -> bool {
        self.is_between_keys = true;
        let has_changed = self.connect_with(lease).await;
        self.is_between_keys = false;
        has_changed
    }

    async fn connect_with(&mut self, lease: Lease) -> bool {
        let Self { pooled: Some(PooledSession { request: context, .. }), proxy, log, .. } = self else {
            return false;
        };
        // The caller has checked the deadline, as a client may have been silent for minutes.
        context.body = Replay::empty();
        let replay_max = context.config.limits.retry_timeout;
        // Boxed, because few sessions fail over: other sessions do not need the memory of this future.
        let connecting = Box::pin(async {
            let (response, _, attempt) = proxy.send_with_pool(context, lease, &mut log.summary).await.ok()?;
            if !response.is_switched() {
                return None;
            }
            let (_, switched) = switched(*response).ok()?;
            Some((attempt, switched))
        });
        let Ok(Some((attempt, switched))) = timeout(replay_max, connecting).await else { return false };
        self.log.summary.record_retry(self.attempt.failed_over());
        self.attempt = attempt;
        self.attempt.set_text_credits(self.price(self.speech.characters()));
        self.upstream = switched.stream;
        self.is_upload_closed = false;
        self.is_queued = false;
        self.upstream_to_client.restart();
        self.from_upstream = ReadBuffer::new(Sender::Server, self.dialect.is_read(), switched.read_buf);
        // Bytes in the send buffer are part of the opening messages.
        self.to_upstream.bytes.clear();
        self.to_upstream.bytes.extend_from_slice(self.opening.as_deref().unwrap_or_default());
        true
    }
}
