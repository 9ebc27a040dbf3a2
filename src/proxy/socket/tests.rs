//! Tests of the forwarding of frames in both directions, split at any position.

use bytes::BytesMut;
use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::buffers::ReadBuffer;
use super::client_to_upstream::{ClientMessage, ClientToUpstream};
use super::close_frames::put;
use super::upstream_to_client::{UpstreamEvent, UpstreamToClient};
use crate::elevenlabs::socket::{Dialect, MessageKind, SpokenText};
use crate::policy::frame::{self, Head, Opcode, Sender, Violation, check_close};
use crate::policy::verdict::Verdict;
use crate::secret::{ApiKey, Redactor};

const MASK: [u8; 4] = [7, 0, 200, 31];
const SLICE: usize = 4_096;
/// Maximum size of a held message, and maximum memory of a session.
const MAX: usize = 1024 * 1024;

fn client_to_upstream(dialect: Dialect) -> ClientToUpstream {
    ClientToUpstream::new(dialect, SLICE, MAX)
}

/// A frame, masked or not.
fn frame(is_final: bool, opcode: Opcode, payload: &[u8], masked: Option<[u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    Head { is_final, reserved: 0, opcode, mask: masked, length: payload.len() as u64 }.write(&mut bytes);
    let from = bytes.len();
    bytes.extend_from_slice(payload);
    if let Some(masked) = masked {
        frame::mask(&mut bytes[from..], masked, 0);
    }
    bytes
}

/// A text message in frames that are split at `cuts`.
fn fragments(text: &[u8], cuts: &[usize], masked: Option<[u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    for (index, cut) in cuts.iter().enumerate() {
        let (piece, after) = rest.split_at((*cut).min(rest.len()));
        let opcode = if index == 0 { Opcode::Text } else { Opcode::Continuation };
        bytes.extend(frame(false, opcode, piece, masked));
        rest = after;
    }
    let opcode = if cuts.is_empty() { Opcode::Text } else { Opcode::Continuation };
    bytes.extend(frame(true, opcode, rest, masked));
    bytes
}

/// Reads a stream: complete messages with their opcode, and control frames as they come.
fn read(mut bytes: &[u8]) -> Vec<(Opcode, Vec<u8>)> {
    let (mut read, mut message) = (Vec::new(), None::<(Opcode, Vec<u8>)>);
    while let Some((head, length)) = frame::read(bytes) {
        let end = length + usize::try_from(head.length).unwrap();
        let mut payload = bytes[length..end].to_vec();
        if let Some(masked) = head.mask {
            frame::mask(&mut payload, masked, 0);
        }
        bytes = &bytes[end..];
        if head.opcode.is_control() {
            read.push((head.opcode, payload));
            continue;
        }
        assert_eq!(head.opcode == Opcode::Continuation, message.is_some(), "fragments follow each other");
        let (_, whole) = message.get_or_insert((head.opcode, Vec::new()));
        whole.extend(payload);
        if head.is_final {
            read.extend(message.take());
        }
    }
    assert!(bytes.is_empty() && message.is_none(), "no bytes and no message remain");
    read
}

/// The forwarded bytes and the held messages for the client's bytes, which arrive in pieces of these sizes.
fn sent(dialect: Dialect, bytes: &[u8], pieces: &[usize]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut client_to_upstream = client_to_upstream(dialect);
    let (mut inbox, mut out, mut forwarded, mut messages) =
        (BytesMut::new(), BytesMut::new(), Vec::new(), Vec::new());
    let mut rest = bytes;
    let mut pieces = pieces.iter().copied().chain(std::iter::repeat(usize::MAX));
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(pieces.next().unwrap().max(1).min(rest.len()));
        inbox.extend_from_slice(piece);
        rest = after;
        while let ClientMessage::Message(_) = client_to_upstream.take(&mut inbox, &mut out) {
            messages.push(client_to_upstream.held_start().to_vec());
            client_to_upstream.release(&mut out);
        }
        forwarded.extend_from_slice(&out.split());
    }
    assert!(inbox.is_empty());
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
        bytes.extend(frame(true, opcode, payload, Some(MASK)));
    }
    // On other paths, the receiver checks for violations.
    let mut foreign = bytes.clone();
    foreign.extend(frame(true, Opcode::Reserved(3), b"?", Some(MASK)));
    foreign.extend(frame(true, Opcode::Binary, br#"{"xi_api_key":1}"#, Some(MASK)));
    foreign.extend(frame(true, Opcode::Text, br#"{"xi_api_key":1}"#, None));
    for size in [1, 2, 3, 7, 100, 100_000] {
        let pieces = vec![size; foreign.len()];
        for dialect in [Dialect::Unknown, Dialect::Agent] {
            assert_eq!(sent(dialect, &bytes, &pieces).0, bytes, "{dialect:?} in pieces of {size}");
        }
        assert_eq!(sent(Dialect::Foreign, &foreign, &pieces).0, foreign, "in pieces of {size}");
    }
}

#[test]
fn a_long_message_that_is_no_object_keeps_its_frames() {
    for (start, opcode) in [("{broken ", Opcode::Text), (" \n {\"a\":1} x", Opcode::Binary)] {
        let text = format!("{start}{}", "y".repeat(3 * SLICE + 5));
        let bytes = fragments(text.as_bytes(), &[], Some(MASK));
        let bytes = [bytes, frame(true, Opcode::Ping, b"?", Some(MASK))].concat();
        let bytes = if opcode == Opcode::Binary { [&[0x82], &bytes[1..]].concat() } else { bytes };
        for size in [100, SLICE, SLICE + 1, 100_000] {
            let (forwarded, _) = sent(Dialect::Unknown, &bytes, &vec![size; bytes.len()]);
            let expected = [(opcode, text.clone().into_bytes()), (Opcode::Ping, b"?".to_vec())];
            assert_eq!(read(&forwarded), expected, "in pieces of {size}");
        }
    }
}

#[test]
fn a_compressed_message_is_forwarded() {
    let mut bytes = Vec::new();
    Head { is_final: true, reserved: 4, opcode: Opcode::Text, mask: Some(MASK), length: 3 }.write(&mut bytes);
    bytes.extend([1, 2, 3]);
    assert_eq!(sent(Dialect::Foreign, &bytes, &[]).0, bytes);
}

#[test]
fn a_text_that_is_no_object_does_not_wait_for_its_end() {
    let whole = frame(true, Opcode::Text, b"some text", Some(MASK));
    let mut client_to_upstream = client_to_upstream(Dialect::Unknown);
    let (mut inbox, mut out) = (BytesMut::from(&whole[..9]), BytesMut::new());
    assert_eq!(client_to_upstream.take(&mut inbox, &mut out), ClientMessage::Forwarded);
    assert_eq!(out, whole[..9]);
    assert!(client_to_upstream.is_in_frame());
}

#[test]
fn a_charged_message_is_held_until_its_release() {
    let bytes = [
        fragments(br#"{"text":"Hello","xi_api_key":"k"}"#, &[5, 9], Some(MASK)),
        frame(true, Opcode::Text, br#"{"text":""}"#, Some(MASK)),
    ]
    .concat();
    let mut client_to_upstream = client_to_upstream(Dialect::Speech);
    let (mut inbox, mut out) = (BytesMut::from(&bytes[..]), BytesMut::new());
    let message = |characters| ClientMessage::Message(SpokenText { characters, audio_bytes: 0 });
    assert_eq!(client_to_upstream.take(&mut inbox, &mut out), message(5));
    assert!(out.is_empty() && !inbox.is_empty());
    assert_eq!(client_to_upstream.held_start(), br#"{"text":"Hello","xi_api_key":"k"}"#);
    client_to_upstream.release(&mut out);
    let [(Opcode::Text, text)] = &read(&out)[..] else { panic!("{out:?}") };
    assert_eq!(serde_json::from_slice::<Value>(text).unwrap(), json!({"text": "Hello"}));
    assert_eq!(client_to_upstream.take(&mut inbox, &mut out), message(0));
}

/// The count of a client's bytes, which arrive in pieces, and the violation, if there is one.
/// Checks after every piece that no more memory is used than allowed.
fn count(dialect: Dialect, pieces: impl Iterator<Item = Vec<u8>>) -> (u64, u64, Option<Violation>) {
    let mut client_to_upstream = client_to_upstream(dialect);
    let mut from_client = ReadBuffer::new(Sender::Client, true, BytesMut::new());
    let (mut out, mut characters) = (BytesMut::new(), 0);
    for piece in pieces {
        from_client.extend(&piece);
        loop {
            let result = client_to_upstream.take(&mut from_client.bytes, &mut out);
            let held = from_client.bytes.len() + client_to_upstream.held_bytes();
            assert!(held <= MAX + piece.len(), "{held} bytes are in memory");
            match result {
                ClientMessage::Message(content) => {
                    characters += content.characters;
                    client_to_upstream.release(&mut out);
                }
                ClientMessage::Refused(violation) => {
                    return (characters, client_to_upstream.audio_bytes(), Some(violation));
                }
                ClientMessage::Forwarded if held > MAX => {
                    return (characters, client_to_upstream.audio_bytes(), Some(Violation::TooLarge));
                }
                ClientMessage::Forwarded => break,
            }
        }
        if let Some(violation) = from_client.violation() {
            return (characters, client_to_upstream.audio_bytes(), Some(violation));
        }
        out.clear();
    }
    (characters, client_to_upstream.audio_bytes(), None)
}

fn pieces(bytes: &[u8], size: usize) -> impl Iterator<Item = Vec<u8>> {
    bytes.chunks(size).map(<[u8]>::to_vec)
}

#[test]
fn text_is_counted_in_any_length_and_frames() {
    let padded =
        |padding: usize| format!(r#"{{"pad":"{}","text":"{}"}}"#, " ".repeat(padding), "x".repeat(80_021));
    for padding in [0, 200_000, 300_000, 800_000] {
        let text = padded(padding);
        let whole = frame(true, Opcode::Text, text.as_bytes(), Some(MASK));
        let binary = frame(true, Opcode::Binary, text.as_bytes(), Some(MASK));
        let many = fragments(text.as_bytes(), &vec![1_000; text.len() / 1_000], Some(MASK));
        for bytes in [whole, binary, many] {
            for size in [5_000, 100_000] {
                assert_eq!(count(Dialect::Speech, pieces(&bytes, size)), (80_021, 0, None), "{padding}");
            }
        }
    }
    let large = frame(true, Opcode::Text, padded(MAX).as_bytes(), Some(MASK));
    let refused = Some(Violation::TooLarge);
    assert_eq!(
        count(Dialect::Speech, pieces(&large[..20], 5_000)),
        (0, 0, refused),
        "the announced length is refused"
    );
    let large = fragments(padded(MAX).as_bytes(), &vec![10_000; MAX / 10_000], Some(MASK));
    assert_eq!(count(Dialect::Dialogue, pieces(&large, 5_000)), (0, 0, refused));
    let binary = frame(true, Opcode::Binary, b"\x00\x01\x02", Some(MASK));
    assert_eq!(count(Dialect::Speech, pieces(&binary, 5)), (0, 0, Some(Violation::NotJson)));
}

#[test]
fn audio_is_counted_while_it_is_forwarded() {
    let text = format!(r#"{{"audio_base_64":"{}"}}"#, "AAAA".repeat(MAX));
    let bytes = frame(true, Opcode::Text, text.as_bytes(), Some(MASK));
    assert_eq!(count(Dialect::Transcription, pieces(&bytes, 16_384)), (0, 3 * MAX as u64, None));
    let (_, audio, _) = count(Dialect::Transcription, pieces(&bytes[..MAX], 16_384));
    assert!(audio >= 700_000, "{audio} of a message that has not ended");
}

#[test]
fn floods_of_small_frames_are_bounded_by_memory() {
    let begin = frame(false, Opcode::Text, b"{", Some(MASK));
    let flood = |piece: Vec<u8>, reads: usize| {
        let many = piece.repeat(16_384 / piece.len());
        std::iter::once(begin.clone()).chain(std::iter::repeat_n(many, reads))
    };
    let empty = frame(false, Opcode::Continuation, b"", Some(MASK));
    let tiny = frame(false, Opcode::Continuation, b" ", Some(MASK));
    for dialect in [Dialect::Speech, Dialect::SpeechContexts, Dialect::Dialogue, Dialect::DialogueContexts] {
        for piece in [&empty, &tiny] {
            assert_eq!(
                count(dialect, flood(piece.clone(), 2_000)).2,
                Some(Violation::TooLarge),
                "{dialect:?}"
            );
        }
    }
    // In protocols without held messages, everything is forwarded; so are control frames.
    let ping = frame(true, Opcode::Ping, b"", Some(MASK));
    for dialect in [Dialect::Transcription, Dialect::Agent, Dialect::Unknown] {
        for piece in [&empty, &tiny] {
            assert_eq!(count(dialect, flood(piece.clone(), 100)).2, None, "{dialect:?}");
        }
    }
    assert_eq!(count(Dialect::Speech, flood(ping, 100)).2, None);
}

proptest! {
    #[test]
    fn no_credential_passes_in_any_fragmentation(
        before in "[a-z]{0,8}", after in ".{0,40}", name in "xi_api_key|xi-api-key|authorization",
        cuts in prop::collection::vec(0_usize..30, 0..8), pieces in prop::collection::vec(1_usize..50, 0..30),
        pings in any::<bool>(), spoken in any::<bool>(), is_binary in any::<bool>(),
    ) {
        let members = json!({ "text": after, "n": {"xi_api_key": [before]} });
        let Value::Object(mut members) = members else { unreachable!() };
        let expected = members.clone();
        members.insert(name, "a-secret-token".into());
        let text = Value::from(members).to_string();
        let mut bytes = fragments(text.as_bytes(), &cuts, Some(MASK));
        if pings {
            // The control frame is inserted between two frames of the message.
            let first = frame::read(&bytes).map(|(head, length)| length + usize::try_from(head.length).unwrap());
            let ping = frame(true, Opcode::Ping, b"?", Some(MASK));
            bytes.splice(first.unwrap()..first.unwrap(), ping);
        }
        let dialect = if spoken { Dialect::Speech } else { Dialect::Agent };
        let kind = if is_binary { Opcode::Binary } else { Opcode::Text };
        if is_binary {
            bytes[0] = bytes[0] & 0xf0 | 2;
        }
        let (forwarded, messages) = sent(dialect, &bytes, &pieces);
        prop_assert_eq!(messages.len(), usize::from(spoken));
        let texts: Vec<Vec<u8>> =
            read(&forwarded).into_iter().filter(|(opcode, _)| *opcode == kind).map(|(_, text)| text).collect();
        prop_assert_eq!(texts.len(), 1);
        prop_assert_eq!(serde_json::from_slice::<Map<String, Value>>(&texts[0]).unwrap(), expected);
    }
}

const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

fn upstream_to_client(dialect: Dialect) -> UpstreamToClient {
    let key = ApiKey::new(KEY).unwrap();
    UpstreamToClient::new(dialect, false, Some(Redactor::new([key].iter()).into()))
}

/// The events from a provider's bytes, and the bytes that are forwarded to the client.
fn receive(upstream_to_client: &mut UpstreamToClient, bytes: &[u8]) -> (Vec<UpstreamEvent>, BytesMut) {
    let (mut inbox, mut out) = (BytesMut::from(bytes), BytesMut::new());
    let mut events = Vec::new();
    while let Some(event) = upstream_to_client.take(&mut inbox, &mut out) {
        events.push(event);
    }
    (events, out)
}

#[test]
fn a_refusal_is_held_and_a_ping_is_forwarded() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let refusal = br#"{"message":"Invalid API key","error":"invalid_api_key","code":1008}"#;
    let ping = frame(true, Opcode::Ping, b"?", None);
    let bytes = [
        ping.clone(),
        frame(true, Opcode::Text, refusal, None),
        frame(true, Opcode::Close, b"\x03\xf0Invalid API key", None),
    ]
    .concat();
    let (events, mut out) = receive(&mut upstream_to_client, &bytes);
    let close = UpstreamEvent::Close(Some(Verdict::InvalidKey));
    assert_eq!(events, [UpstreamEvent::Message(MessageKind::Refused(Verdict::InvalidKey)), close]);
    assert_eq!(out, ping);
    upstream_to_client.open(&mut out);
    assert_eq!(out, bytes);
    assert!(upstream_to_client.has_closed() && upstream_to_client.is_open());
}

#[test]
fn held_frames_are_dropped_at_a_failover() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let half = frame(true, Opcode::Text, br#"{"error":"invalid_api_key"}"#, None);
    receive(&mut upstream_to_client, &half[..half.len() - 1]);
    upstream_to_client.restart();
    let sound = frame(true, Opcode::Text, br#"{"audio":"AAAA"}"#, None);
    let (events, mut out) = receive(&mut upstream_to_client, &sound);
    assert_eq!(events, [UpstreamEvent::Message(MessageKind::Useful)]);
    upstream_to_client.open(&mut out);
    assert_eq!(out, sound);
}

#[test]
fn half_a_ping_is_not_forwarded() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let ping = frame(true, Opcode::Ping, b"1234", None);
    let (mut inbox, mut out) = (BytesMut::from(&ping[..4]), BytesMut::new());
    assert_eq!(upstream_to_client.take(&mut inbox, &mut out), None);
    assert!(out.is_empty());
    inbox.extend_from_slice(&ping[4..]);
    assert_eq!(upstream_to_client.take(&mut inbox, &mut out), None);
    assert_eq!(out, ping);
}

#[test]
fn a_session_that_is_refused_first_may_be_served_later() {
    let mut upstream_to_client = upstream_to_client(Dialect::SpeechContexts);
    let error = frame(true, Opcode::Text, br#"{"error":"voice_not_found","message":"x"}"#, None);
    assert_eq!(
        receive(&mut upstream_to_client, &error).0,
        [UpstreamEvent::Message(MessageKind::Refused(Verdict::NotFound))]
    );
    upstream_to_client.open(&mut BytesMut::new());
    let sound = frame(true, Opcode::Text, br#"{"audio":"AAAA"}"#, None);
    assert_eq!(
        receive(&mut upstream_to_client, &sound),
        (vec![UpstreamEvent::Message(MessageKind::Useful)], sound[..].into())
    );
}

#[test]
fn a_key_in_the_reason_of_a_close_is_redacted() {
    let close = frame(true, Opcode::Close, &[&[3, 240], KEY.as_bytes()].concat(), None);
    let mut upstream_to_client = upstream_to_client(Dialect::Foreign);
    let (_, out) = receive(&mut upstream_to_client, &close);
    let text = String::from_utf8_lossy(&out).into_owned();
    assert_eq!(out.len(), close.len());
    assert!(text.contains("sk_6c036526...") && !text.contains("aaaabbbb"), "{text}");
}

#[test]
fn audio_is_useful_before_its_message_ends() {
    let mut upstream_to_client = upstream_to_client(Dialect::Speech);
    let sound =
        frame(true, Opcode::Text, format!(r#"{{"audio":"{}"}}"#, "A".repeat(50_000)).as_bytes(), None);
    assert_eq!(
        receive(&mut upstream_to_client, &sound[..30_000]).0,
        [UpstreamEvent::Message(MessageKind::Useful)]
    );
    let binary = frame(true, Opcode::Binary, b"sound", None);
    assert_eq!(
        receive(&mut self::upstream_to_client(Dialect::Unknown), &binary[..4]).0,
        [UpstreamEvent::Message(MessageKind::Useful)]
    );
}

#[test]
fn a_message_ends_with_its_last_frame() {
    let mut upstream_to_client = upstream_to_client(Dialect::Foreign);
    for (bytes, is_in_message) in [
        (frame(false, Opcode::Text, b"a", None), true),
        (frame(true, Opcode::Ping, b"?", None), true),
        (frame(false, Opcode::Continuation, b"b", None), true),
        (frame(true, Opcode::Continuation, b"c", None), false),
    ] {
        receive(&mut upstream_to_client, &bytes);
        assert_eq!((upstream_to_client.frame_left(), upstream_to_client.is_in_message()), (0, is_in_message));
    }
}

#[test]
fn held_frames_are_bounded() {
    let aside = frame(true, Opcode::Text, br#"{"type":"ping","ping_event":{"event_id":1}}"#, None);
    let empty = frame(false, Opcode::Continuation, b"", None);
    for (begin, more) in [(&b""[..], aside), (&frame(false, Opcode::Text, b"{", None), empty)] {
        let mut upstream_to_client = upstream_to_client(Dialect::Agent);
        let bytes = [begin, &more.repeat(100_000 / more.len())].concat();
        let (events, mut out) = receive(&mut upstream_to_client, &bytes);
        assert_eq!(events.last(), Some(&UpstreamEvent::Message(MessageKind::Useful)));
        upstream_to_client.serve(&mut out);
        assert_eq!(out, bytes);
    }
}

#[test]
fn a_served_session_reports_refusals_only() {
    let mut upstream_to_client = upstream_to_client(Dialect::Transcription);
    upstream_to_client.serve(&mut BytesMut::new());
    let bytes = [
        frame(true, Opcode::Text, br#"{"message_type":"partial_transcript","text":"no error"}"#, None),
        frame(
            true,
            Opcode::Text,
            br#"{"message_type":"quota_exceeded","error":"You have exceeded your quota."}"#,
            None,
        ),
    ]
    .concat();
    let (events, out) = receive(&mut upstream_to_client, &bytes);
    assert!(
        matches!(events[..], [UpstreamEvent::Message(MessageKind::Refused(Verdict::WorkspaceQuota(_)))]),
        "{events:?}"
    );
    assert_eq!(out, bytes);
}

#[test]
fn a_key_is_redacted_across_any_cut() {
    let text = format!(r#"{{"a":"{KEY}"}}"#);
    let bytes = frame(true, Opcode::Text, text.as_bytes(), None);
    for cut in 1..bytes.len() {
        let mut upstream_to_client = upstream_to_client(Dialect::Foreign);
        let (mut inbox, mut out) = (BytesMut::from(&bytes[..cut]), BytesMut::new());
        assert_eq!(upstream_to_client.take(&mut inbox, &mut out), None);
        inbox.extend_from_slice(&bytes[cut..]);
        assert_eq!(upstream_to_client.take(&mut inbox, &mut out), None);
        let [(Opcode::Text, redacted)] = &read(&out)[..] else { panic!("one message") };
        let redacted = String::from_utf8(redacted.clone()).unwrap();
        assert!(
            redacted.starts_with(r#"{"a":"sk_6c036526..."#) && redacted.ends_with(r#"d452b"}"#),
            "{redacted}"
        );
        assert_eq!(redacted.len(), text.len());
    }
}

/// Whether more of the key is visible than its short form shows.
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
            let bytes = frame(true, opcode, &payload, None);
            let mut upstream_to_client = upstream_to_client(dialect);
            upstream_to_client.serve(&mut BytesMut::new());
            let (_, out) = receive(&mut upstream_to_client, &bytes);
            assert_eq!(out.len(), bytes.len(), "{opcode:?}");
            assert!(!shows_key(&out), "{opcode:?} on {dialect:?}: {out:?}");
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
        let (events, mut out) = receive(&mut upstream_to_client, &frame(true, Opcode::Close, payload, None));
        assert_eq!(events, [UpstreamEvent::Close(verdict)]);
        upstream_to_client.open(&mut out);
        let [(Opcode::Close, close)] = &read(&out)[..] else { panic!("{out:?}") };
        assert_eq!(check_close(close), Ok(code));
    }
}

#[test]
fn a_queue_status_is_forwarded_without_a_decision() {
    let mut upstream_to_client = upstream_to_client(Dialect::Agent);
    let queued = frame(true, Opcode::Text, br#"{"type":"queue_status"}"#, None);
    let (events, mut out) = receive(&mut upstream_to_client, &queued);
    assert_eq!(events, [UpstreamEvent::Message(MessageKind::Queued)]);
    assert!(out.is_empty());
    upstream_to_client.forward_held(&mut out);
    assert_eq!(out, queued);
    assert!(!upstream_to_client.is_open() && !upstream_to_client.is_served());
    let refusal = frame(true, Opcode::Close, b"\x03\xeaThis request exceeds your quota limit.", None);
    let (events, out) = receive(&mut upstream_to_client, &refusal);
    assert!(matches!(events[..], [UpstreamEvent::Close(Some(Verdict::WorkspaceQuota(_)))]), "{events:?}");
    assert!(out.is_empty());
}

proptest! {
    #[test]
    fn a_key_is_redacted_in_any_fragmentation(
        before in "[a-zs_]{0,9}", after in "[a-zs_]{0,9}", cuts in prop::collection::vec(0_usize..40, 0..6),
        pieces in prop::collection::vec(1_usize..40, 0..30), is_binary in any::<bool>(),
    ) {
        let text = format!("{before}{KEY}{after}");
        let mut bytes = fragments(text.as_bytes(), &cuts, None);
        if is_binary {
            bytes[0] = bytes[0] & 0xf0 | 2;
        }
        let mut upstream_to_client = upstream_to_client(Dialect::Agent);
        upstream_to_client.serve(&mut BytesMut::new());
        let (mut inbox, mut out, mut rest) = (BytesMut::new(), BytesMut::new(), &bytes[..]);
        for size in pieces.into_iter().chain([usize::MAX]) {
            let (piece, behind) = rest.split_at(size.min(rest.len()));
            inbox.extend_from_slice(piece);
            rest = behind;
            while upstream_to_client.take(&mut inbox, &mut out).is_some() {}
        }
        prop_assert!(inbox.is_empty());
        prop_assert_eq!(out.len(), bytes.len());
        let messages = read(&out);
        let [(_, redacted)] = &messages[..] else { panic!("one message") };
        prop_assert!(!shows_key(redacted), "{}", String::from_utf8_lossy(redacted));
        prop_assert!(redacted.starts_with(before.as_bytes()) && redacted.ends_with(after.as_bytes()));
    }
}

#[test]
fn a_written_frame_can_be_read() {
    let mut out = BytesMut::new();
    put(&mut out, Opcode::Text, b"{}", Some(MASK));
    put(&mut out, Opcode::Ping, b"", None);
    assert_eq!(read(&out), [(Opcode::Text, b"{}".to_vec()), (Opcode::Ping, Vec::new())]);
}
