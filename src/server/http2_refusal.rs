//! Refuses clients that use HTTP/2 with prior knowledge: sends a SETTINGS frame and a GOAWAY frame with the error code
//! HTTP_1_1_REQUIRED, and closes the sending half. Without these frames, such a client would not know that it must use
//! HTTP/1.1.

use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tracing::debug;

/// Maximum time for sending the refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);

/// An empty SETTINGS frame, which an HTTP/2 server must send first (RFC 9113, section 3.4), and a GOAWAY
/// frame with the error code HTTP_1_1_REQUIRED (0xd).
const REFUSAL_FRAMES: [u8; 26] = [
    0, 0, 0, 4, 0, 0, 0, 0, 0, // SETTINGS of length 0 on stream 0
    0, 0, 8, 7, 0, 0, 0, 0, 0, // GOAWAY of length 8 on stream 0
    0, 0, 0, 0, 0, 0, 0, 0xd, // no stream was processed, HTTP_1_1_REQUIRED
];

/// Sends [`REFUSAL_FRAMES`] and closes the sending half.
pub(super) async fn refuse_http2<I: AsyncWrite + Unpin>(stream: &mut I) {
    let send_refusal = async {
        stream.write_all(&REFUSAL_FRAMES).await?;
        stream.shutdown().await
    };
    if let Ok(Err(error)) = timeout(REFUSAL_TIMEOUT, send_refusal).await {
        debug!("an HTTP/2 client disconnected: {error}");
    }
}
