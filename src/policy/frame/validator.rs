//! Validates a stream of WebSocket frames against RFC 6455, as the bytes arrive and before any of them is
//! processed. It is separate from the message reader, because a session that waits for a key parses no
//! messages and must still detect a close or a violation immediately.
//!
//! It stores only an incomplete head and an incomplete control payload: at most 139 bytes.

use super::{HEAD_BYTES_MAX, Head, Opcode, check_close, mask, read};

/// The sender of the validated frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The client: its frames are masked.
    Client,
    /// The server: its frames are not masked. The payload of its close frame is not validated, because
    /// the caller may recognize the reason of an invalid close.
    Server,
}

/// A frame that RFC 6455 forbids, or that this proxy does not accept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A frame of a client without a mask (section 5.1).
    Unmasked,
    /// A frame of a server with a mask (section 5.1).
    Masked,
    /// A reserved bit without a negotiated extension (section 5.2).
    ReservedBits,
    /// A reserved opcode (section 5.2).
    ReservedOpcode,
    /// A length in a longer form than needed, or above 2^63 (section 5.2).
    LengthForm,
    /// A fragmented control frame (section 5.5).
    FragmentedControl,
    /// A control frame of more than 125 bytes (section 5.5).
    LongControl,
    /// A continuation without a message (section 5.4).
    StrayContinuation,
    /// A new message before the end of the last one (section 5.4).
    InterruptedMessage,
    /// A close payload of one byte (section 5.5.1).
    ShortClose,
    /// A close code that may not be sent (section 7.4).
    CloseCode,
    /// A close reason that is not UTF-8 (section 5.5.1).
    CloseReason,
    /// A text message that is not UTF-8 (section 5.6).
    TextEncoding,
    /// A binary message on a WebSocket that accepts only JSON.
    NotJson,
    /// A message larger than the buffer of one session.
    TooLarge,
}

impl Violation {
    /// The code and the reason of the close frame that reports it.
    #[must_use]
    pub const fn close(self) -> (u16, &'static str) {
        match self {
            Self::Unmasked => (1002, "Frames of a client must be masked."),
            Self::Masked => (1002, "Frames of a server must not be masked."),
            Self::ReservedBits => (1002, "A reserved bit is set and no extension was agreed on."),
            Self::ReservedOpcode => (1002, "The opcode is reserved."),
            Self::LengthForm => (1002, "The length of a frame is not in its shortest form."),
            Self::FragmentedControl => (1002, "A control frame must not be fragmented."),
            Self::LongControl => (1002, "A control frame may have 125 bytes at most."),
            Self::StrayContinuation => (1002, "A continuation needs a message that it continues."),
            Self::InterruptedMessage => (1002, "A message began before the last one ended."),
            Self::ShortClose => (1002, "A close needs a code of two bytes."),
            Self::CloseCode => (1002, "The code of the close is not one that may be sent."),
            Self::CloseReason => (1007, "The reason of the close is not UTF-8."),
            Self::TextEncoding => (1007, "The text is not UTF-8."),
            Self::NotJson => (1003, "Only JSON messages are understood here."),
            Self::TooLarge => (1009, "The message is larger than this session may hold."),
        }
    }
}

/// The result of validating a piece of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Bytes at the start of the piece that are valid. The rest must be dropped.
    pub valid: usize,
    /// Why the rest is not valid.
    pub end: Option<StreamEnd>,
}

/// Why no more bytes of a stream are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The sender has closed: bytes after a close are dropped (section 5.5.1).
    Closed {
        /// The close code; 1005 for none.
        code: u16,
    },
    /// The sender has violated the protocol.
    Violated(Violation),
}

/// Validates one direction of a session.
#[derive(Clone, Debug)]
pub struct FrameValidator {
    sender: Sender,
    /// The first bytes of an incomplete head.
    head: [u8; HEAD_BYTES_MAX],
    head_length: usize,
    frame: Option<OpenFrame>,
    /// The message in progress, and whether it is text.
    message: Option<IsText>,
    /// The first bytes of an incomplete UTF-8 character.
    character: [u8; 4],
    character_length: usize,
    /// The first bytes of a close payload.
    close: [u8; CONTROL_BYTES_MAX],
    end: Option<StreamEnd>,
}

#[derive(Clone, Copy, Debug)]
struct IsText(bool);

/// A frame that is not complete.
#[derive(Clone, Copy, Debug)]
struct OpenFrame {
    head: Head,
    processed: u64,
}

/// The maximum payload of a control frame.
pub const CONTROL_BYTES_MAX: usize = 125;
/// Size of the buffer in which payload is unmasked for validation.
const UNMASK_BUFFER_BYTES: usize = 1024;

impl FrameValidator {
    /// A validator for the frames of `sender`, which starts at the first byte after the handshake.
    #[must_use]
    pub const fn new(sender: Sender) -> Self {
        Self {
            sender,
            head: [0; HEAD_BYTES_MAX],
            head_length: 0,
            frame: None,
            message: None,
            character: [0; 4],
            character_length: 0,
            close: [0; CONTROL_BYTES_MAX],
            end: None,
        }
    }

    /// Why no more bytes are accepted, if so.
    #[must_use]
    pub const fn end(&self) -> Option<StreamEnd> {
        self.end
    }

    /// Validates the next piece of the stream.
    pub fn check(&mut self, piece: &[u8]) -> Checked {
        let mut valid = 0;
        // The start of the current frame, when it is in this piece.
        let mut begin = None;
        while self.end.is_none() {
            if self.frame.is_none() && self.head_length == 0 {
                begin = Some(valid);
            }
            let rest = piece.get(valid..).unwrap_or_default();
            match self.step(rest) {
                Ok(0) => break,
                Ok(used) => valid += used,
                Err(violation) => {
                    self.end = Some(StreamEnd::Violated(violation));
                    // No byte of the invalid frame is forwarded, so that a close frame can replace it.
                    valid = begin.unwrap_or(valid);
                }
            }
        }
        Checked { valid, end: self.end }
    }

    /// Processes some bytes and returns their number; 0 when more are needed.
    fn step(&mut self, rest: &[u8]) -> Result<usize, Violation> {
        let Some(frame) = self.frame else { return self.begin(rest) };
        let left = frame.head.length - frame.processed;
        let available = usize::try_from(left).map_or(rest.len(), |left| left.min(rest.len()));
        let payload = rest.get(..available).unwrap_or_default();
        if available == 0 {
            return Ok(0);
        }
        self.payload(frame, payload)?;
        self.record_progress(OpenFrame { processed: frame.processed + available as u64, ..frame })?;
        Ok(available)
    }

    /// Parses a head. An incomplete one is assembled from its pieces.
    fn begin(&mut self, rest: &[u8]) -> Result<usize, Violation> {
        let before = self.head_length;
        let buffer = self.head.get_mut(before..).unwrap_or_default();
        let added = buffer.len().min(rest.len());
        buffer[..added].copy_from_slice(&rest[..added]);
        let Some((head, length)) = read(self.head.get(..before + added).unwrap_or_default()) else {
            self.head_length = before + added;
            return Ok(added);
        };
        self.head_length = 0;
        self.check_head(&head, length)?;
        if !head.opcode.is_control() && head.opcode != Opcode::Continuation {
            self.message = Some(IsText(head.opcode == Opcode::Text));
        }
        self.record_progress(OpenFrame { head, processed: 0 })?;
        Ok(length - before)
    }

    /// Whether a frame with this head, of `length` bytes, is allowed here.
    fn check_head(&self, head: &Head, length: usize) -> Result<(), Violation> {
        match (self.sender, head.mask) {
            (Sender::Client, None) => return Err(Violation::Unmasked),
            (Sender::Server, Some(_)) => return Err(Violation::Masked),
            (Sender::Client, Some(_)) | (Sender::Server, None) => {}
        }
        if head.reserved != 0 {
            return Err(Violation::ReservedBits);
        }
        if matches!(head.opcode, Opcode::Reserved(_)) {
            return Err(Violation::ReservedOpcode);
        }
        if length != head.bytes() || head.length >> 63 != 0 {
            return Err(Violation::LengthForm);
        }
        if head.opcode.is_control() {
            return match head.is_final {
                false => Err(Violation::FragmentedControl),
                true if head.length > CONTROL_BYTES_MAX as u64 => Err(Violation::LongControl),
                true => Ok(()),
            };
        }
        match (head.opcode == Opcode::Continuation, self.message) {
            (true, None) => Err(Violation::StrayContinuation),
            (false, Some(_)) => Err(Violation::InterruptedMessage),
            (true, Some(_)) | (false, None) => Ok(()),
        }
    }

    /// Validates a piece of a payload.
    fn payload(&mut self, frame: OpenFrame, mut payload: &[u8]) -> Result<(), Violation> {
        let is_close = frame.head.opcode == Opcode::Close;
        let is_text = !frame.head.opcode.is_control() && matches!(self.message, Some(IsText(true)));
        if !is_close && !is_text {
            return Ok(());
        }
        let mut processed = frame.processed;
        let mut buffer = [0; UNMASK_BUFFER_BYTES];
        while !payload.is_empty() {
            let (piece, rest) = payload.split_at(payload.len().min(UNMASK_BUFFER_BYTES));
            let plain = match frame.head.mask {
                Some(masked) => {
                    let plain = &mut buffer[..piece.len()];
                    plain.copy_from_slice(piece);
                    mask(plain, masked, processed);
                    &*plain
                }
                None => piece,
            };
            if is_close {
                let at = usize::try_from(processed).unwrap_or(CONTROL_BYTES_MAX);
                if let Some(slot) = self.close.get_mut(at..at + plain.len()) {
                    slot.copy_from_slice(plain);
                }
            } else {
                self.text(plain)?;
            }
            processed += piece.len() as u64;
            payload = rest;
        }
        Ok(())
    }

    /// Validates a piece of a text, which may begin and end within a character.
    fn text(&mut self, mut piece: &[u8]) -> Result<(), Violation> {
        while self.character_length > 0 {
            let Some((&byte, rest)) = piece.split_first() else { return Ok(()) };
            // No character is longer than the array: the fourth byte decides.
            self.character[self.character_length] = byte;
            self.character_length += 1;
            piece = rest;
            match std::str::from_utf8(&self.character[..self.character_length]) {
                Ok(_) => self.character_length = 0,
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return Err(Violation::TextEncoding),
            }
        }
        let Err(error) = std::str::from_utf8(piece) else { return Ok(()) };
        if error.error_len().is_some() {
            return Err(Violation::TextEncoding);
        }
        let incomplete = piece.get(error.valid_up_to()..).unwrap_or_default();
        self.character[..incomplete.len()].copy_from_slice(incomplete);
        self.character_length = incomplete.len();
        Ok(())
    }

    /// Records the progress of a frame, and processes its end.
    fn record_progress(&mut self, frame: OpenFrame) -> Result<(), Violation> {
        if frame.processed < frame.head.length {
            self.frame = Some(frame);
            return Ok(());
        }
        self.frame = None;
        if frame.head.opcode == Opcode::Close {
            let length = usize::try_from(frame.processed).unwrap_or(CONTROL_BYTES_MAX);
            let payload = self.close.get(..length).unwrap_or_default();
            let code = match (check_close(payload), self.sender) {
                (Ok(code), _) => code,
                (Err(violation), Sender::Client) => return Err(violation),
                (Err(_), Sender::Server) => super::read_close(payload).0,
            };
            self.end = Some(StreamEnd::Closed { code });
        }
        if frame.head.is_final && !frame.head.opcode.is_control() {
            let is_cut = self.character_length > 0;
            (self.message, self.character_length) = (None, 0);
            if is_cut {
                return Err(Violation::TextEncoding);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
