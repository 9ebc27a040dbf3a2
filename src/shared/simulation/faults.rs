//! Injects the faults of a simulation at random times: faults of Redis, of the networks of replicas, and of replicas.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::invariants::GRACE;
use super::link::LinkQuality;
use super::world::World;
use crate::clock;

/// Maximum time in which a replica that shuts down must report its charges, also during other faults.
const MAX_REPORT_DELAY: Duration = Duration::from_secs(120);

/// A fault of a simulation.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// All data of Redis is lost.
    Flush,
    /// Redis closes all connections and accepts none for this time.
    Unreachable(Duration),
    /// A replica of Redis becomes the master, without the writes of the last second.
    Failover,
    /// The network of one replica has this quality.
    Network(LinkQuality, Duration),
    /// A replica ends its requests, reports all its charges, stops, and starts again after this time.
    Restart(Duration),
    /// A replica is killed with its requests, and starts again after this time.
    Kill(Duration),
}

impl Fault {
    /// Whether the fault affects Redis, and therefore all replicas.
    fn affects_redis(self) -> bool {
        match self {
            Self::Flush | Self::Unreachable(_) | Self::Failover => true,
            Self::Network(..) | Self::Restart(_) | Self::Kill(_) => false,
        }
    }

    /// Returns a random fault. Replicas are killed only in a scenario with kills.
    fn random(world: &World) -> Self {
        let duration = Duration::from_millis(100 + world.random_below(6_000) as u64);
        match world.random_below(if world.scenario.has_kills { 9 } else { 8 }) {
            0 => Self::Flush,
            1 => Self::Unreachable(duration),
            2 => Self::Failover,
            3 => Self::Network(LinkQuality::CUT, 2 * duration),
            4 => Self::Network(
                LinkQuality { max_delay: Duration::from_millis(200), ..LinkQuality::GOOD },
                duration,
            ),
            5 => {
                let quality = LinkQuality { request_loss: 0.1, reply_loss: 0.2, ..LinkQuality::GOOD };
                Self::Network(quality, duration)
            }
            6 => Self::Network(LinkQuality { late_request: 0.2, ..LinkQuality::GOOD }, duration),
            7 => Self::Restart(duration),
            _ => Self::Kill(duration),
        }
    }

    /// Returns the maximum time in which the fault and its direct effects end.
    fn max_duration(self) -> Duration {
        match self {
            Self::Flush => Duration::ZERO,
            Self::Failover => Duration::from_secs(2),
            Self::Unreachable(duration) | Self::Kill(duration) => duration,
            // A delayed request may reach Redis up to 3 s after the fault.
            Self::Network(_, duration) | Self::Restart(duration) => duration + Duration::from_secs(3),
        }
    }
}

/// Runs the faults of the scenario, each at a random time in its first part.
pub(super) async fn run_faults(world: Rc<World>) {
    let faults: Vec<_> = (0..world.scenario.faults)
        .map(|_| {
            let world = Rc::clone(&world);
            tokio::task::spawn_local(async move {
                sleep(world.scenario.duration.mul_f64(0.1 + 0.6 * world.random())).await;
                run_fault(&world, Fault::random(&world)).await;
            })
        })
        .collect();
    for fault in faults {
        fault.await.unwrap();
    }
}

/// Injects a fault, waits for its end, and removes it.
async fn run_fault(world: &Rc<World>, fault: Fault) {
    let index = world.random_below(world.scenario.replicas);
    let healthy_at = clock::instant() + fault.max_duration() + GRACE;
    world.healthy_at.set(world.healthy_at.get().max(healthy_at));
    world.record_fault(if fault.affects_redis() {
        format!("{fault:?}")
    } else {
        format!("{fault:?} of replica {index}")
    });
    match fault {
        Fault::Flush => world.redis.flush(),
        Fault::Unreachable(duration) => {
            world.is_redis_up.set(false);
            world.disconnect(None);
            sleep(duration).await;
            world.is_redis_up.set(true);
        }
        Fault::Failover => {
            let snapshot = world.redis.snapshot();
            sleep(Duration::from_secs(1)).await;
            world.is_redis_up.set(false);
            world.disconnect(None);
            sleep(Duration::from_millis(500)).await;
            world.redis.restore(snapshot);
            world.shift_clock(if world.chance(0.5) { 150 } else { -150 });
            world.is_redis_up.set(true);
        }
        Fault::Network(quality, duration) => {
            world.set_quality(index, quality);
            sleep(duration).await;
            world.set_quality(index, LinkQuality::GOOD);
        }
        Fault::Restart(duration) => {
            let Some(process) = world.process(index) else { return };
            process.is_accepting.set(false);
            // Redis may lose the last statement of a replica that has ended, unless another replica has read it.
            sleep(Duration::from_secs(2)).await;
            let report_deadline = clock::instant() + MAX_REPORT_DELAY;
            while process.replica.borrow().is_alone() || !world.has_reported_all(&process) {
                if clock::instant() >= report_deadline {
                    world.fail(format!("{} cannot report its charges", process.id));
                    break;
                }
                sleep(Duration::from_millis(100)).await;
            }
            let healthy_at = clock::instant() + duration + GRACE;
            world.healthy_at.set(world.healthy_at.get().max(healthy_at));
            restart(world, index, duration).await;
        }
        Fault::Kill(duration) => restart(world, index, duration).await,
    }
}

/// Kills a replica, and starts it again after `duration` with the content of its database.
async fn restart(world: &Rc<World>, index: usize, duration: Duration) {
    // Another fault may have ended the replica.
    if world.process(index).is_none() {
        return;
    }
    let database = world.kill_replica(index);
    sleep(duration).await;
    world.start_replica(index, &database);
}
