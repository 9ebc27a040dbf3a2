//! WebSocket peers that violate the protocol, flood, disconnect or never close, in every state of a
//! session.

use std::time::Duration;

use keychoir::config::{BaseUrl, ClientConfig, Config};
use keychoir::policy::client::Rules;
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use keychoir::policy::frame::{FrameHeader, Opcode, apply_mask};
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

const MASK: [u8; 4] = [1, 99, 200, 7];
/// A small session buffer, so that floods end soon.
const BUFFER: usize = 64 * 1024;

/// A frame with this first byte.
fn frame(first: u8, payload: &[u8], masked: Option<[u8; 4]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let length = payload.len() as u64;
    FrameHeader { is_final: true, reserved: 0, opcode: Opcode::Text, mask: masked, length }
        .encode(&mut bytes);
    bytes[0] = first;
    let from = bytes.len();
    bytes.extend_from_slice(payload);
    if let Some(masked) = masked {
        apply_mask(&mut bytes[from..], masked, 0);
    }
    bytes
}

const TEXT: u8 = 0x81;
const TEXT_BEGINS: u8 = 0x01;
const GOES_ON: u8 = 0x00;
const BINARY: u8 = 0x82;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;

/// Protocol violations of either peer, as bytes, and the close code for each.
fn violations(masked: Option<[u8; 4]>) -> Vec<(&'static str, Vec<u8>, u16)> {
    let frame = |first, payload: &[u8]| frame(first, payload, masked);
    let other = if masked.is_some() { None } else { Some(MASK) };
    vec![
        ("the mask of the other end", self::frame(TEXT, b"{}", other), 1002),
        ("reserved bits", frame(0xc1, b"{}"), 1002),
        ("reserved bits of a ping", frame(0xd9, b"?"), 1002),
        ("a reserved opcode", frame(0x83, b"?"), 1002),
        ("a reserved control opcode", frame(0x8b, b"?"), 1002),
        ("a fragmented ping", frame(0x09, b"?"), 1002),
        ("a long ping", frame(PING, &[b'?'; 126]), 1002),
        ("a continuation of nothing", frame(0x80, b"{}"), 1002),
        ("a message in a message", [frame(TEXT_BEGINS, b"{"), frame(TEXT, b"{}")].concat(), 1002),
        ("half a code", frame(CLOSE, b"\x03"), 1002),
        ("a code that may not be sent", frame(CLOSE, &1006_u16.to_be_bytes()), 1002),
        ("a reason that is not UTF-8", frame(CLOSE, b"\x03\xe8\xff"), 1007),
        ("a text that is not UTF-8", frame(TEXT, b"{\"text\":\"\xff\"}"), 1007),
    ]
}

/// Floods by a client, and the close for each.
fn floods() -> Vec<(&'static str, Vec<u8>, u16)> {
    let empty = frame(GOES_ON, b"", Some(MASK));
    let tiny = frame(GOES_ON, b" ", Some(MASK));
    let begin = frame(TEXT_BEGINS, b"{", Some(MASK));
    let flood = |piece: &[u8]| [&*begin, &piece.repeat(2 * BUFFER / piece.len())].concat();
    vec![
        ("empty fragments", flood(&empty), 1009),
        ("tiny fragments", flood(&tiny), 1009),
        ("a large message", frame(TEXT, &vec![b' '; 2 * BUFFER], Some(MASK)), 1009),
    ]
}

fn two_keys() -> Plan {
    Plan::of([(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)])
}

/// The client of the tests, with a token and these rules.
fn with_rules(config: &mut Config, rules: Rules) {
    config.clients =
        vec![ClientConfig { name: "app".to_owned(), token: TokenFingerprint::new(CLIENT_TOKEN), rules }];
}

fn bounded(config: &mut Config) {
    config.websocket.max_session_buffer = BUFFER;
}

/// Keys of workspaces with a concurrency limit of one.
fn narrow(keys: &[&str]) -> Plan {
    keys.iter().fold(Plan::of([]), |plan, key| {
        let workspace = WorkspacePlan { concurrency_max: Some(1), ..WorkspacePlan::new(key, 100_000) };
        let key = KeyPlan { workspace: Some((*key).to_owned()), ..KeyPlan::new(key, 100_000) };
        plan.with_workspace(workspace).with_key(key)
    })
}

impl WebSocketClient {
    /// Sends raw bytes. The peer may close before it has read all.
    async fn push(&mut self, bytes: &[u8]) {
        let _ = within_timeout(self.stream.get_mut().write_all(bytes)).await;
    }
}

#[track_caller]
fn closed_with(end: &Received, code: u16, what: &str) {
    assert!(matches!(end, Received::Close(found, _) if *found == code), "{what}: {end:?}, not {code}");
}

#[tokio::test]
async fn a_client_violation_ends_the_session_before_its_authentication() {
    let proxy = start_proxy_with(two_keys(), |config| {
        with_rules(config, Rules::default());
        bounded(config);
    })
    .await;
    let binary = ("no JSON", frame(BINARY, b"\x00", Some(MASK)), 1003);
    for (what, bytes, code) in violations(Some(MASK)).into_iter().chain(floods()).chain([binary]) {
        let mut session = handshake(&proxy, STREAM_INPUT, &[]).await.unwrap();
        session.push(&bytes).await;
        let (messages, end) = session.receive_to_end().await;
        assert_eq!(messages, [] as [Value; 0], "{what}");
        closed_with(&end, code, what);
    }
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY]), [0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_client_violation_ends_the_session_before_a_useful_message() {
    let proxy = start_proxy_with(two_keys(), bounded).await;
    let binary = ("no JSON", frame(BINARY, b"\x00", Some(MASK)), 1003);
    for (what, bytes, code) in violations(Some(MASK)).into_iter().chain(floods()).chain([binary]) {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.push(&bytes).await;
        let (messages, end) = session.receive_to_end().await;
        assert_eq!(messages, [] as [Value; 0], "{what}");
        closed_with(&end, code, what);
    }
    within_timeout(proxy.simulator.until(|ledger| ledger.totals.sockets_open == 0)).await;
    proxy.close().await;
}

#[tokio::test]
async fn a_client_violation_ends_a_session_that_waits_for_a_key() {
    let proxy = start_proxy_with(narrow(&[FIRST_KEY]), bounded).await;
    proxy.set_fault(FIRST_KEY, "slow_body=600000");
    let _held = proxy.request_speech(200).await;
    let pings = frame(PING, b"", Some(MASK)).repeat(BUFFER / 3);
    let mut cases: Vec<_> = violations(Some(MASK)).into_iter().chain(floods()).collect();
    cases.push(("pings", pings, 1009));
    for (what, bytes, code) in cases {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": "Hello. "})).await;
        crate::support::wait_until(|| proxy.app.waiting() == 1).await;
        session.push(&bytes).await;
        let (_, end) = session.receive_to_end().await;
        closed_with(&end, code, what);
        assert_eq!(proxy.app.waiting(), 0, "{what}: the waiting place is released before the answer");
    }
}

#[tokio::test]
async fn a_client_violation_ends_a_served_session() {
    let proxy = start_proxy_with(two_keys(), bounded).await;
    for (what, bytes, code) in violations(Some(MASK)).into_iter().chain(floods()) {
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "Hello there. ", "flush": true})).await;
        assert!(session.receive_json().await["audio"].is_string());
        session.push(&bytes).await;
        let (_, end) = session.receive_to_end().await;
        closed_with(&end, code, what);
    }
    within_timeout(proxy.simulator.until(|ledger| ledger.totals.sockets_open == 0)).await;
    proxy.close().await;
}

/// A provider whose connections are handled by the test.
struct Provider {
    base_url: BaseUrl,
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
                let named = |line: &&str| line.to_ascii_lowercase().starts_with("sec-websocket-key:");
                let Some(line) = head.lines().find(named) else { continue };
                let accept = derive_accept_key(line.split_once(':').unwrap().1.trim().as_bytes());
                let answer = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: {accept}\r\n\r\n"
                );
                if sender.send((stream, answer)).is_err() {
                    break;
                }
            }
        });
        Self { base_url, handshakes, _tasks: tasks }
    }

    /// An open session: the client's end and the provider's end.
    async fn dialled(&mut self, proxy: &TestProxy, path: &str) -> (WebSocketClient, TcpStream) {
        tokio::join!(open_session(proxy, path), self.connection())
    }

    async fn start_proxy(&self, change: impl FnOnce(&mut Config)) -> TestProxy {
        start_proxy_with(two_keys(), |config| {
            config.upstream.base_url = self.base_url.clone();
            config.quota_polling.enabled = false;
            change(config);
        })
        .await
    }

    /// The next connection, whose handshake awaits a response; and the response.
    async fn handshake(&mut self) -> (TcpStream, String) {
        within_timeout(self.handshakes.recv()).await.unwrap()
    }

    /// The next connection, with an accepted handshake.
    async fn connection(&mut self) -> TcpStream {
        let (mut stream, answer) = self.handshake().await;
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream
    }
}

/// Reads to the end of the connection.
async fn ends(mut stream: TcpStream) -> Vec<u8> {
    let mut read = Vec::new();
    // A reset is an end, too.
    let _ = within_timeout(stream.read_to_end(&mut read)).await;
    read
}

const SOUND: &[u8] = br#"{"audio":"AAAA"}"#;

#[tokio::test]
async fn a_violation_of_the_provider_ends_the_session() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    for (what, bytes, code) in violations(None) {
        let (mut session, mut stream) = provider.dialled(&proxy, STREAM_INPUT).await;
        stream.write_all(&[frame(TEXT, SOUND, None), bytes].concat()).await.unwrap();
        assert!(session.receive_json().await["audio"].is_string(), "{what}");
        closed_with(&session.receive().await, code, what);
        drop(session);
        ends(stream).await;
    }
}

#[tokio::test]
async fn every_byte_of_a_foreign_socket_is_forwarded() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    for (what, bytes, _) in violations(None) {
        let (session, mut stream) = provider.dialled(&proxy, "/runCase").await;
        stream.write_all(&bytes).await.unwrap();
        let mut client = session.stream.into_inner();
        let mut read = vec![0; bytes.len()];
        within_timeout(client.read_exact(&mut read)).await.unwrap();
        assert_eq!(read, bytes, "{what}");
        client.write_all(&bytes).await.unwrap();
        within_timeout(stream.read_exact(&mut read)).await.unwrap();
        assert_eq!(read, bytes, "{what}");
    }
}

#[tokio::test]
async fn a_close_that_is_not_completed_ends_all_the_same() {
    let mut provider = Provider::start().await;
    let proxy =
        provider.start_proxy(|config| config.websocket.close_timeout = Duration::from_millis(100)).await;
    let close = frame(CLOSE, b"\x03\xe8", None);
    for path in [STREAM_INPUT, "/runCase"] {
        // Both have closed, and the provider keeps its connection.
        let (mut session, mut stream) = provider.dialled(&proxy, path).await;
        stream.write_all(&[frame(TEXT, SOUND, None), close.clone()].concat()).await.unwrap();
        assert!(session.receive_json().await["audio"].is_string());
        closed_with(&session.receive().await, 1000, path);
        session.close().await;
        ends(stream).await;
        // The client has closed, and the provider does not reply.
        let (mut session, stream) = provider.dialled(&proxy, path).await;
        session.close().await;
        ends(stream).await;
        // The provider has closed, and the client does not reply.
        let (session, mut stream) = provider.dialled(&proxy, path).await;
        stream.write_all(&close).await.unwrap();
        ends(stream).await;
        drop(session);
    }
}

#[tokio::test]
async fn bytes_after_the_clients_close_are_dropped() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    let close = frame(CLOSE, b"\x03\xe8bye", Some(MASK));
    for (what, bytes, _) in violations(Some(MASK)) {
        let (mut session, mut stream) = provider.dialled(&proxy, STREAM_INPUT).await;
        session.push(&[&*close, &bytes].concat()).await;
        let mut read = vec![0; close.len()];
        within_timeout(stream.read_exact(&mut read)).await.unwrap();
        stream.write_all(&frame(CLOSE, b"\x03\xe8", None)).await.unwrap();
        closed_with(&session.receive_to_end().await.1, 1000, what);
        drop(session);
        assert_eq!((read, ends(stream).await), (close.clone(), Vec::new()), "{what}");
    }
}

#[tokio::test]
async fn bytes_after_the_providers_close_are_dropped() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    let (session, mut stream) = provider.dialled(&proxy, STREAM_INPUT).await;
    let close = frame(CLOSE, b"\x03\xe8", None);
    let more = frame(TEXT, b"{\"audio\":\"late\"}", None);
    stream.write_all(&[close.clone(), more].concat()).await.unwrap();
    drop(stream);
    assert_eq!(ends(session.stream.into_inner()).await, close);
}

#[tokio::test]
async fn one_direction_that_floods_stops_neither_the_other_nor_the_timers() {
    for lifetime in [0, 300] {
        let mut provider = Provider::start().await;
        let proxy = provider
            .start_proxy(|config| config.websocket.max_session_duration = Duration::from_millis(lifetime))
            .await;
        let (mut session, stream) = provider.dialled(&proxy, AGENT).await;
        let (mut from_proxy, mut to_proxy) = stream.into_split();
        let tasks = Tasks::default();
        // Small frames and large ones, as fast as the connection accepts them.
        let flood = [frame(TEXT, SOUND, None).repeat(2_000), frame(BINARY, &[7; 60_000], None)].concat();
        tasks.spawn(async move { while to_proxy.write_all(&flood).await.is_ok() {} });
        if lifetime > 0 {
            let end = session.end().await;
            assert!(matches!(end, Received::Close(1001, _) | Received::Disconnected), "{end:?}");
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
    /// The end of the session, whatever messages precede it.
    async fn end(&mut self) -> Received {
        loop {
            let heard = self.receive().await;
            if matches!(heard, Received::Close(..) | Received::Disconnected) {
                return heard;
            }
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Leaving {
    /// Ends the connection.
    Drop,
    /// Closes, and waits for the reply.
    Close,
    /// Closes after more data than is read before the wait.
    CloseBehind(usize),
}

const LEAVING: [Leaving; 3] = [Leaving::Drop, Leaving::Close, Leaving::CloseBehind(40_000)];

async fn leave(mut session: WebSocketClient, leaving: Leaving) {
    if let Leaving::CloseBehind(bytes) = leaving {
        session.send_json(&json!({"text": "x".repeat(bytes)})).await;
    }
    match leaving {
        Leaving::Drop => drop(session),
        Leaving::Close | Leaving::CloseBehind(_) => {
            session.push(&frame(CLOSE, b"\x03\xe8", Some(MASK))).await;
            closed_with(&session.receive_to_end().await.1, 1000, "its close is answered");
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_its_session_fails_over_is_noticed() {
    for leaving in LEAVING {
        let mut provider = Provider::start().await;
        let proxy = provider.start_proxy(|_| {}).await;
        let (mut session, mut first) = provider.dialled(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": "Hello. "})).await;
        let refusal = frame(CLOSE, b"\x03\xf0This request exceeds your quota.", None);
        first.write_all(&refusal).await.unwrap();
        // The handshake with the second key is never answered.
        let (second, _) = provider.handshake().await;
        leave(session, leaving).await;
        ends(second).await;
        let verdicts: Vec<String> =
            proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
        assert_eq!(verdicts, ["workspace_quota", "client_closed"], "{leaving:?}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_while_its_session_waits_is_noticed() {
    for is_failing_over in [false, true] {
        for leaving in LEAVING {
            let plan = if is_failing_over { narrow(&[FIRST_KEY, SECOND_KEY]) } else { narrow(&[SECOND_KEY]) };
            let proxy =
                start_proxy_with(plan, |config| config.pool.queue_timeout = Duration::from_secs(3_600)).await;
            // The only slot of the second key is taken.
            if is_failing_over {
                proxy.set_fault(FIRST_KEY, "forbidden");
            }
            proxy.set_fault(SECOND_KEY, "slow_body=600000");
            let _held = proxy.request_speech(200).await;
            proxy.set_fault(FIRST_KEY, "quota");
            let mut session = open_session(&proxy, STREAM_INPUT).await;
            session.send_json(&json!({"text": "Hello. "})).await;
            crate::support::wait_until(|| proxy.app.waiting() == 1).await;
            leave(session, leaving).await;
            crate::support::wait_until(|| proxy.app.waiting() == 0).await;
        }
    }
}

#[tokio::test]
async fn a_client_that_leaves_after_its_first_message_is_noticed() {
    for leaving in LEAVING {
        let mut provider = Provider::start().await;
        let proxy = provider.start_proxy(|config| with_rules(config, Rules::default())).await;
        let mut session = handshake(&proxy, STREAM_INPUT, &[]).await.unwrap();
        session.send_json(&json!({"text": " ", "xi_api_key": CLIENT_TOKEN})).await;
        let (stream, _) = provider.handshake().await;
        leave(session, leaving).await;
        ends(stream).await;
        let verdicts: Vec<String> =
            proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
        assert_eq!(verdicts, ["client_closed"], "{leaving:?}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_before_its_socket_is_open_is_noticed() {
    let mut provider = Provider::start().await;
    let proxy = provider.start_proxy(|_| {}).await;
    let stream = tokio::select! {
        biased;
        _ = open_session(&proxy, STREAM_INPUT) => panic!("it is open"),
        (stream, _) = provider.handshake() => stream,
    };
    ends(stream).await;
    assert_eq!(proxy.into_records().await[0].verdict, "client_closed");
}

fn credits(amount: u64) -> Rules {
    let quota = ClientQuota { amount, unit: QuotaUnit::Credits, period: Period::Day };
    Rules { quota: Some(quota), ..Rules::default() }
}

#[tokio::test]
async fn a_quota_of_credits_ends_sessions_beyond_it() {
    // The session's duration uses up the remaining credits: 800 credits a minute of an agent, 65 of
    // a transcription
    for (path, quota, spoken) in [(AGENT, 1_000, 900), (SCRIBE, 20, 18)] {
        let proxy = start_proxy_with(two_keys(), |config| {
            with_rules(config, credits(quota));
            config.websocket.quota_check_interval = Duration::from_millis(10);
        })
        .await;
        let mut session = open_session(&proxy, path).await;
        let first = session.receive_json().await;
        assert!(first.get("error").is_none(), "{first}");
        // Another request of the same client uses most of it.
        assert_eq!(proxy.request_speech(spoken).await.status(), 200);
        let (messages, end) = session.receive_to_end().await;
        let last = messages.last().unwrap();
        assert_eq!((&last["error"], &last["code"]), (&json!("client_quota_exceeded"), &json!(1008)));
        closed_with(&end, 1008, path);
        drop(session);
        let verdicts: Vec<String> =
            proxy.into_records().await.into_iter().map(|record| record.verdict).collect();
        assert!(verdicts.contains(&"client_quota_exceeded".to_owned()), "{verdicts:?}");
    }
}

#[tokio::test]
async fn a_quota_of_requests_ends_no_session() {
    let quota = ClientQuota { amount: 2, unit: QuotaUnit::Requests, period: Period::Day };
    let proxy = start_proxy_with(two_keys(), |config| {
        with_rules(config, Rules { quota: Some(quota), ..Rules::default() });
        config.websocket.quota_check_interval = Duration::from_millis(1);
    })
    .await;
    let mut session = open_session(&proxy, AGENT).await;
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    assert_eq!(proxy.request_speech(30).await.status(), 402);
    for _ in 0..20 {
        session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
        while session.receive_json().await["type"] != "agent_response" {}
    }
    session.close().await;
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn parallel_sessions_do_not_spend_the_same_credits() {
    let proxy = start_proxy_with(two_keys(), |config| with_rules(config, credits(20))).await;
    // Nothing has been served when the second one speaks.
    proxy.set_fault(FIRST_KEY, "stall=600000");
    let mut first = open_session(&proxy, STREAM_INPUT).await;
    first.send_json(&json!({"text": "These are twenty. ok"})).await;
    let spoken = |ledger: &keychoir::simulator::Ledger| {
        ledger
            .requests
            .iter()
            .filter_map(|request| request.socket.as_ref())
            .any(|socket| socket.message_bytes > 0)
    };
    within_timeout(proxy.simulator.until(spoken)).await;
    let refused = handshake(&proxy, STREAM_INPUT, &[("xi-api-key", CLIENT_TOKEN)]).await;
    assert_eq!(refused.err().unwrap().0, 402);
    drop(first);
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_refused_request_does_not_count_against_a_quota() {
    let proxy = start_proxy_with(two_keys(), |config| with_rules(config, credits(40))).await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.set_fault(SECOND_KEY, "invalid");
    let mut session = open_session(&proxy, STREAM_INPUT).await;
    let (_, end) = session.synthesize(&["This is more than twenty characters. "]).await;
    closed_with(&end, 1008, "no key is any good");
    drop(session);
    proxy.simulator.always(FIRST_KEY, None);
    proxy.simulator.always(SECOND_KEY, None);
    // The session refunds its reservation after its usage record is closed, a moment after its
    // close.
    let given_back = async { while proxy.request_speech(5).await.status() == 402 {} };
    tokio::time::timeout(Duration::from_secs(20), given_back).await.expect("all of the quota is left");
}

#[tokio::test]
async fn no_text_is_forwarded_uncounted() {
    let long = json!({"text": "x".repeat(40), "pad": " ".repeat(300_000)}).to_string();
    for message in [Message::text(long.clone()), Message::binary(long.clone().into_bytes())] {
        let proxy = start_proxy_with(two_keys(), |config| with_rules(config, credits(40))).await;
        let mut session = open_session(&proxy, STREAM_INPUT).await;
        session.send_json(&json!({"text": " "})).await;
        session.send_json(&json!({"text": "This is more than twenty characters. ", "flush": true})).await;
        assert!(session.receive_json().await["audio"].is_string());
        session.send(message).await;
        let (messages, end) = session.receive_to_end().await;
        closed_with(&end, 1008, "the quota is used");
        assert_eq!(messages.last().unwrap()["error"], "client_quota_exceeded");
        drop(session);
        let records = proxy.into_records().await;
        assert_eq!(records[0].credits, "This is more than twenty characters. ".len() as i64);
    }
}

#[tokio::test]
async fn a_queued_session_is_not_idle() {
    let mut provider = Provider::start().await;
    let proxy =
        provider.start_proxy(|config| config.websocket.idle_timeout = Duration::from_millis(50)).await;
    let (mut session, mut stream) = provider.dialled(&proxy, AGENT).await;
    let queued = br#"{"type":"queue_status","queue_status_event":{"position":1}}"#;
    stream.write_all(&frame(TEXT, queued, None)).await.unwrap();
    assert_eq!(session.receive_json().await["type"], "queue_status");
    // Another session is idle for the same time, and ends.
    let (mut idle, _idle) = provider.dialled(&proxy, AGENT).await;
    closed_with(&idle.receive_to_end().await.1, 1001, "it is idle");
    let metadata = br#"{"type":"conversation_initiation_metadata"}"#;
    stream.write_all(&frame(TEXT, metadata, None)).await.unwrap();
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
    let (mut session, mut stream) = provider.dialled(&proxy, AGENT).await;
    let queued = frame(TEXT, br#"{"type":"queue_status"}"#, None);
    let refusal = frame(CLOSE, b"\x03\xeaThis request exceeds your quota limit.", None);
    stream.write_all(&[queued, refusal].concat()).await.unwrap();
    let mut second = provider.connection().await;
    let metadata = br#"{"type":"conversation_initiation_metadata"}"#;
    second.write_all(&frame(TEXT, metadata, None)).await.unwrap();
    assert_eq!(session.receive_json().await["type"], "queue_status");
    assert_eq!(session.receive_json().await["type"], "conversation_initiation_metadata");
}
