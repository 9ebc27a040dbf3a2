//! Usage records and ownership changes, which the proxy writes to the usage store.

mod batch;
mod queue;
mod record;

pub use batch::UsageBatch;
pub use queue::{Depth, QueueFull, UsagePermit, UsageQueue, UsageSink};
pub use record::{AttemptRecord, CreditSource, OwnershipUpdate, QuotaCharge};
