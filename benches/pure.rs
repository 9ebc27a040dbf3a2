//! Measures the time of each step of the request path without I/O, on one thread. `benches/request_steps` defines the
//! steps.
//!
//! ```text
//! cargo bench --bench pure
//! ```

#![allow(
    clippy::disallowed_methods,
    missing_docs,
    reason = "a benchmark reads the clock, and a macro generates its main function"
)]

mod request_steps;

use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use request_steps::STEPS;

/// The number of inputs that are prepared together. It is small, so that the inputs stay in the caches of the
/// processor, like bytes that were just read from a socket.
const BATCH_SIZE: usize = 16;

fn measure_steps(criterion: &mut Criterion) {
    for step in STEPS {
        let prepare = (step.set_up)();
        criterion.bench_function(step.name, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut remaining = usize::try_from(iterations).unwrap_or(usize::MAX);
                let mut elapsed = Duration::ZERO;
                while remaining > 0 {
                    let count = remaining.min(BATCH_SIZE);
                    let run = prepare(count);
                    let started_at = Instant::now();
                    run();
                    elapsed += started_at.elapsed();
                    remaining -= count;
                }
                elapsed
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().without_plots().warm_up_time(Duration::from_millis(300)).measurement_time(Duration::from_secs(1));
    targets = measure_steps
}
criterion_main!(benches);
