//! Tests the forwarding of the provider's frames to the client: held frames, the classification of messages and close
//! frames, the replacement of invalid close frames, and the redaction of keys.

use super::*;
use crate::elevenlabs::socket::MessageKind;
use crate::policy::verdict::Verdict;
use crate::policy::websocket_frame::validate_close;
use crate::proxy::socket::upstream_to_client::{UpstreamEvent, UpstreamToClient};
use crate::secret::{ApiKey, Redactor};

const KEY: &str = "sk_6c036526aaaabbbbccccddddeeeeffff0000111122223333d452b";

fn create_upstream_to_client(dialect: Dialect) -> UpstreamToClient {
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
    while let Some(event) = upstream_to_client.process_input(&mut input, &mut output) {
        events.push(event);
    }
    (events, output)
}

#[test]
fn a_refusal_is_held_and_a_ping_is_forwarded() {
    let mut upstream_to_client = create_upstream_to_client(Dialect::Speech);
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
    let mut upstream_to_client = create_upstream_to_client(Dialect::Speech);
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
    let mut upstream_to_client = create_upstream_to_client(Dialect::Speech);
    let ping = encode_frame(true, Opcode::Ping, b"1234", None);
    let (mut input, mut output) = (BytesMut::from(&ping[..4]), BytesMut::new());
    assert_eq!(upstream_to_client.process_input(&mut input, &mut output), None);
    assert!(output.is_empty());
    input.extend_from_slice(&ping[4..]);
    assert_eq!(upstream_to_client.process_input(&mut input, &mut output), None);
    assert_eq!(output, ping);
}

#[test]
fn a_session_can_be_served_after_a_refusal() {
    let mut upstream_to_client = create_upstream_to_client(Dialect::SpeechContexts);
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
    let mut upstream_to_client = create_upstream_to_client(Dialect::Foreign);
    let (_, output) = forward_to_client(&mut upstream_to_client, &close);
    let text = String::from_utf8_lossy(&output).into_owned();
    assert_eq!(output.len(), close.len());
    assert!(
        text.contains("sk_6c036526...") && !text.contains("aaaabbbb"),
        "the key must be redacted in {text}"
    );
}

#[test]
fn audio_is_useful_before_its_message_ends() {
    let mut upstream_to_client = create_upstream_to_client(Dialect::Speech);
    let audio =
        encode_frame(true, Opcode::Text, format!(r#"{{"audio":"{}"}}"#, "A".repeat(50_000)).as_bytes(), None);
    assert_eq!(
        forward_to_client(&mut upstream_to_client, &audio[..30_000]).0,
        [UpstreamEvent::Message(MessageKind::Useful)]
    );
    let binary = encode_frame(true, Opcode::Binary, b"sound", None);
    assert_eq!(
        forward_to_client(&mut create_upstream_to_client(Dialect::Unknown), &binary[..4]).0,
        [UpstreamEvent::Message(MessageKind::Useful)]
    );
}

#[test]
fn a_message_ends_with_its_last_frame() {
    let mut upstream_to_client = create_upstream_to_client(Dialect::Foreign);
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
        let mut upstream_to_client = create_upstream_to_client(Dialect::Agent);
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
    let mut upstream_to_client = create_upstream_to_client(Dialect::Transcription);
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
        "only the refusal must be reported, not {events:?}"
    );
    assert_eq!(output, bytes);
}

#[test]
fn a_key_that_is_split_at_any_position_is_redacted() {
    let text = format!(r#"{{"a":"{KEY}"}}"#);
    let bytes = encode_frame(true, Opcode::Text, text.as_bytes(), None);
    for cut in 1..bytes.len() {
        let mut upstream_to_client = create_upstream_to_client(Dialect::Foreign);
        let (mut input, mut output) = (BytesMut::from(&bytes[..cut]), BytesMut::new());
        assert_eq!(upstream_to_client.process_input(&mut input, &mut output), None);
        input.extend_from_slice(&bytes[cut..]);
        assert_eq!(upstream_to_client.process_input(&mut input, &mut output), None);
        let [(Opcode::Text, redacted)] = &parse_messages(&output)[..] else {
            panic!("one message is expected")
        };
        let redacted = String::from_utf8(redacted.clone()).unwrap();
        assert!(
            redacted.starts_with(r#"{"a":"sk_6c036526..."#) && redacted.ends_with(r#"d452b"}"#),
            "the key must be redacted in {redacted}"
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
        // A close reason has at most 123 bytes, and the provider truncates a longer reason.
        (Opcode::Close, [&b"\x03\xe8"[..], &[b'x'; 90], &KEY.as_bytes()[..33]].concat()),
        (Opcode::Ping, KEY.as_bytes()[..30].to_vec()),
    ] {
        for dialect in [Dialect::Speech, Dialect::Agent, Dialect::Foreign] {
            let bytes = encode_frame(true, opcode, &payload, None);
            let mut upstream_to_client = create_upstream_to_client(dialect);
            upstream_to_client.mark_served(&mut BytesMut::new());
            let (_, output) = forward_to_client(&mut upstream_to_client, &bytes);
            assert_eq!(output.len(), bytes.len(), "{opcode:?} must keep its length");
            assert!(!shows_key(&output), "the key must be redacted in {opcode:?} on {dialect:?}: {output:?}");
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
        let mut upstream_to_client = create_upstream_to_client(Dialect::Speech);
        let (events, mut output) =
            forward_to_client(&mut upstream_to_client, &encode_frame(true, Opcode::Close, payload, None));
        assert_eq!(events, [UpstreamEvent::Close(verdict)]);
        upstream_to_client.open(&mut output);
        let [(Opcode::Close, close)] = &parse_messages(&output)[..] else {
            panic!("one message is expected, not {output:?}")
        };
        assert_eq!(validate_close(close), Ok(code));
    }
}

#[test]
fn a_queue_status_neither_serves_nor_refuses_a_session() {
    let mut upstream_to_client = create_upstream_to_client(Dialect::Agent);
    let queued = encode_frame(true, Opcode::Text, br#"{"type":"queue_status"}"#, None);
    let (events, mut output) = forward_to_client(&mut upstream_to_client, &queued);
    assert_eq!(events, [UpstreamEvent::Message(MessageKind::Queued)]);
    assert!(output.is_empty());
    upstream_to_client.forward_held(&mut output);
    assert_eq!(output, queued);
    assert!(!upstream_to_client.is_open && !upstream_to_client.is_served);
    let refusal = encode_frame(true, Opcode::Close, b"\x03\xeaThis request exceeds your quota limit.", None);
    let (events, output) = forward_to_client(&mut upstream_to_client, &refusal);
    assert!(
        matches!(events[..], [UpstreamEvent::Close(Some(Verdict::WorkspaceQuota(_)))]),
        "the close frame must be a refusal, not {events:?}"
    );
    assert!(output.is_empty());
}

proptest! {
    #[test]
    fn a_key_is_redacted_in_any_fragmentation(
        // These characters cannot form the middle of the key, so `shows_key` finds only characters of the key.
        start in "[g-z_]{0,9}", end in "[g-z_]{0,9}", fragment_lengths in prop::collection::vec(0_usize..40, 0..6),
        chunks in prop::collection::vec(1_usize..40, 0..30), is_binary in any::<bool>(),
    ) {
        let text = format!("{start}{KEY}{end}");
        let mut bytes = encode_fragments(text.as_bytes(), &fragment_lengths, None);
        if is_binary {
            // Changes the opcode from text to binary.
            bytes[0] = bytes[0] & 0xf0 | 2;
        }
        let mut upstream_to_client = create_upstream_to_client(Dialect::Agent);
        upstream_to_client.mark_served(&mut BytesMut::new());
        let (mut input, mut output, mut rest) = (BytesMut::new(), BytesMut::new(), &bytes[..]);
        for size in chunks.into_iter().chain([usize::MAX]) {
            let (chunk, after) = rest.split_at(size.min(rest.len()));
            input.extend_from_slice(chunk);
            rest = after;
            while upstream_to_client.process_input(&mut input, &mut output).is_some() {}
        }
        prop_assert!(input.is_empty());
        prop_assert_eq!(output.len(), bytes.len());
        let messages = parse_messages(&output);
        let [(_, redacted)] = &messages[..] else { panic!("one message is expected") };
        prop_assert!(!shows_key(redacted), "the key must be redacted in {}", String::from_utf8_lossy(redacted));
        prop_assert!(redacted.starts_with(start.as_bytes()) && redacted.ends_with(end.as_bytes()));
    }
}
