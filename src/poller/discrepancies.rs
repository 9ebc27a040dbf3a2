//! Logs the differences between the quotas that the provider reports and the counts of the pool.

use crate::policy::budget::Quota;
use crate::pool::Key;
use crate::telemetry::log_discrepancy;

/// The quota that the provider reported for a key.
pub(super) struct PolledQuota<'a> {
    pub(super) key: &'a Key,
    pub(super) quota: Quota,
    /// The billing discrepancy of its workspace before this poll.
    pub(super) discrepancy_before: i64,
}

/// Logs the differences between the provider's quotas and the pool's counts. Must be called after all
/// polls, because two keys with equal quotas probably belong to one workspace.
pub(super) fn log_discrepancies(quotas: &[PolledQuota<'_>]) {
    for PolledQuota { key, quota, discrepancy_before } in quotas {
        // At the start of a period the discrepancy is zero. A change to zero is not logged.
        let discrepancy = key.workspace().discrepancy();
        let change = discrepancy - discrepancy_before;
        if change == 0 || discrepancy == 0 {
            continue;
        }
        let is_same_workspace = |other: &&PolledQuota<'_>| {
            other.quota.is_same_workspace(quota) && !std::ptr::eq(other.key.workspace(), key.workspace())
        };
        log_discrepancy(key, change, quotas.iter().find(is_same_workspace).map(|other| other.key));
    }
}
