//! A workspace's quota of credits: computes the remaining credits, and decides between the local and the
//! provider's figure when they differ.

use std::time::Duration;

use super::units::UnixMs;

/// Usage-based billing beyond the included credits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Extension {
    /// Disabled: no credits beyond the limit.
    #[default]
    None,
    /// Additional credits, up to this number.
    Credits(u64),
    /// Unlimited additional credits.
    Unlimited,
}

/// The credits of a workspace in its period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quota {
    /// Credits spent in this period.
    pub count: u64,
    /// Credits included in this period; `None` until the provider has reported them, or when the key may
    /// not read them.
    pub limit: Option<u64>,
    /// The credits that may be spent beyond the limit.
    pub extension: Extension,
    /// When the period ends and the count is reset.
    pub resets_at: Option<UnixMs>,
}

impl Quota {
    /// Included credits that are left, as the contract reports them; 0 when the limit is unknown.
    #[must_use]
    pub fn remaining(&self) -> u64 {
        self.limit.unwrap_or(0).saturating_sub(self.count)
    }

    /// Whether no credits are left, overage included. An unknown limit is never spent: the provider
    /// refuses when it is.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.spendable() == Some(0)
    }

    /// Credits that may still be spent, overage included. `None` when they are unknown or unlimited.
    #[must_use]
    pub fn spendable(&self) -> Option<u64> {
        self.ceiling().map(|ceiling| ceiling.saturating_sub(self.count))
    }

    /// The maximum of the count, overage included. `None` when it is unknown or unlimited.
    #[must_use]
    pub fn ceiling(&self) -> Option<u64> {
        match (self.limit, self.extension) {
            (None, _) | (_, Extension::Unlimited) => None,
            (Some(limit), Extension::None) => Some(limit),
            (Some(limit), Extension::Credits(more)) => Some(limit.saturating_add(more)),
        }
    }

    /// The used share of the limit: 0.0 to 1.0, more with overage; 0.0 when the limit is unknown.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people; credits are far below 2^53")]
    pub fn usage_ratio(&self) -> f64 {
        match self.limit {
            None => 0.0,
            Some(0) => 1.0,
            Some(limit) => self.count as f64 / limit as f64,
        }
    }

    /// The used share of the limit in whole percent, rounded down, so that 100 means that nothing is
    /// left.
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

    /// Whether the included credits are used up (100 % and more).
    #[must_use]
    pub fn is_over_limit(&self) -> bool {
        self.limit.is_some_and(|limit| self.count >= limit)
    }

    /// Whether the use is near the limit (`ratio` of it and more).
    #[must_use]
    pub fn is_near_limit(&self, ratio: f64) -> bool {
        self.limit.is_some() && self.usage_ratio() >= ratio
    }

    /// The quota at `now`: after the reset date, a new period has begun.
    #[must_use]
    pub fn at(self, now: UnixMs) -> Self {
        match self.resets_at {
            Some(reset) if reset <= now => Self { count: 0, resets_at: None, ..self },
            Some(_) | None => self,
        }
    }

    /// The quota after the provider has reported `reported`; `idle` is the time since the last spending.
    ///
    /// Within a period the larger count is used, because the provider's figure lags behind the spending
    /// by up to `lag`, and is the larger one when another program uses the same workspace. When nothing
    /// was spent for `lag`, the reported figure is used even if it is smaller: the local count then
    /// includes something that was never charged. Another reset date means another period, for which the
    /// reported figure is used.
    #[must_use]
    pub fn adopt(self, reported: Self, idle: Duration, lag: Duration) -> Self {
        let same_period = self.limit.is_some() && self.resets_at == reported.resets_at;
        let count = if same_period && idle < lag { self.count.max(reported.count) } else { reported.count };
        Self { count, ..reported }
    }
}

/// The difference between the provider's figure and the local one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BillingDiscrepancy {
    /// No comparison is possible: this is the first figure, or one of another period.
    Fresh,
    /// No difference, or one that the lag of the provider may explain.
    Within,
    /// The provider counts this many credits more: another program spends as well, or the cost of some
    /// requests is unknown.
    Above(u64),
    /// The provider counts this many credits fewer, and its lag is over: they were never charged.
    Below(u64),
}

impl Quota {
    /// How `reported` differs from this local figure before it is [adopted](Self::adopt); `idle` and
    /// `lag` are the same there.
    #[must_use]
    pub fn drift(self, reported: Self, idle: Duration, lag: Duration) -> BillingDiscrepancy {
        if self.limit.is_none() || self.resets_at != reported.resets_at {
            return BillingDiscrepancy::Fresh;
        }
        match reported.count.checked_sub(self.count) {
            Some(0) => BillingDiscrepancy::Within,
            Some(more) => BillingDiscrepancy::Above(more),
            None if idle < lag => BillingDiscrepancy::Within,
            None => BillingDiscrepancy::Below(self.count - reported.count),
        }
    }

    /// Whether two workspaces have the same figures, so that they must be one workspace that is
    /// configured twice.
    #[must_use]
    pub fn is_twin(&self, other: &Self) -> bool {
        self == other && self.count > 0 && self.resets_at.is_some()
    }
}

/// The probable cause of a discrepancy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Another key of the pool belongs to the same workspace, but is not configured so.
    Twin,
    /// Another program spends, or the cost of some requests is unknown.
    Others,
    /// A charge was recorded that the provider never made.
    NeverCharged,
}

impl Cause {
    /// The cause of a discrepancy of this many credits. `has_twin` says whether another workspace has the
    /// same figures.
    #[must_use]
    pub fn of(credits: i64, has_twin: bool) -> Self {
        match (credits < 0, has_twin) {
            (true, _) => Self::NeverCharged,
            (false, true) => Self::Twin,
            (false, false) => Self::Others,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESET: UnixMs = UnixMs(2_000);
    const LAG: Duration = Duration::from_secs(60);
    const FRESH: Quota =
        Quota { count: 0, limit: Some(100), extension: Extension::None, resets_at: Some(RESET) };

    fn used(count: u64) -> Quota {
        Quota { count, ..FRESH }
    }

    #[test]
    fn limits_hold_on_both_sides_of_their_boundaries() {
        assert!(!used(79).is_near_limit(0.8) && used(80).is_near_limit(0.8));
        assert!(!used(99).is_over_limit() && used(100).is_over_limit());
        assert!(!used(99).is_spent() && used(100).is_spent() && used(101).is_spent());
        assert_eq!((used(99).remaining(), used(101).remaining()), (1, 0));
    }

    #[test]
    fn percent_are_whole_and_rounded_down() {
        let percent = |count, limit| Quota { count, limit: Some(limit), ..FRESH }.usage_percent();
        assert_eq!(
            (percent(5_420, 100_000), percent(99_999, 100_000), percent(100_000, 100_000)),
            (5, 99, 100)
        );
        assert_eq!((percent(0, 0), percent(u64::MAX, 1)), (100, u64::MAX));
    }

    #[test]
    fn overage_is_spendable_beyond_the_limit() {
        let some = Quota { extension: Extension::Credits(50), ..used(149) };
        assert!(some.is_over_limit() && !some.is_spent());
        assert!(Quota { count: 150, ..some }.is_spent());
        assert!(!Quota { extension: Extension::Unlimited, ..used(u64::MAX) }.is_spent());
    }

    #[test]
    fn an_unknown_limit_is_never_reached() {
        let unknown = Quota { limit: None, ..used(1_000) };
        assert!(!unknown.is_spent() && !unknown.is_over_limit() && !unknown.is_near_limit(0.0));
        assert_eq!((unknown.remaining(), unknown.usage_ratio()), (0, 0.0));
    }

    #[test]
    fn an_account_without_credits_is_over_its_limit() {
        let empty = Quota { limit: Some(0), ..FRESH };
        assert!(empty.is_spent() && empty.is_over_limit());
        assert_eq!(empty.usage_ratio(), 1.0);
    }

    #[test]
    fn the_reset_date_begins_a_new_period() {
        assert_eq!(used(100).at(UnixMs(1_999)), used(100));
        let next = used(100).at(RESET);
        assert_eq!((next.count, next.resets_at, next.limit), (0, None, Some(100)));
    }

    #[track_caller]
    fn check_adopted(ours: u64, reported: Quota, idle_secs: u64, expected: u64) {
        let adopted = used(ours).adopt(reported, Duration::from_secs(idle_secs), LAG);
        assert_eq!(adopted, Quota { count: expected, ..reported });
    }

    #[test]
    fn a_lagging_figure_returns_no_credits() {
        check_adopted(50, used(30), 59, 50);
    }

    #[test]
    fn spending_of_other_programs_counts() {
        check_adopted(50, used(70), 0, 70);
    }

    #[test]
    fn a_figure_older_than_the_lag_is_adopted() {
        check_adopted(50, used(30), 60, 30);
    }

    #[track_caller]
    fn check_drift(reported: Quota, idle_secs: u64, expected: BillingDiscrepancy) {
        assert_eq!(used(50).drift(reported, Duration::from_secs(idle_secs), LAG), expected);
        // An adopted figure has no discrepancy any more.
        let adopted = used(50).adopt(reported, Duration::from_secs(idle_secs), LAG);
        assert_eq!(adopted.drift(reported, Duration::ZERO, LAG), BillingDiscrepancy::Within);
    }

    #[test]
    fn a_drift_is_a_difference_that_the_lag_does_not_explain() {
        check_drift(used(50), 0, BillingDiscrepancy::Within);
        check_drift(used(51), 0, BillingDiscrepancy::Above(1));
        check_drift(used(51), 60, BillingDiscrepancy::Above(1));
        check_drift(used(49), 59, BillingDiscrepancy::Within);
        check_drift(used(49), 60, BillingDiscrepancy::Below(1));
    }

    #[test]
    fn another_period_or_a_first_figure_is_no_drift() {
        check_drift(Quota { resets_at: Some(UnixMs(9_000)), ..used(99) }, 0, BillingDiscrepancy::Fresh);
        let unknown = Quota { limit: None, ..used(50) };
        assert_eq!(unknown.drift(used(99), Duration::ZERO, LAG), BillingDiscrepancy::Fresh);
    }

    #[test]
    fn only_equal_figures_are_twins() {
        assert!(used(50).is_twin(&used(50)));
        assert!(!used(50).is_twin(&used(51)));
        assert!(!used(0).is_twin(&used(0)), "all new workspaces have these figures");
        let dateless = Quota { resets_at: None, ..used(50) };
        assert!(!dateless.is_twin(&dateless));
        assert_eq!(Cause::of(5, true), Cause::Twin);
        assert_eq!(Cause::of(5, false), Cause::Others);
        assert_eq!(Cause::of(-5, true), Cause::NeverCharged);
    }

    #[test]
    fn a_new_period_adopts_the_figure_of_the_provider() {
        check_adopted(50, Quota { resets_at: Some(UnixMs(9_000)), ..used(3) }, 0, 3);
        check_adopted(50, Quota { resets_at: None, ..used(3) }, 0, 3);
    }
}
