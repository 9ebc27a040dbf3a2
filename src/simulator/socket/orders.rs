//! What a fault means in a session, apart from the connection that carries it out: what it means
//! for the handshake has been done by then.

use std::time::Duration;

use super::super::fault::{Fault, Turn};
use super::super::service::facts_as_told;
use super::super::shape::{Facts, Shape};
use super::super::world::{Presented, World};

/// What the session was told to do wrong.
#[derive(Debug, Default)]
pub(super) struct Orders {
    /// How long to say nothing before the first word.
    pub(super) stall: Option<Duration>,
    /// How long to wait between two messages.
    pub(super) pause: Option<Duration>,
    /// Bytes that are sent before the break.
    pub(super) cut_after: Option<u64>,
    /// Bytes of the client after which it is refused.
    pub(super) refuse_after_bytes: Option<(u64, Shape)>,
    /// Messages that are sent before the session takes that turn.
    pub(super) turn: Option<(u64, Turn)>,
    /// What a refusal tells.
    pub(super) facts: Facts,
}

impl Orders {
    /// The orders of a fault in the script of `whose`.
    pub(super) fn of(fault: Fault, world: &World, whose: Presented) -> Self {
        let mut orders = Self { facts: facts_as_told(world, whose, 1), ..Self::default() };
        match fault {
            Fault::Refuse(shape) => orders.turn = Some((0, Turn::Refuse(shape))),
            Fault::ServerError => orders.turn = Some((0, Turn::Refuse(Shape::ServerError))),
            Fault::After { messages, turn } => orders.turn = Some((messages, turn)),
            Fault::MidRefuse { bytes, shape } => orders.refuse_after_bytes = Some((bytes, shape)),
            Fault::Stall { ms } => orders.stall = Some(Duration::from_millis(ms)),
            Fault::SlowBody { ms } => orders.pause = Some(Duration::from_millis(ms)),
            Fault::CutAfter { bytes } => orders.cut_after = Some(bytes),
            Fault::Pass
            | Fault::SlowHead { .. }
            | Fault::EarlyRefuse(_)
            | Fault::Gzip(_)
            | Fault::Encoded { .. }
            | Fault::Answer { .. }
            | Fault::HugeError
            | Fault::EndlessError
            | Fault::GarbledError
            | Fault::CloseBeforeHead
            | Fault::CloseUnread => {}
        }
        orders
    }
}
