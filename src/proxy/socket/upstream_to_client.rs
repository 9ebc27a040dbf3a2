//! Forwards the provider's frames to the client: unchanged, except that keys are redacted in
//! messages of all kinds and in control frames. Until the session is known to be served, its frames
//! are held, so that a refusal which leads to a failover never reaches the client.

use std::sync::Arc;

use bytes::BytesMut;

use crate::elevenlabs::socket::{
    Dialect, MessageKind, REFUSAL_BYTES_MAX, SessionStage, classify_close, classify_message,
};
use crate::policy::frame::{self, Head, Opcode, check_close, close_payload};
use crate::policy::verdict::Verdict;
use crate::secret::Redactor;

/// The state of the provider's stream of frames.
#[derive(Debug)]
pub(super) struct UpstreamToClient {
    dialect: Dialect,
    has_token: bool,
    redactor: Option<Arc<Redactor>>,
    /// Whether frames are forwarded at once.
    is_open: bool,
    /// Whether a useful message was received: from then on only refusals are reported.
    is_served: bool,
    /// Frames that are held back from the client.
    held: BytesMut,
    frame: Option<UpstreamFrame>,
    /// Whether the current message has more frames.
    is_in_message: bool,
    /// Whether the current message is a readable text.
    is_text: bool,
    /// The text of the current message so far; `None` when it is too long for a refusal.
    text: Option<Vec<u8>>,
    /// The end of the forwarded part of the current message, when a key may begin in it.
    open_key: Vec<u8>,
    /// Whether an unknown error was received, whose meaning the following close decides.
    has_unknown_error: bool,
    has_closed: bool,
    bytes: u64,
}

#[derive(Debug)]
struct UpstreamFrame {
    head: Head,
    left: u64,
}

/// A message or a close of the provider.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UpstreamEvent {
    /// A complete message, or a long one that is known to be no refusal.
    Message(MessageKind),
    /// A close frame, and its verdict; `None` for a close that is no refusal.
    Close(Option<Verdict>),
}

/// Maximum payload of a control frame (RFC 6455, section 5.5).
const CONTROL_BYTES_MAX: u64 = 125;
/// Maximum bytes that are held before the session counts as served: keepalives and a refusal are
/// far shorter.
const HELD_BYTES_MAX: usize = 4 * REFUSAL_BYTES_MAX;

impl UpstreamToClient {
    pub(super) fn new(dialect: Dialect, has_token: bool, redactor: Option<Arc<Redactor>>) -> Self {
        Self {
            dialect,
            has_token,
            redactor,
            // In an unknown protocol, a refusal cannot be recognized, so nothing is held.
            is_open: dialect == Dialect::Foreign,
            is_served: dialect == Dialect::Foreign,
            held: BytesMut::new(),
            frame: None,
            is_in_message: false,
            is_text: false,
            text: None,
            open_key: Vec::new(),
            has_unknown_error: false,
            has_closed: false,
            bytes: 0,
        }
    }

    /// Whether frames are forwarded: the session is served, or its end is.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Whether a useful message was received.
    pub(super) fn is_served(&self) -> bool {
        self.is_served
    }

    /// Forwards the held frames, and all later ones at once.
    pub(super) fn open(&mut self, out: &mut BytesMut) {
        self.is_open = true;
        // The text of the first message is not needed any more.
        self.text = None;
        out.unsplit(std::mem::take(&mut self.held));
    }

    /// Records that the client uses one of the provider's own tokens: an error about it is not
    /// about the key.
    pub(super) fn record_token(&mut self) {
        self.has_token = true;
    }

    /// Marks the session as served, and forwards the held frames.
    pub(super) fn serve(&mut self, out: &mut BytesMut) {
        self.is_served = true;
        self.open(out);
    }

    /// Resets the state for another upstream connection, and drops the held frames.
    pub(super) fn restart(&mut self) {
        self.held = BytesMut::new();
        (self.frame, self.is_in_message, self.has_closed) = (None, false, false);
        (self.is_text, self.text) = (false, None);
        self.has_unknown_error = false;
        self.open_key = Vec::new();
    }

    /// Forwards the held frames without a decision about the session.
    pub(super) fn forward_held(&mut self, out: &mut BytesMut) {
        out.unsplit(std::mem::take(&mut self.held));
    }

    /// Missing bytes of the current frame: until they arrive, no other frame may be inserted.
    pub(super) fn frame_left(&self) -> u64 {
        self.frame.as_ref().map_or(0, |frame| frame.left)
    }

    /// Whether a message is incomplete: until its end, no other message may be inserted.
    pub(super) fn is_in_message(&self) -> bool {
        self.is_in_message
    }

    /// Whether the provider has sent a close frame.
    pub(super) fn has_closed(&self) -> bool {
        self.has_closed
    }

    /// Bytes received so far, including frame headers.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first message, until it is forwarded.
    pub(super) fn first(&self) -> &[u8] {
        self.text.as_deref().unwrap_or_default()
    }

    /// Memory of the held bytes.
    pub(super) fn capacity(&self) -> usize {
        self.held.capacity() + self.text.as_ref().map_or(0, Vec::capacity) + self.open_key.capacity()
    }

    /// Processes received bytes, and adds the bytes to forward to `out`.
    pub(super) fn take(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> Option<UpstreamEvent> {
        // Counts received bytes, not announced ones.
        let before = inbox.len();
        let event = self.process(inbox, out);
        self.bytes += (before - inbox.len()) as u64;
        event
    }

    fn process(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> Option<UpstreamEvent> {
        loop {
            let frame = match self.frame.take() {
                Some(frame) => frame,
                None => self.begin(inbox, out)?,
            };
            let available = usize::try_from(frame.left).map_or(inbox.len(), |left| left.min(inbox.len()));
            let is_whole = available as u64 == frame.left;
            let is_control = frame.head.opcode.is_control();
            let is_small = is_control && frame.head.length <= CONTROL_BYTES_MAX;
            let is_close = frame.head.opcode == Opcode::Close && is_small;
            // A control frame is small: it is forwarded as a whole.
            if !is_whole && (available == 0 || is_small) {
                self.frame = Some(frame);
                return None;
            }
            if is_close {
                let payload = inbox.split_to(available);
                return Some(self.close(&frame.head, payload, out));
            }
            if is_small {
                self.put_head(&frame.head, out);
            }
            let length = self.redact(&frame.head, inbox, available, is_whole);
            let piece = inbox.split_to(length);
            if !is_control {
                self.read(&piece);
            }
            self.put(frame.head.opcode, &piece, out);
            let left = frame.left - length as u64;
            let event = match left {
                0 if frame.head.is_final && !is_control => self.classify_message(),
                0 => None,
                _ => {
                    self.frame = Some(UpstreamFrame { head: frame.head, left });
                    None
                }
            };
            let is_useful = self.is_surely_useful(!is_control && left > 0);
            let event = match event {
                None | Some(UpstreamEvent::Message(MessageKind::Aside | MessageKind::UnknownError))
                    if is_useful =>
                {
                    Some(UpstreamEvent::Message(MessageKind::Useful))
                }
                event => event,
            };
            if event.is_some() || (left > 0 && length == 0) {
                return event;
            }
        }
    }

    fn begin(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> Option<UpstreamFrame> {
        let (head, length) = frame::read(inbox)?;
        let raw = inbox.split_to(length);
        if !head.opcode.is_control() || head.length > CONTROL_BYTES_MAX {
            self.put(head.opcode, &raw, out);
        }
        if !head.opcode.is_control() {
            self.is_in_message = !head.is_final;
            if head.opcode != Opcode::Continuation {
                self.open_key = Vec::new();
            }
        }
        match head.opcode {
            Opcode::Text => {
                // Payload that an extension has changed cannot be read.
                self.is_text = head.reserved == 0 && head.mask.is_none();
                self.text = Some(Vec::new());
            }
            Opcode::Binary => {
                self.is_text = false;
                self.text = None;
            }
            Opcode::Continuation | Opcode::Close | Opcode::Ping | Opcode::Pong | Opcode::Reserved(_) => {}
        }
        Some(UpstreamFrame { head, left: head.length })
    }

    /// Adds the header of a control frame, which is forwarded together with its payload.
    fn put_head(&mut self, head: &Head, out: &mut BytesMut) {
        let mut bytes = Vec::new();
        head.write(&mut bytes);
        self.put(head.opcode, &bytes, out);
    }

    /// Forwards or holds bytes. Pings and pongs are always forwarded, as the client must answer a
    /// ping whether or not the session is served.
    fn put(&mut self, opcode: Opcode, bytes: &[u8], out: &mut BytesMut) {
        let is_ping = matches!(opcode, Opcode::Ping | Opcode::Pong);
        if self.is_open || is_ping { out } else { &mut self.held }.extend_from_slice(bytes);
    }

    /// Handles the provider's close, whose reason may be a refusal. An invalid payload is replaced
    /// by the close for that violation.
    fn close(&mut self, head: &Head, mut payload: BytesMut, out: &mut BytesMut) -> UpstreamEvent {
        if let Some(redactor) = &self.redactor {
            let open = redactor.cover(&mut payload);
            let from = payload.len() - open;
            redactor.cover_end(&mut payload[from..]);
        }
        self.has_closed = true;
        let (code, reason) = frame::read_close(&payload);
        let payload = match check_close(&payload) {
            Err(violation) if self.dialect.is_read() => {
                let (code, reason) = violation.close();
                close_payload(code, reason)
            }
            Ok(_) | Err(_) => payload.to_vec(),
        };
        self.put_head(&Head { length: payload.len() as u64, ..*head }, out);
        self.put(head.opcode, &payload, out);
        let is_behind_error = self.has_unknown_error && !self.is_served;
        UpstreamEvent::Close(classify_close(code, &reason, is_behind_error, self.has_token))
    }

    /// Redacts keys in the received bytes of a frame; returns how many bytes may be forwarded. A
    /// possible start of a key waits for the following bytes. At the end of the frame, that start
    /// is redacted except for what a key's short form shows, and the search continues in the next
    /// frame of the message.
    fn redact(&mut self, head: &Head, inbox: &mut BytesMut, available: usize, is_whole: bool) -> usize {
        let Some(redactor) = &self.redactor else { return available };
        // Payload that an extension has changed cannot be read.
        if head.reserved != 0 || head.mask.is_some() {
            return available;
        }
        let mut before = Vec::new();
        if !head.opcode.is_control() {
            std::mem::swap(&mut before, &mut self.open_key);
        }
        let piece = &mut inbox[..available];
        let open = if before.is_empty() {
            redactor.cover(piece)
        } else {
            let mut text = [&before, &*piece].concat();
            let open = redactor.cover(&mut text);
            piece.copy_from_slice(text.get(before.len()..).unwrap_or_default());
            open
        };
        // The possible start of a key: the part in this piece, and the part that was forwarded
        // before.
        let (here, gone) = (open.min(available), open.saturating_sub(available));
        let mut end = before.split_off(before.len() - gone);
        if !is_whole {
            if !head.opcode.is_control() {
                self.open_key = end;
            }
            return available - here;
        }
        end.extend_from_slice(piece.get(available - here..).unwrap_or_default());
        let mut redacted = end.clone();
        redactor.cover_end(&mut redacted);
        piece[available - here..].copy_from_slice(&redacted[gone..]);
        if !head.opcode.is_control() && !head.is_final {
            self.open_key = end;
        }
        available
    }

    fn read(&mut self, piece: &[u8]) {
        let fits = |text: &Vec<u8>| text.len() + piece.len() <= REFUSAL_BYTES_MAX;
        self.text = self.text.take().filter(fits);
        if let Some(text) = &mut self.text {
            text.extend_from_slice(piece);
        }
    }

    /// Whether a message is known to be no refusal before its end, because it is too long.
    fn is_surely_useful(&self, is_in_message: bool) -> bool {
        let is_long = is_in_message && self.text.is_none();
        !self.is_served && (is_long || self.held.len() > HELD_BYTES_MAX)
    }

    fn classify_message(&mut self) -> Option<UpstreamEvent> {
        let kind = match &self.text {
            Some(text) if self.is_text && (!self.is_served || may_refuse(text)) => {
                let stage = if self.is_served { SessionStage::Served } else { SessionStage::Opening };
                classify_message(self.dialect, stage, text, self.has_token)
            }
            Some(_) | None => MessageKind::Useful,
        };
        if self.is_served {
            self.text = None;
        }
        self.has_unknown_error |= kind == MessageKind::UnknownError;
        let is_reported = !self.is_served || matches!(kind, MessageKind::Refused(_));
        is_reported.then_some(UpstreamEvent::Message(kind))
    }
}

/// Whether a message may be a refusal: every refusal contains this word, and few other messages do.
fn may_refuse(text: &[u8]) -> bool {
    memchr::memmem::find(text, b"error").is_some()
}
