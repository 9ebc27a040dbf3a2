//! Workers: one thread for each core, each with its own single-threaded runtime. A request stays on one
//! worker, so that it waits for no other thread and the cores share little memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::available_parallelism;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;
use tracing::error;

use super::Drain;
use crate::tasks::{self, Tasks};

/// The worker threads. When this is dropped, they end by themselves, and the tasks that still run on them are
/// dropped.
#[derive(Debug)]
pub struct WorkerThreads {
    handles: Vec<Handle>,
    end: CancellationToken,
    threads: Tasks,
}

impl WorkerThreads {
    /// Starts `count` threads; with 0, as many as the process has cores.
    ///
    /// # Errors
    ///
    /// When the system cannot create a thread or a runtime.
    pub fn start(count: usize) -> io::Result<Self> {
        let count = match count {
            // The call takes the CPU affinity and the quota of a container into account.
            0 => available_parallelism()?.get(),
            count => count,
        };
        let mut workers = Self { handles: Vec::new(), end: CancellationToken::new(), threads: Tasks::new() };
        let started =
            (0..count).map(|number| workers.start_worker(number)).collect::<io::Result<Vec<_>>>()?;
        for handle in started {
            let ended = |_| io::Error::other("a worker ended before it began");
            workers.handles.push(handle.recv().map_err(ended)??);
        }
        Ok(workers)
    }

    /// The runtime is created in its thread: it must not be dropped on another runtime.
    fn start_worker(&self, number: usize) -> io::Result<mpsc::Receiver<io::Result<Handle>>> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (end, member) = (self.end.clone(), self.threads.member());
        let name = format!("keychoir-{number}");
        tasks::thread(&name.clone(), move || {
            match Builder::new_current_thread().enable_all().thread_name(name).build() {
                Ok(runtime) => {
                    let has_receiver = sender.send(Ok(runtime.handle().clone())).is_ok();
                    if has_receiver {
                        runtime.block_on(end.cancelled());
                    }
                    // The thread does not wait for blocking work, such as a name lookup.
                    runtime.shutdown_background();
                }
                Err(error) => {
                    if let Err(mpsc::SendError(Err(error))) = sender.send(Err(error)) {
                        error!("a worker cannot run: {error}");
                    }
                }
            }
            drop(member);
        })?;
        Ok(receiver)
    }

    /// The number of worker threads.
    #[must_use]
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Creates a worker with its own service on each thread, until `drain` ends it.
    pub fn create_pool<S>(&self, drain: &Drain, mut service: impl FnMut() -> S) -> WorkerPool<S> {
        let worker = |handle: &Handle| Worker {
            handle: handle.clone(),
            service: service(),
            drain: Arc::new(drain.with_requests(Tasks::new())),
            connections: Arc::default(),
        };
        WorkerPool { workers: self.handles.iter().map(worker).collect(), next: Arc::default() }
    }

    /// Ends the threads, with the tasks that still run on them, and waits until they have ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only ends the wait; the threads still end.
    pub async fn end(&self) {
        self.end.cancel();
        self.threads.ended().await;
    }
}

impl Drop for WorkerThreads {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

/// The workers with their services; a clone shares them.
#[derive(Debug)]
pub struct WorkerPool<S> {
    workers: Arc<[Worker<S>]>,
    /// The turn among workers with equal load.
    next: Arc<AtomicUsize>,
}

/// One worker.
#[derive(Debug)]
pub(super) struct Worker<S> {
    pub(super) handle: Handle,
    pub(super) service: S,
    /// The drain with the requests of this worker only.
    pub(super) drain: Arc<Drain>,
    connections: Arc<AtomicUsize>,
}

/// The load of a worker: requests under way, including imminent ones, and open connections. Loads are
/// compared by requests first.
type Load = (usize, usize);

/// Counts an open connection of a worker until it is dropped.
#[derive(Debug)]
pub(super) struct WorkerConnection(Arc<AtomicUsize>);

impl<S> Clone for WorkerPool<S> {
    fn clone(&self) -> Self {
        Self { workers: Arc::clone(&self.workers), next: Arc::clone(&self.next) }
    }
}

impl<S> WorkerPool<S> {
    pub(super) fn worker(&self, number: usize) -> Option<&Worker<S>> {
        self.workers.get(number)
    }

    /// The worker with the least load, which takes the next connection.
    pub(super) fn least_loaded(&self) -> Option<usize> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let loads: Vec<Load> = self.workers.iter().map(Worker::load).collect();
        least_load(&loads, turn)
    }

    /// A worker that would have fewer requests under way than worker `number` has, even after taking one from
    /// it.
    pub(super) fn less_loaded_than(&self, number: usize) -> Option<usize> {
        let (own_requests, _) = self.workers.get(number)?.load();
        // Usually the connection's own request is the only one under way on this worker.
        let target = if own_requests > 1 { self.least_loaded()? } else { return None };
        let (other_requests, _) = self.workers.get(target)?.load();
        (other_requests + 1 < own_requests).then_some(target)
    }

    /// Returns each worker in turn.
    pub(super) fn take_turn(&self) -> Option<&Worker<S>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.workers.get(turn.checked_rem(self.workers.len())?)
    }

    /// Waits until no worker has a request under way.
    pub async fn requests_ended(&self) {
        // A connection may have moved to a worker that was checked before.
        while self.workers.iter().any(|worker| worker.drain.requests.count() > 0) {
            for worker in &*self.workers {
                worker.drain.requests.ended().await;
            }
        }
    }
}

impl<S> Worker<S> {
    fn load(&self) -> Load {
        (self.drain.requests.count(), self.connections.load(Ordering::Relaxed))
    }

    pub(super) fn count_connection(&self) -> WorkerConnection {
        self.connections.fetch_add(1, Ordering::Relaxed);
        WorkerConnection(Arc::clone(&self.connections))
    }
}

impl Drop for WorkerConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The index of the least load; among equals, the first from `turn` on.
fn least_load(loads: &[Load], turn: usize) -> Option<usize> {
    let first = turn.checked_rem(loads.len())?;
    let (before, from) = loads.split_at(first);
    let indexes = (first..loads.len()).chain(0..first);
    from.iter().chain(before).zip(indexes).min_by_key(|(load, _)| **load).map(|(_, index)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(loads: &[Load], turn: usize, expected: Option<usize>) {
        assert_eq!(least_load(loads, turn), expected, "{loads:?} at turn {turn}");
    }

    #[test]
    fn requests_are_compared_before_connections() {
        check(&[(1, 1), (0, 9)], 0, Some(1));
        check(&[(1, 1), (1, 0)], 0, Some(1));
        check(&[(0, 2), (0, 1), (1, 0)], 2, Some(1));
    }

    #[test]
    fn equal_loads_are_chosen_in_turns() {
        for turn in 0..7 {
            check(&[(2, 3); 3], turn, Some(turn % 3));
        }
        check(&[(0, 1), (0, 0), (0, 1), (0, 0)], 2, Some(3));
        check(&[(0, 1), (0, 0), (0, 1), (0, 0)], 4, Some(1));
    }

    #[test]
    fn a_pool_without_workers_has_no_least_load() {
        check(&[], 3, None);
    }
}
