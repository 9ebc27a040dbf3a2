//! Tests each rule, and that the verdict does not depend on how a stream is cut into pieces.

use proptest::prelude::*;

use super::*;

const MASK: [u8; 4] = [9, 0, 33, 200];

/// A frame of a client in wire format.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let opcode = Opcode::of(first & 0x0f);
    let length = payload.len() as u64;
    let head =
        Head { is_final: first & 0x80 != 0, reserved: first >> 4 & 7, opcode, mask: Some(MASK), length };
    head.write(&mut bytes);
    let from = bytes.len();
    bytes.extend_from_slice(payload);
    mask(&mut bytes[from..], MASK, 0);
    bytes
}

/// Validates a stream in pieces; returns the number of valid bytes and the end of the stream.
fn checked(sender: Sender, stream: &[u8], cuts: &[usize]) -> Checked {
    let mut validator = FrameValidator::new(sender);
    let mut all = Checked { valid: 0, end: None };
    let mut cuts = cuts.iter().copied().chain(std::iter::repeat(usize::MAX));
    let mut rest = stream;
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(cuts.next().unwrap_or(1).clamp(1, rest.len()));
        let one = validator.check(piece);
        all = Checked { valid: all.valid + one.valid, end: one.end };
        rest = after;
    }
    all
}

#[track_caller]
fn check(stream: &[&[u8]], expected: Option<StreamEnd>) {
    let stream = stream.concat();
    assert_eq!(checked(Sender::Client, &stream, &[]).end, expected);
    assert_eq!(checked(Sender::Client, &stream, &vec![1; stream.len()]).end, expected, "byte by byte");
}

fn violated(violation: Violation) -> Option<StreamEnd> {
    Some(StreamEnd::Violated(violation))
}

const TEXT: u8 = 0x81;
const TEXT_BEGINS: u8 = 0x01;
const GOES_ON: u8 = 0x00;
const ENDS: u8 = 0x80;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;

#[test]
fn allowed_frames_are_accepted() {
    check(&[&frame(TEXT, b"hello"), &frame(BINARY, &[0xff; 70_000]), &frame(PING, &[0xff; 125])], None);
    let (first, second) = "\u{20ac}".as_bytes().split_at(1);
    check(&[&frame(TEXT_BEGINS, first), &frame(PING, b""), &frame(ENDS, second)], None);
    check(&[&frame(TEXT_BEGINS, b""), &frame(GOES_ON, b""), &frame(ENDS, b"")], None);
    check(&[&frame(TEXT, "\u{10ffff}".as_bytes())], None);
}

#[test]
fn a_forbidden_frame_is_reported_by_its_violation() {
    for (stream, violation) in [
        (vec![frame(0xc1, b"x")], Violation::ReservedBits),
        (vec![frame(0xa1, b"x")], Violation::ReservedBits),
        (vec![frame(0x91, b"x")], Violation::ReservedBits),
        (vec![frame(0xc9, b"x")], Violation::ReservedBits),
        (vec![frame(0x83, b"x")], Violation::ReservedOpcode),
        (vec![frame(0x8b, b"x")], Violation::ReservedOpcode),
        (vec![frame(0x09, b"x")], Violation::FragmentedControl),
        (vec![frame(0x08, b"")], Violation::FragmentedControl),
        (vec![frame(PING, &[0; 126])], Violation::LongControl),
        (vec![frame(CLOSE, &[3; 126])], Violation::LongControl),
        (vec![frame(GOES_ON, b"x")], Violation::StrayContinuation),
        (vec![frame(ENDS, b"")], Violation::StrayContinuation),
        (vec![frame(TEXT, b"x"), frame(ENDS, b"x")], Violation::StrayContinuation),
        (vec![frame(TEXT_BEGINS, b"x"), frame(TEXT, b"x")], Violation::InterruptedMessage),
        (vec![frame(TEXT_BEGINS, b"x"), frame(BINARY, b"x")], Violation::InterruptedMessage),
        (vec![frame(CLOSE, b"\x03")], Violation::ShortClose),
        (vec![frame(CLOSE, b"\x03\xe8\xff")], Violation::CloseReason),
        (vec![frame(CLOSE, b"\x03\xe8\xe2\x82")], Violation::CloseReason),
        (vec![frame(TEXT, b"\xff")], Violation::TextEncoding),
        (vec![frame(TEXT, b"\xed\xa0\x80")], Violation::TextEncoding),
        (vec![frame(TEXT, b"\xf4\x90\x80\x80")], Violation::TextEncoding),
        (vec![frame(TEXT, b"\xe2\x82")], Violation::TextEncoding),
        (vec![frame(TEXT_BEGINS, b"\xe2"), frame(ENDS, b"x")], Violation::TextEncoding),
        (vec![vec![TEXT, 1, b'x']], Violation::Unmasked),
        (vec![vec![TEXT, 0xfe, 0, 1, 0, 0, 0, 0, b'x']], Violation::LengthForm),
        (vec![vec![TEXT, 0xff, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]], Violation::LengthForm),
        (vec![vec![TEXT, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]], Violation::LengthForm),
    ] {
        let stream: Vec<&[u8]> = stream.iter().map(Vec::as_slice).collect();
        check(&stream, violated(violation));
    }
    let masked = checked(Sender::Server, &frame(TEXT, b"x"), &[]);
    assert_eq!(masked.end, violated(Violation::Masked));
}

#[test]
fn only_codes_that_may_be_sent_close() {
    for code in 0..=u16::MAX {
        let is_allowed = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
        let expected = if is_allowed { Ok(code) } else { Err(Violation::CloseCode) };
        assert_eq!(check_close(&code.to_be_bytes()), expected, "{code}");
    }
    check(&[&frame(CLOSE, b"")], Some(StreamEnd::Closed { code: 1005 }));
    check(&[&frame(CLOSE, b"\x0f\xa0why")], Some(StreamEnd::Closed { code: 4000 }));
    check(&[&frame(CLOSE, &[3, 0xed])], violated(Violation::CloseCode));
}

#[test]
fn bytes_after_a_close_are_dropped() {
    let close = frame(CLOSE, b"\x03\xe8bye");
    let stream = [close.clone(), frame(TEXT, b"more"), frame(0xf3, b"junk")].concat();
    let closed = Checked { valid: close.len(), end: Some(StreamEnd::Closed { code: 1000 }) };
    for size in [1, 3, close.len(), stream.len()] {
        assert_eq!(checked(Sender::Client, &stream, &vec![size; stream.len()]), closed);
    }
}

#[test]
fn an_invalid_close_of_the_provider_is_no_violation() {
    let close = [0x88, 3, 0x03, 0xf0, 0xff];
    let closed = Some(StreamEnd::Closed { code: 1008 });
    assert_eq!(checked(Sender::Server, &close, &[]).end, closed);
}

#[test]
fn bytes_before_a_violation_are_valid() {
    let good = frame(TEXT, b"good");
    let stream = [good.clone(), frame(0xc1, b"bad")].concat();
    let checked = checked(Sender::Client, &stream, &[]);
    assert_eq!(checked, Checked { valid: good.len(), end: violated(Violation::ReservedBits) });
}

#[test]
fn every_violation_has_a_close_that_may_be_sent() {
    for violation in [
        Violation::Unmasked,
        Violation::Masked,
        Violation::ReservedBits,
        Violation::ReservedOpcode,
        Violation::LengthForm,
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
        let payload = crate::policy::frame::close_payload(code, reason);
        assert_eq!(payload.len(), 2 + reason.len(), "it fits: {reason}");
        assert_eq!(check_close(&payload), Ok(code));
    }
}

proptest! {
    #[test]
    fn the_pieces_of_a_stream_do_not_change_its_verdict(
        frames in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..140)), 0..6),
        cuts in prop::collection::vec(1_usize..20, 0..60),
    ) {
        let stream: Vec<u8> = frames.iter().flat_map(|(first, payload)| frame(*first, payload)).collect();
        let whole = checked(Sender::Client, &stream, &[]);
        let pieces = checked(Sender::Client, &stream, &cuts);
        prop_assert_eq!(whole.end, pieces.end);
        // The first bytes of a frame may have been accepted before a later byte violates the rules.
        prop_assert!(pieces.valid >= whole.valid || whole.end.is_none());
    }

    #[test]
    fn any_text_in_any_fragments_is_accepted(
        text in any::<String>(), fragments in prop::collection::vec(0_usize..9, 0..9),
        cuts in prop::collection::vec(1_usize..9, 0..99),
    ) {
        let (mut stream, mut rest) = (Vec::new(), text.as_bytes());
        for (at, length) in fragments.iter().enumerate() {
            let (piece, after) = rest.split_at((*length).min(rest.len()));
            stream.extend(frame(if at == 0 { TEXT_BEGINS } else { GOES_ON }, piece));
            rest = after;
        }
        stream.extend(frame(if fragments.is_empty() { TEXT } else { ENDS }, rest));
        let expected = Checked { valid: stream.len(), end: None };
        prop_assert_eq!(checked(Sender::Client, &stream, &cuts), expected);
    }
}
