//! What a client says, frame by frame, on its way to the provider: messages without its credentials,
//! all else as it came. What will be charged by its characters waits for leave to go on.

use bytes::{Buf, BytesMut};

use crate::policy::frame::{self, Head, Opcode, Violation};
use crate::policy::socket::{
    ContentCounter, CredentialBlanker, Dialect, MessageCount, NAMING_BYTES_MAX, SpokenText,
};

/// The client's frames.
#[derive(Debug)]
pub(super) struct ClientToUpstream {
    dialect: Dialect,
    /// What is waited for of a frame, so that it can go on in one piece.
    slice_bytes_max: usize,
    /// The largest message that may wait for leave.
    message_bytes_max: usize,
    frame: Option<ClientFrame>,
    message: Option<PendingMessage>,
    blanking: CredentialBlanker,
    counter: ContentCounter,
    /// Bytes of sound in the messages that have ended.
    audio_bytes: u64,
    /// The start of the message that waits, for what it names.
    said: Vec<u8>,
    /// The message that waits, as it will go on.
    staged: BytesMut,
    /// Whether the client has closed.
    has_closed: bool,
    bytes: u64,
}

/// A frame of which more must come.
#[derive(Debug)]
struct ClientFrame {
    head: Head,
    raw: BytesMut,
    left: u64,
    /// Payload that went on.
    passed: u64,
    is_raw: bool,
    /// Whether its head is out and some of its payload is not.
    is_cut: bool,
}

/// A message under way.
#[derive(Clone, Copy, Debug, Default)]
struct PendingMessage {
    is_binary: bool,
    /// Its first frame has gone on.
    is_begun: bool,
    /// It is no JSON object: nothing of it is looked at.
    is_foreign: bool,
}

/// What has come of the client's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientMessage {
    /// Nothing that must be waited for.
    Passed,
    /// A whole message, which waits to be [released](Upwards::release).
    Message(SpokenText),
    /// What is not accepted.
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
            said: Vec::new(),
            staged: BytesMut::new(),
            has_closed: false,
            bytes: 0,
        }
    }

    /// Whether the client has said that it ends.
    pub(super) fn has_closed(&self) -> bool {
        self.has_closed
    }

    /// Whether a frame has begun and not ended: nothing may be put in between.
    pub(super) fn is_in_frame(&self) -> bool {
        self.frame.as_ref().is_some_and(|frame| frame.is_cut)
    }

    /// Bytes so far, heads of frames included.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of sound so far, those of a message under way included.
    pub(super) fn audio_bytes(&self) -> u64 {
        let is_heard = self.dialect == Dialect::Transcription;
        self.audio_bytes + if is_heard { self.counter.audio_so_far() } else { 0 }
    }

    /// Bytes that are stored until they may go on.
    pub(super) fn held_bytes(&self) -> usize {
        self.staged.len() + self.said.len()
    }

    /// Memory of the buffers for that.
    pub(super) fn capacity(&self) -> usize {
        self.staged.capacity() + self.said.capacity()
    }

    /// Looks at what was read; what may go on is in `out`. Of a [message](Taken::PendingMessage) that waits,
    /// nothing more is looked at before it was [released](Self::release).
    pub(super) fn take(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> ClientMessage {
        // What has come, and not what was announced.
        let before = inbox.len();
        let taken = self.look(inbox, out).unwrap_or_else(ClientMessage::Refused);
        self.bytes += (before - inbox.len()) as u64;
        taken
    }

    fn look(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> Result<ClientMessage, Violation> {
        loop {
            let mut frame = match self.frame.take() {
                Some(frame) => frame,
                None => match self.begin(inbox)? {
                    Some(frame) => frame,
                    None => return Ok(ClientMessage::Passed),
                },
            };
            let is_looked_at = self.message.is_some_and(|message| !message.is_foreign);
            let is_moved = if frame.head.opcode.is_control() {
                self.control(&mut frame, inbox, out)
            } else if frame.is_raw || !is_looked_at {
                pass(&mut frame, inbox, out)
            } else {
                self.content(&mut frame, inbox, out)
            };
            let is_over = frame.left == 0 && frame.raw.is_empty();
            let ends_message = is_over && frame.head.is_final && !frame.head.opcode.is_control();
            if !is_over {
                self.frame = Some(frame);
            }
            if ends_message && let Some(message) = self.message.take() {
                let MessageCount { said, is_object } = self.counter.finish(self.dialect);
                if self.waits() {
                    if message.is_binary && !is_object {
                        return Err(Violation::NotJson);
                    }
                    return Ok(ClientMessage::Message(said));
                }
                self.audio_bytes += said.audio_bytes;
            }
            if !is_moved {
                return Ok(ClientMessage::Passed);
            }
        }
    }

    /// The start of the message that waits.
    pub(super) fn said(&self) -> &[u8] {
        &self.said
    }

    /// The message that waits goes on.
    pub(super) fn release(&mut self, out: &mut BytesMut) {
        out.unsplit(std::mem::take(&mut self.staged));
        self.said = Vec::new();
    }

    /// Whether messages wait for leave: their characters are charged.
    fn waits(&self) -> bool {
        self.dialect.is_spoken()
    }

    /// Whether messages are counted, so that every byte of them is looked at.
    fn counts(&self) -> bool {
        self.waits() || self.dialect == Dialect::Transcription
    }

    fn begin(&mut self, inbox: &mut BytesMut) -> Result<Option<ClientFrame>, Violation> {
        let Some((head, length)) = frame::read(inbox) else { return Ok(None) };
        let raw = inbox.split_to(length);
        // What an extension has changed cannot be read, and neither can what breaks the rules: on the
        // provider's paths, neither gets so far.
        let is_raw = head.reserved != 0 || head.mask.is_none();
        let is_binary = head.opcode == Opcode::Binary;
        if is_binary || head.opcode == Opcode::Text {
            (self.blanking, self.counter) = (CredentialBlanker::default(), ContentCounter::default());
            let is_foreign = is_raw || is_binary && !self.dialect.is_read();
            self.message = Some(PendingMessage { is_binary, is_foreign, is_begun: false });
        }
        let announced = usize::try_from(head.length).unwrap_or(usize::MAX);
        if self.waits() && announced.saturating_add(self.staged.len()) > self.message_bytes_max {
            return Err(Violation::TooLarge);
        }
        Ok(Some(ClientFrame { head, raw, left: head.length, passed: 0, is_raw, is_cut: false }))
    }

    /// A frame between those of a message; its end is noted.
    fn control(&mut self, frame: &mut ClientFrame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        if frame.head.opcode == Opcode::Close {
            self.has_closed = true;
        }
        pass(frame, inbox, out)
    }

    /// A piece of a message: a whole frame, or as much as is waited for.
    fn content(&mut self, frame: &mut ClientFrame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        let Some(mask) = frame.head.mask else { return pass(frame, inbox, out) };
        let has = available(frame.left, inbox);
        let is_whole = has as u64 == frame.left;
        let mut message = self.message.unwrap_or_default();
        if !is_whole && has < self.slice_bytes_max {
            let is_first = !message.is_begun && frame.passed == 0;
            if !self.counts() && is_first && begins_foreign(inbox, mask) {
                message.is_foreign = true;
                self.message = Some(message);
                return pass(frame, inbox, out);
            }
            return false;
        }
        let mut piece = inbox.split_to(has);
        frame::mask(&mut piece, mask, frame.passed);
        if self.counts() {
            self.counter.pass(&piece);
        }
        if self.waits() && self.said.len() + piece.len() <= NAMING_BYTES_MAX {
            self.said.extend_from_slice(&piece);
        }
        let ends = is_whole && frame.head.is_final;
        let mut clean = Vec::with_capacity(has);
        self.blanking.pass(&piece, &mut clean);
        if ends {
            self.blanking.finish(&mut clean);
        }
        let is_one_piece = is_whole && frame.passed == 0 && clean.len() == has;
        frame.passed += has as u64;
        frame.left -= has as u64;
        let raw = std::mem::take(&mut frame.raw);
        if is_one_piece {
            self.staged.extend_from_slice(&raw);
            self.stage(&mut clean, mask, &mut message);
        } else if ends || !clean.is_empty() {
            let first = if message.is_binary { Opcode::Binary } else { Opcode::Text };
            let opcode = if message.is_begun { Opcode::Continuation } else { first };
            let length = clean.len() as u64;
            Head { is_final: ends, opcode, length, ..frame.head }.write(&mut self.staged);
            self.stage(&mut clean, mask, &mut message);
        }
        if self.blanking.is_foreign() && !ends && !self.counts() {
            message.is_foreign = true;
            if frame.left > 0 {
                // The rest of the frame goes on unread, as a frame of its own.
                frame.raw = rest_of(frame, mask, message);
            }
        }
        self.message = Some(message);
        if !self.waits() {
            out.unsplit(std::mem::take(&mut self.staged));
        }
        true
    }

    fn stage(&mut self, clean: &mut [u8], mask: [u8; 4], message: &mut PendingMessage) {
        frame::mask(clean, mask, 0);
        self.staged.extend_from_slice(clean);
        message.is_begun = true;
    }
}

/// The head of what is left of a frame whose start went on as another.
fn rest_of(frame: &ClientFrame, mut mask: [u8; 4], message: PendingMessage) -> BytesMut {
    mask.rotate_left((frame.passed % 4) as usize);
    let first = if message.is_binary { Opcode::Binary } else { Opcode::Text };
    let opcode = if message.is_begun { Opcode::Continuation } else { first };
    let mut raw = BytesMut::new();
    Head { opcode, mask: Some(mask), length: frame.left, ..frame.head }.write(&mut raw);
    raw
}

/// As it came.
fn pass(frame: &mut ClientFrame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
    let has = available(frame.left, inbox);
    let is_moved = has > 0 || !frame.raw.is_empty();
    out.extend_from_slice(&frame.raw);
    frame.raw.clear();
    out.extend_from_slice(&inbox[..has]);
    inbox.advance(has);
    frame.left -= has as u64;
    frame.passed += has as u64;
    frame.is_cut = frame.left > 0;
    is_moved
}

fn available(left: u64, inbox: &BytesMut) -> usize {
    usize::try_from(left).map_or(inbox.len(), |left| left.min(inbox.len()))
}

/// Bytes at the start of a message that are looked at, each time some arrive, for its first sign.
const FIRST_SIGN_BYTES: usize = 64;

/// Whether what has come of a message shows that it is no JSON object.
fn begins_foreign(masked: &[u8], mask: [u8; 4]) -> bool {
    let start = masked.iter().take(FIRST_SIGN_BYTES);
    let mut bytes = start.zip(mask.iter().cycle()).map(|(byte, part)| byte ^ part);
    bytes.find(|byte| !b" \t\r\n".contains(byte)).is_some_and(|byte| byte != b'{')
}
