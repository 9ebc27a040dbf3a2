//! Tests the handshake, the echo, the maximum size of a message, the records and violations of a session in the ledger,
//! and the end of sessions with the simulator. Contains the WebSocket client of the other modules `sockets…`.

use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::*;
use crate::simulator::{Ledger, RequestSummary, SocketClose, SocketSummary};

/// A WebSocket client with an open session.
pub(super) struct SocketClient {
    stream: WebSocketStream<TcpStream>,
    /// The headers of the response to the handshake.
    pub(super) headers: HeaderMap,
}

/// The response to a handshake that was not accepted. The status is 0 if there was no response.
#[derive(Debug)]
pub(super) struct RefusedHandshake {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// Waits for a future, which must complete within the timeout.
async fn within_timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(RESPONSE_TIMEOUT, future)
        .await
        .expect("the operation on the connection must complete in time")
}

/// Opens a session with the given headers.
pub(super) async fn try_connect(
    simulator: &Simulator,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<SocketClient, RefusedHandshake> {
    let stream = TcpStream::connect(simulator.address()).await.unwrap();
    let mut request =
        ClientRequestBuilder::new(format!("ws://{}{path}", simulator.address()).parse().unwrap());
    for (name, value) in headers {
        request = match *name {
            "sec-websocket-protocol" => request.with_sub_protocol(*value),
            _ => request.with_header(*name, *value),
        };
    }
    match within_timeout(client_async(request, stream)).await {
        Ok((stream, response)) => Ok(SocketClient { stream, headers: response.headers().clone() }),
        Err(Error::Http(response)) => {
            let (parts, body) = response.into_parts();
            Err(RefusedHandshake {
                status: parts.status.as_u16(),
                headers: parts.headers,
                body: body.unwrap_or_default(),
            })
        }
        Err(error) => Err(RefusedHandshake {
            status: 0,
            headers: HeaderMap::new(),
            body: error.to_string().into_bytes(),
        }),
    }
}

/// Opens a session with a key, whose handshake must be accepted.
pub(super) async fn connect(simulator: &Simulator, path: &str, key: &str) -> SocketClient {
    try_connect(simulator, path, &[("xi-api-key", key)]).await.expect("the handshake must be accepted")
}

impl SocketClient {
    pub(super) async fn send(&mut self, message: Message) {
        within_timeout(self.stream.send(message)).await.unwrap();
    }

    pub(super) async fn send_json(&mut self, message: Value) {
        self.send(Message::text(message.to_string())).await;
    }

    pub(super) async fn next(&mut self) -> Option<Result<Message, Error>> {
        within_timeout(self.stream.next()).await
    }

    pub(super) async fn receive_text(&mut self) -> String {
        match self.next().await {
            Some(Ok(Message::Text(text))) => text.as_str().to_owned(),
            other => panic!("a text message must arrive: {other:?}"),
        }
    }

    pub(super) async fn receive_json(&mut self) -> Value {
        serde_json::from_str(&self.receive_text().await).unwrap()
    }

    /// Receives a close frame and the end of the connection.
    pub(super) async fn receive_close(&mut self) -> (u16, String) {
        let close = match self.next().await {
            Some(Ok(Message::Close(Some(frame)))) => (frame.code.into(), frame.reason.as_str().to_owned()),
            other => panic!("a close frame must arrive: {other:?}"),
        };
        assert!(self.next().await.is_none(), "the connection must end after the close frame");
        close
    }

    /// Receives all messages and the close frame.
    pub(super) async fn receive_all(&mut self) -> (Vec<Value>, (u16, String)) {
        let mut messages = Vec::new();
        loop {
            match self.next().await {
                Some(Ok(Message::Text(text))) => messages.push(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Close(Some(frame)))) => {
                    // The next read sends the reply to the close frame.
                    assert!(self.next().await.is_none(), "the connection must end after the close frame");
                    return (messages, (frame.code.into(), frame.reason.as_str().to_owned()));
                }
                other => panic!("a text message or a close frame must follow {messages:?}: {other:?}"),
            }
        }
    }

    /// Receives the end of the connection without a close frame.
    pub(super) async fn receive_break(&mut self) -> Error {
        match self.next().await {
            Some(Err(error)) => error,
            other => panic!("the connection must break: {other:?}"),
        }
    }

    pub(super) async fn close(mut self, code: u16, reason: &str) {
        let frame = CloseFrame { code: code.into(), reason: reason.into() };
        within_timeout(self.stream.close(Some(frame))).await.unwrap();
        while let Some(Ok(_)) = self.next().await {}
    }
}

pub(super) async fn wait_until(simulator: &Simulator, condition: impl FnMut(&Ledger) -> bool) -> Ledger {
    within_timeout(simulator.wait_for_ledger(condition)).await
}

/// Returns the record of the last session after its end.
pub(super) async fn ended_session(simulator: &Simulator) -> (RequestSummary, SocketSummary) {
    let ledger = wait_until(simulator, |ledger| ledger.totals.sockets_open == 0).await;
    let request = ledger.requests.iter().rev().find(|request| request.socket.is_some()).unwrap().clone();
    let socket = request.socket.clone().unwrap();
    assert!(!socket.is_open, "the session must have ended");
    (request, socket)
}

/// Returns the record of a close frame.
fn close_frame(code: u16, reason: &str) -> Option<SocketClose> {
    Some(SocketClose { code, reason: reason.to_owned() })
}

/// The path of the echo.
pub(super) const ECHO: &str = "/v1/simulator/anything?x=1";
/// The path of a speech session with a public voice.
pub(super) const SPEECH: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input";

#[tokio::test]
async fn any_other_path_echoes_messages_and_the_close_frame() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = try_connect(&simulator, ECHO, &[]).await.unwrap();
    for message in [
        Message::text("a text"),
        Message::text(""),
        Message::binary(vec![0, 255, 10]),
        Message::binary(vec![7_u8; 1_000_000]),
    ] {
        client.send(message.clone()).await;
        assert_eq!(client.next().await.unwrap().unwrap(), message);
    }
    client.send(Message::Ping(vec![1, 2].into())).await;
    assert_eq!(client.next().await.unwrap().unwrap(), Message::Pong(vec![1, 2].into()));
    client.close(4_321, "enough").await;
    let (request, socket) = ended_session(&simulator).await;
    assert_eq!((request.status, request.path_and_query.as_str()), (Some(101), ECHO));
    assert_eq!((socket.text_messages, socket.binary_messages, socket.messages_sent), (2, 2, 4));
    assert_eq!(socket.message_bytes, 6 + 3 + 1_000_000);
    assert_eq!(socket.messages, ["a text", ""]);
    assert_eq!(socket.close_received, close_frame(4_321, "enough"));
    assert_eq!(socket.close_sent, close_frame(4_321, "enough"));
    let ledger = simulator.ledger();
    assert_eq!((ledger.totals.served, ledger.totals.in_flight, ledger.totals.charged), (1, 0, 0));
    assert_eq!(ledger.violations, [] as [String; 0]);
}

#[tokio::test]
async fn a_running_session_is_in_the_ledger() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect(&simulator, ECHO, "sk").await;
    client.send(Message::text("one")).await;
    client.receive_text().await;
    let ledger =
        wait_until(&simulator, |ledger| ledger.requests[0].socket.as_ref().unwrap().messages_sent == 1).await;
    assert!(ledger.requests[0].socket.as_ref().unwrap().is_open);
    assert_eq!((ledger.totals.sockets_open, ledger.key("sk").unwrap().served), (1, 1));
    // A client that disconnects without a close frame also ends its session.
    drop(client);
    let (request, socket) = ended_session(&simulator).await;
    assert_eq!((request.key.as_deref(), socket.close_received, socket.close_sent), (Some("sk"), None, None));
}

#[tokio::test]
async fn the_ledger_records_offers_of_clients_and_only_the_protocol_of_agents_is_accepted() {
    let simulator = start_with_keys("sk=100").await;
    let offered_headers = [
        ("origin", "https://app.example"),
        ("sec-websocket-protocol", "other"),
        ("sec-websocket-protocol", "convai"),
        ("sec-websocket-extensions", "permessage-deflate; client_max_window_bits"),
    ];
    let client = try_connect(&simulator, ECHO, &offered_headers).await.unwrap();
    assert_eq!(client.headers["sec-websocket-protocol"], "convai");
    assert!(!client.headers.contains_key("sec-websocket-extensions"));
    client.close(1_000, "").await;
    let (_, socket) = ended_session(&simulator).await;
    assert_eq!(socket.origin.as_deref(), Some("https://app.example"));
    assert_eq!(
        (socket.protocols, socket.protocol.as_deref()),
        (vec!["other".into(), "convai".into()], Some("convai"))
    );
    assert_eq!(socket.extensions.as_deref(), Some("permessage-deflate; client_max_window_bits"));

    let client = try_connect(&simulator, ECHO, &[("sec-websocket-protocol", "other")]).await;
    assert!(client.is_err(), "a client that offers protocols must reject a response without one");
    let (_, socket) = ended_session(&simulator).await;
    assert_eq!((socket.protocols, socket.protocol), (vec!["other".to_owned()], None));
}

#[tokio::test]
async fn a_message_is_limited_to_the_size_that_clients_accept() {
    let simulator = start_with_keys("sk=100").await;
    let max_bytes = 16 * 1_024 * 1_024;
    let mut client = connect(&simulator, ECHO, "sk").await;
    client.send(Message::binary(vec![1_u8; max_bytes])).await;
    assert_eq!(client.next().await.unwrap().unwrap().len(), max_bytes);
    client.send(Message::binary(vec![1_u8; max_bytes + 1])).await;
    assert_eq!(client.receive_close().await.0, 1_009);
}

#[tokio::test]
async fn a_malformed_handshake_is_refused() {
    let simulator = start_with_keys("sk=100").await;
    let with_upgrade =
        |call: SimulatorCall| call.header("upgrade", "websocket").header("connection", "upgrade");
    let handshake_key = "dGhlIHNhbXBsZSBub25jZQ==";
    let request = with_upgrade(get(ECHO))
        .header("sec-websocket-key", handshake_key)
        .header("sec-websocket-version", "8");
    let reply = request.send_to(&simulator).await;
    assert_eq!((reply.status, reply.header("sec-websocket-version")), (426, "13"));
    let reply_without_key =
        with_upgrade(get(ECHO)).header("sec-websocket-version", "13").send_to(&simulator).await;
    assert_eq!(reply_without_key.status, 400);
    // A request with a method other than GET is not a handshake, even with all its headers.
    let post_response = with_upgrade(post("/v1/simulator/echo", ""))
        .header("sec-websocket-version", "13")
        .send_to(&simulator)
        .await;
    assert_eq!(post_response.status, 200);
    assert_eq!(simulator.ledger().totals.sockets_open, 0);
}

#[tokio::test]
async fn a_wrong_path_of_the_provider_is_refused_in_the_handshake() {
    let simulator = start_with_keys("sk=100").await;
    for path in [
        "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/input-stream",
        "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM",
        "/v1/speech-to-text/live",
        &format!("{SPEECH}?model_id=eleven_v3"),
    ] {
        let refusal = try_connect(&simulator, path, &[("xi-api-key", "sk")]).await.err().unwrap();
        assert_eq!((refusal.status, refusal.body), (403, Vec::new()), "{path} must be refused");
    }
    assert_eq!((simulator.ledger().totals.refused, simulator.ledger().key("sk").unwrap().refused), (4, 4));
}

#[tokio::test]
async fn a_credential_of_a_client_is_a_violation_in_the_head_and_in_messages() {
    let simulator = start(Plan::parse("sk=100").unwrap().with_forbidden_text("choir_client")).await;
    let refusal =
        try_connect(&simulator, SPEECH, &[("sec-websocket-protocol", "bearer.x")]).await.err().unwrap();
    assert_eq!(refusal.status, 599);
    for (path, message, expected) in [
        (
            SPEECH,
            r#"{"text":" ","xi_api_key":"other"}"#,
            "socket: the member xi_api_key was forwarded in a message",
        ),
        (
            SPEECH,
            r#"{"text":" ","xi-api-key":"sk"}"#,
            "socket: the member xi-api-key was forwarded in a message",
        ),
        (ECHO, r#"{"authorization":"x"}"#, "socket: the member authorization was forwarded in a message"),
        (ECHO, "a choir_client in a text", "socket: forbidden text 1 of 1 was forwarded in a message"),
    ] {
        let mut client = connect(&simulator, path, "sk").await;
        client.send(Message::text(message)).await;
        assert_eq!(client.receive_close().await, (4_599, "simulator_violation".to_owned()));
        assert_eq!(simulator.ledger().violations.last().unwrap(), expected);
        assert_eq!(ended_session(&simulator).await.1.messages, ["withheld"]);
    }
    let mut client = connect(&simulator, ECHO, "sk").await;
    client.send(Message::binary(b"\xffchoir_client".to_vec())).await;
    assert_eq!(client.receive_close().await.0, 4_599);
    assert_eq!(simulator.ledger().totals.violations, 6);
}

#[tokio::test]
async fn stopping_the_simulator_ends_its_sessions() {
    let simulator = start_with_keys("sk=100").await;
    let mut client = connect(&simulator, ECHO, "sk").await;
    within_timeout(simulator.stop()).await;
    client.receive_break().await;
}
