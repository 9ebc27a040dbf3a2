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
            // It takes the CPU affinity and the quota of a container into account.
            0 => available_parallelism()?.get(),
            count => count,
        };
        let mut workers = Self { handles: Vec::new(), end: CancellationToken::new(), threads: Tasks::new() };
        let started = (0..count).map(|number| workers.begin(number)).collect::<io::Result<Vec<_>>>()?;
        for handle in started {
            let gone = |_| io::Error::other("a worker ended before it began");
            workers.handles.push(handle.recv().map_err(gone)??);
        }
        Ok(workers)
    }

    /// The runtime is created in its thread: it must not be dropped on another runtime.
    fn begin(&self, number: usize) -> io::Result<mpsc::Receiver<io::Result<Handle>>> {
        let (told, handle) = mpsc::sync_channel(1);
        let (end, member) = (self.end.clone(), self.threads.member());
        let name = format!("keychoir-{number}");
        tasks::thread(&name.clone(), move || {
            match Builder::new_current_thread().enable_all().thread_name(name).build() {
                Ok(runtime) => {
                    let is_awaited = told.send(Ok(runtime.handle().clone())).is_ok();
                    if is_awaited {
                        runtime.block_on(end.cancelled());
                    }
                    // Blocking work, such as a name lookup, is not waited for.
                    runtime.shutdown_background();
                }
                Err(error) => {
                    if let Err(mpsc::SendError(Err(error))) = told.send(Err(error)) {
                        error!("a worker cannot run: {error}");
                    }
                }
            }
            drop(member);
        })?;
        Ok(handle)
    }

    /// The number of worker threads.
    #[must_use]
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Creates a worker with its own service on each thread, until `drain` ends it.
    pub fn crew<S>(&self, drain: &Drain, mut service: impl FnMut() -> S) -> WorkerPool<S> {
        let post = |handle: &Handle| Worker {
            handle: handle.clone(),
            service: service(),
            drain: Arc::new(drain.with_requests(Tasks::new())),
            open: Arc::default(),
        };
        WorkerPool { posts: self.handles.iter().map(post).collect(), next: Arc::default() }
    }

    /// Ends the threads, with the tasks that still run on them, and waits until they have ended.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the waiting and nothing else.
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
    posts: Arc<[Worker<S>]>,
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
    open: Arc<AtomicUsize>,
}

/// The load of a worker: requests under way, including imminent ones, and open connections. Loads are
/// compared by requests first.
type Load = (usize, usize);

/// Counts an open connection of a worker until it is dropped.
#[derive(Debug)]
pub(super) struct WorkerConnection(Arc<AtomicUsize>);

impl<S> Clone for WorkerPool<S> {
    fn clone(&self) -> Self {
        Self { posts: Arc::clone(&self.posts), next: Arc::clone(&self.next) }
    }
}

impl<S> WorkerPool<S> {
    pub(super) fn post(&self, number: usize) -> Option<&Worker<S>> {
        self.posts.get(number)
    }

    /// The worker with the least load, which takes the next connection.
    pub(super) fn least(&self) -> Option<usize> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let loads: Vec<Load> = self.posts.iter().map(Worker::load).collect();
        least(&loads, turn)
    }

    /// A worker that would have fewer requests under way than worker `number` has, even after taking one from
    /// it.
    pub(super) fn less_than(&self, number: usize) -> Option<usize> {
        let (own, _) = self.posts.get(number)?.load();
        // Mostly the connection's own request is the only one under way here.
        let less = if own > 1 { self.least()? } else { return None };
        let (others, _) = self.posts.get(less)?.load();
        (others + 1 < own).then_some(less)
    }

    /// Each worker in turn.
    pub(super) fn any(&self) -> Option<&Worker<S>> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        self.posts.get(turn.checked_rem(self.posts.len())?)
    }

    /// Waits until no worker has a request under way.
    pub async fn requests_ended(&self) {
        // A connection may have moved to a worker that was checked before.
        while self.posts.iter().any(|post| post.drain.requests.count() > 0) {
            for post in &*self.posts {
                post.drain.requests.ended().await;
            }
        }
    }
}

impl<S> Worker<S> {
    fn load(&self) -> Load {
        (self.drain.requests.count(), self.open.load(Ordering::Relaxed))
    }

    pub(super) fn open(&self) -> WorkerConnection {
        self.open.fetch_add(1, Ordering::Relaxed);
        WorkerConnection(Arc::clone(&self.open))
    }
}

impl Drop for WorkerConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The index of the least load; among equals, the first from `turn` on.
fn least(loads: &[Load], turn: usize) -> Option<usize> {
    let first = turn.checked_rem(loads.len())?;
    let (before, from) = loads.split_at(first);
    let places = (first..loads.len()).chain(0..first);
    from.iter().chain(before).zip(places).min_by_key(|(load, _)| **load).map(|(_, place)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(loads: &[Load], turn: usize, expected: Option<usize>) {
        assert_eq!(least(loads, turn), expected, "{loads:?} at turn {turn}");
    }

    #[test]
    fn requests_count_before_connections() {
        check(&[(1, 1), (0, 9)], 0, Some(1));
        check(&[(1, 1), (1, 0)], 0, Some(1));
        check(&[(0, 2), (0, 1), (1, 0)], 2, Some(1));
    }

    #[test]
    fn equals_take_turns() {
        for turn in 0..7 {
            check(&[(2, 3); 3], turn, Some(turn % 3));
        }
        check(&[(0, 1), (0, 0), (0, 1), (0, 0)], 2, Some(3));
        check(&[(0, 1), (0, 0), (0, 1), (0, 0)], 4, Some(1));
    }

    #[test]
    fn nobody_is_the_least_of_none() {
        check(&[], 3, None);
    }
}
