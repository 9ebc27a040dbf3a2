//! The page `/metrics`: its format is checked as by Prometheus' own tools, its metrics are those of
//! `docs/operations.md`, and its values are compared with the usage records and the provider's ledger.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, TestProxy, start_proxy, start_proxy_with,
};
use keychoir::config::ClientConfig;
use keychoir::policy::outcome::Outcome;
use keychoir::secret::{Fingerprint, TokenFingerprint};
use keychoir::simulator::Plan;

/// The form of a page, with its media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LineFormat {
    OpenMetrics,
    Text,
}

impl LineFormat {
    fn media_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// A sample: its name, its labels, its value.
#[derive(Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// A valid page: its families by name, each with its type, and its samples.
#[derive(Debug)]
struct Page {
    families: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

impl Page {
    /// Parses a page, and panics if it violates the format.
    fn read(text: &str, form: LineFormat) -> Self {
        let mut page = Self { families: BTreeMap::new(), samples: Vec::new() };
        let mut series = HashSet::new();
        let (mut help, mut family) = (None, None);
        let is_open = form == LineFormat::OpenMetrics;
        let lines = if is_open { text.strip_suffix("# EOF\n").expect("an end") } else { text };
        assert!(lines.ends_with('\n'), "the last line ends");
        for line in lines.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, words) = rest.split_once(' ').expect("a family is explained");
                assert!(words.ends_with('.') && !words.ends_with(".."), "{line}");
                help = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(help.take().as_deref(), Some(name), "help and type stand together");
                let kinds: &[&str] = if is_open {
                    &["counter", "gauge", "histogram", "info", "unknown"]
                } else {
                    &["counter", "gauge", "histogram", "untyped"]
                };
                assert!(kinds.contains(&kind), "{line}");
                if !["unknown", "untyped"].contains(&kind) {
                    assert_eq!(name.ends_with("_total"), kind == "counter" && !is_open, "{line}");
                }
                assert!(
                    is_name(name) && ["keychoir_", "process_"].iter().any(|begin| name.starts_with(begin))
                );
                let suffixes: &[&str] = match kind {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    "counter" if is_open => &["_total"],
                    "info" => &["_info"],
                    _ => &[""],
                };
                let full =
                    if suffixes.len() == 1 { format!("{name}{}", suffixes[0]) } else { name.to_owned() };
                assert_eq!(page.families.insert(full, kind.to_owned()), None, "{line} comes twice");
                family = Some((name.to_owned(), kind.to_owned(), suffixes));
            } else {
                let sample = sample(line);
                let (name, kind, suffixes) = family.as_ref().expect("a sample has a family");
                let suffix = sample.name.strip_prefix(name).expect("a family's samples stand together");
                assert!(suffixes.contains(&suffix), "{line}");
                assert!(kind == "gauge" || sample.value >= 0.0, "{line}");
                assert!(series.insert(format!("{}{:?}", sample.name, sample.labels)), "{line} comes twice");
                page.samples.push(sample);
            }
        }
        if is_open {
            // OpenMetrics has a counter and a gauge of one name for one family.
            let bases: HashSet<_> = page.families.iter().map(|(name, kind)| base(name, kind)).collect();
            assert_eq!(bases.len(), page.families.len());
        }
        page.check_histograms();
        page
    }

    fn check_histograms(&self) {
        for (name, _) in self.families.iter().filter(|(_, kind)| *kind == "histogram") {
            let buckets: Vec<&Sample> =
                self.samples.iter().filter(|sample| sample.name == format!("{name}_bucket")).collect();
            let bounds: Vec<f64> = buckets.iter().map(|bucket| bucket.labels[0].1.parse().unwrap()).collect();
            assert!(bounds.is_sorted() && bounds.last() == Some(&f64::INFINITY), "{name}: {bounds:?}");
            assert!(buckets.iter().map(|bucket| bucket.value).is_sorted(), "{name} is cumulative");
            assert_eq!(buckets.last().unwrap().value, self.value(&format!("{name}_count"), &[]));
        }
    }

    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let is_it = |sample: &&Sample| {
            sample.name == name && labels.iter().all(|(name, value)| sample.label(name) == Some(*value))
        };
        let found: Vec<&Sample> = self.samples.iter().filter(is_it).collect();
        assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
        found[0].value
    }

    /// The sums of a family that are not zero, by the values of a label.
    fn sums(&self, name: &str, label: &str) -> BTreeMap<&str, u64> {
        let mut sums = BTreeMap::new();
        for sample in self.samples.iter().filter(|sample| sample.name == name && sample.value > 0.0) {
            *sums.entry(sample.label(label).unwrap()).or_default() += sample.value as u64;
        }
        sums
    }

    /// The metrics as the document lists them: name, labels and type.
    fn metrics(&self) -> BTreeSet<String> {
        let metric = |(name, kind): (&String, &String)| {
            let of_it = |sample: &&Sample| sample.name.starts_with(name) && sample.family() == name;
            let sample = self.samples.iter().find(of_it).unwrap_or_else(|| panic!("{name} has no sample"));
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
        self.labels.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The name without the suffix of a histogram.
    fn family(&self) -> &str {
        let suffixes = ["_bucket", "_sum", "_count"];
        suffixes.iter().find_map(|suffix| self.name.strip_suffix(suffix)).unwrap_or(&self.name)
    }
}

/// OpenMetrics' name of a family.
fn base<'a>(name: &'a str, kind: &str) -> &'a str {
    match kind {
        "counter" => name.trim_end_matches("_total"),
        "info" => name.trim_end_matches("_info"),
        _ => name,
    }
}

fn is_name(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line:?} is no sample"));
    let (name, labels) = match series.split_once('{') {
        None => (series, Vec::new()),
        Some((name, rest)) => (name, labels(rest.strip_suffix('}').expect("labels are closed"))),
    };
    assert!(is_name(name), "{line}");
    Sample { name: name.to_owned(), labels, value: value.parse().unwrap_or_else(|_| panic!("{line}")) }
}

fn labels(mut text: &str) -> Vec<(String, String)> {
    let mut labels = Vec::new();
    loop {
        let (name, rest) = text.split_once("=\"").unwrap_or_else(|| panic!("{text:?} is no label"));
        assert!(is_name(name), "{name}");
        let mut value = String::new();
        let mut chars = rest.char_indices();
        let end = loop {
            match chars.next().expect("a value is closed") {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next().unwrap().1 {
                    'n' => '\n',
                    c @ ('\\' | '"') => c,
                    c => panic!("\\{c}"),
                }),
                (_, c) => value.push(c),
            }
        };
        labels.push((name.to_owned(), value));
        match &rest[end + 1..] {
            "" => return labels,
            more => text = more.strip_prefix(',').expect("labels are separated"),
        }
    }
}

async fn text(proxy: &TestProxy, accept: &str, form: LineFormat) -> String {
    let request = proxy.client.get(format!("{}/metrics", proxy.url)).header("accept", accept);
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], form.media_type());
    assert_eq!(answer.headers()["cache-control"], "no-store");
    answer.text().await.unwrap()
}

async fn page(proxy: &TestProxy) -> Page {
    Page::read(&text(proxy, "*/*", LineFormat::OpenMetrics).await, LineFormat::OpenMetrics)
}

/// The page as soon as that many requests have ended and everything is written.
async fn settled(proxy: &TestProxy, requests: u64) -> Page {
    let looking = async {
        loop {
            let page = page(proxy).await;
            let ended: u64 = page.sums("keychoir_requests_total", "code").values().sum();
            if ended == requests && page.value("keychoir_usage_records_queued", &[]) == 0.0 {
                return page;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looking).await.expect("the requests never end")
}

const DOCUMENT: &str = include_str!("../../docs/operations.md");

#[tokio::test]
async fn the_document_lists_every_metric_with_its_labels_and_type_and_no_other() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000), (SECOND_KEY, 1_000)])).await;
    proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, Some("quota_short".parse().unwrap()));
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    let page = settled(&proxy, 1).await;
    let row = |line: &str| {
        let [_, name, kind, meaning, _] = line.split('|').collect::<Vec<_>>().try_into().ok()?;
        let name = name.trim().strip_prefix('`')?.strip_suffix('`')?;
        let is_metric = ["keychoir_", "process_"].iter().any(|begin| name.starts_with(begin));
        assert!(!is_metric || !meaning.trim().is_empty(), "{line}");
        is_metric.then(|| format!("{name} {}", kind.trim()))
    };
    let documented: BTreeSet<String> = DOCUMENT.lines().filter_map(row).collect();
    let found = page.metrics();
    let missing: Vec<_> = found.difference(&documented).collect();
    let gone: Vec<_> = documented.difference(&found).collect();
    assert!(
        missing.is_empty() && gone.is_empty(),
        "not in docs/operations.md: {missing:#?}\nonly there: {gone:#?}"
    );
    proxy.close().await;
}

#[test]
fn the_document_lists_every_outcome() {
    let missing: Vec<&str> = Outcome::ALL
        .iter()
        .map(|outcome| outcome.as_str())
        .filter(|word| !DOCUMENT.contains(&format!("`{word}`")))
        .collect();
    assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
}

#[tokio::test]
async fn a_client_that_accepts_only_text_gets_the_same_metrics_in_prometheus_form() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000)])).await;
    proxy.wait_until_served("/v1/voices").await;
    let open = settled(&proxy, 1).await;
    let accept = "text/plain;version=0.0.4;q=1,*/*;q=0.1";
    let plain = Page::read(&text(&proxy, accept, LineFormat::Text).await, LineFormat::Text);
    let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    Page::read(&text(&proxy, accept, LineFormat::OpenMetrics).await, LineFormat::OpenMetrics);
    let samples = |page: &Page| {
        let series = |sample: &Sample| {
            let labels = sample.labels.iter().map(|(name, value)| match value.parse::<f64>() {
                Ok(bound) if name == "le" => format!("le={bound}"),
                _ => format!("{name}={value}"),
            });
            format!("{}{:?}", sample.name, labels.collect::<Vec<_>>())
        };
        page.samples.iter().map(series).collect::<BTreeSet<_>>()
    };
    assert_eq!(samples(&plain), samples(&open));
    proxy.close().await;
}

#[tokio::test]
async fn a_key_with_a_name_has_it_as_a_label() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan::of([(FIRST_KEY, 1_000), (SECOND_KEY, 10_000)]);
    let proxy = crate::support::start_proxy_in(folder, plan, |config| {
        config.keys[1].name = Some("studio".to_owned())
    })
    .await;
    proxy.request_speech(2_000).await;
    let page = settled(&proxy, 1).await;
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
    let page = settled(&proxy, 1).await;
    for (name, credits) in [("used", 30), ("limit", 1_000), ("remaining", 970)] {
        let sums = page.sums(&format!("keychoir_workspace_credits_{name}"), "workspace");
        assert_eq!(sums, BTreeMap::from([("shared", credits)]));
    }
    assert_eq!(page.sums("keychoir_key_info", "workspace"), BTreeMap::from([("shared", 2)]));
    proxy.close().await;
}

#[tokio::test]
async fn keys_with_equal_short_forms_have_labels_of_their_own() {
    let other = FIRST_KEY.replace("one", "six");
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000), (&other, 1_000)])).await;
    // Two samples with the same labels would be no valid page.
    let page = page(&proxy).await;
    assert_eq!(page.sums("keychoir_key_info", "short_key"), BTreeMap::from([("sk_key_numb...00001", 2)]));
    for key in [FIRST_KEY, &other] {
        let label = format!("sk_key_numb...00001#{}", &Fingerprint::new(key).to_string()[..12]);
        assert_eq!(page.value("keychoir_workspace_credits_limit", &[("workspace", &label)]), 1_000.0);
    }
    proxy.close().await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_process_reports_its_memory_time_and_files() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000)])).await;
    let page = page(&proxy).await;
    let value = |name: &str| page.value(&format!("process_{name}"), &[]);
    assert!(value("resident_memory_bytes") > 1_000_000.0);
    assert!(value("virtual_memory_bytes") >= value("resident_memory_bytes"));
    assert!(value("open_fds") > 3.0 && value("max_fds") >= value("open_fds"));
    assert!(value("cpu_seconds_total") >= 0.0);
    let age = keychoir::clock::now().0 as f64 / 1_000.0 - value("start_time_seconds");
    assert!((0.0..3_600.0).contains(&age), "{age}");
    proxy.close().await;
}

#[tokio::test]
async fn the_values_equal_the_records_and_the_charges() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000), (SECOND_KEY, 10_000)])).await;
    for _ in 0..5 {
        assert_eq!(proxy.request_speech(20).await.status(), 200);
    }
    // Polls are served, and contradict the 29 remaining credits of the refusal.
    proxy.simulator.always_on(FIRST_KEY, SPEECH_PATH, Some("quota_short".parse().unwrap()));
    assert_eq!(proxy.request_speech(30).await.status(), 200);
    proxy.set_fault(SECOND_KEY, "unprocessable");
    assert_eq!(proxy.request_speech(40).await.status(), 422);
    assert_eq!(proxy.get("/v1/workspaces/api-keys").await.status(), 403);
    proxy.set_fault(SECOND_KEY, "invalid");
    assert_eq!(proxy.request_speech(10).await.status(), 401);
    let polled = async { while proxy.key_statuses().await != ["active", "invalid"] {} };
    tokio::time::timeout(Duration::from_secs(20), polled).await.unwrap();

    let page = settled(&proxy, 9).await;
    assert_eq!(
        page.sums("keychoir_requests_total", "code"),
        BTreeMap::from([("200", 6), ("401", 1), ("403", 1), ("422", 1)])
    );
    assert_eq!(
        page.sums("keychoir_upstream_requests_total", "outcome"),
        BTreeMap::from([("invalid_key", 1), ("request_error", 1), ("served", 6), ("workspace_quota", 2)]),
        "the first key has its credits, so it is asked again"
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
    // The remaining credits serve cheaper requests.
    for (key, word, other, used) in [
        ("sk_key_numb...00001", "active", "exhausted", 100.0),
        ("sk_key_numb...00002", "invalid", "active", 30.0),
    ] {
        assert_eq!(page.value("keychoir_key_status", &[("key", key), ("status", word)]), 1.0);
        assert_eq!(page.value("keychoir_key_status", &[("key", key), ("status", other)]), 0.0);
        assert_eq!(page.value("keychoir_workspace_credits_used", &[("workspace", key)]), used);
    }
    assert_eq!(page.sums("keychoir_keys", "status"), BTreeMap::from([("active", 1), ("invalid", 1)]));
    let hash = &Fingerprint::new(FIRST_KEY).to_string()[..12];
    assert_eq!(page.value("keychoir_key_info", &[("hash", hash), ("key", "sk_key_numb...00001")]), 1.0);
    let workspace = [("workspace", "sk_key_numb...00001")];
    assert_eq!(page.value("keychoir_workspace_credits_remaining", &workspace), 900.0);

    let bytes = ["request", "response"]
        .map(|direction| page.value("keychoir_body_bytes_total", &[("direction", direction)]) as i64);
    let charged = proxy.simulator.ledger().totals.charged;
    assert_eq!(charged, 130);
    let records = proxy.into_records().await;
    let sums = records
        .iter()
        .fold([0, 0], |[sent, got], record| [sent + record.request_bytes, got + record.response_bytes]);
    assert_eq!((records.len(), bytes), (10, sums));
}

#[tokio::test]
async fn a_request_in_progress_is_counted_once() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000)])).await;
    proxy.set_fault(FIRST_KEY, "stall=60s");
    let asked = proxy.request_speech(10);
    tokio::pin!(asked);
    let looking = async {
        while page(&proxy).await.value("keychoir_key_requests_in_flight", &[]) < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        _ = &mut asked => panic!("it stalls"),
        () = looking => {}
    }
    assert_eq!(page(&proxy).await.value("keychoir_requests_in_flight", &[]), 1.0);
}

#[tokio::test]
async fn the_metrics_require_a_token_where_clients_have_one() {
    let client = ClientConfig {
        name: "ops".to_owned(),
        token: TokenFingerprint::new(CLIENT_TOKEN),
        rules: Default::default(),
    };
    let proxy =
        start_proxy_with(Plan::of([(FIRST_KEY, 1_000)]), |config| config.clients = vec![client]).await;
    assert_eq!(proxy.client.get(format!("{}/metrics", proxy.url)).send().await.unwrap().status(), 401);
    let request = proxy.client.get(format!("{}/metrics", proxy.url)).header("xi-api-key", CLIENT_TOKEN);
    assert_eq!(request.send().await.unwrap().status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY]), [0], "it is no path of the provider");
    proxy.close().await;
}

#[tokio::test]
async fn nothing_that_a_client_sends_becomes_a_label() {
    let proxy = start_proxy(Plan::of([(FIRST_KEY, 1_000_000)])).await;
    let words = ["voices", "models", "user", "history", "music"];
    let mut paths: Vec<String> =
        (0..20).map(|number| format!("/v1/canary-{number}?canary={number}")).collect();
    // Paths of words of the API that are none of its routes.
    paths.extend(words.iter().flat_map(|one| words.map(|other| format!("/v1/{one}/{other}/voices/canary"))));
    for (number, path) in paths.iter().enumerate() {
        let method = reqwest::Method::from_bytes(format!("CANARY{number}").as_bytes()).unwrap();
        for method in [reqwest::Method::GET, method] {
            let request = proxy.client.request(method, format!("{}{path}", proxy.url));
            let request = request.header("x-request-id", format!("canary-{number}"));
            request.header("xi-api-key", "canary").send().await.unwrap();
        }
    }
    let page = settled(&proxy, 2 * paths.len() as u64).await;
    let text = text(&proxy, "text/plain", LineFormat::Text).await;
    assert!(!text.to_lowercase().contains("canary"), "{text}");
    let count = paths.len() as u64;
    assert_eq!(page.sums("keychoir_requests_total", "route"), BTreeMap::from([("other", 2 * count)]));
    assert_eq!(
        page.sums("keychoir_requests_total", "method"),
        BTreeMap::from([("GET", count), ("other", count)])
    );
    let series = page.samples.iter().filter(|sample| sample.name == "keychoir_requests_total").count();
    assert!(series <= 6, "{series} series: one for each method and status");
    proxy.close().await;
}
