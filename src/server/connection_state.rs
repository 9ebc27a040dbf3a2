//! The state of one connection: whether it has had a request, whether one is under way, and the
//! start of its wait for a request head.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::ConnectionLimits;
use super::counting_io::IoCounters;
use crate::clock;
use crate::tasks::{Member, Tasks};

/// Minimum interval between two checks whether a connection is idle.
const MIN_IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// The state of one connection. Only the connection's own task changes it, so there is no contention.
#[derive(Debug)]
pub(super) struct ConnectionState {
    peer: Option<IpAddr>,
    began: Instant,
    /// Start of the wait for a head, in milliseconds after `began`.
    waiting_since: AtomicU64,
    /// Bytes read at that moment: a higher count means that the head has begun.
    read_before: AtomicU64,
    has_head_begun: AtomicBool,
    has_had_request: AtomicBool,
    is_ending: AtomicBool,
    /// Whether the last request had a body, whose rest may arrive after the response.
    may_send_body: AtomicBool,
    /// Whether a response that ends with the connection, because it has no length, was left
    /// incomplete.
    is_truncated: AtomicBool,
    counters: IoCounters,
    requests: Mutex<Requests>,
}

/// The counter of the requests of a connection.
#[derive(Debug)]
struct Requests {
    /// The requests under way of the worker that serves the connection.
    group: Tasks,
    /// Counts an imminent request as one under way.
    expected: Option<Member>,
}

/// The value of `waiting_since` while no head is awaited.
const BUSY: u64 = u64::MAX;

impl ConnectionState {
    /// A connection that is about to be opened and to send its first request. `requests` counts those under
    /// way.
    pub(super) fn new(requests: Tasks, peer: Option<IpAddr>) -> Arc<Self> {
        Arc::new(Self {
            peer,
            began: clock::instant(),
            waiting_since: AtomicU64::new(BUSY),
            read_before: AtomicU64::new(0),
            has_head_begun: AtomicBool::new(false),
            has_had_request: AtomicBool::new(false),
            is_ending: AtomicBool::new(false),
            may_send_body: AtomicBool::new(false),
            is_truncated: AtomicBool::new(false),
            counters: IoCounters::default(),
            requests: Mutex::new(Requests::expecting(requests)),
        })
    }

    /// Counts the imminent request, and later ones, among the `requests` of another worker.
    pub(super) fn move_to(&self, requests: Tasks) {
        *self.requests() = Requests::expecting(requests);
    }

    /// The address of the client.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// The byte counters of its stream.
    pub(super) fn counters(&self) -> &IoCounters {
        &self.counters
    }

    /// Begins the wait for a head, unless it has begun already.
    pub(super) fn await_head(&self) {
        if self.waiting_since().is_none() {
            self.read_before.store(self.counters.bytes(), Ordering::Relaxed);
            self.has_head_begun.store(false, Ordering::Relaxed);
            self.set_waiting_since();
        }
    }

    /// Records the first byte of a head that arrives on an idle connection.
    pub(super) fn begin_head(&self) {
        self.has_head_begun.store(true, Ordering::Relaxed);
        self.set_waiting_since();
    }

    /// Records that the head had begun before the connection became idle.
    pub(super) fn mark_head_begun(&self) {
        self.has_head_begun.store(true, Ordering::Relaxed);
    }

    fn set_waiting_since(&self) {
        let since = u64::try_from(clock::since(self.began).as_millis()).unwrap_or(BUSY);
        self.waiting_since.store(since, Ordering::Relaxed);
    }

    fn waiting_since(&self) -> Option<Instant> {
        match self.waiting_since.load(Ordering::Relaxed) {
            BUSY => None,
            since => Some(self.began + Duration::from_millis(since)),
        }
    }

    /// Counts the next request as one under way, because its head is about to arrive.
    pub(super) fn expect_request(&self) {
        let mut requests = self.requests();
        requests.expected = Some(requests.group.member());
    }

    /// Stops counting an imminent request, so that the drain does not wait for it.
    pub(super) fn expect_no_request(&self) {
        self.requests().expected = None;
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has_had_request(&self) -> bool {
        self.has_had_request.load(Ordering::Relaxed)
    }

    /// Records that a request head has arrived, with a body or without.
    pub(super) fn begin_request(self: &Arc<Self>, has_body: bool) -> ActiveRequest {
        self.waiting_since.store(BUSY, Ordering::Relaxed);
        self.has_had_request.store(true, Ordering::Relaxed);
        self.may_send_body.store(has_body, Ordering::Relaxed);
        let mut requests = self.requests();
        let member = requests.expected.take().unwrap_or_else(|| requests.group.member());
        ActiveRequest { state: Arc::clone(self), _member: member }
    }

    /// Whether the client may still be sending the body of its last request.
    pub(super) fn may_send_body(&self) -> bool {
        self.may_send_body.load(Ordering::Relaxed)
    }

    /// Records that a response that is ended by the end of the connection is incomplete.
    pub(super) fn mark_truncated(&self) {
        self.is_truncated.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_truncated(&self) -> bool {
        self.is_truncated.load(Ordering::Relaxed)
    }

    /// Records that the connection ends with its next response, because the server drains.
    pub(super) fn set_ending(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Completes when the wait for a head exceeds its timeout. The timer is set once per timeout and not with
    /// each request.
    pub(super) async fn head_timed_out(&self, limits: &ConnectionLimits) {
        loop {
            let due = self.waiting_since().unwrap_or_else(clock::instant) + self.head_timeout(limits);
            if due <= clock::instant() {
                return;
            }
            sleep_until(due.into()).await;
        }
    }

    /// The timeout of the wait for a head: shorter for a client that has begun one, or has just connected,
    /// than for a client that keeps its connection open.
    fn head_timeout(&self, limits: &ConnectionLimits) -> Duration {
        let has_begun = self.has_head_begun.load(Ordering::Relaxed)
            || self.counters.bytes() != self.read_before.load(Ordering::Relaxed);
        if self.has_had_request() && !has_begun {
            limits.keepalive_timeout
        } else {
            limits.request_headers_timeout
        }
    }

    /// Completes when the connection waits for a head and the client has received all of its last response;
    /// never while the server drains. The state is checked after `first`, and then at pauses that grow to
    /// `longest`; the connection must have waited for a head since the last check.
    pub(super) async fn idle(&self, first: Duration, longest: Duration) {
        let longest = longest.max(MIN_IDLE_CHECK_INTERVAL);
        let mut pause = first.clamp(MIN_IDLE_CHECK_INTERVAL, longest);
        let mut due = clock::instant() + pause;
        loop {
            sleep_until(due.into()).await;
            let now = clock::instant();
            let since = self.waiting_since().filter(|_| self.may_become_idle());
            if since.is_some_and(|since| since + pause <= now) {
                return;
            }
            pause = (pause * 2).min(longest);
            due = since.unwrap_or(now) + pause;
        }
    }
}

impl Requests {
    fn expecting(group: Tasks) -> Self {
        Self { expected: Some(group.member()), group }
    }
}

impl ConnectionState {
    /// The first head stays in HTTP's buffer: HTTP does not treat the connection as idle before its first
    /// message.
    fn may_become_idle(&self) -> bool {
        let has_begun = self.has_had_request() || self.counters.bytes() == 0;
        has_begun && !self.counters.is_write_blocked() && !self.is_ending()
    }
}

/// A request that is under way until this is dropped.
#[derive(Debug)]
pub(super) struct ActiveRequest {
    state: Arc<ConnectionState>,
    _member: Member,
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.state.counters.phase().set_idle();
        self.state.await_head();
    }
}
