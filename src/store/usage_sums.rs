//! Defines the dimensions and the sums of usage, with the SQL expressions that compute them. The commands (`report`)
//! and the admin API (`history`) build their queries from these expressions.

use rusqlite::Row;

use super::columns::unsigned;
use super::days;
use crate::policy::units::UnixMs;

/// The property of attempts by which their sums are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageDimension {
    /// One sum per UTC day.
    Day,
    /// One sum per hour.
    Hour,
    /// One sum per key.
    Key,
    /// One sum per client.
    Client,
    /// One sum per end user of a client.
    User,
    /// One sum per region of the provider.
    Region,
    /// One sum per model.
    Model,
    /// One sum per route.
    Route,
}

impl UsageDimension {
    /// All dimensions.
    pub const ALL: [Self; 8] =
        [Self::Day, Self::Hour, Self::Key, Self::Client, Self::User, Self::Region, Self::Model, Self::Route];

    /// Returns the identifier in queries and documents.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Hour => "hour",
            Self::Key => "key",
            Self::Client => "client",
            Self::User => "user",
            Self::Region => "region",
            Self::Model => "model",
            Self::Route => "route",
        }
    }

    /// Returns whether the groups are times. Such groups are listed in the order of time.
    #[must_use]
    pub fn is_time(self) -> bool {
        match self {
            Self::Day | Self::Hour => true,
            Self::Key | Self::Client | Self::User | Self::Region | Self::Model | Self::Route => false,
        }
    }

    /// Returns the SQL expression of the group as text. `time` is the column with the time. The group of a day or hour
    /// is its start in Unix milliseconds.
    pub(super) fn expression(self, time: &str) -> String {
        match self {
            Self::Day => format!("CAST({time} - {time} % 86400000 AS TEXT)"),
            Self::Hour => format!("CAST({time} - {time} % 3600000 AS TEXT)"),
            Self::Key => "key_hash".to_owned(),
            Self::Client | Self::User | Self::Region | Self::Model | Self::Route => self.as_str().to_owned(),
        }
    }

    /// Returns the start of the day or hour of a group, or `None` if the groups are not times.
    pub(super) fn period_start(self, group: &str) -> Option<UnixMs> {
        group.parse().ok().map(UnixMs).filter(|_| self.is_time())
    }

    /// Returns whether the admin API reads the sums of whole days from `days`.
    pub(super) fn has_days(self) -> bool {
        match self {
            Self::Key | Self::Model | Self::Route => true,
            Self::Day | Self::Hour | Self::Client | Self::User | Self::Region => false,
        }
    }

    /// Returns the table with the sums.
    pub(super) fn table(self) -> &'static str {
        match self {
            Self::User | Self::Region => "user_hours",
            Self::Day | Self::Hour | Self::Key | Self::Client | Self::Model | Self::Route => "hours",
        }
    }
}

/// The sums of a group of attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UsageSums {
    /// All attempts, with and without a response.
    pub attempts: u64,
    /// Attempts with a response status below 400.
    pub served: u64,
    /// Bytes of request bodies sent to the provider.
    pub request_bytes: u64,
    /// Bytes of response bodies relayed to clients.
    pub response_bytes: u64,
    /// Characters of text converted to speech.
    pub characters: u64,
    /// Credits charged, including estimates. Attempts of unknown price add 0.
    pub credits: u64,
    /// Attempts that may have been charged and whose price is unknown.
    pub unpriced: u64,
}

impl std::ops::AddAssign for UsageSums {
    fn add_assign(&mut self, other: Self) {
        self.attempts = self.attempts.saturating_add(other.attempts);
        self.served = self.served.saturating_add(other.served);
        self.request_bytes = self.request_bytes.saturating_add(other.request_bytes);
        self.response_bytes = self.response_bytes.saturating_add(other.response_bytes);
        self.characters = self.characters.saturating_add(other.characters);
        self.credits = self.credits.saturating_add(other.credits);
        self.unpriced = self.unpriced.saturating_add(other.unpriced);
    }
}

/// Returns the SQL expression of the sum of a column.
pub(super) fn sum_of(column: &str) -> String {
    // `total` adds floating-point numbers, which cannot overflow and are exact up to 2^53, far above real amounts.
    format!("CAST(min(total({column}), 9007199254740992) AS INTEGER)")
}

/// Returns the SQL expressions of the sums, with the names of their columns.
pub(super) fn sum_columns() -> String {
    days::SUM_COLUMNS.map(|column| format!("{} AS {column}", sum_of(column))).join(", ")
}

/// Reads the [`sum_columns`] of a row, which follow its group.
pub(super) fn read_sums(row: &Row<'_>) -> Result<UsageSums, rusqlite::Error> {
    let amount = |index| row.get(index).map(unsigned);
    Ok(UsageSums {
        attempts: amount(1)?,
        served: amount(2)?,
        request_bytes: amount(3)?,
        response_bytes: amount(4)?,
        characters: amount(5)?,
        credits: amount(6)?,
        unpriced: amount(7)?,
    })
}
