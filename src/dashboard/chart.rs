//! A chart of stacked or plain series. The data is a table, which the script draws and which everybody can open, so the
//! page contains each number once.

use std::time::Duration;

use maud::{Markup, html};

use super::format::number;
use crate::policy::units::UnixMs;

/// The unit of the values.
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

/// How the values are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// A line for each series.
    Lines,
    /// A bar for each period of this length, with the series on top of each other.
    StackedBars(Duration),
}

/// A chart over time.
pub(super) struct Chart<'c> {
    pub(super) title: &'c str,
    /// What the chart shows, in a sentence for viewers who do not see it.
    pub(super) description: String,
    pub(super) unit: ValueUnit,
    pub(super) style: Style,
    pub(super) series: Vec<String>,
    /// A value for each series, by time. `None` where a series has no value.
    pub(super) rows: Vec<(UnixMs, Vec<Option<u64>>)>,
}

impl Chart<'_> {
    pub(super) fn render(&self) -> Markup {
        let Self { title, description, unit, style, series, rows } = self;
        let bar_seconds = match style {
            Style::Lines => None,
            Style::StackedBars(period) => Some(period.as_secs()),
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
                                        th scope="row" { (super::format::time(&time.rfc3339_seconds())) }
                                        @for value in values {
                                            td.number { @match value { Some(value) => (number(*value)), None => "–" } }
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
