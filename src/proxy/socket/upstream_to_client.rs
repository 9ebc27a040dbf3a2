//! Forwards the provider's frames to the client, with keys redacted in messages and control frames. Frames are held
//! until a useful message shows that the provider serves the session. A refusal that causes a failover thus never
//! reaches the client.

use std::sync::Arc;

use bytes::BytesMut;

use crate::elevenlabs::socket::{
    Dialect, MAX_REFUSAL_BYTES, MessageKind, SessionStage, classify_close, classify_message,
};
use crate::policy::verdict::Verdict;
use crate::policy::websocket_frame::{self, FrameHeader, Opcode, close_payload, validate_close};
use crate::secret::Redactor;

/// The state of the provider's frame stream.
#[derive(Debug)]
pub(super) struct UpstreamToClient {
    dialect: Dialect,
    /// Whether the client uses one of the provider's own tokens. An error about that token is not about the
    /// key.
    pub(super) has_token: bool,
    redactor: Option<Arc<Redactor>>,
    /// Whether frames are forwarded immediately instead of being held.
    pub(super) is_open: bool,
    /// Whether a useful message was received, or the protocol is unknown. After that, only refusals and close frames
    /// are reported.
    pub(super) is_served: bool,
    /// Frames that are held back from the client.
    held: BytesMut,
    frame: Option<UpstreamFrame>,
    /// Whether a message is incomplete, so that no other message may be inserted.
    pub(super) is_in_message: bool,
    /// Whether the current message is readable text.
    is_text: bool,
    /// The current message so far, or `None` if there is no message, or it is binary or too long for a refusal.
    message_text: Option<Vec<u8>>,
    /// The end of the forwarded part of the current message, if a key may start in it.
    partial_key: Vec<u8>,
    /// Whether an unknown error was received. The following close frame decides whether the error is a
    /// refusal.
    has_unknown_error: bool,
    /// Whether the provider has sent a close frame.
    pub(super) has_closed: bool,
    /// Bytes received so far, including frame headers.
    pub(super) received_bytes: u64,
}

/// A frame of the provider whose payload is not complete yet.
#[derive(Debug)]
struct UpstreamFrame {
    header: FrameHeader,
    /// Bytes of the payload that were not processed yet.
    remaining_bytes: u64,
}

/// A message or close frame from the provider.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UpstreamEvent {
    /// A complete message, or the start of a message that is too long to be a refusal.
    Message(MessageKind),
    /// A close frame and its verdict, or `None` if it is not a refusal.
    Close(Option<Verdict>),
}

/// Maximum payload of a control frame (RFC 6455, section 5.5).
const MAX_CONTROL_PAYLOAD: u64 = 125;
/// Maximum number of bytes that are held before the session counts as served. Keepalives and a refusal are
/// far shorter.
const MAX_HELD_BYTES: usize = 4 * MAX_REFUSAL_BYTES;

impl UpstreamToClient {
    pub(super) fn new(dialect: Dialect, has_token: bool, redactor: Option<Arc<Redactor>>) -> Self {
        Self {
            dialect,
            has_token,
            redactor,
            // A refusal cannot be recognized in an unknown protocol, so no frame is held.
            is_open: dialect == Dialect::Foreign,
            is_served: dialect == Dialect::Foreign,
            held: BytesMut::new(),
            frame: None,
            is_in_message: false,
            is_text: false,
            message_text: None,
            partial_key: Vec::new(),
            has_unknown_error: false,
            has_closed: false,
            received_bytes: 0,
        }
    }

    /// Forwards the held frames. Later frames are forwarded without being held.
    pub(super) fn open(&mut self, output: &mut BytesMut) {
        self.is_open = true;
        // The first message is needed only until it is forwarded.
        self.message_text = None;
        self.forward_held(output);
    }

    /// Marks the session as served, and forwards the held frames.
    pub(super) fn mark_served(&mut self, output: &mut BytesMut) {
        self.is_served = true;
        self.open(output);
    }

    /// Resets the state for a new upstream connection, and drops the held frames.
    pub(super) fn reset(&mut self) {
        self.held = BytesMut::new();
        (self.frame, self.is_in_message, self.has_closed) = (None, false, false);
        (self.is_text, self.message_text) = (false, None);
        self.has_unknown_error = false;
        self.partial_key = Vec::new();
    }

    /// Forwards the held frames. Unless frames are forwarded immediately, later frames are held again.
    pub(super) fn forward_held(&mut self, output: &mut BytesMut) {
        output.unsplit(std::mem::take(&mut self.held));
    }

    /// Returns the number of remaining bytes of the current frame. Until they are forwarded, no other frame
    /// may be inserted.
    pub(super) fn frame_remaining(&self) -> u64 {
        self.frame.as_ref().map_or(0, |frame| frame.remaining_bytes)
    }

    /// Returns the text of the message that was received last, until the held frames are forwarded. When a useful
    /// message arrives, this is the first useful message.
    pub(super) fn first_message(&self) -> &[u8] {
        self.message_text.as_deref().unwrap_or_default()
    }

    /// Returns the memory of the held bytes.
    pub(super) fn capacity(&self) -> usize {
        self.held.capacity()
            + self.message_text.as_ref().map_or(0, Vec::capacity)
            + self.partial_key.capacity()
    }

    /// Processes the bytes in `input`, and appends the bytes to forward to `output`. Returns the next event,
    /// after which more bytes may be left to process.
    pub(super) fn process_input(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Option<UpstreamEvent> {
        let available = input.len();
        let event = self.process_frames(input, output);
        self.received_bytes += (available - input.len()) as u64;
        event
    }

    /// Processes frames until the next event, or until more bytes are needed.
    fn process_frames(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Option<UpstreamEvent> {
        loop {
            let frame = match self.frame.take() {
                Some(frame) => frame,
                None => self.read_frame_header(input, output)?,
            };
            let available = usize::try_from(frame.remaining_bytes)
                .map_or(input.len(), |remaining| remaining.min(input.len()));
            let is_whole = available as u64 == frame.remaining_bytes;
            let is_control = frame.header.opcode.is_control();
            let is_small = is_control && frame.header.length <= MAX_CONTROL_PAYLOAD;
            let is_close = frame.header.opcode == Opcode::Close && is_small;
            // A control frame is small and is forwarded as a whole.
            if !is_whole && (available == 0 || is_small) {
                self.frame = Some(frame);
                return None;
            }
            if is_close {
                let payload = input.split_to(available);
                return Some(self.process_close(&frame.header, payload, output));
            }
            if is_small {
                self.forward_or_hold_header(&frame.header, output);
            }
            let length = self.redact_payload(&frame.header, input, available, is_whole);
            let chunk = input.split_to(length);
            if !is_control {
                self.collect_text(&chunk);
            }
            self.forward_or_hold(frame.header.opcode, &chunk, output);
            let remaining = frame.remaining_bytes - length as u64;
            let frame_event = match remaining {
                0 if frame.header.is_final && !is_control => self.classify_message(),
                0 => None,
                _ => {
                    self.frame = Some(UpstreamFrame { header: frame.header, remaining_bytes: remaining });
                    None
                }
            };
            let is_useful = self.is_too_long_for_refusal(!is_control && remaining > 0);
            let event = match frame_event {
                None | Some(UpstreamEvent::Message(MessageKind::KeepAlive | MessageKind::UnknownError))
                    if is_useful =>
                {
                    Some(UpstreamEvent::Message(MessageKind::Useful))
                }
                event => event,
            };
            if event.is_some() || (remaining > 0 && length == 0) {
                return event;
            }
        }
    }

    /// Removes the next frame header from `input`. Returns `None` if the header is incomplete.
    fn read_frame_header(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Option<UpstreamFrame> {
        let (header, length) = websocket_frame::parse_header(input)?;
        let header_bytes = input.split_to(length);
        if !header.opcode.is_control() || header.length > MAX_CONTROL_PAYLOAD {
            self.forward_or_hold(header.opcode, &header_bytes, output);
        }
        if !header.opcode.is_control() {
            self.is_in_message = !header.is_final;
            if header.opcode != Opcode::Continuation {
                self.partial_key = Vec::new();
            }
        }
        match header.opcode {
            Opcode::Text => {
                // Payload that an extension has changed cannot be read.
                self.is_text = header.reserved == 0 && header.mask.is_none();
                self.message_text = Some(Vec::new());
            }
            Opcode::Binary => {
                self.is_text = false;
                self.message_text = None;
            }
            Opcode::Continuation | Opcode::Close | Opcode::Ping | Opcode::Pong | Opcode::Reserved(_) => {}
        }
        Some(UpstreamFrame { header, remaining_bytes: header.length })
    }

    /// Forwards or holds the header of a control frame. The header precedes its payload immediately.
    fn forward_or_hold_header(&mut self, header: &FrameHeader, output: &mut BytesMut) {
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        self.forward_or_hold(header.opcode, &bytes, output);
    }

    /// Forwards or holds bytes. Pings and pongs are always forwarded, because the client must reply to a ping
    /// even before the session is served.
    fn forward_or_hold(&mut self, opcode: Opcode, bytes: &[u8], output: &mut BytesMut) {
        let is_ping = matches!(opcode, Opcode::Ping | Opcode::Pong);
        if self.is_open || is_ping { output } else { &mut self.held }.extend_from_slice(bytes);
    }

    /// Processes a close frame, whose reason may be a refusal. An invalid payload is replaced by the close
    /// code and reason of the violation.
    fn process_close(
        &mut self,
        header: &FrameHeader,
        mut payload: BytesMut,
        output: &mut BytesMut,
    ) -> UpstreamEvent {
        if let Some(redactor) = &self.redactor {
            let partial_length = redactor.mask_keys(&mut payload);
            let partial_start = payload.len() - partial_length;
            redactor.mask_partial_key(&mut payload[partial_start..]);
        }
        self.has_closed = true;
        let (code, reason) = websocket_frame::parse_close(&payload);
        let payload = match validate_close(&payload) {
            Err(violation) if self.dialect.is_inspected() => {
                let (code, reason) = violation.close();
                close_payload(code, reason)
            }
            Ok(_) | Err(_) => payload.to_vec(),
        };
        self.forward_or_hold_header(&FrameHeader { length: payload.len() as u64, ..*header }, output);
        self.forward_or_hold(header.opcode, &payload, output);
        let follows_unknown_error = self.has_unknown_error && !self.is_served;
        UpstreamEvent::Close(classify_close(code, &reason, follows_unknown_error, self.has_token))
    }

    /// Redacts keys in the available bytes of a frame. Returns the number of bytes that may be forwarded.
    ///
    /// Bytes that may be the beginning of a key wait for the following bytes. At the end of the frame, they are
    /// redacted except for the part that a key's short form shows. The search then continues in the next
    /// frame of the message.
    fn redact_payload(
        &mut self,
        header: &FrameHeader,
        input: &mut BytesMut,
        available: usize,
        is_whole: bool,
    ) -> usize {
        let Some(redactor) = &self.redactor else { return available };
        // Payload that an extension has changed cannot be read.
        if header.reserved != 0 || header.mask.is_some() {
            return available;
        }
        let mut preceding = Vec::new();
        if !header.opcode.is_control() {
            std::mem::swap(&mut preceding, &mut self.partial_key);
        }
        let chunk = &mut input[..available];
        let partial_length = if preceding.is_empty() {
            redactor.mask_keys(chunk)
        } else {
            let mut joined = [&preceding, &*chunk].concat();
            let partial_length = redactor.mask_keys(&mut joined);
            chunk.copy_from_slice(joined.get(preceding.len()..).unwrap_or_default());
            partial_length
        };
        // The bytes that may be the beginning of a key consist of a part in this chunk, and a part that was already
        // forwarded.
        let (in_chunk, forwarded) = (partial_length.min(available), partial_length.saturating_sub(available));
        let mut partial_key = preceding.split_off(preceding.len() - forwarded);
        if !is_whole {
            if !header.opcode.is_control() {
                self.partial_key = partial_key;
            }
            return available - in_chunk;
        }
        partial_key.extend_from_slice(chunk.get(available - in_chunk..).unwrap_or_default());
        let mut redacted = partial_key.clone();
        redactor.mask_partial_key(&mut redacted);
        chunk[available - in_chunk..].copy_from_slice(&redacted[forwarded..]);
        if !header.opcode.is_control() && !header.is_final {
            self.partial_key = partial_key;
        }
        available
    }

    /// Appends `chunk` to the text of the current message, unless the message becomes too long for a refusal.
    fn collect_text(&mut self, chunk: &[u8]) {
        let fits = |text: &Vec<u8>| text.len() + chunk.len() <= MAX_REFUSAL_BYTES;
        self.message_text = self.message_text.take().filter(fits);
        if let Some(text) = &mut self.message_text {
            text.extend_from_slice(chunk);
        }
    }

    /// Returns whether an incomplete message or the held frames are too long for a refusal.
    fn is_too_long_for_refusal(&self, is_in_message: bool) -> bool {
        let is_long = is_in_message && self.message_text.is_none();
        !self.is_served && (is_long || self.held.len() > MAX_HELD_BYTES)
    }

    /// Classifies a complete message. Returns `None` for a message of a served session that is not a refusal.
    fn classify_message(&mut self) -> Option<UpstreamEvent> {
        let kind = match &self.message_text {
            Some(text) if self.is_text && (!self.is_served || may_refuse(text)) => {
                let stage = if self.is_served { SessionStage::Served } else { SessionStage::Opening };
                classify_message(self.dialect, stage, text, self.has_token)
            }
            Some(_) | None => MessageKind::Useful,
        };
        if self.is_served {
            self.message_text = None;
        }
        self.has_unknown_error |= kind == MessageKind::UnknownError;
        let is_reported = !self.is_served || matches!(kind, MessageKind::Refused(_));
        is_reported.then_some(UpstreamEvent::Message(kind))
    }
}

/// Returns whether a message may be a refusal. Every refusal contains the word `error`, and few other messages do.
fn may_refuse(text: &[u8]) -> bool {
    memchr::memmem::find(text, b"error").is_some()
}
