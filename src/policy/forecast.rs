//! Measures the recent rate of spending, and forecasts when credits run out at this rate.

use std::time::Duration;

use super::quota::Quota;
use super::units::UnixMs;

/// Recent spending, which decays exponentially with the half-life [`HALF_LIFE`]. Both fields fit into one
/// atomic 64-bit integer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spending {
    /// The spent credits, decayed by their age.
    pub credits: f32,
    /// The time to which `credits` is decayed, in seconds since 1970.
    pub at_s: u32,
}

/// The half-life of spending. It is longer than the breaks of a working day, which should not change the rate, and
/// short enough for the rate to follow a lasting change.
pub const HALF_LIFE: Duration = Duration::from_secs(6 * 3_600);

impl Spending {
    /// Decays the spending to `now`.
    #[must_use]
    pub fn decayed_to(self, now: UnixMs) -> Self {
        let at_s = u32::try_from(now.0 / 1_000).unwrap_or(u32::MAX);
        let elapsed = at_s.saturating_sub(self.at_s);
        let halvings = f64::from(elapsed) / HALF_LIFE.as_secs_f64();
        #[expect(clippy::cast_possible_truncation, reason = "a displayed rate needs no precision")]
        Self { credits: (f64::from(self.credits) * 0.5_f64.powf(halvings)) as f32, at_s: at_s.max(self.at_s) }
    }

    /// Adds credits that were spent at `now`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a displayed rate needs no precision")]
    pub fn add(self, credits: u64, now: UnixMs) -> Self {
        let decayed = self.decayed_to(now);
        Self { credits: decayed.credits + credits as f32, ..decayed }
    }

    /// Returns the rate at `now` in credits per day.
    #[must_use]
    pub fn per_day(self, now: UnixMs) -> f64 {
        let per_second =
            f64::from(self.decayed_to(now).credits) * std::f64::consts::LN_2 / HALF_LIFE.as_secs_f64();
        per_second * 86_400.0
    }
}

/// The forecast of the credits of a workspace or of the whole pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forecast {
    /// The limit is unknown or unlimited, or credits are not being spent.
    Unknown,
    /// The credits last until their reset.
    LastsUntilReset,
    /// The credits run out at the contained time, before their reset.
    ExhaustedAt(UnixMs),
}

/// Forecasts when the credits of a quota run out at `per_day` credits per day.
#[must_use]
pub fn forecast(quota: &Quota, per_day: f64, now: UnixMs) -> Forecast {
    let Some(remaining) = quota.spendable() else { return Forecast::Unknown };
    forecast_remaining(remaining, quota.resets_at, per_day, now)
}

/// Forecasts when `remaining` credits run out at `per_day` credits per day, if they are reset at `resets_at`.
#[must_use]
pub fn forecast_remaining(remaining: u64, resets_at: Option<UnixMs>, per_day: f64, now: UnixMs) -> Forecast {
    // A rate below one credit per day counts as zero.
    if per_day < 1.0 {
        return Forecast::Unknown;
    }
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a displayed date needs no precision, and the cast saturates"
    )]
    let duration_ms = (remaining as f64 / per_day * 86_400_000.0) as u64;
    let exhausted_at = UnixMs(now.0.saturating_add(duration_ms));
    match resets_at {
        Some(reset) if reset <= exhausted_at => Forecast::LastsUntilReset,
        Some(_) | None => Forecast::ExhaustedAt(exhausted_at),
    }
}

#[cfg(test)]
mod tests {
    use super::super::quota::Extension;
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
        assert_eq!(
            forecast(&quota(500, Some(9)), 100.0, NOW),
            Forecast::ExhaustedAt(UnixMs(NOW.0 + 5 * DAY))
        );
        assert_eq!(forecast(&quota(500, Some(5)), 100.0, NOW), Forecast::LastsUntilReset);
        assert_eq!(forecast(&quota(500, None), 100.0, NOW), Forecast::ExhaustedAt(UnixMs(NOW.0 + 5 * DAY)));
        assert_eq!(forecast(&quota(1_000, None), 100.0, NOW), Forecast::ExhaustedAt(NOW));
    }

    #[test]
    fn an_extension_delays_exhaustion() {
        let extended = Quota { extension: Extension::Credits(500), ..quota(500, None) };
        assert_eq!(forecast(&extended, 100.0, NOW), Forecast::ExhaustedAt(UnixMs(NOW.0 + 10 * DAY)));
        let unlimited = Quota { extension: Extension::Unlimited, ..extended };
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
            spending = spending.add(7, now);
        }
        let per_day = spending.per_day(now);
        assert!((per_day - 7.0 * 24.0 * 60.0).abs() < 50.0, "the rate must be near 10,080, not {per_day}");
    }

    #[test]
    fn spending_decays_by_half_in_its_half_life() {
        let spending = Spending::default().add(1_000, NOW);
        let later = UnixMs(NOW.0 + 6 * 3_600_000);
        assert!((spending.decayed_to(later).credits - 500.0).abs() < 1.0);
        let earlier = UnixMs(NOW.0 - DAY);
        assert!(
            (spending.decayed_to(earlier).credits - 1_000.0).abs() < 1.0,
            "a clock that steps back must not decay the spending"
        );
    }
}
