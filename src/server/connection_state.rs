//! What is known of one connection: whether it has asked yet, what is under way on it, and since when
//! it waits for a head.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::Limits;
use super::counting_io::IoCounters;
use crate::clock;
use crate::tasks::{Member, Tasks};

/// From one look at a connection to the next, at least.
const LOOK_MIN: Duration = Duration::from_millis(1);

/// One connection. Only its own task changes it, so nothing here is ever waited for.
#[derive(Debug)]
pub(super) struct ConnectionState {
    began: Instant,
    /// Milliseconds from the beginning to the moment since which a head is waited for.
    waits_since: AtomicU64,
    /// Bytes that had been read at that moment: more means that the head has begun.
    read_before: AtomicU64,
    has_head_begun: AtomicBool,
    has_asked: AtomicBool,
    is_ending: AtomicBool,
    /// Whether the last request had a body, of which more may come after its answer.
    may_send: AtomicBool,
    /// Whether an answer whose end is the end of the connection was not finished.
    is_truncated: AtomicBool,
    gauge: IoCounters,
    /// Counts a request that is expected at any moment as one that is under way.
    expected: Mutex<Option<Member>>,
    requests: Tasks,
}

/// No head is waited for.
const BUSY: u64 = u64::MAX;

/// What is known of a connection before it is served.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ConnectionHistory {
    has_asked: bool,
    has_head_begun: bool,
    waits_since: Option<Instant>,
}

impl ConnectionState {
    /// A connection that is about to be opened and to ask. `requests` counts those under way.
    pub(super) fn new(requests: Tasks, known: ConnectionHistory) -> Arc<Self> {
        Arc::new(Self {
            began: known.waits_since.unwrap_or_else(clock::instant),
            waits_since: AtomicU64::new(if known.waits_since.is_some() { 0 } else { BUSY }),
            read_before: AtomicU64::new(0),
            has_head_begun: AtomicBool::new(known.has_head_begun),
            has_asked: AtomicBool::new(known.has_asked),
            is_ending: AtomicBool::new(false),
            may_send: AtomicBool::new(false),
            is_truncated: AtomicBool::new(false),
            gauge: IoCounters::default(),
            expected: Mutex::new(Some(requests.member())),
            requests,
        })
    }

    /// What the next one who serves it should know.
    pub(super) fn known(&self) -> ConnectionHistory {
        ConnectionHistory {
            has_asked: self.has_asked(),
            has_head_begun: self.has_head_begun.load(Ordering::Relaxed),
            waits_since: self.waits_since(),
        }
    }

    /// What its stream moves.
    pub(super) fn gauge(&self) -> &IoCounters {
        &self.gauge
    }

    /// From now on a head is waited for, if it was not before.
    pub(super) fn wait(&self) {
        if self.waits_since().is_none() {
            self.read_before.store(self.gauge.bytes(), Ordering::Relaxed);
            self.has_head_begun.store(false, Ordering::Relaxed);
            self.set_waits_since();
        }
    }

    /// The first byte of a head has come, after a wait in which there was none.
    pub(super) fn begin_head(&self) {
        self.has_head_begun.store(true, Ordering::Relaxed);
        self.set_waits_since();
    }

    /// A head was begun before the wait that goes on.
    pub(super) fn has_begun_head(&self) {
        self.has_head_begun.store(true, Ordering::Relaxed);
    }

    fn set_waits_since(&self) {
        let since = u64::try_from(clock::since(self.began).as_millis()).unwrap_or(BUSY);
        self.waits_since.store(since, Ordering::Relaxed);
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

    /// A head has come, of a request with a body or without.
    pub(super) fn asks(self: &Arc<Self>, has_body: bool) -> UnderWay {
        self.waits_since.store(BUSY, Ordering::Relaxed);
        self.has_asked.store(true, Ordering::Relaxed);
        self.may_send.store(has_body, Ordering::Relaxed);
        let member = self.expected().take().unwrap_or_else(|| self.requests.member());
        UnderWay { here: Arc::clone(self), _member: member }
    }

    /// Whether the client may still be sending the body of its last request.
    pub(super) fn may_send(&self) -> bool {
        self.may_send.load(Ordering::Relaxed)
    }

    /// An answer that ends with the connection is not whole.
    pub(super) fn truncate(&self) {
        self.is_truncated.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_truncated(&self) -> bool {
        self.is_truncated.load(Ordering::Relaxed)
    }

    /// The program ends.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Ends when a head has been waited for too long. The timer is set once in that span, and not with
    /// each request.
    pub(super) async fn waited(&self, limits: &Limits) {
        loop {
            let due = self.waits_since().unwrap_or_else(clock::instant) + self.wait_max(limits);
            if due <= clock::instant() {
                return;
            }
            sleep_until(due.into()).await;
        }
    }

    /// How long the head may be waited for: a client that has begun one, or has just connected, for
    /// less than one that keeps its connection for later.
    fn wait_max(&self, limits: &Limits) -> Duration {
        let has_begun = self.has_head_begun.load(Ordering::Relaxed)
            || self.gauge.bytes() != self.read_before.load(Ordering::Relaxed);
        if self.has_asked() && !has_begun { limits.keepalive_timeout } else { limits.head_read_max }
    }

    /// Ends when a head has been waited for and the client has taken all of its last answer; at the end
    /// of the program never. It is looked at after `first`, and then at pauses that grow to `longest`;
    /// a head that has been waited for since the last look, at least, is enough.
    pub(super) async fn quiet(&self, first: Duration, longest: Duration) {
        let longest = longest.max(LOOK_MIN);
        let mut pause = first.clamp(LOOK_MIN, longest);
        let mut due = clock::instant() + pause;
        loop {
            sleep_until(due.into()).await;
            let now = clock::instant();
            let since = self.waits_since().filter(|_| self.may_rest());
            if since.is_some_and(|since| since + pause <= now) {
                return;
            }
            pause = (pause * 2).min(longest);
            due = since.unwrap_or(now) + pause;
        }
    }
}

impl ConnectionState {
    /// The first head is left where it is: HTTP has not found yet that it stands between two messages.
    fn may_rest(&self) -> bool {
        let has_begun = self.has_asked() || self.gauge.bytes() == 0;
        has_begun && !self.gauge.is_stuck() && !self.is_ending()
    }
}

/// A request that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct UnderWay {
    here: Arc<ConnectionState>,
    _member: Member,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.here.gauge.phase().rest();
        self.here.wait();
    }
}
