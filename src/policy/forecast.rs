//! Forecasts when credits run out at the current rate of spending.

use std::time::Duration;

use super::budget::Quota;
use super::units::UnixMs;

/// Recent spending, decayed exponentially: half of it is left after [`HALF_LIFE`]. A number and its time,
/// so that both fit one word.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spending {
    /// Credits, decayed by their age.
    pub credits: f32,
    /// The time of `credits`, in seconds since 1970.
    pub at_s: u32,
}

/// Longer than the pauses of a working day, which should not change the rate, and short enough that a
/// lasting change of use changes it.
pub const HALF_LIFE: Duration = Duration::from_secs(6 * 3_600);

impl Spending {
    /// The decayed value at `now`.
    #[must_use]
    pub fn at(self, now: UnixMs) -> Self {
        let at_s = u32::try_from(now.0 / 1_000).unwrap_or(u32::MAX);
        let elapsed = at_s.saturating_sub(self.at_s);
        let halvings = f64::from(elapsed) / HALF_LIFE.as_secs_f64();
        #[expect(clippy::cast_possible_truncation, reason = "a rate for people")]
        Self { credits: (f64::from(self.credits) * 0.5_f64.powf(halvings)) as f32, at_s: at_s.max(self.at_s) }
    }

    /// With `credits` spent at `now` added.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    pub fn and(self, credits: u64, now: UnixMs) -> Self {
        let before = self.at(now);
        Self { credits: before.credits + credits as f32, ..before }
    }

    /// The rate at `now`, in credits per day.
    #[must_use]
    pub fn per_day(self, now: UnixMs) -> f64 {
        let per_second = f64::from(self.at(now).credits) * std::f64::consts::LN_2 / HALF_LIFE.as_secs_f64();
        per_second * 86_400.0
    }
}

/// The forecast for a workspace's credits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forecast {
    /// Unknown, because the limit is unknown or unlimited, or nothing is spent.
    Unknown,
    /// The credits last until their reset.
    Lasts,
    /// The credits run out at this moment, before their reset.
    SpentBy(UnixMs),
}

/// Forecasts when the remaining credits run out, at `per_day` credits per day.
#[must_use]
pub fn forecast(quota: &Quota, per_day: f64, now: UnixMs) -> Forecast {
    let Some(left) = quota.spendable() else { return Forecast::Unknown };
    forecast_of(left, quota.resets_at, per_day, now)
}

/// Forecasts when `left` credits run out, which are reset at `resets_at`.
#[must_use]
pub fn forecast_of(left: u64, resets_at: Option<UnixMs>, per_day: f64, now: UnixMs) -> Forecast {
    // A rate below one credit per day counts as none.
    if per_day < 1.0 {
        return Forecast::Unknown;
    }
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a date for people, saturating"
    )]
    let span_ms = (left as f64 / per_day * 86_400_000.0) as u64;
    let spent_by = UnixMs(now.0.saturating_add(span_ms));
    match resets_at {
        Some(reset) if reset <= spent_by => Forecast::Lasts,
        Some(_) | None => Forecast::SpentBy(spent_by),
    }
}

#[cfg(test)]
mod tests {
    use super::super::budget::Extension;
    use super::*;

    const DAY: u64 = 86_400_000;
    const NOW: UnixMs = UnixMs(20_000 * DAY);

    fn quota(count: u64, resets_in_days: Option<u64>) -> Quota {
        Quota {
            count,
            limit: Some(1_000),
            extension: Extension::None,
            resets_at: resets_in_days.map(|days| UnixMs(NOW.0 + days * DAY)),
        }
    }

    #[test]
    fn a_forecast_divides_the_remaining_credits_by_their_rate() {
        assert_eq!(forecast(&quota(500, Some(9)), 100.0, NOW), Forecast::SpentBy(UnixMs(NOW.0 + 5 * DAY)));
        assert_eq!(forecast(&quota(500, Some(5)), 100.0, NOW), Forecast::Lasts);
        assert_eq!(forecast(&quota(500, None), 100.0, NOW), Forecast::SpentBy(UnixMs(NOW.0 + 5 * DAY)));
        assert_eq!(forecast(&quota(1_000, None), 100.0, NOW), Forecast::SpentBy(NOW));
    }

    #[test]
    fn overage_extends_a_forecast() {
        let some = Quota { extension: Extension::Credits(500), ..quota(500, None) };
        assert_eq!(forecast(&some, 100.0, NOW), Forecast::SpentBy(UnixMs(NOW.0 + 10 * DAY)));
        let unlimited = Quota { extension: Extension::Unlimited, ..some };
        assert_eq!(forecast(&unlimited, 100.0, NOW), Forecast::Unknown);
    }

    #[test]
    fn a_forecast_is_unknown_without_a_rate_or_a_limit() {
        assert_eq!(forecast(&quota(0, None), 0.5, NOW), Forecast::Unknown);
        assert_eq!(forecast(&Quota { limit: None, ..quota(0, None) }, 100.0, NOW), Forecast::Unknown);
    }

    #[test]
    fn a_constant_rate_is_measured() {
        let mut spending = Spending::default();
        let mut now = NOW;
        for _ in 0..10 * 24 * 60 {
            now = UnixMs(now.0 + 60_000);
            spending = spending.and(7, now);
        }
        let per_day = spending.per_day(now);
        assert!((per_day - 7.0 * 24.0 * 60.0).abs() < 50.0, "{per_day}");
    }

    #[test]
    fn old_spending_counts_less() {
        let spending = Spending::default().and(1_000, NOW);
        let later = UnixMs(NOW.0 + 6 * 3_600_000);
        assert!((spending.at(later).credits - 500.0).abs() < 1.0);
        let earlier = UnixMs(NOW.0 - DAY);
        assert!(
            (spending.at(earlier).credits - 1_000.0).abs() < 1.0,
            "a clock that steps back forgets nothing"
        );
    }
}
