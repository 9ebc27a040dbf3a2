//! Forwards the client's frames to the provider, blanks credentials in their messages, and counts the characters and
//! the audio in them. Messages that are charged by their characters are held until a key and credits are reserved.

use std::mem;

use bytes::{Buf, BytesMut};

use crate::elevenlabs::affinity::MAX_IDENTIFIER_MESSAGE_BYTES;
use crate::elevenlabs::socket::{ChargedContent, ContentCounter, CredentialBlanker, Dialect, MessageCount};
use crate::policy::websocket_frame::{self, FrameHeader, Opcode, Violation};

/// The state of the client's frame stream.
#[derive(Debug)]
pub(super) struct ClientToUpstream {
    dialect: Dialect,
    /// Frames below this number of bytes are buffered until they are complete. Larger frames are forwarded in parts of
    /// at least this size.
    max_frame_part: usize,
    /// Maximum size of a held message.
    max_message_size: usize,
    frame: Option<ClientFrame>,
    message: Option<PendingMessage>,
    blanker: CredentialBlanker,
    counter: ContentCounter,
    /// Bytes of audio in complete messages.
    audio_bytes: u64,
    /// The start of the held message, which may contain identifiers.
    pub(super) message_start: Vec<u8>,
    /// The frames of the held message, ready to be forwarded.
    staged: BytesMut,
    /// Whether the client has sent a close frame.
    pub(super) has_closed: bool,
    /// Bytes received so far, including frame headers.
    pub(super) received_bytes: u64,
}

/// A client frame whose payload is not complete yet.
#[derive(Debug)]
struct ClientFrame {
    header: FrameHeader,
    /// The encoded header, until it is forwarded.
    pending_header: BytesMut,
    /// Bytes of the payload that were not processed yet.
    remaining_bytes: u64,
    /// Bytes of the payload that were processed.
    processed_bytes: u64,
    /// Whether the payload cannot be read, and is forwarded unchanged.
    is_opaque: bool,
    /// Whether the header and not all of the payload was forwarded.
    is_partial: bool,
}

/// A client message whose last frame is not complete yet.
#[derive(Clone, Copy, Debug, Default)]
struct PendingMessage {
    is_binary: bool,
    /// Whether a frame of the message was forwarded or staged.
    has_output: bool,
    /// Whether the message is forwarded unchanged, because it cannot be read or is not a JSON object.
    is_opaque: bool,
}

impl PendingMessage {
    /// Returns the opcode of the next frame of the message.
    fn next_opcode(self) -> Opcode {
        match (self.has_output, self.is_binary) {
            (true, _) => Opcode::Continuation,
            (false, true) => Opcode::Binary,
            (false, false) => Opcode::Text,
        }
    }
}

/// The result of processing the client's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientMessage {
    /// No message is held, and more bytes are needed.
    Forwarded,
    /// A complete message is held until it is [released](ClientToUpstream::release_message).
    Held(ChargedContent),
    /// The client sent an invalid or too large message.
    Refused(Violation),
}

impl ClientToUpstream {
    pub(super) fn new(dialect: Dialect, max_frame_part: usize, max_message_size: usize) -> Self {
        Self {
            dialect,
            max_frame_part,
            max_message_size,
            frame: None,
            message: None,
            blanker: CredentialBlanker::default(),
            counter: ContentCounter::default(),
            audio_bytes: 0,
            message_start: Vec::new(),
            staged: BytesMut::new(),
            has_closed: false,
            received_bytes: 0,
        }
    }

    /// Returns whether a frame was forwarded in part, so that no other frame may be inserted.
    pub(super) fn is_in_frame(&self) -> bool {
        self.frame.as_ref().is_some_and(|frame| frame.is_partial)
    }

    /// Returns the number of bytes of audio received so far, including the bytes of an incomplete message.
    pub(super) fn audio_bytes(&self) -> u64 {
        let counts_audio = self.dialect == Dialect::Transcription;
        self.audio_bytes + if counts_audio { self.counter.audio_bytes_so_far() } else { 0 }
    }

    /// Returns the number of bytes of the held message.
    pub(super) fn held_bytes(&self) -> usize {
        self.staged.len() + self.message_start.len()
    }

    /// Returns the memory of the buffers for the held message.
    pub(super) fn capacity(&self) -> usize {
        self.staged.capacity() + self.message_start.capacity()
    }

    /// Processes the bytes in `input`, and appends the bytes to forward to `output`. While a message is
    /// [held](ClientMessage::Held), nothing may be processed until it is [released](Self::release_message).
    pub(super) fn process_input(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> ClientMessage {
        let available = input.len();
        let message = self.process_frames(input, output).unwrap_or_else(ClientMessage::Refused);
        self.received_bytes += (available - input.len()) as u64;
        message
    }

    /// Processes frames until a message is held, or more bytes are needed.
    ///
    /// # Errors
    ///
    /// Fails when the client sent an invalid frame or message.
    fn process_frames(
        &mut self,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> Result<ClientMessage, Violation> {
        loop {
            let mut frame = match self.frame.take() {
                Some(frame) => frame,
                None => match self.read_frame_header(input)? {
                    Some(frame) => frame,
                    None => return Ok(ClientMessage::Forwarded),
                },
            };
            let is_parsed = self.message.is_some_and(|message| !message.is_opaque);
            let has_progress = if frame.header.opcode.is_control() {
                // A control frame may be between the frames of a message.
                self.has_closed |= frame.header.opcode == Opcode::Close;
                forward_unchanged(&mut frame, input, output)
            } else if frame.is_opaque || !is_parsed {
                forward_unchanged(&mut frame, input, output)
            } else {
                self.process_payload(&mut frame, input, output)
            };
            let is_complete = frame.remaining_bytes == 0 && frame.pending_header.is_empty();
            let ends_message = is_complete && frame.header.is_final && !frame.header.opcode.is_control();
            if !is_complete {
                self.frame = Some(frame);
            }
            if ends_message && let Some(message) = self.message.take() {
                let MessageCount { content, is_object } = self.counter.finish(self.dialect);
                if self.holds_messages() {
                    if message.is_binary && !is_object {
                        return Err(Violation::NotJson);
                    }
                    return Ok(ClientMessage::Held(content));
                }
                self.audio_bytes += content.audio_bytes;
            }
            if !has_progress {
                return Ok(ClientMessage::Forwarded);
            }
        }
    }

    /// Forwards the held message.
    pub(super) fn release_message(&mut self, output: &mut BytesMut) {
        output.unsplit(mem::take(&mut self.staged));
        self.message_start = Vec::new();
    }

    /// Returns whether messages are held, because their characters are charged.
    fn holds_messages(&self) -> bool {
        self.dialect.generates_speech()
    }

    /// Returns whether the content of messages is counted, so that every byte is processed.
    fn counts_content(&self) -> bool {
        self.holds_messages() || self.dialect == Dialect::Transcription
    }

    /// Removes the next frame header from `input`. Returns `None` if the header is incomplete.
    ///
    /// # Errors
    ///
    /// Fails when the message must be held and is too large.
    fn read_frame_header(&mut self, input: &mut BytesMut) -> Result<Option<ClientFrame>, Violation> {
        let Some((header, length)) = websocket_frame::parse_header(input) else { return Ok(None) };
        let pending_header = input.split_to(length);
        // Payload that an extension has changed cannot be read, and neither can an unmasked frame. On the
        // provider's paths, frame validation has already rejected both.
        let is_opaque = header.reserved != 0 || header.mask.is_none();
        let is_binary = header.opcode == Opcode::Binary;
        if is_binary || header.opcode == Opcode::Text {
            (self.blanker, self.counter) = (CredentialBlanker::default(), ContentCounter::default());
            let is_opaque = is_opaque || is_binary && !self.dialect.is_inspected();
            self.message = Some(PendingMessage { is_binary, is_opaque, has_output: false });
        }
        let declared = usize::try_from(header.length).unwrap_or(usize::MAX);
        if self.holds_messages() && declared.saturating_add(self.staged.len()) > self.max_message_size {
            return Err(Violation::TooLarge);
        }
        Ok(Some(ClientFrame {
            header,
            pending_header,
            remaining_bytes: header.length,
            processed_bytes: 0,
            is_opaque,
            is_partial: false,
        }))
    }

    /// Processes the payload of a frame: all of it, or at least `max_frame_part`. Returns whether enough
    /// bytes were available.
    fn process_payload(
        &mut self,
        frame: &mut ClientFrame,
        input: &mut BytesMut,
        output: &mut BytesMut,
    ) -> bool {
        let Some(mask) = frame.header.mask else { return forward_unchanged(frame, input, output) };
        let available = available_bytes(frame.remaining_bytes, input);
        let is_whole = available as u64 == frame.remaining_bytes;
        let mut message = self.message.unwrap_or_default();
        if !is_whole && available < self.max_frame_part {
            let is_first = !message.has_output && frame.processed_bytes == 0;
            if !self.counts_content() && is_first && is_not_json_object(input, mask) {
                message.is_opaque = true;
                self.message = Some(message);
                return forward_unchanged(frame, input, output);
            }
            return false;
        }
        let mut chunk = input.split_to(available);
        websocket_frame::apply_mask(&mut chunk, mask, frame.processed_bytes);
        if self.counts_content() {
            self.counter.count_chunk(&chunk);
        }
        if self.holds_messages() && self.message_start.len() + chunk.len() <= MAX_IDENTIFIER_MESSAGE_BYTES {
            self.message_start.extend_from_slice(&chunk);
        }
        let ends_message = is_whole && frame.header.is_final;
        let mut blanked = Vec::with_capacity(available);
        self.blanker.blank_chunk(&chunk, &mut blanked);
        if ends_message {
            self.blanker.finish(&mut blanked);
        }
        let is_single_frame = is_whole && frame.processed_bytes == 0 && blanked.len() == available;
        frame.processed_bytes += available as u64;
        frame.remaining_bytes -= available as u64;
        let original_header = mem::take(&mut frame.pending_header);
        if is_single_frame || ends_message || !blanked.is_empty() {
            if is_single_frame {
                self.staged.extend_from_slice(&original_header);
            } else {
                let (opcode, length) = (message.next_opcode(), blanked.len() as u64);
                FrameHeader { is_final: ends_message, opcode, length, ..frame.header }
                    .encode(&mut self.staged);
            }
            websocket_frame::apply_mask(&mut blanked, mask, 0);
            self.staged.extend_from_slice(&blanked);
            message.has_output = true;
        }
        if self.blanker.is_not_object() && !ends_message && !self.counts_content() {
            message.is_opaque = true;
            if frame.remaining_bytes > 0 {
                // The rest of the payload is forwarded unread, as a separate frame.
                frame.pending_header = header_for_remaining(frame, mask, message);
            }
        }
        self.message = Some(message);
        if !self.holds_messages() {
            output.unsplit(mem::take(&mut self.staged));
        }
        true
    }
}

/// Encodes the header for the remaining payload of a frame, whose start was forwarded as a separate frame.
fn header_for_remaining(frame: &ClientFrame, mut mask: [u8; 4], message: PendingMessage) -> BytesMut {
    mask.rotate_left((frame.processed_bytes % 4) as usize);
    let (opcode, length) = (message.next_opcode(), frame.remaining_bytes);
    let mut encoded = BytesMut::new();
    FrameHeader { opcode, mask: Some(mask), length, ..frame.header }.encode(&mut encoded);
    encoded
}

/// Forwards the available bytes of a frame unchanged. Returns whether any bytes were available.
fn forward_unchanged(frame: &mut ClientFrame, input: &mut BytesMut, output: &mut BytesMut) -> bool {
    let available = available_bytes(frame.remaining_bytes, input);
    let has_progress = available > 0 || !frame.pending_header.is_empty();
    output.extend_from_slice(&frame.pending_header);
    frame.pending_header.clear();
    output.extend_from_slice(&input[..available]);
    input.advance(available);
    frame.remaining_bytes -= available as u64;
    frame.processed_bytes += available as u64;
    frame.is_partial = frame.remaining_bytes > 0;
    has_progress
}

/// Returns the number of bytes in `input` that belong to a payload of which `remaining` bytes are left.
fn available_bytes(remaining: u64, input: &BytesMut) -> usize {
    usize::try_from(remaining).map_or(input.len(), |remaining| remaining.min(input.len()))
}

/// Maximum number of bytes at the start of a message that are searched for its first character, each time
/// bytes arrive.
const MAX_FIRST_CHARACTER_SCAN: usize = 64;

/// Returns whether the start of a message shows that it is not a JSON object.
fn is_not_json_object(masked: &[u8], mask: [u8; 4]) -> bool {
    let start = masked.iter().take(MAX_FIRST_CHARACTER_SCAN);
    let mut bytes = start.zip(mask.iter().cycle()).map(|(byte, mask_byte)| byte ^ mask_byte);
    bytes.find(|byte| !b" \t\r\n".contains(byte)).is_some_and(|byte| byte != b'{')
}
