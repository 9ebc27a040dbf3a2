//! How a session ends: what either end is told, and what is written down.

use std::future::poll_fn;
use std::time::Duration;

use bytes::BytesMut;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::session::Session;
use crate::policy::classify::Verdict;
use crate::policy::frame::{Head, Opcode, close_payload, mask};
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
}

impl Ending {
    /// What the ends are told that do not know: client and provider, each a code and a reason.
    fn told(self) -> Option<[(u16, &'static str); 2]> {
        match self {
            Self::Closed | Self::ClientLeft | Self::UpstreamBroke => None,
            Self::Cut => Some([(1012, "Keychoir restarts. Connect again."), (1001, "")]),
            Self::Idle => Some([(1001, "Nothing was said for too long."), (1001, "")]),
            Self::Old => Some([(1001, "The session has lasted as long as it may."), (1001, "")]),
            Self::Spent => Some([(POLICY, "This client has used its allowance of credits."), (1001, "")]),
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Closed => Verdict::Served.word(),
            Self::ClientLeft => "client_left",
            Self::UpstreamBroke => "upstream_broke",
            Self::Cut => "cut",
            Self::Idle => "idle",
            Self::Old => "expired",
            Self::Spent => "client_allowance_used",
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
        let was_said = self.upwards.has_closed() || self.downwards.has_closed();
        let ending = if is_one_gone && was_said { Ending::Closed } else { ending };
        let word = match (self.refusal, ending) {
            (Some(verdict), _) => verdict.word(),
            (None, Ending::UpstreamBroke) if !self.downwards.is_served() => "unanswered",
            (None, ending) => ending.word(),
        };
        let passed = [self.upwards.bytes(), self.downwards.bytes()];
        self.attempt.heard_all(self.speaking.audio());
        let record = self.attempt.ended(word, passed);
        self.log.relayed(record);
        if let Some(conversation) = self.conversation.take().and_then(|id| self.attempt.conversation(id)) {
            // Too many at once, and some stay without a price.
            let _ = self.proxy.ended.try_send(conversation);
        }
        if !self.downwards.is_served() {
            self.log.unserved();
        }
        if let Some([to_client, to_upstream]) = ending.told() {
            if !self.downwards.is_in_frame() {
                let out = &mut self.down.outbox;
                match to_client {
                    (POLICY, why) if !self.downwards.is_in_message() => put_refusal(out, ending.word(), why),
                    to_client => put_close(out, to_client, None),
                }
            }
            if !self.upwards.is_in_frame() {
                put_close(&mut self.up.outbox, to_upstream, Some(MASK));
            }
        }
        let Self { mut up, mut down, mut upstream, attempt, log, .. } = *self;
        // Its key is free from here on.
        drop((attempt, log));
        if ending == Ending::UpstreamBroke {
            // A cut stream must not look like a clean end: the connection just goes.
            return;
        }
        let last_words = async {
            // Either end may be gone.
            let _ = poll_fn(|cx| down.poll_close(cx, &mut client)).await;
        };
        let _ = timeout(LAST_WORDS_MAX, last_words).await;
        let _ = timeout(LAST_WORDS_MAX, poll_fn(|cx| up.poll_close(cx, &mut upstream))).await;
    }
}

/// Adds a refusal of ours, as the provider says its own: in a message and in a close.
pub(super) fn put_refusal(out: &mut BytesMut, code: &str, message: &str) {
    let text = json!({ "message": message, "error": code, "code": POLICY }).to_string();
    put(out, Opcode::Text, text.as_bytes(), None);
    put_close(out, (POLICY, message), None);
}

/// Adds a close frame.
pub(super) fn put_close(out: &mut BytesMut, (code, reason): (u16, &str), masked: Option<[u8; 4]>) {
    put(out, Opcode::Close, &close_payload(code, reason), masked);
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
