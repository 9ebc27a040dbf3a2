//! Sends the requests of clients through the pool of a replica, with the steps of the module `proxy`. It selects a key,
//! sends the request to the model of the provider, and charges the request or records its refusal. Reports requests
//! that wait too long.

use std::rc::Rc;
use std::time::Duration;

use tokio::task::spawn_local;
use tokio::time::sleep;

use super::provider::ProviderWorkspace;
use super::world::{Process, World};
use crate::clock::{self, SIMULATED_CLOCK};
use crate::policy::client::ClientName;
use crate::policy::concurrency_group::ConcurrencyGroup;
use crate::policy::evidence::RefusalSource;
use crate::policy::select::Unavailable;
use crate::policy::verdict::Verdict;
use crate::pool::{KeyRequest, RefusedAttempt, ServedAttempt};

/// Maximum time that a request may wait while credits and a slot are free and no fault has an effect.
const MAX_WAIT: Duration = Duration::from_secs(15);
/// Maximum number of attempts of a request.
const MAX_ATTEMPTS: usize = 12;

/// A request of a client.
#[derive(Clone, Copy, Debug)]
pub(super) struct SimulatedRequest {
    /// The estimated cost, which is at least the cost.
    pub(super) estimate: u64,
    pub(super) cost: u64,
    /// The time for which the provider serves the request.
    pub(super) duration: Duration,
    /// The number of the client.
    pub(super) client: usize,
}

/// The result of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestEnd {
    Served,
    Unavailable(Unavailable),
    /// The replica did not accept requests, or was killed during the request.
    NotReady,
}

/// Sends a request to the replica `index` and waits for the end of the request.
pub(super) async fn send(world: &Rc<World>, index: usize, request: SimulatedRequest) -> RequestEnd {
    let Some(process) = world.process(index).filter(|process| process.is_accepting.get()) else {
        return RequestEnd::NotReady;
    };
    let serving = serve(Rc::clone(world), Rc::clone(&process), request);
    let task = spawn_local(SIMULATED_CLOCK.scope(process.clock, serving));
    process.tasks.borrow_mut().retain(|task| !task.is_finished());
    process.tasks.borrow_mut().push(task.abort_handle());
    match task.await {
        Ok(end) => end,
        Err(error) if error.is_cancelled() => RequestEnd::NotReady,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Records the end of an admitted request when the guard is dropped.
struct AdmissionGuard<'a>(&'a World, super::invariants::ProviderAdmission);

impl Drop for AdmissionGuard<'_> {
    fn drop(&mut self) {
        self.0.end_admission(self.1);
    }
}

/// Sends the attempts of a request until one is served or no key is available.
async fn serve(world: Rc<World>, process: Rc<Process>, request: SimulatedRequest) -> RequestEnd {
    let pool = &process.pool;
    let group = Some(ConcurrencyGroup::SPEECH);
    let client = ClientName::new(&format!("client-{}", request.client));
    let mut key_request = KeyRequest::new(client, Some(request.estimate), group);
    for _ in 0..MAX_ATTEMPTS {
        let roster = pool.roster();
        let (began_at, was_healthy) = (clock::instant(), world.is_healthy());
        let reservation = match pool.reserve(&roster, &key_request).await {
            Ok(reservation) => reservation,
            Err(reason) => {
                report_long_wait(&world, &process, &request, began_at, was_healthy);
                return RequestEnd::Unavailable(reason);
            }
        };
        report_long_wait(&world, &process, &request, began_at, was_healthy);
        let mut lease = reservation.lease;
        let admission = world.admit(&process, &lease, request.estimate);
        let _admission = AdmissionGuard(&world, admission);
        let key = std::sync::Arc::clone(lease.key());
        lease.mark_sent();
        let refusal = match world.provider.start_request(key.position(), request.cost, request.estimate) {
            Ok(running) => {
                sleep(request.duration).await;
                running.charge(clock::instant());
                let now = clock::now();
                pool.charge(&roster, &mut lease, request.cost, now);
                let began_at = lease.reserved_at();
                let attempt = ServedAttempt { request: Some(&key_request), began_at, is_charged: true };
                pool.record_service(&roster, &key, attempt, now);
                world.violations.served.set(world.violations.served.get() + 1);
                return RequestEnd::Served;
            }
            Err(refusal) => refusal,
        };
        let now = clock::now();
        if matches!(refusal, Verdict::WorkspaceQuota(_)) {
            world.record_credit_refusal(&process, admission);
        }
        pool.charge(&roster, &mut lease, 0, now);
        let attempt = RefusedAttempt {
            verdict: refusal,
            request: Some(&key_request),
            is_repeated_elsewhere: false,
            source: RefusalSource::default(),
        };
        pool.record_refusal(&roster, &key, attempt, now);
        if !matches!(refusal, Verdict::Concurrency { .. }) {
            key_request.tried.push(key.position());
        }
    }
    RequestEnd::Unavailable(Unavailable::Tried)
}

/// Records the time that a request has waited. Reports a violation if it was too long although the provider had
/// capacity and no fault had an effect.
fn report_long_wait(
    world: &World,
    process: &Process,
    request: &SimulatedRequest,
    began_at: std::time::Instant,
    was_healthy: bool,
) {
    let wait = clock::elapsed_since(began_at);
    if !was_healthy || !world.is_healthy() {
        return;
    }
    world.violations.longest_wait.set(world.violations.longest_wait.get().max(wait));
    let workspaces = world.provider.workspaces.borrow();
    let has_capacity = |workspace: &&ProviderWorkspace| {
        workspace.left() > request.estimate && clock::elapsed_since(workspace.full_at) > MAX_WAIT
    };
    if wait > MAX_WAIT
        && let Some(index) = workspaces.iter().position(|workspace| has_capacity(&workspace))
    {
        let left = workspaces[index].left();
        world.fail(format!(
            "{} let {request:?} wait for {wait:?} with {left} credits: {}",
            process.id,
            world.describe(process, index)
        ));
    }
}
