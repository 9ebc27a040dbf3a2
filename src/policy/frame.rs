//! Parses and writes the heads of WebSocket frames (RFC 6455, section 5.2), without validation.
//! Violations of the protocol are detected by the [`FrameValidator`].

mod validator;

pub use validator::{CONTROL_BYTES_MAX, Checked, FrameValidator, Sender, StreamEnd, Violation};

/// The type of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opcode {
    /// A continuation of a message.
    Continuation,
    /// The start of a text message.
    Text,
    /// The start of a binary message.
    Binary,
    /// The close of the connection.
    Close,
    /// A keep-alive probe.
    Ping,
    /// The response to a ping.
    Pong,
    /// An opcode that is not defined yet.
    Reserved(u8),
}

impl Opcode {
    fn of(bits: u8) -> Self {
        match bits {
            0 => Self::Continuation,
            1 => Self::Text,
            2 => Self::Binary,
            8 => Self::Close,
            9 => Self::Ping,
            10 => Self::Pong,
            other => Self::Reserved(other),
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

    /// Whether it is a control frame, which may appear between the frames of a message.
    #[must_use]
    pub fn is_control(self) -> bool {
        self.bits() >= 8
    }
}

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Whether it is the last frame of its message.
    pub is_final: bool,
    /// The three bits for extensions; with `permessage-deflate`, 4 marks a compressed message.
    pub reserved: u8,
    /// The type of the frame.
    pub opcode: Opcode,
    /// The masking key of the payload; a client's frames have one.
    pub mask: Option<[u8; 4]>,
    /// Length of the payload in bytes.
    pub length: u64,
}

/// The length of the longest head.
pub const HEAD_BYTES_MAX: usize = 14;

/// Parses the head at the start of `bytes`, and returns its length; `None` when it is incomplete.
#[must_use]
pub fn read(bytes: &[u8]) -> Option<(Head, usize)> {
    let (&first, &second) = (bytes.first()?, bytes.get(1)?);
    let (length, at) = match second & 0x7f {
        126 => (u64::from(u16::from_be_bytes(array(bytes, 2)?)), 4),
        127 => (u64::from_be_bytes(array(bytes, 2)?), 10),
        short => (u64::from(short), 2),
    };
    let is_masked = second & 0x80 != 0;
    let mask = if is_masked { Some(array(bytes, at)?) } else { None };
    let head = Head {
        is_final: first & 0x80 != 0,
        reserved: first >> 4 & 0x07,
        opcode: Opcode::of(first & 0x0f),
        mask,
        length,
    };
    Some((head, at + if is_masked { 4 } else { 0 }))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

impl Head {
    /// The length of its shortest form.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        let length = match self.length {
            0..=125 => 2,
            126..=0xffff => 4,
            _ => 10,
        };
        length + if self.mask.is_some() { 4 } else { 0 }
    }

    /// Appends it to `out`, with its length in the shortest form.
    pub fn write(&self, out: &mut impl Extend<u8>) {
        let first = u8::from(self.is_final) << 7 | self.reserved << 4 | self.opcode.bits();
        let masked = u8::from(self.mask.is_some()) << 7;
        match (u8::try_from(self.length), u16::try_from(self.length)) {
            (Ok(short @ ..=125), _) => out.extend([first, masked | short]),
            (_, Ok(middle)) => {
                out.extend([first, masked | 126]);
                out.extend(middle.to_be_bytes());
            }
            (_, Err(_)) => {
                out.extend([first, masked | 127]);
                out.extend(self.length.to_be_bytes());
            }
        }
        out.extend(self.mask.into_iter().flatten());
    }
}

/// Masks or unmasks `bytes`; `offset` is the number of payload bytes before them.
pub fn mask(bytes: &mut [u8], mask: [u8; 4], offset: u64) {
    let mut rotated_mask = mask;
    rotated_mask.rotate_left((offset % 4) as usize);
    let mask_word = u64::from_ne_bytes([
        rotated_mask[0],
        rotated_mask[1],
        rotated_mask[2],
        rotated_mask[3],
        rotated_mask[0],
        rotated_mask[1],
        rotated_mask[2],
        rotated_mask[3],
    ]);
    let mut chunks = bytes.chunks_exact_mut(8);
    for chunk in &mut chunks {
        if let Ok(word) = <[u8; 8]>::try_from(&*chunk) {
            chunk.copy_from_slice(&(u64::from_ne_bytes(word) ^ mask_word).to_ne_bytes());
        }
    }
    for (byte, part) in chunks.into_remainder().iter_mut().zip(rotated_mask.iter().cycle()) {
        *byte ^= part;
    }
}

/// The payload of a close frame: a code, and a reason that is cut at 123 bytes.
#[must_use]
pub fn close_payload(code: u16, reason: &str) -> Vec<u8> {
    const REASON_BYTES_MAX: usize = 123;
    let mut end = reason.len().min(REASON_BYTES_MAX);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    let mut payload = code.to_be_bytes().to_vec();
    payload.extend_from_slice(&reason.as_bytes()[..end]);
    payload
}

/// The code and the reason in the payload of a close frame; 1005 when it has no code.
#[must_use]
pub fn read_close(payload: &[u8]) -> (u16, String) {
    const NONE: u16 = 1005;
    match payload.split_first_chunk::<2>() {
        Some((code, reason)) => (u16::from_be_bytes(*code), String::from_utf8_lossy(reason).into_owned()),
        None => (NONE, String::new()),
    }
}

/// The code in the payload of a close frame; 1005 when it has none.
///
/// # Errors
///
/// When the payload is not allowed (RFC 6455, sections 5.5.1 and 7.4; 1012 to 1014 were registered
/// later).
pub fn check_close(payload: &[u8]) -> Result<u16, Violation> {
    const NONE: u16 = 1005;
    match payload.split_first_chunk::<2>() {
        None if payload.is_empty() => Ok(NONE),
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
    fn the_examples_of_the_standard_are_read() {
        let text = |mask, length| Head { is_final: true, reserved: 0, opcode: Opcode::Text, mask, length };
        assert_eq!(read(b"\x81\x05Hello"), Some((text(None, 5), 2)));
        assert_eq!(read(b"\x81\x85\x37\xfa\x21\x3d\x7f"), Some((text(Some([0x37, 0xfa, 0x21, 0x3d]), 5), 6)));
        assert_eq!(read(b"\x82\x7e\x01\x00").unwrap().0.length, 256);
        assert_eq!(read(b"\x82\x7f\0\0\0\0\0\x01\0\0").unwrap(), {
            let head =
                Head { is_final: true, reserved: 0, opcode: Opcode::Binary, mask: None, length: 65_536 };
            (head, 10)
        });
        let mut hello = *b"\x7f\x9f\x4d\x51\x58";
        mask(&mut hello, [0x37, 0xfa, 0x21, 0x3d], 0);
        assert_eq!(&hello, b"Hello");
    }

    #[test]
    fn an_incomplete_head_is_not_read() {
        let whole = b"\xc1\xff\0\0\0\0\0\x01\0\0abcd";
        for end in 0..whole.len() {
            assert_eq!(read(&whole[..end]), None, "{end} bytes");
        }
        assert_eq!(read(whole).unwrap().1, HEAD_BYTES_MAX);
    }

    #[test]
    fn a_close_carries_its_code_and_reason() {
        assert_eq!(read_close(&close_payload(1012, "restart")), (1012, "restart".to_owned()));
        assert_eq!(read_close(b""), (1005, String::new()));
        assert_eq!(read_close(b"\x03"), (1005, String::new()));
        let cut = close_payload(1000, &"\u{e9}".repeat(100));
        assert_eq!(cut.len(), 2 + 122, "a control frame has 125 bytes at the most, and no half letter");
    }

    proptest! {
        #[test]
        fn a_written_head_is_read_again(
            is_final: bool, reserved in 0_u8..8, opcode in 0_u8..16, masked in any::<Option<[u8; 4]>>(),
            length in prop_oneof![0_u64..130, 65_530_u64..65_540, any::<u64>()],
        ) {
            let head = Head { is_final, reserved, opcode: Opcode::of(opcode), mask: masked, length };
            let mut bytes = Vec::new();
            head.write(&mut bytes);
            prop_assert_eq!(read(&bytes), Some((head, bytes.len())));
        }

        #[test]
        fn a_mask_is_applied_piece_by_piece(bytes: Vec<u8>, masked: [u8; 4], cut in 0_usize..64) {
            let cut = cut.min(bytes.len());
            let simple: Vec<u8> = bytes.iter().zip(masked.iter().cycle()).map(|(a, b)| a ^ b).collect();
            let mut pieces = bytes;
            let (start, end) = pieces.split_at_mut(cut);
            mask(start, masked, 0);
            mask(end, masked, cut as u64);
            prop_assert_eq!(pieces, simple);
        }
    }
}
