//! Chooses the text format of a metrics page by the `Accept` header of the request, and writes the page in this format.
//! Also defines gauge families whose values are read when the page is written.

use std::fmt::{self, Debug};

use http::header::{ACCEPT, HeaderMap};
use prometheus_client::encoding::{EncodeGaugeValue, EncodeMetric, MetricEncoder, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

/// The text format of a metrics page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpositionFormat {
    /// OpenMetrics, version 1.0.0.
    OpenMetrics,
    /// The Prometheus text format, version 0.0.4.
    Prometheus,
}

impl ExpositionFormat {
    /// Chooses the format for a request: OpenMetrics, unless its `Accept` header lists text formats but not
    /// OpenMetrics, as the headers of older scrapers and browsers do.
    #[must_use]
    pub fn negotiate(headers: &HeaderMap) -> Self {
        let accepts = |media_type: &str| {
            headers
                .get_all(ACCEPT)
                .iter()
                .any(|value| value.to_str().is_ok_and(|value| value.contains(media_type)))
        };
        if accepts("text/") && !accepts("application/openmetrics-text") {
            Self::Prometheus
        } else {
            Self::OpenMetrics
        }
    }

    /// Returns the value of the `Content-Type` header.
    #[must_use]
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => prometheus_text::CONTENT_TYPE,
        }
    }

    /// Writes a page with the metrics of `registries`.
    #[must_use]
    pub fn write_page(self, registries: &[&Registry]) -> String {
        let mut page = String::new();
        // Writing to a string cannot fail.
        let _ = registries.iter().try_for_each(|registry| match self {
            Self::OpenMetrics => text::encode_registry(&mut page, registry),
            Self::Prometheus => prometheus_text::encode(&mut page, registry),
        });
        if self == Self::OpenMetrics {
            let _ = text::encode_eof(&mut page);
        }
        page
    }
}

/// The samples of a gauge family: pairs of a label set, which must be unique, and a value.
#[derive(Clone, Debug)]
pub struct GaugeSamples<V, const N: usize>(pub Vec<([(&'static str, String); N], V)>);

impl<V: Debug + EncodeGaugeValue, const N: usize> EncodeMetric for GaugeSamples<V, N> {
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

    /// Asserts the format for a request with the given `Accept` header.
    #[track_caller]
    fn assert_format(accept: Option<&str>, expected: ExpositionFormat) {
        let headers = accept.map(|accept| (ACCEPT, accept.parse().unwrap())).into_iter().collect();
        assert_eq!(
            ExpositionFormat::negotiate(&headers),
            expected,
            "a request with `accept: {accept:?}` must receive this format"
        );
    }

    #[test]
    fn a_client_receives_a_format_that_it_accepts() {
        assert_format(None, ExpositionFormat::OpenMetrics);
        assert_format(Some("*/*"), ExpositionFormat::OpenMetrics);
        assert_format(Some("application/openmetrics-text"), ExpositionFormat::OpenMetrics);
        // The headers of Prometheus 3, of vmagent and of a browser.
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                          text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        assert_format(Some(prometheus), ExpositionFormat::OpenMetrics);
        assert_format(Some("text/plain;version=0.0.4;q=1,*/*;q=0.1"), ExpositionFormat::Prometheus);
        assert_format(Some("text/html,application/xhtml+xml,*/*;q=0.8"), ExpositionFormat::Prometheus);
    }

    #[test]
    fn both_formats_have_the_same_samples() {
        let mut registry = Registry::with_prefix("keychoir");
        registry.register("a", "Of a", ConstCounter::new(7_u64));
        registry.register("b", "Of b", GaugeSamples(vec![([("x", "a\\b\"c\nd".to_owned())], 0.5)]));
        let samples = "keychoir_b{x=\"a\\\\b\\\"c\\nd\"} 0.5\n";
        let family_b = format!("# HELP keychoir_b Of b.\n# TYPE keychoir_b gauge\n{samples}");
        assert_eq!(
            ExpositionFormat::OpenMetrics.write_page(&[&registry]),
            format!(
                "# HELP keychoir_a Of a.\n# TYPE keychoir_a counter\nkeychoir_a_total 7\n{family_b}# EOF\n"
            )
        );
        assert_eq!(
            ExpositionFormat::Prometheus.write_page(&[&registry]),
            format!(
                "# HELP keychoir_a_total Of a.\n# TYPE keychoir_a_total counter\nkeychoir_a_total 7\n{family_b}"
            )
        );
    }
}
