//! The connection of a session: receives, records and sends messages, and executes the scripted
//! faults. The modules above only handle the content of messages.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message};

use super::super::accounts::Refused;
use super::super::fault::Turn;
use super::super::ledger::SocketClose;
use super::super::shape::Shape;
use super::super::world::{Presented, Session};
use super::look::{self, Look};
use super::orders::Orders;
use super::snip::Snip;
use super::told::{Told, Tongue, tell};

/// Maximum bytes of a message, the limit of the provider's clients (the Python SDK 2.78).
const MESSAGE_BYTES_MAX: usize = 16 * 1_024 * 1_024;
/// A client that sends nothing for this time is treated as disconnected.
const SILENCE_MAX: Duration = Duration::from_secs(600);
/// Timeout of writing one message.
const WRITE_MAX: Duration = Duration::from_secs(60);
/// Timeout of the reply to a close.
const CLOSE_MAX: Duration = Duration::from_secs(5);
/// Time for a client to notice that its connection was cut.
const CUT_MAX: Duration = Duration::from_millis(500);
/// Maximum bytes of messages buffered while they are not read.
const HEARD_BYTES_MAX: usize = 32 * 1_024 * 1_024;
/// Maximum text messages that the ledger keeps of one session, and their bytes.
const KEPT_MESSAGES_MAX: usize = 100;
const KEPT_BYTES_MAX: usize = 64 * 1_024;
/// The close code for a violation, which the provider never sends.
const VIOLATION: u16 = 4_599;

/// The session is over: closed, broken, or left by the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Over;

/// A message of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    Text(String),
    Binary(Bytes),
}

pub(super) struct Wire {
    stream: WebSocketStream<Snip>,
    pub(super) session: Session,
    pub(super) orders: Orders,
    /// The identified caller.
    pub(super) key: Presented,
    /// Whether the handshake contained a key, valid or not.
    pub(super) has_key_in_head: bool,
    tongue: Tongue,
    heard: VecDeque<Heard>,
    heard_bytes: usize,
    received_bytes: u64,
    kept_bytes: usize,
    sent: u64,
}

impl Wire {
    /// A session on `tcp`, from which `read` was read already.
    pub(super) async fn new(
        tcp: TcpStream,
        read: Vec<u8>,
        session: Session,
        orders: Orders,
        tongue: Tongue,
    ) -> Self {
        let config = WebSocketConfig::default()
            .read_buffer_size(16 * 1_024)
            .max_message_size(Some(MESSAGE_BYTES_MAX))
            .max_frame_size(Some(MESSAGE_BYTES_MAX));
        let snip = Snip { tcp, left: orders.cut_after };
        Self {
            stream: WebSocketStream::from_partially_read(snip, read, Role::Server, Some(config)).await,
            session,
            orders,
            key: Presented::Nothing,
            has_key_in_head: false,
            tongue,
            heard: VecDeque::new(),
            heard_bytes: 0,
            received_bytes: 0,
            kept_bytes: 0,
            sent: 0,
        }
    }

    /// Called before the first message, at which point a fault may delay or end the session.
    pub(super) async fn opening(&mut self) -> Result<(), Over> {
        self.stream.get_mut().left = self.orders.cut_after;
        if let Some(length) = self.orders.stall.take() {
            self.listen_for(length).await?;
        }
        if self.orders.cut_after == Some(0) {
            return Err(self.cut().await);
        }
        self.turn_if_due().await
    }

    /// The next message, or `None` if none came within `limit`.
    pub(super) async fn next(&mut self, limit: Option<Duration>) -> Result<Option<Heard>, Over> {
        if let Some(heard) = self.heard.pop_front() {
            self.heard_bytes = self.heard_bytes.saturating_sub(size(&heard));
            return Ok(Some(heard));
        }
        match timeout(limit.unwrap_or(SILENCE_MAX), self.hear()).await {
            Ok(heard) => heard.map(Some),
            Err(_) if limit.is_some() => Ok(None),
            Err(_) => Err(Over),
        }
    }

    /// Reads and buffers for the given time, so that a client that disconnects is noticed.
    async fn listen_for(&mut self, length: Duration) -> Result<(), Over> {
        self.listen_until(tokio::time::sleep(length)).await
    }

    /// Reads and buffers until `event`, so that a client that disconnects is noticed.
    pub(super) async fn listen_until(&mut self, event: impl Future<Output = ()>) -> Result<(), Over> {
        let listening = async {
            while self.heard_bytes <= HEARD_BYTES_MAX {
                let heard = self.hear().await?;
                self.heard_bytes = self.heard_bytes.saturating_add(size(&heard));
                self.heard.push_back(heard);
            }
            std::future::pending::<Result<(), Over>>().await
        };
        tokio::select! {
            left = listening => left,
            () = event => Ok(()),
        }
    }

    async fn hear(&mut self) -> Result<Heard, Over> {
        loop {
            let message = match self.stream.next().await {
                Some(Ok(message)) => message,
                Some(Err(Error::Capacity(_))) => return Err(self.refuse_size().await),
                Some(Err(_)) | None => return Err(Over),
            };
            let heard = match message {
                Message::Text(text) => Heard::Text(text.as_str().to_owned()),
                Message::Binary(bytes) => Heard::Binary(bytes),
                Message::Close(frame) => {
                    self.note_close(frame, true);
                    // Reads on until the reply is sent.
                    while let Some(Ok(_)) = self.stream.next().await {}
                    return Err(Over);
                }
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            self.received(&heard).await?;
            return Ok(heard);
        }
    }

    /// Records a message, and ends the session if it is a violation.
    async fn received(&mut self, heard: &Heard) -> Result<(), Over> {
        let Look { violations, has_credential } = self.look(heard);
        let is_withheld = has_credential || !violations.is_empty();
        let bytes = u64::try_from(size(heard)).unwrap_or(u64::MAX);
        self.received_bytes = self.received_bytes.saturating_add(bytes);
        self.session.note(|socket| {
            socket.message_bytes = socket.message_bytes.saturating_add(bytes);
            match heard {
                Heard::Text(text) => {
                    socket.text_messages += 1;
                    let kept = if is_withheld { "withheld" } else { text };
                    self.kept_bytes = self.kept_bytes.saturating_add(kept.len());
                    if socket.messages.len() < KEPT_MESSAGES_MAX && self.kept_bytes <= KEPT_BYTES_MAX {
                        socket.messages.push(kept.to_owned());
                    }
                }
                Heard::Binary(_) => socket.binary_messages += 1,
            }
        });
        if !violations.is_empty() {
            for what in &violations {
                self.session.world.violated(format!("socket: {what}"));
            }
            return Err(self.close(VIOLATION, "simulator_violation").await);
        }
        if let Some((_, shape)) =
            self.orders.refuse_after_bytes.take_if(|(after, _)| *after <= self.received_bytes)
        {
            return Err(self.refuse_as_told(&shape).await);
        }
        Ok(())
    }

    fn look(&self, heard: &Heard) -> Look {
        let world = &self.session.world;
        match heard {
            Heard::Text(text) => {
                let message = serde_json::from_str(text).ok();
                let is_known = |key: &str| world.find(key) != Presented::Unknown;
                look::text(text, message.as_ref(), world.forbidden(), !self.has_key_in_head, is_known)
            }
            Heard::Binary(bytes) => look::binary(bytes, world.forbidden()),
        }
    }

    /// Waits for the scripted delay between two messages.
    pub(super) async fn pause(&mut self) -> Result<(), Over> {
        match self.orders.pause {
            Some(length) if self.sent > 0 => self.listen_for(length).await,
            _ => Ok(()),
        }
    }

    /// Sends a text after the scripted delay.
    pub(super) async fn send(&mut self, text: String) -> Result<(), Over> {
        self.pause().await?;
        self.send_now(Message::text(text)).await
    }

    /// Sends a message, and executes the fault if it is due after this message.
    pub(super) async fn send_now(&mut self, message: Message) -> Result<(), Over> {
        self.write(message).await?;
        self.sent += 1;
        self.session.note(|socket| socket.messages_sent += 1);
        self.turn_if_due().await
    }

    async fn write(&mut self, message: Message) -> Result<(), Over> {
        let written = timeout(WRITE_MAX, self.stream.send(message)).await;
        if self.stream.get_ref().left == Some(0) {
            return Err(self.cut().await);
        }
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Over),
        }
    }

    async fn turn_if_due(&mut self) -> Result<(), Over> {
        let Some((_, turn)) = self.orders.turn.take_if(|(after, _)| *after <= self.sent) else {
            return Ok(());
        };
        Err(match turn {
            Turn::Refuse(shape) => self.refuse_as_told(&shape).await,
            Turn::Close { code, reason } => self.close(code, &reason).await,
            Turn::Cut => self.cut().await,
            Turn::Reset => {
                // If the option cannot be set, the connection ends like one that is cut.
                let _set = self.stream.get_ref().tcp.set_zero_linger();
                Over
            }
            Turn::Stall => match self.listen_for(SILENCE_MAX).await {
                Ok(()) | Err(Over) => Over,
            },
            Turn::Say(text) => return self.write(Message::text(text)).await,
            Turn::Last { code, text } => {
                self.write(Message::text(text)).await?;
                self.close(code, "").await
            }
        })
    }

    async fn refuse_as_told(&mut self, shape: &Shape) -> Over {
        let facts = Box::new(self.orders.facts.clone());
        self.refuse(&Refused { shape: shape.clone(), facts }).await
    }

    /// Refuses in the format of this WebSocket, and closes.
    pub(super) async fn refuse(&mut self, refused: &Refused) -> Over {
        let told = tell(self.tongue, &refused.shape, &refused.facts);
        self.tell(told).await
    }

    /// Sends the message of a refusal, if it has one, and closes.
    pub(super) async fn tell(&mut self, told: Told) -> Over {
        let Told { name, message, code, reason } = told;
        self.session.note(|socket| socket.refused = Some(name));
        if let Some(message) = message
            && let Err(over) = self.write(Message::text(message)).await
        {
            return over;
        }
        self.close(code, &reason).await
    }

    /// Closes, and waits for the client's close.
    pub(super) async fn close(&mut self, code: u16, reason: &str) -> Over {
        let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
        self.note_close(Some(frame.clone()), false);
        let closing = async {
            if self.stream.send(Message::Close(Some(frame))).await.is_err() {
                return;
            }
            while let Some(Ok(message)) = self.stream.next().await {
                if let Message::Close(frame) = message {
                    self.note_received(frame);
                }
            }
        };
        // A client that does not reply is dropped after the timeout.
        let _closed = timeout(CLOSE_MAX, closing).await;
        Over
    }

    /// Closes after a message above the maximum size, whose remaining bytes cannot be parsed as
    /// frames.
    async fn refuse_size(&mut self) -> Over {
        let frame = CloseFrame { code: CloseCode::Size, reason: "message too big".into() };
        self.note_close(Some(frame.clone()), false);
        // The connection ends now, whether the close is received or not.
        let _written = self.write(Message::Close(Some(frame))).await;
        self.cut().await
    }

    /// Ends the connection so that everything written before is still received.
    async fn cut(&mut self) -> Over {
        let tcp = &mut self.stream.get_mut().tcp;
        let ending = async {
            tcp.shutdown().await?;
            // Unread data would turn the end into a reset, which may overtake the sent data.
            let mut rest = [0; 4_096];
            while tcp.read(&mut rest).await? > 0 {}
            Ok::<_, io::Error>(())
        };
        let _ended = timeout(CUT_MAX, ending).await;
        Over
    }

    fn note_close(&self, frame: Option<CloseFrame>, is_received: bool) {
        let close = closed(frame);
        self.session.note(|socket| {
            if is_received {
                socket.close_received = Some(close.clone());
            }
            // A close is echoed.
            socket.close_sent = Some(close);
        });
    }

    fn note_received(&self, frame: Option<CloseFrame>) {
        self.session.note(|socket| socket.close_received = Some(closed(frame)));
    }
}

fn closed(frame: Option<CloseFrame>) -> SocketClose {
    match frame {
        Some(frame) => SocketClose { code: frame.code.into(), reason: frame.reason.as_str().to_owned() },
        None => SocketClose { code: u16::from(CloseCode::Status), reason: String::new() },
    }
}

fn size(heard: &Heard) -> usize {
    match heard {
        Heard::Text(text) => text.len(),
        Heard::Binary(bytes) => bytes.len(),
    }
}
