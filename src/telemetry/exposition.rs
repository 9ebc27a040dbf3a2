//! Prometheus' text form, version 0.0.4: a family is its help, its type and its samples. Separate
//! from what is counted, so that no counter knows how it is written.

use std::fmt::{Display, Write as _};

/// What a family is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

/// A page of families. Every name begins with `keychoir_`.
#[derive(Clone, Debug, Default)]
pub struct Page {
    text: String,
    name: String,
}

impl Page {
    /// Begins the family `name`; samples that follow belong to it.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) {
        self.name = format!("keychoir_{name}");
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(self.text, "# HELP {0} {help}\n# TYPE {0} {kind}", self.name);
    }

    /// A value of the family, told from others by its labels.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.line("", labels, value);
    }

    /// The values of a histogram: for each bound how many are within it, their sum, and how many there
    /// are.
    pub fn histogram(&mut self, buckets: &[(f64, u64)], sum: f64, count: u64) {
        for (bound, within) in buckets {
            self.line("_bucket", &[("le", &bound.to_string())], within);
        }
        self.line("_bucket", &[("le", "+Inf")], count);
        self.line("_sum", &[], sum);
        self.line("_count", &[], count);
    }

    /// All of it.
    #[must_use]
    pub fn text(self) -> String {
        self.text
    }

    fn line(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        self.text.push_str(&self.name);
        self.text.push_str(suffix);
        for (index, (name, value)) in labels.iter().enumerate() {
            self.text.push(if index == 0 { '{' } else { ',' });
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{name}=\"{value}\"");
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_in_prometheus_form() {
        let mut page = Page::default();
        page.family("a_total", Kind::Counter, "Of a.");
        page.sample(&[("x", "1"), ("y", "a\\b\"c\nd")], 7);
        page.family("b", Kind::Gauge, "Of b.");
        page.sample(&[], 0.5);
        let text = "# HELP keychoir_a_total Of a.\n# TYPE keychoir_a_total counter\n\
                    keychoir_a_total{x=\"1\",y=\"a\\\\b\\\"c\\nd\"} 7\n\
                    # HELP keychoir_b Of b.\n# TYPE keychoir_b gauge\nkeychoir_b 0.5\n";
        assert_eq!(page.text(), text);
    }
}
