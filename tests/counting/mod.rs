//! Counts the allocations of a closure on its thread. A program that includes this module uses the counting allocator
//! of the `allocation_counter` crate for all its allocations.

#![allow(dead_code, unreachable_pub, reason = "each program uses a part of this module")]

/// The number of allocations on this thread, and the sum of their sizes.
pub struct Allocations {
    pub count: u64,
    pub bytes: u64,
}

/// Counts the allocations of `operation` on this thread.
pub fn count_allocations(operation: impl FnOnce()) -> Allocations {
    let measurement = allocation_counter::measure(operation);
    Allocations { count: measurement.count_total, bytes: measurement.bytes_total }
}

/// Returns the average allocations of one call, rounded up. `prepare` returns a closure that makes a given number of
/// calls. The allocations of `prepare` itself are not counted. Allocations of the closure that do not depend on the
/// number of calls cancel out, because two runs with different numbers are compared.
pub fn allocations_of_one_call(prepare: impl Fn(usize) -> Box<dyn FnOnce()>) -> Allocations {
    const CALLS: u64 = 64;
    let measure = |count: u64| count_allocations(prepare(usize::try_from(count).unwrap_or(usize::MAX)));
    // The first calls fill caches.
    measure(CALLS);
    let (single_run, double_run) = (measure(CALLS), measure(2 * CALLS));
    Allocations {
        count: double_run.count.saturating_sub(single_run.count).div_ceil(CALLS),
        bytes: double_run.bytes.saturating_sub(single_run.bytes).div_ceil(CALLS),
    }
}
