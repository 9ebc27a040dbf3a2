//! How a session ends: what either end is told, and what is written down.

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
use crate::policy::classify::Verdict;
use crate::policy::frame::{Head, Opcode, Violation, close_payload, mask};
use crate::policy::socket::Dialect;
use crate::upstream::Connect;

/// How a session has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The provider has said so and closed.
    Closed,
    /// The client is gone.
    ClientLeft,
    /// The provider is gone without a word.
    UpstreamBroke,
    /// The program ends, and the grace is over.
    Cut,
    /// Nothing passed for too long.
    Idle,
    /// It lasted too long.
    Old,
    /// Its client has used the credits that it may.
    Spent,
    /// It needs larger buffers than the budget has memory left for.
    NoMemory,
    /// The client has closed while the session was busy elsewhere; 1005 when it gave no code.
    ClientClosed {
        /// The code that it gave.
        code: u16,
    },
    /// That side sends what is not accepted.
    Violated(Violation, Side),
}

/// An end of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The client.
    Client,
    /// The provider.
    Upstream,
}

impl Ending {
    /// What the ends are told that do not know: client and provider, each a code and a reason.
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

/// The code of a close that refuses.
const POLICY: u16 = 1008;

/// What is left to say is said in this time, or not at all.
pub(super) const LAST_WORDS_MAX: Duration = Duration::from_secs(1);

/// A mask that hides nothing: what is said under it is for anybody.
const MASK: [u8; 4] = [0x4b, 0x65, 0x79, 0x63];

impl<C: Connect> Session<C> {
    /// Tells both ends, and writes down what became of it.
    pub(super) async fn end<S>(mut self: Box<Self>, ending: Ending, mut client: S)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // A client that has said that it ends, and a provider that has closed, are as good as one that
        // waited for the other's word.
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
        self.log.relayed(record);
        self.log.ended_as(word);
        if let Some(conversation) = self.conversation.take().and_then(|id| self.attempt.conversation(id)) {
            // Too many at once, and some stay without a price.
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
        // Its key, its place among those that wait, and what was kept to be written are free from here on.
        drop((attempt, log, speaking, pooled));
        if ending == Ending::UpstreamBroke {
            // A cut stream must not look like a clean end: the connection just goes.
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

/// What the provider says, up to the end of the frame under way.
struct Frames {
    downwards: UpstreamToClient,
    from_upstream: ReadBuffer,
    to_client: SendBuffer,
}

impl Frames {
    /// Passes on the rest of the frame under way: no close can be put into it. Whether it has ended.
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

/// Sends a client what is left to say, and waits for its end.
pub(super) async fn say_last<S: AsyncRead + AsyncWrite + Unpin>(to_client: &mut SendBuffer, client: &mut S) {
    let last_words = async {
        if poll_fn(|cx| to_client.poll_close(cx, client)).await.is_ok() {
            drain(client).await;
        }
    };
    // A client that is gone, or does not end, has had its time.
    let _ = timeout(LAST_WORDS_MAX, last_words).await;
}

/// Adds a refusal of ours, as the provider says its own: in a message and in a close. The member that
/// names the kind of a message on the socket stands beside those of speech.
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

/// Adds a close frame; of 1005, which stands for no code, one without a payload.
pub(super) fn put_close(out: &mut BytesMut, (code, reason): (u16, &str), masked: Option<[u8; 4]>) {
    const NONE: u16 = 1005;
    let payload = if code == NONE { Vec::new() } else { close_payload(code, reason) };
    put(out, Opcode::Close, &payload, masked);
}

/// Adds a frame.
pub(super) fn put(out: &mut BytesMut, opcode: Opcode, payload: &[u8], masked: Option<[u8; 4]>) {
    let length = payload.len() as u64;
    Head { is_final: true, reserved: 0, opcode, mask: masked, length }.write(out);
    let from = out.len();
    out.extend_from_slice(payload);
    if let Some(masked) = masked {
        mask(&mut out[from..], masked, 0);
    }
}
