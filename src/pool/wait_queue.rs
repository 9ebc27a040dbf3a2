//! The line of requests that wait, because every key that could serve them has as much to do as it
//! may have.
//!
//! A lock, but only for those who must wait: a request that finds a free key never comes here. Who
//! releases a key serves the line, in turns between clients and in order within each; who comes
//! while others wait goes behind them.

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
    /// Who asks, for the fairness of the line.
    pub client: ClientName,
    /// Credits it will cost at the most; 0 for what is free, `None` when nobody can tell.
    pub estimate: Option<u64>,
    /// With what it is counted when it runs at once; `None` for what is not counted.
    pub group: Option<ConcurrencyGroup>,
    /// Positions in the roster that it does not use: they were tried.
    pub tried: Vec<usize>,
    /// Positions of keys that are not for it at all, ascending: what stands in their way is not its
    /// matter.
    pub ineligible: Vec<usize>,
    /// Positions of keys that are asked first, whatever the strategy, ascending; empty for none.
    pub preferred: Vec<usize>,
    /// Whether a key without credits will do when no other can: what is asked for costs none.
    pub allow_exhausted: bool,
    /// Positions of keys that were refused for the like of it, ascending, and how far that keeps it away.
    pub restricted: Vec<(usize, Restraint)>,
    /// Whether the provider has refused it already: then a key that was refused for the like of it would
    /// say the same.
    pub was_refused: bool,
}

impl KeyRequest {
    /// What a request needs that no key was asked for yet, and that any may serve.
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

/// What a request that asked for a key is given.
pub(super) type ReserveResult = Result<Reserved, Unavailable>;
/// The same before it is known whether it waits.
pub(super) type TryReserveResult = Result<Reserved, Blocked>;

/// Those who wait.
#[derive(Debug, Default)]
pub(super) struct WaitQueue {
    /// How many, to be looked at without the lock.
    count: AtomicUsize,
    shares: Mutex<ClientQueues>,
}

#[derive(Debug, Default)]
struct ClientQueues {
    next_id: u64,
    /// The client whose turn it is comes first.
    clients: VecDeque<ClientQueue>,
}

/// Those of one client who wait.
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
    /// When it is worth trying again, if nothing is released before.
    until: Option<UnixMs>,
    /// That moment is earlier than it was: the timer of the request is set anew.
    is_sooner: Arc<Notify>,
}

/// A place in the line. Dropping it leaves the line.
#[derive(Debug)]
pub(super) struct QueuedWaiter<'a> {
    line: &'a WaitQueue,
    id: u64,
    is_sooner: Arc<Notify>,
}

impl WaitQueue {
    pub(super) fn is_empty(&self) -> bool {
        // Whoever has just released something must see who has just come, and the other way round.
        fence(Ordering::SeqCst);
        self.count.load(Ordering::Acquire) == 0
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Takes a place behind all others of the same client. `None` when the line is as long as it may
    /// be.
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

    /// Gives to those who wait what `reserve` can, until nobody can be given anything.
    pub(super) fn serve(&self, now: UnixMs, reserve: impl Fn(&Arc<Roster>, &KeyRequest) -> TryReserveResult) {
        // Who has left meanwhile gives back what it was given, and that must not happen within the
        // lock: it serves the line again.
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
                // Positions are those of a roster, and another one may have other keys.
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
                    // What one takes may leave another no reason to wait for it: that one tries something else.
                    in_vain.clear();
                    break;
                }
            }
            let is_empty = share.waiters.is_empty();
            if !is_empty && !was_given {
                turn += 1;
            } else if let Some(share) = shares.clients.remove(turn) {
                // Its turn is over: all others come before it again.
                if !is_empty {
                    shares.clients.push_back(share);
                }
                turn = if was_given { 0 } else { turn };
            }
        }
        None
    }

    /// Sends all that wait back to choose among other keys.
    pub(super) fn outdate(&self) {
        let mut shares = self.lock();
        for waiter in shares.clients.drain(..).flat_map(|share| share.waiters) {
            self.count.fetch_sub(1, Ordering::AcqRel);
            // One that has left needs no answer.
            let _ = waiter.give.send(Err(Unavailable::Outdated));
        }
    }

    fn lock(&self) -> MutexGuard<'_, ClientQueues> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KeyRequest {
    /// Whether the key at that position is not for it.
    pub(super) fn is_ineligible(&self, position: usize) -> bool {
        self.ineligible.binary_search(&position).is_ok()
    }

    /// Whether the key at that position is asked first.
    pub(super) fn is_preferred(&self, position: usize) -> bool {
        self.preferred.binary_search(&position).is_ok()
    }

    /// How far the key at that position is restricted for it.
    pub(super) fn restraint(&self, position: usize) -> Option<Restraint> {
        if self.restricted.is_empty() {
            return None;
        }
        let at = self.restricted.binary_search_by_key(&position, |(at, _)| *at).ok()?;
        self.restricted.get(at).map(|(_, restraint)| *restraint)
    }

    /// Whether nothing can serve it because nothing could serve `other`, which was `blocked`.
    fn is_blocked_like(&self, other: &Self, blocked: &Blocked) -> bool {
        let is_dearer = blocked.holds_for_dearer && self.restricted.is_empty();
        self.needs_all_of(other) && (is_dearer || self.estimate == other.estimate)
    }

    /// Whether it asks for the same, and costs as much or more.
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
    /// Sets when it is worth trying again, and wakes the request if that is earlier than its timer.
    fn try_at(&mut self, at: Option<UnixMs>) {
        let before = std::mem::replace(&mut self.until, at);
        if at.is_some_and(|at| before.is_none_or(|before| at < before)) {
            self.is_sooner.notify_one();
        }
    }
}

impl QueuedWaiter<'_> {
    /// When it is worth trying again, if nothing is released before.
    pub(super) fn until(&self) -> Option<UnixMs> {
        let shares = self.line.lock();
        let mut waiters = shares.clients.iter().flat_map(|share| &share.waiters);
        waiters.find(|waiter| waiter.id == self.id).and_then(|waiter| waiter.until)
    }

    /// Returns when that moment is earlier than it was.
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
