//! Keeps the state, the counters and the lag of the mirror. The task of the mirror updates them, and the metrics,
//! status pages and admin API read them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use crate::policy::units::UnixMs;

/// The state of the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorState {
    /// The last push succeeded, or no push has ended yet.
    Working,
    /// The last push failed temporarily, and the mirror retries it.
    Failing,
    /// The last push failed because of the setup, which an operator must fix. The mirror retries it after a longer
    /// time.
    Paused,
}

/// A handle to the state and the counters of the mirror. All clones share them.
#[derive(Clone, Debug, Default)]
pub struct MirrorHealth(Arc<MirrorHealthCells>);

#[derive(Debug, Default)]
struct MirrorHealthCells {
    state: AtomicU8,
    refused: AtomicU64,
    sent: AtomicU64,
    failures: AtomicU64,
    /// The Unix time in milliseconds at which the outbox last had no rows except refused ones, or at which the mirror
    /// was created. It is 0 before that.
    empty_at: AtomicU64,
}

/// The states in the order of their stored numbers.
const STATES: [MirrorState; 3] = [MirrorState::Working, MirrorState::Failing, MirrorState::Paused];

impl MirrorHealth {
    /// Returns the current state.
    #[must_use]
    pub fn state(&self) -> MirrorState {
        let index = usize::from(self.0.state.load(Ordering::Acquire));
        STATES.get(index).copied().unwrap_or(MirrorState::Working)
    }

    /// Returns the number of rows in the outbox that Supabase refused. The mirror will retry them.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Acquire)
    }

    /// Returns the number of rows delivered since Keychoir started. A row that is sent twice counts
    /// twice.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.0.sent.load(Ordering::Acquire)
    }

    /// Returns the number of failed pushes since Keychoir started.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.0.failures.load(Ordering::Acquire)
    }

    /// Returns an upper bound of the age of an unsent row at `now`, without refused rows: the time since the outbox
    /// last had no other rows, or since the mirror was created. Returns zero before that.
    #[must_use]
    pub fn lag(&self, now: UnixMs) -> Duration {
        let empty_at = self.0.empty_at.load(Ordering::Acquire);
        if empty_at == 0 { Duration::ZERO } else { now.since(UnixMs(empty_at)) }
    }

    pub(super) fn record_empty_outbox(&self, now: UnixMs) {
        self.0.empty_at.store(now.0, Ordering::Release);
    }

    pub(super) fn set_state(&self, state: MirrorState) {
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
