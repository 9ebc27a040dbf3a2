//! Simulates the ElevenLabs API offline over HTTP and WebSockets: quotas, workspaces, all known refusals, valid audio,
//! scripted faults, and a ledger of requests and charges. `keychoir simulate` and `keychoir demo` run the simulator,
//! and tests use it as the upstream.
//!
//! The simulator does not use the module `proxy`. It shares the table of refusals and general types with the rest of
//! Keychoir. If it receives a credential of a client, it records a violation, because a proxy must never forward one.
//! Read `service` first, then `refusal`.

mod plan;

mod service;

mod control;
mod query;
mod request;
mod route;

mod audio_operations;
mod context;
mod free_operations;
mod operations;
mod speech;

mod credentials;
mod socket;

mod fault;
mod fault_response;
mod refusal;
mod script;

mod accounts;
mod entitlement;
mod ledger;
mod provider;
mod tokens;

mod conversations;
mod history;
mod models;
mod music;
mod resources;
mod sound;
mod subscription;

mod base64;
mod encoding;
mod response;
mod response_body;
mod tracked_stream;

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
pub use self::fault::{Fault, FaultError, SessionFault};
pub use self::ledger::{
    KeyEntry, Ledger, RequestSummary, SocketClose, SocketSummary, Totals, WorkspaceEntry,
};
pub use self::plan::{
    AgentPlan, Billing, KeyPlan, Plan, PlanError, RefusalWording, ReportedLimit, WorkspacePlan,
};
pub use self::refusal::{RefusalKind, UnknownRefusal};

use self::provider::{FaultTarget, Provider};
use self::script::Script;
use self::service::Service;
use self::tracked_stream::TrackedStream;

/// Timeout for receiving a request head.
const REQUEST_HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Delay after a connection could not be accepted, for example because the process has too many open files.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(20);

/// A running simulator. It serves until it is stopped or dropped.
#[derive(Debug)]
pub struct Simulator {
    address: SocketAddr,
    provider: Provider,
    tasks: Tasks,
    /// Dropping the sender ends all connections.
    shutdown_sender: watch::Sender<()>,
}

impl Simulator {
    /// Serves `plan` on `listener` over plain HTTP/1.1.
    ///
    /// # Errors
    ///
    /// Fails if the plan contradicts itself (see [`Plan::validate`]), or the listener has no address.
    pub async fn start(listener: TcpListener, plan: Plan) -> io::Result<Simulator> {
        plan.validate().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let address = listener.local_addr()?;
        let (provider, tasks) = (Provider::new(plan), Tasks::new());
        let (shutdown_sender, shutdown) = watch::channel(());
        let accept_loop = accept_connections(listener, provider.clone(), tasks.clone(), shutdown.clone());
        spawn_until(shutdown, &tasks, accept_loop);
        Ok(Self { address, provider, tasks, shutdown_sender })
    }

    /// Returns the address of the listener.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns `http://ADDRESS:PORT`, which a client uses instead of the provider's base URL.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Returns the requests and charges since startup. A request is included before its response is sent.
    #[must_use]
    pub fn ledger(&self) -> Ledger {
        self.provider.ledger()
    }

    /// Waits until the ledger fulfils `condition`, so that a test need not sleep. The wait has no timeout.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only ends the wait.
    pub async fn wait_for_ledger(&self, mut condition: impl FnMut(&Ledger) -> bool) -> Ledger {
        let mut changes = self.provider.changes();
        loop {
            changes.mark_unchanged();
            let ledger = self.provider.ledger();
            if condition(&ledger) {
                return ledger;
            }
            // Waiting cannot fail, because the sender lives as long as `self`.
            let _changed = changes.changed().await;
        }
    }

    /// Appends `faults` to the queue of a key. Each of its next requests takes one. If the key is not in the plan, a
    /// violation is recorded, so that a test with a typo fails.
    pub fn queue_faults(&self, key: &str, faults: Vec<Fault>) {
        self.update_script(FaultTarget::Key(key), |script| script.queue(None, faults));
    }

    /// Appends `faults` to the queue of a key for one route only, see [`Simulator::set_route_fault`].
    pub fn queue_route_faults(&self, key: &str, route: &str, faults: Vec<Fault>) {
        self.update_script(FaultTarget::Key(key), |script| script.queue(Some(route), faults));
    }

    /// Sets the permanent fault of a key, which applies while its queue of faults is empty. `None` removes the fault.
    /// If the key is not in the plan, a violation is recorded.
    pub fn set_fault(&self, key: &str, fault: Option<Fault>) {
        self.update_script(FaultTarget::Key(key), |script| script.set_permanent(None, fault));
    }

    /// Sets the permanent fault of a key on a route. `None` removes the fault. `route` is the prefix of
    /// a path, such as `/v1/dubbing`, or a method and the prefix of a path, such as `POST
    /// /v1/voices`. A fault of a route takes precedence over the faults of the key, and does not
    /// affect other routes. With [`Fault::Pass`] the route is served in spite of other faults.
    pub fn set_route_fault(&self, key: &str, route: &str, fault: Option<Fault>) {
        self.update_script(FaultTarget::Key(key), |script| script.set_permanent(Some(route), fault));
    }

    /// Sets the permanent fault of a route for requests with any key or none. A fault of a key on
    /// the same route takes precedence.
    pub fn set_route_fault_for_all(&self, route: &str, fault: Option<Fault>) {
        self.update_script(FaultTarget::AllRequests, |script| script.set_permanent(Some(route), fault));
    }

    fn update_script(&self, target: FaultTarget<'_>, update: impl FnOnce(&mut Script)) {
        if !self.provider.update_script(target, update) {
            self.provider.record_violation("a fault was set for a key that is not in the plan".to_owned());
        }
    }

    /// Closes all connections, even in the middle of a response, and waits until they are closed.
    pub async fn stop(self) {
        drop(self.shutdown_sender);
        self.tasks.wait_until_ended().await;
    }
}

/// Accepts connections until the simulator ends, and serves each in a separate task.
async fn accept_connections(
    listener: TcpListener,
    provider: Provider,
    tasks: Tasks,
    shutdown: watch::Receiver<()>,
) {
    loop {
        let Ok((stream, _peer)) = listener.accept().await else {
            tokio::time::sleep(ACCEPT_RETRY_DELAY).await;
            continue;
        };
        let connection = serve_connection(stream, provider.clone(), tasks.clone(), shutdown.clone());
        spawn_until(shutdown.clone(), &tasks, connection);
    }
}

/// Runs `future` until it completes or the simulator ends.
fn spawn_until(
    mut shutdown: watch::Receiver<()>,
    tasks: &Tasks,
    future: impl Future<Output = ()> + Send + 'static,
) {
    tasks.spawn(async move {
        tokio::select! {
            () = future => {}
            // The receiver reports a change when the sender is dropped.
            _ = shutdown.changed() => {}
        }
    });
}

async fn serve_connection(
    stream: TcpStream,
    provider: Provider,
    tasks: Tasks,
    shutdown: watch::Receiver<()>,
) {
    // Responses are streamed in small chunks. If the option cannot be set, the chunks are only delayed.
    let _set = stream.set_nodelay(true);
    let (stream, flushes) = TrackedStream::new(stream);
    let service = Service { provider, tasks, flushes, shutdown };
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_HEAD_TIMEOUT)
        .serve_connection(stream, service_fn(move |request| service.clone().respond(request)))
        .with_upgrades();
    // An error means that the client disconnected or a fault closed the connection. The ledger
    // records both.
    let _ended = connection.await;
}
