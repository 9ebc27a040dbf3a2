//! The frames with which the proxy ends a session: an error in the provider's form, and close frames.

use bytes::BytesMut;
use serde_json::json;

use crate::elevenlabs::socket::Dialect;
use crate::policy::frame::{Head, Opcode, close_payload, mask};

/// The close code of a refusal.
pub(super) const POLICY: u16 = 1008;

/// A constant mask: the close frame under it contains nothing that needs an unpredictable one.
pub(super) const MASK: [u8; 4] = [0x4b, 0x65, 0x79, 0x63];

/// Adds an error of the proxy in the provider's form: a message and a close. The field that names
/// the kind of message in the socket's protocol stands beside those of text-to-speech errors.
pub(super) fn put_refusal(out: &mut BytesMut, dialect: Dialect, code: &str, message: &str) {
    let mut error = json!({ "message": message, "error": code, "code": POLICY });
    match dialect {
        Dialect::Transcription => error["message_type"] = "quota_exceeded".into(),
        Dialect::Agent => error["type"] = "error".into(),
        Dialect::Speech
        | Dialect::SpeechContexts
        | Dialect::Dialogue
        | Dialect::DialogueContexts
        | Dialect::Unknown
        | Dialect::Foreign => {}
    }
    put(out, Opcode::Text, error.to_string().as_bytes(), None);
    put_close(out, (POLICY, message), None);
}

/// Adds a close frame; for 1005, which stands for no code, one without a payload.
pub(super) fn put_close(out: &mut BytesMut, (code, reason): (u16, &str), masked: Option<[u8; 4]>) {
    const NONE: u16 = 1005;
    let payload = if code == NONE { Vec::new() } else { close_payload(code, reason) };
    put(out, Opcode::Close, &payload, masked);
}

/// Adds a complete frame.
pub(super) fn put(out: &mut BytesMut, opcode: Opcode, payload: &[u8], masked: Option<[u8; 4]>) {
    let length = payload.len() as u64;
    Head { is_final: true, reserved: 0, opcode, mask: masked, length }.write(out);
    let from = out.len();
    out.extend_from_slice(payload);
    if let Some(masked) = masked {
        mask(&mut out[from..], masked, 0);
    }
}
