//! The documents of the API. Their members are described in `docs/openapi.json`; times are RFC 3339 in UTC.

mod clients;
mod history;
mod keys;
mod overview;

pub(super) use clients::{client, clients_by_name, me};
pub(super) use history::{attempts, change, changes, usage};
pub use keys::meaning;
pub(super) use keys::{check, key, key_id};
pub(super) use overview::{config, overview};

use crate::policy::forecast::Forecast;

/// When credits run out at the current rate, if that is before their reset.
fn exhausted_at(forecast: Forecast) -> Option<String> {
    match forecast {
        Forecast::ExhaustedAt(at) => Some(at.rfc3339()),
        Forecast::LastsUntilReset | Forecast::Unknown => None,
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the cast saturates")]
fn round(credits: f64) -> u64 {
    credits.round() as u64
}
