//! Builds the JSON documents of the admin API: the server, the keys, the clients and the usage records. The dashboard
//! shows the same documents. `docs/openapi.json` describes their members. Times are in RFC 3339 and UTC.

mod clients;
mod history;
mod keys;
mod overview;

pub(crate) use clients::{ClientDocument, QuotaDocument};
pub(super) use clients::{client_document, own_document, sorted_clients};
pub(super) use history::{change_document, read_attempts, read_changes, read_usage};
pub use keys::describe_refusal;
pub(crate) use keys::{CheckDocument, KeyDocument};
pub(super) use keys::{check_document, key_document, key_id};
pub(crate) use overview::OverviewDocument;
pub(super) use overview::{config_document, overview_document};
