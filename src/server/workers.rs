//! Runs the worker threads, by default one per core, each with its own single-threaded runtime. Chooses a worker for
//! each connection: the worker with the fewest requests, and among equals the one with the fewest connections. A
//! request stays on one worker, so that it never waits for another thread, and cores share little memory.

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

/// The worker threads. Dropping the value ends the threads and drops the tasks that are still running on
/// them.
#[derive(Debug)]
pub struct WorkerThreads {
    handles: Vec<Handle>,
    shutdown: CancellationToken,
    threads: Tasks,
}

impl WorkerThreads {
    /// Starts `count` threads, or one per available core if `count` is 0.
    ///
    /// # Errors
    ///
    /// Fails when the operating system cannot create a thread or a runtime.
    pub fn start(count: usize) -> io::Result<Self> {
        let count = match count {
            // This number takes CPU affinity and the quota of a container into account.
            0 => available_parallelism()?.get(),
            count => count,
        };
        let mut workers =
            Self { handles: Vec::new(), shutdown: CancellationToken::new(), threads: Tasks::new() };
        let receivers =
            (0..count).map(|index| workers.start_thread(index)).collect::<io::Result<Vec<_>>>()?;
        for receiver in receivers {
            let ended_early = |_| io::Error::other("a worker thread ended before its runtime was created");
            workers.handles.push(receiver.recv().map_err(ended_early)??);
        }
        Ok(workers)
    }

    /// Starts one thread, which creates and drops its own runtime, because a runtime must not be dropped
    /// inside another. The returned receiver receives the handle of the runtime.
    fn start_thread(&self, index: usize) -> io::Result<mpsc::Receiver<io::Result<Handle>>> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let (shutdown, token) = (self.shutdown.clone(), self.threads.token());
        let name = format!("keychoir-{index}");
        tasks::spawn_thread(&name.clone(), move || {
            match Builder::new_current_thread().enable_all().thread_name(name).build() {
                Ok(runtime) => {
                    let has_receiver = sender.send(Ok(runtime.handle().clone())).is_ok();
                    if has_receiver {
                        runtime.block_on(shutdown.cancelled());
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
            drop(token);
        })?;
        Ok(receiver)
    }

    /// Returns the number of worker threads.
    #[must_use]
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Creates a pool with one worker per thread, each with its own service and its own group of requests.
    pub fn create_pool<S>(&self, drain: &Drain, mut service: impl FnMut() -> S) -> WorkerPool<S> {
        let create_worker = |handle: &Handle| Worker {
            handle: handle.clone(),
            service: service(),
            drain: Arc::new(drain.with_requests(Tasks::new())),
            connections: Arc::default(),
        };
        WorkerPool { workers: self.handles.iter().map(create_worker).collect(), next_turn: Arc::default() }
    }

    /// Ends the threads, drops the tasks that are still running on them, and waits until the threads have
    /// ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends only the wait.
    pub async fn shut_down(&self) {
        self.shutdown.cancel();
        self.threads.wait_until_ended().await;
    }
}

impl Drop for WorkerThreads {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// The workers and their services. Clones share them.
#[derive(Debug)]
pub struct WorkerPool<S> {
    workers: Arc<[Worker<S>]>,
    /// The next turn, which determines the next worker in rotation, and the worker that is chosen among several with
    /// equal load.
    next_turn: Arc<AtomicUsize>,
}

/// A worker thread with its service.
#[derive(Debug)]
pub(super) struct Worker<S> {
    pub(super) handle: Handle,
    pub(super) service: S,
    /// The drain, whose `requests` counts the requests of this worker.
    pub(super) drain: Arc<Drain>,
    /// The number of open connections.
    connections: Arc<AtomicUsize>,
}

/// The load of a worker: the requests in progress, including imminent ones, and the open connections. Loads
/// are ordered by requests first.
type Load = (usize, usize);

/// Counts an open connection of a worker until it is dropped.
#[derive(Debug)]
pub(super) struct WorkerConnection(Arc<AtomicUsize>);

impl<S> Clone for WorkerPool<S> {
    fn clone(&self) -> Self {
        Self { workers: Arc::clone(&self.workers), next_turn: Arc::clone(&self.next_turn) }
    }
}

impl<S> WorkerPool<S> {
    /// Returns the worker with `index`.
    pub(super) fn worker(&self, index: usize) -> Option<&Worker<S>> {
        self.workers.get(index)
    }

    /// Returns the index of the least loaded worker, which serves the next connection.
    pub(super) fn least_loaded(&self) -> Option<usize> {
        let turn = self.next_turn.fetch_add(1, Ordering::Relaxed);
        let loads: Vec<Load> = self.workers.iter().map(Worker::load).collect();
        least_load(&loads, turn)
    }

    /// Returns the index of a worker that, with one more request, would still have fewer requests in progress
    /// than worker `index`.
    pub(super) fn less_loaded_than(&self, index: usize) -> Option<usize> {
        let (requests, _) = self.workers.get(index)?.load();
        // The request that may move is usually the only one in progress on its worker.
        if requests <= 1 {
            return None;
        }
        let target = self.least_loaded()?;
        let (target_requests, _) = self.workers.get(target)?.load();
        (target_requests + 1 < requests).then_some(target)
    }

    /// Returns the next worker in rotation. Returns `None` if the pool is empty.
    pub(super) fn next_worker(&self) -> Option<&Worker<S>> {
        let turn = self.next_turn.fetch_add(1, Ordering::Relaxed);
        self.workers.get(turn.checked_rem(self.workers.len())?)
    }

    /// Waits until no worker has a request in progress.
    pub async fn wait_until_requests_ended(&self) {
        // The wait is repeated, because a connection may move to a worker whose requests had already ended.
        while self.workers.iter().any(|worker| worker.drain.requests.count() > 0) {
            for worker in &*self.workers {
                worker.drain.requests.wait_until_ended().await;
            }
        }
    }
}

impl<S> Worker<S> {
    fn load(&self) -> Load {
        (self.drain.requests.count(), self.connections.load(Ordering::Relaxed))
    }

    /// Counts an open connection until the returned value is dropped.
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

/// Returns the index of the least load. Among equal loads, the first one in a rotation that starts at `turn`, modulo
/// the number of loads, is chosen.
fn least_load(loads: &[Load], turn: usize) -> Option<usize> {
    let first = turn.checked_rem(loads.len())?;
    (first..loads.len()).chain(0..first).min_by_key(|&index| loads.get(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_least_load(loads: &[Load], turn: usize, expected: Option<usize>) {
        assert_eq!(
            least_load(loads, turn),
            expected,
            "the expected worker must be chosen from {loads:?} at turn {turn}"
        );
    }

    #[test]
    fn requests_are_compared_before_connections() {
        check_least_load(&[(1, 1), (0, 9)], 0, Some(1));
        check_least_load(&[(1, 1), (1, 0)], 0, Some(1));
        check_least_load(&[(0, 2), (0, 1), (1, 0)], 2, Some(1));
    }

    #[test]
    fn workers_with_equal_loads_take_turns() {
        for turn in 0..7 {
            check_least_load(&[(2, 3); 3], turn, Some(turn % 3));
        }
        check_least_load(&[(0, 1), (0, 0), (0, 1), (0, 0)], 2, Some(3));
        check_least_load(&[(0, 1), (0, 0), (0, 1), (0, 0)], 4, Some(1));
    }

    #[test]
    fn a_pool_without_workers_has_no_least_load() {
        check_least_load(&[], 3, None);
    }
}
