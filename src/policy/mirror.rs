//! Decides how the mirror, which copies usage records to Supabase, continues after a response of Supabase. The rows
//! count as stored, are sent again after a delay, or are split because one of them is rejected. If the operator must
//! fix a problem, the rows are kept until then. Supabase serves its database with PostgREST, an HTTP server for
//! PostgreSQL.

use std::ops::Range;
use std::time::Duration;

/// The relevant parts of a response of PostgREST, or of a server in front of it.
#[derive(Clone, Copy, Debug)]
pub struct MirrorResponse<'a> {
    /// The HTTP status.
    pub status: u16,
    /// The `code` in the body of an error: a PostgREST code (`PGRST…`), or an SQLSTATE of the database. `None` if the
    /// body contains no code.
    pub code: Option<&'a str>,
    /// Whether the body is empty. The requests of the mirror ask PostgREST for an empty body.
    pub is_empty: bool,
}

/// The result of sending rows in one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryResult {
    /// The rows are stored.
    Stored,
    /// The result is unknown, or the rows cannot be stored now. They are sent again later. Supabase does not duplicate
    /// rows that it has already stored.
    Retry,
    /// At least one row is rejected for its content, or the rows are too large for one request.
    RowRejected,
    /// No row can be stored until the operator has fixed the contained problem.
    OperatorRequired(MirrorProblem),
}

/// A problem of the setup that the operator must fix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorProblem {
    /// Supabase does not accept the secret key.
    Key,
    /// Supabase accepts the secret key, but the key may not write to the table.
    Forbidden,
    /// The table of the mirror does not exist.
    Table,
    /// The table lacks a column, or a column has a different type, cannot be written, or is not unique.
    Column,
    /// The address is not an address of Supabase's API.
    Address,
    /// The project is paused.
    Paused,
    /// Every row is rejected for its content, so the cause is in the table.
    EveryRow,
    /// Supabase refuses the request for an unknown reason.
    Unexplained,
}

impl MirrorProblem {
    /// Returns the message for the operator: the cause and what to do.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            Self::Key => {
                "Supabase refuses the key: set SUPABASE_SECRET_KEY to a secret key of this project \
                 (project settings, API keys) and restart"
            }
            Self::Forbidden => {
                "the key may not write there: run the output of `keychoir supabase migrate --print`, which grants \
                 service_role access"
            }
            Self::Table => {
                "a table is missing: run the output of `keychoir supabase migrate --print` in the SQL editor; if it \
                 exists, check SUPABASE_URL"
            }
            Self::Column => {
                "a table has other columns: run the output of `keychoir supabase migrate --print` in the SQL editor"
            }
            Self::Address => {
                "the server at SUPABASE_URL is not Supabase's API: check the address and its scheme"
            }
            Self::Paused => "the project is paused: resume it in Supabase's dashboard",
            Self::EveryRow => {
                "every row is rejected for its content: check your own constraints and triggers on the table"
            }
            Self::Unexplained => "Supabase refuses every row: check its dashboard and logs",
        }
    }
}

/// Classifies a response.
#[must_use]
pub fn classify(response: MirrorResponse<'_>) -> DeliveryResult {
    let code = response.code.unwrap_or_default();
    match response.status {
        200..=299 if response.is_empty => DeliveryResult::Stored,
        // A captive portal or a parked domain returns a page for every request, or redirects.
        200..=399 => DeliveryResult::OperatorRequired(MirrorProblem::Address),
        401 => DeliveryResult::OperatorRequired(MirrorProblem::Key),
        403 => DeliveryResult::OperatorRequired(MirrorProblem::Forbidden),
        408 | 425 | 429 => DeliveryResult::Retry,
        // Supabase sends this status for a project that was paused because it was not used.
        540 => DeliveryResult::OperatorRequired(MirrorProblem::Paused),
        500.. => DeliveryResult::Retry,
        // Older versions of PostgREST send no code.
        404 => DeliveryResult::OperatorRequired(MirrorProblem::Table),
        _ if matches!(code, "42P01" | "PGRST205") => DeliveryResult::OperatorRequired(MirrorProblem::Table),
        // A column does not exist, has another type, cannot be written, or is not unique.
        _ if matches!(code, "42703" | "PGRST204" | "42804" | "428C9" | "42P10") => {
            DeliveryResult::OperatorRequired(MirrorProblem::Column)
        }
        // A value does not fit, violates a constraint, or raises an exception in a trigger.
        _ if code.starts_with("22") || code.starts_with("23") || code == "P0001" => {
            DeliveryResult::RowRejected
        }
        // The request is too large.
        413 => DeliveryResult::RowRejected,
        _ => DeliveryResult::OperatorRequired(MirrorProblem::Unexplained),
    }
}

/// Returns the delay after `failures` consecutive failures: exponential backoff from `first` to `max`, but at least the
/// `retry_after` of the response. Half of the backoff is multiplied by `jitter` (0.0 to 1.0), so that mirrors that fail
/// at the same time do not retry at the same time.
#[must_use]
pub fn retry_delay(
    failures: u32,
    first: Duration,
    max: Duration,
    retry_after: Option<Duration>,
    jitter: f64,
) -> Duration {
    let doubled = first.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
    let backoff = doubled.min(max);
    let jitter = if jitter.is_finite() { jitter.clamp(0.0, 1.0) } else { 1.0 };
    (backoff / 2 + (backoff / 2).mul_f64(jitter)).max(retry_after.unwrap_or_default())
}

/// Splits rows into two halves, to find the rows that Supabase rejects. Returns `None` for a single row.
#[must_use]
pub fn split_rows(rows: Range<usize>) -> Option<[Range<usize>; 2]> {
    let middle = rows.start + rows.len() / 2;
    (rows.len() > 1).then_some([rows.start..middle, middle..rows.end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_delivery(status: u16, code: &str, expected: DeliveryResult) {
        let code = (!code.is_empty()).then_some(code);
        assert_eq!(
            classify(MirrorResponse { status, code, is_empty: code.is_none() }),
            expected,
            "a response with the status {status} and the code {code:?} must be classified by them"
        );
    }

    #[test]
    fn a_success_without_a_body_is_accepted_and_a_page_is_not() {
        for status in [200, 201, 204] {
            check_delivery(status, "", DeliveryResult::Stored);
            let page = MirrorResponse { status, code: None, is_empty: false };
            assert_eq!(classify(page), DeliveryResult::OperatorRequired(MirrorProblem::Address));
        }
        check_delivery(301, "", DeliveryResult::OperatorRequired(MirrorProblem::Address));
    }

    #[test]
    fn an_error_of_the_setup_is_a_problem_for_the_operator() {
        check_delivery(401, "", DeliveryResult::OperatorRequired(MirrorProblem::Key));
        check_delivery(401, "PGRST301", DeliveryResult::OperatorRequired(MirrorProblem::Key));
        // For the role `anon`, Supabase returns 401 where it returns 403 for other roles.
        check_delivery(401, "42501", DeliveryResult::OperatorRequired(MirrorProblem::Key));
        check_delivery(403, "42501", DeliveryResult::OperatorRequired(MirrorProblem::Forbidden));
        check_delivery(404, "", DeliveryResult::OperatorRequired(MirrorProblem::Table));
        check_delivery(404, "42P01", DeliveryResult::OperatorRequired(MirrorProblem::Table));
        check_delivery(404, "PGRST205", DeliveryResult::OperatorRequired(MirrorProblem::Table));
        for code in ["42703", "PGRST204", "42P10", "42804", "428C9"] {
            check_delivery(400, code, DeliveryResult::OperatorRequired(MirrorProblem::Column));
        }
        check_delivery(540, "", DeliveryResult::OperatorRequired(MirrorProblem::Paused));
        check_delivery(402, "", DeliveryResult::OperatorRequired(MirrorProblem::Unexplained));
        check_delivery(406, "PGRST106", DeliveryResult::OperatorRequired(MirrorProblem::Unexplained));
    }

    #[test]
    fn a_temporary_error_is_retried_later() {
        for status in [408, 425, 429, 500, 502, 503, 504, 522, 544] {
            check_delivery(status, "", DeliveryResult::Retry);
        }
        check_delivery(503, "PGRST000", DeliveryResult::Retry);
        check_delivery(500, "57014", DeliveryResult::Retry);
    }

    #[test]
    fn invalid_data_rejects_a_row() {
        check_delivery(400, "22003", DeliveryResult::RowRejected);
        check_delivery(409, "23505", DeliveryResult::RowRejected);
        check_delivery(400, "23514", DeliveryResult::RowRejected);
        check_delivery(400, "P0001", DeliveryResult::RowRejected);
        check_delivery(413, "", DeliveryResult::RowRejected);
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn delays_double_up_to_a_bound_and_have_jitter() {
        let delay = |failures, jitter| retry_delay(failures, SECOND, SECOND * 10, None, jitter).as_millis();
        assert_eq!(
            [1, 2, 3, 4, 5, 33, u32::MAX].map(|failures| delay(failures, 1.0)),
            [1000, 2000, 4000, 8000, 10_000, 10_000, 10_000]
        );
        assert_eq!(
            [0.0, 0.5, 1.0, f64::NAN, -1.0].map(|jitter| delay(1, jitter)),
            [500, 750, 1000, 1000, 500]
        );
    }

    #[test]
    fn the_delay_is_at_least_the_retry_after() {
        assert_eq!(retry_delay(1, SECOND, SECOND * 10, Some(SECOND * 60), 0.3), SECOND * 60);
        assert_eq!(retry_delay(1, SECOND, SECOND * 10, Some(Duration::ZERO), 1.0), SECOND);
    }

    #[test]
    fn two_halves_contain_all_rows() {
        assert_eq!(split_rows(3..8), Some([3..5, 5..8]));
        assert_eq!(split_rows(3..5), Some([3..4, 4..5]));
        assert_eq!((split_rows(3..4), split_rows(3..3)), (None, None));
    }
}
