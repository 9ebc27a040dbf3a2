//! Computes the correction of Keychoir's clock to the wall clock of the system: forward in one step, and backward
//! slowly. A jump backward would lengthen every cooldown, and quota periods and usage records use this clock as well.

/// A backward correction subtracts at most the elapsed time divided by this number, which is 1 %. A cooldown of a
/// minute therefore lasts at most 0.6 s longer, and a difference of an hour is corrected in four days. The program
/// chrony slews a clock by up to 8.3 %. The kernel's `adjtime` slews it by 0.05 %, which would take three months for an
/// hour.
const SLEW_DIVISOR: i64 = 100;

/// Returns the number of microseconds to add to a clock that is `error` microseconds behind the wall
/// clock, or ahead if negative. `elapsed` is the time since the last correction in microseconds. A clock
/// that lags jumps forward. A clock that is ahead loses at most a hundredth of `elapsed`.
#[must_use]
pub fn correction(error: i64, elapsed: i64) -> i64 {
    let max_slew = elapsed.max(0) / SLEW_DIVISOR;
    error.max(-max_slew)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: i64 = 1_000_000;
    const HOUR: i64 = 3_600 * SECOND;

    #[test]
    fn a_clock_jumps_forward_and_slows_by_one_percent() {
        for (error, elapsed, expected) in [
            (0, SECOND, 0),
            // The clock jumps forward when a laptop resumes, or when the wall clock is set after startup.
            (1, SECOND, 1),
            (HOUR, SECOND, HOUR),
            (HOUR, 0, HOUR),
            // The clock goes backward by at most a hundredth of the elapsed time.
            (-1, SECOND, -1),
            (-SECOND / 100, SECOND, -SECOND / 100),
            (-SECOND / 100 - 1, SECOND, -SECOND / 100),
            (-HOUR, SECOND, -SECOND / 100),
            (-HOUR, HOUR, -HOUR / 100),
            (-HOUR, 100 * HOUR, -HOUR),
            (-HOUR, 101 * HOUR, -HOUR),
            // The elapsed time is zero or negative.
            (-HOUR, 0, 0),
            (-HOUR, -SECOND, 0),
            (i64::MIN, SECOND, -SECOND / 100),
        ] {
            assert_eq!(
                correction(error, elapsed),
                expected,
                "the error {error} must be corrected within the bound after {elapsed} microseconds"
            );
        }
    }

    proptest! {
        #[test]
        fn a_correction_never_overshoots_and_stays_within_its_bound(
            error in -100 * HOUR..100 * HOUR,
            elapsed in 0..100 * HOUR,
        ) {
            let step = correction(error, elapsed);
            prop_assert!(step >= -(elapsed / SLEW_DIVISOR));
            prop_assert!(step == 0 || step.signum() == error.signum());
            prop_assert!(step.abs() <= error.abs());
        }
    }
}
