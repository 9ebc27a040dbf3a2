//! Classifies a response of the provider: whether it is a refusal, for which reason, and whether the reason concerns
//! the key, the workspace, the request or the provider.
//!
//! The status alone is ambiguous: a 401 response can mean a bad key, an empty account, a missing permission or an
//! unpaid bill. The statuses 400, 402 and 403 are equally ambiguous. The body determines the reason. It contains a
//! `code`, `status`, `type` and message in one of several formats, and the first row of `table` that matches them
//! determines the verdict. If no row matches, the status is evidence about this request only. WebSocket errors are
//! classified by the same table, and otherwise with the status that their code has over HTTP (`codes`).

mod body;
pub(in crate::elevenlabs) mod codes;
mod row;
mod table;

use std::time::Duration;

use http::StatusCode;

use crate::policy::verdict::{UnexplainedRefusal, Verdict};

pub use body::ErrorBody;
pub(crate) use row::RefusalMeaning;
pub use row::{BodyFormat, Example};
pub(crate) use table::{examples, meaning_of_example};

/// Whether the body of a response with the given `status` is needed to classify it.
#[must_use]
pub fn is_body_needed(status: StatusCode) -> bool {
    // The provider has sent 400 responses for an invalid key, a missing voice and a plan without a feature. The body
    // of a 404 response names the missing resource: a model is missing for every account, and a voice for one account.
    matches!(status.as_u16(), 400 | 401 | 402 | 403 | 404 | 429)
}

/// Classifies a response. `body` is `None` if it is not needed, or if the response has no body, such as a response to a
/// `HEAD` request. `retry_after` is the value of the `Retry-After` header.
#[must_use]
pub fn classify(status: StatusCode, body: Option<&ErrorBody>, retry_after: Option<Duration>) -> Verdict {
    if !status.is_client_error() && !status.is_server_error() {
        return Verdict::Served;
    }
    // The body of a 422 response is not needed, because the provider validates the schema before it checks the key.
    if is_body_needed(status)
        && let Some(verdict) = body.and_then(|body| table::find_verdict(status, body, retry_after))
    {
        return verdict;
    }
    classify_by_status(status, body, retry_after)
}

/// Classifies a refusal whose body could not be read within the limits. For the statuses 401, 402, 403 and 429, the
/// verdict allows one attempt with another workspace, because these statuses usually concern an account.
#[must_use]
pub fn classify_unreadable(status: StatusCode, retry_after: Option<Duration>) -> Verdict {
    let verdict = classify_by_status(status, Some(&ErrorBody::default()), retry_after);
    if matches!(verdict, Verdict::Unexplained(_)) { verdict } else { Verdict::Unreadable }
}

/// Classifies an error in a WebSocket message or close frame, which has no status. A code is classified with
/// the status that it has over HTTP. Returns `None` if no code or message is known.
#[must_use]
pub fn classify_without_status(body: &ErrorBody) -> Option<Verdict> {
    table::find_verdict(StatusCode::OK, body, None)
        .or_else(|| codes::find_status(body).map(|status| classify(status, Some(body), None)))
}

/// Classifies a response by its status alone. An intermediary may send the same status for every key, so the
/// status is evidence about this request only.
fn classify_by_status(
    status: StatusCode,
    body: Option<&ErrorBody>,
    retry_after: Option<Duration>,
) -> Verdict {
    match status.as_u16() {
        401 | 402 | 403 | 429 if body.is_none() => Verdict::Unexplained(UnexplainedRefusal::Bodiless),
        401 => Verdict::Unexplained(UnexplainedRefusal::Unauthorized),
        402 => Verdict::Unexplained(UnexplainedRefusal::PaymentRequired),
        403 => Verdict::Unexplained(UnexplainedRefusal::Forbidden),
        429 => Verdict::Unexplained(UnexplainedRefusal::TooMany(retry_after)),
        503 => Verdict::Busy,
        500.. => Verdict::ServerError,
        // A 404 response that names no resource of an account means a missing endpoint.
        _ => Verdict::RequestError,
    }
}

#[cfg(test)]
mod tests;
