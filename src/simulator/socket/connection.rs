//! Receives, records and sends the messages of a session, and executes scripted faults and refusals, so that the
//! modules of the WebSockets only process the content of messages.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::super::accounts::Refusal;
use super::super::fault::SessionFault;
use super::super::ledger::SocketClose;
use super::super::provider::{PresentedKey, Session};
use super::super::refusal::RefusalKind;
use super::limited_stream::LimitedStream;
use super::message_check::{self, MessageCheck};
use super::refusal::{RefusalFormat, SocketRefusal, render};
use super::session_faults::SessionFaults;

/// Maximum number of bytes of a message, which is the limit of the provider's clients (the Python SDK 2.78).
const MAX_MESSAGE_BYTES: usize = 16 * 1_024 * 1_024;
/// The time without a message after which a client counts as disconnected.
const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Maximum time for writing one message.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum wait for the client's reply to a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum wait until a client closes a cut connection.
const CUT_TIMEOUT: Duration = Duration::from_millis(500);
/// Maximum number of bytes of received messages that are buffered until they are processed.
const MAX_BUFFERED_BYTES: usize = 32 * 1_024 * 1_024;
/// Maximum number of text messages that the ledger stores per session.
const MAX_RECORDED_MESSAGES: usize = 100;
/// Maximum number of bytes of all text messages that the ledger stores per session.
const MAX_RECORDED_BYTES: usize = 64 * 1_024;
/// The close code of a session with a violation. The provider never sends it.
const VIOLATION_CLOSE_CODE: u16 = 4_599;

/// The error of a session that ended with a close frame, a timeout, a broken connection, or a disconnected client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SessionEnded;

/// A message from the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClientMessage {
    Text(String),
    Binary(Bytes),
}

/// The connection of a session with its faults and buffered messages.
pub(super) struct SessionConnection {
    stream: WebSocketStream<LimitedStream>,
    pub(super) session: Session,
    pub(super) faults: SessionFaults,
    /// Whether the head of the handshake contained a key, valid or not.
    pub(super) has_key_in_head: bool,
    refusal_format: RefusalFormat,
    /// The received messages that are not processed yet.
    buffered: VecDeque<ClientMessage>,
    buffered_bytes: usize,
    /// Number of bytes of all received messages.
    received_bytes: u64,
    /// Number of bytes of the received text messages, as they are recorded.
    recorded_bytes: usize,
    sent_messages: u64,
}

impl SessionConnection {
    /// Creates the connection of a session on `tcp`, from which `read_bytes` have been read already.
    pub(super) async fn new(
        tcp: TcpStream,
        read_bytes: Vec<u8>,
        session: Session,
        faults: SessionFaults,
        refusal_format: RefusalFormat,
    ) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(16 * 1_024)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let limited_stream = LimitedStream { tcp, remaining: faults.cut_after };
        Self {
            stream: WebSocketStream::from_partially_read(
                limited_stream,
                read_bytes,
                Role::Server,
                Some(config),
            )
            .await,
            session,
            faults,
            has_key_in_head: false,
            refusal_format,
            buffered: VecDeque::new(),
            buffered_bytes: 0,
            received_bytes: 0,
            recorded_bytes: 0,
            sent_messages: 0,
        }
    }

    /// Starts the session before its first message is sent. A fault may delay or end the session.
    pub(super) async fn start(&mut self) -> Result<(), SessionEnded> {
        self.stream.get_mut().remaining = self.faults.cut_after;
        if let Some(delay) = self.faults.initial_delay.take() {
            self.buffer_messages_for(delay).await?;
        }
        if self.faults.cut_after == Some(0) {
            return Err(self.cut().await);
        }
        self.execute_due_fault().await
    }

    /// Receives the next message. Returns `None` if no message arrives within `timeout`. Without a `timeout`, the
    /// session ends after [`IDLE_TIMEOUT`].
    pub(super) async fn receive(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Option<ClientMessage>, SessionEnded> {
        if let Some(message) = self.buffered.pop_front() {
            self.buffered_bytes = self.buffered_bytes.saturating_sub(message_length(&message));
            return Ok(Some(message));
        }
        match tokio::time::timeout(timeout.unwrap_or(IDLE_TIMEOUT), self.read_message()).await {
            Ok(message) => message.map(Some),
            Err(_) if timeout.is_some() => Ok(None),
            Err(_) => Err(SessionEnded),
        }
    }

    /// Receives the next message as a JSON object. Returns `None` if no message arrives within `timeout`. Any
    /// other message is refused.
    pub(super) async fn receive_object(
        &mut self,
        timeout: Option<Duration>,
    ) -> Result<Option<Value>, SessionEnded> {
        let object = match self.receive(timeout).await? {
            None => return Ok(None),
            Some(ClientMessage::Text(text)) => serde_json::from_str(&text).ok().filter(Value::is_object),
            Some(ClientMessage::Binary(_)) => None,
        };
        self.require(object.ok_or(RefusalKind::MalformedJson.into())).await.map(Some)
    }

    /// Receives and buffers messages for the given time, so that a disconnected client is detected.
    async fn buffer_messages_for(&mut self, duration: Duration) -> Result<(), SessionEnded> {
        self.buffer_messages_until(tokio::time::sleep(duration)).await
    }

    /// Receives and buffers messages until `event`, so that a disconnected client is detected.
    pub(super) async fn buffer_messages_until(
        &mut self,
        event: impl Future<Output = ()>,
    ) -> Result<(), SessionEnded> {
        let buffer_messages = async {
            while self.buffered_bytes <= MAX_BUFFERED_BYTES {
                let message = self.read_message().await?;
                self.buffered_bytes = self.buffered_bytes.saturating_add(message_length(&message));
                self.buffered.push_back(message);
            }
            std::future::pending::<Result<(), SessionEnded>>().await
        };
        tokio::select! {
            result = buffer_messages => result,
            () = event => Ok(()),
        }
    }

    /// Reads and records the next message. Executes a refusal that is due after it.
    async fn read_message(&mut self) -> Result<ClientMessage, SessionEnded> {
        loop {
            let message = match self.stream.next().await {
                Some(Ok(message)) => message,
                Some(Err(Error::Capacity(_))) => return Err(self.refuse_size().await),
                Some(Err(_)) | None => return Err(SessionEnded),
            };
            let client_message = match message {
                Message::Text(text) => ClientMessage::Text(text.as_str().to_owned()),
                Message::Binary(bytes) => ClientMessage::Binary(bytes),
                Message::Close(frame) => {
                    let close = socket_close(frame);
                    self.session.update_summary(|socket| {
                        socket.close_received = Some(close.clone());
                        // The reply contains the client's close frame.
                        socket.close_sent = Some(close);
                    });
                    // The stream sends its reply while it is read.
                    while let Some(Ok(_)) = self.stream.next().await {}
                    return Err(SessionEnded);
                }
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            self.record_message(&client_message).await?;
            return Ok(client_message);
        }
    }

    /// Records a received message. Ends the session if the message is a violation or a refusal is due after it.
    async fn record_message(&mut self, message: &ClientMessage) -> Result<(), SessionEnded> {
        let MessageCheck { violations, has_credential } = self.check_message(message);
        let is_withheld = has_credential || !violations.is_empty();
        let bytes = u64::try_from(message_length(message)).unwrap_or(u64::MAX);
        self.received_bytes = self.received_bytes.saturating_add(bytes);
        self.session.update_summary(|socket| {
            socket.message_bytes = socket.message_bytes.saturating_add(bytes);
            match message {
                ClientMessage::Text(text) => {
                    socket.text_messages += 1;
                    let recorded_text = if is_withheld { "withheld" } else { text };
                    self.recorded_bytes = self.recorded_bytes.saturating_add(recorded_text.len());
                    if socket.messages.len() < MAX_RECORDED_MESSAGES
                        && self.recorded_bytes <= MAX_RECORDED_BYTES
                    {
                        socket.messages.push(recorded_text.to_owned());
                    }
                }
                ClientMessage::Binary(_) => socket.binary_messages += 1,
            }
        });
        if !violations.is_empty() {
            for violation in &violations {
                self.session.provider.record_violation(format!("socket: {violation}"));
            }
            return Err(self.close(VIOLATION_CLOSE_CODE, "simulator_violation").await);
        }
        if let Some((_, kind)) =
            self.faults.refuse_after_bytes.take_if(|(after, _)| *after <= self.received_bytes)
        {
            return Err(self.refuse_by_fault(kind).await);
        }
        Ok(())
    }

    fn check_message(&self, client_message: &ClientMessage) -> MessageCheck {
        let provider = &self.session.provider;
        match client_message {
            ClientMessage::Text(text) => {
                let document = serde_json::from_str(text).ok();
                let is_known = |key: &str| provider.find_key(key) != PresentedKey::Unknown;
                let forbidden_texts = &provider.plan.forbidden_texts;
                message_check::check_text(
                    text,
                    document.as_ref(),
                    forbidden_texts,
                    !self.has_key_in_head,
                    is_known,
                )
            }
            ClientMessage::Binary(bytes) => {
                message_check::check_binary(bytes, &provider.plan.forbidden_texts)
            }
        }
    }

    /// Waits for the scripted delay between two messages.
    pub(super) async fn wait_between_messages(&mut self) -> Result<(), SessionEnded> {
        match self.faults.message_delay {
            Some(delay) if self.sent_messages > 0 => self.buffer_messages_for(delay).await,
            Some(_) | None => Ok(()),
        }
    }

    /// Sends a message after the scripted delay.
    pub(super) async fn send(&mut self, message: Message) -> Result<(), SessionEnded> {
        self.wait_between_messages().await?;
        self.send_now(message).await
    }

    /// Sends a JSON document after the scripted delay.
    pub(super) async fn send_json(&mut self, document: Value) -> Result<(), SessionEnded> {
        self.send(Message::text(document.to_string())).await
    }

    /// Sends a message, and executes a fault that is due after it.
    pub(super) async fn send_now(&mut self, message: Message) -> Result<(), SessionEnded> {
        self.write(message).await?;
        self.sent_messages += 1;
        self.session.update_summary(|socket| socket.messages_sent += 1);
        self.execute_due_fault().await
    }

    /// Writes a message. Breaks the connection if a fault limits its bytes and the limit is reached.
    async fn write(&mut self, message: Message) -> Result<(), SessionEnded> {
        let write_result = tokio::time::timeout(WRITE_TIMEOUT, self.stream.send(message)).await;
        if self.stream.get_ref().remaining == Some(0) {
            return Err(self.cut().await);
        }
        match write_result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(SessionEnded),
        }
    }

    /// Executes the fault that is due after the sent messages.
    async fn execute_due_fault(&mut self) -> Result<(), SessionEnded> {
        let due_fault = self.faults.after_messages.take_if(|(after, _)| *after <= self.sent_messages);
        let Some((_, fault)) = due_fault else { return Ok(()) };
        Err(match fault {
            SessionFault::Refuse(kind) => self.refuse_by_fault(kind).await,
            SessionFault::Close { code, reason } => self.close(code, &reason).await,
            SessionFault::Cut => self.cut().await,
            SessionFault::Reset => {
                // If the option cannot be set, the connection is cut without a reset.
                let _set = self.stream.get_ref().tcp.set_zero_linger();
                SessionEnded
            }
            SessionFault::Stall => {
                let _ended = self.buffer_messages_for(IDLE_TIMEOUT).await;
                SessionEnded
            }
            SessionFault::Send(text) => return self.write(Message::text(text)).await,
            SessionFault::SendAndClose { code, text } => {
                self.write(Message::text(text)).await?;
                self.close(code, "").await
            }
        })
    }

    async fn refuse_by_fault(&mut self, kind: RefusalKind) -> SessionEnded {
        self.refuse(&Refusal::new(kind, self.faults.values.clone())).await
    }

    /// Returns the value of a successful check. A refusal is sent, and the session ends.
    pub(super) async fn require<T>(&mut self, check: Result<T, Refusal>) -> Result<T, SessionEnded> {
        match check {
            Ok(value) => Ok(value),
            Err(refusal) => Err(self.refuse(&refusal).await),
        }
    }

    /// Sends a refusal in the format of this WebSocket, and closes the session.
    pub(super) async fn refuse(&mut self, refusal: &Refusal) -> SessionEnded {
        let refusal = render(self.refusal_format, &refusal.kind, &refusal.values);
        self.send_refusal(refusal).await
    }

    /// Sends the message of a refusal, if it has one, and closes the session.
    pub(super) async fn send_refusal(&mut self, refusal: SocketRefusal) -> SessionEnded {
        let SocketRefusal { name, message, code, reason } = refusal;
        self.session.update_summary(|socket| socket.refused = Some(name));
        if let Some(message) = message
            && let Err(ended) = self.write(Message::text(message)).await
        {
            return ended;
        }
        self.close(code, &reason).await
    }

    /// Sends a close frame, and waits for the client's close frame.
    pub(super) async fn close(&mut self, code: u16, reason: &str) -> SessionEnded {
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
        self.record_sent_close(&frame);
        let exchange_close = async {
            if self.stream.send(Message::Close(Some(frame))).await.is_err() {
                return;
            }
            while let Some(Ok(message)) = self.stream.next().await {
                if let Message::Close(frame) = message {
                    let close = socket_close(frame);
                    self.session.update_summary(|socket| socket.close_received = Some(close));
                }
            }
        };
        // A client that does not reply is disconnected after the timeout.
        let _closed = tokio::time::timeout(CLOSE_TIMEOUT, exchange_close).await;
        SessionEnded
    }

    /// Closes the session after a message above the maximum size. The rest of the message cannot be parsed as
    /// frames.
    async fn refuse_size(&mut self) -> SessionEnded {
        let frame = CloseFrame { code: CloseCode::Size, reason: "message too big".into() };
        self.record_sent_close(&frame);
        // The client's close frame is not awaited, because it would follow the rest of the message.
        let _written = self.write(Message::Close(Some(frame))).await;
        self.cut().await
    }

    /// Ends the connection without a close frame and without losing written data.
    async fn cut(&mut self) -> SessionEnded {
        let tcp = &mut self.stream.get_mut().tcp;
        let shut_down = async {
            tcp.shutdown().await?;
            // If received data remained unread, the kernel would send a reset, which may overtake the sent data.
            let mut discard_buffer = [0; 4_096];
            while tcp.read(&mut discard_buffer).await? > 0 {}
            Ok::<_, io::Error>(())
        };
        let _ended = tokio::time::timeout(CUT_TIMEOUT, shut_down).await;
        SessionEnded
    }

    fn record_sent_close(&self, frame: &CloseFrame) {
        let close = socket_close(Some(frame.clone()));
        self.session.update_summary(|socket| socket.close_sent = Some(close));
    }
}

fn socket_close(frame: Option<CloseFrame>) -> SocketClose {
    match frame {
        Some(frame) => SocketClose { code: frame.code.into(), reason: frame.reason.as_str().to_owned() },
        None => SocketClose { code: u16::from(CloseCode::Status), reason: String::new() },
    }
}

fn message_length(message: &ClientMessage) -> usize {
    match message {
        ClientMessage::Text(text) => text.len(),
        ClientMessage::Binary(bytes) => bytes.len(),
    }
}
