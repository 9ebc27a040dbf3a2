//! Stores an operator's pause of a key. Selection reads one atomic word; the reason is only for documents and logs.

use std::sync::Arc;

use arc_swap::ArcSwapOption;

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::key_state::Pause;
use crate::policy::units::UnixMs;

/// The pause and its end.
#[derive(Debug)]
pub(in crate::pool) struct PauseCell {
    /// The end of the pause in Unix milliseconds; 0 without a pause, and [`NO_END`].
    until: AtomicU64,
    details: ArcSwapOption<Pause>,
}

/// The end of a pause that only an operator ends.
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

    /// Returns the end of the pause if it has not ended at `now`; `Some(None)` if only an operator ends it.
    pub(in crate::pool) fn active_until(&self, now: UnixMs) -> Option<Option<UnixMs>> {
        match self.until.load(Ordering::Acquire) {
            NO_END => Some(None),
            until => (now.0 < until).then_some(Some(UnixMs(until))),
        }
    }

    /// Returns the pause, unless it has ended at `now`.
    pub(in crate::pool) fn load(&self, now: UnixMs) -> Option<Arc<Pause>> {
        self.details.load_full().filter(|pause| pause.is_active(now))
    }
}

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
    fn check(stored: Option<Pause>, expected_end: Option<Option<u64>>) {
        let cell = PauseCell::new(None);
        assert_eq!(cell.store(stored.clone()), stored.is_some());
        assert!(!cell.store(stored.clone()), "an equal pause must not count as a change");
        assert_eq!(cell.active_until(NOW), expected_end.map(|end| end.map(UnixMs)));
        assert_eq!(cell.load(NOW).as_deref(), stored.as_ref().filter(|_| expected_end.is_some()));
        assert_eq!(PauseCell::new(stored).active_until(NOW), cell.active_until(NOW));
    }

    #[test]
    fn a_pause_ends_at_its_time() {
        check(None, None);
        check(pause(None), Some(None));
        check(pause(Some(1_001)), Some(Some(1_001)));
        check(pause(Some(1_000)), None);
        check(pause(Some(0)), None);
    }
}
