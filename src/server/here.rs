//! What is known of one connection: whether it has asked yet, what is under way on it, and since when
//! it waits for a head.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::gauged::Gauge;
use crate::clock;
use crate::tasks::{Member, Tasks};

/// From one look at a connection to the next, at least.
const LOOK_MIN: Duration = Duration::from_millis(1);

/// One connection. Only its own task changes it, so nothing here is ever waited for.
#[derive(Debug)]
pub(super) struct Here {
    began: Instant,
    /// Milliseconds from the beginning to the moment since which a head is waited for.
    waits_since: AtomicU64,
    has_asked: AtomicBool,
    is_ending: AtomicBool,
    /// Counts a request that is expected at any moment as one that is under way.
    expected: Mutex<Option<Member>>,
    requests: Tasks,
}

/// No head is waited for.
const BUSY: u64 = u64::MAX;

/// What is known of a connection before it is served.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known {
    has_asked: bool,
    waits_since: Option<Instant>,
}

impl Here {
    /// A connection that is about to be opened and to ask. `requests` counts those under way.
    pub(super) fn new(requests: Tasks, known: Known) -> Arc<Self> {
        Arc::new(Self {
            began: known.waits_since.unwrap_or_else(clock::instant),
            waits_since: AtomicU64::new(if known.waits_since.is_some() { 0 } else { BUSY }),
            has_asked: AtomicBool::new(known.has_asked),
            is_ending: AtomicBool::new(false),
            expected: Mutex::new(Some(requests.member())),
            requests,
        })
    }

    /// What the next one who serves it should know.
    pub(super) fn known(&self) -> Known {
        Known { has_asked: self.has_asked(), waits_since: self.waits_since() }
    }

    /// From now on a head is waited for, if it was not before.
    pub(super) fn wait(&self) {
        if self.waits_since().is_none() {
            let since = u64::try_from(clock::since(self.began).as_millis()).unwrap_or(BUSY);
            self.waits_since.store(since, Ordering::Relaxed);
        }
    }

    fn waits_since(&self) -> Option<Instant> {
        match self.waits_since.load(Ordering::Relaxed) {
            BUSY => None,
            since => Some(self.began + Duration::from_millis(since)),
        }
    }

    /// A head is about to come.
    pub(super) fn expect(&self) {
        *self.expected() = Some(self.requests.member());
    }

    /// The end does not wait for a head any more.
    pub(super) fn expect_nothing(&self) {
        *self.expected() = None;
    }

    fn expected(&self) -> MutexGuard<'_, Option<Member>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Relaxed)
    }

    /// A head has come.
    pub(super) fn asks(self: &Arc<Self>) -> UnderWay {
        self.waits_since.store(BUSY, Ordering::Relaxed);
        let is_first = !self.has_asked.swap(true, Ordering::Relaxed);
        let member = self.expected().take().unwrap_or_else(|| self.requests.member());
        UnderWay { here: Arc::clone(self), is_first, _member: member }
    }

    /// The program ends.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Ends when a head has been waited for that long. The timer is set once in that span, and not
    /// with each request.
    pub(super) async fn waited(&self, max: Duration) {
        loop {
            let due = self.waits_since().unwrap_or_else(clock::instant) + max;
            if due <= clock::instant() {
                return;
            }
            sleep_until(due.into()).await;
        }
    }

    /// Ends when a head has been waited for and the client has taken all of its last answer; at the end
    /// of the program never. It is looked at after `first`, and then at pauses that grow to `longest`;
    /// a head that has been waited for since the last look, at least, is enough.
    pub(super) async fn quiet(&self, first: Duration, longest: Duration, gauge: &Gauge) {
        let longest = longest.max(LOOK_MIN);
        let mut pause = first.clamp(LOOK_MIN, longest);
        let mut due = clock::instant() + pause;
        loop {
            sleep_until(due.into()).await;
            let now = clock::instant();
            let since = self.waits_since().filter(|_| self.may_rest(gauge));
            if since.is_some_and(|since| since + pause <= now) {
                return;
            }
            pause = (pause * 2).min(longest);
            due = since.unwrap_or(now) + pause;
        }
    }
}

impl Here {
    /// The first head is left where it is: HTTP has not found yet that it stands between two messages.
    fn may_rest(&self, gauge: &Gauge) -> bool {
        let has_begun = self.has_asked() || gauge.bytes() == 0;
        has_begun && !gauge.is_stuck() && !self.is_ending()
    }
}

/// A request that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct UnderWay {
    here: Arc<Here>,
    is_first: bool,
    _member: Member,
}

impl UnderWay {
    /// Whether it is the first of its connection.
    pub(super) fn is_first(&self) -> bool {
        self.is_first
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.here.wait();
    }
}
