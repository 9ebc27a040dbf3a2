//! Adapters around message bodies: [`replay`] holds what a client sends so that it can be sent
//! again, [`peek`] reads the start of an error body, [`tap`] has a look at an answer that passes,
//! [`redacted`] takes keys out of what is relayed,
//! [`relay`] carries an answer on and settles when it ends.

pub mod decode;
pub mod peek;
pub mod redacted;
pub mod relay;
pub mod replay;
pub mod room;
pub mod tap;

mod held;
mod packed;
mod spool;

pub use held::Loss;
pub use packed::KeyInside;
