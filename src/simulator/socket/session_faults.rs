//! Translates a fault into its effects on a session, which `wire` executes. The effects on the
//! handshake are handled earlier.

use std::time::Duration;

use super::super::fault::{Fault, Turn};
use super::super::service::facts_of_fault;
use super::super::shape::{Facts, Shape};
use super::super::world::{Presented, World};

/// The effects of a fault on a session.
#[derive(Debug, Default)]
pub(super) struct SessionFaults {
    /// Delay before the first message.
    pub(super) stall: Option<Duration>,
    /// Delay between two messages.
    pub(super) pause: Option<Duration>,
    /// Bytes to send before the break.
    pub(super) cut_after: Option<u64>,
    /// Bytes received from the client before the refusal.
    pub(super) refuse_after_bytes: Option<(u64, Shape)>,
    /// Messages to send before the turn, and the turn.
    pub(super) turn: Option<(u64, Turn)>,
    /// The values in the text of a refusal.
    pub(super) facts: Facts,
}

impl SessionFaults {
    /// The effects of `fault`, which was taken from the script of `script_key`.
    pub(super) fn of(fault: Fault, world: &World, script_key: Presented) -> Self {
        let mut faults = Self { facts: facts_of_fault(world, script_key, 1), ..Self::default() };
        match fault {
            Fault::Refuse(shape) => faults.turn = Some((0, Turn::Refuse(shape))),
            Fault::ServerError => faults.turn = Some((0, Turn::Refuse(Shape::ServerError))),
            Fault::After { messages, turn } => faults.turn = Some((messages, turn)),
            Fault::MidRefuse { bytes, shape } => faults.refuse_after_bytes = Some((bytes, shape)),
            Fault::Stall { ms } => faults.stall = Some(Duration::from_millis(ms)),
            Fault::SlowBody { ms } => faults.pause = Some(Duration::from_millis(ms)),
            Fault::CutAfter { bytes } => faults.cut_after = Some(bytes),
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
        faults
    }
}
