//! A WebSocket client.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::{CLIENT_TOKEN, TestProxy};

/// A timeout far above the duration of any step here.
const PATIENCE: Duration = Duration::from_secs(20);

pub const STREAM_INPUT: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input";
pub const MULTI_STREAM_INPUT: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/multi-stream-input";
pub const DIALOGUE: &str = "/v1/text-to-dialogue/stream-input";
pub const SCRIBE: &str = "/v1/speech-to-text/realtime?model_id=scribe_v2_realtime&audio_format=pcm_16000";
pub const AGENT: &str = "/v1/convai/conversation?agent_id=agent_public";

/// The client's end of a session.
pub struct WebSocketClient {
    pub stream: WebSocketStream<TcpStream>,
    pub headers: http::HeaderMap,
}

/// The next event of a session.
#[derive(Debug, PartialEq)]
pub enum Received {
    Text(Value),
    Binary(Vec<u8>),
    Close(u16, String),
    /// The connection ended without a close frame.
    Gone,
}

pub async fn within_timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Sends a handshake with these headers.
pub async fn handshake(
    proxy: &TestProxy,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<WebSocketClient, (u16, String)> {
    handshake_at(proxy.running.address(), path, headers).await
}

/// The same to any address.
pub async fn handshake_at(
    address: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<WebSocketClient, (u16, String)> {
    let mut request = ClientRequestBuilder::new(format!("ws://{address}{path}").parse().unwrap());
    for (name, value) in headers {
        request = match *name {
            "sec-websocket-protocol" => request.with_sub_protocol(*value),
            _ => request.with_header(*name, *value),
        };
    }
    let stream = TcpStream::connect(address).await.unwrap();
    match within_timeout(client_async(request, stream)).await {
        Ok((stream, response)) => Ok(WebSocketClient { stream, headers: response.headers().clone() }),
        Err(Error::Http(response)) => {
            let (head, body) = response.into_parts();
            Err((head.status.as_u16(), String::from_utf8_lossy(&body.unwrap_or_default()).into_owned()))
        }
        Err(error) => panic!("no handshake: {error}"),
    }
}

/// Opens a session like an SDK.
pub async fn open_session(proxy: &TestProxy, path: &str) -> WebSocketClient {
    handshake(proxy, path, &[("xi-api-key", CLIENT_TOKEN)]).await.expect("an open socket")
}

impl WebSocketClient {
    pub async fn say(&mut self, text: &Value) {
        within_timeout(self.stream.send(Message::text(text.to_string()))).await.unwrap();
    }

    pub async fn send(&mut self, message: Message) {
        within_timeout(self.stream.send(message)).await.unwrap();
    }

    /// The next message, or the end. Pings are answered.
    pub async fn hear(&mut self) -> Received {
        loop {
            return match within_timeout(self.stream.next()).await {
                Some(Ok(Message::Text(text))) => Received::Text(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Binary(bytes))) => Received::Binary(bytes.to_vec()),
                Some(Ok(Message::Close(Some(CloseFrame { code, reason })))) => {
                    Received::Close(code.into(), reason.to_string())
                }
                Some(Ok(Message::Close(None))) => Received::Close(1005, String::new()),
                Some(Ok(_)) => continue,
                Some(Err(_)) | None => Received::Gone,
            };
        }
    }

    /// Closes the session, and waits for the end, whatever messages precede it.
    pub async fn leave(&mut self) {
        // The other end may be closed.
        let _ = within_timeout(self.stream.close(None)).await;
        while let Some(Ok(_)) = within_timeout(self.stream.next()).await {}
    }

    /// The next event, which must be a message.
    pub async fn message(&mut self) -> Value {
        let heard = self.hear().await;
        let Received::Text(value) = heard else { panic!("no message: {heard:?}") };
        value
    }

    /// All messages up to the end, and the end.
    pub async fn rest(&mut self) -> (Vec<Value>, Received) {
        let mut messages = Vec::new();
        loop {
            let heard = self.hear().await;
            let Received::Text(value) = heard else { return (messages, heard) };
            messages.push(value);
        }
    }

    /// Sends a text from the first message to the last, and receives all messages.
    pub async fn speak(&mut self, texts: &[&str]) -> (Vec<Value>, Received) {
        self.say(&serde_json::json!({"text": " ", "xi_api_key": CLIENT_TOKEN})).await;
        for text in texts {
            self.say(&serde_json::json!({"text": text, "try_trigger_generation": true})).await;
        }
        self.say(&serde_json::json!({"text": ""})).await;
        self.rest().await
    }
}
