//! A request's way through the house. `exchange` is the file to read first: the ten steps, from
//! top to bottom.

mod exchange;

mod accounts;
mod answer;
mod attempt;
mod bond;
mod case;
mod conversation;
mod head;
mod hints;
mod homes;
mod journey;
mod misses;
mod permits;
mod redaction;
mod refusals;
mod relay;
mod retries;
mod seats;
mod socket;

mod books;
mod error;
mod journal;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::policy::client::Clients;
use crate::policy::headers::Forwarded;
use crate::policy::min_rate::MinRate;
use crate::policy::origin::Doors;
use crate::pool::{Owners, Pool};
use crate::telemetry::Meters;
use crate::upstream::{Connect, Direct, Upstream};

pub use crate::body::budget::BufferBudget;
pub use accounts::{Accounts, TurnedAway, Used};
pub use books::{
    AttemptRecord, Books, Common, CreditSource, Depth, Name, NoPlace, Ownership, Place, Queue, QuotaCharge,
    Row, Sheet,
};
pub use conversation::{Conversation, Ended};
pub use error::ProxyError;
pub use exchange::Exchanged;
pub use head::{look_up, strip};
use hints::Hints;
use homes::Homes;
use misses::Misses;
pub use redaction::{BuffersFull, Unredacted};
pub use relay::ResponseBody;
use retries::Retries;
pub use seats::NoSeat;
use seats::RequestLimiter;
pub use socket::{Bounds as SocketBounds, Socket};

/// Bounds and switches of a request's way.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Requests under way at once.
    pub requests_max: usize,
    /// Of these, requests of one client that has no limit of its own.
    pub max_requests_per_client: u32,
    /// Credits that a request takes from its client's quota when neither an estimate nor its answer names
    /// its price.
    pub unpriced_credits: u64,
    /// Requests without an estimate that a client with a quota of credits may have under way.
    pub max_unpriced_requests: u32,
    /// How long a client may pause within a request's body.
    pub body_idle_max: Duration,
    /// How slowly it may send that.
    pub body_min_rate: MinRate,
    /// Attempts that one request may have.
    pub attempts_max: u32,
    /// After this span no further attempt begins.
    pub replay_max: Duration,
    /// What is read of an error body to judge it.
    pub error_body_bytes_max: usize,
    /// How long that reading may take.
    pub error_body_max: Duration,
    /// How long a request's text is waited for, to know what it will cost; zero does not look.
    pub foresee_max: Duration,
    /// Whether endpoints that could harm the pool are denied.
    pub denies_dangerous: bool,
    /// What is looked at of an answer for the identifiers it gives.
    pub owned_bytes_max: usize,
    /// How long it is remembered that no account has what a request named.
    pub not_found_ttl: Duration,
    /// Whether keys and what describes their owner are taken out of answers.
    pub redacts: bool,
    /// Headers that are passed on although proxies before us made them.
    pub forwarded: Forwarded,
    /// What all that is buffered for requests, answers and sockets takes of.
    pub buffers: BufferBudget,
    /// What stands instead of the provider's host in the addresses of sockets that answers give.
    pub socket_base: Option<Arc<str>>,
    /// Bounds of sessions on sockets.
    pub sockets: SocketBounds,
}

/// What a reload may change for the next request: who may ask, and within which bounds.
#[derive(Clone, Debug)]
pub struct Terms {
    /// Who may ask.
    pub clients: Clients,
    /// What they have used and have under way.
    pub accounts: Accounts,
    /// Bounds and switches.
    pub limits: Limits,
    /// Which names are ours, and which pages may speak to us.
    pub doors: Doors,
    /// A path that stands before every path of ours and of the provider, without a slash at its end;
    /// empty for none.
    pub base_path: String,
}

/// The terms as they are now. A request loads them once and goes by them to its end.
pub type SharedTerms = Arc<ArcSwap<Terms>>;

/// Everything a request meets on its way. Its connections to the provider are for one core; all else
/// is shared by all.
#[derive(Debug)]
pub struct Proxy<C = Direct> {
    terms: SharedTerms,
    pool: Arc<Pool>,
    upstream: Upstream<C>,
    owners: Arc<Owners>,
    homes: Arc<Homes>,
    misses: Arc<Misses>,
    books: Books,
    retries: Arc<Retries>,
    hints: Arc<Hints>,
    limiter: RequestLimiter,
    meters: Meters,
    /// Where conversations go whose price is not known.
    ended: Ended,
    /// Is cancelled before requests are cut at the end of the program.
    cut: CancellationToken,
}

/// What a proxy shares with the rest of the house.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Who may ask, and within which bounds.
    pub terms: SharedTerms,
    /// The keys.
    pub pool: Arc<Pool>,
    /// What belongs to whom.
    pub owners: Arc<Owners>,
    /// Where it is written down.
    pub books: Books,
    /// Where it is counted.
    pub meters: Meters,
    /// Where conversations go whose price is not known.
    pub ended: Ended,
}

impl<C> Proxy<C> {
    /// A proxy of these parts. `cut` is cancelled before requests are cut at the end of the program.
    pub fn new(shared: Shared, upstream: Upstream<C>, cut: CancellationToken) -> Self {
        let Shared { terms, pool, owners, books, meters, ended } = shared;
        Self {
            terms,
            pool,
            upstream,
            owners,
            homes: Arc::default(),
            misses: Arc::default(),
            books,
            retries: Arc::new(Retries::new()),
            hints: Arc::default(),
            limiter: RequestLimiter::default(),
            meters,
            ended,
            cut,
        }
    }

    /// The same proxy for one of so many cores, with connections of its own to the provider.
    #[must_use]
    pub fn for_core(&self, cores: usize) -> Self
    where
        C: Connect + Clone,
    {
        Self {
            terms: Arc::clone(&self.terms),
            pool: Arc::clone(&self.pool),
            upstream: self.upstream.for_core(cores),
            owners: Arc::clone(&self.owners),
            homes: Arc::clone(&self.homes),
            misses: Arc::clone(&self.misses),
            books: self.books.clone(),
            retries: Arc::clone(&self.retries),
            hints: Arc::clone(&self.hints),
            limiter: self.limiter.clone(),
            meters: self.meters.clone(),
            ended: self.ended.clone(),
            cut: self.cut.clone(),
        }
    }
}
