//! Defines usage records and ownership updates, and queues them for the usage store.

mod batch;
mod queue;
mod record;

pub use batch::UsageBatch;
pub use queue::{QueueDepth, QueueFull, UsagePermit, UsageQueue, UsageSink};
pub use record::{AttemptRecord, CreditSource, OwnershipUpdate, QuotaCharge};
