//! The event loop of a socket session: it handles one event after another. The events come from
//! `polling`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::time::Sleep;

use super::buffers::{self, ReadBuffer, SendBuffer};
use super::client_to_upstream::ClientToUpstream;
use super::poll_order::PollOrder;
use super::session_end::SessionEnd;
use super::speech_permit::{ReservationResult, SpeechPermit};
use super::upstream_to_client::{UpstreamEvent, UpstreamToClient};
use crate::body::budget::BufferShare;
use crate::clock;
use crate::elevenlabs::socket::{Dialect, SpokenText};
use crate::policy::client_quota::Measure;
use crate::policy::frame::Sender;
use crate::policy::verdict::Verdict;
use crate::proxy::access_log::AccessLog;
use crate::proxy::attempt::Attempt;
use crate::proxy::config::RuntimeConfig;
use crate::proxy::request_context::RequestContext;
use crate::proxy::socket_limits::SocketLimits;
use crate::proxy::state::Proxy;
use crate::proxy::usage::UsagePermit;
use crate::secret::Redactor;
use crate::telemetry::SocketOpen;
use crate::upstream::{Switched, Wire};

/// The data for the start of a session.
pub(super) struct SessionStart<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    /// Whether the client sent one of the provider's own tokens.
    pub(super) has_token: bool,
    pub(super) audio_format: Option<String>,
    pub(super) redactor: Option<Arc<Redactor>>,
    pub(super) pooled: Option<PooledSession>,
    pub(super) attempt: Box<Attempt>,
    pub(super) upstream: Switched,
}

/// The data of a session with a key of the pool, which can fail over to another key.
pub(super) struct PooledSession {
    pub(super) request: RequestContext,
    /// The permit for recording the ownership of resources.
    pub(super) ownership_permit: Option<UsagePermit>,
}

/// A running session. Dropping it closes both connections, releases its key, and writes its usage
/// record.
pub(in crate::proxy) struct Session<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    pub(super) pooled: Option<PooledSession>,
    pub(super) attempt: Box<Attempt>,
    pub(super) log: AccessLog,
    pub(super) upstream: Wire,
    pub(super) from_client: ReadBuffer,
    pub(super) to_upstream: SendBuffer,
    pub(super) from_upstream: ReadBuffer,
    pub(super) to_client: SendBuffer,
    pub(super) client_to_upstream: ClientToUpstream,
    pub(super) upstream_to_client: UpstreamToClient,
    /// The client's messages so far, for a failover; `None` when they were too long or the session
    /// cannot fail over any more.
    pub(super) opening: Option<Vec<u8>>,
    pub(super) speech: SpeechPermit,
    /// When the current failover began.
    pub(super) failover_since: Option<Instant>,
    /// Whether the attempt has ended and the next one has not begun.
    pub(super) is_between_keys: bool,
    /// The refusal that was forwarded to the client.
    pub(super) refusal: Option<Verdict>,
    /// The provider's conversation ID, when it is a conversation with an agent.
    pub(super) conversation: Option<Arc<str>>,
    /// Whether the provider accepts no more bytes; its last messages may still explain why.
    pub(super) is_upload_closed: bool,
    /// Whether the provider has reported that the client waits for a busy agent.
    pub(super) is_queued: bool,
    pub(super) poll_order: PollOrder,
    pub(super) began: Instant,
    pub(super) active_at: Instant,
    /// When both sides had sent a close frame.
    pub(super) closed_at: Option<Instant>,
    /// When the client's credit quota is checked next.
    pub(super) quota_check_at: Option<Instant>,
    pub(super) timer: Option<Pin<Box<Sleep>>>,
    /// The share of the buffer budget for all its buffers.
    pub(super) share: BufferShare,
    _open: SocketOpen,
}

/// The next event of a session.
pub(super) enum SessionEvent {
    /// The client has sent a message that is held until its text is paid for; with the size of its
    /// content.
    HeldMessage(SpokenText),
    /// The reservation that was waited for has completed.
    Reserved(ReservationResult),
    /// The provider has sent a message or a close that changes the session's state.
    Upstream(UpstreamEvent),
    /// A text-to-speech socket has been silent for its idle timeout.
    SpeechIdle,
    /// The session ends.
    Over(SessionEnd),
}

/// Whether the client's credit quota may end such a session while it runs. Where text is charged,
/// each text is checked before it is forwarded instead.
fn quota_checks(dialect: Dialect, pooled: Option<&PooledSession>) -> bool {
    let has_quota = pooled.is_some_and(|PooledSession { request: context, .. }| {
        let quota = context.retry.rules().quota;
        quota.is_some_and(|quota| quota.measure == Measure::Credits)
    });
    has_quota && dialect.is_read() && !dialect.is_spoken()
}

impl<C> Session<C> {
    pub(super) fn opened(start: SessionStart<C>, log: AccessLog) -> Self {
        let SessionStart {
            proxy,
            config,
            dialect,
            has_token,
            audio_format,
            redactor,
            pooled,
            attempt,
            upstream,
        } = start;
        let limits = config.limits.websocket;
        let now = clock::instant();
        Self {
            client_to_upstream: ClientToUpstream::new(
                dialect,
                limits.slice_bytes_max(),
                limits.max_session_buffer,
            ),
            upstream_to_client: UpstreamToClient::new(dialect, has_token, redactor),
            opening: (pooled.is_some() && dialect != Dialect::Foreign).then(Vec::new),
            speech: SpeechPermit::new(dialect, audio_format.as_deref()),
            _open: proxy.meters.socket_opened(dialect),
            upstream: upstream.stream,
            from_client: ReadBuffer::new(Sender::Client, dialect.is_read(), Bytes::new().into()),
            to_upstream: SendBuffer::default(),
            // The provider may have sent its first frames together with its 101.
            from_upstream: ReadBuffer::new(Sender::Server, dialect.is_read(), upstream.read_buf),
            to_client: SendBuffer::default(),
            failover_since: None,
            is_between_keys: false,
            refusal: None,
            conversation: None,
            is_upload_closed: false,
            is_queued: false,
            poll_order: PollOrder::default(),
            began: now,
            active_at: now,
            closed_at: None,
            quota_check_at: quota_checks(dialect, pooled.as_ref()).then_some(now),
            timer: None,
            share: config.limits.buffers.share(buffers::FREE),
            proxy,
            config,
            dialect,
            pooled,
            attempt,
            log,
        }
    }

    pub(super) fn limits(&self) -> SocketLimits {
        self.config.limits.websocket
    }

    /// Bytes that may still be read ahead of processing.
    pub(super) fn read_ahead_max(&self) -> usize {
        let held = self.client_to_upstream.held_bytes() + self.opening.as_ref().map_or(0, Vec::len);
        self.limits().max_session_buffer.saturating_sub(held)
    }

    /// Memory of its buffers, except the one for bytes from the client.
    pub(super) fn other_capacity(&self) -> usize {
        let Self {
            to_upstream,
            from_upstream,
            to_client,
            client_to_upstream,
            upstream_to_client,
            opening,
            ..
        } = self;
        let passing = [&to_upstream.bytes, &from_upstream.bytes, &to_client.bytes].map(BytesMut::capacity);
        let kept = opening.as_ref().map_or(0, Vec::capacity)
            + client_to_upstream.capacity()
            + upstream_to_client.capacity();
        kept + passing.iter().sum::<usize>()
    }

    /// Reserves the memory of its buffers and `more` bytes in the budget; returns whether it was
    /// available.
    pub(super) fn reserve_memory(&mut self, more: usize) -> bool {
        let bytes = self.from_client.bytes.capacity() + self.other_capacity();
        self.share.cover(bytes + more)
    }

    /// Reserves the memory of its buffers in the budget. If that is not available, the opening
    /// messages are freed, and the session cannot fail over any more. Returns whether the memory is
    /// reserved.
    pub(super) fn reserve_memory_or_drop_opening(&mut self) -> bool {
        self.reserve_memory(0) || (self.opening.take().is_some() && self.reserve_memory(0))
    }
}
