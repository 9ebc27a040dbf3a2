//! The end of a session: its close frames, its usage record and its access log.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::buffers::{Read, ReadBuffer, SendBuffer, drain};
use super::session::Session;
use super::upstream_to_client::UpstreamToClient;
use crate::elevenlabs::socket::Dialect;
use crate::policy::frame::{Head, Opcode, Violation, close_payload, mask};
use crate::policy::verdict::Verdict;
use crate::upstream::Connect;

/// Why a session has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The provider has sent a close frame and closed its connection.
    Closed,
    /// The client has disconnected.
    ClientLeft,
    /// The provider has disconnected without a close frame.
    UpstreamBroke,
    /// The program shuts down, and the drain timeout is over.
    Cut,
    /// Nothing was received for the idle timeout.
    Idle,
    /// The session has reached its maximum duration.
    Old,
    /// The client has used its credit quota.
    Spent,
    /// The buffer budget is used up.
    NoMemory,
    /// The client has closed while the session waited for something else.
    ClientClosed {
        /// The close code; 1005 when the close frame had none.
        code: u16,
    },
    /// That side sent something that is not accepted.
    Violated(Violation, Side),
}

/// One side of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The client.
    Client,
    /// The provider.
    Upstream,
}

impl Ending {
    /// The close code and reason for the client and for the provider; `None` when both sides know.
    pub(super) fn told(self) -> Option<[(u16, &'static str); 2]> {
        match self {
            Self::Closed | Self::ClientLeft | Self::UpstreamBroke => None,
            Self::ClientClosed { code } => Some([(code, ""), (1001, "")]),
            Self::Violated(violation, Side::Client) => Some([violation.close(), (1001, "")]),
            Self::Violated(violation, Side::Upstream) => Some([violation.close(); 2]),
            Self::Cut => Some([(1012, "Keychoir restarts. Connect again."), (1001, "")]),
            Self::Idle => Some([(1001, "Nothing was said for too long."), (1001, "")]),
            Self::Old => Some([(1001, "The session has lasted as long as it may."), (1001, "")]),
            Self::NoMemory => {
                Some([(1013, "Keychoir has no memory left for this session. Try again later."), (1001, "")])
            }
            Self::Spent => Some([(POLICY, "This client has used its quota of credits."), (1001, "")]),
        }
    }

    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Closed => Verdict::Served.word(),
            Self::ClientLeft | Self::ClientClosed { .. } => "client_closed",
            Self::Violated(Violation::TooLarge, Side::Client) => "message_too_large",
            Self::Violated(_, Side::Client) => "protocol_error",
            Self::Violated(_, Side::Upstream) => "upstream_protocol_error",
            Self::UpstreamBroke => "upstream_reset",
            Self::Cut => "shutdown",
            Self::Idle => "idle",
            Self::Old => "max_duration",
            Self::Spent => "client_quota_exceeded",
            Self::NoMemory => "buffers_full",
        }
    }
}

/// The close code of a refusal.
const POLICY: u16 = 1008;

/// Maximum time for sending the last frames and for the end of the connection.
pub(super) const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// A constant mask: the close frame under it contains nothing that needs an unpredictable one.
const MASK: [u8; 4] = [0x4b, 0x65, 0x79, 0x63];

impl<C: Connect> Session<C> {
    /// Sends close frames to both sides, and writes the usage record and the access log.
    pub(super) async fn end<S>(mut self: Box<Self>, ending: Ending, mut client: S)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // When the client or the provider has sent a close frame, a disconnect before the other
        // side's close frame is a normal end.
        let is_one_gone = matches!(ending, Ending::ClientLeft | Ending::UpstreamBroke);
        let was_said = self.client_to_upstream.has_closed() || self.upstream_to_client.has_closed();
        let ending = if is_one_gone && was_said { Ending::Closed } else { ending };
        let word = match (self.refusal, ending) {
            (Some(verdict), _) => verdict.word(),
            (None, Ending::UpstreamBroke) if !self.upstream_to_client.is_served() => "no_response",
            (None, ending) => ending.word(),
        };
        let passed = [self.client_to_upstream.bytes(), self.upstream_to_client.bytes()];
        let audio = self.speech.length_of(self.client_to_upstream.audio_bytes());
        self.attempt.heard_all(audio);
        let record = self.attempt.ended((!self.is_between_keys).then_some(word), passed);
        self.log.summary.record_end(record);
        self.log.summary.ended_as(word);
        if let Some(conversation) = self.conversation.take().and_then(|id| self.attempt.conversation(id)) {
            // A conversation that finds the queue full stays without a price.
            let _ = self.proxy.ended.try_send(conversation);
        }
        let Self {
            client_to_upstream: upwards,
            upstream_to_client: mut downwards,
            dialect,
            attempt,
            log,
            speech: speaking,
            pooled,
            ..
        } = *self;
        let Self { from_upstream, mut to_upstream, mut to_client, mut upstream, .. } = *self;
        // Releases the key, the place in the wait queue and the usage record before the last frames
        // are sent.
        drop((attempt, log, speaking, pooled));
        if ending == Ending::UpstreamBroke {
            // A broken stream must not look like a clean end: the connection is dropped without a
            // close frame.
            return;
        }
        if let Some([told_client, told_upstream]) = ending.told() {
            let mut down = Frames { downwards, from_upstream, to_client };
            let finishing = poll_fn(|cx| down.poll_finish(cx, &mut upstream, &mut client));
            let is_whole = timeout(LAST_WORDS_MAX, finishing).await.unwrap_or(false);
            Frames { downwards, to_client, .. } = down;
            match told_client {
                _ if !is_whole => {}
                (POLICY, why) if ending == Ending::Spent && !downwards.is_in_message() => {
                    put_refusal(&mut to_client.bytes, dialect, ending.word(), why);
                }
                told => put_close(&mut to_client.bytes, told, None),
            }
            if !upwards.is_in_frame() {
                put_close(&mut to_upstream.bytes, told_upstream, Some(MASK));
            }
        }
        let farewell = poll_fn(|cx| to_upstream.poll_close(cx, &mut upstream));
        let (_, _) = tokio::join!(say_last(&mut to_client, &mut client), timeout(LAST_WORDS_MAX, farewell));
    }
}

/// The provider's stream, up to the end of the current frame.
struct Frames {
    downwards: UpstreamToClient,
    from_upstream: ReadBuffer,
    to_client: SendBuffer,
}

impl Frames {
    /// Forwards the rest of the current frame, as no close can be put into it. Returns whether it
    /// is complete.
    fn poll_finish<U, S>(&mut self, cx: &mut Context<'_>, upstream: &mut U, client: &mut S) -> Poll<bool>
    where
        U: AsyncRead + Unpin,
        S: AsyncWrite + Unpin,
    {
        let Self { downwards, from_upstream, to_client } = self;
        loop {
            let left = usize::try_from(downwards.frame_left()).unwrap_or(usize::MAX);
            if left == 0 {
                return Poll::Ready(true);
            }
            let read = &mut from_upstream.bytes;
            let behind = read.split_off(left.min(read.len()));
            let before = read.len();
            let _ = downwards.take(read, &mut to_client.bytes);
            let is_moved = read.len() < before;
            read.unsplit(behind);
            if ready!(to_client.poll_send(cx, client)).is_err() {
                return Poll::Ready(false);
            }
            if !is_moved && ready!(from_upstream.poll_read(cx, upstream)) != Read::Some {
                return Poll::Ready(false);
            }
        }
    }
}

/// Sends the last frames to a client, and waits for the end of its connection.
pub(super) async fn say_last<S: AsyncRead + AsyncWrite + Unpin>(to_client: &mut SendBuffer, client: &mut S) {
    let last_words = async {
        if poll_fn(|cx| to_client.poll_close(cx, client)).await.is_ok() {
            drain(client).await;
        }
    };
    // A client that is gone, or does not close in time, is not waited for.
    let _ = timeout(LAST_WORDS_MAX, last_words).await;
}

/// Adds an error of the proxy in the provider's form: a message and a close. The field that names
/// the kind of message in the socket's protocol stands beside those of text-to-speech errors.
pub(super) fn put_refusal(out: &mut BytesMut, dialect: Dialect, code: &str, message: &str) {
    let mut told = json!({ "message": message, "error": code, "code": POLICY });
    match dialect {
        Dialect::Transcription => told["message_type"] = "quota_exceeded".into(),
        Dialect::Agent => told["type"] = "error".into(),
        Dialect::Speech
        | Dialect::SpeechContexts
        | Dialect::Dialogue
        | Dialect::DialogueContexts
        | Dialect::Unknown
        | Dialect::Foreign => {}
    }
    put(out, Opcode::Text, told.to_string().as_bytes(), None);
    put_close(out, (POLICY, message), None);
}

/// Adds a close frame; for 1005, which stands for no code, one without a payload.
pub(super) fn put_close(out: &mut BytesMut, (code, reason): (u16, &str), masked: Option<[u8; 4]>) {
    const NONE: u16 = 1005;
    let payload = if code == NONE { Vec::new() } else { close_payload(code, reason) };
    put(out, Opcode::Close, &payload, masked);
}

/// Adds a complete frame.
pub(super) fn put(out: &mut BytesMut, opcode: Opcode, payload: &[u8], masked: Option<[u8; 4]>) {
    let length = payload.len() as u64;
    Head { is_final: true, reserved: 0, opcode, mask: masked, length }.write(out);
    let from = out.len();
    out.extend_from_slice(payload);
    if let Some(masked) = masked {
        mask(&mut out[from..], masked, 0);
    }
}
