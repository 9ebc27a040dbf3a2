//! Encodes the frames with which Keychoir ends a session: close frames, and errors in the provider's format.

use bytes::BytesMut;
use serde_json::json;

use crate::elevenlabs::socket::Dialect;
use crate::policy::websocket_frame::{FrameHeader, Opcode, apply_mask, close_payload};

/// The close code of a refusal. RFC 6455, section 7.4.1, and the IANA registry define the codes.
pub(super) const POLICY_VIOLATION: u16 = 1008;
/// The close code of an endpoint that ends the session for a reason that is not an error of the receiver.
pub(super) const GOING_AWAY: u16 = 1001;
/// The close code of a server that restarts.
pub(super) const SERVICE_RESTART: u16 = 1012;
/// The close code of a server that is overloaded.
pub(super) const TRY_AGAIN_LATER: u16 = 1013;

/// The mask of close frames to the provider. It may be constant, because masks must be unpredictable only for
/// data that a client chooses.
pub(super) const CLOSE_FRAME_MASK: [u8; 4] = [0x4b, 0x65, 0x79, 0x63];

/// Appends an error of Keychoir in the provider's format: a message and a close frame. The message has the fields of a
/// text-to-speech error, and the field that contains the kind of a message in the session's protocol.
pub(super) fn put_refusal(output: &mut BytesMut, dialect: Dialect, code: &str, message: &str) {
    let mut error = json!({ "message": message, "error": code, "code": POLICY_VIOLATION });
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
    put_frame(output, Opcode::Text, error.to_string().as_bytes(), None);
    put_close(output, (POLICY_VIOLATION, message), None);
}

/// Appends a close frame. The frame has no payload for code 1005, which means that no code was sent.
pub(super) fn put_close(output: &mut BytesMut, (code, reason): (u16, &str), mask: Option<[u8; 4]>) {
    const NO_CODE: u16 = 1005;
    let payload = if code == NO_CODE { Vec::new() } else { close_payload(code, reason) };
    put_frame(output, Opcode::Close, &payload, mask);
}

/// Appends a complete frame.
pub(super) fn put_frame(output: &mut BytesMut, opcode: Opcode, payload: &[u8], mask: Option<[u8; 4]>) {
    let length = payload.len() as u64;
    FrameHeader { is_final: true, reserved: 0, opcode, mask, length }.encode(output);
    let payload_start = output.len();
    output.extend_from_slice(payload);
    if let Some(mask) = mask {
        apply_mask(&mut output[payload_start..], mask, 0);
    }
}
