//! Converts times and numbers to and from the signed 64-bit integers of SQLite's columns.

use crate::policy::units::UnixMs;

/// Converts a time to the Unix milliseconds of a column.
pub(super) fn timestamp(time: UnixMs) -> i64 {
    integer(time.0)
}

/// Converts a number to an SQLite integer. A number above the maximum becomes the maximum.
pub(super) fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Converts a column to an unsigned number. A negative number, which only a corrupt row contains, becomes 0.
pub(super) fn unsigned(column: i64) -> u64 {
    u64::try_from(column).unwrap_or(0)
}
