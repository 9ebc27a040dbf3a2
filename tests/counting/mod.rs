//! Counts the allocations of a piece of code. Importing this module installs the counting
//! allocator.

#![allow(dead_code, unreachable_pub, reason = "every test uses its own part of this one")]

/// The number of allocations on this thread, and their bytes in all.
pub struct Allocations {
    pub count: u64,
    pub bytes: u64,
}

/// Counts the allocations of `work`, without those of other threads.
pub fn allocations(work: impl FnOnce()) -> Allocations {
    let seen = allocation_counter::measure(work);
    Allocations { count: seen.count_total, bytes: seen.bytes_total }
}

/// The allocations of one call, where `work` is given the number of calls: the setup before and the
/// cleanup after them are not included.
pub fn of_one_call(work: impl Fn(usize) -> Box<dyn FnOnce()>) -> Allocations {
    const CALLS: u64 = 64;
    let of = |count: u64| {
        let prepared = work(usize::try_from(count).unwrap_or(usize::MAX));
        allocations(prepared)
    };
    // Performs the work that is done once and cached.
    of(CALLS);
    let (once, twice) = (of(CALLS), of(2 * CALLS));
    Allocations {
        count: twice.count.saturating_sub(once.count).div_ceil(CALLS),
        bytes: twice.bytes.saturating_sub(once.bytes).div_ceil(CALLS),
    }
}
