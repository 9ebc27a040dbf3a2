//! Whatever comes, a head is read without a panic, the same way however much of it has come, and what
//! is written is read as it was. A mask works in any pieces and is taken off as it is put on. A stream
//! of frames is judged the same way however it is cut, and what is found valid is within it.

#![no_main]

use arbitrary::Arbitrary;
use keychoir::policy::frame::{
    FrameHeader, FrameValidator, MAX_HEADER_BYTES, Sender, StreamEnd, ValidationResult, apply_mask,
    close_payload, parse_close, parse_header, validate_close,
};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case {
    bytes: Vec<u8>,
    mask: [u8; 4],
    offset: u64,
    cut: u16,
    code: u16,
    reason: String,
    cuts: Vec<u8>,
}

/// Checks a stream in pieces.
fn checked(sender: Sender, stream: &[u8], cuts: &[u8]) -> ValidationResult {
    let (mut validator, mut all, mut rest) =
        (FrameValidator::new(sender), ValidationResult { valid_length: 0, end: None }, stream);
    let mut cuts = cuts.iter().map(|cut| usize::from(*cut)).chain(std::iter::repeat(usize::MAX));
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(cuts.next().unwrap_or(1).clamp(1, rest.len()));
        let one = validator.validate(piece);
        assert!(one.valid_length <= piece.len());
        all = ValidationResult { valid_length: all.valid_length + one.valid_length, end: one.end };
        rest = behind;
    }
    all
}

fuzz_target!(|case: Case| {
    let Case { bytes, mask: masked, offset, cut, code, reason, cuts } = case;
    for sender in [Sender::Client, Sender::Server] {
        let (whole, pieces) = (checked(sender, &bytes, &[]), checked(sender, &bytes, &cuts));
        assert_eq!(whole.end, pieces.end, "the pieces do not matter");
        if let Some(StreamEnd::Closed { .. }) = whole.end {
            assert_eq!(whole.valid_length, pieces.valid_length);
        }
    }
    match parse_header(&bytes) {
        Some((head, length)) => {
            assert!(length <= MAX_HEADER_BYTES.min(bytes.len()));
            for end in 0..length {
                assert_eq!(parse_header(&bytes[..end]), None, "half a head is none");
            }
            assert_eq!(parse_header(&bytes[..length]), Some((head, length)), "what follows does not matter");
            let mut written = Vec::new();
            head.encode(&mut written);
            assert!(written.len() <= length, "the shortest form");
            assert_eq!(parse_header(&written), Some((head, written.len())));
            let other = FrameHeader { mask: Some(masked), length: offset, ..head };
            written.clear();
            other.encode(&mut written);
            assert_eq!(parse_header(&written), Some((other, written.len())));
        }
        None => assert!(bytes.len() < MAX_HEADER_BYTES),
    }

    let mut pieces = bytes.clone();
    let (start, end) = pieces.split_at_mut(usize::from(cut).min(bytes.len()));
    let behind = offset.wrapping_add(start.len() as u64);
    apply_mask(start, masked, offset);
    apply_mask(end, masked, behind);
    let simple =
        bytes.iter().enumerate().map(|(at, byte)| byte ^ masked[(offset as usize).wrapping_add(at) % 4]);
    assert!(pieces.iter().copied().eq(simple));
    apply_mask(&mut pieces, masked, offset);
    assert_eq!(pieces, bytes, "twice is not at all");

    let _ = parse_close(&bytes);
    let payload = close_payload(code, &reason);
    assert!(payload.len() <= 125, "a control frame has no more");
    let is_allowed = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
    assert_eq!(validate_close(&payload).ok(), is_allowed.then_some(code));
    let (found, told) = parse_close(&payload);
    assert!(found == code && reason.starts_with(&told));
});
