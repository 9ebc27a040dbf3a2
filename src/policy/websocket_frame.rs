//! Parses and encodes WebSocket frame headers and close payloads, and masks payloads (RFC 6455, section 5.2). Parsing
//! accepts invalid frames. [`FrameValidator`] and [`validate_close`] detect protocol violations. The module is in
//! `policy` because it is pure, and `proxy::socket` uses it.

mod validator;

pub use validator::{FrameValidator, MAX_CONTROL_PAYLOAD, Sender, StreamEnd, ValidationResult, Violation};

/// The type of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// The frame continues a message.
    Continuation,
    /// The frame starts a text message.
    Text,
    /// The frame starts a binary message.
    Binary,
    /// The frame closes the connection.
    Close,
    /// The frame tests whether the peer is alive.
    Ping,
    /// The frame is the response to a ping.
    Pong,
    /// An opcode that the protocol does not define.
    Reserved(u8),
}

impl Opcode {
    fn from_bits(bits: u8) -> Self {
        match bits {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            bits => Self::Reserved(bits),
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::Continuation => 0,
            Self::Text => 1,
            Self::Binary => 2,
            Self::Close => 8,
            Self::Ping => 9,
            Self::Pong => 10,
            Self::Reserved(bits) => bits,
        }
    }

    /// Whether the frame is a control frame, which may appear between the frames of a message.
    #[must_use]
    pub fn is_control(self) -> bool {
        self.bits() >= 8
    }
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Whether this is the last frame of its message.
    pub is_final: bool,
    /// The three bits for extensions. With `permessage-deflate`, 4 marks a compressed message.
    pub reserved: u8,
    /// The type of the frame.
    pub opcode: Opcode,
    /// The masking key of the payload, or `None` for an unmasked frame. Only frames of a client are masked.
    pub mask: Option<[u8; 4]>,
    /// Length of the payload in bytes.
    pub length: u64,
}

/// Length of the longest header in bytes.
pub const MAX_HEADER_BYTES: usize = 14;

/// Parses the header at the start of `bytes` and returns it with its length. Returns `None` if the header is
/// incomplete.
#[must_use]
pub fn parse_header(bytes: &[u8]) -> Option<(FrameHeader, usize)> {
    let (&first, &second) = (bytes.first()?, bytes.get(1)?);
    let (length, mask_offset) = match second & 0x7f {
        126 => (u64::from(u16::from_be_bytes(array_at(bytes, 2)?)), 4),
        127 => (u64::from_be_bytes(array_at(bytes, 2)?), 10),
        short => (u64::from(short), 2),
    };
    let is_masked = second & 0x80 != 0;
    let mask = if is_masked { Some(array_at(bytes, mask_offset)?) } else { None };
    let header = FrameHeader {
        is_final: first & 0x80 != 0,
        reserved: first >> 4 & 0x07,
        opcode: Opcode::from_bits(first & 0x0f),
        mask,
        length,
    };
    Some((header, mask_offset + if is_masked { 4 } else { 0 }))
}

/// Returns the `N` bytes at `offset`, or `None` if there are fewer.
fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}

impl FrameHeader {
    /// Returns the length in bytes of the shortest encoding.
    #[must_use]
    pub const fn encoded_length(&self) -> usize {
        let length = match self.length {
            0..=125 => 2,
            126..=0xffff => 4,
            _ => 10,
        };
        length + if self.mask.is_some() { 4 } else { 0 }
    }

    /// Appends the shortest encoding to `output`.
    pub fn encode(&self, output: &mut impl Extend<u8>) {
        let first = u8::from(self.is_final) << 7 | self.reserved << 4 | self.opcode.bits();
        let masked = u8::from(self.mask.is_some()) << 7;
        match (u8::try_from(self.length), u16::try_from(self.length)) {
            (Ok(short @ ..=125), _) => output.extend([first, masked | short]),
            (_, Ok(middle)) => {
                output.extend([first, masked | 126]);
                output.extend(middle.to_be_bytes());
            }
            (_, Err(_)) => {
                output.extend([first, masked | 127]);
                output.extend(self.length.to_be_bytes());
            }
        }
        output.extend(self.mask.into_iter().flatten());
    }
}

/// Masks or unmasks a part of a payload. `offset` is the number of payload bytes before this part.
pub fn apply_mask(payload: &mut [u8], mut mask: [u8; 4], offset: u64) {
    mask.rotate_left((offset % 4) as usize);
    let half = u64::from(u32::from_ne_bytes(mask));
    let word_mask = half << 32 | half;
    let (words, remainder) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ word_mask).to_ne_bytes();
    }
    for (byte, mask_byte) in remainder.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask_byte;
    }
}

/// The close code of a close frame without a code (RFC 6455, section 7.4.1).
const NO_CLOSE_CODE: u16 = 1005;

/// Encodes the payload of a close frame. The reason is truncated to the 123 bytes that fit.
#[must_use]
pub fn close_payload(code: u16, reason: &str) -> Vec<u8> {
    const MAX_REASON_LENGTH: usize = 123;
    let mut end = reason.len().min(MAX_REASON_LENGTH);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut payload = code.to_be_bytes().to_vec();
    payload.extend_from_slice(&reason.as_bytes()[..end]);
    payload
}

/// Parses the code and the reason of a close payload. The code is 1005 if the payload has none.
#[must_use]
pub fn parse_close(payload: &[u8]) -> (u16, String) {
    match payload.split_first_chunk::<2>() {
        Some((code, reason)) => (u16::from_be_bytes(*code), String::from_utf8_lossy(reason).into_owned()),
        None => (NO_CLOSE_CODE, String::new()),
    }
}

/// Validates a close payload and returns its code, which is 1005 if the payload has none.
///
/// # Errors
///
/// Fails if the payload is not allowed (RFC 6455, sections 5.5.1 and 7.4). The codes 1012 to 1014 were
/// registered later.
pub fn validate_close(payload: &[u8]) -> Result<u16, Violation> {
    match payload.split_first_chunk::<2>() {
        None if payload.is_empty() => Ok(NO_CLOSE_CODE),
        None => Err(Violation::ShortClose),
        Some((code, reason)) => match u16::from_be_bytes(*code) {
            code @ (1000..=1003 | 1007..=1014 | 3000..=4999) => {
                std::str::from_utf8(reason).map(|_| code).map_err(|_| Violation::CloseReason)
            }
            _ => Err(Violation::CloseCode),
        },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_examples_of_the_rfc_are_parsed() {
        let text =
            |mask, length| FrameHeader { is_final: true, reserved: 0, opcode: Opcode::Text, mask, length };
        assert_eq!(parse_header(b"\x81\x05Hello"), Some((text(None, 5), 2)));
        assert_eq!(
            parse_header(b"\x81\x85\x37\xfa\x21\x3d\x7f"),
            Some((text(Some([0x37, 0xfa, 0x21, 0x3d]), 5), 6))
        );
        assert_eq!(parse_header(b"\x82\x7e\x01\x00").unwrap().0.length, 256);
        assert_eq!(parse_header(b"\x82\x7f\0\0\0\0\0\x01\0\0").unwrap(), {
            let header = FrameHeader {
                is_final: true,
                reserved: 0,
                opcode: Opcode::Binary,
                mask: None,
                length: 65_536,
            };
            (header, 10)
        });
        let mut hello = *b"\x7f\x9f\x4d\x51\x58";
        apply_mask(&mut hello, [0x37, 0xfa, 0x21, 0x3d], 0);
        assert_eq!(&hello, b"Hello");
    }

    #[test]
    fn an_incomplete_header_is_not_parsed() {
        let frame = b"\xc1\xff\0\0\0\0\0\x01\0\0abcd";
        for end in 0..frame.len() {
            assert_eq!(
                parse_header(&frame[..end]),
                None,
                "{end} bytes must not be parsed as a complete header"
            );
        }
        assert_eq!(parse_header(frame).unwrap().1, MAX_HEADER_BYTES);
    }

    #[test]
    fn a_close_payload_has_a_code_and_a_reason() {
        assert_eq!(parse_close(&close_payload(1012, "restart")), (1012, "restart".to_owned()));
        assert_eq!(parse_close(b""), (1005, String::new()));
        assert_eq!(parse_close(b"\x03"), (1005, String::new()));
        let truncated = close_payload(1000, &"\u{e9}".repeat(100));
        assert_eq!(
            truncated.len(),
            2 + 122,
            "the payload must have at most 125 bytes, without a partial character"
        );
    }

    proptest! {
        #[test]
        fn a_header_round_trips(
            is_final: bool, reserved in 0_u8..8, opcode in 0_u8..16, mask in any::<Option<[u8; 4]>>(),
            length in prop_oneof![0_u64..130, 65_530_u64..65_540, any::<u64>()],
        ) {
            let header = FrameHeader { is_final, reserved, opcode: Opcode::from_bits(opcode), mask, length };
            let mut bytes = Vec::new();
            header.encode(&mut bytes);
            prop_assert_eq!(parse_header(&bytes), Some((header, bytes.len())));
        }

        #[test]
        fn a_payload_may_be_masked_in_parts(payload: Vec<u8>, mask: [u8; 4], split in 0_usize..64) {
            let split = split.min(payload.len());
            let expected: Vec<u8> =
                payload.iter().zip(mask.iter().cycle()).map(|(byte, mask_byte)| byte ^ mask_byte).collect();
            let mut masked = payload;
            let (start, end) = masked.split_at_mut(split);
            apply_mask(start, mask, 0);
            apply_mask(end, mask, split as u64);
            prop_assert_eq!(masked, expected);
        }
    }
}
