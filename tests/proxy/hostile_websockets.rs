//! Tests WebSocket sessions whose client or provider violates the protocol, sends a flood, or never closes, in every
//! state of a session. Bytes after a close frame are dropped, and a WebSocket on an unknown path forwards every byte.
//! A session in the queue of an agent does not become idle, and may fail over. The submodules test disconnects and
//! quotas.

mod disconnects;
mod quotas;

use std::time::Duration;

use keychoir::config::{BaseUrl, ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use keychoir::policy::websocket_frame::{FrameHeader, Opcode, apply_mask};
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::{KeyPlan, Plan, WorkspacePlan};
use keychoir::tasks::Tasks;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::support::websocket::{
    AGENT, Received, SCRIBE, STREAM_INPUT, WebSocketClient, handshake, open_session, within_timeout,
};
use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, TestProxy, start_proxy_with};

/// The mask of the client's frames.
const MASK: [u8; 4] = [1, 99, 200, 7];
/// The size of a session buffer. It is small, so that floods exceed it quickly.
const SESSION_BUFFER_SIZE: usize = 64 * 1024;

/// Encodes a frame whose first byte is `first_byte`.
fn encode_frame(first_byte: u8, payload: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let length = payload.len() as u64;
    FrameHeader { is_final: true, reserved: 0, opcode: Opcode::Text, mask, length }.encode(&mut bytes);
    bytes[0] = first_byte;
    let payload_start = bytes.len();
    bytes.extend_from_slice(payload);
    if let Some(mask) = mask {
        apply_mask(&mut bytes[payload_start..], mask, 0);
    }
    bytes
}

// The first bytes of frames: the final bit and the opcode.
const TEXT: u8 = 0x81;
const TEXT_FRAGMENT: u8 = 0x01;
const CONTINUATION: u8 = 0x00;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;

/// Returns protocol violations of a peer that masks its frames with `mask`: the description, the bytes and the close
/// code of each.
fn protocol_violations(mask: Option<[u8; 4]>) -> Vec<(&'static str, Vec<u8>, u16)> {
    let encode_frame = |first_byte, payload: &[u8]| self::encode_frame(first_byte, payload, mask);
    let wrong_mask = if mask.is_some() { None } else { Some(MASK) };
    vec![
        ("a wrong mask bit", self::encode_frame(TEXT, b"{}", wrong_mask), 1002),
        ("reserved bits", encode_frame(0xc1, b"{}"), 1002),
        ("reserved bits of a ping", encode_frame(0xd9, b"?"), 1002),
        ("a reserved opcode", encode_frame(0x83, b"?"), 1002),
        ("a reserved control opcode", encode_frame(0x8b, b"?"), 1002),
        ("a fragmented ping", encode_frame(0x09, b"?"), 1002),
        ("a long ping", encode_frame(PING, &[b'?'; 126]), 1002),
        ("a continuation without a message", encode_frame(0x80, b"{}"), 1002),
        (
            "a message within a fragmented message",
            [encode_frame(TEXT_FRAGMENT, b"{"), encode_frame(TEXT, b"{}")].concat(),
            1002,
        ),
        ("an incomplete close code", encode_frame(CLOSE, b"\x03"), 1002),
        ("a close code that must not be sent", encode_frame(CLOSE, &1006_u16.to_be_bytes()), 1002),
        ("a close reason that is not UTF-8", encode_frame(CLOSE, b"\x03\xe8\xff"), 1007),
        ("a text that is not UTF-8", encode_frame(TEXT, b"{\"text\":\"\xff\"}"), 1007),
    ]
}

/// Returns floods of a client: the description, the bytes and the close code of each.
fn client_floods() -> Vec<(&'static str, Vec<u8>, u16)> {
    let empty = encode_frame(CONTINUATION, b"", Some(MASK));
    let tiny = encode_frame(CONTINUATION, b" ", Some(MASK));
    let first_fragment = encode_frame(TEXT_FRAGMENT, b"{", Some(MASK));
    let flood = |fragment: &[u8]| {
        [&*first_fragment, &fragment.repeat(2 * SESSION_BUFFER_SIZE / fragment.len())].concat()
    };
    vec![
        ("empty fragments", flood(&empty), 1009),
        ("tiny fragments", flood(&tiny), 1009),
        ("a large message", encode_frame(TEXT, &vec![b' '; 2 * SESSION_BUFFER_SIZE], Some(MASK)), 1009),
    ]
}

fn two_keys() -> Plan {
    Plan::with_keys([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])
}

/// Configures the client of the tests with the given `rules`.
fn configure_client(config: &mut Config, rules: Rules) {
    config.clients = vec![ClientConfig::new("app".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), rules)];
}

fn limit_session_buffer(config: &mut Config) {
    config.websocket.max_session_buffer = SESSION_BUFFER_SIZE;
}

/// Returns a plan in which each key has a separate workspace, whose concurrency limit is one.
fn plan_with_one_slot_per_key(keys: &[&str]) -> Plan {
    keys.iter().fold(Plan::with_keys([]), |plan, key| {
        let workspace = WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new(key, 100_000) };
        let key = KeyPlan { workspace: Some((*key).to_owned()), ..KeyPlan::new(key, 100_000) };
        plan.with_workspace(workspace).with_key(key)
    })
}

impl WebSocketClient {
    /// Sends raw bytes. The proxy may close the connection before it has read them.
    async fn send_raw(&mut self, bytes: &[u8]) {
        let _ = within_timeout(self.stream.get_mut().write_all(bytes)).await;
    }
}

#[track_caller]
fn assert_close_code(end: &Received, code: u16, description: &str) {
    assert!(
        matches!(end, Received::Close(received, _) if *received == code),
        "{description}: the client must receive the close code {code}, not {end:?}"
    );
}

#[tokio::test]
async fn a_client_violation_ends_the_session_before_its_authentication() {
    let proxy = start_proxy_with(two_keys(), |config| {
        configure_client(config, Rules::default());
        limit_session_buffer(config);
    })
    .await;
    let binary = ("a binary message before authentication", encode_frame(BINARY, b"\x00", Some(MASK)), 1003);
    for (description, bytes, code) in
        protocol_violations(Some(MASK)).into_iter().chain(client_floods()).chain([binary])
    {
        let mut session = handshake(&proxy, STREAM_INPUT, &[]).await.unwrap();
        session.send_raw(&bytes).await;
        let (messages, end) = session.receive_to_end().await;
        assert_eq!(messages, [] as [Value; 0], "{description}: the client must receive no message");
        assert_close_code(&end, code, description);
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_client_violation_ends_the_session_before_its_first_text() {
    let proxy = start_proxy_with(two_keys(), limit_session_buffer).await;
    let binary = ("a binary message before the first text", encode_frame(BINARY, b"\x00", Some(MASK)), 1003);
    for (description, bytes, code) in
        protocol_violations(Some(MASK)).into_iter().chain(client_floods()).chain([binary])
    {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.send_raw(&bytes).await;
        let (messages, end) = session.receive_to_end().await;
        assert_eq!(messages, [] as [Value; 0], "{description}: the client must receive no message");
        assert_close_code(&end, code, description);
    }
    within_timeout(proxy.simulator.wait_for_ledger(|ledger| ledger.totals.sockets_open == 0)).await;
    proxy.close().await;
}

#[tokio::test]
async fn a_client_violation_ends_a_session_that_waits_for_a_key() {
    let proxy = start_proxy_with(plan_with_one_slot_per_key(&[FIRST_KEY]), limit_session_buffer).await;
    proxy.set_fault(FIRST_KEY, "slow_body=600000");
    let _response = proxy.request_speech(200).await;
    let pings = encode_frame(PING, b"", Some(MASK)).repeat(SESSION_BUFFER_SIZE / 3);
    let mut cases: Vec<_> = protocol_violations(Some(MASK)).into_iter().chain(client_floods()).collect();
    cases.push(("pings", pings, 1009));
    for (description, bytes, code) in cases {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": "Hello. "})).await;
        crate::support::wait_until(|| proxy.app.queued_requests() == 1).await;
        session.send_raw(&bytes).await;
        let (_, end) = session.receive_to_end().await;
        assert_close_code(&end, code, description);
        assert_eq!(
            proxy.app.queued_requests(),
            0,
            "{description}: the session must leave the queue before the close frame is sent"
        );
    }
}

#[tokio::test]
async fn a_client_violation_ends_a_served_session() {
    let proxy = start_proxy_with(two_keys(), limit_session_buffer).await;
    for (description, bytes, code) in protocol_violations(Some(MASK)).into_iter().chain(client_floods()) {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "Hello there. ", "flush": true})).await;
        assert!(session.receive_json().await["audio"].is_string());
        session.send_raw(&bytes).await;
        let (_, end) = session.receive_to_end().await;
        assert_close_code(&end, code, description);
    }
    within_timeout(proxy.simulator.wait_for_ledger(|ledger| ledger.totals.sockets_open == 0)).await;
    proxy.close().await;
}

/// A provider that reads each handshake and passes the connection to the test.
struct Provider {
    base_url: BaseUrl,
    /// The connections with the response that accepts the handshake of each.
    handshakes: mpsc::UnboundedReceiver<(TcpStream, String)>,
    _tasks: Tasks,
}

impl Provider {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (sender, handshakes) = mpsc::unbounded_channel();
        let tasks = Tasks::default();
        tasks.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    match stream.read_u8().await {
                        Ok(byte) => head.push(byte),
                        Err(_) => break,
                    }
                }
                let head = String::from_utf8_lossy(&head).into_owned();
                let is_key_header = |line: &&str| line.to_ascii_lowercase().starts_with("sec-websocket-key:");
                let Some(line) = head.lines().find(is_key_header) else { continue };
                let accept = derive_accept_key(line.split_once(':').unwrap().1.trim().as_bytes());
                let response = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: {accept}\r\n\r\n"
                );
                if sender.send((stream, response)).is_err() {
                    break;
                }
            }
        });
        Self { base_url, handshakes, _tasks: tasks }
    }

    /// Opens a session. Returns the ends of the client and of the provider.
    async fn open_session(&mut self, proxy: &TestProxy, path: &str) -> (WebSocketClient, TcpStream) {
        tokio::join!(open_session(proxy, path), self.accept_session())
    }

    async fn start_proxy(&self, change: impl FnOnce(&mut Config)) -> TestProxy {
        start_proxy_with(two_keys(), |config| {
            config.upstream.base_url = self.base_url.clone();
            config.quota_polling.enabled = false;
            change(config);
        })
        .await
    }

    /// Returns the next connection before its handshake is accepted, and the response that accepts it.
    async fn next_handshake(&mut self) -> (TcpStream, String) {
        within_timeout(self.handshakes.recv()).await.unwrap()
    }

    /// Returns the next connection, after its handshake is accepted.
    async fn accept_session(&mut self) -> TcpStream {
        let (mut stream, response) = self.next_handshake().await;
        stream.write_all(response.as_bytes()).await.unwrap();
        stream
    }
}

/// Reads until the connection ends.
async fn read_until_end(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // A reset also ends the connection.
    let _ = within_timeout(stream.read_to_end(&mut bytes)).await;
    bytes
}

const AUDIO_MESSAGE: &[u8] = br#"{"audio":"AAAA"}"#;

#[tokio::test]
async fn a_violation_of_the_provider_ends_the_session() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    for (description, bytes, code) in protocol_violations(None) {
        let (mut session, mut stream) = provider.open_session(&proxy, STREAM_INPUT).await;
        stream.write_all(&[encode_frame(TEXT, AUDIO_MESSAGE, None), bytes].concat()).await.unwrap();
        assert!(
            session.receive_json().await["audio"].is_string(),
            "{description}: the client must receive audio"
        );
        assert_close_code(&session.receive().await, code, description);
        drop(session);
        read_until_end(stream).await;
    }
}

#[tokio::test]
async fn every_byte_of_a_websocket_on_an_unknown_path_is_forwarded() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    for (description, bytes, _) in protocol_violations(None) {
        let (session, mut stream) = provider.open_session(&proxy, "/runCase").await;
        stream.write_all(&bytes).await.unwrap();
        let mut client = session.stream.into_inner();
        let mut received_bytes = vec![0; bytes.len()];
        within_timeout(client.read_exact(&mut received_bytes)).await.unwrap();
        assert_eq!(received_bytes, bytes, "{description}: the client must receive every byte");
        client.write_all(&bytes).await.unwrap();
        within_timeout(stream.read_exact(&mut received_bytes)).await.unwrap();
        assert_eq!(received_bytes, bytes, "{description}: the provider must receive every byte");
    }
}

#[tokio::test]
async fn a_close_without_a_reply_ends_after_the_close_timeout() {
    let mut provider = Provider::start().await;
    let proxy =
        provider.start_proxy(|config| config.websocket.close_timeout = Duration::from_millis(100)).await;
    let close = encode_frame(CLOSE, b"\x03\xe8", None);
    for path in [STREAM_INPUT, "/runCase"] {
        // Both peers have closed, and the provider keeps its connection open.
        let (mut session, mut stream) = provider.open_session(&proxy, path).await;
        stream.write_all(&[encode_frame(TEXT, AUDIO_MESSAGE, None), close.clone()].concat()).await.unwrap();
        assert!(session.receive_json().await["audio"].is_string());
        assert_close_code(&session.receive().await, 1000, path);
        session.close().await;
        read_until_end(stream).await;
        // The client has closed, and the provider does not reply.
        let (mut session, stream) = provider.open_session(&proxy, path).await;
        session.close().await;
        read_until_end(stream).await;
        // The provider has closed, and the client does not reply.
        let (session, mut stream) = provider.open_session(&proxy, path).await;
        stream.write_all(&close).await.unwrap();
        read_until_end(stream).await;
        drop(session);
    }
}

#[tokio::test]
async fn bytes_after_the_clients_close_are_dropped() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    let close = encode_frame(CLOSE, b"\x03\xe8bye", Some(MASK));
    for (description, bytes, _) in protocol_violations(Some(MASK)) {
        let (mut session, mut stream) = provider.open_session(&proxy, STREAM_INPUT).await;
        session.send_raw(&[&*close, &bytes].concat()).await;
        let mut received_bytes = vec![0; close.len()];
        within_timeout(stream.read_exact(&mut received_bytes)).await.unwrap();
        stream.write_all(&encode_frame(CLOSE, b"\x03\xe8", None)).await.unwrap();
        assert_close_code(&session.receive_to_end().await.1, 1000, description);
        drop(session);
        assert_eq!(
            (received_bytes, read_until_end(stream).await),
            (close.clone(), Vec::new()),
            "{description}: nothing after the close frame must be forwarded"
        );
    }
}

#[tokio::test]
async fn bytes_after_the_providers_close_are_dropped() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    let (session, mut stream) = provider.open_session(&proxy, STREAM_INPUT).await;
    let close = encode_frame(CLOSE, b"\x03\xe8", None);
    let later_frame = encode_frame(TEXT, b"{\"audio\":\"late\"}", None);
    stream.write_all(&[close.clone(), later_frame].concat()).await.unwrap();
    drop(stream);
    assert_eq!(read_until_end(session.stream.into_inner()).await, close);
}

#[tokio::test]
async fn a_flood_in_one_direction_blocks_neither_the_other_direction_nor_the_timers() {
    for max_duration_ms in [0, 300] {
        let mut provider = Provider::start().await;
        let proxy = provider
            .start_proxy(|config| {
                config.websocket.max_session_duration = Duration::from_millis(max_duration_ms)
            })
            .await;
        let (mut session, stream) = provider.open_session(&proxy, AGENT).await;
        let (mut from_proxy, mut to_proxy) = stream.into_split();
        let tasks = Tasks::default();
        // The provider sends small and large frames as fast as the connection accepts them.
        let flood =
            [encode_frame(TEXT, AUDIO_MESSAGE, None).repeat(2_000), encode_frame(BINARY, &[7; 60_000], None)]
                .concat();
        tasks.spawn(async move { while to_proxy.write_all(&flood).await.is_ok() {} });
        if max_duration_ms > 0 {
            let end = session.receive_end().await;
            assert!(
                matches!(end, Received::Close(1001, _) | Received::Disconnected),
                "the session must end at its maximum duration, not with {end:?}"
            );
            continue;
        }
        let (mut sink, mut stream) = futures_util::StreamExt::split(session.stream);
        tasks.spawn(
            async move { while let Some(Ok(_)) = futures_util::StreamExt::next(&mut stream).await {} },
        );
        within_timeout(futures_util::SinkExt::send(&mut sink, Message::text("are you there?")))
            .await
            .unwrap();
        let mut head = [0; 6 + 14];
        within_timeout(from_proxy.read_exact(&mut head)).await.unwrap();
        assert_eq!(head[..2], [TEXT, 0x80 | 14]);
    }
}

impl WebSocketClient {
    /// Receives events until the session ends. Returns its end.
    async fn receive_end(&mut self) -> Received {
        loop {
            let event = self.receive().await;
            if matches!(event, Received::Close(..) | Received::Disconnected) {
                return event;
            }
        }
    }
}

#[tokio::test]
async fn a_queued_session_is_not_idle() {
    let mut provider = Provider::start().await;
    let proxy =
        provider.start_proxy(|config| config.websocket.idle_timeout = Duration::from_millis(50)).await;
    let (mut session, mut stream) = provider.open_session(&proxy, AGENT).await;
    let queue_message = br#"{"type":"queue_status","queue_status_event":{"position":1}}"#;
    stream.write_all(&encode_frame(TEXT, queue_message, None)).await.unwrap();
    assert_eq!(session.receive_json().await["type"], "queue_status");
    // Another session is idle for the same time, and ends.
    let (mut idle_session, _idle_stream) = provider.open_session(&proxy, AGENT).await;
    assert_close_code(&idle_session.receive_to_end().await.1, 1001, "the session is idle");
    let metadata = br#"{"type":"conversation_initiation_metadata"}"#;
    stream.write_all(&encode_frame(TEXT, metadata, None)).await.unwrap();
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
}

#[tokio::test]
async fn a_queued_session_may_fail_over() {
    let mut provider = Provider::start().await;
    let proxy = start_proxy_with(two_keys(), |config| {
        config.upstream.base_url = provider.base_url.clone();
        config.quota_polling.enabled = false;
    })
    .await;
    let (mut session, mut stream) = provider.open_session(&proxy, AGENT).await;
    let queue_frame = encode_frame(TEXT, br#"{"type":"queue_status"}"#, None);
    let refusal = encode_frame(CLOSE, b"\x03\xeaThis request exceeds your quota limit.", None);
    stream.write_all(&[queue_frame, refusal].concat()).await.unwrap();
    let mut second_stream = provider.accept_session().await;
    let metadata = br#"{"type":"conversation_initiation_metadata"}"#;
    second_stream.write_all(&encode_frame(TEXT, metadata, None)).await.unwrap();
    assert_eq!(session.receive_json().await["type"], "queue_status");
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
}

/// Stops the proxy, and returns the verdicts of its attempts.
async fn recorded_verdicts(proxy: TestProxy) -> Vec<String> {
    proxy.into_records().await.into_iter().map(|record| record.verdict).collect()
}
