//! State that many requests change at once, each piece in as few atomic words as it needs.

mod announced;
mod evidence;
mod park;
mod probe;
mod quiet;
mod quota;
mod room;
mod spending;

pub(super) use announced::Announced;
pub(super) use evidence::EvidenceCell;
pub(super) use park::ParkCell;
pub(super) use probe::ProbeCell;
pub(super) use quiet::{Outlook, QuietCell};
pub(super) use quota::{Paid, QuotaCell, ReportedRemaining, Taken};
pub(super) use room::RoomCell;
pub(super) use spending::SpendingCell;
