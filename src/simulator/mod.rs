//! An offline ElevenLabs: quotas that run out, workspaces, every known refusal, valid audio, faults
//! on request, and a ledger of requests and charges. `keychoir simulate` and `keychoir demo` use
//! it, and it is the upstream of the tests.
//!
//! It does not depend on the proxy, and is strict with it: a client's credential that is received
//! here is a violation and not an ordinary mistake. Read `service` first, then `shape`.

mod plan;

mod service;

mod control;
mod intake;
mod route;

mod crafts;
mod read;
mod speech;
mod work;

mod grants;
mod socket;

mod fault;
mod script;
mod shape;

mod accounts;
mod entitlement;
mod ledger;
mod tokens;
mod world;

mod conversations;
mod history;
mod models;
mod music;
mod sound;
mod subscription;
mod things;

mod answer;
mod encoding;
mod line;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioTimer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::tasks::Tasks;

pub use self::encoding::{Encoding, UnknownEncoding};
pub use self::fault::{Fault, FaultError, Turn};
pub use self::ledger::{
    KeyEntry, Ledger, RequestSummary, SocketClose, SocketSummary, Totals, WorkspaceEntry,
};
pub use self::plan::{AgentPlan, Billing, KeyPlan, Plan, PlanError, PlanWording, ShownLimit, WorkspacePlan};
pub use self::shape::{Shape, UnknownShape};

use self::line::Line;
use self::script::Script;
use self::service::Service;
use self::world::{Whose, World};

/// Timeout for a request head.
const HEAD_MAX: Duration = Duration::from_secs(30);
/// Delay after an accept that failed for lack of file descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(20);

/// A running simulator. It serves until it is stopped or dropped.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    world: World,
    tasks: Tasks,
    /// Dropped with the simulator, which ends every connection.
    alive: watch::Sender<()>,
}

impl Simulator {
    /// Serves `plan` on `listener`, plain HTTP/1.1.
    ///
    /// # Errors
    ///
    /// When the plan contradicts itself, see [`Plan::check`], or the listener has no address.
    pub async fn start(listener: TcpListener, plan: Plan) -> io::Result<Simulator> {
        plan.check().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let address = listener.local_addr()?;
        let simulator =
            Self { address, world: World::new(&plan), tasks: Tasks::new(), alive: watch::Sender::new(()) };
        let gone = simulator.alive.subscribe();
        let accepting = accept(listener, simulator.world.clone(), simulator.tasks.clone(), gone.clone());
        spawn_until(gone, &simulator.tasks, accepting);
        Ok(simulator)
    }

    /// The address of the listener.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://127.0.0.1:PORT`, in place of the provider's base URL.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The requests and charges so far. A request is included before its response is sent.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.world.ledger()
    }

    /// Waits until the ledger fulfils `condition`, so that a test need not sleep. The caller bounds
    /// the wait.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only stops the wait.
    pub async fn until(&self, mut condition: impl FnMut(&Ledger) -> bool) -> Ledger {
        let mut changes = self.world.changes();
        loop {
            changes.mark_unchanged();
            let ledger = self.world.ledger();
            if condition(&ledger) {
                return ledger;
            }
            // The sender lives as long as `self`, so this cannot fail.
            let _changed = changes.changed().await;
        }
    }

    /// Appends `faults` to the queue of a key; each of its next requests takes one. A key that is
    /// not in the plan is a violation, so that a typing mistake is not silent.
    pub fn script(&self, key: &str, faults: Vec<Fault>) {
        self.change(Whose::Key(key), |script| script.add(None, faults));
    }

    /// The same for requests of one route only: see [`Simulator::always_on`].
    pub fn script_on(&self, key: &str, route: &str, faults: Vec<Fault>) {
        self.change(Whose::Key(key), |script| script.add(Some(route), faults));
    }

    /// Sets the fault of every request with that key whose queue of faults is empty, until this is
    /// called with `None`. A key that is not in the plan is a violation.
    pub fn always(&self, key: &str, fault: Option<Fault>) {
        self.change(Whose::Key(key), |script| script.set(None, fault));
    }

    /// Sets the fault of every request with that key on a route, until this is called with `None`.
    /// `route` is the beginning of a path, such as `/v1/dubbing`, or a method with one, such as
    /// `POST /v1/voices`. A fault of a route takes precedence over those of the key; requests on
    /// other routes are not affected. [`Fault::Pass`] serves the route in spite of the others.
    pub fn always_on(&self, key: &str, route: &str, fault: Option<Fault>) {
        self.change(Whose::Key(key), |script| script.set(Some(route), fault));
    }

    /// The same for every request, with any key or without one. A fault of a key on the same route
    /// takes precedence.
    pub fn for_everybody_on(&self, route: &str, fault: Option<Fault>) {
        self.change(Whose::EveryKey, |script| script.set(Some(route), fault));
    }

    fn change(&self, whose: Whose<'_>, change: impl FnOnce(&mut Script)) {
        if !self.world.with_script(whose, change) {
            self.world.violated("a fault was set for a key that is not in the plan".to_owned());
        }
    }

    /// Closes every connection at once, also in the middle of a response, and waits until they are
    /// closed.
    pub async fn stop(self) {
        let Self { address: _, world: _, tasks, alive } = self;
        drop(alive);
        tasks.ended().await;
    }
}

async fn accept(listener: TcpListener, world: World, tasks: Tasks, gone: watch::Receiver<()>) {
    loop {
        let Ok((stream, _peer)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_REST).await;
            continue;
        };
        let serving = serve(stream, world.clone(), tasks.clone(), gone.clone());
        spawn_until(gone.clone(), &tasks, serving);
    }
}

/// Runs `future` until it completes or the simulator ends.
fn spawn_until(
    mut gone: watch::Receiver<()>,
    tasks: &Tasks,
    future: impl Future<Output = ()> + Send + 'static,
) {
    tasks.spawn(async move {
        tokio::select! {
            () = future => {}
            // Nothing is ever sent: this is the drop of the sender.
            _ = gone.changed() => {}
        }
    });
}

async fn serve(stream: TcpStream, world: World, tasks: Tasks, gone: watch::Receiver<()>) {
    // Streaming needs small chunks; without the option they are only delayed.
    let _set = stream.set_nodelay(true);
    let (line, flushes) = Line::new(stream);
    let service = Service { world, tasks, flushes, gone };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .serve_connection(line, service_fn(move |request| service.clone().answer(request)))
        .with_upgrades();
    // An error is a client that disconnected or a fault that closed the connection: the ledger
    // records both.
    let _ended = connection.await;
}
