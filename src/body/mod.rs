//! Contains the adapters around message bodies: [`replay`] buffers a request body for retries, [`peek`] reads
//! a response before it is relayed, [`inspect`] copies a response while it is relayed, [`redacted_body`]
//! removes keys from responses, and [`relay`] reports how a relay ended. [`budget`] limits their buffers.

pub mod budget;
pub mod decode;
pub mod inspect;
pub mod peek;
pub mod redacted_body;
pub mod relay;
pub mod replay;

mod compressed_search;
mod disk_spill;
mod replay_buffer;

pub use compressed_search::WithholdReason;
pub use replay_buffer::ReplayLoss;

use http_body::SizeHint;

/// Returns the size hint of a body that returns `buffered_bytes` and then a body with the hint `rest`.
fn add_to_hint(rest: &SizeHint, buffered_bytes: u64) -> SizeHint {
    let mut hint = SizeHint::new();
    hint.set_lower(rest.lower() + buffered_bytes);
    if let Some(upper) = rest.upper() {
        hint.set_upper(upper + buffered_bytes);
    }
    hint
}

#[cfg(test)]
mod tests;
