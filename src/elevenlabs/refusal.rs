//! Classifies a response of the provider: whether the key, the workspace, the request or the provider is
//! at fault, and for which reason.
//!
//! The status alone is ambiguous. 401 is a bad key, an empty account, a missing permission or an unpaid
//! bill; 400, 402 and 403 are as ambiguous. The body decides: of its `code`, `status`, `type` and
//! message, in one of several shapes, the most specific known words win (`table`). Where the body has no
//! known word, the status is evidence about this request only. WebSocket errors are classified by the
//! same words, with the status that a code has over HTTP (`codes`).

mod body;
pub(in crate::elevenlabs) mod codes;
mod row;
mod table;

use std::time::Duration;

use http::StatusCode;

use crate::policy::verdict::{Refusal, Verdict};

pub use body::ErrorBody;
pub(crate) use row::RefusalMeaning;
pub use row::{BodyFormat, Example};
pub(crate) use table::{examples, meaning};

/// Whether the body of a response with this status must be read to classify it.
#[must_use]
pub fn is_body_needed(status: StatusCode) -> bool {
    // 400 is included: a key has been called invalid, a voice missing and a plan too small with a 400.
    // 404 too: a missing model is missing for every account.
    matches!(status.as_u16(), 400 | 401 | 402 | 403 | 404 | 429)
}

/// Classifies a response. `body` is its parsed body; `None` when it was not needed, or when the response
/// has none (to `HEAD`). `retry_after` comes from its headers.
#[must_use]
pub fn classify(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    if !status.is_client_error() && !status.is_server_error() {
        return Verdict::Served;
    }
    // A 422 is no evidence about the key: the provider validates the schema before it checks the key.
    if is_body_needed(status)
        && let Some(verdict) = body.and_then(|body| table::verdict(status, body, retry_after))
    {
        return verdict;
    }
    by_status(status, body, retry_after)
}

/// Classifies a refusal whose body could not be read within the bounds. A status that usually means a
/// fault of the account leads to an attempt in one more workspace.
#[must_use]
pub fn classify_unreadable(status: StatusCode, retry_after: Option<Duration>) -> Verdict {
    let verdict = by_status(status, Some(&ErrorBody::default()), retry_after);
    if matches!(verdict, Verdict::Unexplained(_)) { verdict } else { Verdict::Unreadable }
}

/// Classifies a refusal in a WebSocket message or close frame, which has no status: a code is classified
/// with the status that it has over HTTP. `None` when its words are not known.
#[must_use]
pub fn in_band(body: &ErrorBody) -> Option<Verdict> {
    table::verdict(StatusCode::OK, body, None)
        .or_else(|| codes::status(body).map(|status| classify(status, Some(body), None)))
}

/// Classifies by status alone. An intermediary may send the same status for every key, so it is evidence
/// about this request only.
fn by_status(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    match status.as_u16() {
        401 | 402 | 403 | 429 if body.is_none() => Verdict::Unexplained(Refusal::Bodiless),
        401 => Verdict::Unexplained(Refusal::Unauthorized),
        402 => Verdict::Unexplained(Refusal::PaymentRequired),
        403 => Verdict::Unexplained(Refusal::Forbidden),
        429 => Verdict::Unexplained(Refusal::TooMany(retry_after)),
        503 => Verdict::Busy,
        500.. => Verdict::ServerError,
        // This includes a 404 that names no resource of an account: then the endpoint does not exist.
        _ => Verdict::RequestError,
    }
}

#[cfg(test)]
mod tests;
