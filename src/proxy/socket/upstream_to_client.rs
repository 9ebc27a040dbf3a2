//! What the provider says, frame by frame, on its way to the client: as it came, but for keys, in
//! messages of any kind and in control frames. Until the session is known to be served, it waits here:
//! what is a refusal of a key, the client need never hear.

use std::sync::Arc;

use bytes::BytesMut;

use crate::policy::classify::Verdict;
use crate::policy::frame::{self, Head, Opcode, check_close, close_payload};
use crate::policy::socket::{Dialect, MessageKind, REFUSAL_BYTES_MAX, Stage, hear, hear_close};
use crate::secret::Redactor;

/// The provider's frames.
#[derive(Debug)]
pub(super) struct UpstreamToClient {
    dialect: Dialect,
    has_token: bool,
    redactor: Option<Arc<Redactor>>,
    /// Whether what comes goes to the client at once.
    is_open: bool,
    /// Whether something useful was said: from then on only refusals matter.
    is_served: bool,
    /// What the client has not been told.
    held: BytesMut,
    frame: Option<UpstreamFrame>,
    /// Whether more frames follow that belong to the message under way.
    is_in_message: bool,
    /// Whether the message under way is a text that can be read.
    is_text: bool,
    /// What was read of it; `None` when it is too long for a refusal.
    text: Option<Vec<u8>>,
    /// The end of what has gone on of the message under way, when a key may begin in it.
    open_key: Vec<u8>,
    /// Whether an error in unknown words was sent, which waits for the close behind it.
    has_unknown_error: bool,
    has_closed: bool,
    bytes: u64,
}

#[derive(Debug)]
struct UpstreamFrame {
    head: Head,
    left: u64,
}

/// What was said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum UpstreamEvent {
    /// A message.
    Message(MessageKind),
    /// The end, and what it means; `None` for one that refuses nothing.
    Close(Option<Verdict>),
}

/// A control frame has no more.
const CONTROL_BYTES_MAX: u64 = 125;
/// Who has said so much refuses nobody: asides and a refusal are far shorter.
const HELD_BYTES_MAX: usize = 4 * REFUSAL_BYTES_MAX;

impl UpstreamToClient {
    pub(super) fn new(dialect: Dialect, has_token: bool, redactor: Option<Arc<Redactor>>) -> Self {
        Self {
            dialect,
            has_token,
            redactor,
            // Nobody knows what would be said there instead.
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

    /// Whether the session is known to be served, or its end is to be told.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Whether something useful was said.
    pub(super) fn is_served(&self) -> bool {
        self.is_served
    }

    /// What was held goes to the client, and so does what comes.
    pub(super) fn open(&mut self, out: &mut BytesMut) {
        self.is_open = true;
        // Nobody asks for the first message any more.
        self.text = None;
        out.unsplit(std::mem::take(&mut self.held));
    }

    /// The client has brought a token of the provider's own: what is wrong with it is not the key's matter.
    pub(super) fn judge_token(&mut self) {
        self.has_token = true;
    }

    /// The session is served.
    pub(super) fn serve(&mut self, out: &mut BytesMut) {
        self.is_served = true;
        self.open(out);
    }

    /// Another speaks from here on; what was held, nobody hears.
    pub(super) fn restart(&mut self) {
        self.held = BytesMut::new();
        (self.frame, self.is_in_message, self.has_closed) = (None, false, false);
        (self.is_text, self.text) = (false, None);
        self.has_unknown_error = false;
        self.open_key = Vec::new();
    }

    /// What was held goes to the client, and nothing is decided by it.
    pub(super) fn pass_on(&mut self, out: &mut BytesMut) {
        out.unsplit(std::mem::take(&mut self.held));
    }

    /// Bytes of the frame under way that have not come: until then nothing may be put in between.
    pub(super) fn frame_left(&self) -> u64 {
        self.frame.as_ref().map_or(0, |frame| frame.left)
    }

    /// Whether a message has begun and not ended: no other may be put in between.
    pub(super) fn is_in_message(&self) -> bool {
        self.is_in_message
    }

    /// Whether the provider has said that it ends.
    pub(super) fn has_closed(&self) -> bool {
        self.has_closed
    }

    /// Bytes so far, heads of frames included.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first message, while nobody has heard it.
    pub(super) fn first(&self) -> &[u8] {
        self.text.as_deref().unwrap_or_default()
    }

    /// Memory of what waits here.
    pub(super) fn capacity(&self) -> usize {
        self.held.capacity() + self.text.as_ref().map_or(0, Vec::capacity) + self.open_key.capacity()
    }

    /// Looks at what was read; what may go on is in `out`.
    pub(super) fn take(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> Option<UpstreamEvent> {
        // What has come, and not what was announced.
        let before = inbox.len();
        let told = self.look(inbox, out);
        self.bytes += (before - inbox.len()) as u64;
        told
    }

    fn look(&mut self, inbox: &mut BytesMut, out: &mut BytesMut) -> Option<UpstreamEvent> {
        loop {
            let frame = match self.frame.take() {
                Some(frame) => frame,
                None => self.begin(inbox, out)?,
            };
            let has = usize::try_from(frame.left).map_or(inbox.len(), |left| left.min(inbox.len()));
            let is_whole = has as u64 == frame.left;
            let is_control = frame.head.opcode.is_control();
            let is_small = is_control && frame.head.length <= CONTROL_BYTES_MAX;
            let is_close = frame.head.opcode == Opcode::Close && is_small;
            // A control frame is small: it is passed on whole, or not at all.
            if !is_whole && (has == 0 || is_small) {
                self.frame = Some(frame);
                return None;
            }
            if is_close {
                let payload = inbox.split_to(has);
                return Some(self.close(&frame.head, payload, out));
            }
            if is_small {
                self.put_head(&frame.head, out);
            }
            let length = self.cover(&frame.head, inbox, has, is_whole);
            let piece = inbox.split_to(length);
            if !is_control {
                self.read(&piece);
            }
            self.put(frame.head.opcode, &piece, out);
            let left = frame.left - length as u64;
            let told = match left {
                0 if frame.head.is_final && !is_control => self.hear(),
                0 => None,
                _ => {
                    self.frame = Some(UpstreamFrame { head: frame.head, left });
                    None
                }
            };
            let is_useful = self.is_surely_useful(!is_control && left > 0);
            let told = match told {
                None | Some(UpstreamEvent::Message(MessageKind::Aside | MessageKind::UnknownError))
                    if is_useful =>
                {
                    Some(UpstreamEvent::Message(MessageKind::Useful))
                }
                told => told,
            };
            if told.is_some() || (left > 0 && length == 0) {
                return told;
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
                // What an extension has changed cannot be read.
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

    /// The head of a control frame, which goes with its payload.
    fn put_head(&mut self, head: &Head, out: &mut BytesMut) {
        let mut bytes = Vec::new();
        head.write(&mut bytes);
        self.put(head.opcode, &bytes, out);
    }

    /// Whoever is asked whether it is there must answer, whatever becomes of the session.
    fn put(&mut self, opcode: Opcode, bytes: &[u8], out: &mut BytesMut) {
        let is_question = matches!(opcode, Opcode::Ping | Opcode::Pong);
        if self.is_open || is_question { out } else { &mut self.held }.extend_from_slice(bytes);
    }

    /// The end of the provider, whose words may refuse a key. A payload that may not be sent becomes the
    /// close that answers it.
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
        UpstreamEvent::Close(hear_close(code, &reason, is_behind_error, self.has_token))
    }

    /// Covers keys in what has come of a frame; returns how much of it may go on. The begin of a key
    /// waits for the rest of it; at the end of the frame it is covered as far as no short form shows it,
    /// and the rest is looked for in the next frame of the message.
    fn cover(&mut self, head: &Head, inbox: &mut BytesMut, has: usize, is_whole: bool) -> usize {
        let Some(redactor) = &self.redactor else { return has };
        // What an extension has changed cannot be read.
        if head.reserved != 0 || head.mask.is_some() {
            return has;
        }
        let mut before = Vec::new();
        if !head.opcode.is_control() {
            std::mem::swap(&mut before, &mut self.open_key);
        }
        let piece = &mut inbox[..has];
        let open = if before.is_empty() {
            redactor.cover(piece)
        } else {
            let mut text = [&before, &*piece].concat();
            let open = redactor.cover(&mut text);
            piece.copy_from_slice(text.get(before.len()..).unwrap_or_default());
            open
        };
        // Of the open end, what is here, and what went on before.
        let (here, gone) = (open.min(has), open.saturating_sub(has));
        let mut end = before.split_off(before.len() - gone);
        if !is_whole {
            if !head.opcode.is_control() {
                self.open_key = end;
            }
            return has - here;
        }
        end.extend_from_slice(piece.get(has - here..).unwrap_or_default());
        let mut covered = end.clone();
        redactor.cover_end(&mut covered);
        piece[has - here..].copy_from_slice(&covered[gone..]);
        if !head.opcode.is_control() && !head.is_final {
            self.open_key = end;
        }
        has
    }

    fn read(&mut self, piece: &[u8]) {
        let fits = |text: &Vec<u8>| text.len() + piece.len() <= REFUSAL_BYTES_MAX;
        self.text = self.text.take().filter(fits);
        if let Some(text) = &mut self.text {
            text.extend_from_slice(piece);
        }
    }

    /// What is too long for a refusal need not end before it is heard.
    fn is_surely_useful(&self, is_in_message: bool) -> bool {
        let is_long = is_in_message && self.text.is_none();
        !self.is_served && (is_long || self.held.len() > HELD_BYTES_MAX)
    }

    fn hear(&mut self) -> Option<UpstreamEvent> {
        let heard = match &self.text {
            Some(text) if self.is_text && (!self.is_served || may_refuse(text)) => {
                let stage = if self.is_served { Stage::Served } else { Stage::Opening };
                hear(self.dialect, stage, text, self.has_token)
            }
            Some(_) | None => MessageKind::Useful,
        };
        if self.is_served {
            self.text = None;
        }
        self.has_unknown_error |= heard == MessageKind::UnknownError;
        let is_news = !self.is_served || matches!(heard, MessageKind::Refused(_));
        is_news.then_some(UpstreamEvent::Message(heard))
    }
}

/// Every refusal has this word in it, and hardly anything else.
fn may_refuse(text: &[u8]) -> bool {
    memchr::memmem::find(text, b"error").is_some()
}
