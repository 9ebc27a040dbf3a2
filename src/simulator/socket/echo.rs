//! A socket that says back what it hears: not the provider's, but what a test needs to see that a
//! proxy passes on text, binary, pings and closes as they came.

use tokio_tungstenite::tungstenite::Message;

use super::wire::{Heard, Over, Wire};

/// Echoes until the client closes, whose close is echoed, too.
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
