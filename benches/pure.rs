//! The cost of the pure parts of a request's path, in nanoseconds of one thread.
//!
//! ```text
//! cargo bench --bench pure
//! ```

#![allow(
    clippy::disallowed_methods,
    missing_docs,
    reason = "a measurement reads the clock, and its main comes from a macro"
)]

mod parts;

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use parts::PARTS;

/// Heads are prepared in batches of this size, so that they stay in the processor's caches, like
/// data that was just read.
const STACK: usize = 16;

fn pure(criterion: &mut Criterion) {
    for part in PARTS {
        let stage = (part.set_up)();
        criterion.bench_function(part.name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut left = usize::try_from(iterations).unwrap_or(usize::MAX);
                let mut spent = Duration::ZERO;
                while left > 0 {
                    let count = left.min(STACK);
                    let measured = stage(count);
                    let began = Instant::now();
                    measured();
                    spent += began.elapsed();
                    left -= count;
                }
                spent
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().without_plots().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = pure
}
criterion_main!(benches);
