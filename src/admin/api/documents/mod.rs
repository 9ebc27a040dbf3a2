//! The documents of the API. `docs/openapi.json` describes their members. Times are in RFC 3339 and UTC.

mod clients;
mod history;
mod keys;
mod overview;

pub(super) use clients::{client, clients_by_name, me};
pub(super) use history::{attempts, change, changes, usage};
pub use keys::meaning;
pub(super) use keys::{check, key, key_id};
pub(super) use overview::{config, overview};
