//! Logs each change of a workspace's billing discrepancy: the number of credits by which the usage that the provider
//! reports differs from the usage that the pool has counted. The quota poller calls [`log_discrepancies`] once per
//! round of polls.

use crate::policy::quota::Quota;
use crate::pool::Key;
use crate::telemetry::log_discrepancy;

/// The quota that the provider has reported for a key in this round of polls.
pub(super) struct PolledQuota<'a> {
    pub(super) key: &'a Key,
    pub(super) quota: Quota,
    /// The billing discrepancy of the key's workspace before this poll, in credits.
    pub(super) discrepancy_before: i64,
}

/// Logs each workspace whose billing discrepancy was changed by its poll. Must be called after all polls of a
/// round, because the log event names a key of another workspace with an equal quota: the two keys probably belong
/// to one workspace.
pub(super) fn log_discrepancies(quotas: &[PolledQuota<'_>]) {
    for PolledQuota { key, quota, discrepancy_before } in quotas {
        // At the start of a period the discrepancy is zero. A change to zero is not logged.
        let discrepancy = key.workspace().discrepancy();
        let change = discrepancy - discrepancy_before;
        if change == 0 || discrepancy == 0 {
            continue;
        }
        let has_equal_quota = |other: &&PolledQuota<'_>| {
            other.quota.is_same_workspace(quota) && !std::ptr::eq(other.key.workspace(), key.workspace())
        };
        log_discrepancy(key, change, quotas.iter().find(has_equal_quota).map(|other| other.key));
    }
}
