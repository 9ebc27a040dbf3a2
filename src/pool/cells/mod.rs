//! Defines the cells: the mutable state of the keys and workspaces in the pool. Requests read and change the cells
//! through atomics, so that selecting, charging and releasing a key takes no lock. Locks protect only the evidence of
//! refusals and the credits that are spent elsewhere.

mod concurrency;
mod cooldown;
mod evidence;
mod last_reported;
mod pause;
mod probe;
mod quota;
mod reported_remaining;
mod spending;
mod state_change;

pub(super) use concurrency::ConcurrencyLimiter;
pub use concurrency::RunningCount;
pub(super) use cooldown::CooldownCell;
pub(super) use evidence::EvidenceCell;
pub(super) use last_reported::LastReportedState;
pub(super) use pause::PauseCell;
pub(super) use probe::ProbeCell;
pub use quota::{CreditShare, CreditUse};
pub(super) use quota::{FinishedReservation, QuotaCell};
pub(super) use reported_remaining::{ReportedDecrease, ReportedRemaining};
pub(super) use spending::SpendingCell;
pub(super) use state_change::{EvaluationInputs, StateChangeCache};
