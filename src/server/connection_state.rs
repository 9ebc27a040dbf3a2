//! The state of one connection: whether a request has come yet, whether one is under way, and since when the
//! connection waits for a request head.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::Limits;
use super::counting_io::IoCounters;
use crate::clock;
use crate::tasks::{Member, Tasks};

/// Minimum interval between two checks whether a connection is idle.
const LOOK_MIN: Duration = Duration::from_millis(1);

/// The state of one connection. Only the connection's own task changes it, so there is no contention.
#[derive(Debug)]
pub(super) struct ConnectionState {
    began: Instant,
    /// Milliseconds from `began` to the moment since which a head is awaited.
    waits_since: AtomicU64,
    /// Bytes read at that moment: a higher count means that the head has begun.
    read_before: AtomicU64,
    has_head_begun: AtomicBool,
    has_asked: AtomicBool,
    is_ending: AtomicBool,
    /// Whether the last request had a body, of which more may come after its response.
    may_send: AtomicBool,
    /// Whether a response that is ended by the end of the connection was left incomplete.
    is_truncated: AtomicBool,
    gauge: IoCounters,
    /// Counts an imminent request as one under way.
    expected: Mutex<Option<Member>>,
    requests: Tasks,
}

/// The value of `waits_since` while no head is awaited.
const BUSY: u64 = u64::MAX;

/// The state that a connection takes along when it moves to another worker.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ConnectionHistory {
    has_asked: bool,
    has_head_begun: bool,
    waits_since: Option<Instant>,
}

impl ConnectionState {
    /// A connection that is about to be opened and to send its first request. `requests` counts those under
    /// way.
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

    /// The state for the worker that serves the connection next.
    pub(super) fn known(&self) -> ConnectionHistory {
        ConnectionHistory {
            has_asked: self.has_asked(),
            has_head_begun: self.has_head_begun.load(Ordering::Relaxed),
            waits_since: self.waits_since(),
        }
    }

    /// The byte counters of its stream.
    pub(super) fn gauge(&self) -> &IoCounters {
        &self.gauge
    }

    /// Begins the wait for a head, unless it has begun already.
    pub(super) fn wait(&self) {
        if self.waits_since().is_none() {
            self.read_before.store(self.gauge.bytes(), Ordering::Relaxed);
            self.has_head_begun.store(false, Ordering::Relaxed);
            self.set_waits_since();
        }
    }

    /// Records the first byte of a head that arrives on an idle connection.
    pub(super) fn begin_head(&self) {
        self.has_head_begun.store(true, Ordering::Relaxed);
        self.set_waits_since();
    }

    /// Records that the head had begun before the connection became idle.
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

    /// Counts the next request as one under way: its head is about to come.
    pub(super) fn expect(&self) {
        *self.expected() = Some(self.requests.member());
    }

    /// Stops counting an imminent request, so that the drain does not wait for it.
    pub(super) fn expect_nothing(&self) {
        *self.expected() = None;
    }

    fn expected(&self) -> MutexGuard<'_, Option<Member>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_asked(&self) -> bool {
        self.has_asked.load(Ordering::Relaxed)
    }

    /// Records that a request head has come, with a body or without.
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

    /// Records that a response that is ended by the end of the connection is incomplete.
    pub(super) fn truncate(&self) {
        self.is_truncated.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_truncated(&self) -> bool {
        self.is_truncated.load(Ordering::Relaxed)
    }

    /// Records that the connection ends with its next response, because the server drains.
    pub(super) fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Completes when the wait for a head exceeds its timeout. The timer is set once per timeout and not with
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

    /// The timeout of the wait for a head: shorter for a client that has begun one, or has just connected,
    /// than for a client that keeps its connection open.
    fn wait_max(&self, limits: &Limits) -> Duration {
        let has_begun = self.has_head_begun.load(Ordering::Relaxed)
            || self.gauge.bytes() != self.read_before.load(Ordering::Relaxed);
        if self.has_asked() && !has_begun { limits.keepalive_timeout } else { limits.request_headers_timeout }
    }

    /// Completes when the connection waits for a head and the client has received all of its last response;
    /// never while the server drains. The state is checked after `first`, and then at pauses that grow to
    /// `longest`; the connection must have waited for a head since the last check.
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
    /// The first head stays in HTTP's buffer: HTTP does not treat the connection as idle before its first
    /// message.
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
