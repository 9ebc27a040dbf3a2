//! Fails a session over to another key, if the provider refuses the current key, disconnects or violates the protocol
//! before it has sent a useful message. The client's opening messages are sent again. `speech` also changes the key in
//! this way when another key is reserved for a text.

use tokio::time::timeout;

use super::buffers::ReadBuffer;
use super::handshake::into_upgraded;
use super::session::{PooledSession, Session};
use crate::body::replay::Replay;
use crate::clock;
use crate::policy::replay::{AttemptFacts, Decision, Effect, Progress, ReplayableBody, decide};
use crate::policy::verdict::Verdict;
use crate::policy::websocket_frame::Sender;
use crate::pool::Lease;
use crate::proxy::attempt::SentText;
use crate::proxy::exchange::PoolResponse;
use crate::upstream::Connect;

impl<C: Connect> Session<C> {
    /// Fails over to the next key, if that is safe and may help. Returns whether the session has a new key.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future releases its position in the wait queue, its new key and its new connection. The
    /// former attempt keeps its verdict.
    pub(super) async fn fail_over(&mut self, progress: Progress) -> bool {
        // A client that has sent a close frame would not receive the response to another key.
        if self.client_to_upstream.has_closed {
            return false;
        }
        let has_new_key = self.fail_over_to_next(progress).await;
        self.is_between_keys = false;
        has_new_key
    }

    async fn fail_over_to_next(&mut self, progress: Progress) -> bool {
        let Some((PooledSession { context, .. }, key)) =
            self.pooled.as_mut().zip(self.attempt.key().cloned())
        else {
            return false;
        };
        match progress {
            Progress::Responded(verdict) => self.attempt.record_verdict(verdict, Some(&mut context.retry)),
            Progress::Unsent | Progress::ProxyAuthenticationFailed | Progress::NoResponse => {
                let sent_text =
                    if self.speech.forwarded_characters > 0 { SentText::Billable } else { SentText::None };
                self.attempt.abandon(progress, sent_text);
            }
        }
        self.is_between_keys = true;
        let limits = &context.config.limits;
        let failover_started_at = *self.failover_started_at.get_or_insert_with(clock::instant);
        let request_facts = context.retry.retry_facts(progress, &context.body, &key, limits);
        let facts = AttemptFacts {
            body: if self.opening_messages.is_some() {
                ReplayableBody::Buffered
            } else {
                ReplayableBody::Unavailable
            },
            // A client may connect long before it sends text, so the retry timeout starts at the first
            // refusal.
            is_past_deadline: clock::elapsed_since(failover_started_at) >= limits.retry_timeout,
            // The provider may have generated and charged speech for the text that was sent.
            effect: if self.speech.forwarded_characters > 0 { Effect::Some } else { Effect::None },
            ..request_facts
        };
        match decide(&facts) {
            Decision::NextKey => context.retry.exclude(&key),
            Decision::RetryAfter { pause } if self.proxy.retry_budget.try_take() => {
                context.retry.wait_before_retry(pause).await
            }
            Decision::Relay | Decision::Fail | Decision::RetryAfter { .. } => return false,
        }
        if let (Progress::Responded(Verdict::Concurrency { .. }), group @ Some(_)) =
            (progress, context.meta.speech_group)
        {
            // The next key is reserved together with a concurrency slot, which is released if no text
            // follows.
            context.retry.set_speech_requirements(context.retry.key_request.estimate.unwrap_or(0), group);
            self.speech.last_activity.get_or_insert_with(clock::instant);
        }
        // The session leaves the wait queue before it enters it again. The next lease also covers the held
        // message.
        let was_reserving = self.speech.reservation.take().is_some();
        self.attempt.release_key();
        let has_new_key = match self.proxy.reserve(&mut context.retry).await {
            Ok(lease) => self.change_key(lease).await,
            Err(_) => false,
        };
        if was_reserving {
            self.forward_held_message();
        }
        has_new_key
    }

    /// Continues the session with the key of `lease`. Returns whether the provider accepted the handshake. If it did
    /// not, the session keeps its current upstream connection.
    pub(super) async fn change_key(&mut self, lease: Lease) -> bool {
        self.is_between_keys = true;
        let has_changed = self.connect_with(lease).await;
        self.is_between_keys = false;
        has_changed
    }

    async fn connect_with(&mut self, lease: Lease) -> bool {
        let Self { pooled: Some(PooledSession { context, .. }), proxy, log, .. } = self else {
            return false;
        };
        // The retry timeout of the new handshake must not include the time before the handshake, because the
        // client may have been silent for minutes. The caller has checked the deadline of the failover.
        context.body = Replay::empty();
        let retry_timeout = context.config.limits.retry_timeout;
        // The future is boxed, so that the many sessions that never fail over do not reserve its memory.
        let connect = Box::pin(async {
            let sent = proxy.send_with_pool(context, lease, &mut log.summary).await.ok()?;
            let PoolResponse { response, attempt, .. } = sent;
            if !response.is_switched() {
                return None;
            }
            let (_, upgraded) = into_upgraded(*response).ok()?;
            Some((attempt, upgraded))
        });
        let Ok(Some((attempt, upgraded))) = timeout(retry_timeout, connect).await else { return false };
        self.log.summary.retry_reasons.push(self.attempt.record_failover());
        self.attempt = attempt;
        self.attempt.set_text_credits(self.text_price(self.speech.forwarded_characters));
        self.upstream = upgraded.stream;
        self.is_upload_closed = false;
        self.is_queued = false;
        self.upstream_to_client.reset();
        self.from_upstream = ReadBuffer::new(Sender::Server, self.dialect.is_inspected(), upgraded.read_buf);
        // The opening messages include the bytes that are still in the send buffer.
        self.to_upstream.bytes.clear();
        self.to_upstream.bytes.extend_from_slice(self.opening_messages.as_deref().unwrap_or_default());
        true
    }
}
