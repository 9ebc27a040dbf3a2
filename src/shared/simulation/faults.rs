//! The faults of a simulation: of Redis, of networks, and of replicas.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::invariants::GRACE;
use super::link::LinkQuality;
use super::world::World;
use crate::clock;

/// A fault, and how long it lasts.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// All data of Redis is lost.
    Flush,
    /// Redis does not respond.
    Stop(Duration),
    /// A replica of Redis takes over, without the writes of the last second.
    Failover,
    /// The network of one replica has this quality.
    Network(LinkQuality, Duration),
    /// A replica starts again after this time. It has ended its requests and stated all charges.
    Restart(Duration),
    /// A replica is killed, and starts again after this time.
    Kill(Duration),
}

impl Fault {
    fn random(world: &World) -> Self {
        let span = Duration::from_millis(100 + world.random_below(6_000) as u64);
        match world.random_below(if world.scenario.kills { 9 } else { 8 }) {
            0 => Self::Flush,
            1 => Self::Stop(span),
            2 => Self::Failover,
            3 => Self::Network(LinkQuality::CUT, 2 * span),
            4 => Self::Network(
                LinkQuality { max_delay: Duration::from_millis(200), ..LinkQuality::GOOD },
                span,
            ),
            5 => {
                let quality = LinkQuality { request_loss: 0.1, reply_loss: 0.2, ..LinkQuality::GOOD };
                Self::Network(quality, span)
            }
            6 => Self::Network(LinkQuality { late: 0.2, ..LinkQuality::GOOD }, span),
            7 => Self::Restart(span),
            _ => Self::Kill(span),
        }
    }

    /// Returns the longest time after which the fault has ended.
    fn max_duration(self) -> Duration {
        match self {
            Self::Flush => Duration::ZERO,
            Self::Failover => Duration::from_secs(2),
            Self::Stop(span) | Self::Kill(span) => span,
            // Late requests arrive after the fault.
            Self::Network(_, span) | Self::Restart(span) => span + Duration::from_secs(3),
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

async fn run_fault(world: &Rc<World>, fault: Fault) {
    let index = world.random_below(world.scenario.replicas);
    let healthy_at = clock::instant() + fault.max_duration() + GRACE;
    world.healthy_at.set(world.healthy_at.get().max(healthy_at));
    world.record_fault(format!("{fault:?} of replica {index}"));
    match fault {
        Fault::Flush => world.redis.flush(),
        Fault::Stop(span) => {
            world.is_up.set(false);
            world.disconnect(None);
            sleep(span).await;
            world.is_up.set(true);
        }
        Fault::Failover => {
            let snapshot = world.redis.snapshot();
            sleep(Duration::from_secs(1)).await;
            world.is_up.set(false);
            world.disconnect(None);
            sleep(Duration::from_millis(500)).await;
            world.redis.restore(snapshot);
            world.shift_clock(if world.chance(0.5) { 150 } else { -150 });
            world.is_up.set(true);
        }
        Fault::Network(quality, span) => {
            world.set_quality(index, quality);
            sleep(span).await;
            world.set_quality(index, LinkQuality::GOOD);
        }
        Fault::Restart(span) => {
            let Some(process) = world.process(index) else { return };
            process.is_decided.set(false);
            // Redis may lose the last statement of a replica that has ended, unless another one has read it.
            sleep(Duration::from_secs(2)).await;
            while process.replica.borrow().is_alone() || !world.has_stated_all(&process) {
                sleep(Duration::from_millis(100)).await;
            }
            let healthy_at = clock::instant() + span + GRACE;
            world.healthy_at.set(world.healthy_at.get().max(healthy_at));
            restart(world, index, span).await;
        }
        Fault::Kill(span) => restart(world, index, span).await,
    }
}

async fn restart(world: &Rc<World>, index: usize, span: Duration) {
    // Another fault may have ended it.
    if world.process(index).is_none() {
        return;
    }
    let restored = world.kill_replica(index);
    sleep(span).await;
    world.start_replica(index, &restored);
}
