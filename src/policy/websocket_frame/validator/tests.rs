//! Tests each validation rule, and that the end of a stream does not depend on how the stream is split into chunks.

use proptest::prelude::*;

use super::*;

const MASK: [u8; 4] = [9, 0, 33, 200];

/// Encodes a masked client frame. `first` is the first byte of the frame.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let opcode = Opcode::from_bits(first & 0x0f);
    let length = payload.len() as u64;
    let header = FrameHeader {
        is_final: first & 0x80 != 0,
        reserved: first >> 4 & 7,
        opcode,
        mask: Some(MASK),
        length,
    };
    header.encode(&mut bytes);
    let payload_start = bytes.len();
    bytes.extend_from_slice(payload);
    apply_mask(&mut bytes[payload_start..], MASK, 0);
    bytes
}

/// Validates a stream in chunks of the lengths `chunk_lengths`, and the remaining bytes in one chunk.
fn validate(sender: Sender, stream: &[u8], chunk_lengths: &[usize]) -> ValidationResult {
    let mut validator = FrameValidator::new(sender);
    let mut total = ValidationResult { valid_length: 0, end: None };
    let mut chunk_lengths = chunk_lengths.iter().copied().chain(std::iter::repeat(usize::MAX));
    let mut remaining = stream;
    while !remaining.is_empty() {
        let chunk_length = chunk_lengths.next().unwrap_or(1).clamp(1, remaining.len());
        let (chunk, after_chunk) = remaining.split_at(chunk_length);
        let result = validator.validate(chunk);
        total = ValidationResult { valid_length: total.valid_length + result.valid_length, end: result.end };
        remaining = after_chunk;
    }
    total
}

#[track_caller]
fn check_end(stream: &[&[u8]], expected: Option<StreamEnd>) {
    let stream = stream.concat();
    assert_eq!(validate(Sender::Client, &stream, &[]).end, expected);
    let in_single_bytes = validate(Sender::Client, &stream, &vec![1; stream.len()]);
    assert_eq!(in_single_bytes.end, expected, "the end must be the same in chunks of one byte");
}

fn end_by_violation(violation: Violation) -> Option<StreamEnd> {
    Some(StreamEnd::Violated(violation))
}

const TEXT: u8 = 0x81;
const TEXT_START: u8 = 0x01;
const CONTINUATION: u8 = 0x00;
const FINAL_CONTINUATION: u8 = 0x80;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
/// The bit of the last frame of a message.
const FINAL: u8 = 0x80;
/// The first of the three reserved bits.
const RESERVED_BIT: u8 = 0x40;

#[test]
fn allowed_frames_are_accepted() {
    check_end(&[&frame(TEXT, b"hello"), &frame(BINARY, &[0xff; 70_000]), &frame(PING, &[0xff; 125])], None);
    let (first, second) = "\u{20ac}".as_bytes().split_at(1);
    check_end(&[&frame(TEXT_START, first), &frame(PING, b""), &frame(FINAL_CONTINUATION, second)], None);
    check_end(&[&frame(TEXT_START, b""), &frame(CONTINUATION, b""), &frame(FINAL_CONTINUATION, b"")], None);
    check_end(&[&frame(TEXT, "\u{10ffff}".as_bytes())], None);
}

#[test]
fn each_forbidden_frame_is_reported_as_its_violation() {
    for (stream, violation) in [
        (vec![frame(TEXT | RESERVED_BIT, b"x")], Violation::ReservedBits),
        (vec![frame(TEXT | RESERVED_BIT >> 1, b"x")], Violation::ReservedBits),
        (vec![frame(TEXT | RESERVED_BIT >> 2, b"x")], Violation::ReservedBits),
        (vec![frame(PING | RESERVED_BIT, b"x")], Violation::ReservedBits),
        (vec![frame(FINAL | 3, b"x")], Violation::ReservedOpcode),
        (vec![frame(FINAL | 11, b"x")], Violation::ReservedOpcode),
        (vec![frame(PING & !FINAL, b"x")], Violation::FragmentedControl),
        (vec![frame(CLOSE & !FINAL, b"")], Violation::FragmentedControl),
        (vec![frame(PING, &[0; 126])], Violation::LongControl),
        (vec![frame(CLOSE, &[3; 126])], Violation::LongControl),
        (vec![frame(CONTINUATION, b"x")], Violation::StrayContinuation),
        (vec![frame(FINAL_CONTINUATION, b"")], Violation::StrayContinuation),
        (vec![frame(TEXT, b"x"), frame(FINAL_CONTINUATION, b"x")], Violation::StrayContinuation),
        (vec![frame(TEXT_START, b"x"), frame(TEXT, b"x")], Violation::InterruptedMessage),
        (vec![frame(TEXT_START, b"x"), frame(BINARY, b"x")], Violation::InterruptedMessage),
        (vec![frame(CLOSE, b"\x03")], Violation::ShortClose),
        (vec![frame(CLOSE, b"\x03\xe8\xff")], Violation::CloseReason),
        (vec![frame(CLOSE, b"\x03\xe8\xe2\x82")], Violation::CloseReason),
        (vec![frame(TEXT, b"\xff")], Violation::TextEncoding),
        (vec![frame(TEXT, b"\xed\xa0\x80")], Violation::TextEncoding),
        (vec![frame(TEXT, b"\xf4\x90\x80\x80")], Violation::TextEncoding),
        (vec![frame(TEXT, b"\xe2\x82")], Violation::TextEncoding),
        (vec![frame(TEXT_START, b"\xe2"), frame(FINAL_CONTINUATION, b"x")], Violation::TextEncoding),
        (vec![vec![TEXT, 1, b'x']], Violation::Unmasked),
        (vec![vec![TEXT, 0xfe, 0, 1, 0, 0, 0, 0, b'x']], Violation::LengthEncoding),
        (vec![vec![TEXT, 0xff, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]], Violation::LengthEncoding),
        (vec![vec![TEXT, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], Violation::LengthEncoding),
    ] {
        let stream: Vec<&[u8]> = stream.iter().map(Vec::as_slice).collect();
        check_end(&stream, end_by_violation(violation));
    }
    let masked_server_frame = validate(Sender::Server, &frame(TEXT, b"x"), &[]);
    assert_eq!(masked_server_frame.end, end_by_violation(Violation::Masked));
}

#[test]
fn only_close_codes_that_may_be_sent_are_accepted() {
    for code in 0..=u16::MAX {
        let is_allowed = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
        let expected = if is_allowed { Ok(code) } else { Err(Violation::CloseCode) };
        assert_eq!(
            validate_close(&code.to_be_bytes()),
            expected,
            "only codes that may be sent are valid: {code}"
        );
    }
    check_end(&[&frame(CLOSE, b"")], Some(StreamEnd::Closed { code: 1005 }));
    check_end(&[&frame(CLOSE, b"\x0f\xa0why")], Some(StreamEnd::Closed { code: 4000 }));
    check_end(&[&frame(CLOSE, &[3, 0xed])], end_by_violation(Violation::CloseCode));
}

#[test]
fn bytes_after_a_close_frame_are_dropped() {
    let close = frame(CLOSE, b"\x03\xe8bye");
    let stream = [close.clone(), frame(TEXT, b"more"), frame(PING | RESERVED_BIT, b"junk")].concat();
    let closed = ValidationResult { valid_length: close.len(), end: Some(StreamEnd::Closed { code: 1000 }) };
    for size in [1, 3, close.len(), stream.len()] {
        assert_eq!(validate(Sender::Client, &stream, &vec![size; stream.len()]), closed);
    }
}

#[test]
fn an_invalid_close_frame_from_the_server_is_not_a_violation() {
    // The code is 1008, and the reason is not UTF-8.
    let close = [CLOSE, 3, 0x03, 0xf0, 0xff];
    let closed = Some(StreamEnd::Closed { code: 1008 });
    assert_eq!(validate(Sender::Server, &close, &[]).end, closed);
}

#[test]
fn bytes_before_a_violation_are_valid() {
    let valid = frame(TEXT, b"good");
    let stream = [valid.clone(), frame(TEXT | RESERVED_BIT, b"bad")].concat();
    let result = validate(Sender::Client, &stream, &[]);
    assert_eq!(
        result,
        ValidationResult { valid_length: valid.len(), end: end_by_violation(Violation::ReservedBits) }
    );
}

#[test]
fn the_close_code_and_reason_of_every_violation_are_valid() {
    for violation in [
        Violation::Unmasked,
        Violation::Masked,
        Violation::ReservedBits,
        Violation::ReservedOpcode,
        Violation::LengthEncoding,
        Violation::FragmentedControl,
        Violation::LongControl,
        Violation::StrayContinuation,
        Violation::InterruptedMessage,
        Violation::ShortClose,
        Violation::CloseCode,
        Violation::CloseReason,
        Violation::TextEncoding,
        Violation::NotJson,
        Violation::TooLarge,
    ] {
        let (code, reason) = violation.close();
        let payload = crate::policy::websocket_frame::close_payload(code, reason);
        assert_eq!(payload.len(), 2 + reason.len(), "the reason must not be truncated: {reason}");
        assert_eq!(validate_close(&payload), Ok(code));
    }
}

proptest! {
    #[test]
    fn the_end_of_a_stream_does_not_depend_on_its_chunks(
        frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..140)), 0..6),
        chunk_lengths in prop::collection::vec(1_usize..20, 0..60),
    ) {
        let stream: Vec<u8> = frames.iter().flat_map(|(first, payload)| frame(*first, payload)).collect();
        let in_one_chunk = validate(Sender::Client, &stream, &[]);
        let in_chunks = validate(Sender::Client, &stream, &chunk_lengths);
        prop_assert_eq!(in_one_chunk.end, in_chunks.end);
        // The first bytes of a frame may be accepted before a later chunk reveals the violation.
        prop_assert!(
            in_chunks.valid_length >= in_one_chunk.valid_length || in_one_chunk.end.is_none(),
            "no byte that is valid in one chunk must be dropped"
        );
    }

    #[test]
    fn any_text_in_any_fragments_is_accepted(
        text in any::<String>(), fragments in prop::collection::vec(0_usize..9, 0..9),
        chunk_lengths in prop::collection::vec(1_usize..9, 0..99),
    ) {
        let (mut stream, mut remaining) = (Vec::new(), text.as_bytes());
        for (index, length) in fragments.iter().enumerate() {
            let (fragment, after_fragment) = remaining.split_at((*length).min(remaining.len()));
            stream.extend(frame(if index == 0 { TEXT_START } else { CONTINUATION }, fragment));
            remaining = after_fragment;
        }
        stream.extend(frame(if fragments.is_empty() { TEXT } else { FINAL_CONTINUATION }, remaining));
        let expected = ValidationResult { valid_length: stream.len(), end: None };
        prop_assert_eq!(validate(Sender::Client, &stream, &chunk_lengths), expected);
    }
}
