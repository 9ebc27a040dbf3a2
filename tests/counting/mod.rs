//! Counts what a piece of code allocates. Whoever names this module has its allocator counted.

#![allow(dead_code, unreachable_pub, reason = "every test uses its own part of this one")]

/// How often `work` allocates on this thread, and how many bytes in all.
pub struct Allocations {
    pub count: u64,
    pub bytes: u64,
}

/// Counts the allocations of `work`. What other threads do meanwhile is not in it.
pub fn allocations(work: impl FnOnce()) -> Allocations {
    let seen = allocation_counter::measure(work);
    Allocations { count: seen.count_total, bytes: seen.bytes_total }
}

/// The allocations that one of `work`'s calls takes, when `work` is told how often to do it: what
/// comes before and after is in neither.
pub fn of_one_call(work: impl Fn(usize) -> Box<dyn FnOnce()>) -> Allocations {
    const CALLS: u64 = 64;
    let of = |count: u64| {
        let prepared = work(usize::try_from(count).unwrap_or(usize::MAX));
        allocations(prepared)
    };
    // What is done once and kept is done.
    of(CALLS);
    let (once, twice) = (of(CALLS), of(2 * CALLS));
    Allocations {
        count: twice.count.saturating_sub(once.count).div_ceil(CALLS),
        bytes: twice.bytes.saturating_sub(once.bytes).div_ceil(CALLS),
    }
}
