//! Contains the adapters around message bodies. [`replay`] sends a request body again for a retry. The other adapters
//! are for responses: [`peek`] reads a response before it is relayed, [`inspect`] copies a response while it is
//! relayed, and [`redacted_body`] replaces keys. [`relay`] counts the relayed bytes and reports how the relay of a
//! response ended. [`budget`] limits the memory and the disk space of their buffers, and [`decode`] decompresses
//! complete bodies. The private modules belong to [`replay`] and [`redacted_body`]. The `proxy` module combines the
//! adapters.

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

/// Returns the size hint of a body that consists of `buffered_bytes` and of a rest with the hint `rest`.
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
