//! Computes the remaining credits of a workspace from its quota and how near it is to its limit, and reconciles the
//! local count of spent credits with the count that the provider reports. Also measures the difference between the two
//! counts, and determines its probable cause.

use std::time::Duration;

use super::units::UnixMs;

/// Usage-based billing beyond the included credits, which the provider calls a credit limit extension.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Extension {
    /// No credits beyond the limit.
    #[default]
    None,
    /// The contained number of credits beyond the limit.
    Credits(u64),
    /// Unlimited credits beyond the limit.
    Unlimited,
}

/// The credits of a workspace in the current billing period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Credits spent in this period.
    pub count: u64,
    /// Credits that are included in this period, or `None` if the provider has not reported them.
    pub limit: Option<u64>,
    /// The credits that may be spent beyond the limit.
    pub extension: Extension,
    /// The end of the period, at which the count is reset, or `None` if it is unknown.
    pub resets_at: Option<UnixMs>,
}

impl Quota {
    /// Returns the remaining included credits, as in the status document. Returns 0 if the limit is unknown.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.limit.unwrap_or(0).saturating_sub(self.count)
    }

    /// Whether no credits remain, including credits beyond the limit. An unknown limit is never exhausted: the
    /// provider decides which requests it refuses.
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.spendable() == Some(0)
    }

    /// Returns the credits that may still be spent, including credits beyond the limit. Returns `None` if they are
    /// unknown or unlimited.
    #[must_use]
    pub fn spendable(&self) -> Option<u64> {
        self.ceiling().map(|ceiling| ceiling.saturating_sub(self.count))
    }

    /// Returns the maximum of `count`, including the credits beyond the limit. Returns `None` if it is unknown or
    /// unlimited.
    #[must_use]
    pub fn ceiling(&self) -> Option<u64> {
        match (self.limit, self.extension) {
            (None, _) | (_, Extension::Unlimited) => None,
            (Some(limit), Extension::None) => Some(limit),
            (Some(limit), Extension::Credits(extra)) => Some(limit.saturating_add(extra)),
        }
    }

    /// Returns the used fraction of the limit, which is above 1.0 if credits beyond the limit were spent. Returns 0.0
    /// if the limit is unknown, and 1.0 if it is 0.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "credits are far below 2^53")]
    pub fn usage_ratio(&self) -> f64 {
        match self.limit {
            None => 0.0,
            Some(0) => 1.0,
            Some(limit) => self.count as f64 / limit as f64,
        }
    }

    /// Returns the used percentage of the limit, rounded down, so that 100 means that no included credits remain.
    /// Returns 0 if the limit is unknown, and 100 if it is 0.
    #[must_use]
    pub fn usage_percent(&self) -> u64 {
        match self.limit {
            None => 0,
            Some(0) => 100,
            Some(limit) => {
                u64::try_from(u128::from(self.count) * 100 / u128::from(limit)).unwrap_or(u64::MAX)
            }
        }
    }

    /// Whether the included credits are exhausted, which is already the case when the count equals the limit.
    #[must_use]
    pub fn is_over_limit(&self) -> bool {
        self.limit.is_some_and(|limit| self.count >= limit)
    }

    /// Whether at least `ratio` of the limit is used.
    #[must_use]
    pub fn is_near_limit(&self, ratio: f64) -> bool {
        self.limit.is_some() && self.usage_ratio() >= ratio
    }

    /// Returns the quota at `now`. Its count is 0 if the reset date has passed.
    #[must_use]
    pub fn reset_if_due(self, now: UnixMs) -> Self {
        match self.resets_at {
            Some(reset) if reset <= now => Self { count: 0, resets_at: None, ..self },
            Some(_) | None => self,
        }
    }

    /// Reconciles the local quota with the `reported` quota. `idle` is the time since credits were last spent
    /// locally.
    ///
    /// Within a period, the larger count is used. The reported count lags behind by up to `lag`, and is larger
    /// if another program uses the same workspace. After `lag` without spending, the reported count is used even
    /// if it is smaller, because the local count then includes requests that were never charged. A different
    /// reset date means a new period, for which the reported count is used.
    #[must_use]
    pub fn reconcile(self, reported: Self, idle: Duration, lag: Duration) -> Self {
        let same_period = self.limit.is_some() && self.resets_at == reported.resets_at;
        let count = if same_period && idle < lag { self.count.max(reported.count) } else { reported.count };
        Self { count, ..reported }
    }
}

/// The difference between the provider's count of spent credits and the local count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BillingDiscrepancy {
    /// The counts are not comparable: no count was known, or the reset date differs.
    Incomparable,
    /// The counts are equal, or the lag of the provider's count may explain their difference.
    WithinLag,
    /// The provider's count is higher by the contained number of credits.
    ProviderHigher(u64),
    /// The provider's count is lower by the contained number of credits, although the lag has passed.
    ProviderLower(u64),
}

impl Quota {
    /// Compares this local quota with the `reported` quota. `idle` and `lag` have the same meaning as in
    /// [`reconcile`](Self::reconcile).
    #[must_use]
    pub fn discrepancy(self, reported: Self, idle: Duration, lag: Duration) -> BillingDiscrepancy {
        if self.limit.is_none() || self.resets_at != reported.resets_at {
            return BillingDiscrepancy::Incomparable;
        }
        match reported.count.checked_sub(self.count) {
            Some(0) => BillingDiscrepancy::WithinLag,
            Some(excess) => BillingDiscrepancy::ProviderHigher(excess),
            None if idle < lag => BillingDiscrepancy::WithinLag,
            None => BillingDiscrepancy::ProviderLower(self.count - reported.count),
        }
    }

    /// Whether two quotas are equal and in use, so that they probably belong to one workspace that is configured
    /// twice. Unused quotas do not count, because all new workspaces have equal quotas.
    #[must_use]
    pub fn is_same_workspace(&self, other: &Self) -> bool {
        self == other && self.count > 0 && self.resets_at.is_some()
    }
}

/// The probable cause of a discrepancy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscrepancyCause {
    /// Another key of the pool belongs to the same workspace, but the configuration assigns that key to a different
    /// workspace.
    SharedWorkspace,
    /// Another program uses the workspace, or the cost of some requests is unknown.
    OtherProgram,
    /// The provider has not made a charge that Keychoir has recorded.
    Uncharged,
}

impl DiscrepancyCause {
    /// Determines the cause of a discrepancy of `credits`, which is negative if the provider counts fewer.
    /// `has_equal_quota` is true if another workspace of the pool has the same quota.
    #[must_use]
    pub fn new(credits: i64, has_equal_quota: bool) -> Self {
        match (credits < 0, has_equal_quota) {
            (true, _) => Self::Uncharged,
            (false, true) => Self::SharedWorkspace,
            (false, false) => Self::OtherProgram,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESET: UnixMs = UnixMs(2_000);
    const LAG: Duration = Duration::from_secs(60);
    const UNUSED: Quota =
        Quota { count: 0, limit: Some(100), extension: Extension::None, resets_at: Some(RESET) };

    fn used(count: u64) -> Quota {
        Quota { count, ..UNUSED }
    }

    #[test]
    fn limits_include_their_boundaries() {
        assert!(!used(79).is_near_limit(0.8) && used(80).is_near_limit(0.8));
        assert!(!used(99).is_over_limit() && used(100).is_over_limit());
        assert!(!used(99).is_exhausted() && used(100).is_exhausted() && used(101).is_exhausted());
        assert_eq!((used(99).remaining(), used(101).remaining()), (1, 0));
    }

    #[test]
    fn the_percentage_is_rounded_down() {
        let percent = |count, limit| Quota { count, limit: Some(limit), ..UNUSED }.usage_percent();
        assert_eq!(
            (percent(5_420, 100_000), percent(99_999, 100_000), percent(100_000, 100_000)),
            (5, 99, 100)
        );
        assert_eq!((percent(0, 0), percent(u64::MAX, 1)), (100, u64::MAX));
    }

    #[test]
    fn an_extension_is_spendable_beyond_the_limit() {
        let extended = Quota { extension: Extension::Credits(50), ..used(149) };
        assert!(extended.is_over_limit() && !extended.is_exhausted());
        assert!(Quota { count: 150, ..extended }.is_exhausted());
        assert!(!Quota { extension: Extension::Unlimited, ..used(u64::MAX) }.is_exhausted());
    }

    #[test]
    fn an_unknown_limit_is_never_reached() {
        let unknown = Quota { limit: None, ..used(1_000) };
        assert!(!unknown.is_exhausted() && !unknown.is_over_limit() && !unknown.is_near_limit(0.0));
        assert_eq!((unknown.remaining(), unknown.usage_ratio()), (0, 0.0));
    }

    #[test]
    fn a_limit_of_zero_is_always_reached() {
        let empty = Quota { limit: Some(0), ..UNUSED };
        assert!(empty.is_exhausted() && empty.is_over_limit());
        assert_eq!(empty.usage_ratio(), 1.0);
    }

    #[test]
    fn the_reset_date_starts_a_new_period() {
        assert_eq!(used(100).reset_if_due(UnixMs(1_999)), used(100));
        let next = used(100).reset_if_due(RESET);
        assert_eq!((next.count, next.resets_at, next.limit), (0, None, Some(100)));
    }

    #[track_caller]
    fn check_reconciled(local: u64, reported: Quota, idle_secs: u64, expected: u64) {
        let reconciled = used(local).reconcile(reported, Duration::from_secs(idle_secs), LAG);
        assert_eq!(reconciled, Quota { count: expected, ..reported });
    }

    #[test]
    fn a_lagging_report_does_not_lower_the_count() {
        check_reconciled(50, used(30), 59, 50);
    }

    #[test]
    fn spending_of_other_programs_is_included() {
        check_reconciled(50, used(70), 0, 70);
    }

    #[test]
    fn the_reported_count_is_used_after_the_lag() {
        check_reconciled(50, used(30), 60, 30);
    }

    #[track_caller]
    fn check_discrepancy(reported: Quota, idle_secs: u64, expected: BillingDiscrepancy) {
        assert_eq!(used(50).discrepancy(reported, Duration::from_secs(idle_secs), LAG), expected);
        // Reconciliation removes the discrepancy.
        let reconciled = used(50).reconcile(reported, Duration::from_secs(idle_secs), LAG);
        assert_eq!(reconciled.discrepancy(reported, Duration::ZERO, LAG), BillingDiscrepancy::WithinLag);
    }

    #[test]
    fn a_discrepancy_is_a_difference_that_the_lag_does_not_explain() {
        check_discrepancy(used(50), 0, BillingDiscrepancy::WithinLag);
        check_discrepancy(used(51), 0, BillingDiscrepancy::ProviderHigher(1));
        check_discrepancy(used(51), 60, BillingDiscrepancy::ProviderHigher(1));
        check_discrepancy(used(49), 59, BillingDiscrepancy::WithinLag);
        check_discrepancy(used(49), 60, BillingDiscrepancy::ProviderLower(1));
    }

    #[test]
    fn the_first_count_and_another_period_are_not_comparable() {
        check_discrepancy(
            Quota { resets_at: Some(UnixMs(9_000)), ..used(99) },
            0,
            BillingDiscrepancy::Incomparable,
        );
        let unknown = Quota { limit: None, ..used(50) };
        assert_eq!(unknown.discrepancy(used(99), Duration::ZERO, LAG), BillingDiscrepancy::Incomparable);
    }

    #[test]
    fn equal_quotas_in_use_belong_to_the_same_workspace() {
        assert!(used(50).is_same_workspace(&used(50)));
        assert!(!used(50).is_same_workspace(&used(51)));
        assert!(
            !used(0).is_same_workspace(&used(0)),
            "the equal quotas of two new workspaces must not count"
        );
        let without_reset_date = Quota { resets_at: None, ..used(50) };
        assert!(!without_reset_date.is_same_workspace(&without_reset_date));
        assert_eq!(DiscrepancyCause::new(5, true), DiscrepancyCause::SharedWorkspace);
        assert_eq!(DiscrepancyCause::new(5, false), DiscrepancyCause::OtherProgram);
        assert_eq!(DiscrepancyCause::new(-5, true), DiscrepancyCause::Uncharged);
    }

    #[test]
    fn the_reported_count_is_used_in_a_new_period() {
        check_reconciled(50, Quota { resets_at: Some(UnixMs(9_000)), ..used(3) }, 0, 3);
        check_reconciled(50, Quota { resets_at: None, ..used(3) }, 0, 3);
    }
}
