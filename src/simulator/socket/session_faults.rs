//! Converts a fault into its effects on a session, which `connection` executes. Faults of the handshake have no effect
//! on the session.

use std::time::Duration;

use super::super::fault::{Fault, SessionFault};
use super::super::fault_response::scripted_refusal_values;
use super::super::provider::{PresentedKey, Provider};
use super::super::refusal::{RefusalKind, RefusalValues};

/// The effects of a fault on a session.
#[derive(Debug, Default)]
pub(super) struct SessionFaults {
    /// The delay before the first message.
    pub(super) initial_delay: Option<Duration>,
    /// The delay between two messages.
    pub(super) message_delay: Option<Duration>,
    /// Number of bytes to send before the connection is broken.
    pub(super) cut_after: Option<u64>,
    /// Number of bytes to receive from the client before the refusal, and the refusal.
    pub(super) refuse_after_bytes: Option<(u64, RefusalKind)>,
    /// Number of messages to send before the fault, and the fault.
    pub(super) after_messages: Option<(u64, SessionFault)>,
    /// The values that the text of a scripted refusal contains.
    pub(super) values: RefusalValues,
}

impl SessionFaults {
    /// Creates the effects of `fault`, which was taken from the script of `script_key`.
    pub(super) fn new(fault: Fault, provider: &Provider, script_key: PresentedKey) -> Self {
        let mut faults = Self { values: scripted_refusal_values(provider, script_key, 1), ..Self::default() };
        match fault {
            Fault::Refuse(kind) => faults.after_messages = Some((0, SessionFault::Refuse(kind))),
            Fault::ServerError => {
                faults.after_messages = Some((0, SessionFault::Refuse(RefusalKind::ServerError)));
            }
            Fault::After { messages, fault } => faults.after_messages = Some((messages, fault)),
            Fault::MidRefuse { bytes, refusal } => faults.refuse_after_bytes = Some((bytes, refusal)),
            Fault::Stall { ms } => faults.initial_delay = Some(Duration::from_millis(ms)),
            Fault::SlowBody { ms } => faults.message_delay = Some(Duration::from_millis(ms)),
            Fault::CutAfter { bytes } => faults.cut_after = Some(bytes),
            Fault::Pass
            | Fault::SlowHead { .. }
            | Fault::EarlyRefuse(_)
            | Fault::Gzip(_)
            | Fault::Encoded { .. }
            | Fault::Respond { .. }
            | Fault::HugeError
            | Fault::EndlessError
            | Fault::GarbledError
            | Fault::CloseBeforeHead
            | Fault::CloseUnread => {}
        }
        faults
    }
}
