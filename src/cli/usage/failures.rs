//! Formats the counts of failed attempts for `keychoir usage --failures`, as a table, CSV or JSON.

use serde_json::{Value, json};

use super::{csv_titles, format_label, format_period, group_csv, group_json};
use crate::cli::table::{Alignment, Table, abbreviate, truncate};
use crate::policy::units::UnixMs;
use crate::store::FailureCount;

/// The failed attempts in a period, counted by group, outcome and status.
pub(super) struct Failures {
    pub(super) since: UnixMs,
    pub(super) until: Option<UnixMs>,
    pub(super) dimension_name: &'static str,
    pub(super) counts: Vec<FailureCount>,
}

impl Failures {
    pub(super) fn format_table(&self) -> String {
        let period = format_period(self.since, self.until);
        if self.counts.is_empty() {
            return format!("No failed attempts since {period}.");
        }
        let mut table = Table::new([
            (self.dimension_name, Alignment::Left),
            ("outcome", Alignment::Left),
            ("status", Alignment::Left),
            ("attempts", Alignment::Right),
        ]);
        for FailureCount { group, outcome, status, attempts } in &self.counts {
            table.add_row([
                truncate(&format_label(group), 32),
                truncate(&outcome.replace('_', " "), 23),
                status.map_or_else(|| "-".to_owned(), |status| status.to_string()),
                abbreviate(*attempts),
            ]);
        }
        format!("Failed attempts since {period}\n\n{}", table.format())
    }

    pub(super) fn format_json(&self) -> Value {
        let row = |count: &FailureCount| {
            let mut row = group_json(&count.group, self.dimension_name);
            row.insert("outcome".to_owned(), json!(count.outcome));
            row.insert("status".to_owned(), json!(count.status));
            row.insert("attempts".to_owned(), json!(count.attempts));
            Value::Object(row)
        };
        json!({
            "since": self.since.rfc3339(),
            "until": self.until.map(UnixMs::rfc3339),
            "by": self.dimension_name,
            "failures": self.counts.iter().map(row).collect::<Vec<_>>(),
        })
    }

    pub(super) fn format_csv(&self) -> String {
        let mut csv = format!("{},outcome,status,attempts", csv_titles(self.dimension_name));
        for FailureCount { group, outcome, status, attempts } in &self.counts {
            let status = status.map(|status| status.to_string()).unwrap_or_default();
            csv.push_str(&format!("\n{},{outcome},{status},{attempts}", group_csv(group)));
        }
        csv
    }
}
