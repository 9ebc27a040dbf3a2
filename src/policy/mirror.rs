//! Classifies a response of Supabase to the mirror, and computes the delay of a retry.

use std::time::Duration;

/// A response of PostgREST, or of a server in front of it.
#[derive(Clone, Copy, Debug)]
pub struct MirrorResponse<'a> {
    /// The HTTP status.
    pub status: u16,
    /// The `code` of an error: PostgREST's own (`PGRST…`) or the database's (SQLSTATE).
    pub code: Option<&'a str>,
    /// Whether the body is empty, as requested.
    pub is_empty: bool,
}

/// The result of sending rows in one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acceptance {
    /// The rows were stored.
    Arrived,
    /// The result is unknown, or storing is not possible now: the same rows are sent again later. Rows
    /// that were stored are not duplicated.
    Later,
    /// At least one row is refused for its content.
    Row,
    /// No row will be stored until the operator has fixed something.
    Person(Hint),
}

/// The problem that the operator must fix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// The key is not accepted.
    Key,
    /// The key is accepted, but may not write to the table.
    Forbidden,
    /// The table does not exist.
    Table,
    /// The table lacks a column, or has one of another type.
    Column,
    /// The address is not that of Supabase's API.
    Address,
    /// The project is paused.
    Asleep,
    /// Every row is refused for its content, so the rows are not the cause.
    EveryRow,
    /// Another cause.
    Unexplained,
}

impl Hint {
    /// The cause and the remedy, for the operator.
    #[must_use]
    pub fn text(self) -> &'static str {
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
                 is there, check SUPABASE_URL"
            }
            Self::Column => {
                "a table has other columns: run the output of `keychoir supabase migrate --print` in the SQL editor"
            }
            Self::Address => {
                "the server at SUPABASE_URL is not Supabase's API: check the address, also http or https"
            }
            Self::Asleep => "the project is paused: resume it in Supabase's dashboard",
            Self::EveryRow => {
                "every row is refused for its content: look for a constraint or a trigger of your own on the table"
            }
            Self::Unexplained => "Supabase refuses every row: look at its dashboard and logs",
        }
    }
}

/// Classifies a response.
#[must_use]
pub fn classify(response: MirrorResponse<'_>) -> Acceptance {
    let code = response.code.unwrap_or_default();
    match response.status {
        200..=299 if response.is_empty => Acceptance::Arrived,
        // A captive portal or a parked domain returns 200 for everything, or redirects.
        200..=399 => Acceptance::Person(Hint::Address),
        401 => Acceptance::Person(Hint::Key),
        403 => Acceptance::Person(Hint::Forbidden),
        408 | 425 | 429 => Acceptance::Later,
        // Supabase's own status, for a project that was paused after a long time without use.
        540 => Acceptance::Person(Hint::Asleep),
        500.. => Acceptance::Later,
        // Older versions of PostgREST send no code with it.
        404 => Acceptance::Person(Hint::Table),
        _ if matches!(code, "42P01" | "PGRST205") => Acceptance::Person(Hint::Table),
        // A column that does not exist, is of another type, cannot be written, or is not unique.
        _ if matches!(code, "42703" | "PGRST204" | "42804" | "428C9" | "42P10") => {
            Acceptance::Person(Hint::Column)
        }
        // Data that does not fit, a constraint, an exception of a trigger; or too much data in one
        // request.
        _ if code.starts_with("22") || code.starts_with("23") || code == "P0001" => Acceptance::Row,
        413 => Acceptance::Row,
        _ => Acceptance::Person(Hint::Unexplained),
    }
}

/// The delay after this many consecutive failures: exponential backoff from `first` to `max`, of which
/// half is fixed and the rest multiplied by `jitter` (0.0 to 1.0), so that clients whose requests fail at
/// the same time do not retry at the same time. At least the `retry_after` of the response.
#[must_use]
pub fn wait(
    failures: u32,
    first: Duration,
    max: Duration,
    retry_after: Option<Duration>,
    jitter: f64,
) -> Duration {
    let doubled = first.saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX));
    let full = doubled.min(max);
    let jitter = if jitter.is_finite() { jitter.clamp(0.0, 1.0) } else { 1.0 };
    (full / 2 + (full / 2).mul_f64(jitter)).max(retry_after.unwrap_or_default())
}

/// Splits rows of which some are refused into two halves, if there is more than one.
#[must_use]
pub fn halves(rows: std::ops::Range<usize>) -> Option<[std::ops::Range<usize>; 2]> {
    let middle = rows.start + rows.len() / 2;
    (rows.len() > 1).then_some([rows.start..middle, middle..rows.end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(status: u16, code: &str, expected: Acceptance) {
        let code = (!code.is_empty()).then_some(code);
        assert_eq!(
            classify(MirrorResponse { status, code, is_empty: code.is_none() }),
            expected,
            "{status} {code:?}"
        );
    }

    #[test]
    fn a_success_without_a_body_is_accepted_and_a_page_is_not() {
        for status in [200, 201, 204] {
            check(status, "", Acceptance::Arrived);
            let page = MirrorResponse { status, code: None, is_empty: false };
            assert_eq!(classify(page), Acceptance::Person(Hint::Address));
        }
        check(301, "", Acceptance::Person(Hint::Address));
    }

    #[test]
    fn an_error_of_the_setup_names_its_remedy() {
        check(401, "", Acceptance::Person(Hint::Key));
        check(401, "PGRST301", Acceptance::Person(Hint::Key));
        // For the role `anon`, Supabase returns 401 where it returns 403 for other roles.
        check(401, "42501", Acceptance::Person(Hint::Key));
        check(403, "42501", Acceptance::Person(Hint::Forbidden));
        check(404, "", Acceptance::Person(Hint::Table));
        check(404, "42P01", Acceptance::Person(Hint::Table));
        check(404, "PGRST205", Acceptance::Person(Hint::Table));
        for code in ["42703", "PGRST204", "42P10", "42804", "428C9"] {
            check(400, code, Acceptance::Person(Hint::Column));
        }
        check(540, "", Acceptance::Person(Hint::Asleep));
        check(402, "", Acceptance::Person(Hint::Unexplained));
        check(406, "PGRST106", Acceptance::Person(Hint::Unexplained));
    }

    #[test]
    fn a_temporary_error_is_retried_later() {
        for status in [408, 425, 429, 500, 502, 503, 504, 522, 544] {
            check(status, "", Acceptance::Later);
        }
        check(503, "PGRST000", Acceptance::Later);
        check(500, "57014", Acceptance::Later);
    }

    #[test]
    fn data_that_does_not_fit_is_an_error_of_its_row() {
        check(400, "22003", Acceptance::Row);
        check(409, "23505", Acceptance::Row);
        check(400, "23514", Acceptance::Row);
        check(400, "P0001", Acceptance::Row);
        check(413, "", Acceptance::Row);
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn delays_double_up_to_a_bound_and_have_jitter() {
        let at = |failures, jitter| wait(failures, SECOND, SECOND * 10, None, jitter).as_millis();
        assert_eq!(
            [1, 2, 3, 4, 5, 33, u32::MAX].map(|n| at(n, 1.0)),
            [1000, 2000, 4000, 8000, 10_000, 10_000, 10_000]
        );
        assert_eq!([0.0, 0.5, 1.0, f64::NAN, -1.0].map(|jitter| at(1, jitter)), [500, 750, 1000, 1000, 500]);
    }

    #[test]
    fn the_named_retry_time_is_waited_for() {
        assert_eq!(wait(1, SECOND, SECOND * 10, Some(SECOND * 60), 0.3), SECOND * 60);
        assert_eq!(wait(1, SECOND, SECOND * 10, Some(Duration::ZERO), 1.0), SECOND);
    }

    #[test]
    fn two_halves_contain_all_rows() {
        assert_eq!(halves(3..8), Some([3..5, 5..8]));
        assert_eq!(halves(3..5), Some([3..4, 4..5]));
        assert_eq!((halves(3..4), halves(3..3)), (None, None));
    }
}
