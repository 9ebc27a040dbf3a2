//! A WebSocket that echoes its messages: not one of the provider's, but tests need it to check that
//! a proxy forwards text, binary, pings and closes unchanged.

use tokio_tungstenite::tungstenite::Message;

use super::wire::{ClientMessage, SessionEnded, Wire};

/// Echoes until the client closes, and echoes the close, too.
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
