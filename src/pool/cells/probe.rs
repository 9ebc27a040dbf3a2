//! When a key, a workspace or a concurrency group that rests for what is not proven may be tried by one
//! request, and by one only.

use std::time::Duration;

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::select::SHORT_WAIT;
use crate::policy::units::UnixMs;

/// When a try is allowed.
#[derive(Debug, Default)]
pub(in crate::pool) struct ProbeCell {
    /// The moment of the next try; 0: none is allowed.
    next: AtomicU64,
    /// Until when the answer to the last one is waited for; 0: it has come.
    answer_by: AtomicU64,
}

/// A try that was not answered is followed by another after this multiple of the first pause.
const LATER: u32 = 5;

impl ProbeCell {
    /// Allows a try `after` that span, unless one is to come already; with `None`, forbids it.
    pub(in crate::pool) fn allow(&self, after: Option<Duration>, now: UnixMs) {
        self.answer_by.store(0, Ordering::Release);
        let Some(after) = after else { return self.next.store(0, Ordering::Release) };
        let next = |at: u64| (at <= now.0).then(|| now.plus(after).0.max(1));
        let _ = self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// When it is worth looking again at `now`: the next try is allowed, or the answer to one will be overdue.
    /// `None` when no try is allowed.
    pub(in crate::pool) fn look_again_at(&self, now: UnixMs) -> Option<UnixMs> {
        let answer_by = UnixMs(self.answer_by.load(Ordering::Acquire));
        self.at().map(|at| if answer_by > now { at.min(answer_by) } else { at })
    }

    /// When the next try is allowed.
    pub(in crate::pool) fn at(&self) -> Option<UnixMs> {
        Some(self.next.load(Ordering::Acquire)).filter(|at| *at > 0).map(UnixMs)
    }

    pub(in crate::pool) fn is_due(&self, now: UnixMs) -> bool {
        self.at().is_some_and(|at| at <= now)
    }

    /// Takes the try that is due. `false` when none is, or another request was faster.
    pub(in crate::pool) fn claim(&self, pause: Duration, now: UnixMs) -> bool {
        let next = now.plus(pause * LATER).0;
        let is_due = |at: u64| (at > 0 && at <= now.0).then_some(next);
        let is_taken = self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, is_due).is_ok();
        if is_taken {
            self.answer_by.store(now.plus(SHORT_WAIT).0, Ordering::Release);
        }
        is_taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_try_is_taken_once_and_allowed_again_later() {
        let (cell, pause) = (ProbeCell::default(), Duration::from_millis(100));
        assert!(!cell.claim(pause, UnixMs(1_000)));
        cell.allow(Some(pause), UnixMs(900));
        cell.allow(Some(pause), UnixMs(950));
        assert!(!cell.is_due(UnixMs(999)) && cell.is_due(UnixMs(1_000)));
        assert_eq!(cell.look_again_at(UnixMs(999)), Some(UnixMs(1_000)));
        let long = Duration::from_secs(60);
        assert!(cell.claim(long, UnixMs(1_000)) && !cell.claim(pause, UnixMs(1_499)));
        let overdue = UnixMs(1_000).plus(SHORT_WAIT);
        assert_eq!(cell.look_again_at(UnixMs(1_000)), Some(overdue));
        // It is not answered: the next try is waited for.
        assert_eq!(cell.look_again_at(overdue), Some(UnixMs(1_000).plus(long * LATER)));
        // It is answered.
        cell.allow(Some(pause), UnixMs(1_400));
        assert_eq!(cell.look_again_at(UnixMs(1_500)), Some(UnixMs(301_000)));
        let cell = ProbeCell::default();
        cell.allow(Some(pause), UnixMs(900));
        assert!(cell.claim(pause, UnixMs(1_000)));
        // A refusal of the try does not bring the next one forward.
        cell.allow(Some(pause), UnixMs(1_001));
        assert!(!cell.is_due(UnixMs(1_499)) && cell.claim(pause, UnixMs(1_500)));
        cell.allow(None, UnixMs(1_500));
        assert_eq!(cell.at(), None);
    }
}
