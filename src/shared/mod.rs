//! Shares the state of the pool between replicas through Redis.

mod envelope;
mod overlay;

pub use envelope::{OpenEnvelopeError, SealEnvelopeError, SecretDocument};
pub use overlay::{OverlayExchange, OverlayPort, OverlayVersion, SealedOverlay};
