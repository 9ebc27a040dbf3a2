//! An offline ElevenLabs: quotas that run out, workspaces, every known way to say no, valid audio,
//! faults on request, and a ledger of what arrived and what it cost. `keychoir simulate` and
//! `keychoir demo` are made of it, and it is the upstream of the tests.
//!
//! It knows nothing of the proxy, and is strict with it: a client's credential that arrives here
//! is a violation and not an ordinary mistake. Read `service` first, then `shape`.

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
pub use self::shape::{Fixed, Shape, UnknownShape};

use self::line::Line;
use self::script::Script;
use self::service::Service;
use self::world::{Whose, World};

/// How long a client may take to send a head.
const HEAD_MAX: Duration = Duration::from_secs(30);
/// How long to wait when the system has no descriptor left for another connection.
const ACCEPT_REST: Duration = Duration::from_millis(20);

/// A running simulator. It serves until it is stopped or dropped.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    world: World,
    tasks: Tasks,
    /// Dropped with the simulator; every connection ends when it is gone.
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

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://127.0.0.1:PORT`, what stands in the place of the provider's host.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What has happened so far. A request is in it before its answer is sent.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.world.ledger()
    }

    /// Waits until the ledger fulfils `condition`, so that a test need not sleep. The caller
    /// bounds the wait.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future stops the waiting and nothing else.
    pub async fn until(&self, mut condition: impl FnMut(&Ledger) -> bool) -> Ledger {
        let mut changes = self.world.changes();
        loop {
            changes.mark_unchanged();
            let ledger = self.world.ledger();
            if condition(&ledger) {
                return ledger;
            }
            // The world outlives this future and with it the sender: there is no error.
            let _changed = changes.changed().await;
        }
    }

    /// Each of the next requests with that key takes the next of `faults`, after those that are
    /// already waiting. A key that is not in the plan is a violation, so that a slip is not silent.
    pub fn script(&self, key: &str, faults: Vec<Fault>) {
        self.change(Whose::Key(key), |script| script.add(None, faults));
    }

    /// The same for requests of one route only: see [`Simulator::always_on`].
    pub fn script_on(&self, key: &str, route: &str, faults: Vec<Fault>) {
        self.change(Whose::Key(key), |script| script.add(Some(route), faults));
    }

    /// Every request with that key meets `fault`, when nothing is scripted, until this is called
    /// with `None`. A key that is not in the plan is a violation.
    pub fn always(&self, key: &str, fault: Option<Fault>) {
        self.change(Whose::Key(key), |script| script.set(None, fault));
    }

    /// Every request with that key meets `fault` on a route, until this is called with `None`.
    /// `route` is the beginning of a path, such as `/v1/dubbing`, or a method with one, such as
    /// `POST /v1/voices`. A fault of a route goes before those of the key; the key's requests on
    /// other routes do not meet it. [`Fault::Pass`] serves the route in spite of the others.
    pub fn always_on(&self, key: &str, route: &str, fault: Option<Fault>) {
        self.change(Whose::Key(key), |script| script.set(Some(route), fault));
    }

    /// The same for every request, whatever its key, also without one. What a key meets on a route
    /// of its own goes before it.
    pub fn for_everybody_on(&self, route: &str, fault: Option<Fault>) {
        self.change(Whose::EveryKey, |script| script.set(Some(route), fault));
    }

    fn change(&self, whose: Whose<'_>, change: impl FnOnce(&mut Script)) {
        if !self.world.with_script(whose, change) {
            self.world.violated("a fault was set for a key that is not in the plan".to_owned());
        }
    }

    /// Ends every connection at once, also in the middle of an answer, and waits until they are gone.
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

/// Runs `future` to its end or to the end of the simulator.
fn spawn_until(
    mut gone: watch::Receiver<()>,
    tasks: &Tasks,
    future: impl Future<Output = ()> + Send + 'static,
) {
    tasks.spawn(async move {
        tokio::select! {
            () = future => {}
            // Nothing is ever sent: this is the sender's end.
            _ = gone.changed() => {}
        }
    });
}

async fn serve(stream: TcpStream, world: World, tasks: Tasks, gone: watch::Receiver<()>) {
    // Small chunks are the point of a stream; where the option is unknown they only come later.
    let _set = stream.set_nodelay(true);
    let (line, flushes) = Line::new(stream);
    let service = Service { world, tasks, flushes, gone };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .serve_connection(line, service_fn(move |request| service.clone().answer(request)))
        .with_upgrades();
    // An error is a client that left or a fault that closed the connection: the ledger has both.
    let _ended = connection.await;
}
