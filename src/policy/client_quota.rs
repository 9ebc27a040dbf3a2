//! Computes client quotas (maximum requests or credits per UTC day, per UTC month or in total) and client rate limits
//! (maximum requests per interval). Also defines the tally, which counts the amount that a client has used in a period.

use std::fmt;
use std::time::Duration;

use jiff::tz::Offset;

use super::units::{CivilDate, Grouped, UnixMs};

/// The maximum number of requests or credits of a client in one period.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientQuota {
    /// The maximum number of requests or credits in one period.
    pub amount: u64,
    /// The unit of `amount`.
    pub unit: QuotaUnit,
    /// The period after which the count is reset.
    pub period: Period,
}

/// The unit that a quota counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuotaUnit {
    /// Requests that may cost credits, and that the provider has served or may have served.
    Requests,
    /// Credits that the provider has reported as the cost, or the estimated cost if it has reported none.
    Credits,
}

/// The period after which the count is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Period {
    /// A calendar day in UTC.
    Day,
    /// A calendar month in UTC.
    Month,
    /// The count is never reset.
    Total,
}

/// The error of a request that exceeds the quota of its client, or of the end user that the client names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client has used its {quota}")]
pub struct QuotaExceeded {
    /// The quota that is exceeded.
    pub quota: ClientQuota,
    /// The time at which the count is reset, or `None` if it is never reset.
    pub resets_at: Option<UnixMs>,
    /// The remaining amount and the amount that the request needs, or `None` if the whole quota is used.
    pub shortfall: Option<QuotaShortfall>,
}

/// The remaining amount of a quota, and the amount that a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaShortfall {
    /// The amount that is neither used nor reserved by requests in flight.
    pub remaining: u64,
    /// The maximum amount that the request may use.
    pub needed: u64,
}

impl ClientQuota {
    /// Checks whether a client that has used the amount `used` may send another request.
    ///
    /// # Errors
    ///
    /// Fails if the quota is exhausted.
    pub fn check(&self, used: u64, now: UnixMs) -> Result<(), QuotaExceeded> {
        if self.allows(used, 0) { Ok(()) } else { Err(self.exceeded(used, 0, now)) }
    }

    /// Whether the quota allows `needed` in addition to `used`, which includes the reservations of
    /// requests in flight. An exhausted quota does not even allow 0.
    #[must_use]
    pub fn allows(&self, used: u64, needed: u64) -> bool {
        let remaining = self.amount.saturating_sub(used);
        remaining > 0 && needed <= remaining
    }

    /// Creates the error of a request that needs `needed` in addition to `used`.
    #[must_use]
    pub fn exceeded(&self, used: u64, needed: u64, now: UnixMs) -> QuotaExceeded {
        let remaining = self.amount.saturating_sub(used);
        let shortfall = (remaining > 0).then_some(QuotaShortfall { remaining, needed });
        QuotaExceeded { quota: *self, resets_at: self.period.end(now), shortfall }
    }
}

impl fmt::Display for ClientQuota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.amount == 1 { "" } else { "s" };
        let unit = match self.unit {
            QuotaUnit::Requests => "request",
            QuotaUnit::Credits => "credit",
        };
        let period = match self.period {
            Period::Day => " per day",
            Period::Month => " per month",
            Period::Total => "",
        };
        write!(f, "{} {unit}{plural}{period}", Grouped(self.amount))
    }
}

/// The length of a day in milliseconds.
const DAY_MS: u64 = 86_400_000;

impl Period {
    /// All periods, the shortest first.
    pub const ALL: [Self; 3] = [Self::Day, Self::Month, Self::Total];

    /// Returns the start of the period that contains `now`.
    #[must_use]
    pub fn start(self, now: UnixMs) -> UnixMs {
        match self {
            Self::Day => UnixMs(now.0 - now.0 % DAY_MS),
            Self::Month => UnixMs(first_day_of_month(now.0 / DAY_MS) * DAY_MS),
            Self::Total => UnixMs::default(),
        }
    }

    /// Returns the end of the period that contains `now`, or `None` if it does not end.
    #[must_use]
    pub fn end(self, now: UnixMs) -> Option<UnixMs> {
        match self {
            Self::Day => self.start(now).0.checked_add(DAY_MS).map(UnixMs),
            Self::Month => start_of_next_month(now),
            Self::Total => None,
        }
    }

    /// Returns a number for the period that contains `now`. A later period has a larger number.
    fn number(self, now: UnixMs) -> u16 {
        let today = now.0 / DAY_MS;
        let first_day = match self {
            Self::Day => today,
            Self::Month => first_day_of_month(today),
            Self::Total => 0,
        };
        // 16 bits suffice for days until the year 2149.
        u16::try_from(first_day).unwrap_or(u16::MAX)
    }
}

/// Returns the first day of the month of `day`. Both are counted from 1970-01-01.
fn first_day_of_month(day: u64) -> u64 {
    day + 1 - CivilDate::from_days(day).day
}

/// Returns the midnight at which the next month after `now` starts.
fn start_of_next_month(now: UnixMs) -> Option<UnixMs> {
    let timestamp = jiff::Timestamp::from_millisecond(i64::try_from(now.0).ok()?).ok()?;
    let this_month = Offset::UTC.to_datetime(timestamp).date().first_of_month();
    let next_month = this_month.checked_add(jiff::Span::new().try_months(1).ok()?).ok()?;
    let start = Offset::UTC.to_timestamp(next_month.to_datetime(jiff::civil::Time::midnight())).ok()?;
    u64::try_from(start.as_millisecond()).ok().map(UnixMs)
}

/// The amount used in a period. It fits into an atomic integer together with the number of its period, so
/// that both always change together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    period_number: u16,
    amount: u64,
}

/// The largest amount that fits into 48 bits, which is far above any realistic use.
const MAX_AMOUNT: u64 = (1 << 48) - 1;

impl Tally {
    /// Unpacks the integer that [`to_bits`](Self::to_bits) returned.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self { period_number: u16::try_from(bits >> 48).unwrap_or(u16::MAX), amount: bits & MAX_AMOUNT }
    }

    /// Packs the period number into the upper 16 bits and the amount into the lower 48 bits.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        u64::from(self.period_number) << 48 | self.amount
    }

    /// Returns the amount used in the period that contains `now`. If the clock was set back, a later
    /// period still counts.
    #[must_use]
    pub fn used(self, period: Period, now: UnixMs) -> u64 {
        if self.period_number >= period.number(now) { self.amount } else { 0 }
    }

    /// Returns the tally after `amount` was used at `now`.
    #[must_use]
    pub fn add(self, amount: u64, period: Period, now: UnixMs) -> Self {
        Self {
            period_number: self.period_number.max(period.number(now)),
            amount: self.used(period, now).saturating_add(amount).min(MAX_AMOUNT),
        }
    }

    /// Returns the number of the tally's period, for [`replace_reservation`](Self::replace_reservation).
    #[must_use]
    pub fn period_number(self) -> u16 {
        self.period_number
    }

    /// Returns the tally after `used` replaced `reserved`, which was added in the period `period_number`. If
    /// that period is over, the tally is unchanged, because it was reset.
    #[must_use]
    pub fn replace_reservation(self, period_number: u16, reserved: u64, used: u64) -> Self {
        if self.period_number != period_number {
            return self;
        }
        Self { amount: self.amount.saturating_sub(reserved).saturating_add(used).min(MAX_AMOUNT), ..self }
    }
}

/// A rate limit: a burst of up to `requests`, which become available again evenly over `interval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Maximum number of requests per interval, at least 1.
    pub requests: u32,
    /// The interval in which `requests` become available again.
    pub interval: Duration,
}

impl fmt::Display for RateLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.interval.as_secs() {
            1 => write!(f, "{} per second", self.requests),
            60 => write!(f, "{} per minute", self.requests),
            seconds => write!(f, "{} per {seconds} s", self.requests),
        }
    }
}

impl RateLimit {
    /// Returns the limit of one of `replicas` replicas that serve the client: the requests divided by the replicas,
    /// at the exact rate. If there are more replicas than requests, the limit is one request in a longer interval.
    #[must_use]
    pub fn divided(self, replicas: u32) -> Self {
        let replicas = replicas.max(1);
        let requests = (self.requests / replicas).max(1);
        let interval = self.interval.saturating_mul(replicas).saturating_mul(requests) / self.requests.max(1);
        Self { requests, interval }
    }

    /// Admits a request at `now`, by the generic cell rate algorithm. `used_until` is the time up to which earlier
    /// requests have used the limit. `used_until` and `now` are in nanoseconds since the same point in time. Returns
    /// the new `used_until`.
    ///
    /// # Errors
    ///
    /// Fails if the limit is exceeded, with the time until the next request is admitted.
    pub fn admit(&self, used_until: u64, now: u64) -> Result<u64, Duration> {
        let interval_ns = u64::try_from(self.interval.as_nanos()).unwrap_or(u64::MAX);
        let new_used_until =
            used_until.max(now).saturating_add(interval_ns / u64::from(self.requests.max(1)));
        match new_used_until.saturating_sub(now).checked_sub(interval_ns) {
            None | Some(0) => Ok(new_used_until),
            Some(wait) => Err(Duration::from_nanos(wait)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn months_start_as_in_the_calendar_library() {
        for day in 0..=65_536 {
            let now = UnixMs(day * DAY_MS + 5);
            let first_day = Period::Month.start(now).0 / DAY_MS;
            assert_eq!(first_day_of_month(day), first_day, "both must compute the same month for day {day}");
            assert_eq!(Period::Month.number(now), u16::try_from(first_day).unwrap());
        }
    }

    /// 2024-02-29T12:00:00Z.
    const LEAP_DAY: UnixMs = UnixMs(1_709_208_000_000);

    fn parse_time(text: &str) -> UnixMs {
        let at: jiff::Timestamp = text.parse().unwrap();
        UnixMs(u64::try_from(at.as_millisecond()).unwrap())
    }

    #[track_caller]
    fn check_period(period: Period, now: &str, start: &str, end: Option<&str>) {
        assert_eq!(period.start(parse_time(now)), parse_time(start));
        assert_eq!(period.end(parse_time(now)), end.map(parse_time));
    }

    #[test]
    fn periods_start_and_end_with_calendar_days_and_months() {
        check_period(
            Period::Day,
            "2024-02-29T23:59:59.999Z",
            "2024-02-29T00:00:00Z",
            Some("2024-03-01T00:00:00Z"),
        );
        check_period(
            Period::Day,
            "2024-03-01T00:00:00Z",
            "2024-03-01T00:00:00Z",
            Some("2024-03-02T00:00:00Z"),
        );
        check_period(
            Period::Month,
            "2024-02-29T12:00:00Z",
            "2024-02-01T00:00:00Z",
            Some("2024-03-01T00:00:00Z"),
        );
        check_period(
            Period::Month,
            "2025-12-31T23:59:59Z",
            "2025-12-01T00:00:00Z",
            Some("2026-01-01T00:00:00Z"),
        );
        check_period(Period::Total, "2025-12-31T23:59:59Z", "1970-01-01T00:00:00Z", None);
    }

    #[test]
    fn the_maximum_time_does_not_panic() {
        for period in Period::ALL {
            let tally = Tally::default().add(u64::MAX, period, UnixMs(u64::MAX));
            assert_eq!(Tally::from_bits(tally.to_bits()), tally);
            assert_eq!(tally.used(period, UnixMs(u64::MAX)), MAX_AMOUNT);
        }
    }

    #[test]
    fn a_quota_is_exceeded_only_after_its_last_unit() {
        let quota = ClientQuota { amount: 3, unit: QuotaUnit::Requests, period: Period::Day };
        assert_eq!(quota.check(2, LEAP_DAY), Ok(()));
        let exceeded =
            QuotaExceeded { quota, resets_at: Some(parse_time("2024-03-01T00:00:00Z")), shortfall: None };
        assert_eq!(quota.check(3, LEAP_DAY), Err(exceeded));
        assert_eq!(
            ClientQuota { amount: 0, ..quota }.check(0, LEAP_DAY).unwrap_err().resets_at,
            exceeded.resets_at
        );
        let total = ClientQuota { period: Period::Total, ..quota };
        assert_eq!(total.check(4, LEAP_DAY).unwrap_err().resets_at, None);
    }

    #[test]
    fn a_tally_is_reset_by_a_new_period_but_not_by_a_clock_that_is_set_back() {
        let tomorrow = Period::Day.end(LEAP_DAY).unwrap();
        let tally = Tally::default().add(2, Period::Day, LEAP_DAY).add(1, Period::Day, LEAP_DAY);
        assert_eq!((tally.used(Period::Day, LEAP_DAY), tally.used(Period::Day, tomorrow)), (3, 0));
        let next = tally.add(5, Period::Day, tomorrow);
        assert_eq!(next.used(Period::Day, tomorrow), 5);
        assert_eq!(next.used(Period::Day, LEAP_DAY), 5);
        assert_eq!(next.add(1, Period::Day, LEAP_DAY).used(Period::Day, tomorrow), 6);
        let months = Tally::default().add(3, Period::Month, LEAP_DAY);
        assert_eq!((months.used(Period::Month, LEAP_DAY), months.used(Period::Month, tomorrow)), (3, 0));
        assert_eq!(Tally::default().add(3, Period::Total, LEAP_DAY).used(Period::Total, UnixMs(0)), 3);
    }

    #[test]
    fn a_reservation_is_replaced_only_in_its_own_period() {
        let tomorrow = Period::Day.end(LEAP_DAY).unwrap();
        let tally = Tally::default().add(20, Period::Day, LEAP_DAY);
        let number = tally.period_number();
        assert_eq!(tally.replace_reservation(number, 20, 7).used(Period::Day, LEAP_DAY), 7);
        assert_eq!(
            tally.replace_reservation(number, 5, 9).used(Period::Day, LEAP_DAY),
            24,
            "a request may cost more than its reservation"
        );
        assert_eq!(tally.replace_reservation(number, 90, 0).used(Period::Day, LEAP_DAY), 0);
        let next = tally.add(1, Period::Day, tomorrow);
        assert_eq!(
            next.replace_reservation(number, 20, 30),
            next,
            "the amount of a later period must not change"
        );
    }

    #[track_caller]
    fn check_request(used: u64, needed: u64, expected: Result<(), Option<(u64, u64)>>) {
        let quota = ClientQuota { amount: 1_000, unit: QuotaUnit::Credits, period: Period::Total };
        assert_eq!(quota.allows(used, needed), expected.is_ok());
        if let Err(expected) = expected {
            let shortfall = quota.exceeded(used, needed, LEAP_DAY).shortfall;
            assert_eq!(shortfall.map(|shortfall| (shortfall.remaining, shortfall.needed)), expected);
        }
    }

    #[test]
    fn a_request_is_allowed_or_its_error_has_the_remaining_amount() {
        check_request(0, 1_000, Ok(()));
        check_request(0, 1_001, Err(Some((1_000, 1_001))));
        check_request(999, 1, Ok(()));
        check_request(999, 2, Err(Some((1, 2))));
        check_request(999, 0, Ok(()));
        check_request(1_000, 0, Err(None));
        check_request(5_000, 1, Err(None));
        check_request(1, u64::MAX, Err(Some((999, u64::MAX))));
    }

    #[test]
    fn a_tally_is_packed_into_64_bits() {
        for (period_number, amount) in [(0, 0), (1, MAX_AMOUNT), (u16::MAX, 7)] {
            let tally = Tally { period_number, amount };
            assert_eq!(Tally::from_bits(tally.to_bits()), tally);
        }
    }

    #[test]
    fn a_quota_is_displayed_as_in_the_configuration() {
        let quota = |amount, unit, period| ClientQuota { amount, unit, period }.to_string();
        assert_eq!(quota(3, QuotaUnit::Requests, Period::Total), "3 requests");
        assert_eq!(quota(1, QuotaUnit::Requests, Period::Day), "1 request per day");
        assert_eq!(quota(10_000, QuotaUnit::Credits, Period::Month), "10,000 credits per month");
    }

    #[test]
    fn the_divided_rate_limits_of_all_replicas_have_the_rate_of_the_whole() {
        let limit =
            |requests, milliseconds| RateLimit { requests, interval: Duration::from_millis(milliseconds) };
        for (whole, replicas, expected) in [
            (limit(10, 1_000), 0, limit(10, 1_000)),
            (limit(10, 1_000), 1, limit(10, 1_000)),
            (limit(10, 1_000), 2, limit(5, 1_000)),
            // 3 requests in 900 ms are 10 requests in 3 s.
            (limit(10, 1_000), 3, limit(3, 900)),
            (limit(1, 1_000), 3, limit(1, 3_000)),
            (limit(2, 1_000), 3, limit(1, 1_500)),
        ] {
            assert_eq!(whole.divided(replicas), expected, "{replicas} replicas must share the limit {whole}");
        }
        let single = limit(1, 1_000).divided(4);
        assert!(single.admit(0, 0).is_ok(), "a single request must stay possible");
    }

    #[test]
    fn a_rate_limit_admits_a_burst_and_then_one_request_at_a_time() {
        let rate = RateLimit { requests: 3, interval: Duration::from_secs(3) };
        const SECOND: u64 = 1_000_000_000;
        let start = 100 * SECOND;
        let mut used_until = 0;
        for _ in 0..3 {
            used_until = rate.admit(used_until, start).unwrap();
        }
        assert_eq!(rate.admit(used_until, start), Err(Duration::from_secs(1)));
        assert_eq!(rate.admit(used_until, start + SECOND - 1), Err(Duration::from_nanos(1)));
        let next = rate.admit(used_until, start + SECOND).unwrap();
        assert_eq!(rate.admit(next, start + SECOND), Err(Duration::from_secs(1)));
        assert!(rate.admit(next, start + 60 * SECOND).is_ok(), "a pause must restore the burst");
        let single = RateLimit { requests: 1, ..rate };
        assert_eq!(single.admit(single.admit(0, start).unwrap(), start), Err(Duration::from_secs(3)));
    }
}
