//! Tests the page `/metrics`: its OpenMetrics and text formats are valid for Prometheus, its metrics and outcomes are
//! those in `docs/operations.md`, and its values equal the usage records and the provider's ledger. Keys have different
//! labels, and data of a client never becomes a label. If clients are configured, the page requires a token.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, TestProxy, start_proxy, start_proxy_with,
};
use keychoir::config::ClientConfig;
use keychoir::policy::outcome::Outcome;
use keychoir::secret::{Fingerprint, TokenFingerprint};
use keychoir::simulator::Plan;

/// The exposition format of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExpositionFormat {
    OpenMetrics,
    Text,
}

impl ExpositionFormat {
    fn media_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// A value of a metric for one combination of its labels.
#[derive(Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// The parsed page `/metrics`.
#[derive(Debug)]
struct MetricsPage {
    /// The type of each family, by its name. The name of an OpenMetrics counter or info includes the suffix of its
    /// samples.
    families: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

impl MetricsPage {
    /// Parses a page.
    ///
    /// # Panics
    ///
    /// Panics if the page violates the format.
    fn parse(text: &str, format: ExpositionFormat) -> Self {
        let mut page = Self { families: BTreeMap::new(), samples: Vec::new() };
        let mut series = HashSet::new();
        let (mut help, mut family) = (None, None);
        let is_openmetrics = format == ExpositionFormat::OpenMetrics;
        let lines = if is_openmetrics {
            text.strip_suffix("# EOF\n").expect("the page must end with # EOF")
        } else {
            text
        };
        assert!(lines.ends_with('\n'), "the last line must end with a newline");
        for line in lines.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, description) = rest.split_once(' ').expect("the help must have a description");
                assert!(
                    description.ends_with('.') && !description.ends_with(".."),
                    "the description must be a sentence: {line}"
                );
                help = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(
                    help.take().as_deref(),
                    Some(name),
                    "the type must follow the help of the same family"
                );
                let kinds: &[&str] = if is_openmetrics {
                    &["counter", "gauge", "histogram", "info", "unknown"]
                } else {
                    &["counter", "gauge", "histogram", "untyped"]
                };
                assert!(kinds.contains(&kind), "the type must be one of the format: {line}");
                if !["unknown", "untyped"].contains(&kind) {
                    assert_eq!(
                        name.ends_with("_total"),
                        kind == "counter" && !is_openmetrics,
                        "only counters must end with _total: {line}"
                    );
                }
                assert!(
                    is_valid_name(name)
                        && ["keychoir_", "process_"].iter().any(|prefix| name.starts_with(prefix)),
                    "the name must be valid and have a known prefix: {line}"
                );
                let suffixes: &[&str] = match kind {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    "counter" if is_openmetrics => &["_total"],
                    "info" => &["_info"],
                    _ => &[""],
                };
                let sample_name =
                    if suffixes.len() == 1 { format!("{name}{}", suffixes[0]) } else { name.to_owned() };
                assert_eq!(
                    page.families.insert(sample_name, kind.to_owned()),
                    None,
                    "{line} must not be repeated"
                );
                family = Some((name.to_owned(), kind.to_owned(), suffixes));
            } else {
                let sample = parse_sample(line);
                let (name, kind, suffixes) = family.as_ref().expect("a sample must follow its family");
                let suffix =
                    sample.name.strip_prefix(name).expect("the samples of a family must be consecutive");
                assert!(suffixes.contains(&suffix), "the sample must have a suffix of its family: {line}");
                assert!(kind == "gauge" || sample.value >= 0.0, "only a gauge may be negative: {line}");
                assert!(
                    series.insert(format!("{}{:?}", sample.name, sample.labels)),
                    "{line} must not be repeated"
                );
                page.samples.push(sample);
            }
        }
        if is_openmetrics {
            // In OpenMetrics, a counter and a gauge with the same base name would be one family.
            let bases: HashSet<_> =
                page.families.iter().map(|(name, kind)| family_base(name, kind)).collect();
            assert_eq!(bases.len(), page.families.len(), "each family must have a different base name");
        }
        page.assert_valid_histograms();
        page
    }

    fn assert_valid_histograms(&self) {
        for (name, _) in self.families.iter().filter(|(_, kind)| *kind == "histogram") {
            let buckets: Vec<&Sample> =
                self.samples.iter().filter(|sample| sample.name == format!("{name}_bucket")).collect();
            let bounds: Vec<f64> = buckets.iter().map(|bucket| bucket.labels[0].1.parse().unwrap()).collect();
            assert!(
                bounds.is_sorted() && bounds.last() == Some(&f64::INFINITY),
                "{name}: the bounds must increase to infinity: {bounds:?}"
            );
            assert!(buckets.iter().map(|bucket| bucket.value).is_sorted(), "{name} must be cumulative");
            assert_eq!(buckets.last().unwrap().value, self.value(&format!("{name}_count"), &[]));
        }
    }

    /// Returns the value of the only sample with this name and these labels. The sample may have further labels.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let is_match = |sample: &&Sample| {
            sample.name == name && labels.iter().all(|(name, value)| sample.label(name) == Some(*value))
        };
        let matches: Vec<&Sample> = self.samples.iter().filter(is_match).collect();
        assert_eq!(matches.len(), 1, "{name} {labels:?} must match one sample: {matches:?}");
        matches[0].value
    }

    /// Returns the positive values of a family, summed by the values of a label.
    fn sums(&self, name: &str, label: &str) -> BTreeMap<&str, u64> {
        let mut sums = BTreeMap::new();
        for sample in self.samples.iter().filter(|sample| sample.name == name && sample.value > 0.0) {
            *sums.entry(sample.label(label).unwrap()).or_default() += sample.value as u64;
        }
        sums
    }

    /// Returns the metrics in the form of the documentation: name, labels and type.
    fn metrics(&self) -> BTreeSet<String> {
        let metric = |(name, kind): (&String, &String)| {
            let belongs_to_family =
                |sample: &&Sample| sample.name.starts_with(name) && sample.family() == name;
            let sample = self
                .samples
                .iter()
                .find(belongs_to_family)
                .unwrap_or_else(|| panic!("{name} must have a sample"));
            let labels: Vec<&str> =
                sample.labels.iter().map(|(name, _)| name.as_str()).filter(|name| *name != "le").collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            format!("{name}{labels} {kind}")
        };
        self.families.iter().map(metric).collect()
    }
}

impl Sample {
    fn label(&self, name: &str) -> Option<&str> {
        self.labels.iter().find(|(label_name, _)| label_name == name).map(|(_, value)| value.as_str())
    }

    /// Returns the name without the suffix of a histogram.
    fn family(&self) -> &str {
        let suffixes = ["_bucket", "_sum", "_count"];
        suffixes.iter().find_map(|suffix| self.name.strip_suffix(suffix)).unwrap_or(&self.name)
    }
}

/// Returns the name of a family in OpenMetrics, without the suffix of its samples.
fn family_base<'a>(name: &'a str, kind: &str) -> &'a str {
    match kind {
        "counter" => name.trim_end_matches("_total"),
        "info" => name.trim_end_matches("_info"),
        _ => name,
    }
}

/// Returns whether `name` consists of the characters of Keychoir's metric and label names.
fn is_valid_name(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

fn parse_sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?} must be a sample"));
    let (name, labels) = match series.split_once('{') {
        None => (series, Vec::new()),
        Some((name, rest)) => (name, parse_labels(rest.strip_suffix('}').expect("labels must be closed"))),
    };
    assert!(is_valid_name(name), "the name must have valid characters: {line}");
    Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().unwrap_or_else(|_| panic!("the sample must have a number: {line}")),
    }
}

fn parse_labels(mut text: &str) -> Vec<(String, String)> {
    let mut labels = Vec::new();
    loop {
        let (name, rest) = text.split_once("=\"").unwrap_or_else(|| panic!("{text:?} must be a label"));
        assert!(is_valid_name(name), "the label {name:?} must have valid characters");
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next().expect("a label value must be closed") {
                (index, '"') => break index,
                (_, '\\') => value.push(match chars.next().unwrap().1 {
                    'n' => '\n',
                    escaped @ ('\\' | '"') => escaped,
                    escaped => panic!("the escape \\{escaped} must be valid"),
                }),
                (_, character) => value.push(character),
            }
        };
        labels.push((name.to_owned(), value));
        match &rest[end + 1..] {
            "" => return labels,
            remainder => text = remainder.strip_prefix(',').expect("labels must be separated by commas"),
        }
    }
}

async fn fetch_text(proxy: &TestProxy, accept: &str, format: ExpositionFormat) -> String {
    let request = proxy.client.get(format!("{}/metrics", proxy.url)).header("accept", accept);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], format.media_type());
    assert_eq!(response.headers()["cache-control"], "no-store");
    response.text().await.unwrap()
}

async fn fetch_page(proxy: &TestProxy) -> MetricsPage {
    MetricsPage::parse(
        &fetch_text(proxy, "*/*", ExpositionFormat::OpenMetrics).await,
        ExpositionFormat::OpenMetrics,
    )
}

/// Waits until this number of requests has ended and all usage records are written, and returns the page.
async fn fetch_final_page(proxy: &TestProxy, requests: u64) -> MetricsPage {
    let polling = async {
        loop {
            let page = fetch_page(proxy).await;
            let ended_requests: u64 = page.sums("keychoir_requests_total", "code").values().sum();
            if ended_requests == requests && page.value("keychoir_usage_records_queued", &[]) == 0.0 {
                return page;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), polling)
        .await
        .expect("the requests must end and their records must be written")
}

const DOCUMENTATION: &str = include_str!("../../docs/operations.md");

#[tokio::test]
async fn the_document_lists_every_metric_with_its_labels_and_type_and_no_other() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)])).await;
    proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, Some("quota_short".parse().unwrap()));
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    let page = fetch_final_page(&proxy, 1).await;
    let row = |line: &str| {
        let [_, name, kind, meaning, _] = line.split('|').collect::<Vec<_>>().try_into().ok()?;
        let name = name.trim().strip_prefix('`')?.strip_suffix('`')?;
        let is_metric = ["keychoir_", "process_"].iter().any(|prefix| name.starts_with(prefix));
        // These metrics exist only with `[redis]`, and `tests/replicas` compares them with the document.
        let is_about_replicas =
            ["keychoir_redis_", "keychoir_replica"].iter().any(|prefix| name.starts_with(prefix));
        assert!(!is_metric || !meaning.trim().is_empty(), "the row must describe its metric: {line}");
        (is_metric && !is_about_replicas).then(|| format!("{name} {}", kind.trim()))
    };
    let documented: BTreeSet<String> = DOCUMENTATION.lines().filter_map(row).collect();
    let exported_metrics = page.metrics();
    let missing: Vec<_> = exported_metrics.difference(&documented).collect();
    let obsolete: Vec<_> = documented.difference(&exported_metrics).collect();
    assert!(
        missing.is_empty() && obsolete.is_empty(),
        "docs/operations.md must list {missing:#?}\nand must not list {obsolete:#?}"
    );
    proxy.close().await;
}

#[test]
fn the_document_lists_every_outcome() {
    let missing: Vec<&str> = Outcome::ALL
        .iter()
        .map(|outcome| outcome.as_str())
        .filter(|outcome| !DOCUMENTATION.contains(&format!("`{outcome}`")))
        .collect();
    assert!(missing.is_empty(), "docs/operations.md must list {missing:?}");
}

#[tokio::test]
async fn a_client_that_prefers_text_receives_the_same_metrics_in_the_prometheus_format() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000)])).await;
    proxy.wait_until_served("/v1/voices").await;
    let openmetrics_page = fetch_final_page(&proxy, 1).await;
    let accept = "text/plain;version=0.0.4;q=1,*/*;q=0.1";
    let text_page =
        MetricsPage::parse(&fetch_text(&proxy, accept, ExpositionFormat::Text).await, ExpositionFormat::Text);
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    MetricsPage::parse(
        &fetch_text(&proxy, accept, ExpositionFormat::OpenMetrics).await,
        ExpositionFormat::OpenMetrics,
    );
    let samples = |page: &MetricsPage| {
        let series = |sample: &Sample| {
            let labels = sample.labels.iter().map(|(name, value)| match value.parse::<f64>() {
                Ok(bound) if name == "le" => format!("le={bound}"),
                _ => format!("{name}={value}"),
            });
            format!("{}{:?}", sample.name, labels.collect::<Vec<_>>())
        };
        page.samples.iter().map(series).collect::<BTreeSet<_>>()
    };
    assert_eq!(samples(&text_page), samples(&openmetrics_page));
    proxy.close().await;
}

#[tokio::test]
async fn the_name_of_a_key_is_its_label() {
    let plan = Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 10_000)]);
    let proxy = start_proxy_with(plan, |config| config.keys[1].name = Some("studio".to_owned())).await;
    proxy.request_speech(2_000).await;
    let page = fetch_final_page(&proxy, 1).await;
    assert_eq!(page.value("keychoir_workspace_credits_limit", &[("workspace", "studio")]), 10_000.0);
    assert_eq!(page.sums("keychoir_upstream_requests_total", "key"), BTreeMap::from([("studio", 1)]));
    let hash = &Fingerprint::new(SECOND_KEY).to_string()[..12];
    let labels =
        [("key", "studio"), ("short_key", "sk_key_numb...00002"), ("hash", hash), ("workspace", "studio")];
    assert_eq!(page.value("keychoir_key_info", &labels), 1.0);
    proxy.close().await;
}

#[tokio::test]
async fn the_credits_of_a_workspace_are_counted_once_for_all_its_keys() {
    let plan = Plan::parse(&format!("{FIRST_KEY}=1000@ws_1,{SECOND_KEY}=1000@ws_1")).unwrap();
    let name = |config: &mut keychoir::config::Config| {
        config.keys.iter_mut().for_each(|key| key.workspace = Some("shared".to_owned()));
    };
    let proxy = start_proxy_with(plan, name).await;
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    let page = fetch_final_page(&proxy, 1).await;
    for (name, credits) in [("used", 30), ("limit", 1_000), ("remaining", 970)] {
        let sums = page.sums(&format!("keychoir_workspace_credits_{name}"), "workspace");
        assert_eq!(sums, BTreeMap::from([("shared", credits)]));
    }
    assert_eq!(page.sums("keychoir_key_info", "workspace"), BTreeMap::from([("shared", 2)]));
    proxy.close().await;
}

#[tokio::test]
async fn keys_with_equal_short_forms_have_different_labels() {
    let similar_key = FIRST_KEY.replace("one", "six");
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000), (&similar_key, 1_000)])).await;
    // Parsing fails if two samples have the same labels.
    let page = fetch_page(&proxy).await;
    assert_eq!(page.sums("keychoir_key_info", "short_key"), BTreeMap::from([("sk_key_numb...00001", 2)]));
    for key in [FIRST_KEY, &similar_key] {
        let label = format!("sk_key_numb...00001#{}", &Fingerprint::new(key).to_string()[..12]);
        assert_eq!(page.value("keychoir_workspace_credits_limit", &[("workspace", &label)]), 1_000.0);
    }
    proxy.close().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_process_metrics_report_memory_time_and_open_files() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000)])).await;
    let page = fetch_page(&proxy).await;
    let value = |name: &str| page.value(&format!("process_{name}"), &[]);
    assert!(value("resident_memory_bytes") > 1_000_000.0);
    assert!(value("virtual_memory_bytes") >= value("resident_memory_bytes"));
    assert!(value("open_fds") > 3.0 && value("max_fds") >= value("open_fds"));
    assert!(value("cpu_seconds_total") >= 0.0);
    let age = keychoir::clock::now().0 as f64 / 1_000.0 - value("start_time_seconds");
    assert!((0.0..3_600.0).contains(&age), "the process must be at most an hour old, and it is {age} s old");
    proxy.close().await;
}

#[tokio::test]
async fn the_values_equal_the_usage_records_and_the_charges() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000), (SECOND_KEY, 10_000)])).await;
    for _ in 0..5 {
        assert_eq!(proxy.request_speech(20).await.status(), 200);
    }
    // Polls succeed and contradict the 29 remaining credits of the refusal.
    proxy.simulator.set_route_fault(FIRST_KEY, SPEECH_PATH, Some("quota_short".parse().unwrap()));
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    proxy.set_fault(SECOND_KEY, "unprocessable");
    assert_eq!(proxy.request_speech(40).await.status(), 422);
    assert_eq!(proxy.get("/v1/workspaces/api-keys").await.status(), 403);
    proxy.set_fault(SECOND_KEY, "invalid");
    assert_eq!(proxy.request_speech(10).await.status(), 401);
    let polling = async { while proxy.key_statuses().await != ["active", "invalid"] {} };
    tokio::time::timeout(Duration::from_secs(20), polling).await.unwrap();

    let page = fetch_final_page(&proxy, 9).await;
    assert_eq!(
        page.sums("keychoir_requests_total", "code"),
        BTreeMap::from([("200", 6), ("401", 1), ("403", 1), ("422", 1)])
    );
    assert_eq!(
        page.sums("keychoir_upstream_requests_total", "outcome"),
        BTreeMap::from([("invalid_key", 1), ("request_error", 1), ("served", 6), ("workspace_quota", 2)]),
        "the first key must be tried again, because a poll reports credits for it"
    );
    assert_eq!(
        page.sums("keychoir_upstream_retries_total", "reason"),
        BTreeMap::from([("workspace_quota", 2)])
    );
    let value = |name: &str| page.value(&format!("keychoir_{name}"), &[]);
    assert_eq!((value("requests_in_flight"), value("usage_store_lag_seconds")), (0.0, 0.0));
    assert_eq!((value("usage_records_written_total"), value("usage_store_errors_total")), (10.0, 0.0));
    assert_eq!((value("credits_total"), value("characters_total")), (130.0, 130.0));
    let labels =
        [("method", "POST"), ("route", "/v1/text-to-speech/{id}"), ("code", "200"), ("client", "local")];
    assert_eq!(page.value("keychoir_requests_total", &labels), 6.0);
    assert_eq!(page.sums("keychoir_requests_total", "client"), BTreeMap::from([("local", 8), ("other", 1)]));
    let count = |name: &str| value(&format!("{name}_seconds_count"));
    assert_eq!((count("request_duration"), count("upstream_time_to_first_byte")), (9.0, 10.0));
    assert_eq!((count("request_time_to_first_byte"), count("proxy_overhead")), (7.0, 7.0));
    assert!(value("proxy_overhead_seconds_sum") < value("request_time_to_first_byte_seconds_sum"));
    assert!(value("request_time_to_first_byte_seconds_sum") <= value("request_duration_seconds_sum"));
    assert_eq!(value("usage_store_up"), 1.0);
    assert!(value("connections") >= 1.0 && value("connections_accepted_total") >= value("connections"));
    // A key with remaining credits stays active, because it can serve cheaper requests.
    for (key, status, unset_status, used) in [
        ("sk_key_numb...00001", "active", "exhausted", 100.0),
        ("sk_key_numb...00002", "invalid", "active", 30.0),
    ] {
        assert_eq!(page.value("keychoir_key_status", &[("key", key), ("status", status)]), 1.0);
        assert_eq!(page.value("keychoir_key_status", &[("key", key), ("status", unset_status)]), 0.0);
        assert_eq!(page.value("keychoir_workspace_credits_used", &[("workspace", key)]), used);
    }
    assert_eq!(page.sums("keychoir_keys", "status"), BTreeMap::from([("active", 1), ("invalid", 1)]));
    let hash = &Fingerprint::new(FIRST_KEY).to_string()[..12];
    assert_eq!(page.value("keychoir_key_info", &[("hash", hash), ("key", "sk_key_numb...00001")]), 1.0);
    let workspace = [("workspace", "sk_key_numb...00001")];
    assert_eq!(page.value("keychoir_workspace_credits_remaining", &workspace), 900.0);

    let bytes = ["request", "response"]
        .map(|direction| page.value("keychoir_body_bytes_total", &[("direction", direction)]) as i64);
    let charged_credits = proxy.simulator.ledger().totals.charged;
    assert_eq!(charged_credits, 130);
    let records = proxy.into_records().await;
    let sums = records.iter().fold([0, 0], |[sent, received], record| {
        [sent + record.request_bytes, received + record.response_bytes]
    });
    assert_eq!((records.len(), bytes), (10, sums));
}

#[tokio::test]
async fn a_request_in_progress_is_counted_once() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000)])).await;
    proxy.set_fault(FIRST_KEY, "stall=60s");
    let request = proxy.request_speech(10);
    tokio::pin!(request);
    let polling = async {
        while fetch_page(&proxy).await.value("keychoir_key_requests_in_flight", &[]) < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        _ = &mut request => panic!("the stalled request must not receive a response"),
        () = polling => {}
    }
    assert_eq!(fetch_page(&proxy).await.value("keychoir_requests_in_flight", &[]), 1.0);
}

#[tokio::test]
async fn the_metrics_require_a_token_if_clients_are_configured() {
    let client = ClientConfig::new("ops".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), Default::default());
    let proxy =
        start_proxy_with(Plan::with_keys([(FIRST_KEY, 1_000)]), |config| config.clients = vec![client]).await;
    assert_eq!(proxy.client.get(format!("{}/metrics", proxy.url)).send().await.unwrap().status(), 401);
    let request = proxy.client.get(format!("{}/metrics", proxy.url)).header("xi-api-key", CLIENT_TOKEN);
    assert_eq!(request.send().await.unwrap().status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0], "the page must not be requested from the provider");
    proxy.close().await;
}

#[tokio::test]
async fn data_of_a_client_never_becomes_a_label() {
    let proxy = start_proxy(Plan::with_keys([(FIRST_KEY, 1_000_000)])).await;
    let segments = ["voices", "models", "user", "history", "music"];
    let mut paths: Vec<String> =
        (0..20).map(|number| format!("/v1/canary-{number}?canary={number}")).collect();
    // Paths with segments of the API that do not match a route.
    paths.extend(
        segments
            .iter()
            .flat_map(|first| segments.map(|second| format!("/v1/{first}/{second}/voices/canary"))),
    );
    for (number, path) in paths.iter().enumerate() {
        let method = reqwest::Method::from_bytes(format!("CANARY{number}").as_bytes()).unwrap();
        for method in [reqwest::Method::GET, method] {
            let request = proxy.client.request(method, format!("{}{path}", proxy.url));
            let request = request.header("x-request-id", format!("canary-{number}"));
            request.header("xi-api-key", "canary").send().await.unwrap();
        }
    }
    let page = fetch_final_page(&proxy, 2 * paths.len() as u64).await;
    let text = fetch_text(&proxy, "text/plain", ExpositionFormat::Text).await;
    assert!(!text.to_lowercase().contains("canary"), "the page must contain no data of a client: {text}");
    let count = paths.len() as u64;
    assert_eq!(page.sums("keychoir_requests_total", "route"), BTreeMap::from([("other", 2 * count)]));
    assert_eq!(
        page.sums("keychoir_requests_total", "method"),
        BTreeMap::from([("GET", count), ("other", count)])
    );
    let series = page.samples.iter().filter(|sample| sample.name == "keychoir_requests_total").count();
    assert!(series <= 6, "there must be at most one series for each method and status, not {series}");
    proxy.close().await;
}
