//! How slowly a client may send: what is slower holds a place that others wait for.

use std::time::Duration;

/// A client may take this long before its rate counts: a phone that has just woken is slow at first.
/// Source: `RequestReadTimeout body=20` of Apache's mod_reqtimeout.
const GRACE: Duration = Duration::from_secs(20);

/// A least number of bytes a second, on average from the begin on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MinRate {
    /// 0 sets none.
    pub bytes_per_second: u32,
}

impl MinRate {
    /// How long after the begin the next byte behind `bytes` must have come; `None` for any time.
    #[must_use]
    pub fn due(self, bytes: u64) -> Option<Duration> {
        let rate = u64::from(self.bytes_per_second);
        (rate > 0).then(|| GRACE + Duration::from_millis(bytes.saturating_mul(1_000) / rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes_per_second: u32, bytes: u64, expected_ms: Option<u64>) {
        let due = MinRate { bytes_per_second }.due(bytes);
        assert_eq!(due, expected_ms.map(Duration::from_millis));
    }

    #[test]
    fn each_byte_buys_its_part_of_a_second() {
        check(500, 0, Some(20_000));
        check(500, 1, Some(20_002));
        check(500, 500, Some(21_000));
        check(500, 500_000, Some(1_020_000));
        check(u32::MAX, u64::MAX, Some(20_000 + u64::MAX / u64::from(u32::MAX)));
        check(0, 0, None);
        check(0, 500, None);
    }
}
