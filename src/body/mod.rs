//! Adapters around message bodies: [`replay`] holds what a client sends so that it can be sent
//! again, [`peek`] reads the start of an error body, [`inspect`] has a look at an answer that passes,
//! [`redacted`] takes keys out of what is relayed,
//! [`relay`] carries an answer on and settles when it ends. What any of them may buffer is in [`budget`].

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
