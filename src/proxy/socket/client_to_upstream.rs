//! Forwards the client's frames to the provider: messages without the client's credentials, and all other
//! frames unchanged. Messages that are charged by their characters are held until credits and a key are
//! reserved for them.

use bytes::{Buf, BytesMut};

use crate::elevenlabs::socket::{
    ContentCounter, CredentialBlanker, Dialect, MessageCount, NAMING_BYTES_MAX, SpokenText,
};
use crate::policy::frame::{self, Head, Opcode, Violation};

/// The state of the client's stream of frames.
#[derive(Debug)]
pub(super) struct ClientToUpstream {
    dialect: Dialect,
    /// Bytes of a frame that are awaited, so that smaller frames are forwarded in one piece.
    slice_bytes_max: usize,
    /// Maximum size of a message that is held.
    message_bytes_max: usize,
    frame: Option<ClientFrame>,
    message: Option<PendingMessage>,
    blanking: CredentialBlanker,
    counter: ContentCounter,
    /// Bytes of audio in the complete messages.
    audio_bytes: u64,
    /// The start of the held message, where identifiers may stand.
    text_start: Vec<u8>,
    /// The held message as it will be forwarded.
    staged: BytesMut,
    /// Whether the client has sent a close frame.
    has_closed: bool,
    bytes: u64,
}

/// A frame that is not complete yet.
#[derive(Debug)]
struct ClientFrame {
    head: Head,
    raw: BytesMut,
    left: u64,
    /// Bytes of payload that were forwarded.
    forwarded: u64,
    is_raw: bool,
    /// Whether its header was forwarded and some of its payload was not.
    is_partial: bool,
}

/// A message that is not complete yet.
#[derive(Clone, Copy, Debug, Default)]
struct PendingMessage {
    is_binary: bool,
    /// Whether its first frame was forwarded.
    is_begun: bool,
    /// Whether it is no JSON object, and is forwarded unread.
    is_foreign: bool,
}

/// The result of processing the client's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientMessage {
    /// All complete frames were forwarded.
    Forwarded,
    /// A complete message, which is held until it is [released](ClientToUpstream::release).
    Message(SpokenText),
    /// The client sent an invalid frame or message.
    Refused(Violation),
}

impl ClientToUpstream {
    pub(super) fn new(dialect: Dialect, slice_bytes_max: usize, message_bytes_max: usize) -> Self {
        Self {
            dialect,
            slice_bytes_max,
            message_bytes_max,
            frame: None,
            message: None,
            blanking: CredentialBlanker::default(),
            counter: ContentCounter::default(),
            audio_bytes: 0,
            text_start: Vec::new(),
            staged: BytesMut::new(),
            has_closed: false,
            bytes: 0,
        }
    }

    /// Whether the client has sent a close frame.
    pub(super) fn has_closed(&self) -> bool {
        self.has_closed
    }

    /// Whether a frame was forwarded in part: no other frame may be inserted.
    pub(super) fn is_in_frame(&self) -> bool {
        self.frame.as_ref().is_some_and(|frame| frame.is_partial)
    }

    /// Bytes received so far, including frame headers.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of audio so far, including those of an incomplete message.
    pub(super) fn audio_bytes(&self) -> u64 {
        let counts_audio = self.dialect == Dialect::Transcription;
        self.audio_bytes + if counts_audio { self.counter.audio_so_far() } else { 0 }
    }

    /// Bytes that are held.
    pub(super) fn held_bytes(&self) -> usize {
        self.staged.len() + self.text_start.len()
    }

    /// Memory of the buffers for held bytes.
    pub(super) fn capacity(&self) -> usize {
        self.staged.capacity() + self.text_start.capacity()
    }

    /// Processes received bytes, and adds the bytes to forward to `out`. After a
    /// [message](ClientMessage::Message), nothing more is processed before it was
    /// [released](Self::release).
    pub(super) fn take(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> ClientMessage {
        // Counts received bytes, not announced ones.
        let before = inbox.len();
        let result = self.process(inbox, out).unwrap_or_else(ClientMessage::Refused);
        self.bytes += (before - inbox.len()) as u64;
        result
    }

    fn process(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> Result<ClientMessage, Violation> {
        loop {
            let mut frame = match self.frame.take() {
                Some(frame) => frame,
                None => match self.begin(inbox)? {
                    Some(frame) => frame,
                    None => return Ok(ClientMessage::Forwarded),
                },
            };
            let is_parsed = self.message.is_some_and(|message| !message.is_foreign);
            let has_progress = if frame.head.opcode.is_control() {
                self.control(&mut frame, inbox, out)
            } else if frame.is_raw || !is_parsed {
                forward_raw(&mut frame, inbox, out)
            } else {
                self.content(&mut frame, inbox, out)
            };
            let is_over = frame.left == 0 && frame.raw.is_empty();
            let ends_message = is_over && frame.head.is_final && !frame.head.opcode.is_control();
            if !is_over {
                self.frame = Some(frame);
            }
            if ends_message && let Some(message) = self.message.take() {
                let MessageCount { content, is_object } = self.counter.finish(self.dialect);
                if self.holds_messages() {
                    if message.is_binary && !is_object {
                        return Err(Violation::NotJson);
                    }
                    return Ok(ClientMessage::Message(content));
                }
                self.audio_bytes += content.audio_bytes;
            }
            if !has_progress {
                return Ok(ClientMessage::Forwarded);
            }
        }
    }

    /// The start of the held message.
    pub(super) fn held_start(&self) -> &[u8] {
        &self.text_start
    }

    /// Forwards the held message.
    pub(super) fn release(&mut self, out: &mut BytesMut) {
        out.unsplit(std::mem::take(&mut self.staged));
        self.text_start = Vec::new();
    }

    /// Whether messages are held, because their characters are charged.
    fn holds_messages(&self) -> bool {
        self.dialect.is_spoken()
    }

    /// Whether the content of messages is counted, so that every byte is processed.
    fn counts_content(&self) -> bool {
        self.holds_messages() || self.dialect == Dialect::Transcription
    }

    fn begin(&mut self, inbox: &mut BytesMut) -> Result<Option<ClientFrame>, Violation> {
        let Some((head, length)) = frame::read(inbox) else { return Ok(None) };
        let raw = inbox.split_to(length);
        // Payloads that an extension has changed, and unmasked frames, cannot be read; on the provider's
        // paths, frame validation rejects both before this.
        let is_raw = head.reserved != 0 || head.mask.is_none();
        let is_binary = head.opcode == Opcode::Binary;
        if is_binary || head.opcode == Opcode::Text {
            (self.blanking, self.counter) = (CredentialBlanker::default(), ContentCounter::default());
            let is_foreign = is_raw || is_binary && !self.dialect.is_read();
            self.message = Some(PendingMessage { is_binary, is_foreign, is_begun: false });
        }
        let declared = usize::try_from(head.length).unwrap_or(usize::MAX);
        if self.holds_messages() && declared.saturating_add(self.staged.len()) > self.message_bytes_max {
            return Err(Violation::TooLarge);
        }
        Ok(Some(ClientFrame { head, raw, left: head.length, forwarded: 0, is_raw, is_partial: false }))
    }

    /// Forwards a control frame, which may come between the frames of a message, and records a close.
    fn control(&mut self, frame: &mut ClientFrame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        if frame.head.opcode == Opcode::Close {
            self.has_closed = true;
        }
        forward_raw(frame, inbox, out)
    }

    /// Processes a piece of a message: a whole frame, or at least `slice_bytes_max` of it.
    fn content(&mut self, frame: &mut ClientFrame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        let Some(mask) = frame.head.mask else { return forward_raw(frame, inbox, out) };
        let available_bytes = available(frame.left, inbox);
        let is_whole = available_bytes as u64 == frame.left;
        let mut message = self.message.unwrap_or_default();
        if !is_whole && available_bytes < self.slice_bytes_max {
            let is_first = !message.is_begun && frame.forwarded == 0;
            if !self.counts_content() && is_first && is_not_json_object(inbox, mask) {
                message.is_foreign = true;
                self.message = Some(message);
                return forward_raw(frame, inbox, out);
            }
            return false;
        }
        let mut piece = inbox.split_to(available_bytes);
        frame::mask(&mut piece, mask, frame.forwarded);
        if self.counts_content() {
            self.counter.pass(&piece);
        }
        if self.holds_messages() && self.text_start.len() + piece.len() <= NAMING_BYTES_MAX {
            self.text_start.extend_from_slice(&piece);
        }
        let ends_message = is_whole && frame.head.is_final;
        let mut blanked = Vec::with_capacity(available_bytes);
        self.blanking.pass(&piece, &mut blanked);
        if ends_message {
            self.blanking.finish(&mut blanked);
        }
        let is_one_piece = is_whole && frame.forwarded == 0 && blanked.len() == available_bytes;
        frame.forwarded += available_bytes as u64;
        frame.left -= available_bytes as u64;
        let raw = std::mem::take(&mut frame.raw);
        if is_one_piece {
            self.staged.extend_from_slice(&raw);
            self.stage(&mut blanked, mask, &mut message);
        } else if ends_message || !blanked.is_empty() {
            let first = if message.is_binary { Opcode::Binary } else { Opcode::Text };
            let opcode = if message.is_begun { Opcode::Continuation } else { first };
            let length = blanked.len() as u64;
            Head { is_final: ends_message, opcode, length, ..frame.head }.write(&mut self.staged);
            self.stage(&mut blanked, mask, &mut message);
        }
        if self.blanking.is_foreign() && !ends_message && !self.counts_content() {
            message.is_foreign = true;
            if frame.left > 0 {
                // The rest of the frame is forwarded unread, as a frame of its own.
                frame.raw = rest_head(frame, mask, message);
            }
        }
        self.message = Some(message);
        if !self.holds_messages() {
            out.unsplit(std::mem::take(&mut self.staged));
        }
        true
    }

    fn stage(&mut self, blanked: &mut [u8], mask: [u8; 4], message: &mut PendingMessage) {
        frame::mask(blanked, mask, 0);
        self.staged.extend_from_slice(blanked);
        message.is_begun = true;
    }
}

/// The header for the rest of a frame whose start was forwarded as another frame.
fn rest_head(frame: &ClientFrame, mut mask: [u8; 4], message: PendingMessage) -> BytesMut {
    mask.rotate_left((frame.forwarded % 4) as usize);
    let first = if message.is_binary { Opcode::Binary } else { Opcode::Text };
    let opcode = if message.is_begun { Opcode::Continuation } else { first };
    let mut raw = BytesMut::new();
    Head { opcode, mask: Some(mask), length: frame.left, ..frame.head }.write(&mut raw);
    raw
}

/// Forwards the available bytes of a frame unchanged.
fn forward_raw(frame: &mut ClientFrame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
    let available_bytes = available(frame.left, inbox);
    let has_progress = available_bytes > 0 || !frame.raw.is_empty();
    out.extend_from_slice(&frame.raw);
    frame.raw.clear();
    out.extend_from_slice(&inbox[..available_bytes]);
    inbox.advance(available_bytes);
    frame.left -= available_bytes as u64;
    frame.forwarded += available_bytes as u64;
    frame.is_partial = frame.left > 0;
    has_progress
}

fn available(left: u64, inbox: &BytesMut) -> usize {
    usize::try_from(left).map_or(inbox.len(), |left| left.min(inbox.len()))
}

/// Maximum bytes at the start of a message that are searched for its first character, each time
/// bytes arrive.
const FIRST_CHARACTER_BYTES_MAX: usize = 64;

/// Whether the start of a message shows that it is no JSON object.
fn is_not_json_object(masked: &[u8], mask: [u8; 4]) -> bool {
    let start = masked.iter().take(FIRST_CHARACTER_BYTES_MAX);
    let mut bytes = start.zip(mask.iter().cycle()).map(|(byte, part)| byte ^ part);
    bytes.find(|byte| !b" \t\r\n".contains(byte)).is_some_and(|byte| byte != b'{')
}
