//! Stores an operator's pause of a key. Selection reads only the end of the pause, from one atomic word. Documents and
//! logs also read the start and the reason.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::key_state::Pause;
use crate::policy::units::UnixMs;

/// The pause of a key, if there is one, with its end in a separate word.
#[derive(Debug)]
pub(in crate::pool) struct PauseCell {
    /// The end of the pause in Unix milliseconds, 0 without a pause, or [`NO_END`].
    until: AtomicU64,
    details: ArcSwapOption<Pause>,
}

/// A pause that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pool) struct ActivePause {
    /// The end of the pause, or `None` if only an operator ends it.
    pub(in crate::pool) until: Option<UnixMs>,
}

/// The stored end of a pause that only an operator ends.
const NO_END: u64 = u64::MAX;

impl PauseCell {
    pub(in crate::pool) fn new(pause: Option<Pause>) -> Self {
        Self { until: AtomicU64::new(end_word(pause.as_ref())), details: pause.map(Arc::new).into() }
    }

    /// Replaces the pause. Returns whether it has changed.
    pub(in crate::pool) fn store(&self, pause: Option<Pause>) -> bool {
        if self.details.load().as_deref() == pause.as_ref() {
            return false;
        }
        let until = end_word(pause.as_ref());
        self.details.store(pause.map(Arc::new));
        self.until.store(until, Ordering::Release);
        true
    }

    /// Returns the end of the pause, unless it has ended at `now`.
    pub(in crate::pool) fn active_pause(&self, now: UnixMs) -> Option<ActivePause> {
        match self.until.load(Ordering::Acquire) {
            NO_END => Some(ActivePause { until: None }),
            until => (now.0 < until).then_some(ActivePause { until: Some(UnixMs(until)) }),
        }
    }

    /// Returns the pause, unless it has ended at `now`.
    pub(in crate::pool) fn load(&self, now: UnixMs) -> Option<Arc<Pause>> {
        self.details.load_full().filter(|pause| pause.is_active(now))
    }
}

/// Returns the stored end of a pause.
fn end_word(pause: Option<&Pause>) -> u64 {
    pause.map_or(0, |pause| pause.until.map_or(NO_END, |until| until.0.min(NO_END - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = UnixMs(1_000);

    fn pause(until: Option<u64>) -> Option<Pause> {
        Some(Pause { since: UnixMs(0), until: until.map(UnixMs), reason: None })
    }

    #[track_caller]
    fn check_pause(stored: Option<Pause>, expected: Option<ActivePause>) {
        let cell = PauseCell::new(None);
        assert_eq!(cell.store(stored.clone()), stored.is_some());
        assert!(!cell.store(stored.clone()), "an equal pause must not count as a change");
        assert_eq!(cell.active_pause(NOW), expected);
        assert_eq!(cell.load(NOW).as_deref(), stored.as_ref().filter(|_| expected.is_some()));
        assert_eq!(PauseCell::new(stored).active_pause(NOW), expected);
    }

    #[test]
    fn a_pause_ends_at_its_time() {
        check_pause(None, None);
        check_pause(pause(None), Some(ActivePause { until: None }));
        check_pause(pause(Some(1_001)), Some(ActivePause { until: Some(UnixMs(1_001)) }));
        check_pause(pause(Some(1_000)), None);
        check_pause(pause(Some(0)), None);
    }
}
