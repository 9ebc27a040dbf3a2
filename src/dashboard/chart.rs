//! Renders a chart of lines or stacked bars as a table of its values. The script of the dashboard reads the table and
//! draws the chart. Without the script, a viewer can open the table.

use std::time::Duration;

use maud::{Markup, html};

use super::format::render_number;
use crate::policy::units::UnixMs;

/// The unit of the values of a chart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueUnit {
    Credits,
    Requests,
    Milliseconds,
}

impl ValueUnit {
    fn as_str(self) -> &'static str {
        match self {
            Self::Credits => "credits",
            Self::Requests => "requests",
            Self::Milliseconds => "ms",
        }
    }
}

/// The form in which the script draws the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChartStyle {
    /// A line for each series.
    Lines,
    /// A bar for each period of this length, with the series on top of each other.
    StackedBars(Duration),
}

/// A chart over time.
pub(super) struct Chart<'c> {
    pub(super) title: &'c str,
    /// A sentence with the meaning of the chart, for viewers who cannot see it.
    pub(super) description: String,
    pub(super) unit: ValueUnit,
    pub(super) style: ChartStyle,
    /// The names of the series.
    pub(super) series: Vec<String>,
    /// For each time, the value of each series. `None` if a series has no value at that time.
    pub(super) rows: Vec<(UnixMs, Vec<Option<u64>>)>,
}

impl Chart<'_> {
    /// Renders the chart with its table.
    pub(super) fn render(&self) -> Markup {
        let Self { title, description, unit, style, series, rows } = self;
        let bar_seconds = match style {
            ChartStyle::Lines => None,
            ChartStyle::StackedBars(period) => Some(period.as_secs()),
        };
        html! {
            figure.chart data-unit=(unit.as_str()) data-bar-seconds=[bar_seconds] {
                figcaption { h2 { (title) } }
                div.plot role="img" aria-label=(description) {}
                details {
                    summary { "Show as a table" }
                    div.scroll tabindex="0" role="region" aria-label={ "Table: " (title) } {
                        table {
                            caption.hidden { (title) ", in " (unit.as_str()) }
                            thead { tr { th scope="col" { "Time" } @for name in series { th.number scope="col" { (name) } } } }
                            tbody {
                                @for (time, values) in rows {
                                    tr data-time=(time.0 / 1_000) {
                                        th scope="row" { (super::format::render_time(&time.rfc3339_seconds())) }
                                        @for value in values {
                                            td.number { @match value { Some(value) => (render_number(*value)), None => "–" } }
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
