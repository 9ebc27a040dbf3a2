//! Client quotas and rate limits: maximum requests or credits per day, per month or in total, and maximum
//! requests per span of time. Days and months are calendar periods in UTC.

use std::fmt;
use std::time::Duration;

use jiff::tz::Offset;

use super::units::{Grouped, UnixMs};

/// The quota of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientQuota {
    /// Maximum in the period.
    pub amount: u64,
    /// The unit of the amount.
    pub measure: Measure,
    /// The period after which the count is reset.
    pub period: Period,
}

/// The unit that a quota counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Requests that the provider charges for and has served.
    Requests,
    /// Credits that the provider has charged.
    Credits,
}

/// When the count is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Period {
    /// At midnight.
    Day,
    /// At midnight of the first of a month.
    Month,
    /// Never.
    Ever,
}

/// The error of a client whose quota does not suffice for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the client has used its {quota}")]
pub struct QuotaSpent {
    /// The quota.
    pub quota: ClientQuota,
    /// When the count is reset; `None` for never.
    pub resets_at: Option<UnixMs>,
    /// Set when some of the quota is left, but less than the request may cost.
    pub shortfall: Option<QuotaShortfall>,
}

/// The rest of a quota, and the cost of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaShortfall {
    /// Amount neither used nor reserved by other requests of the client.
    pub left: u64,
    /// Upper bound of the amount that the request may use.
    pub needed: u64,
}

impl ClientQuota {
    /// Checks whether a client that has used this amount may send another request.
    ///
    /// # Errors
    ///
    /// When the quota is used up, with the time of its reset.
    pub fn check(&self, used: u64, now: UnixMs) -> Result<(), QuotaSpent> {
        self.check_for(used, 0, now)
    }

    /// Checks whether `more` fits into the quota beside `taken`, the sum of the used amount and of the
    /// reservations of requests in flight. When the quota is used up, even 0 does not fit.
    ///
    /// # Errors
    ///
    /// When it does not fit, with the amount that is left.
    pub fn check_for(&self, taken: u64, more: u64, now: UnixMs) -> Result<(), QuotaSpent> {
        if self.has_room(taken, more) { Ok(()) } else { Err(self.refusal(taken, more, now)) }
    }

    /// Whether `more` fits beside `taken`.
    #[must_use]
    pub fn has_room(&self, taken: u64, more: u64) -> bool {
        let left = self.amount.saturating_sub(taken);
        left > 0 && more <= left
    }

    /// The error of a client for which `more` does not fit beside `taken`.
    #[must_use]
    pub fn refusal(&self, taken: u64, more: u64, now: UnixMs) -> QuotaSpent {
        let left = self.amount.saturating_sub(taken);
        let shortfall = (left > 0).then_some(QuotaShortfall { left, needed: more });
        QuotaSpent { quota: *self, resets_at: self.period.end(now), shortfall }
    }
}

impl fmt::Display for ClientQuota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.amount == 1 { "" } else { "s" };
        let measure = match self.measure {
            Measure::Requests => "request",
            Measure::Credits => "credit",
        };
        let period = match self.period {
            Period::Day => " per day",
            Period::Month => " per month",
            Period::Ever => "",
        };
        write!(f, "{} {measure}{plural}{period}", Grouped(self.amount))
    }
}

const DAY_MS: u64 = 86_400_000;

impl Period {
    /// All periods, from the shortest.
    pub const ALL: [Self; 3] = [Self::Day, Self::Month, Self::Ever];

    /// When the period of `now` began.
    #[must_use]
    pub fn begin(self, now: UnixMs) -> UnixMs {
        match self {
            Self::Day => UnixMs(now.0 - now.0 % DAY_MS),
            Self::Month => first_of_month(now, 0).unwrap_or_default(),
            Self::Ever => UnixMs::default(),
        }
    }

    /// When the period of `now` ends.
    #[must_use]
    pub fn end(self, now: UnixMs) -> Option<UnixMs> {
        match self {
            Self::Day => self.begin(now).0.checked_add(DAY_MS).map(UnixMs),
            Self::Month => first_of_month(now, 1),
            Self::Ever => None,
        }
    }

    /// The number of the period of `now`; a later one has a larger number.
    fn number(self, now: UnixMs) -> u16 {
        let today = now.0 / DAY_MS;
        let begin = match self {
            Self::Day => today,
            Self::Month => today - days_into_month(today),
            Self::Ever => 0,
        };
        // Sufficient for days until the year 2149.
        u16::try_from(begin).unwrap_or(u16::MAX)
    }
}

/// Number of days since the first of the month of the `day`th day since 1970. It is computed for every
/// request, and a general calendar library takes ten times as long.
fn days_into_month(day: u64) -> u64 {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    // Years begin in March here, so that leap days are at their end; the first is year 0.
    let day = (day + 719_468) % DAYS_OF_400_YEARS;
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // Five months have 153 days.
    let month = (5 * day + 2) / 153;
    day - (153 * month + 2) / 5
}

/// Midnight of the first of the month of `now`, or of the month that is `later` by this many.
fn first_of_month(now: UnixMs, later: i32) -> Option<UnixMs> {
    let now = jiff::Timestamp::from_millisecond(i64::try_from(now.0).ok()?).ok()?;
    let first = Offset::UTC.to_datetime(now).date().first_of_month();
    let first = first.checked_add(jiff::Span::new().try_months(later).ok()?).ok()?;
    let begin = Offset::UTC.to_timestamp(first.to_datetime(jiff::civil::Time::midnight())).ok()?;
    u64::try_from(begin.as_millisecond()).ok().map(UnixMs)
}

/// The amount used in a period. It fits into one word with the number of its period, so that amount and
/// period always belong together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    number: u16,
    amount: u64,
}

/// The largest amount that fits into 48 bits, which is far above any real use.
const AMOUNT_MAX: u64 = (1 << 48) - 1;

impl Tally {
    /// Unpacks a word.
    #[must_use]
    pub fn of_word(word: u64) -> Self {
        Self { number: u16::try_from(word >> 48).unwrap_or(u16::MAX), amount: word & AMOUNT_MAX }
    }

    /// Packs it into a word.
    #[must_use]
    pub fn word(self) -> u64 {
        u64::from(self.number) << 48 | self.amount
    }

    /// The amount used in the period of `now`. After a clock was set back, the later period still counts.
    #[must_use]
    pub fn used(self, period: Period, now: UnixMs) -> u64 {
        if self.number >= period.number(now) { self.amount } else { 0 }
    }

    /// The count after `more` was used.
    #[must_use]
    pub fn plus(self, more: u64, period: Period, now: UnixMs) -> Self {
        Self {
            number: self.number.max(period.number(now)),
            amount: self.used(period, now).saturating_add(more).min(AMOUNT_MAX),
        }
    }

    /// The number of its period.
    #[must_use]
    pub fn number(self) -> u16 {
        self.number
    }

    /// The count after `more` was used instead of `less`, which was reserved in the period of that
    /// number. A period that is over leaves the count unchanged, because it was reset.
    #[must_use]
    pub fn replaced(self, number: u16, less: u64, more: u64) -> Self {
        if self.number != number {
            return self;
        }
        Self { amount: self.amount.saturating_sub(less).saturating_add(more).min(AMOUNT_MAX), ..self }
    }
}

/// A rate limit: a burst of up to `requests`, which then become available again evenly over `span`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Maximum number of requests per span; at least 1.
    pub requests: u32,
    /// The span in which `requests` become available again.
    pub span: Duration,
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.span.as_secs() {
            1 => write!(f, "{} per second", self.requests),
            60 => write!(f, "{} per minute", self.requests),
            seconds => write!(f, "{} per {seconds} s", self.requests),
        }
    }
}

impl Rate {
    /// Counts a request at `now`. `used_until` is the time up to which the client's requests use its rate so
    /// far; both are nanoseconds since the same moment. Returns the new `used_until`.
    ///
    /// # Errors
    ///
    /// When the rate is exceeded, with the time until the next request fits.
    pub fn admit(&self, used_until: u64, now: u64) -> Result<u64, Duration> {
        let span = u64::try_from(self.span.as_nanos()).unwrap_or(u64::MAX);
        let next = used_until.max(now).saturating_add(span / u64::from(self.requests.max(1)));
        match next.saturating_sub(now).checked_sub(span) {
            None | Some(0) => Ok(next),
            Some(wait) => Err(Duration::from_nanos(wait)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_day_lies_in_its_month_of_the_calendar() {
        for day in 0..=65_536 {
            let now = UnixMs(day * DAY_MS + 5);
            let begin = Period::Month.begin(now).0 / DAY_MS;
            assert_eq!(day - days_into_month(day), begin, "{day}");
            assert_eq!(Period::Month.number(now), u16::try_from(begin).unwrap());
        }
    }

    /// 2024-02-29T12:00:00Z.
    const LEAP: UnixMs = UnixMs(1_709_208_000_000);

    fn at(text: &str) -> UnixMs {
        let at: jiff::Timestamp = text.parse().unwrap();
        UnixMs(u64::try_from(at.as_millisecond()).unwrap())
    }

    #[track_caller]
    fn check_period(period: Period, now: &str, begin: &str, end: Option<&str>) {
        assert_eq!(period.begin(at(now)), at(begin));
        assert_eq!(period.end(at(now)), end.map(at));
    }

    #[test]
    fn days_and_months_are_those_of_the_calendar() {
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
        check_period(Period::Ever, "2025-12-31T23:59:59Z", "1970-01-01T00:00:00Z", None);
    }

    #[test]
    fn the_last_moment_does_not_panic() {
        for period in Period::ALL {
            let tally = Tally::default().plus(u64::MAX, period, UnixMs(u64::MAX));
            assert_eq!(Tally::of_word(tally.word()), tally);
            assert_eq!(tally.used(period, UnixMs(u64::MAX)), AMOUNT_MAX);
        }
    }

    #[test]
    fn a_quota_is_used_up_to_its_last_unit() {
        let quota = ClientQuota { amount: 3, measure: Measure::Requests, period: Period::Day };
        assert_eq!(quota.check(2, LEAP), Ok(()));
        let spent = QuotaSpent { quota, resets_at: Some(at("2024-03-01T00:00:00Z")), shortfall: None };
        assert_eq!(quota.check(3, LEAP), Err(spent));
        assert_eq!(ClientQuota { amount: 0, ..quota }.check(0, LEAP).unwrap_err().resets_at, spent.resets_at);
        let ever = ClientQuota { period: Period::Ever, ..quota };
        assert_eq!(ever.check(4, LEAP).unwrap_err().resets_at, None);
    }

    #[test]
    fn a_count_is_reset_by_a_new_period_and_not_by_a_clock_set_back() {
        let tomorrow = Period::Day.end(LEAP).unwrap();
        let tally = Tally::default().plus(2, Period::Day, LEAP).plus(1, Period::Day, LEAP);
        assert_eq!((tally.used(Period::Day, LEAP), tally.used(Period::Day, tomorrow)), (3, 0));
        let next = tally.plus(5, Period::Day, tomorrow);
        assert_eq!(next.used(Period::Day, tomorrow), 5);
        assert_eq!(next.used(Period::Day, LEAP), 5);
        assert_eq!(next.plus(1, Period::Day, LEAP).used(Period::Day, tomorrow), 6);
        let months = Tally::default().plus(3, Period::Month, LEAP);
        assert_eq!((months.used(Period::Month, LEAP), months.used(Period::Month, tomorrow)), (3, 0));
        assert_eq!(Tally::default().plus(3, Period::Ever, LEAP).used(Period::Ever, UnixMs(0)), 3);
    }

    #[test]
    fn a_reservation_is_settled_in_its_own_period() {
        let tomorrow = Period::Day.end(LEAP).unwrap();
        let tally = Tally::default().plus(20, Period::Day, LEAP);
        let number = tally.number();
        assert_eq!(tally.replaced(number, 20, 7).used(Period::Day, LEAP), 7);
        assert_eq!(
            tally.replaced(number, 5, 9).used(Period::Day, LEAP),
            24,
            "a request may cost more than its reservation"
        );
        assert_eq!(tally.replaced(number, 90, 0).used(Period::Day, LEAP), 0);
        let next = tally.plus(1, Period::Day, tomorrow);
        assert_eq!(next.replaced(number, 20, 30), next, "yesterday is over");
    }

    #[track_caller]
    fn check_for(taken: u64, more: u64, expected: Result<(), Option<(u64, u64)>>) {
        let client_quota = ClientQuota { amount: 1_000, measure: Measure::Credits, period: Period::Ever };
        let result = client_quota.check_for(taken, more, LEAP);
        let result = result.map_err(|spent| spent.shortfall.map(|short| (short.left, short.needed)));
        assert_eq!(result, expected);
    }

    #[test]
    fn a_request_fits_or_its_error_names_the_remainder() {
        check_for(0, 1_000, Ok(()));
        check_for(0, 1_001, Err(Some((1_000, 1_001))));
        check_for(999, 1, Ok(()));
        check_for(999, 2, Err(Some((1, 2))));
        check_for(999, 0, Ok(()));
        check_for(1_000, 0, Err(None));
        check_for(5_000, 1, Err(None));
        check_for(1, u64::MAX, Err(Some((999, u64::MAX))));
    }

    #[test]
    fn a_tally_fits_one_word() {
        for (number, amount) in [(0, 0), (1, AMOUNT_MAX), (u16::MAX, 7)] {
            let tally = Tally { number, amount };
            assert_eq!(Tally::of_word(tally.word()), tally);
        }
    }

    #[test]
    fn a_quota_is_written_as_in_the_configuration() {
        let quota = |amount, measure, period| ClientQuota { amount, measure, period }.to_string();
        assert_eq!(quota(3, Measure::Requests, Period::Ever), "3 requests");
        assert_eq!(quota(1, Measure::Requests, Period::Day), "1 request per day");
        assert_eq!(quota(10_000, Measure::Credits, Period::Month), "10,000 credits per month");
    }

    #[test]
    fn a_rate_admits_a_burst_and_then_one_request_at_a_time() {
        let rate = Rate { requests: 3, span: Duration::from_secs(3) };
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
        assert!(rate.admit(next, start + 60 * SECOND).is_ok(), "a pause fills it again");
        let one = Rate { requests: 1, ..rate };
        assert_eq!(one.admit(one.admit(0, start).unwrap(), start), Err(Duration::from_secs(3)));
    }
}
