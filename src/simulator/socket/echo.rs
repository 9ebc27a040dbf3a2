//! A WebSocket that echoes its messages: not one of the provider's, but tests need it to check that
//! a proxy forwards text, binary, pings and closes unchanged.

use tokio_tungstenite::tungstenite::Message;

use super::wire::{Heard, Over, Wire};

/// Echoes until the client closes, and echoes the close, too.
pub(super) async fn serve(wire: &mut Wire) -> Over {
    if let Err(over) = wire.opening().await {
        return over;
    }
    loop {
        let echoed = match wire.next(None).await {
            Ok(Some(Heard::Text(text))) => wire.send(text).await,
            Ok(Some(Heard::Binary(bytes))) => match wire.pause().await {
                Ok(()) => wire.send_now(Message::Binary(bytes)).await,
                Err(over) => Err(over),
            },
            Ok(None) => Ok(()),
            Err(over) => Err(over),
        };
        if let Err(over) = echoed {
            return over;
        }
    }
}
