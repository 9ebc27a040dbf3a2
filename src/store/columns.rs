//! Converts values to what the columns of all tables store.

use crate::policy::units::UnixMs;

/// A time as a column stores it, in Unix milliseconds.
pub(super) fn timestamp(at: UnixMs) -> i64 {
    whole(at.0)
}

/// Converts to SQLite's signed integers.
pub(super) fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
