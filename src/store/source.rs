//! Converts the response that contained a refusal to JSON, and back. This module is separate because the documents of
//! `evidence` and of `refusals` both contain this JSON.

use serde::{Deserialize, Serialize};

use crate::policy::evidence::RefusalSource;

/// The members of the JSON that describe the response.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct StoredSource {
    /// The HTTP status, or `None` for a refusal on a WebSocket or of a poll.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    /// The JSON of existing files calls the message `words`.
    #[serde(default, rename = "words")]
    message: String,
    #[serde(default)]
    route: String,
    /// The id of the request, which is empty for a poll.
    #[serde(default)]
    request_id: String,
}

impl From<&RefusalSource> for StoredSource {
    fn from(source: &RefusalSource) -> Self {
        Self {
            status: source.status,
            message: source.message.as_ref().to_owned(),
            route: source.route.as_ref().to_owned(),
            request_id: source.request_id.as_ref().to_owned(),
        }
    }
}

impl From<StoredSource> for RefusalSource {
    fn from(stored: StoredSource) -> Self {
        Self {
            status: stored.status,
            message: stored.message.into(),
            route: stored.route.into(),
            request_id: stored.request_id.into(),
        }
    }
}
