//! Fuzzes the parser, the encoder, the mask and the validator of WebSocket frames, and the payloads of close frames. A
//! parsed header or close payload must be equal to the encoded one. Masking and validation must not depend on how the
//! bytes are split.

#![no_main]

use arbitrary::Arbitrary;
use keychoir::policy::websocket_frame::{
    FrameHeader, FrameValidator, MAX_HEADER_BYTES, Sender, StreamEnd, ValidationResult, apply_mask,
    close_payload, parse_close, parse_header, validate_close,
};
use libfuzzer_sys::fuzz_target;

/// The bytes of a stream, and the parts of frames.
#[derive(Arbitrary, Debug)]
struct FrameCase {
    bytes: Vec<u8>,
    mask: [u8; 4],
    /// The payload offset of the first masked byte.
    offset: u64,
    /// The index at which the masked bytes are split.
    split: u16,
    /// The code and the reason of a close frame.
    code: u16,
    reason: String,
    /// The lengths of the validated chunks.
    chunk_lengths: Vec<u8>,
}

/// Validates a stream in chunks of the lengths `chunk_lengths` and a last chunk with the remaining bytes.
fn validate_in_chunks(sender: Sender, stream: &[u8], chunk_lengths: &[u8]) -> ValidationResult {
    let (mut validator, mut total, mut rest) =
        (FrameValidator::new(sender), ValidationResult { valid_length: 0, end: None }, stream);
    let mut lengths =
        chunk_lengths.iter().map(|length| usize::from(*length)).chain(std::iter::repeat(usize::MAX));
    while !rest.is_empty() {
        let (chunk, following) = rest.split_at(lengths.next().unwrap_or(1).clamp(1, rest.len()));
        let validation = validator.validate(chunk);
        assert!(validation.valid_length <= chunk.len(), "the valid part must not be longer than the chunk");
        total = ValidationResult {
            valid_length: total.valid_length + validation.valid_length,
            end: validation.end,
        };
        rest = following;
    }
    total
}

fuzz_target!(|case: FrameCase| {
    let FrameCase { bytes, mask, offset, split, code, reason, chunk_lengths } = case;
    for sender in [Sender::Client, Sender::Server] {
        let (whole, chunks) =
            (validate_in_chunks(sender, &bytes, &[]), validate_in_chunks(sender, &bytes, &chunk_lengths));
        assert_eq!(whole.end, chunks.end, "the result must not depend on the split");
        if let Some(StreamEnd::Closed { .. }) = whole.end {
            assert_eq!(whole.valid_length, chunks.valid_length, "the length must not depend on the split");
        }
    }
    match parse_header(&bytes) {
        Some((header, length)) => {
            assert!(
                length <= MAX_HEADER_BYTES.min(bytes.len()),
                "a header must have at most its maximum length"
            );
            for end in 0..length {
                assert_eq!(parse_header(&bytes[..end]), None, "an incomplete header must not be parsed");
            }
            assert_eq!(
                parse_header(&bytes[..length]),
                Some((header, length)),
                "bytes after the header must be ignored"
            );
            let mut encoded_header = Vec::new();
            header.encode(&mut encoded_header);
            assert!(encoded_header.len() <= length, "the encoded header must have the shortest form");
            assert_eq!(parse_header(&encoded_header), Some((header, encoded_header.len())));
            let masked_header = FrameHeader { mask: Some(mask), length: offset, ..header };
            encoded_header.clear();
            masked_header.encode(&mut encoded_header);
            assert_eq!(parse_header(&encoded_header), Some((masked_header, encoded_header.len())));
        }
        None => assert!(bytes.len() < MAX_HEADER_BYTES, "a complete header must be parsed"),
    }

    let mut chunks = bytes.clone();
    let (start, end) = chunks.split_at_mut(usize::from(split).min(bytes.len()));
    let end_offset = offset.wrapping_add(start.len() as u64);
    apply_mask(start, mask, offset);
    apply_mask(end, mask, end_offset);
    let expected =
        bytes.iter().enumerate().map(|(index, byte)| byte ^ mask[(offset as usize).wrapping_add(index) % 4]);
    assert!(chunks.iter().copied().eq(expected), "masking must not depend on the split");
    apply_mask(&mut chunks, mask, offset);
    assert_eq!(chunks, bytes, "masking twice must restore the bytes");

    let _ = parse_close(&bytes);
    let payload = close_payload(code, &reason);
    assert!(payload.len() <= 125, "a control frame must have at most 125 bytes");
    let is_allowed = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
    assert_eq!(validate_close(&payload).ok(), is_allowed.then_some(code));
    let (parsed_code, parsed_reason) = parse_close(&payload);
    assert!(
        parsed_code == code && reason.starts_with(&parsed_reason),
        "the parsed code and reason must be those of the payload"
    );
});
