//! Counts the allocations of a closure. A test target with this module uses a counting allocator.

#![allow(dead_code, unreachable_pub, reason = "each test target uses a part of this module")]

/// The number of allocations on this thread, and the sum of their sizes.
pub struct Allocations {
    pub count: u64,
    pub bytes: u64,
}

/// Counts the allocations of `work`, without those of other threads.
pub fn count_allocations(work: impl FnOnce()) -> Allocations {
    let measured = allocation_counter::measure(work);
    Allocations { count: measured.count_total, bytes: measured.bytes_total }
}

/// Returns the allocations of one call. `work` prepares a closure that runs a given number of calls. Its setup
/// and cleanup are not included.
pub fn allocations_of_one_call(work: impl Fn(usize) -> Box<dyn FnOnce()>) -> Allocations {
    const CALLS: u64 = 64;
    let measure = |count: u64| {
        let prepared = work(usize::try_from(count).unwrap_or(usize::MAX));
        count_allocations(prepared)
    };
    // Fills caches.
    measure(CALLS);
    let (single, double) = (measure(CALLS), measure(2 * CALLS));
    Allocations {
        count: double.count.saturating_sub(single.count).div_ceil(CALLS),
        bytes: double.bytes.saturating_sub(single.bytes).div_ceil(CALLS),
    }
}
