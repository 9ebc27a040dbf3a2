//! Serves a WebSocket that echoes its messages, which the provider does not have. Tests use it to check that a proxy
//! forwards text messages, binary messages, pings and close frames unchanged.

use tokio_tungstenite::tungstenite::Message;

use super::connection::{ClientMessage, SessionConnection, SessionEnded};

/// Echoes messages until the client closes the session. The connection replies to pings and to the close frame.
pub(super) async fn serve(connection: &mut SessionConnection) -> Result<(), SessionEnded> {
    connection.start().await?;
    loop {
        let echo = match connection.receive(None).await? {
            Some(ClientMessage::Text(text)) => Message::text(text),
            Some(ClientMessage::Binary(bytes)) => Message::Binary(bytes),
            None => continue,
        };
        connection.send(echo).await?;
    }
}
