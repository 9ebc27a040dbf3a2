//! Limits the total size of all buffers of Keychoir: request bodies, response bodies and WebSocket sessions in
//! memory, and request bodies also on disk. Each buffer in memory has a [`BufferReservation`], which takes memory
//! from the budget before the buffer grows, and returns the memory on drop.
//!
//! A reservation takes memory in steps of 64 KiB, so that most chunks of a body do not write a counter that is
//! shared with other cores. The first bytes of each reservation do not count against the budget:
//!
//! | buffer | not counted | when the budget is exhausted |
//! |---|---|---|
//! | a request body that is kept for a retry | 16 KiB | the body continues on disk |
//! | the write queue of the body on disk | 16 KiB | reading from the client waits for the disk |
//! | the start of a body on disk that is read before the first attempt | 16 KiB | reading ahead ends |
//! | the copy of a response with identifiers | 16 KiB | the identifiers are not recorded |
//! | a response that is read completely | 16 KiB | the body is streamed, or withheld if it must be redacted |
//! | a compressed response that is searched for keys | 64 KiB | the response ends with an error |
//! | reads of a fast response | 16 KiB | the response is read in chunks of 8 KiB |
//! | the buffers of a WebSocket session | 64 KiB | its first messages are dropped, then it is closed (code 1013) |
//!
//! The buffers of one request thus contain at most 160 KiB that the budget does not count. Hyper's buffer of
//! `server.max_request_headers_size` in each direction is not counted either. A WebSocket session uses at most 64 KiB
//! that the budget does not count, and an idle connection uses no such memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The number of bytes that a reservation takes or returns at a time.
const RESERVATION_STEP: u64 = 64 * 1024;

/// The configured limits of the budget.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufferLimits {
    /// Maximum number of bytes of one request body in memory.
    pub max_body_memory: u64,
    /// Maximum number of bytes of all buffers in memory.
    pub max_total_memory: u64,
    /// Maximum number of bytes of one request body on disk, in addition to the bytes in memory.
    pub max_body_disk: u64,
    /// Maximum number of bytes of all request bodies on disk.
    pub max_total_disk: u64,
    /// Minimum percentage of the disk that stays free.
    pub min_disk_free_percent: u64,
    /// The directory in which the anonymous temporary files are created.
    pub directory: PathBuf,
}

/// The budget that all buffers share. Clones share the counters.
#[derive(Clone, Debug)]
pub struct BufferBudget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    memory: Arc<BoundedCounter>,
    disk: Arc<BoundedCounter>,
    limits: BufferLimits,
}

/// The number of bytes in use, and its maximum.
#[derive(Debug)]
struct BoundedCounter {
    used: AtomicU64,
    max: AtomicU64,
}

impl BoundedCounter {
    fn new(max: u64) -> Arc<Self> {
        Arc::new(Self { used: AtomicU64::new(0), max: AtomicU64::new(max) })
    }

    /// Takes `bytes` if the sum does not exceed the maximum. Returns whether they were taken.
    fn take(&self, bytes: u64) -> bool {
        let max = self.max.load(Ordering::Relaxed);
        let add = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= max);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, add).is_ok()
    }

    fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }

    fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }
}

impl BufferBudget {
    /// Creates an unused budget.
    #[must_use]
    pub fn new(limits: &BufferLimits) -> Self {
        let (memory, disk) =
            (BoundedCounter::new(limits.max_total_memory), BoundedCounter::new(limits.max_total_disk));
        Self(Arc::new(Inner { memory, disk, limits: limits.clone() }))
    }

    /// Creates a budget without memory and without disk space.
    #[must_use]
    pub fn empty() -> Self {
        Self::new(&BufferLimits {
            max_body_memory: 0,
            max_total_memory: 0,
            max_body_disk: 0,
            max_total_disk: 0,
            min_disk_free_percent: 0,
            directory: PathBuf::new(),
        })
    }

    /// Returns a budget with the limits of `self` and the counters of `previous`, for a reload: existing buffers
    /// count against the new totals.
    #[must_use]
    pub fn with_counters_of(&self, previous: &Self) -> Self {
        let (memory, disk, limits) =
            (Arc::clone(&previous.0.memory), Arc::clone(&previous.0.disk), self.0.limits.clone());
        memory.max.store(limits.max_total_memory, Ordering::Relaxed);
        disk.max.store(limits.max_total_disk, Ordering::Relaxed);
        Self(Arc::new(Inner { memory, disk, limits }))
    }

    /// Creates a reservation whose first `unbudgeted_bytes` do not count against the budget.
    #[must_use]
    pub fn reservation(&self, unbudgeted_bytes: usize) -> BufferReservation {
        BufferReservation {
            budget: Some(self.clone()),
            unbudgeted_bytes: unbudgeted_bytes as u64,
            taken_bytes: 0,
        }
    }

    /// Returns the number of bytes of memory in use.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.0.memory.used()
    }

    /// Returns the maximum number of bytes of memory.
    #[must_use]
    pub fn max_memory(&self) -> u64 {
        self.0.memory.max.load(Ordering::Relaxed)
    }

    /// Returns the number of bytes on disk in use.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.0.disk.used()
    }

    /// Returns the maximum number of bytes on disk.
    #[must_use]
    pub fn max_disk(&self) -> u64 {
        self.0.disk.max.load(Ordering::Relaxed)
    }

    /// Returns whether one request body of `bytes` may be kept in memory. The total of all bodies is not compared.
    pub(super) fn fits_in_memory(&self, bytes: u64) -> bool {
        bytes <= self.0.limits.max_body_memory
    }

    /// Takes `bytes` on disk for a request body that has `used_bytes` on disk. Returns `false` and takes nothing if
    /// the bytes exceed the limit of one body or the limit of all bodies.
    pub(super) fn take_disk(&self, used_bytes: u64, bytes: u64) -> bool {
        used_bytes.saturating_add(bytes) <= self.0.limits.max_body_disk && self.0.disk.take(bytes)
    }

    pub(super) fn release_disk(&self, bytes: u64) {
        self.0.disk.release(bytes);
    }

    pub(super) fn directory(&self) -> &Path {
        &self.0.limits.directory
    }

    pub(super) fn min_disk_free_percent(&self) -> u64 {
        self.0.limits.min_disk_free_percent
    }
}

/// The memory that one buffer has taken from the budget. Dropping the reservation returns the memory.
///
/// The default reservation has no budget and can have any size. It is used for the few requests that Keychoir sends on
/// its own, and in place of a reservation whose buffer is not used yet.
#[derive(Debug, Default)]
pub struct BufferReservation {
    budget: Option<BufferBudget>,
    unbudgeted_bytes: u64,
    taken_bytes: u64,
}

impl BufferReservation {
    /// The number of bytes of most buffers that do not count against the budget. They are enough for a typical
    /// request or response.
    pub const UNBUDGETED_BYTES: usize = 16 * 1024;

    /// Resizes the reservation for a buffer of `bytes`: takes missing memory from the budget, or returns excess
    /// memory. Returns whether the budget had the memory. If it did not, the reservation is unchanged.
    #[must_use]
    pub fn try_resize(&mut self, bytes: usize) -> bool {
        let Some(budget) = &self.budget else { return true };
        let needed_bytes = (bytes as u64).saturating_sub(self.unbudgeted_bytes);
        let rounded_bytes = round_up_to_step(needed_bytes);
        if needed_bytes > self.taken_bytes {
            // If less than a whole step is available, the exact number of bytes is taken.
            let target_bytes = [rounded_bytes, needed_bytes]
                .into_iter()
                .find(|target_bytes| budget.0.memory.take(target_bytes - self.taken_bytes));
            let Some(target_bytes) = target_bytes else { return false };
            self.taken_bytes = target_bytes;
        } else if needed_bytes == 0 || rounded_bytes + RESERVATION_STEP < self.taken_bytes {
            // One extra step is kept for a buffer whose size varies around a step boundary.
            self.release_above(rounded_bytes);
        }
        true
    }

    /// Returns the budget of the reservation, or `None` for the default reservation.
    pub(super) fn budget(&self) -> Option<&BufferBudget> {
        self.budget.as_ref()
    }

    /// Returns the excess memory of a buffer that has shrunk to `bytes`.
    pub fn shrink(&mut self, bytes: usize) {
        let needed_bytes = (bytes as u64).saturating_sub(self.unbudgeted_bytes);
        self.release_above(round_up_to_step(needed_bytes));
    }

    /// Returns the memory above `kept_bytes` to the budget.
    fn release_above(&mut self, kept_bytes: u64) {
        if let Some(budget) = self.budget.as_ref().filter(|_| kept_bytes < self.taken_bytes) {
            budget.0.memory.release(self.taken_bytes - kept_bytes);
            self.taken_bytes = kept_bytes;
        }
    }
}

fn round_up_to_step(bytes: u64) -> u64 {
    bytes.div_ceil(RESERVATION_STEP).saturating_mul(RESERVATION_STEP)
}

impl Drop for BufferReservation {
    fn drop(&mut self) {
        self.release_above(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: usize = RESERVATION_STEP as usize;
    /// The number of bytes of each reservation that do not count against the budget.
    const UNBUDGETED: usize = 1_000;

    fn budget(max_total_memory: u64) -> BufferBudget {
        BufferBudget::new(&BufferLimits {
            max_body_memory: u64::MAX,
            max_total_memory,
            max_body_disk: 0,
            max_total_disk: 0,
            min_disk_free_percent: 0,
            directory: PathBuf::new(),
        })
    }

    /// A resize to `bytes`, its expected success, and the bytes of the budget that are in use afterwards.
    struct Resize {
        bytes: usize,
        is_granted: bool,
        used_bytes: u64,
    }

    fn granted(bytes: usize, used_bytes: u64) -> Resize {
        Resize { bytes, is_granted: true, used_bytes }
    }

    fn refused(bytes: usize, used_bytes: u64) -> Resize {
        Resize { bytes, is_granted: false, used_bytes }
    }

    /// Resizes one reservation several times, and compares each result with the expected one.
    #[track_caller]
    fn check_resizes(max_total_memory: u64, resizes: &[Resize]) {
        let budget = budget(max_total_memory);
        let mut reservation = budget.reservation(UNBUDGETED);
        for Resize { bytes, is_granted, used_bytes } in resizes {
            let is_resized = reservation.try_resize(*bytes);
            assert_eq!(
                (is_resized, budget.memory_bytes()),
                (*is_granted, *used_bytes),
                "the resize to {bytes} bytes must have the expected result"
            );
        }
        drop(reservation);
        assert_eq!(budget.memory_bytes(), 0, "a dropped reservation must return its memory");
    }

    #[test]
    fn a_reservation_takes_memory_in_steps_beyond_its_unbudgeted_bytes() {
        check_resizes(
            10 * RESERVATION_STEP,
            &[
                granted(0, 0),
                granted(UNBUDGETED, 0),
                granted(UNBUDGETED + 1, RESERVATION_STEP),
                granted(UNBUDGETED + STEP, RESERVATION_STEP),
            ],
        );
        check_resizes(
            10 * RESERVATION_STEP,
            &[
                granted(UNBUDGETED + STEP + 1, 2 * RESERVATION_STEP),
                granted(UNBUDGETED + 1, 2 * RESERVATION_STEP),
                granted(UNBUDGETED, 0),
            ],
        );
        check_resizes(
            10 * RESERVATION_STEP,
            &[
                granted(UNBUDGETED + 5 * STEP, 5 * RESERVATION_STEP),
                granted(UNBUDGETED + STEP, RESERVATION_STEP),
            ],
        );
    }

    #[test]
    fn the_last_bytes_of_the_budget_are_taken_exactly() {
        check_resizes(RESERVATION_STEP + 10, &[granted(UNBUDGETED + STEP + 10, RESERVATION_STEP + 10)]);
        check_resizes(
            RESERVATION_STEP + 10,
            &[refused(UNBUDGETED + STEP + 11, 0), granted(UNBUDGETED + 1, RESERVATION_STEP)],
        );
        check_resizes(0, &[granted(UNBUDGETED, 0), refused(UNBUDGETED + 1, 0)]);
    }

    #[test]
    fn a_reservation_that_cannot_grow_is_unchanged() {
        check_resizes(
            RESERVATION_STEP,
            &[granted(UNBUDGETED + 5, RESERVATION_STEP), refused(UNBUDGETED + STEP + 1, RESERVATION_STEP)],
        );
    }

    #[test]
    fn a_reservation_without_a_budget_can_have_any_size() {
        assert!(BufferReservation::default().try_resize(usize::MAX));
    }

    #[test]
    fn existing_buffers_count_against_reloaded_limits() {
        let old_budget = budget(10 * RESERVATION_STEP);
        let mut old_reservation = old_budget.reservation(0);
        assert!(old_reservation.try_resize(2 * STEP));
        let new_budget = budget(3 * RESERVATION_STEP).with_counters_of(&old_budget);
        assert_eq!(
            (new_budget.memory_bytes(), new_budget.max_memory(), old_budget.max_memory()),
            (2 * RESERVATION_STEP, 3 * RESERVATION_STEP, 3 * RESERVATION_STEP)
        );
        let mut new_reservation = new_budget.reservation(0);
        assert!(!new_reservation.try_resize(2 * STEP));
        drop(old_reservation);
        assert!(new_reservation.try_resize(3 * STEP));
    }

    #[test]
    fn reservations_on_several_threads_never_exceed_the_budget() {
        let budget = budget(20 * RESERVATION_STEP);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for bytes in (0..2_000).map(|index| index * 400) {
                        let mut reservation = budget.reservation(UNBUDGETED);
                        let _ = reservation.try_resize(bytes);
                        assert!(
                            budget.memory_bytes() <= 20 * RESERVATION_STEP,
                            "the memory in use must not exceed the budget"
                        );
                    }
                });
            }
        });
        assert_eq!(budget.memory_bytes(), 0, "dropped reservations must return their memory");
    }
}
