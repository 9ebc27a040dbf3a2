//! The memory and disk budget of all buffers of the proxy: request bodies, response bodies and
//! sockets in memory, and request bodies also on disk. Each holder of a buffer has a
//! [`BufferShare`], which takes memory from the budget before the buffer grows and returns it when
//! it is dropped.
//!
//! A share takes memory in steps of 64 KiB, so most pieces of a body do not touch a counter that other cores
//! write. The first bytes of each share are free, as are the buffers of fixed size of each request or
//! session:
//!
//! | holder | free | when the budget is used up |
//! |---|---|---|
//! | a request body that is kept for a retry | 16 KiB | it continues on disk |
//! | pieces queued for that disk file | 16 KiB | the client waits for the disk |
//! | the copy of a response that names identifiers | 16 KiB | the response is not searched for identifiers |
//! | an error or a document read whole | 16 KiB | it is streamed; one that must be changed is refused |
//! | a compressed response that is searched for keys | 64 KiB | it is cut |
//! | reads of a fast response | 16 KiB | it is read in pieces of 8 KiB |
//! | the buffers of a session | 64 KiB | its opening messages are dropped, then it is closed (1013) |
//!
//! A request thus uses at most 128 KiB that the budget does not count, in addition to the 64 KiB of
//! HTTP's own buffer in each direction. A session uses at most 64 KiB; idle connections use none.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Step in which shares take and return memory, in bytes.
const STEP: u64 = 64 * 1024;

/// The configured bounds of the budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufferLimits {
    /// Maximum bytes of one request body in memory.
    pub memory_bytes_max: u64,
    /// Maximum bytes of all buffers in memory.
    pub memory_total_bytes_max: u64,
    /// Maximum bytes of one request body on disk, beyond those in memory.
    pub disk_bytes_max: u64,
    /// Maximum bytes of all request bodies on disk.
    pub disk_total_bytes_max: u64,
    /// The share of the disk, in percent, that stays free.
    pub disk_free_percent_min: u64,
    /// The directory of the anonymous temporary files.
    pub directory: PathBuf,
}

/// The budget that all buffers share; a clone shares the counters.
#[derive(Clone, Debug)]
pub struct BufferBudget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    memory: Arc<Counter>,
    disk: Arc<Counter>,
    bounds: BufferLimits,
}

/// Bytes in use, and their maximum.
#[derive(Debug)]
struct Counter {
    used: AtomicU64,
    max: AtomicU64,
}

impl Counter {
    fn new(max: u64) -> Arc<Self> {
        Arc::new(Self { used: AtomicU64::new(0), max: AtomicU64::new(max) })
    }

    /// Takes `bytes`; returns whether they were available.
    fn take(&self, bytes: u64) -> bool {
        let max = self.max.load(Ordering::Relaxed);
        let fits = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= max);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits).is_ok()
    }

    fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }
}

impl BufferBudget {
    /// A budget within these bounds.
    #[must_use]
    pub fn new(bounds: &BufferLimits) -> Self {
        let (memory, disk) =
            (Counter::new(bounds.memory_total_bytes_max), Counter::new(bounds.disk_total_bytes_max));
        Self::counting(memory, disk, bounds.clone())
    }

    fn counting(memory: Arc<Counter>, disk: Arc<Counter>, bounds: BufferLimits) -> Self {
        Self(Arc::new(Inner { memory, disk, bounds }))
    }

    /// A budget without memory and disk.
    #[must_use]
    pub fn none() -> Self {
        Self::new(&BufferLimits {
            memory_bytes_max: 0,
            memory_total_bytes_max: 0,
            disk_bytes_max: 0,
            disk_total_bytes_max: 0,
            disk_free_percent_min: 0,
            directory: PathBuf::new(),
        })
    }

    /// A budget with the bounds of this one that takes over the counters of `before`: the buffers that
    /// `before` counts are counted against the new totals.
    #[must_use]
    pub fn following(&self, before: &Self) -> Self {
        let (Inner { memory, disk, .. }, bounds) = (&*before.0, self.0.bounds.clone());
        memory.max.store(bounds.memory_total_bytes_max, Ordering::Relaxed);
        disk.max.store(bounds.disk_total_bytes_max, Ordering::Relaxed);
        Self::counting(Arc::clone(memory), Arc::clone(disk), bounds)
    }

    /// A share that has taken no memory yet; its first `free` bytes are not counted.
    #[must_use]
    pub fn share(&self, free: usize) -> BufferShare {
        BufferShare { budget: Some(self.clone()), free: free as u64, taken: 0 }
    }

    /// Bytes of memory in use.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.0.memory.used()
    }

    /// Maximum bytes of memory.
    #[must_use]
    pub fn memory_max(&self) -> u64 {
        self.0.memory.max.load(Ordering::Relaxed)
    }

    /// Bytes of disk in use.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.0.disk.used()
    }

    /// Maximum bytes of disk.
    #[must_use]
    pub fn disk_max(&self) -> u64 {
        self.0.disk.max.load(Ordering::Relaxed)
    }

    /// Whether one request body may have this many bytes in memory.
    pub(super) fn fits_in_memory(&self, bytes: u64) -> bool {
        bytes <= self.0.bounds.memory_bytes_max
    }

    /// Takes `bytes` of disk for a request body that already has `on_disk` bytes on disk; returns whether they
    /// fit.
    pub(super) fn take_disk(&self, on_disk: u64, bytes: u64) -> bool {
        on_disk.saturating_add(bytes) <= self.0.bounds.disk_bytes_max && self.0.disk.take(bytes)
    }

    pub(super) fn release_disk(&self, bytes: u64) {
        self.0.disk.release(bytes);
    }

    pub(super) fn directory(&self) -> &Path {
        &self.0.bounds.directory
    }

    pub(super) fn disk_free_percent_min(&self) -> u64 {
        self.0.bounds.disk_free_percent_min
    }
}

/// The memory that one holder has taken from the budget. Dropping the share returns it.
///
/// The default share belongs to no budget and covers any size: it is for the proxy's own requests, which are
/// few.
#[derive(Debug, Default)]
pub struct BufferShare {
    budget: Option<BufferBudget>,
    free: u64,
    taken: u64,
}

impl BufferShare {
    /// Default number of free bytes per share: enough to buffer a usual request or response.
    pub const FREE: usize = 16 * 1024;

    /// Covers a buffer of `bytes`: takes the missing memory, or returns the excess. Returns whether the
    /// buffer is covered; if not, the share is unchanged.
    #[must_use]
    pub fn cover(&mut self, bytes: usize) -> bool {
        let Some(budget) = &self.budget else { return true };
        let needed = (bytes as u64).saturating_sub(self.free);
        let steps = needed.div_ceil(STEP).saturating_mul(STEP);
        if needed > self.taken {
            // The budget may have less than a step left.
            let target = [steps, needed].into_iter().find(|target| budget.0.memory.take(target - self.taken));
            let Some(target) = target else { return false };
            self.taken = target;
        } else if needed == 0 || steps + STEP < self.taken {
            // A buffer that grows and shrinks around a step boundary keeps the step.
            self.release_above(steps);
        }
        true
    }

    /// The budget of this share; `None` for the default share.
    pub(super) fn budget(&self) -> Option<&BufferBudget> {
        self.budget.as_ref()
    }

    /// Returns the excess memory of a buffer that has shrunk to `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        let needed = (bytes as u64).saturating_sub(self.free);
        self.release_above(needed.div_ceil(STEP).saturating_mul(STEP));
    }

    /// Returns the memory above `kept`.
    fn release_above(&mut self, kept: u64) {
        if let Some(budget) = self.budget.as_ref().filter(|_| kept < self.taken) {
            budget.0.memory.release(self.taken - kept);
            self.taken = kept;
        }
    }
}

impl Drop for BufferShare {
    fn drop(&mut self) {
        self.release_above(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: usize = 1_000;

    fn budget(memory_total_bytes_max: u64) -> BufferBudget {
        BufferBudget::new(&BufferLimits {
            memory_bytes_max: u64::MAX,
            memory_total_bytes_max,
            disk_bytes_max: 0,
            disk_total_bytes_max: 0,
            disk_free_percent_min: 0,
            directory: PathBuf::new(),
        })
    }

    /// Checks, for each buffer size, whether it is covered and how many bytes of the budget are then in use.
    #[track_caller]
    fn check(total: u64, sizes: &[(usize, bool, u64)]) {
        let budget = budget(total);
        let mut share = budget.share(FREE);
        for (size, is_covered, taken) in sizes {
            assert_eq!((share.cover(*size), budget.memory_bytes()), (*is_covered, *taken), "{size}");
        }
        drop(share);
        assert_eq!(budget.memory_bytes(), 0);
    }

    #[test]
    fn a_share_takes_memory_in_steps_beyond_its_free_bytes() {
        let step = STEP as usize;
        check(10 * STEP, &[(0, true, 0), (FREE, true, 0), (FREE + 1, true, STEP), (FREE + step, true, STEP)]);
        check(10 * STEP, &[(FREE + step + 1, true, 2 * STEP), (FREE + 1, true, 2 * STEP), (FREE, true, 0)]);
        check(10 * STEP, &[(FREE + 5 * step, true, 5 * STEP), (FREE + step, true, STEP)]);
    }

    #[test]
    fn the_last_bytes_are_taken_exactly() {
        check(STEP + 10, &[(FREE + STEP as usize + 10, true, STEP + 10)]);
        check(STEP + 10, &[(FREE + STEP as usize + 11, false, 0), (FREE + 1, true, STEP)]);
        check(0, &[(FREE, true, 0), (FREE + 1, false, 0)]);
    }

    #[test]
    fn a_share_that_does_not_fit_is_unchanged() {
        check(STEP, &[(FREE + 5, true, STEP), (FREE + STEP as usize + 1, false, STEP)]);
    }

    #[test]
    fn a_share_without_a_budget_covers_any_size() {
        assert!(BufferShare::default().cover(usize::MAX));
    }

    #[test]
    fn buffers_count_against_the_following_bounds() {
        let before = budget(10 * STEP);
        let mut old = before.share(0);
        assert!(old.cover(2 * STEP as usize));
        let after = budget(3 * STEP).following(&before);
        assert_eq!(
            (after.memory_bytes(), after.memory_max(), before.memory_max()),
            (2 * STEP, 3 * STEP, 3 * STEP)
        );
        let mut new = after.share(0);
        assert!(!new.cover(2 * STEP as usize));
        drop(old);
        assert!(new.cover(3 * STEP as usize));
    }

    #[test]
    fn shares_on_several_threads_never_exceed_the_budget() {
        let budget = budget(20 * STEP);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for bytes in 0..2_000 {
                        let mut share = budget.share(FREE);
                        let _ = share.cover(bytes * 400);
                        assert!(budget.memory_bytes() <= 20 * STEP);
                    }
                });
            }
        });
        assert_eq!(budget.memory_bytes(), 0);
    }
}
