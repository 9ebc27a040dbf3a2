//! Tests of the forwarding of frames in both directions, with streams that are split at any position.

use bytes::BytesMut;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::buffers::ReadBuffer;
use super::client_to_upstream::{ClientMessage, ClientToUpstream};
use super::close_frames::put_frame;
use super::upstream_to_client::{UpstreamEvent, UpstreamToClient};
use crate::elevenlabs::socket::{ChargedContent, Dialect, MessageKind};
use crate::policy::verdict::Verdict;
use crate::policy::websocket_frame::{self, FrameHeader, Opcode, Sender, Violation, validate_close};
use crate::secret::{ApiKey, Redactor};

const MASK: [u8; 4] = [7, 0, 200, 31];
const MAX_FRAME_PART: usize = 4_096;
/// Maximum size of a held message, and of the buffers of a session.
const MAX_SIZE: usize = 1024 * 1024;

fn client_to_upstream(dialect: Dialect) -> ClientToUpstream {
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
fn fragments(text: &[u8], fragment_lengths: &[usize], mask: Option<[u8; 4]>) -> Vec<u8> {
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
    let mut client_to_upstream = client_to_upstream(dialect);
    let (mut input, mut output, mut forwarded, mut messages) =
        (BytesMut::new(), BytesMut::new(), Vec::new(), Vec::new());
    let mut remaining = bytes;
    let mut chunks = chunks.iter().copied().chain(std::iter::repeat(usize::MAX));
    while !remaining.is_empty() {
        let (chunk, after) = remaining.split_at(chunks.next().unwrap().max(1).min(remaining.len()));
        input.extend_from_slice(chunk);
        remaining = after;
        while let ClientMessage::Held(_) = client_to_upstream.process(&mut input, &mut output) {
            messages.push(client_to_upstream.message_start.clone());
            client_to_upstream.release(&mut output);
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
                "{dialect:?} in chunks of {size}"
            );
        }
        assert_eq!(
            forward_to_upstream(Dialect::Foreign, &bytes_with_violations, &chunks).0,
            bytes_with_violations,
            "in chunks of {size}"
        );
    }
}

#[test]
fn a_long_message_that_is_not_an_object_keeps_its_content() {
    for (start, opcode) in [("{broken ", Opcode::Text), (" \n {\"a\":1} x", Opcode::Binary)] {
        let text = format!("{start}{}", "y".repeat(3 * MAX_FRAME_PART + 5));
        let bytes = fragments(text.as_bytes(), &[], Some(MASK));
        let bytes = [bytes, encode_frame(true, Opcode::Ping, b"?", Some(MASK))].concat();
        let bytes = if opcode == Opcode::Binary { [&[0x82], &bytes[1..]].concat() } else { bytes };
        for size in [100, MAX_FRAME_PART, MAX_FRAME_PART + 1, 100_000] {
            let (forwarded, _) = forward_to_upstream(Dialect::Unknown, &bytes, &vec![size; bytes.len()]);
            let expected = [(opcode, text.clone().into_bytes()), (Opcode::Ping, b"?".to_vec())];
            assert_eq!(parse_messages(&forwarded), expected, "in chunks of {size}");
        }
    }
}

#[test]
fn a_compressed_message_is_forwarded() {
    let mut bytes = Vec::new();
    FrameHeader { is_final: true, reserved: 4, opcode: Opcode::Text, mask: Some(MASK), length: 3 }
        .encode(&mut bytes);
    bytes.extend([1, 2, 3]);
    assert_eq!(forward_to_upstream(Dialect::Foreign, &bytes, &[]).0, bytes);
}

#[test]
fn a_text_that_is_not_an_object_is_forwarded_before_its_end() {
    let frame = encode_frame(true, Opcode::Text, b"some text", Some(MASK));
    let mut client_to_upstream = client_to_upstream(Dialect::Unknown);
    let (mut input, mut output) = (BytesMut::from(&frame[..9]), BytesMut::new());
    assert_eq!(client_to_upstream.process(&mut input, &mut output), ClientMessage::Forwarded);
    assert_eq!(output, frame[..9]);
    assert!(client_to_upstream.is_in_frame());
}

#[test]
fn a_charged_message_is_held_until_it_is_released() {
    let bytes = [
        fragments(br#"{"text":"Hello","xi_api_key":"k"}"#, &[5, 9], Some(MASK)),
        encode_frame(true, Opcode::Text, br#"{"text":""}"#, Some(MASK)),
    ]
    .concat();
    let mut client_to_upstream = client_to_upstream(Dialect::Speech);
    let (mut input, mut output) = (BytesMut::from(&bytes[..]), BytesMut::new());
    let message = |characters| ClientMessage::Held(ChargedContent { characters, audio_bytes: 0 });
    assert_eq!(client_to_upstream.process(&mut input, &mut output), message(5));
    assert!(output.is_empty() && !input.is_empty());
    assert_eq!(&client_to_upstream.message_start, br#"{"text":"Hello","xi_api_key":"k"}"#);
    client_to_upstream.release(&mut output);
    let [(Opcode::Text, text)] = &parse_messages(&output)[..] else { panic!("{output:?}") };
    assert_eq!(serde_json::from_slice::<Value>(text).unwrap(), json!({"text": "Hello"}));
    assert_eq!(client_to_upstream.process(&mut input, &mut output), message(0));
}

/// Forwards chunks of the client. Returns the characters, the bytes of audio and the violation, if any.
/// Checks after every chunk that the buffers do not exceed their maximum size.
fn count_content(dialect: Dialect, chunks: impl Iterator<Item = Vec<u8>>) -> (u64, u64, Option<Violation>) {
    let mut client_to_upstream = client_to_upstream(dialect);
    let mut from_client = ReadBuffer::new(Sender::Client, true, BytesMut::new());
    let (mut output, mut characters) = (BytesMut::new(), 0);
    for chunk in chunks {
        from_client.extend(&chunk);
        loop {
            let result = client_to_upstream.process(&mut from_client.bytes, &mut output);
            let buffered = from_client.bytes.len() + client_to_upstream.held_bytes();
            assert!(
                buffered <= MAX_SIZE + chunk.len(),
                "at most the limit may be buffered, not {buffered} bytes"
            );
            match result {
                ClientMessage::Held(content) => {
                    characters += content.characters;
                    client_to_upstream.release(&mut output);
                }
                ClientMessage::Refused(violation) => {
                    return (characters, client_to_upstream.audio_bytes(), Some(violation));
                }
                ClientMessage::Forwarded if buffered > MAX_SIZE => {
                    return (characters, client_to_upstream.audio_bytes(), Some(Violation::TooLarge));
                }
                ClientMessage::Forwarded => break,
            }
        }
        if let Some(violation) = from_client.violation() {
            return (characters, client_to_upstream.audio_bytes(), Some(violation));
        }
        output.clear();
    }
    (characters, client_to_upstream.audio_bytes(), None)
}

fn chunks(bytes: &[u8], size: usize) -> impl Iterator<Item = Vec<u8>> {
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
        let fragmented = fragments(text.as_bytes(), &vec![1_000; text.len() / 1_000], Some(MASK));
        for bytes in [one_frame, binary, fragmented] {
            for size in [5_000, 100_000] {
                assert_eq!(
                    count_content(Dialect::Speech, chunks(&bytes, size)),
                    (80_021, 0, None),
                    "{padding}"
                );
            }
        }
    }
    let oversized = encode_frame(true, Opcode::Text, padded(MAX_SIZE).as_bytes(), Some(MASK));
    let refused = Some(Violation::TooLarge);
    assert_eq!(
        count_content(Dialect::Speech, chunks(&oversized[..20], 5_000)),
        (0, 0, refused),
        "a message whose announced length exceeds the maximum must be refused"
    );
    let oversized = fragments(padded(MAX_SIZE).as_bytes(), &vec![10_000; MAX_SIZE / 10_000], Some(MASK));
    assert_eq!(count_content(Dialect::Dialogue, chunks(&oversized, 5_000)), (0, 0, refused));
    let binary = encode_frame(true, Opcode::Binary, b"\x00\x01\x02", Some(MASK));
    assert_eq!(count_content(Dialect::Speech, chunks(&binary, 5)), (0, 0, Some(Violation::NotJson)));
}

#[test]
fn audio_is_counted_while_it_is_forwarded() {
    let text = format!(r#"{{"audio_base_64":"{}"}}"#, "AAAA".repeat(MAX_SIZE));
    let bytes = encode_frame(true, Opcode::Text, text.as_bytes(), Some(MASK));
    assert_eq!(count_content(Dialect::Transcription, chunks(&bytes, 16_384)), (0, 3 * MAX_SIZE as u64, None));
    let (_, audio, _) = count_content(Dialect::Transcription, chunks(&bytes[..MAX_SIZE], 16_384));
    assert!(audio >= 700_000, "{audio} bytes of audio in an incomplete message");
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
                count_content(dialect, flood(chunk.clone(), 2_000)).2,
                Some(Violation::TooLarge),
                "{dialect:?}"
            );
        }
    }
    // Protocols without held messages forward everything immediately, and all protocols forward control
    // frames.
    let ping = encode_frame(true, Opcode::Ping, b"", Some(MASK));
    for dialect in [Dialect::Transcription, Dialect::Agent, Dialect::Unknown] {
        for chunk in [&empty, &tiny] {
            assert_eq!(count_content(dialect, flood(chunk.clone(), 100)).2, None, "{dialect:?}");
        }
    }
    assert_eq!(count_content(Dialect::Speech, flood(ping, 100)).2, None);
}

proptest! {
    #[test]
    fn no_credential_passes_in_any_fragmentation(
        before in "[a-z]{0,8}", after in ".{0,40}", name in "xi_api_key|xi-api-key|authorization",
        fragment_lengths in prop::collection::vec(0_usize..30, 0..8), chunks in prop::collection::vec(1_usize..50, 0..30),
        has_ping in any::<bool>(), is_speech in any::<bool>(), is_binary in any::<bool>(),
    ) {
        let members = json!({ "text": after, "n": {"xi_api_key": [before]} });
        let Value::Object(mut members) = members else { unreachable!() };
        let expected = members.clone();
        members.insert(name, "a-secret-token".into());
        let text = Value::from(members).to_string();
        let mut bytes = fragments(text.as_bytes(), &fragment_lengths, Some(MASK));
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

const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

fn upstream_to_client(dialect: Dialect) -> UpstreamToClient {
    let key = ApiKey::new(KEY).unwrap();
    UpstreamToClient::new(dialect, false, Some(Redactor::new([key].iter()).into()))
}

/// Forwards bytes of the provider. Returns the events and the bytes for the client.
fn forward_to_client(
    upstream_to_client: &mut UpstreamToClient,
    bytes: &[u8],
) -> (Vec<UpstreamEvent>, BytesMut) {
    let (mut input, mut output) = (BytesMut::from(bytes), BytesMut::new());
    let mut events = Vec::new();
    while let Some(event) = upstream_to_client.process(&mut input, &mut output) {
        events.push(event);
    }
    (events, output)
}

#[test]
fn a_refusal_is_held_and_a_ping_is_forwarded() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let refusal = br#"{"message":"Invalid API key","error":"invalid_api_key","code":1008}"#;
    let ping = encode_frame(true, Opcode::Ping, b"?", None);
    let bytes = [
        ping.clone(),
        encode_frame(true, Opcode::Text, refusal, None),
        encode_frame(true, Opcode::Close, b"\x03\xf0Invalid API key", None),
    ]
    .concat();
    let (events, mut output) = forward_to_client(&mut upstream_to_client, &bytes);
    let close = UpstreamEvent::Close(Some(Verdict::InvalidKey));
    assert_eq!(events, [UpstreamEvent::Message(MessageKind::Refused(Verdict::InvalidKey)), close]);
    assert_eq!(output, ping);
    upstream_to_client.open(&mut output);
    assert_eq!(output, bytes);
    assert!(upstream_to_client.has_closed && upstream_to_client.is_open);
}

#[test]
fn held_frames_are_dropped_at_a_failover() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let refusal = encode_frame(true, Opcode::Text, br#"{"error":"invalid_api_key"}"#, None);
    forward_to_client(&mut upstream_to_client, &refusal[..refusal.len() - 1]);
    upstream_to_client.reset();
    let audio = encode_frame(true, Opcode::Text, br#"{"audio":"AAAA"}"#, None);
    let (events, mut output) = forward_to_client(&mut upstream_to_client, &audio);
    assert_eq!(events, [UpstreamEvent::Message(MessageKind::Useful)]);
    upstream_to_client.open(&mut output);
    assert_eq!(output, audio);
}

#[test]
fn an_incomplete_ping_is_not_forwarded() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let ping = encode_frame(true, Opcode::Ping, b"1234", None);
    let (mut input, mut output) = (BytesMut::from(&ping[..4]), BytesMut::new());
    assert_eq!(upstream_to_client.process(&mut input, &mut output), None);
    assert!(output.is_empty());
    input.extend_from_slice(&ping[4..]);
    assert_eq!(upstream_to_client.process(&mut input, &mut output), None);
    assert_eq!(output, ping);
}

#[test]
fn a_session_can_be_served_after_a_refusal() {
    let mut upstream_to_client = upstream_to_client(Dialect::SpeechContexts);
    let error = encode_frame(true, Opcode::Text, br#"{"error":"voice_not_found","message":"x"}"#, None);
    assert_eq!(
        forward_to_client(&mut upstream_to_client, &error).0,
        [UpstreamEvent::Message(MessageKind::Refused(Verdict::NotFound))]
    );
    upstream_to_client.open(&mut BytesMut::new());
    let audio = encode_frame(true, Opcode::Text, br#"{"audio":"AAAA"}"#, None);
    assert_eq!(
        forward_to_client(&mut upstream_to_client, &audio),
        (vec![UpstreamEvent::Message(MessageKind::Useful)], audio[..].into())
    );
}

#[test]
fn a_key_in_a_close_reason_is_redacted() {
    let close = encode_frame(true, Opcode::Close, &[&[3, 240], KEY.as_bytes()].concat(), None);
    let mut upstream_to_client = upstream_to_client(Dialect::Foreign);
    let (_, output) = forward_to_client(&mut upstream_to_client, &close);
    let text = String::from_utf8_lossy(&output).into_owned();
    assert_eq!(output.len(), close.len());
    assert!(text.contains("sk_6c036526...") && !text.contains("aaaabbbb"), "{text}");
}

#[test]
fn audio_is_useful_before_its_message_ends() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let audio =
        encode_frame(true, Opcode::Text, format!(r#"{{"audio":"{}"}}"#, "A".repeat(50_000)).as_bytes(), None);
    assert_eq!(
        forward_to_client(&mut upstream_to_client, &audio[..30_000]).0,
        [UpstreamEvent::Message(MessageKind::Useful)]
    );
    let binary = encode_frame(true, Opcode::Binary, b"sound", None);
    assert_eq!(
        forward_to_client(&mut self::upstream_to_client(Dialect::Unknown), &binary[..4]).0,
        [UpstreamEvent::Message(MessageKind::Useful)]
    );
}

#[test]
fn a_message_ends_with_its_last_frame() {
    let mut upstream_to_client = upstream_to_client(Dialect::Foreign);
    for (bytes, is_in_message) in [
        (encode_frame(false, Opcode::Text, b"a", None), true),
        (encode_frame(true, Opcode::Ping, b"?", None), true),
        (encode_frame(false, Opcode::Continuation, b"b", None), true),
        (encode_frame(true, Opcode::Continuation, b"c", None), false),
    ] {
        forward_to_client(&mut upstream_to_client, &bytes);
        assert_eq!(
            (upstream_to_client.frame_remaining(), upstream_to_client.is_in_message),
            (0, is_in_message)
        );
    }
}

#[test]
fn held_frames_are_bounded() {
    let keep_alive =
        encode_frame(true, Opcode::Text, br#"{"type":"ping","ping_event":{"event_id":1}}"#, None);
    let empty = encode_frame(false, Opcode::Continuation, b"", None);
    for (message_start, repeated) in
        [(&b""[..], keep_alive), (&encode_frame(false, Opcode::Text, b"{", None), empty)]
    {
        let mut upstream_to_client = upstream_to_client(Dialect::Agent);
        let bytes = [message_start, &repeated.repeat(100_000 / repeated.len())].concat();
        let (events, mut output) = forward_to_client(&mut upstream_to_client, &bytes);
        // Held bytes above MAX_HELD_BYTES are too long for a refusal.
        assert_eq!(events.last(), Some(&UpstreamEvent::Message(MessageKind::Useful)));
        upstream_to_client.mark_served(&mut output);
        assert_eq!(output, bytes);
    }
}

#[test]
fn a_served_session_reports_only_refusals() {
    let mut upstream_to_client = upstream_to_client(Dialect::Transcription);
    upstream_to_client.mark_served(&mut BytesMut::new());
    let bytes = [
        encode_frame(true, Opcode::Text, br#"{"message_type":"partial_transcript","text":"no error"}"#, None),
        encode_frame(
            true,
            Opcode::Text,
            br#"{"message_type":"quota_exceeded","error":"You have exceeded your quota."}"#,
            None,
        ),
    ]
    .concat();
    let (events, output) = forward_to_client(&mut upstream_to_client, &bytes);
    assert!(
        matches!(events[..], [UpstreamEvent::Message(MessageKind::Refused(Verdict::WorkspaceQuota(_)))]),
        "{events:?}"
    );
    assert_eq!(output, bytes);
}

#[test]
fn a_key_that_is_split_at_any_position_is_redacted() {
    let text = format!(r#"{{"a":"{KEY}"}}"#);
    let bytes = encode_frame(true, Opcode::Text, text.as_bytes(), None);
    for cut in 1..bytes.len() {
        let mut upstream_to_client = upstream_to_client(Dialect::Foreign);
        let (mut input, mut output) = (BytesMut::from(&bytes[..cut]), BytesMut::new());
        assert_eq!(upstream_to_client.process(&mut input, &mut output), None);
        input.extend_from_slice(&bytes[cut..]);
        assert_eq!(upstream_to_client.process(&mut input, &mut output), None);
        let [(Opcode::Text, redacted)] = &parse_messages(&output)[..] else { panic!("expected one message") };
        let redacted = String::from_utf8(redacted.clone()).unwrap();
        assert!(
            redacted.starts_with(r#"{"a":"sk_6c036526..."#) && redacted.ends_with(r#"d452b"}"#),
            "{redacted}"
        );
        assert_eq!(redacted.len(), text.len());
    }
}

/// Returns whether more of the key is visible than its short form shows.
fn shows_key(bytes: &[u8]) -> bool {
    KEY.as_bytes()[11..KEY.len() - 5].windows(4).any(|part| memchr::memmem::find(bytes, part).is_some())
}

#[test]
fn a_key_is_redacted_in_every_kind_of_frame() {
    for (opcode, payload) in [
        (Opcode::Text, KEY.as_bytes().to_vec()),
        (Opcode::Binary, [b"\xff\x00", KEY.as_bytes()].concat()),
        (Opcode::Ping, KEY.as_bytes().to_vec()),
        (Opcode::Pong, KEY.as_bytes().to_vec()),
        (Opcode::Close, [b"\x03\xe8", KEY.as_bytes()].concat()),
        // A close reason has at most 123 bytes: the provider cuts longer ones.
        (Opcode::Close, [&b"\x03\xe8"[..], &[b'x'; 90], &KEY.as_bytes()[..33]].concat()),
        (Opcode::Ping, KEY.as_bytes()[..30].to_vec()),
    ] {
        for dialect in [Dialect::Speech, Dialect::Agent, Dialect::Foreign] {
            let bytes = encode_frame(true, opcode, &payload, None);
            let mut upstream_to_client = upstream_to_client(dialect);
            upstream_to_client.mark_served(&mut BytesMut::new());
            let (_, output) = forward_to_client(&mut upstream_to_client, &bytes);
            assert_eq!(output.len(), bytes.len(), "{opcode:?}");
            assert!(!shows_key(&output), "{opcode:?} on {dialect:?}: {output:?}");
        }
    }
}

#[test]
fn an_invalid_close_is_replaced_and_classified() {
    for (payload, code, verdict) in [
        (&b"\x03\xf0Invalid API key\xff"[..], 1007, Some(Verdict::InvalidKey)),
        (b"\x00\x01Invalid API key", 1002, Some(Verdict::InvalidKey)),
        (b"\x03", 1002, None),
    ] {
        let mut upstream_to_client = upstream_to_client(Dialect::Speech);
        let (events, mut output) =
            forward_to_client(&mut upstream_to_client, &encode_frame(true, Opcode::Close, payload, None));
        assert_eq!(events, [UpstreamEvent::Close(verdict)]);
        upstream_to_client.open(&mut output);
        let [(Opcode::Close, close)] = &parse_messages(&output)[..] else { panic!("{output:?}") };
        assert_eq!(validate_close(close), Ok(code));
    }
}

#[test]
fn a_queue_status_neither_serves_nor_refuses_a_session() {
    let mut upstream_to_client = upstream_to_client(Dialect::Agent);
    let queued = encode_frame(true, Opcode::Text, br#"{"type":"queue_status"}"#, None);
    let (events, mut output) = forward_to_client(&mut upstream_to_client, &queued);
    assert_eq!(events, [UpstreamEvent::Message(MessageKind::Queued)]);
    assert!(output.is_empty());
    upstream_to_client.forward_held(&mut output);
    assert_eq!(output, queued);
    assert!(!upstream_to_client.is_open && !upstream_to_client.is_served);
    let refusal = encode_frame(true, Opcode::Close, b"\x03\xeaThis request exceeds your quota limit.", None);
    let (events, output) = forward_to_client(&mut upstream_to_client, &refusal);
    assert!(matches!(events[..], [UpstreamEvent::Close(Some(Verdict::WorkspaceQuota(_)))]), "{events:?}");
    assert!(output.is_empty());
}

proptest! {
    #[test]
    fn a_key_is_redacted_in_any_fragmentation(
        // These characters cannot form the middle of the key, so `shows_key` finds only what the redactor left.
        start in "[g-z_]{0,9}", end in "[g-z_]{0,9}", fragment_lengths in prop::collection::vec(0_usize..40, 0..6),
        chunks in prop::collection::vec(1_usize..40, 0..30), is_binary in any::<bool>(),
    ) {
        let text = format!("{start}{KEY}{end}");
        let mut bytes = fragments(text.as_bytes(), &fragment_lengths, None);
        if is_binary {
            // Changes the opcode from text to binary.
            bytes[0] = bytes[0] & 0xf0 | 2;
        }
        let mut upstream_to_client = upstream_to_client(Dialect::Agent);
        upstream_to_client.mark_served(&mut BytesMut::new());
        let (mut input, mut output, mut rest) = (BytesMut::new(), BytesMut::new(), &bytes[..]);
        for size in chunks.into_iter().chain([usize::MAX]) {
            let (chunk, after) = rest.split_at(size.min(rest.len()));
            input.extend_from_slice(chunk);
            rest = after;
            while upstream_to_client.process(&mut input, &mut output).is_some() {}
        }
        prop_assert!(input.is_empty());
        prop_assert_eq!(output.len(), bytes.len());
        let messages = parse_messages(&output);
        let [(_, redacted)] = &messages[..] else { panic!("expected one message") };
        prop_assert!(!shows_key(redacted), "{}", String::from_utf8_lossy(redacted));
        prop_assert!(redacted.starts_with(start.as_bytes()) && redacted.ends_with(end.as_bytes()));
    }
}

#[test]
fn a_written_frame_can_be_read() {
    let mut output = BytesMut::new();
    put_frame(&mut output, Opcode::Text, b"{}", Some(MASK));
    put_frame(&mut output, Opcode::Ping, b"", None);
    assert_eq!(parse_messages(&output), [(Opcode::Text, b"{}".to_vec()), (Opcode::Ping, Vec::new())]);
}
