//! What a client says, frame by frame, on its way to the provider: texts without its credentials, all
//! else as it came. What will be charged waits for leave to go on.

use bytes::{Buf, BytesMut};

use crate::policy::frame::{self, Head, Opcode};
use crate::policy::socket::{Blanking, Dialect, SAID_BYTES_MAX};

/// The client's frames.
#[derive(Debug)]
pub(super) struct Upwards {
    /// Whether whole messages are shown before they go on.
    shows: bool,
    /// What is waited for of a frame, so that it can go on in one piece.
    slice_bytes_max: usize,
    frame: Option<Frame>,
    text: Option<Text>,
    blanking: Blanking,
    /// The message that is shown.
    said: Vec<u8>,
    /// It, as it will go on.
    staged: BytesMut,
    /// Whether the client has closed.
    has_closed: bool,
    bytes: u64,
}

/// A frame of which more must come.
#[derive(Debug)]
struct Frame {
    head: Head,
    raw: BytesMut,
    left: u64,
    /// Payload that went on.
    passed: u64,
    is_raw: bool,
}

/// A text message under way.
#[derive(Clone, Copy, Debug, Default)]
struct Text {
    /// Its first frame has gone on.
    is_begun: bool,
    /// It is no JSON object: nothing of it is looked at.
    is_foreign: bool,
    /// It is too long to be shown.
    is_long: bool,
}

impl Upwards {
    pub(super) fn new(dialect: Dialect, slice_bytes_max: usize) -> Self {
        Self {
            shows: dialect.is_spoken() || dialect == Dialect::Transcription,
            slice_bytes_max,
            frame: None,
            text: None,
            blanking: Blanking::default(),
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
        self.frame.as_ref().is_some_and(|frame| frame.passed > 0 || frame.raw.is_empty())
    }

    /// Bytes so far, heads of frames included.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Looks at what was read; what may go on is in `out`. Returns whether a whole message is shown, by
    /// [`said`](Self::said): then nothing more is looked at before it was [released](Self::release).
    pub(super) fn take(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        // What has come, and not what was announced.
        let before = inbox.len();
        let shows = self.look(inbox, out);
        self.bytes += (before - inbox.len()) as u64;
        shows
    }

    fn look(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        loop {
            let Some(mut frame) = self.frame.take().or_else(|| self.begin(inbox)) else { return false };
            let is_text = self.text.is_some_and(|text| !text.is_foreign);
            let is_moved = if frame.head.opcode.is_control() {
                self.control(&mut frame, inbox, out)
            } else if frame.is_raw || !is_text {
                pass(&mut frame, inbox, out)
            } else {
                self.text(&mut frame, inbox, out)
            };
            let is_over = frame.left == 0 && frame.raw.is_empty();
            let ends_message = is_over && frame.head.is_final && !frame.head.opcode.is_control();
            if !is_over {
                self.frame = Some(frame);
            }
            if ends_message && let Some(text) = self.text.take() {
                if self.shows && !text.is_long && !text.is_foreign {
                    return true;
                }
                self.release(out);
            }
            if !is_moved {
                return false;
            }
        }
    }

    /// The message that is shown.
    pub(super) fn said(&self) -> &[u8] {
        &self.said
    }

    /// The message that was shown goes on.
    pub(super) fn release(&mut self, out: &mut BytesMut) {
        out.unsplit(std::mem::take(&mut self.staged));
        self.said = Vec::new();
    }

    fn begin(&mut self, inbox: &mut BytesMut) -> Option<Frame> {
        let (head, length) = frame::read(inbox)?;
        let raw = inbox.split_to(length);
        // What an extension has changed cannot be read, and neither can what breaks the rules.
        let is_raw = head.reserved != 0 || head.mask.is_none();
        match head.opcode {
            Opcode::Text => {
                self.blanking = Blanking::default();
                self.text = Some(Text { is_foreign: is_raw, ..Text::default() });
            }
            Opcode::Binary => self.text = None,
            Opcode::Continuation | Opcode::Close | Opcode::Ping | Opcode::Pong | Opcode::Reserved(_) => {}
        }
        Some(Frame { head, raw, left: head.length, passed: 0, is_raw })
    }

    /// A frame between those of a message; its end is noted.
    fn control(&mut self, frame: &mut Frame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        if frame.head.opcode == Opcode::Close {
            self.has_closed = true;
        }
        pass(frame, inbox, out)
    }

    /// A piece of a text: a whole frame, or as much as is waited for.
    fn text(&mut self, frame: &mut Frame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
        let Some(mask) = frame.head.mask else { return pass(frame, inbox, out) };
        let has = available(frame.left, inbox);
        let is_whole = has as u64 == frame.left;
        let mut text = self.text.unwrap_or_default();
        if !is_whole && has < self.slice_bytes_max {
            if !text.is_begun && frame.passed == 0 && begins_foreign(inbox, mask) {
                text.is_foreign = true;
                self.text = Some(text);
                return pass(frame, inbox, out);
            }
            return false;
        }
        let mut piece = inbox.split_to(has);
        frame::mask(&mut piece, mask, frame.passed);
        let ends = is_whole && frame.head.is_final;
        if self.shows && !text.is_long {
            text.is_long = self.said.len() + piece.len() > SAID_BYTES_MAX;
            if !text.is_long {
                self.said.extend_from_slice(&piece);
            }
        }
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
            self.stage(&mut clean, mask, &mut text);
        } else if ends || !clean.is_empty() {
            let opcode = if text.is_begun { Opcode::Continuation } else { Opcode::Text };
            let length = clean.len() as u64;
            Head { is_final: ends, opcode, length, ..frame.head }.write(&mut self.staged);
            self.stage(&mut clean, mask, &mut text);
        }
        if self.blanking.is_foreign() && !ends {
            text.is_foreign = true;
        }
        self.text = Some(text);
        if !self.shows || text.is_long || text.is_foreign {
            out.unsplit(std::mem::take(&mut self.staged));
        }
        true
    }

    fn stage(&mut self, clean: &mut [u8], mask: [u8; 4], text: &mut Text) {
        frame::mask(clean, mask, 0);
        self.staged.extend_from_slice(clean);
        text.is_begun = true;
    }
}

/// As it came.
fn pass(frame: &mut Frame, inbox: &mut BytesMut, out: &mut BytesMut) -> bool {
    let has = available(frame.left, inbox);
    let is_moved = has > 0 || !frame.raw.is_empty();
    out.extend_from_slice(&frame.raw);
    frame.raw.clear();
    out.extend_from_slice(&inbox[..has]);
    inbox.advance(has);
    frame.left -= has as u64;
    frame.passed += has as u64;
    is_moved
}

fn available(left: u64, inbox: &BytesMut) -> usize {
    usize::try_from(left).map_or(inbox.len(), |left| left.min(inbox.len()))
}

/// Whether what has come of a text shows that it is no JSON object.
fn begins_foreign(masked: &[u8], mask: [u8; 4]) -> bool {
    let mut bytes = masked.iter().zip(mask.iter().cycle()).map(|(byte, part)| byte ^ part);
    bytes.find(|byte| !b" \t\r\n".contains(byte)).is_some_and(|byte| byte != b'{')
}
