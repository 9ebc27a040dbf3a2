//! Serves a WebSocket that echoes its messages. The provider does not have one. Tests use it to check that a proxy
//! forwards text, binary messages, pings and closes unchanged.

use tokio_tungstenite::tungstenite::Message;

use super::connection::{ClientMessage, SessionConnection, SessionEnded};

/// Echoes messages and the close frame until the client closes the session.
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
