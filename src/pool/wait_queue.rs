//! The queue of requests that wait for a key, because every key that could serve them is at its
//! concurrency limit, has its credits reserved, or is in a cooldown that ends soon.
//!
//! A released key is assigned round robin between clients, and first in, first out within a client, so
//! that a burst of one client cannot starve the others. A request that arrives while others are queued
//! goes behind them. The queue is behind a lock, but a request that finds a free key never takes it.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};

use tokio::sync::{Notify, oneshot};

use super::Reserved;
use super::restrictions::Restraint;
use super::roster::Roster;
use super::sync::{AtomicUsize, Mutex, MutexGuard, Ordering, fence};
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::select::{Blocked, Unavailable};
use crate::policy::units::UnixMs;

/// What a request needs of a key.
#[derive(Clone, Debug)]
pub struct KeyRequest {
    /// The client, for fairness between clients in the queue.
    pub client: ClientName,
    /// Upper bound of its cost in credits; 0 for a free request, `None` when the cost cannot be
    /// estimated.
    pub estimate: Option<u64>,
    /// The concurrency group it counts towards; `None` for a request that is not limited.
    pub group: Option<ConcurrencyGroup>,
    /// Positions in the roster of the keys that this request has tried.
    pub tried: Vec<usize>,
    /// Positions of keys that may not serve this request, ascending. Their state does not influence the
    /// error of the request.
    pub ineligible: Vec<usize>,
    /// Positions of keys that are tried first, whatever the strategy, ascending; empty for none.
    pub preferred: Vec<usize>,
    /// Whether a key without credits may serve when no other key can, because the request costs none.
    pub allow_exhausted: bool,
    /// Positions of keys that have refused this kind of request, ascending, and how far each is
    /// restricted.
    pub restricted: Vec<(usize, Restraint)>,
    /// Whether the provider has refused this request already. A key restricted for this kind of request
    /// would refuse it, too.
    pub was_refused: bool,
}

impl KeyRequest {
    /// The needs of a request that has tried no key yet and that any key may serve.
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

/// The result of reserving a key: a lease, or the final reason why there is none.
pub(super) type ReserveResult = Result<Reserved, Unavailable>;
/// The result of one try, from which follows whether the request is queued.
pub(super) type TryReserveResult = Result<Reserved, Blocked>;

/// The queued requests of all clients.
#[derive(Debug, Default)]
pub(super) struct WaitQueue {
    /// Number of queued requests, readable without the lock.
    count: AtomicUsize,
    queues: Mutex<ClientQueues>,
}

#[derive(Debug, Default)]
struct ClientQueues {
    next_id: u64,
    /// The client whose turn is next is at the front.
    clients: VecDeque<ClientQueue>,
}

/// The queued requests of one client, oldest first.
#[derive(Debug)]
struct ClientQueue {
    client: ClientName,
    waiters: VecDeque<Waiter>,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    roster: Arc<Roster>,
    request: KeyRequest,
    sender: oneshot::Sender<ReserveResult>,
    /// When a retry is worthwhile, if no key is released before.
    until: Option<UnixMs>,
    /// Notified when `until` becomes earlier, so that the task of the request resets its timer.
    notify_earlier: Arc<Notify>,
}

/// A queued request, held by its task. Dropping it removes the request from the queue.
#[derive(Debug)]
pub(super) struct QueuedWaiter<'a> {
    wait_queue: &'a WaitQueue,
    id: u64,
    notify_earlier: Arc<Notify>,
}

impl WaitQueue {
    pub(super) fn is_empty(&self) -> bool {
        // A task that has just released a key must see a request that has just been queued, and the other
        // way round.
        fence(Ordering::SeqCst);
        self.count.load(Ordering::Acquire) == 0
    }

    /// Number of queued requests.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Appends a request to the queue of its client. `None` when the queue is full.
    pub(super) fn join(
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
        let (roster, notify_earlier) = (Arc::clone(roster), Arc::new(Notify::new()));
        let queued = QueuedWaiter { wait_queue: self, id, notify_earlier: Arc::clone(&notify_earlier) };
        let waiter = Waiter { id, roster, request: request.clone(), sender, until: None, notify_earlier };
        match queues.clients.iter_mut().find(|queue| queue.client == request.client) {
            Some(queue) => queue.waiters.push_back(waiter),
            None => queues
                .clients
                .push_back(ClientQueue { client: request.client.clone(), waiters: VecDeque::from([waiter]) }),
        }
        self.count.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        Some((queued, receiver))
    }

    /// Assigns to queued requests what `reserve` can reserve, until it can serve none of them.
    pub(super) fn serve(&self, now: UnixMs, reserve: impl Fn(&Arc<Roster>, &KeyRequest) -> TryReserveResult) {
        // A lease whose receiver is gone is dropped outside the lock, because releasing it dispatches the
        // queue again.
        while let Some(returned) = self.serve_once(now, &reserve) {
            drop(returned);
        }
    }

    fn serve_once(
        &self,
        now: UnixMs,
        reserve: &impl Fn(&Arc<Roster>, &KeyRequest) -> TryReserveResult,
    ) -> Option<ReserveResult> {
        let mut queues = self.lock();
        let mut blocked_requests: Vec<(Arc<Roster>, KeyRequest, Blocked)> = Vec::new();
        let mut turn = 0;
        while let Some(queue) = queues.clients.get_mut(turn) {
            let mut index = 0;
            let mut was_assigned = false;
            while let Some(waiter) = queue.waiters.get_mut(index) {
                // Positions refer to one roster; another roster may hold other keys.
                let mut tried =
                    blocked_requests.iter().filter(|(roster, ..)| Arc::ptr_eq(roster, &waiter.roster));
                if let Some((.., blocked)) =
                    tried.find(|(_, request, blocked)| waiter.request.is_blocked_like(request, blocked))
                {
                    waiter.set_retry_at(blocked.again_at);
                    index += 1;
                    continue;
                }
                let result = match reserve(&waiter.roster, &waiter.request) {
                    Err(blocked) if blocked.is_worth_waiting(now) => {
                        waiter.set_retry_at(blocked.again_at);
                        blocked_requests.push((Arc::clone(&waiter.roster), waiter.request.clone(), blocked));
                        index += 1;
                        continue;
                    }
                    result => result.map_err(|blocked| blocked.reason),
                };
                let Some(waiter) = queue.waiters.remove(index) else { break };
                self.count.fetch_sub(1, Ordering::AcqRel);
                was_assigned = result.is_ok();
                if let Err(returned) = waiter.sender.send(result) {
                    queues.clients.retain(|queue| !queue.waiters.is_empty());
                    return Some(returned);
                }
                if was_assigned {
                    // The reservation of one request may leave another without a key to wait for; that
                    // one must be evaluated again.
                    blocked_requests.clear();
                    break;
                }
            }
            let is_empty = queue.waiters.is_empty();
            if !is_empty && !was_assigned {
                turn += 1;
            } else if let Some(queue) = queues.clients.remove(turn) {
                // The client had its turn and goes to the back.
                if !is_empty {
                    queues.clients.push_back(queue);
                }
                turn = if was_assigned { 0 } else { turn };
            }
        }
        None
    }

    /// Returns all queued requests with [`Unavailable::Outdated`], so that they select from the new
    /// roster.
    pub(super) fn outdate(&self) {
        let mut queues = self.lock();
        for waiter in queues.clients.drain(..).flat_map(|queue| queue.waiters) {
            self.count.fetch_sub(1, Ordering::AcqRel);
            // The receiver of a cancelled request is gone.
            let _ = waiter.sender.send(Err(Unavailable::Outdated));
        }
    }

    /// Holds its lock.
    #[cfg(test)]
    pub(super) fn hold(&self) -> impl Sized + '_ {
        self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, ClientQueues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyRequest {
    /// Whether the key at this position may not serve the request.
    pub(super) fn is_ineligible(&self, position: usize) -> bool {
        self.ineligible.binary_search(&position).is_ok()
    }

    /// Whether the key at this position is tried first.
    pub(super) fn is_preferred(&self, position: usize) -> bool {
        self.preferred.binary_search(&position).is_ok()
    }

    /// How far the key at this position is restricted for the request.
    pub(super) fn restraint(&self, position: usize) -> Option<Restraint> {
        if self.restricted.is_empty() {
            return None;
        }
        let at = self.restricted.binary_search_by_key(&position, |(at, _)| *at).ok()?;
        self.restricted.get(at).map(|(_, restraint)| *restraint)
    }

    /// Whether no key can serve this request, because none could serve `other`, which was `blocked`.
    fn is_blocked_like(&self, other: &Self, blocked: &Blocked) -> bool {
        let costs_more = blocked.blocks_costlier && self.restricted.is_empty();
        self.needs_all_of(other) && (costs_more || self.estimate == other.estimate)
    }

    /// Whether its needs are the same and its cost is at least as high.
    fn needs_all_of(&self, cheaper: &Self) -> bool {
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
    /// Sets when a retry is worthwhile, and wakes the request's task if that is earlier than its timer.
    fn set_retry_at(&mut self, at: Option<UnixMs>) {
        let before = std::mem::replace(&mut self.until, at);
        if at.is_some_and(|at| before.is_none_or(|before| at < before)) {
            self.notify_earlier.notify_one();
        }
    }
}

impl QueuedWaiter<'_> {
    /// When a retry is worthwhile, if no key is released before.
    pub(super) fn until(&self) -> Option<UnixMs> {
        let queues = self.wait_queue.lock();
        let mut waiters = queues.clients.iter().flat_map(|queue| &queue.waiters);
        waiters.find(|waiter| waiter.id == self.id).and_then(|waiter| waiter.until)
    }

    /// Returns when [`until`](Self::until) has become earlier.
    pub(super) async fn earlier(&self) {
        self.notify_earlier.notified().await;
    }
}

impl Drop for QueuedWaiter<'_> {
    fn drop(&mut self) {
        let mut queues = self.wait_queue.lock();
        for queue in &mut queues.clients {
            let before = queue.waiters.len();
            queue.waiters.retain(|waiter| waiter.id != self.id);
            if queue.waiters.len() < before {
                self.wait_queue.count.fetch_sub(1, Ordering::AcqRel);
            }
        }
        queues.clients.retain(|queue| !queue.waiters.is_empty());
    }
}
