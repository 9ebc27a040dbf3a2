//! Prometheus' text format, version 0.0.4: a family consists of its help, its type and its samples. Separate
//! from the counters, so that they are independent of the format.

use std::fmt::{Display, Write as _};

/// The type of a metric family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A counter, which only grows.
    Counter,
    /// A gauge, which can rise and fall.
    Gauge,
    /// A histogram of observed values.
    Histogram,
}

/// A page of metric families. Every name begins with `keychoir_`.
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

    /// A sample of the family with these labels.
    pub fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.line("", labels, value);
    }

    /// The samples of a histogram: the cumulative count for each bound, the sum, and the total count.
    pub fn histogram(&mut self, buckets: &[(f64, u64)], sum: f64, count: u64) {
        for (bound, within) in buckets {
            self.line("_bucket", &[("le", &bound.to_string())], within);
        }
        self.line("_bucket", &[("le", "+Inf")], count);
        self.line("_sum", &[], sum);
        self.line("_count", &[], count);
    }

    /// The text of the page.
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
