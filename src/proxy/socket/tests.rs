//! Tests the forwarding of the client's frames to the provider, with streams that are split at any position: blanked
//! credentials, held messages, counted characters and audio, and bounded memory. Also tests that a written frame can
//! be read. `upstream_to_client` tests the other direction.

mod upstream_to_client;

use bytes::BytesMut;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::buffers::ReadBuffer;
use super::client_to_upstream::{ClientMessage, ClientToUpstream};
use super::close_frames::put_frame;
use crate::elevenlabs::socket::{ChargedContent, Dialect};
use crate::policy::websocket_frame::{self, FrameHeader, Opcode, Sender, Violation};

const MASK: [u8; 4] = [7, 0, 200, 31];
const MAX_FRAME_PART: usize = 4_096;
/// Maximum size of a held message, and of the buffers of a session.
const MAX_SIZE: usize = 1024 * 1024;

fn create_client_to_upstream(dialect: Dialect) -> ClientToUpstream {
    ClientToUpstream::new(dialect, MAX_FRAME_PART, MAX_SIZE)
}

/// Encodes a frame, with an optional mask.
fn encode_frame(is_final: bool, opcode: Opcode, payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    FrameHeader { is_final, reserved: 0, opcode, mask, length: payload.len() as u64 }.encode(&mut bytes);
    let payload_start = bytes.len();
    bytes.extend_from_slice(payload);
    if let Some(mask) = mask {
        websocket_frame::apply_mask(&mut bytes[payload_start..], mask, 0);
    }
    bytes
}

/// Encodes a text message as fragments with the lengths in `fragment_lengths`, and a last fragment with the rest.
fn encode_fragments(text: &[u8], fragment_lengths: &[usize], mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut remaining = text;
    for (index, length) in fragment_lengths.iter().enumerate() {
        let (chunk, after) = remaining.split_at((*length).min(remaining.len()));
        let opcode = if index == 0 { Opcode::Text } else { Opcode::Continuation };
        bytes.extend(encode_frame(false, opcode, chunk, mask));
        remaining = after;
    }
    let opcode = if fragment_lengths.is_empty() { Opcode::Text } else { Opcode::Continuation };
    bytes.extend(encode_frame(true, opcode, remaining, mask));
    bytes
}

/// Parses a stream into complete messages with their opcodes, and control frames in between.
fn parse_messages(mut bytes: &[u8]) -> Vec<(Opcode, Vec<u8>)> {
    let (mut messages, mut message) = (Vec::new(), None::<(Opcode, Vec<u8>)>);
    while let Some((head, length)) = websocket_frame::parse_header(bytes) {
        let end = length + usize::try_from(head.length).unwrap();
        let mut payload = bytes[length..end].to_vec();
        if let Some(mask) = head.mask {
            websocket_frame::apply_mask(&mut payload, mask, 0);
        }
        bytes = &bytes[end..];
        if head.opcode.is_control() {
            messages.push((head.opcode, payload));
            continue;
        }
        assert_eq!(
            head.opcode == Opcode::Continuation,
            message.is_some(),
            "a message must end before the next one starts"
        );
        let (_, collected) = message.get_or_insert((head.opcode, Vec::new()));
        collected.extend(payload);
        if head.is_final {
            messages.extend(message.take());
        }
    }
    assert!(bytes.is_empty() && message.is_none(), "the stream must end with a complete message");
    messages
}

/// Forwards client bytes that arrive in `chunks`. Returns the forwarded bytes and the held messages.
fn forward_to_upstream(dialect: Dialect, bytes: &[u8], chunks: &[usize]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut client_to_upstream = create_client_to_upstream(dialect);
    let (mut input, mut output, mut forwarded, mut messages) =
        (BytesMut::new(), BytesMut::new(), Vec::new(), Vec::new());
    let mut remaining = bytes;
    let mut chunks = chunks.iter().copied().chain(std::iter::repeat(usize::MAX));
    while !remaining.is_empty() {
        let (chunk, after) = remaining.split_at(chunks.next().unwrap().max(1).min(remaining.len()));
        input.extend_from_slice(chunk);
        remaining = after;
        while let ClientMessage::Held(_) = client_to_upstream.process_input(&mut input, &mut output) {
            messages.push(client_to_upstream.message_start.clone());
            client_to_upstream.release_message(&mut output);
        }
        forwarded.extend_from_slice(&output.split());
    }
    assert!(input.is_empty());
    (forwarded, messages)
}

#[test]
fn frames_without_a_credential_are_forwarded_unchanged() {
    let mut bytes = Vec::new();
    for (opcode, payload) in [
        (Opcode::Text, &b"plain text"[..]),
        (Opcode::Ping, b"?"),
        (Opcode::Binary, &[0xff; 9_000]),
        (Opcode::Text, br#"{"text":"x","a":{"xi_api_key":1}}"#),
        (Opcode::Binary, br#"{broken"#),
        (Opcode::Text, b""),
        (Opcode::Close, b"\x03\xe8bye"),
    ] {
        bytes.extend(encode_frame(true, opcode, payload, Some(MASK)));
    }
    // On paths that are not the provider's, only the receiver checks for violations.
    let mut bytes_with_violations = bytes.clone();
    bytes_with_violations.extend(encode_frame(true, Opcode::Reserved(3), b"?", Some(MASK)));
    bytes_with_violations.extend(encode_frame(true, Opcode::Binary, br#"{"xi_api_key":1}"#, Some(MASK)));
    bytes_with_violations.extend(encode_frame(true, Opcode::Text, br#"{"xi_api_key":1}"#, None));
    for size in [1, 2, 3, 7, 100, 100_000] {
        let chunks = vec![size; bytes_with_violations.len()];
        for dialect in [Dialect::Unknown, Dialect::Agent] {
            assert_eq!(
                forward_to_upstream(dialect, &bytes, &chunks).0,
                bytes,
                "{dialect:?} must forward chunks of {size} bytes unchanged"
            );
        }
        assert_eq!(
            forward_to_upstream(Dialect::Foreign, &bytes_with_violations, &chunks).0,
            bytes_with_violations,
            "{:?} must forward chunks of {size} bytes unchanged",
            Dialect::Foreign
        );
    }
}

#[test]
fn a_long_message_that_is_not_an_object_keeps_its_content() {
    for (start, opcode) in [("{broken ", Opcode::Text), (" \n {\"a\":1} x", Opcode::Binary)] {
        let text = format!("{start}{}", "y".repeat(3 * MAX_FRAME_PART + 5));
        let bytes = encode_fragments(text.as_bytes(), &[], Some(MASK));
        let bytes = [bytes, encode_frame(true, Opcode::Ping, b"?", Some(MASK))].concat();
        let bytes = if opcode == Opcode::Binary { [&[0x82], &bytes[1..]].concat() } else { bytes };
        for size in [100, MAX_FRAME_PART, MAX_FRAME_PART + 1, 100_000] {
            let (forwarded, _) = forward_to_upstream(Dialect::Unknown, &bytes, &vec![size; bytes.len()]);
            let expected = [(opcode, text.clone().into_bytes()), (Opcode::Ping, b"?".to_vec())];
            assert_eq!(
                parse_messages(&forwarded),
                expected,
                "chunks of {size} bytes must keep their content"
            );
        }
    }
}

#[test]
fn a_compressed_message_is_forwarded_unchanged() {
    let mut bytes = Vec::new();
    FrameHeader { is_final: true, reserved: 4, opcode: Opcode::Text, mask: Some(MASK), length: 3 }
        .encode(&mut bytes);
    bytes.extend([1, 2, 3]);
    assert_eq!(forward_to_upstream(Dialect::Foreign, &bytes, &[]).0, bytes);
}

#[test]
fn a_text_that_is_not_an_object_is_forwarded_before_its_end() {
    let frame = encode_frame(true, Opcode::Text, b"some text", Some(MASK));
    let mut client_to_upstream = create_client_to_upstream(Dialect::Unknown);
    let (mut input, mut output) = (BytesMut::from(&frame[..9]), BytesMut::new());
    assert_eq!(client_to_upstream.process_input(&mut input, &mut output), ClientMessage::Forwarded);
    assert_eq!(output, frame[..9]);
    assert!(client_to_upstream.is_in_frame());
}

#[test]
fn a_charged_message_is_held_until_it_is_released() {
    let bytes = [
        encode_fragments(br#"{"text":"Hello","xi_api_key":"k"}"#, &[5, 9], Some(MASK)),
        encode_frame(true, Opcode::Text, br#"{"text":""}"#, Some(MASK)),
    ]
    .concat();
    let mut client_to_upstream = create_client_to_upstream(Dialect::Speech);
    let (mut input, mut output) = (BytesMut::from(&bytes[..]), BytesMut::new());
    let message = |characters| ClientMessage::Held(ChargedContent { characters, audio_bytes: 0 });
    assert_eq!(client_to_upstream.process_input(&mut input, &mut output), message(5));
    assert!(output.is_empty() && !input.is_empty());
    assert_eq!(&client_to_upstream.message_start, br#"{"text":"Hello","xi_api_key":"k"}"#);
    client_to_upstream.release_message(&mut output);
    let [(Opcode::Text, text)] = &parse_messages(&output)[..] else {
        panic!("one message is expected, not {output:?}")
    };
    assert_eq!(serde_json::from_slice::<Value>(text).unwrap(), json!({"text": "Hello"}));
    assert_eq!(client_to_upstream.process_input(&mut input, &mut output), message(0));
}

/// The content of the client's messages up to their end, or up to a violation.
#[derive(Debug, PartialEq, Eq)]
struct CountedContent {
    characters: u64,
    audio_bytes: u64,
    violation: Option<Violation>,
}

/// Forwards chunks of the client, and counts their content. Checks after every chunk that the buffers do not exceed
/// their maximum size.
fn count_content(dialect: Dialect, chunks: impl Iterator<Item = Vec<u8>>) -> CountedContent {
    let mut client_to_upstream = create_client_to_upstream(dialect);
    let mut from_client = ReadBuffer::new(Sender::Client, true, BytesMut::new());
    let (mut output, mut characters) = (BytesMut::new(), 0);
    let mut violation = None;
    'chunks: for chunk in chunks {
        from_client.extend(&chunk);
        loop {
            let message = client_to_upstream.process_input(&mut from_client.bytes, &mut output);
            let buffered = from_client.bytes.len() + client_to_upstream.held_bytes();
            assert!(
                buffered <= MAX_SIZE + chunk.len(),
                "at most the limit may be buffered, not {buffered} bytes"
            );
            match message {
                ClientMessage::Held(content) => {
                    characters += content.characters;
                    client_to_upstream.release_message(&mut output);
                }
                ClientMessage::Refused(refused) => violation = Some(refused),
                ClientMessage::Forwarded if buffered > MAX_SIZE => violation = Some(Violation::TooLarge),
                ClientMessage::Forwarded => break,
            }
            if violation.is_some() {
                break 'chunks;
            }
        }
        violation = from_client.violation();
        if violation.is_some() {
            break;
        }
        output.clear();
    }
    CountedContent { characters, audio_bytes: client_to_upstream.audio_bytes(), violation }
}

fn split_into_chunks(bytes: &[u8], size: usize) -> impl Iterator<Item = Vec<u8>> {
    bytes.chunks(size).map(<[u8]>::to_vec)
}

#[test]
fn text_is_counted_in_messages_of_any_length_and_fragmentation() {
    let padded =
        |padding: usize| format!(r#"{{"pad":"{}","text":"{}"}}"#, " ".repeat(padding), "x".repeat(80_021));
    for padding in [0, 200_000, 300_000, 800_000] {
        let text = padded(padding);
        let one_frame = encode_frame(true, Opcode::Text, text.as_bytes(), Some(MASK));
        let binary = encode_frame(true, Opcode::Binary, text.as_bytes(), Some(MASK));
        let fragmented = encode_fragments(text.as_bytes(), &vec![1_000; text.len() / 1_000], Some(MASK));
        for bytes in [one_frame, binary, fragmented] {
            for size in [5_000, 100_000] {
                assert_eq!(
                    count_content(Dialect::Speech, split_into_chunks(&bytes, size)),
                    CountedContent { characters: 80_021, audio_bytes: 0, violation: None },
                    "the text after {padding} spaces must be counted in chunks of {size} bytes"
                );
            }
        }
    }
    let oversized = encode_frame(true, Opcode::Text, padded(MAX_SIZE).as_bytes(), Some(MASK));
    let refused = |violation| CountedContent { characters: 0, audio_bytes: 0, violation: Some(violation) };
    assert_eq!(
        count_content(Dialect::Speech, split_into_chunks(&oversized[..20], 5_000)),
        refused(Violation::TooLarge),
        "a message whose announced length exceeds the maximum must be refused"
    );
    let oversized =
        encode_fragments(padded(MAX_SIZE).as_bytes(), &vec![10_000; MAX_SIZE / 10_000], Some(MASK));
    assert_eq!(
        count_content(Dialect::Dialogue, split_into_chunks(&oversized, 5_000)),
        refused(Violation::TooLarge)
    );
    let binary = encode_frame(true, Opcode::Binary, b"\x00\x01\x02", Some(MASK));
    assert_eq!(count_content(Dialect::Speech, split_into_chunks(&binary, 5)), refused(Violation::NotJson));
}

#[test]
fn audio_is_counted_while_it_is_forwarded() {
    let text = format!(r#"{{"audio_base_64":"{}"}}"#, "AAAA".repeat(MAX_SIZE));
    let bytes = encode_frame(true, Opcode::Text, text.as_bytes(), Some(MASK));
    let counted = count_content(Dialect::Transcription, split_into_chunks(&bytes, 16_384));
    let audio_bytes = 3 * MAX_SIZE as u64;
    assert_eq!(counted, CountedContent { characters: 0, audio_bytes, violation: None });
    let CountedContent { audio_bytes, .. } =
        count_content(Dialect::Transcription, split_into_chunks(&bytes[..MAX_SIZE], 16_384));
    assert!(
        audio_bytes >= 700_000,
        "the audio of an incomplete message must be counted, not {audio_bytes} bytes"
    );
}

#[test]
fn floods_of_small_frames_use_bounded_memory() {
    let message_start = encode_frame(false, Opcode::Text, b"{", Some(MASK));
    let flood = |chunk: Vec<u8>, reads: usize| {
        let chunk = chunk.repeat(16_384 / chunk.len());
        std::iter::once(message_start.clone()).chain(std::iter::repeat_n(chunk, reads))
    };
    let empty = encode_frame(false, Opcode::Continuation, b"", Some(MASK));
    let tiny = encode_frame(false, Opcode::Continuation, b" ", Some(MASK));
    for dialect in [Dialect::Speech, Dialect::SpeechContexts, Dialect::Dialogue, Dialect::DialogueContexts] {
        for chunk in [&empty, &tiny] {
            assert_eq!(
                count_content(dialect, flood(chunk.clone(), 2_000)).violation,
                Some(Violation::TooLarge),
                "{dialect:?} must refuse a flood of frames"
            );
        }
    }
    // Protocols without held messages forward everything immediately, and all protocols forward control
    // frames.
    let ping = encode_frame(true, Opcode::Ping, b"", Some(MASK));
    for dialect in [Dialect::Transcription, Dialect::Agent, Dialect::Unknown] {
        for chunk in [&empty, &tiny] {
            assert_eq!(
                count_content(dialect, flood(chunk.clone(), 100)).violation,
                None,
                "{dialect:?} must accept a flood of frames"
            );
        }
    }
    assert_eq!(count_content(Dialect::Speech, flood(ping, 100)).violation, None);
}

proptest! {
    #[test]
    fn no_credential_passes_in_any_fragmentation(
        before in "[a-z]{0,8}", after in ".{0,40}", name in "xi_api_key|xi-api-key|authorization",
        fragment_lengths in prop::collection::vec(0_usize..30, 0..8),
        chunks in prop::collection::vec(1_usize..50, 0..30),
        has_ping in any::<bool>(), is_speech in any::<bool>(), is_binary in any::<bool>(),
    ) {
        let members = json!({ "text": after, "n": {"xi_api_key": [before]} });
        let Value::Object(mut members) = members else { unreachable!() };
        let expected = members.clone();
        members.insert(name, "a-secret-token".into());
        let text = Value::from(members).to_string();
        let mut bytes = encode_fragments(text.as_bytes(), &fragment_lengths, Some(MASK));
        if has_ping {
            // The control frame is inserted after the first fragment of the message.
            let (header, header_length) = websocket_frame::parse_header(&bytes).unwrap();
            let first_frame_end = header_length + usize::try_from(header.length).unwrap();
            let ping = encode_frame(true, Opcode::Ping, b"?", Some(MASK));
            bytes.splice(first_frame_end..first_frame_end, ping);
        }
        let dialect = if is_speech { Dialect::Speech } else { Dialect::Agent };
        let opcode = if is_binary { Opcode::Binary } else { Opcode::Text };
        if is_binary {
            // Changes the opcode from text to binary.
            bytes[0] = bytes[0] & 0xf0 | 2;
        }
        let (forwarded, messages) = forward_to_upstream(dialect, &bytes, &chunks);
        prop_assert_eq!(messages.len(), usize::from(is_speech));
        let texts: Vec<Vec<u8>> =
            parse_messages(&forwarded).into_iter().filter(|(received, _)| *received == opcode).map(|(_, text)| text)
                .collect();
        prop_assert_eq!(texts.len(), 1);
        prop_assert_eq!(serde_json::from_slice::<Map<String, Value>>(&texts[0]).unwrap(), expected);
    }
}

#[test]
fn a_written_frame_can_be_read() {
    let mut output = BytesMut::new();
    put_frame(&mut output, Opcode::Text, b"{}", Some(MASK));
    put_frame(&mut output, Opcode::Ping, b"", None);
    assert_eq!(parse_messages(&output), [(Opcode::Text, b"{}".to_vec()), (Opcode::Ping, Vec::new())]);
}
