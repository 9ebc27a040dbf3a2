//! A WebSocket client for tests, and the paths of the provider's WebSockets. The client sends a handshake and messages,
//! and receives messages and the close code. Each of its steps has a timeout.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{ClientRequestBuilder, Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::{CLIENT_TOKEN, TestProxy};

/// The timeout of a step. It is much longer than any step, so that only a step that hangs exceeds it.
const STEP_TIMEOUT: Duration = Duration::from_secs(20);

// The paths of the provider's WebSockets.
pub const STREAM_INPUT: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/stream-input";
pub const MULTI_STREAM_INPUT: &str = "/v1/text-to-speech/21m00Tcm4TlvDq8ikWAM/multi-stream-input";
pub const DIALOGUE: &str = "/v1/text-to-dialogue/stream-input";
pub const SCRIBE: &str = "/v1/speech-to-text/realtime?model_id=scribe_v2_realtime&audio_format=pcm_16000";
pub const AGENT: &str = "/v1/convai/conversation?agent_id=agent_public";

/// The client's end of a session.
pub struct WebSocketClient {
    pub stream: WebSocketStream<TcpStream>,
    /// The headers of the response to the handshake.
    pub headers: http::HeaderMap,
}

/// An event of a session, as the client receives it.
#[derive(Debug, PartialEq)]
pub enum Received {
    Text(Value),
    Binary(Vec<u8>),
    Close(u16, String),
    /// The connection was closed without a close frame.
    Disconnected,
}

/// Awaits a step of a test.
///
/// # Panics
///
/// Panics if the step takes longer than [`STEP_TIMEOUT`].
pub async fn within_timeout<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(STEP_TIMEOUT, future).await.expect("the step must complete within its timeout")
}

/// Sends a handshake with the given `headers` to the proxy.
///
/// # Errors
///
/// Returns the status and the body if the handshake is refused.
pub async fn handshake(
    proxy: &TestProxy,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<WebSocketClient, (u16, String)> {
    handshake_at(proxy.app.address(), path, headers).await
}

/// Sends a handshake like [`handshake`], to any address.
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
        Err(error) => panic!("the handshake must receive a response: {error}"),
    }
}

/// Opens a session with the client token in the header of the provider's SDKs.
pub async fn open_session(proxy: &TestProxy, path: &str) -> WebSocketClient {
    handshake(proxy, path, &[("xi-api-key", CLIENT_TOKEN)]).await.expect("the handshake must be accepted")
}

impl WebSocketClient {
    pub async fn send_json(&mut self, message: &Value) {
        within_timeout(self.stream.send(Message::text(message.to_string()))).await.unwrap();
    }

    pub async fn send(&mut self, message: Message) {
        within_timeout(self.stream.send(message)).await.unwrap();
    }

    /// Receives the next event. Skips the pings and pongs that precede it.
    pub async fn receive(&mut self) -> Received {
        loop {
            return match within_timeout(self.stream.next()).await {
                Some(Ok(Message::Text(text))) => Received::Text(serde_json::from_str(&text).unwrap()),
                Some(Ok(Message::Binary(bytes))) => Received::Binary(bytes.to_vec()),
                Some(Ok(Message::Close(Some(CloseFrame { code, reason })))) => {
                    Received::Close(code.into(), reason.to_string())
                }
                // A close frame without a code has the code 1005 (RFC 6455, section 7.1.5).
                Some(Ok(Message::Close(None))) => Received::Close(1005, String::new()),
                Some(Ok(_)) => continue,
                Some(Err(_)) | None => Received::Disconnected,
            };
        }
    }

    /// Closes the session and waits for its end. Ignores the messages before the end.
    pub async fn close(&mut self) {
        // The proxy may have closed the session already.
        let _ = within_timeout(self.stream.close(None)).await;
        while let Some(Ok(_)) = within_timeout(self.stream.next()).await {}
    }

    /// Receives the next event, which must be a JSON message.
    pub async fn receive_json(&mut self) -> Value {
        let event = self.receive().await;
        let Received::Text(value) = event else { panic!("the event must be a JSON message: {event:?}") };
        value
    }

    /// Receives JSON messages until another event. Returns the messages and that event.
    pub async fn receive_to_end(&mut self) -> (Vec<Value>, Received) {
        let mut messages = Vec::new();
        loop {
            let event = self.receive().await;
            let Received::Text(value) = event else { return (messages, event) };
            messages.push(value);
        }
    }

    /// Sends an opening message, the texts and a closing message. Returns all received messages and the final event.
    pub async fn synthesize(&mut self, texts: &[&str]) -> (Vec<Value>, Received) {
        self.send_json(&serde_json::json!({"text": " ", "xi_api_key": CLIENT_TOKEN})).await;
        for text in texts {
            self.send_json(&serde_json::json!({"text": text, "try_trigger_generation": true})).await;
        }
        self.send_json(&serde_json::json!({"text": ""})).await;
        self.receive_to_end().await
    }
}
