//! Validates a stream of WebSocket frames against RFC 6455 as the bytes arrive, before they are forwarded.
//!
//! The validator is separate from the message parser, because a session that waits for a key does not parse messages
//! but must still detect a close frame or a violation immediately. It buffers only an incomplete header, an incomplete
//! character and the payload of a close frame: at most 143 bytes.

use super::{FrameHeader, MAX_HEADER_BYTES, Opcode, apply_mask, parse_header, validate_close};

/// The sender of the validated frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The client, whose frames are masked.
    Client,
    /// The provider, which is the server of the WebSocket, so that its frames are not masked. The payload of its close
    /// frame is not validated, so that the caller can also examine an invalid close reason.
    Server,
}

/// A frame that RFC 6455 forbids, or that Keychoir does not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A frame of the client has no mask (section 5.1).
    Unmasked,
    /// A frame of the provider has a mask (section 5.1).
    Masked,
    /// A reserved bit is set without a negotiated extension (section 5.2).
    ReservedBits,
    /// The opcode is reserved (section 5.2).
    ReservedOpcode,
    /// The length is not in its shortest encoding, or is above 2^63 (section 5.2).
    LengthEncoding,
    /// A control frame is fragmented (section 5.5).
    FragmentedControl,
    /// The payload of a control frame exceeds 125 bytes (section 5.5).
    LongControl,
    /// A continuation does not follow the start of a message (section 5.4).
    StrayContinuation,
    /// A message starts before the previous message has ended (section 5.4).
    InterruptedMessage,
    /// A close payload has one byte (section 5.5.1).
    ShortClose,
    /// A close code must not be sent (section 7.4).
    CloseCode,
    /// A close reason is not UTF-8 (section 5.5.1).
    CloseReason,
    /// A text message is not UTF-8 (section 5.6).
    TextEncoding,
    /// A binary message was sent on a WebSocket that accepts only JSON.
    NotJson,
    /// A message exceeds the buffer of a session.
    TooLarge,
}

impl Violation {
    /// Returns the code and reason of the close frame that reports the violation.
    #[must_use]
    pub const fn close(self) -> (u16, &'static str) {
        match self {
            Self::Unmasked => (1002, "Frames of a client must be masked."),
            Self::Masked => (1002, "Frames of a server must not be masked."),
            Self::ReservedBits => (1002, "A reserved bit is set and no extension was agreed on."),
            Self::ReservedOpcode => (1002, "The opcode is reserved."),
            Self::LengthEncoding => (1002, "The length of a frame is not in its shortest form."),
            Self::FragmentedControl => (1002, "A control frame must not be fragmented."),
            Self::LongControl => (1002, "A control frame may have 125 bytes at most."),
            Self::StrayContinuation => (1002, "A continuation needs a message that it continues."),
            Self::InterruptedMessage => (1002, "A message began before the last one ended."),
            Self::ShortClose => (1002, "A close needs a code of two bytes."),
            Self::CloseCode => (1002, "The close code is not one that may be sent."),
            Self::CloseReason => (1007, "The close reason is not UTF-8."),
            Self::TextEncoding => (1007, "The text is not UTF-8."),
            Self::NotJson => (1003, "Only JSON messages are understood here."),
            Self::TooLarge => (1009, "The message is larger than this session may hold."),
        }
    }
}

/// The result of the validation of one chunk of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValidationResult {
    /// Number of valid bytes at the start of the chunk. The rest must be dropped.
    pub valid_length: usize,
    /// The reason why the stream has ended, or `None` if it continues.
    pub end: Option<StreamEnd>,
}

/// The reason why no more bytes of a stream are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The sender has sent a close frame. Bytes after the close frame are dropped (section 5.5.1).
    Closed {
        /// The close code, or 1005 if the frame has none.
        code: u16,
    },
    /// The sender has violated the protocol.
    Violated(Violation),
}

/// A validator of the frames in one direction of a session.
#[derive(Clone, Debug)]
pub struct FrameValidator {
    sender: Sender,
    /// The first bytes of an incomplete header.
    header: [u8; MAX_HEADER_BYTES],
    header_length: usize,
    /// The frame whose payload is incomplete, or `None` while a header is expected.
    frame: Option<OpenFrame>,
    /// The type of the incomplete message, or `None` between two messages.
    message: Option<MessageType>,
    /// The first bytes of an incomplete UTF-8 character.
    character: [u8; 4],
    character_length: usize,
    /// The first bytes of a close payload.
    close_payload: [u8; MAX_CONTROL_PAYLOAD],
    end: Option<StreamEnd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MessageType {
    Text,
    Binary,
}

/// A frame and its number of processed payload bytes.
#[derive(Clone, Copy, Debug)]
struct OpenFrame {
    header: FrameHeader,
    processed: u64,
}

/// Maximum payload of a control frame in bytes.
pub const MAX_CONTROL_PAYLOAD: usize = 125;
/// Size of the buffer in which payloads are unmasked for validation.
const UNMASK_BUFFER_BYTES: usize = 1024;

impl FrameValidator {
    /// Creates a validator that expects the first byte after the handshake.
    #[must_use]
    pub const fn new(sender: Sender) -> Self {
        Self {
            sender,
            header: [0; MAX_HEADER_BYTES],
            header_length: 0,
            frame: None,
            message: None,
            character: [0; 4],
            character_length: 0,
            close_payload: [0; MAX_CONTROL_PAYLOAD],
            end: None,
        }
    }

    /// Returns the reason why no more bytes are accepted, if the stream has ended.
    #[must_use]
    pub const fn end(&self) -> Option<StreamEnd> {
        self.end
    }

    /// Validates the next chunk of the stream.
    pub fn validate(&mut self, chunk: &[u8]) -> ValidationResult {
        let mut valid_length = 0;
        // The offset of the current frame, if it starts in this chunk.
        let mut frame_start = None;
        while self.end.is_none() {
            if self.frame.is_none() && self.header_length == 0 {
                frame_start = Some(valid_length);
            }
            match self.process_bytes(chunk.get(valid_length..).unwrap_or_default()) {
                Ok(0) => break,
                Ok(processed) => valid_length += processed,
                Err(violation) => {
                    self.end = Some(StreamEnd::Violated(violation));
                    // No byte of the invalid frame is forwarded, so that a close frame can replace it.
                    valid_length = frame_start.unwrap_or(valid_length);
                }
            }
        }
        ValidationResult { valid_length, end: self.end }
    }

    /// Processes bytes of one header or payload and returns their number, or 0 if more input is needed.
    fn process_bytes(&mut self, input: &[u8]) -> Result<usize, Violation> {
        let Some(frame) = self.frame else { return self.process_header(input) };
        let remaining = usize::try_from(frame.header.length - frame.processed).unwrap_or(usize::MAX);
        let payload = &input[..remaining.min(input.len())];
        if payload.is_empty() {
            return Ok(0);
        }
        self.process_payload(frame, payload)?;
        self.record_progress(OpenFrame { processed: frame.processed + payload.len() as u64, ..frame })?;
        Ok(payload.len())
    }

    /// Parses a header, which may be split over chunks. Returns the number of its bytes in `input`.
    fn process_header(&mut self, input: &[u8]) -> Result<usize, Violation> {
        let buffered = self.header_length;
        let buffer = self.header.get_mut(buffered..).unwrap_or_default();
        let added = buffer.len().min(input.len());
        buffer[..added].copy_from_slice(&input[..added]);
        let Some((header, length)) = parse_header(&self.header[..buffered + added]) else {
            self.header_length = buffered + added;
            return Ok(added);
        };
        self.header_length = 0;
        self.validate_header(&header, length)?;
        match header.opcode {
            Opcode::Text => self.message = Some(MessageType::Text),
            Opcode::Binary => self.message = Some(MessageType::Binary),
            Opcode::Continuation | Opcode::Close | Opcode::Ping | Opcode::Pong | Opcode::Reserved(_) => {}
        }
        self.record_progress(OpenFrame { header, processed: 0 })?;
        Ok(length - buffered)
    }

    /// Checks whether a frame with the given `header`, whose encoding has `encoded_length` bytes, is allowed.
    fn validate_header(&self, header: &FrameHeader, encoded_length: usize) -> Result<(), Violation> {
        match (self.sender, header.mask) {
            (Sender::Client, None) => return Err(Violation::Unmasked),
            (Sender::Server, Some(_)) => return Err(Violation::Masked),
            (Sender::Client, Some(_)) | (Sender::Server, None) => {}
        }
        if header.reserved != 0 {
            return Err(Violation::ReservedBits);
        }
        if matches!(header.opcode, Opcode::Reserved(_)) {
            return Err(Violation::ReservedOpcode);
        }
        if encoded_length != header.encoded_length() || header.length >> 63 != 0 {
            return Err(Violation::LengthEncoding);
        }
        if header.opcode.is_control() {
            return match header.is_final {
                false => Err(Violation::FragmentedControl),
                true if header.length > MAX_CONTROL_PAYLOAD as u64 => Err(Violation::LongControl),
                true => Ok(()),
            };
        }
        match (header.opcode == Opcode::Continuation, self.message) {
            (true, None) => Err(Violation::StrayContinuation),
            (false, Some(_)) => Err(Violation::InterruptedMessage),
            (true, Some(_)) | (false, None) => Ok(()),
        }
    }

    /// Processes a part of a payload. Only text and close payloads need unmasking.
    fn process_payload(&mut self, frame: OpenFrame, payload: &[u8]) -> Result<(), Violation> {
        let is_close = frame.header.opcode == Opcode::Close;
        let is_text = !frame.header.opcode.is_control() && self.message == Some(MessageType::Text);
        if !is_close && !is_text {
            return Ok(());
        }
        let mut processed = frame.processed;
        let mut buffer = [0; UNMASK_BUFFER_BYTES];
        for chunk in payload.chunks(UNMASK_BUFFER_BYTES) {
            let unmasked = match frame.header.mask {
                Some(mask) => {
                    let unmasked = &mut buffer[..chunk.len()];
                    unmasked.copy_from_slice(chunk);
                    apply_mask(unmasked, mask, processed);
                    &*unmasked
                }
                None => chunk,
            };
            if is_close {
                let offset = usize::try_from(processed).unwrap_or(MAX_CONTROL_PAYLOAD);
                if let Some(part) = self.close_payload.get_mut(offset..offset + unmasked.len()) {
                    part.copy_from_slice(unmasked);
                }
            } else {
                self.validate_text(unmasked)?;
            }
            processed += chunk.len() as u64;
        }
        Ok(())
    }

    /// Validates a part of a text message, which may start and end within a character.
    fn validate_text(&mut self, mut text: &[u8]) -> Result<(), Violation> {
        while self.character_length > 0 {
            let Some((&byte, rest)) = text.split_first() else { return Ok(()) };
            // The index is valid, because no character is longer than four bytes.
            self.character[self.character_length] = byte;
            self.character_length += 1;
            text = rest;
            match std::str::from_utf8(&self.character[..self.character_length]) {
                Ok(_) => self.character_length = 0,
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return Err(Violation::TextEncoding),
            }
        }
        let Err(error) = std::str::from_utf8(text) else { return Ok(()) };
        if error.error_len().is_some() {
            return Err(Violation::TextEncoding);
        }
        let incomplete = text.get(error.valid_up_to()..).unwrap_or_default();
        self.character[..incomplete.len()].copy_from_slice(incomplete);
        self.character_length = incomplete.len();
        Ok(())
    }

    /// Records the progress of a frame. At its end, checks the close payload or the end of the message.
    fn record_progress(&mut self, frame: OpenFrame) -> Result<(), Violation> {
        if frame.processed < frame.header.length {
            self.frame = Some(frame);
            return Ok(());
        }
        self.frame = None;
        if frame.header.opcode == Opcode::Close {
            let length = usize::try_from(frame.processed).unwrap_or(MAX_CONTROL_PAYLOAD);
            let payload = self.close_payload.get(..length).unwrap_or_default();
            let code = match (validate_close(payload), self.sender) {
                (Ok(code), _) => code,
                (Err(violation), Sender::Client) => return Err(violation),
                (Err(_), Sender::Server) => super::parse_close(payload).0,
            };
            self.end = Some(StreamEnd::Closed { code });
        }
        if frame.header.is_final && !frame.header.opcode.is_control() {
            let is_truncated = self.character_length > 0;
            (self.message, self.character_length) = (None, 0);
            if is_truncated {
                return Err(Violation::TextEncoding);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
