//! A provider that sends scripted bytes as its responses, at a scripted moment. It sends regular responses to polls,
//! unless a script replaces the response about the subscription, and to the requests that check whether the proxy still
//! works. It records each malformed request that it receives.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use keychoir::tasks::Tasks;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::net::{TcpListener, TcpStream};

use super::super::http_parser::{RequestHead, RequestParser};
use super::{ConnectionEnd, SPEECH_BODY, ScriptedResponse, VALID_REQUEST_MARK, VOICES_BODY};

/// A provider with scripted responses to all requests except valid ones and polls.
pub struct Provider {
    pub url: String,
    state: Arc<ProviderState>,
}

#[derive(Default)]
struct ProviderState {
    script: Mutex<ScriptedResponse>,
    /// The response to polls of the subscription. If it is `None`, the provider sends the regular response.
    subscription: Mutex<Option<ScriptedResponse>>,
    /// The write halves of the open connections.
    connections: Mutex<Vec<Arc<tokio::sync::Mutex<OwnedWriteHalf>>>>,
    /// The errors of the malformed requests.
    malformed_requests: Mutex<Vec<String>>,
    /// The number of responses that are being sent.
    responses_in_progress: AtomicUsize,
}

impl Provider {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(ProviderState::default());
        let server_state = Arc::clone(&state);
        Tasks::new().spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                Tasks::new().spawn(serve(stream, Arc::clone(&server_state)));
            }
        });
        Self { url, state }
    }

    /// Sets the response to all requests except valid ones and polls.
    pub fn set_script(&self, script: ScriptedResponse) {
        *self.state.script.lock().unwrap() = script;
    }

    /// Sets the response to polls of the subscription.
    pub fn set_subscription_script(&self, script: ScriptedResponse) {
        *self.state.subscription.lock().unwrap() = Some(script);
    }

    /// Sends bytes on all open connections.
    pub async fn send_to_all(&self, bytes: &[u8]) {
        let connections = self.state.connections.lock().unwrap().clone();
        for stream in connections {
            let _ = stream.lock().await.write_all(bytes).await;
        }
    }

    /// Returns whether all responses are sent, and the connections that their scripts close are closed.
    pub fn is_idle(&self) -> bool {
        self.state.responses_in_progress.load(Ordering::SeqCst) == 0
    }

    /// Returns and clears the errors of malformed requests.
    pub fn malformed_requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.state.malformed_requests.lock().unwrap())
    }
}

async fn serve(stream: TcpStream, state: Arc<ProviderState>) {
    stream.set_nodelay(true).unwrap();
    let (mut reader, writer) = stream.into_split();
    let writer = Arc::new(tokio::sync::Mutex::new(writer));
    state.connections.lock().unwrap().push(Arc::clone(&writer));
    serve_requests(&mut reader, &writer, &state).await;
    state.connections.lock().unwrap().retain(|connection| !Arc::ptr_eq(connection, &writer));
}

async fn serve_requests(
    reader: &mut (impl AsyncReadExt + Unpin + AsRef<TcpStream>),
    writer: &tokio::sync::Mutex<OwnedWriteHalf>,
    state: &ProviderState,
) {
    let early_response = Some(state.script.lock().unwrap().clone()).filter(|script| script.is_early);
    let mut is_answered = early_response.is_some();
    if let Some(early_response) = early_response
        && !send_scripted(reader, writer, &early_response, state).await
    {
        return;
    }
    let (mut parser, mut bytes) = (RequestParser::default(), vec![0; 64 * 1024]);
    let mut heads: Vec<RequestHead> = Vec::new();
    while let Ok(count @ 1..) = reader.read(&mut bytes).await {
        match parser.parse(&bytes[..count]) {
            Ok(new_heads) => heads.extend(new_heads),
            Err(error) => return state.malformed_requests.lock().unwrap().push(error),
        }
        for _ in 0..std::mem::take(&mut parser.complete_count) {
            let head = heads.remove(0);
            parser.record_response(false);
            if std::mem::take(&mut is_answered) {
                continue;
            }
            if !send_scripted(reader, writer, &choose_script(&head, state), state).await {
                return;
            }
        }
    }
}

/// Returns the response to a request.
fn choose_script(head: &RequestHead, state: &ProviderState) -> ScriptedResponse {
    let path = head.target.split('?').next().unwrap();
    let key = head.header_values("xi-api-key").next().unwrap_or_default();
    let account = String::from_utf8_lossy(key).chars().last().unwrap_or_default();
    let subscription = state.subscription.lock().unwrap().clone();
    let is_valid_request = head.target.contains(VALID_REQUEST_MARK);
    let (content_type, body) = match path {
        "/v1/user/subscription" if subscription.is_some() => return subscription.unwrap(),
        "/v1/user/subscription" => {
            let body = json!({"tier": "creator", "status": "active", "character_count": 0, "character_limit": 100_000});
            ("application/json", body.to_string())
        }
        "/v1/user" => ("application/json", json!({"workspace_id": format!("ws_{account}")}).to_string()),
        "/v1/models" => ("application/json", "[]".to_owned()),
        "/v1/voices" if is_valid_request => ("application/json", VOICES_BODY.to_owned()),
        _ if is_valid_request => ("audio/mpeg\r\ncharacter-cost: 5", SPEECH_BODY.to_owned()),
        _ => return state.script.lock().unwrap().clone(),
    };
    let text = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    ScriptedResponse { chunks: vec![text.into_bytes()], ..ScriptedResponse::default() }
}

/// Sends a response. Returns whether the connection stays open.
async fn send_scripted(
    reader: &impl AsRef<TcpStream>,
    writer: &tokio::sync::Mutex<OwnedWriteHalf>,
    script: &ScriptedResponse,
    state: &ProviderState,
) -> bool {
    state.responses_in_progress.fetch_add(1, Ordering::SeqCst);
    let is_kept_open = write_script(reader, writer, script).await;
    state.responses_in_progress.fetch_sub(1, Ordering::SeqCst);
    is_kept_open
}

/// Sends the chunks of a script, and ends the connection as the script requires. Returns whether it stays open.
async fn write_script(
    reader: &impl AsRef<TcpStream>,
    writer: &tokio::sync::Mutex<OwnedWriteHalf>,
    script: &ScriptedResponse,
) -> bool {
    let mut stream = writer.lock().await;
    for chunk in &script.chunks {
        // The proxy may close the connection before it has read the response.
        if stream.write_all(chunk).await.is_err() {
            return false;
        }
        tokio::task::yield_now().await;
    }
    match script.end {
        ConnectionEnd::KeepOpen => return true,
        ConnectionEnd::Close => {}
        ConnectionEnd::Reset => reader.as_ref().set_zero_linger().unwrap(),
        ConnectionEnd::Flood(bytes) => {
            let flood = bytes.repeat((32 * 1024 / bytes.len()).max(1));
            while stream.write_all(&flood).await.is_ok() {}
        }
    }
    let _ = stream.shutdown().await;
    false
}
