//! When a key, a workspace or a concurrency group that rests for what is not proven may be tried by one
//! request, and by one only.

use std::time::Duration;

use super::super::sync::{AtomicU64, Ordering};
use crate::policy::units::UnixMs;

/// The moment of the next try; 0: none is allowed.
#[derive(Debug, Default)]
pub(in crate::pool) struct ProbeCell(AtomicU64);

/// A try that was not answered is followed by another after this multiple of the first pause.
const LATER: u32 = 5;

impl ProbeCell {
    /// Allows a try `after` that span, unless one is to come already; with `None`, forbids it.
    pub(in crate::pool) fn allow(&self, after: Option<Duration>, now: UnixMs) {
        let Some(after) = after else { return self.0.store(0, Ordering::Release) };
        let next = |at: u64| (at <= now.0).then(|| now.plus(after).0.max(1));
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }

    /// When the next try is allowed.
    pub(in crate::pool) fn at(&self) -> Option<UnixMs> {
        Some(self.0.load(Ordering::Acquire)).filter(|at| *at > 0).map(UnixMs)
    }

    pub(in crate::pool) fn is_due(&self, now: UnixMs) -> bool {
        self.at().is_some_and(|at| at <= now)
    }

    /// Takes the try that is due. `false` when none is, or another request was faster.
    pub(in crate::pool) fn claim(&self, pause: Duration, now: UnixMs) -> bool {
        let next = now.plus(pause * LATER).0;
        let is_due = |at: u64| (at > 0 && at <= now.0).then_some(next);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, is_due).is_ok()
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
        assert!(cell.claim(pause, UnixMs(1_000)) && !cell.claim(pause, UnixMs(1_499)));
        // A refusal of the try does not bring the next one forward.
        cell.allow(Some(pause), UnixMs(1_001));
        assert!(!cell.is_due(UnixMs(1_499)) && cell.claim(pause, UnixMs(1_500)));
        cell.allow(None, UnixMs(1_500));
        assert_eq!(cell.at(), None);
    }
}
