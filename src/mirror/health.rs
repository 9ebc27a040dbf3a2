//! The mirror's state, its counters and its lag, which the metrics and the status pages show.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::policy::units::UnixMs;

/// The state of the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Due rows are being sent.
    Working,
    /// Pushes fail; the mirror retries.
    Failing,
    /// Pushes fail until an operator fixes the setup.
    Paused,
}

/// Counters and state of the mirror. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct MirrorHealth(Arc<MirrorHealthCells>);

#[derive(Debug, Default)]
struct MirrorHealthCells {
    state: AtomicU8,
    refused: AtomicU64,
    sent: AtomicU64,
    failures: AtomicU64,
    /// Time at which the outbox was last empty, in milliseconds since 1970; 0 if it never was.
    caught_up_at: AtomicU64,
}

const STATES: [State; 3] = [State::Working, State::Failing, State::Paused];

impl MirrorHealth {
    /// The current state.
    #[must_use]
    pub fn state(&self) -> State {
        let index = usize::from(self.0.state.load(Ordering::Acquire));
        STATES.get(index).copied().unwrap_or(State::Working)
    }

    /// Rows that Supabase refused and that the mirror will retry.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Acquire)
    }

    /// Rows delivered since the start. A row that is sent twice counts twice.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.0.sent.load(Ordering::Acquire)
    }

    /// Pushes that failed since the start.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Acquire)
    }

    /// Maximum age of an unsent row at `now`: the time since the outbox was last empty. Zero before
    /// the first round.
    #[must_use]
    pub fn lag(&self, now: UnixMs) -> Duration {
        let at = self.0.caught_up_at.load(Ordering::Acquire);
        if at == 0 { Duration::ZERO } else { now.since(UnixMs(at)) }
    }

    pub(super) fn caught_up(&self, now: UnixMs) {
        self.0.caught_up_at.store(now.0, Ordering::Release);
    }

    pub(super) fn set_state(&self, state: State) {
        let index = STATES.iter().position(|candidate| *candidate == state).unwrap_or(0);
        self.0.state.store(u8::try_from(index).unwrap_or(0), Ordering::Release);
    }

    pub(super) fn set_refused(&self, rows: u64) {
        self.0.refused.store(rows, Ordering::Release);
    }

    pub(super) fn add_sent(&self, rows: usize) {
        self.0.sent.fetch_add(rows as u64, Ordering::AcqRel);
    }

    pub(super) fn add_failure(&self) {
        self.0.failures.fetch_add(1, Ordering::AcqRel);
    }
}
