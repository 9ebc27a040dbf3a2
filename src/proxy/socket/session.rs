//! Holds the state of a WebSocket session: the upstream connection, the buffers of both directions, the current
//! attempt, and the data for a failover. The event loop is in `run`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::time::Sleep;

use super::buffers::{self, ReadBuffer, SendBuffer};
use super::client_to_upstream::ClientToUpstream;
use super::poll_order::PollOrder;
use super::session_end::SessionEnd;
use super::speech_tracker::{ReservationResult, SpeechTracker};
use super::upstream_to_client::{UpstreamEvent, UpstreamToClient};
use crate::body::budget::BufferReservation;
use crate::clock;
use crate::elevenlabs::socket::{ChargedContent, Dialect};
use crate::policy::client_quota::QuotaUnit;
use crate::policy::verdict::Verdict;
use crate::policy::websocket_frame::Sender;
use crate::proxy::access_log::AccessLog;
use crate::proxy::attempt::Attempt;
use crate::proxy::config::RuntimeConfig;
use crate::proxy::request_context::RequestContext;
use crate::proxy::socket_limits::SocketLimits;
use crate::proxy::state::Proxy;
use crate::proxy::usage::UsagePermit;
use crate::secret::Redactor;
use crate::telemetry::OpenSession;
use crate::upstream::{BoxedStream, UpgradedConnection};

/// The data from the handshake with which a session starts.
pub(super) struct SessionStart<C> {
    pub(super) proxy: Arc<Proxy<C>>,
    pub(super) config: Arc<RuntimeConfig>,
    pub(super) dialect: Dialect,
    /// Whether the client uses one of the provider's own tokens.
    pub(super) has_token: bool,
    pub(super) audio_format: Option<String>,
    pub(super) redactor: Option<Arc<Redactor>>,
    /// The data for a failover, or `None` if the client's own key is used.
    pub(super) pooled: Option<PooledSession>,
    pub(super) attempt: Box<Attempt>,
    pub(super) upstream: UpgradedConnection,
}

/// The data with which a session with a key of the pool can fail over to another key.
pub(super) struct PooledSession {
    pub(super) context: RequestContext,
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
    pub(super) upstream: BoxedStream,
    pub(super) from_client: ReadBuffer,
    pub(super) to_upstream: SendBuffer,
    pub(super) from_upstream: ReadBuffer,
    pub(super) to_client: SendBuffer,
    pub(super) client_to_upstream: ClientToUpstream,
    pub(super) upstream_to_client: UpstreamToClient,
    /// The client's messages so far, for a failover. `None` means that the session cannot fail over. The reason is the
    /// client's own key, an unknown protocol, a session that the provider serves, messages that exceed a limit, or an
    /// exhausted buffer budget.
    pub(super) opening_messages: Option<Vec<u8>>,
    pub(super) speech: SpeechTracker,
    /// The time of the first failover since the client's last message was processed, or `None` if there was none.
    pub(super) failover_started_at: Option<Instant>,
    /// Whether the attempt has ended and the next one has not started.
    pub(super) is_between_keys: bool,
    /// The refusal that was forwarded to the client.
    pub(super) refusal: Option<Verdict>,
    /// The provider's ID of a conversation with an agent.
    pub(super) conversation_id: Option<Arc<str>>,
    /// Whether the provider accepts no more bytes. Its last messages may still explain the reason.
    pub(super) is_upload_closed: bool,
    /// Whether the provider has reported that the client waits for a busy agent.
    pub(super) is_queued: bool,
    pub(super) poll_order: PollOrder,
    pub(super) started_at: Instant,
    /// The time at which data was last received from a side.
    pub(super) last_activity: Instant,
    /// The time at which the second side sent its close frame.
    pub(super) closed_at: Option<Instant>,
    /// The time at which the client's credit quota is checked next, or `None` if it is not checked.
    pub(super) quota_check_at: Option<Instant>,
    pub(super) timer: Option<Pin<Box<Sleep>>>,
    /// The reservation in the buffer budget for the session's buffers.
    pub(super) reservation: BufferReservation,
    /// Counts the session in the metrics until it is dropped.
    _open: OpenSession,
}

/// The next event of a session.
pub(super) enum SessionEvent {
    /// A client message is held until credits for its content are reserved.
    HeldMessage(ChargedContent),
    /// The pending reservation has completed.
    Reserved(ReservationResult),
    /// The provider has sent a message or a close frame that may change the session's state.
    Upstream(UpstreamEvent),
    /// Speech generation has been idle for its timeout.
    SpeechIdle,
    /// The session must end for this reason.
    End(SessionEnd),
}

/// Returns whether the credit quotas of the client and its user are checked while a session runs. Text-to-speech
/// sessions instead check the quotas before each text is forwarded.
fn needs_quota_checks(dialect: Dialect, pooled: Option<&PooledSession>) -> bool {
    let rules = pooled.map(|pooled| &pooled.context.retry.client.rules);
    let quotas = rules.into_iter().flat_map(|rules| [rules.quota, rules.user_quota]).flatten();
    let has_quota = quotas.into_iter().any(|quota| quota.unit == QuotaUnit::Credits);
    has_quota && dialect.is_inspected() && !dialect.generates_speech()
}

impl<C> Session<C> {
    pub(super) fn new(start: SessionStart<C>, log: AccessLog) -> Self {
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
                limits.max_frame_part(),
                limits.max_session_buffer,
            ),
            upstream_to_client: UpstreamToClient::new(dialect, has_token, redactor),
            opening_messages: (pooled.is_some() && dialect != Dialect::Foreign).then(Vec::new),
            speech: SpeechTracker::new(audio_format.as_deref()),
            _open: proxy.metrics.open_session(dialect),
            upstream: upstream.stream,
            from_client: ReadBuffer::new(Sender::Client, dialect.is_inspected(), Bytes::new().into()),
            to_upstream: SendBuffer::default(),
            // The provider may have sent its first frames together with its 101 response.
            from_upstream: ReadBuffer::new(Sender::Server, dialect.is_inspected(), upstream.read_buf),
            to_client: SendBuffer::default(),
            failover_started_at: None,
            is_between_keys: false,
            refusal: None,
            conversation_id: None,
            is_upload_closed: false,
            is_queued: false,
            poll_order: PollOrder::default(),
            started_at: now,
            last_activity: now,
            closed_at: None,
            quota_check_at: needs_quota_checks(dialect, pooled.as_ref()).then_some(now),
            timer: None,
            reservation: config.limits.buffers.reservation(buffers::UNBUDGETED_SESSION_BYTES),
            proxy,
            config,
            dialect,
            pooled,
            attempt,
            log,
        }
    }

    /// Returns the limits of the configuration with which the session started.
    pub(super) fn limits(&self) -> SocketLimits {
        self.config.limits.websocket
    }

    /// Returns the maximum number of bytes that may be read ahead of processing.
    pub(super) fn max_read_ahead(&self) -> usize {
        let held_bytes =
            self.client_to_upstream.held_bytes() + self.opening_messages.as_ref().map_or(0, Vec::len);
        self.limits().max_session_buffer.saturating_sub(held_bytes)
    }

    /// Returns the memory of the session's buffers, except the buffer for bytes from the client.
    pub(super) fn other_capacity(&self) -> usize {
        self.to_upstream.bytes.capacity()
            + self.from_upstream.bytes.capacity()
            + self.to_client.bytes.capacity()
            + self.opening_messages.as_ref().map_or(0, Vec::capacity)
            + self.client_to_upstream.capacity()
            + self.upstream_to_client.capacity()
    }

    /// Reserves the memory of the session's buffers and `additional_bytes` in the budget. Returns whether the
    /// memory was available.
    pub(super) fn reserve_memory(&mut self, additional_bytes: usize) -> bool {
        let bytes = self.from_client.bytes.capacity() + self.other_capacity();
        self.reservation.try_resize(bytes + additional_bytes)
    }

    /// Like [`reserve_memory`](Self::reserve_memory), but if the budget is exhausted, frees the opening messages
    /// first. After that, the session cannot fail over.
    pub(super) fn reserve_memory_or_drop_opening(&mut self) -> bool {
        self.reserve_memory(0) || (self.opening_messages.take().is_some() && self.reserve_memory(0))
    }
}
