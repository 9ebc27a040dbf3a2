//! State that many requests change concurrently, each piece in as few atomic words as possible.

mod concurrency;
mod cooldown;
mod evidence;
mod last_reported;
mod probe;
mod quota;
mod spending;
mod state_change;

pub(super) use concurrency::ConcurrencyLimiter;
pub(super) use cooldown::CooldownCell;
pub(super) use evidence::EvidenceCell;
pub(super) use last_reported::LastReported;
pub(super) use probe::ProbeCell;
pub(super) use quota::{QuotaCell, ReportedDecrease, ReportedRemaining, SettledReservation};
pub(super) use spending::SpendingCell;
pub(super) use state_change::{NextChange, StateChangeCache};
