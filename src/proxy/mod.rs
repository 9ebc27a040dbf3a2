//! Processes requests: client limits, key selection, attempts, relaying and usage records.
//!
//! `app` creates one [`Proxy`] per worker and calls it for each request. `exchange` contains the steps in their order
//! and is the file to read first.

mod exchange;

// Configuration and state.
mod config;
mod state;

// The steps of `exchange` and the modules that they use, in alphabetical order.
mod account_affinity;
mod attempt;
mod base_url_hints;
mod client_usage;
mod conversation;
mod head;
mod list_affinity;
// `negative_cache` caches lookups in other replicas that found nothing. `not_found_cache` caches resources that no
// account has.
mod negative_cache;
mod not_found_cache;
mod ownership_recorder;
mod permits;
mod refusals;
mod relay;
mod replica_link;
mod replica_owners;
mod reply;
mod request_context;
mod request_limiter;
mod request_meta;
mod request_summary;
mod response_redaction;
mod retry_budget;
mod retry_state;
mod socket;
mod socket_limits;
mod upstream_response;

// Records and errors.
mod access_log;
mod error;
mod usage;

pub use crate::body::budget::BufferBudget;
pub use client_usage::{
    AdmissionRequest, ClientActivity, ClientLimitExceeded, ClientPermit, ClientShare, ClientUsage,
    NoStoredUsage, RequestUser, StatementScope, UsageTotals, UserUsageFuture, UserUsageReader,
    UserUsageUnavailable,
};
pub use config::{Limits, RuntimeConfig, SharedConfig};
pub use conversation::{ConversationSender, EndedConversation};
pub use error::{BuffersFull, ProxyError, RedactionFailed};
pub use head::{route, sanitize};
pub use relay::ResponseBody;
pub use replica_link::{
    FoundOwner, LinkFuture, LookupResult, QuotaGrant, QuotaKey, QuotaReply, QuotaStatement, ReplicaLink,
};
pub use reply::{AcceptedSession, ProxyResponse};
pub use request_limiter::Overloaded;
pub use socket_limits::SocketLimits;
pub use state::{Proxy, SharedState};
pub use usage::{
    AttemptRecord, CreditSource, OwnershipUpdate, QueueDepth, QueueFull, QuotaCharge, UsageBatch,
    UsagePermit, UsageQueue, UsageSink,
};
