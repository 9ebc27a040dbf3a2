//! The formats of a metrics page, and the samples of a family whose values are read when the page is written.

use std::fmt::{self, Debug};

use http::header::{ACCEPT, HeaderMap};
use prometheus_client::encoding::{EncodeGaugeValue, EncodeMetric, MetricEncoder, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// The form of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposition {
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
    /// Prometheus' own text form, version 0.0.4.
    Text,
}

impl Exposition {
    /// The form for a request: OpenMetrics, unless its `Accept` header names text formats without
    /// OpenMetrics, as older scrapers and browsers send it.
    #[must_use]
    pub fn accepted(headers: &HeaderMap) -> Self {
        let accepts = |form: &str| {
            headers.get_all(ACCEPT).iter().any(|value| value.to_str().is_ok_and(|value| value.contains(form)))
        };
        if accepts("text/") && !accepts("application/openmetrics-text") {
            Self::Text
        } else {
            Self::OpenMetrics
        }
    }

    /// The value of `Content-Type`.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => prometheus_text::CONTENT_TYPE,
        }
    }

    /// A page of these registries.
    #[must_use]
    pub fn page(self, registries: &[&Registry]) -> String {
        let mut page = String::new();
        // Writing to memory does not fail.
        let _ = registries.iter().try_for_each(|registry| match self {
            Self::OpenMetrics => text::encode_registry(&mut page, registry),
            Self::Text => prometheus_text::encode(&mut page, registry),
        });
        if self == Self::OpenMetrics {
            let _ = text::encode_eof(&mut page);
        }
        page
    }
}

/// The samples of a gauge family, with their labels. No two may have the same labels.
#[derive(Clone, Debug)]
pub struct Samples<V, const N: usize>(pub Vec<([(&'static str, String); N], V)>);

impl<V: Debug + EncodeGaugeValue, const N: usize> EncodeMetric for Samples<V, N> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(labels, value)| encoder.encode_family(labels)?.encode_gauge(value))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::ConstCounter;

    use super::*;

    #[track_caller]
    fn check(accept: Option<&str>, expected: Exposition) {
        let headers = accept.map(|accept| (ACCEPT, accept.parse().unwrap())).into_iter().collect();
        assert_eq!(Exposition::accepted(&headers), expected, "{accept:?}");
    }

    #[test]
    fn a_client_gets_a_form_that_it_accepts() {
        check(None, Exposition::OpenMetrics);
        check(Some("*/*"), Exposition::OpenMetrics);
        check(Some("application/openmetrics-text"), Exposition::OpenMetrics);
        // Prometheus 3, vmagent, a browser.
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                          text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        check(Some(prometheus), Exposition::OpenMetrics);
        check(Some("text/plain;version=0.0.4;q=1,*/*;q=0.1"), Exposition::Text);
        check(Some("text/html,application/xhtml+xml,*/*;q=0.8"), Exposition::Text);
    }

    #[test]
    fn both_forms_have_the_same_samples() {
        let mut registry = Registry::with_prefix("keychoir");
        registry.register("a", "Of a", ConstCounter::new(7_u64));
        registry.register("b", "Of b", Samples(vec![([("x", "a\\b\"c\nd".to_owned())], 0.5)]));
        let samples = "keychoir_b{x=\"a\\\\b\\\"c\\nd\"} 0.5\n";
        let of_b = format!("# HELP keychoir_b Of b.\n# TYPE keychoir_b gauge\n{samples}");
        assert_eq!(
            Exposition::OpenMetrics.page(&[&registry]),
            format!("# HELP keychoir_a Of a.\n# TYPE keychoir_a counter\nkeychoir_a_total 7\n{of_b}# EOF\n")
        );
        assert_eq!(
            Exposition::Text.page(&[&registry]),
            format!(
                "# HELP keychoir_a_total Of a.\n# TYPE keychoir_a_total counter\nkeychoir_a_total 7\n{of_b}"
            )
        );
    }
}
