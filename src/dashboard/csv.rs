//! Serves usage sums as a CSV file (RFC 4180). The file has a row for each group, such as a day or a key. The query has
//! the same parameters as that of the page Usage.

use std::fmt::Write as _;

use http::header::{CONTENT_DISPOSITION, HeaderValue};
use http::{Response, StatusCode};

use super::PageRequest;
use super::pages::UsageQuery;
use super::response::{text, with_content_type};
use crate::admin::ApiBody;
use crate::store::{UsageDimension, UsageRow};

/// Maximum number of rows of a file. It exceeds the 8,760 hours of a year.
const MAX_ROWS: usize = 10_000;

/// Responds to a download.
pub(super) async fn respond(request: &PageRequest<'_>) -> Response<ApiBody> {
    let query = UsageQuery::parse(&request.query, request.now);
    let rows = match request.admin.history.usage(query.filter(MAX_ROWS)).await {
        Ok(rows) => rows,
        Err(error) => return text(StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
    };
    let mut response =
        with_content_type(StatusCode::OK, "text/csv; charset=utf-8", format_csv(&rows, query.dimension));
    let disposition = format!("attachment; filename=\"keychoir-usage-{}.csv\"", query.dimension.as_str());
    if let Ok(disposition) = HeaderValue::from_str(&disposition) {
        response.headers_mut().insert(CONTENT_DISPOSITION, disposition);
    }
    response
}

/// Formats the rows as CSV.
fn format_csv(rows: &[UsageRow], dimension: UsageDimension) -> String {
    let mut csv = format!(
        "{},credits,attempts,served,failed,characters,request_bytes,response_bytes\r\n",
        dimension.as_str()
    );
    for row in rows {
        let sums = row.sums;
        let group = row.key_name.as_deref().or(row.short_key.as_deref()).unwrap_or(&row.group);
        let failed = sums.attempts.saturating_sub(sums.served);
        // Writing to a `String` cannot fail.
        let _ = write!(
            csv,
            "{},{},{},{},{failed},{},{},{}\r\n",
            quote_field(group),
            sums.credits,
            sums.attempts,
            sums.served,
            sums.characters,
            sums.request_bytes,
            sums.response_bytes
        );
    }
    csv
}

/// Quotes a field by RFC 4180. A field that a spreadsheet would run as a formula gets an apostrophe as its first
/// character.
fn quote_field(text: &str) -> String {
    let text =
        if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { format!("'{text}") } else { text.to_owned() };
    if text.contains(['"', ',', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_and_never_formulas() {
        let fields = [
            ("plain", "plain"),
            ("a,b", "\"a,b\""),
            ("a\"b", "\"a\"\"b\""),
            ("=1+1", "'=1+1"),
            ("@SUM(A1),2", "\"'@SUM(A1),2\""),
        ];
        for (text, expected) in fields {
            assert_eq!(quote_field(text), expected);
        }
    }
}
