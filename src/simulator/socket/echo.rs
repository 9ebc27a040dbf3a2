//! A WebSocket that echoes its messages. The provider has no such WebSocket; tests use it to check
//! that a proxy forwards text, binary messages, pings and closes unchanged.

use tokio_tungstenite::tungstenite::Message;

use super::wire::{ClientMessage, SessionEnded, Wire};

/// Echoes messages and the close frame until the client closes the session.
pub(super) async fn serve(wire: &mut Wire) -> SessionEnded {
    if let Err(ended) = wire.begin().await {
        return ended;
    }
    loop {
        let echoed = match wire.next(None).await {
            Ok(Some(ClientMessage::Text(text))) => wire.send(text).await,
            Ok(Some(ClientMessage::Binary(bytes))) => match wire.pause().await {
                Ok(()) => wire.send_now(Message::Binary(bytes)).await,
                Err(ended) => Err(ended),
            },
            Ok(None) => Ok(()),
            Err(ended) => Err(ended),
        };
        if let Err(ended) = echoed {
            return ended;
        }
    }
}
