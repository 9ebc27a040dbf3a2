//! Stores the state of one connection that hyper does not report: the request in progress, the start of the wait for a
//! request head, and whether the client may still send a body. The state also contains whether a response was
//! truncated, and whether the next response ends the connection. The state determines when a head is overdue and when
//! the connection is idle, and moves with the connection to another worker.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::ConnectionLimits;
use super::counting_io::IoCounters;
use crate::clock;
use crate::tasks::{TaskToken, Tasks};

/// Minimum interval between two idle checks.
const MIN_IDLE_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// The state of one connection. Only the task of the connection changes it, so the atomics and the lock are
/// never contended.
#[derive(Debug)]
pub(super) struct ConnectionState {
    peer: Option<IpAddr>,
    created_at: Instant,
    /// The time at which the wait for a head started, in milliseconds after `created_at`, or
    /// `NO_HEAD_AWAITED`.
    head_awaited_since: AtomicU64,
    /// The number of bytes that had been read from the stream when the wait for a head started. If more bytes have
    /// been read since, part of the head has arrived.
    bytes_before_head: AtomicU64,
    /// Whether part of the awaited head has arrived without changing the byte count: before the wait for the head
    /// started, or while the connection was idle.
    has_head_begun: AtomicBool,
    /// Whether a request head has arrived on the connection.
    has_had_request: AtomicBool,
    /// Whether the connection ends with its next response.
    is_ending: AtomicBool,
    /// Whether the last request had a body, so that a part of it may arrive after the response.
    may_send_body: AtomicBool,
    /// Whether a close-delimited response was truncated.
    is_truncated: AtomicBool,
    counters: IoCounters,
    requests: Mutex<RequestCounter>,
}

/// Counts the requests of a connection for its worker.
#[derive(Debug)]
struct RequestCounter {
    /// The requests in progress on the worker.
    group: Tasks,
    /// Counts an imminent request as a request in progress.
    expected: Option<TaskToken>,
}

/// The value of `head_awaited_since` while no head is awaited.
const NO_HEAD_AWAITED: u64 = u64::MAX;

impl ConnectionState {
    /// Creates the state of a new connection. Its imminent first request counts among `requests`.
    pub(super) fn new(requests: Tasks, peer: Option<IpAddr>) -> Arc<Self> {
        Arc::new(Self {
            peer,
            created_at: clock::instant(),
            head_awaited_since: AtomicU64::new(NO_HEAD_AWAITED),
            bytes_before_head: AtomicU64::new(0),
            has_head_begun: AtomicBool::new(false),
            has_had_request: AtomicBool::new(false),
            is_ending: AtomicBool::new(false),
            may_send_body: AtomicBool::new(false),
            is_truncated: AtomicBool::new(false),
            counters: IoCounters::default(),
            requests: Mutex::new(RequestCounter::expecting_request(requests)),
        })
    }

    /// Counts the imminent request and all later requests among the `requests` of another worker.
    pub(super) fn move_to(&self, requests: Tasks) {
        *self.requests() = RequestCounter::expecting_request(requests);
    }

    /// Returns the IP address of the client. Returns `None` for a Unix socket, and for a client that disconnected
    /// before its address was read.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        self.peer
    }

    /// Returns the byte counters of the stream.
    pub(super) fn counters(&self) -> &IoCounters {
        &self.counters
    }

    /// Starts the wait for a head, unless the wait has already started.
    pub(super) fn await_head(&self) {
        if self.head_awaited_since().is_none() {
            self.bytes_before_head.store(self.counters.received_bytes(), Ordering::Relaxed);
            self.has_head_begun.store(false, Ordering::Relaxed);
            self.set_head_awaited_since();
        }
    }

    /// Records the first byte of a head that arrives on an idle connection.
    pub(super) fn begin_head(&self) {
        self.has_head_begun.store(true, Ordering::Relaxed);
        self.set_head_awaited_since();
    }

    /// Records that part of the head arrived before the connection became idle.
    pub(super) fn mark_head_begun(&self) {
        self.has_head_begun.store(true, Ordering::Relaxed);
    }

    /// Starts the measurement of the wait for a head.
    fn set_head_awaited_since(&self) {
        let elapsed = clock::elapsed_since(self.created_at);
        let since_ms = u64::try_from(elapsed.as_millis()).unwrap_or(NO_HEAD_AWAITED);
        self.head_awaited_since.store(since_ms, Ordering::Relaxed);
    }

    /// Returns the time at which the wait for a head started, or `None` while no head is awaited.
    fn head_awaited_since(&self) -> Option<Instant> {
        match self.head_awaited_since.load(Ordering::Relaxed) {
            NO_HEAD_AWAITED => None,
            since_ms => Some(self.created_at + Duration::from_millis(since_ms)),
        }
    }

    /// Counts the imminent request as a request in progress.
    pub(super) fn expect_request(&self) {
        let mut requests = self.requests();
        requests.expected = Some(requests.group.token());
    }

    /// Stops counting the imminent request, so that a drain does not wait for it.
    pub(super) fn expect_no_request(&self) {
        self.requests().expected = None;
    }

    fn requests(&self) -> MutexGuard<'_, RequestCounter> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether a request head has arrived on the connection.
    pub(super) fn has_had_request(&self) -> bool {
        self.has_had_request.load(Ordering::Relaxed)
    }

    /// Records that a request head has arrived. The request is in progress until the returned value is
    /// dropped.
    pub(super) fn begin_request(self: &Arc<Self>, has_body: bool) -> ActiveRequest {
        self.head_awaited_since.store(NO_HEAD_AWAITED, Ordering::Relaxed);
        self.has_had_request.store(true, Ordering::Relaxed);
        self.may_send_body.store(has_body, Ordering::Relaxed);
        let mut requests = self.requests();
        let token = requests.expected.take().unwrap_or_else(|| requests.group.token());
        ActiveRequest { state: Arc::clone(self), _token: token }
    }

    /// Returns whether the client may still be sending the body of its last request.
    pub(super) fn may_send_body(&self) -> bool {
        self.may_send_body.load(Ordering::Relaxed)
    }

    /// Records that a close-delimited response was truncated, so that the connection is reset.
    pub(super) fn mark_truncated(&self) {
        self.is_truncated.store(true, Ordering::Relaxed);
    }

    /// Returns whether a close-delimited response was truncated.
    pub(super) fn is_truncated(&self) -> bool {
        self.is_truncated.load(Ordering::Relaxed)
    }

    /// Records that the connection ends with its next response, because Keychoir drains.
    pub(super) fn set_ending(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
    }

    /// Returns whether the connection ends with its next response.
    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::Relaxed)
    }

    /// Completes when the wait for a head exceeds its timeout. The timer is reset only when it fires, and not with
    /// each request.
    pub(super) async fn wait_for_head_timeout(&self, limits: &ConnectionLimits) {
        loop {
            let deadline =
                self.head_awaited_since().unwrap_or_else(clock::instant) + self.head_timeout(limits);
            if deadline <= clock::instant() {
                return;
            }
            sleep_until(deadline.into()).await;
        }
    }

    /// Returns the timeout of the awaited head. `keepalive_timeout` applies only between two requests, until
    /// the first byte of the next head.
    fn head_timeout(&self, limits: &ConnectionLimits) -> Duration {
        let has_head_begun = self.has_head_begun.load(Ordering::Relaxed)
            || self.counters.received_bytes() != self.bytes_before_head.load(Ordering::Relaxed);
        if self.has_had_request() && !has_head_begun {
            limits.keepalive_timeout
        } else {
            limits.request_headers_timeout
        }
    }

    /// Completes when the connection has waited for a head for a whole check interval, and its last response
    /// is written. Never completes while Keychoir drains. The check interval doubles from `first_interval` to
    /// `max_interval`.
    pub(super) async fn wait_until_idle(&self, first_interval: Duration, max_interval: Duration) {
        let max_interval = max_interval.max(MIN_IDLE_CHECK_INTERVAL);
        let mut interval = first_interval.clamp(MIN_IDLE_CHECK_INTERVAL, max_interval);
        let mut next_check = clock::instant() + interval;
        loop {
            sleep_until(next_check.into()).await;
            let now = clock::instant();
            let idle_since = self.head_awaited_since().filter(|_| self.may_become_idle());
            if idle_since.is_some_and(|since| since + interval <= now) {
                return;
            }
            interval = (interval * 2).min(max_interval);
            next_check = idle_since.unwrap_or(now) + interval;
        }
    }

    /// Returns whether hyper can release the connection. Hyper does not end a connection before its first message, so
    /// a part of a first head would stay in hyper's buffer.
    fn may_become_idle(&self) -> bool {
        let is_between_messages = self.has_had_request() || self.counters.received_bytes() == 0;
        is_between_messages && !self.counters.is_write_blocked() && !self.is_ending()
    }
}

impl RequestCounter {
    fn expecting_request(group: Tasks) -> Self {
        Self { expected: Some(group.token()), group }
    }
}

/// A request in progress. Dropping it starts the wait for the next head.
#[derive(Debug)]
pub(super) struct ActiveRequest {
    state: Arc<ConnectionState>,
    _token: TaskToken,
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        self.state.counters.phase().set_idle();
        self.state.await_head();
    }
}
