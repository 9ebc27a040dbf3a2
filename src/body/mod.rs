//! Adapters around message bodies: [`replay`] keeps a request body so that it can be sent again, [`peek`]
//! reads the start of an error response, [`inspect`] copies a response that is relayed, [`redacted`] removes
//! keys from responses, [`relay`] counts a response and reports once how it ended. [`budget`] bounds their
//! buffers.

pub mod budget;
pub mod decode;
pub mod inspect;
pub mod peek;
pub mod redacted;
pub mod relay;
pub mod replay;

mod disk_spill;
mod packed;
mod replay_buffer;

pub use packed::Withheld;
pub use replay_buffer::Loss;

#[cfg(test)]
mod tests;
