//! Writes and reads a [`UnixMs`] as an RFC 3339 string, for `#[serde(with = "rfc3339")]`. Without this module, a time
//! is written as its number of milliseconds.

use serde::{Deserialize, Deserializer, Serializer, de};

use super::units::UnixMs;

/// Writes a time such as `2025-02-01T00:00:00.000Z`.
///
/// # Errors
///
/// Fails when the serializer fails.
pub fn serialize<S: Serializer>(time: &UnixMs, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&time.rfc3339())
}

/// Reads a time.
///
/// # Errors
///
/// Fails when the value is not an RFC 3339 time.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<UnixMs, D::Error> {
    let text = String::deserialize(deserializer)?;
    UnixMs::parse(&text).ok_or_else(|| de::Error::custom("this is not an RFC 3339 time"))
}

/// Writes and reads a time that may be absent.
pub mod optional {
    use super::{Deserializer, Serializer, UnixMs};

    /// Writes a time, or null.
    ///
    /// # Errors
    ///
    /// Fails when the serializer fails.
    pub fn serialize<S: Serializer>(time: &Option<UnixMs>, serializer: S) -> Result<S::Ok, S::Error> {
        match time {
            Some(time) => super::serialize(time, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// Reads a time. A missing field is `None` with `#[serde(default)]`.
    ///
    /// # Errors
    ///
    /// Fails when the value is not an RFC 3339 time.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<UnixMs>, D::Error> {
        super::deserialize(deserializer).map(Some)
    }
}
