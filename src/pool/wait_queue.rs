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
    shares: Mutex<ClientQueues>,
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
    give: oneshot::Sender<ReserveResult>,
    /// When a retry is worthwhile, if no key is released before.
    until: Option<UnixMs>,
    /// Notified when `until` becomes earlier, so that the task of the request resets its timer.
    is_sooner: Arc<Notify>,
}

/// A queued request, held by its task. Dropping it removes the request from the queue.
#[derive(Debug)]
pub(super) struct QueuedWaiter<'a> {
    line: &'a WaitQueue,
    id: u64,
    is_sooner: Arc<Notify>,
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
        waiting_max: usize,
    ) -> Option<(QueuedWaiter<'_>, oneshot::Receiver<ReserveResult>)> {
        let mut shares = self.lock();
        if self.len() >= waiting_max {
            return None;
        }
        let (give, given) = oneshot::channel();
        let id = shares.next_id;
        shares.next_id += 1;
        let (roster, is_sooner) = (Arc::clone(roster), Arc::new(Notify::new()));
        let ticket = QueuedWaiter { line: self, id, is_sooner: Arc::clone(&is_sooner) };
        let waiter = Waiter { id, roster, request: request.clone(), give, until: None, is_sooner };
        match shares.clients.iter_mut().find(|share| share.client == request.client) {
            Some(share) => share.waiters.push_back(waiter),
            None => shares
                .clients
                .push_back(ClientQueue { client: request.client.clone(), waiters: VecDeque::from([waiter]) }),
        }
        self.count.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        Some((ticket, given))
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
        let mut shares = self.lock();
        let mut in_vain: Vec<(Arc<Roster>, KeyRequest, Blocked)> = Vec::new();
        let mut turn = 0;
        while let Some(share) = shares.clients.get_mut(turn) {
            let mut place = 0;
            let mut was_given = false;
            while let Some(waiter) = share.waiters.get_mut(place) {
                // Positions refer to one roster; another roster may hold other keys.
                let mut tried = in_vain.iter().filter(|(roster, ..)| Arc::ptr_eq(roster, &waiter.roster));
                if let Some((.., blocked)) =
                    tried.find(|(_, request, blocked)| waiter.request.is_blocked_like(request, blocked))
                {
                    waiter.try_at(blocked.again_at);
                    place += 1;
                    continue;
                }
                let given = match reserve(&waiter.roster, &waiter.request) {
                    Err(blocked) if blocked.is_worth_waiting(now) => {
                        waiter.try_at(blocked.again_at);
                        in_vain.push((Arc::clone(&waiter.roster), waiter.request.clone(), blocked));
                        place += 1;
                        continue;
                    }
                    given => given.map_err(|blocked| blocked.why),
                };
                let Some(waiter) = share.waiters.remove(place) else { break };
                self.count.fetch_sub(1, Ordering::AcqRel);
                was_given = given.is_ok();
                if let Err(returned) = waiter.give.send(given) {
                    shares.clients.retain(|share| !share.waiters.is_empty());
                    return Some(returned);
                }
                if was_given {
                    // The reservation of one request may leave another without a key to wait for; that
                    // one must be evaluated again.
                    in_vain.clear();
                    break;
                }
            }
            let is_empty = share.waiters.is_empty();
            if !is_empty && !was_given {
                turn += 1;
            } else if let Some(share) = shares.clients.remove(turn) {
                // The client had its turn and goes to the back.
                if !is_empty {
                    shares.clients.push_back(share);
                }
                turn = if was_given { 0 } else { turn };
            }
        }
        None
    }

    /// Returns all queued requests with [`Unavailable::Outdated`], so that they select from the new
    /// roster.
    pub(super) fn outdate(&self) {
        let mut shares = self.lock();
        for waiter in shares.clients.drain(..).flat_map(|share| share.waiters) {
            self.count.fetch_sub(1, Ordering::AcqRel);
            // The receiver of a cancelled request is gone.
            let _ = waiter.give.send(Err(Unavailable::Outdated));
        }
    }

    fn lock(&self) -> MutexGuard<'_, ClientQueues> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
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
        let is_dearer = blocked.holds_for_dearer && self.restricted.is_empty();
        self.needs_all_of(other) && (is_dearer || self.estimate == other.estimate)
    }

    /// Whether its needs are the same and its cost is at least as high.
    fn needs_all_of(&self, less: &Self) -> bool {
        self.group == less.group
            && self.tried == less.tried
            && self.ineligible == less.ineligible
            && self.preferred == less.preferred
            && self.allow_exhausted == less.allow_exhausted
            && self.restricted == less.restricted
            && self.was_refused == less.was_refused
            && self.estimate.is_some() == less.estimate.is_some()
            && self.estimate >= less.estimate
    }
}

impl Waiter {
    /// Sets when a retry is worthwhile, and wakes the request's task if that is earlier than its timer.
    fn try_at(&mut self, at: Option<UnixMs>) {
        let before = std::mem::replace(&mut self.until, at);
        if at.is_some_and(|at| before.is_none_or(|before| at < before)) {
            self.is_sooner.notify_one();
        }
    }
}

impl QueuedWaiter<'_> {
    /// When a retry is worthwhile, if no key is released before.
    pub(super) fn until(&self) -> Option<UnixMs> {
        let shares = self.line.lock();
        let mut waiters = shares.clients.iter().flat_map(|share| &share.waiters);
        waiters.find(|waiter| waiter.id == self.id).and_then(|waiter| waiter.until)
    }

    /// Returns when [`until`](Self::until) has become earlier.
    pub(super) async fn sooner(&self) {
        self.is_sooner.notified().await;
    }
}

impl Drop for QueuedWaiter<'_> {
    fn drop(&mut self) {
        let mut shares = self.line.lock();
        for share in &mut shares.clients {
            let before = share.waiters.len();
            share.waiters.retain(|waiter| waiter.id != self.id);
            if share.waiters.len() < before {
                self.line.count.fetch_sub(1, Ordering::AcqRel);
            }
        }
        shares.clients.retain(|share| !share.waiters.is_empty());
    }
}
