//! Queues the requests that wait for a key, because every key that could serve them is at its concurrency limit, has
//! its credits reserved, or is in a cooldown that ends soon. Also defines a request for a key with its requirements.
//!
//! Released keys are assigned round robin between clients, so that a burst of one client cannot starve the other
//! clients, and first in, first out within a client. A new request queues behind earlier requests. While no request is
//! queued, a request that does not have to wait takes no lock.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use tokio::sync::{Notify, oneshot};

use super::Reserved;
use super::division::QueuedDemand;
use super::restrictions::RestrictionLevel;
use super::roster::Roster;
use super::sync::{AtomicUsize, Mutex, MutexGuard, Ordering, fence};
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::select::{SelectionFailure, Unavailable};
use crate::policy::units::UnixMs;

/// A request for a key, with its requirements.
#[derive(Clone, Debug)]
pub struct KeyRequest {
    /// The name of the client. The queue is fair between clients.
    pub client: ClientName,
    /// Upper bound of the cost in credits. It is 0 if the request costs no credits, and `None` if the cost cannot be
    /// estimated.
    pub estimate: Option<u64>,
    /// The concurrency group that limits the request, or `None` for an unlimited request.
    pub group: Option<ConcurrencyGroup>,
    /// Positions of the keys that this request has tried, in any order.
    pub tried: Vec<usize>,
    /// Positions of the keys that may not serve this request, ascending. The reason for a failure of the request
    /// does not depend on the state of these keys.
    pub ineligible: Vec<usize>,
    /// Positions of the keys that are tried before all other keys, regardless of the strategy, ascending.
    pub preferred: Vec<usize>,
    /// Whether a key without credits may serve the request if no other key can, because the request costs none.
    pub allow_exhausted: bool,
    /// Positions of the keys that are restricted for this kind of request, ascending, with their levels.
    pub restricted: Vec<(usize, RestrictionLevel)>,
    /// Whether the provider has refused this request already. If so, keys that have refused this kind of request are
    /// not tried, because they would also refuse it.
    pub was_refused: bool,
}

impl KeyRequest {
    /// Creates a request that has tried no key and that any key may serve.
    #[must_use]
    pub fn new(client: ClientName, estimate: Option<u64>, group: Option<ConcurrencyGroup>) -> Self {
        Self {
            client,
            estimate,
            group,
            tried: Vec::new(),
            ineligible: Vec::new(),
            preferred: Vec::new(),
            allow_exhausted: false,
            restricted: Vec::new(),
            was_refused: false,
        }
    }
}

/// The result of a reservation that includes the wait in the queue.
pub(super) type ReserveResult = Result<Reserved, Unavailable>;
/// The result of one attempt to reserve a key. A request that fails may be queued.
pub(super) type TryReserveResult = Result<Reserved, SelectionFailure>;

/// The queued requests of all clients.
#[derive(Debug, Default)]
pub(super) struct WaitQueue {
    /// Number of queued requests, readable without the lock.
    count: AtomicUsize,
    queues: Mutex<ClientQueues>,
}

/// The queues of all clients that have queued requests.
#[derive(Debug, Default)]
struct ClientQueues {
    next_id: u64,
    /// The queues, in the order in which the clients are served next.
    clients: VecDeque<ClientQueue>,
}

/// The queued requests of one client, oldest first.
#[derive(Debug)]
struct ClientQueue {
    client: ClientName,
    waiters: VecDeque<Waiter>,
}

/// A queued request.
#[derive(Debug)]
struct Waiter {
    id: u64,
    roster: Arc<Roster>,
    request: KeyRequest,
    sender: oneshot::Sender<ReserveResult>,
    /// Time at which a retry may succeed without a released key.
    retry_at: Option<UnixMs>,
    /// Notified when `retry_at` becomes earlier, so that the task of the request resets its timer.
    retry_moved_earlier: Arc<Notify>,
}

/// A queued request that failed in the current pass of the dispatch, with the reason.
struct BlockedRequest {
    roster: Arc<Roster>,
    request: KeyRequest,
    failure: SelectionFailure,
}

/// The handle of a queued request, which the task of the request holds. Dropping it removes the request from the queue.
#[derive(Debug)]
pub(super) struct QueuedWaiter<'a> {
    wait_queue: &'a WaitQueue,
    id: u64,
    retry_moved_earlier: Arc<Notify>,
}

impl WaitQueue {
    /// Whether no request is queued.
    pub(super) fn is_empty(&self) -> bool {
        // Pairs with the fence in `enqueue`. Either the task that releases a key finds the new waiter, or
        // the waiter finds the released key.
        fence(Ordering::SeqCst);
        self.count.load(Ordering::Acquire) == 0
    }

    /// Returns the number of queued requests.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Returns the demand of the queued requests.
    pub(super) fn demand(&self) -> QueuedDemand {
        let mut demand = QueuedDemand::default();
        if self.is_empty() {
            return demand;
        }
        let queues = self.lock();
        let mut min_credits = u64::MAX;
        for waiter in queues.clients.iter().flat_map(|queue| &queue.waiters) {
            let credits = waiter.request.estimate.unwrap_or(0);
            if let Some(group) = waiter.request.group {
                let group = &mut demand.groups[group.index()];
                let is_first = group.slots == 0;
                group.min_credits = if is_first { credits } else { group.min_credits.min(credits) };
                group.slots += 1;
            }
            demand.credits = demand.credits.saturating_add(credits);
            demand.max_credits = demand.max_credits.max(credits);
            if credits > 0 {
                min_credits = min_credits.min(credits);
            }
        }
        demand.min_credits = min_credits.min(demand.max_credits);
        demand
    }

    /// Appends a request to the queue of its client. Returns `None` when the queue is full.
    pub(super) fn enqueue(
        &self,
        roster: &Arc<Roster>,
        request: &KeyRequest,
        max_queued: usize,
    ) -> Option<(QueuedWaiter<'_>, oneshot::Receiver<ReserveResult>)> {
        let mut queues = self.lock();
        if self.len() >= max_queued {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        let id = queues.next_id;
        queues.next_id += 1;
        let (roster, retry_moved_earlier) = (Arc::clone(roster), Arc::new(Notify::new()));
        let handle =
            QueuedWaiter { wait_queue: self, id, retry_moved_earlier: Arc::clone(&retry_moved_earlier) };
        let waiter =
            Waiter { id, roster, request: request.clone(), sender, retry_at: None, retry_moved_earlier };
        match queues.clients.iter_mut().find(|queue| queue.client == request.client) {
            Some(queue) => queue.waiters.push_back(waiter),
            None => queues
                .clients
                .push_back(ClientQueue { client: request.client.clone(), waiters: VecDeque::from([waiter]) }),
        }
        self.count.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        Some((handle, receiver))
    }

    /// Assigns keys to queued requests with `reserve`, until it fails for all remaining requests.
    pub(super) fn dispatch(
        &self,
        now: UnixMs,
        reserve: impl Fn(&Arc<Roster>, &KeyRequest) -> TryReserveResult,
    ) {
        // The result of a cancelled request is dropped outside the lock, because the release of its lease dispatches
        // the queue again.
        while let Some(undelivered) = self.dispatch_until_undelivered(now, &reserve) {
            drop(undelivered);
        }
    }

    /// Assigns keys to queued requests. Stops at the first request that was cancelled, and returns its result.
    fn dispatch_until_undelivered(
        &self,
        now: UnixMs,
        reserve: &impl Fn(&Arc<Roster>, &KeyRequest) -> TryReserveResult,
    ) -> Option<ReserveResult> {
        let mut queues = self.lock();
        let mut blocked_requests: Vec<BlockedRequest> = Vec::new();
        let mut client_index = 0;
        while let Some(queue) = queues.clients.get_mut(client_index) {
            let mut waiter_index = 0;
            let mut was_assigned = false;
            while let Some(waiter) = queue.waiters.get_mut(waiter_index) {
                if let Some(blocked) = blocked_requests.iter().find(|blocked| waiter.is_blocked_like(blocked))
                {
                    waiter.set_retry_at(blocked.failure.retry_at);
                    waiter_index += 1;
                    continue;
                }
                let result = match reserve(&waiter.roster, &waiter.request) {
                    Err(failure) if failure.is_worth_waiting(now) => {
                        waiter.set_retry_at(failure.retry_at);
                        let (roster, request) = (Arc::clone(&waiter.roster), waiter.request.clone());
                        blocked_requests.push(BlockedRequest { roster, request, failure });
                        waiter_index += 1;
                        continue;
                    }
                    result => result.map_err(|failure| failure.reason),
                };
                let Some(waiter) = queue.waiters.remove(waiter_index) else { break };
                self.count.fetch_sub(1, Ordering::AcqRel);
                was_assigned = result.is_ok();
                if let Err(undelivered) = waiter.sender.send(result) {
                    queues.clients.retain(|queue| !queue.waiters.is_empty());
                    return Some(undelivered);
                }
                if was_assigned {
                    // After this reservation, another request may have no key left to wait for. Therefore all
                    // requests are evaluated again.
                    blocked_requests.clear();
                    break;
                }
            }
            let is_empty = queue.waiters.is_empty();
            if !is_empty && !was_assigned {
                client_index += 1;
            } else if let Some(queue) = queues.clients.remove(client_index) {
                // A client that was served moves to the back.
                if !is_empty {
                    queues.clients.push_back(queue);
                }
                client_index = if was_assigned { 0 } else { client_index };
            }
        }
        None
    }

    /// Fails all queued requests with [`Unavailable::Outdated`], so that they select from the new roster.
    pub(super) fn outdate_all(&self) {
        let mut queues = self.lock();
        for waiter in queues.clients.drain(..).flat_map(|queue| queue.waiters) {
            self.count.fetch_sub(1, Ordering::AcqRel);
            // Sending fails only if the request was cancelled.
            let _ = waiter.sender.send(Err(Unavailable::Outdated));
        }
    }

    /// Holds the lock of the queue until the result is dropped.
    #[cfg(test)]
    pub(super) fn hold_lock(&self) -> impl Sized + '_ {
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, ClientQueues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyRequest {
    /// Whether the key at the given `position` may not serve the request.
    pub(super) fn is_ineligible(&self, position: usize) -> bool {
        self.ineligible.binary_search(&position).is_ok()
    }

    /// Whether the key at the given `position` is tried before other keys.
    pub(super) fn is_preferred(&self, position: usize) -> bool {
        self.preferred.binary_search(&position).is_ok()
    }

    /// Returns the level of the restrictions on the key at the given `position`, if the key is restricted.
    pub(super) fn restriction_level(&self, position: usize) -> Option<RestrictionLevel> {
        let index = self.restricted.binary_search_by_key(&position, |(position, _)| *position).ok()?;
        self.restricted.get(index).map(|(_, level)| *level)
    }

    /// Whether this request has the same requirements as `cheaper` and costs at least as much.
    fn requires_at_least(&self, cheaper: &Self) -> bool {
        self.group == cheaper.group
            && self.tried == cheaper.tried
            && self.ineligible == cheaper.ineligible
            && self.preferred == cheaper.preferred
            && self.allow_exhausted == cheaper.allow_exhausted
            && self.restricted == cheaper.restricted
            && self.was_refused == cheaper.was_refused
            && self.estimate.is_some() == cheaper.estimate.is_some()
            && self.estimate >= cheaper.estimate
    }
}

impl Waiter {
    /// Whether the failure of `blocked` implies that this request would fail as well.
    fn is_blocked_like(&self, blocked: &BlockedRequest) -> bool {
        let blocks_higher_cost = blocked.failure.blocks_costlier && self.request.restricted.is_empty();
        // Positions of different rosters are not comparable.
        Arc::ptr_eq(&blocked.roster, &self.roster)
            && self.request.requires_at_least(&blocked.request)
            && (blocks_higher_cost || self.request.estimate == blocked.request.estimate)
    }

    /// Sets the time of the next retry, and wakes the task of the request if its timer is later.
    fn set_retry_at(&mut self, at: Option<UnixMs>) {
        let previous_retry_at = std::mem::replace(&mut self.retry_at, at);
        if at.is_some_and(|at| previous_retry_at.is_none_or(|previous_retry_at| at < previous_retry_at)) {
            self.retry_moved_earlier.notify_one();
        }
    }
}

impl QueuedWaiter<'_> {
    /// Returns the time at which a retry may succeed without a released key.
    pub(super) fn retry_at(&self) -> Option<UnixMs> {
        let queues = self.wait_queue.lock();
        let mut waiters = queues.clients.iter().flat_map(|queue| &queue.waiters);
        waiters.find(|waiter| waiter.id == self.id).and_then(|waiter| waiter.retry_at)
    }

    /// Completes when [`retry_at`](Self::retry_at) becomes earlier.
    pub(super) async fn retry_moved_earlier(&self) {
        self.retry_moved_earlier.notified().await;
    }
}

impl Drop for QueuedWaiter<'_> {
    fn drop(&mut self) {
        let mut queues = self.wait_queue.lock();
        for queue in &mut queues.clients {
            let previous_count = queue.waiters.len();
            queue.waiters.retain(|waiter| waiter.id != self.id);
            if queue.waiters.len() < previous_count {
                self.wait_queue.count.fetch_sub(1, Ordering::AcqRel);
            }
        }
        queues.clients.retain(|queue| !queue.waiters.is_empty());
    }
}
