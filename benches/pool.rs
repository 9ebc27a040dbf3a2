//! Measures the time that the pool needs for a request, on one thread, by strategy and number of keys: to reserve a
//! key, to charge the credits and to release the key, or to reject the request. There is no network, runtime or queue,
//! so each request finds a free key or is rejected immediately.
//!
//! ```text
//! cargo bench --bench pool
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, prints its results, and panics if an expectation fails"
)]

mod pool_settings;

use std::future::Future;
use std::hint::black_box;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use keychoir::clock;
use keychoir::policy::client::ClientName;
use keychoir::policy::concurrency_group::ConcurrencyGroup;
use keychoir::policy::evidence::RefusalSource;
use keychoir::policy::quota::{Extension, Quota};
use keychoir::policy::select::Unavailable;
use keychoir::policy::strategy::{STRATEGIES, Strategy};
use keychoir::policy::verdict::{Shortfall, Verdict};
use keychoir::pool::{KeyEntry, KeyRequest, Lease, Observation, Pool, RefusedAttempt, Reserved, Roster};
use keychoir::secret::ApiKey;
use pool_settings::{HOUR, pool_settings};

/// The numbers of keys in the measured pools.
const POOL_SIZES: [usize; 4] = [1, 10, 100, 1_000];
/// Each result is the median of this number of samples.
const SAMPLES: usize = 15;
/// Approximate duration of a sample, which determines its repetitions.
const SAMPLE_DURATION: Duration = Duration::from_millis(20);

fn main() {
    println!("reserve, charge and release, ns (median of {SAMPLES} samples of {SAMPLE_DURATION:?})");
    print_header();
    for strategy in &STRATEGIES {
        print_row(strategy.name, |count| {
            let bench = PoolBench::with_separate_workspaces(count, strategy);
            move || bench.serve()
        });
    }
    let fill_first = Strategy::DEFAULT;
    println!("\nfill-first, in other pools, ns");
    print_header();
    print_row("all of one workspace", |count| {
        let bench = PoolBench::new(count, fill_first, |_| Some("studio".to_owned()));
        move || bench.serve()
    });
    print_row("only the last has credits", |count| {
        let bench = PoolBench::with_separate_workspaces(count, fill_first);
        bench.exhaust(count - 1);
        move || bench.serve()
    });
    print_row("all full: refused", |count| {
        let bench = PoolBench::with_separate_workspaces(count, fill_first);
        let leases = bench.reserve_all_slots();
        move || {
            black_box(&leases);
            assert!(matches!(bench.reserve(), Err(Unavailable::Full { .. })));
        }
    });
    print_row("all exhausted: refused", |count| {
        let bench = PoolBench::with_separate_workspaces(count, fill_first);
        bench.exhaust(count);
        move || assert!(matches!(bench.reserve(), Err(Unavailable::Exhausted { .. })))
    });
}

fn print_header() {
    print!("{:<28}", "keys");
    POOL_SIZES.iter().for_each(|size| print!("{size:>10}"));
    println!();
}

/// Prints the duration of a call for each pool size. `prepare` returns the call for a pool of a given size.
fn print_row<F: FnMut()>(name: &str, prepare: impl Fn(usize) -> F) {
    print!("{name:<28}");
    for size in POOL_SIZES {
        print!("{:>10.0}", measure_nanoseconds(prepare(size)));
    }
    println!();
}

/// Returns the median duration of a call, in nanoseconds.
fn measure_nanoseconds(mut call: impl FnMut()) -> f64 {
    let mut measure_repetitions = |repetitions: u32| {
        let started_at = Instant::now();
        (0..repetitions).for_each(|_| call());
        started_at.elapsed()
    };
    let mut repetitions = 1;
    while measure_repetitions(repetitions) < SAMPLE_DURATION {
        repetitions *= 2;
    }
    let mut samples: Vec<f64> = (0..SAMPLES)
        .map(|_| measure_repetitions(repetitions).as_secs_f64() * 1e9 / f64::from(repetitions))
        .collect();
    samples.sort_by(f64::total_cmp);
    samples[SAMPLES / 2]
}

/// A pool, and a request for a key.
struct PoolBench {
    pool: Arc<Pool>,
    request: KeyRequest,
}

impl PoolBench {
    /// Creates a pool of keys, each in a separate workspace.
    fn with_separate_workspaces(count: usize, strategy: &'static Strategy) -> Self {
        Self::new(count, strategy, |_| None)
    }

    fn new(count: usize, strategy: &'static Strategy, workspace: impl Fn(usize) -> Option<String>) -> Self {
        let entries = (0..count).map(|number| KeyEntry {
            workspace: workspace(number),
            ..KeyEntry::from(ApiKey::new(&format!("sk_bench_key_number_{number:06}")).unwrap())
        });
        let pool = Arc::new(Pool::new(entries.collect(), pool_settings(strategy)));
        let roster = pool.roster();
        for key in roster.keys() {
            let quota = Quota {
                count: 1_000,
                limit: Some(1_000_000_000_000),
                extension: Extension::None,
                resets_at: Some(clock::now().plus(HOUR)),
            };
            pool.observe(
                &roster,
                key,
                Observation::Quota {
                    quota,
                    tier: None,
                    is_paid: Some(true),
                    capabilities: keychoir::elevenlabs::plan::Capabilities::default(),
                },
                clock::now(),
            );
        }
        let request = KeyRequest::new(ClientName::new("app"), Some(200), Some(ConcurrencyGroup::SPEECH));
        Self { pool, request }
    }

    /// Runs the operations of the pool for a served request, from loading the roster to the release of the key.
    fn serve(&self) {
        let roster = self.pool.roster();
        let Reserved { mut lease, transitions } = reserve(&self.pool, &roster, &self.request).unwrap();
        black_box(transitions);
        black_box(self.pool.charge(&roster, &mut lease, 150, clock::now()));
    }

    fn reserve(&self) -> Result<Reserved, Unavailable> {
        reserve(&self.pool, &self.pool.roster(), &self.request)
    }

    /// Exhausts the credits of the first `count` keys.
    fn exhaust(&self, count: usize) {
        let roster = self.pool.roster();
        for key in roster.keys().iter().take(count) {
            let verdict =
                Verdict::WorkspaceQuota(Shortfall { remaining: Some(0), required: Some(1), quota: None });
            let refused_attempt = RefusedAttempt {
                verdict,
                request: Some(&self.request),
                is_repeated_elsewhere: false,
                source: RefusalSource::default(),
            };
            self.pool.record_refusal(&roster, key, refused_attempt, clock::now());
        }
    }

    /// Fills the concurrency limit of each workspace.
    fn reserve_all_slots(&self) -> Vec<Lease> {
        let mut leases = Vec::new();
        while let Ok(Reserved { lease, .. }) = self.reserve() {
            lease.record_concurrency_limit(1);
            leases.push(lease);
        }
        leases
    }
}

/// Reserves a key. A free key is reserved without waiting, so the first poll completes.
fn reserve(pool: &Arc<Pool>, roster: &Arc<Roster>, request: &KeyRequest) -> Result<Reserved, Unavailable> {
    match pin!(pool.reserve(roster, request)).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(reservation) => reservation,
        Poll::Pending => panic!("the reservation must not wait"),
    }
}
