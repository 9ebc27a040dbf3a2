//! The page `/metrics`: its names are golden, its format is checked as by Prometheus' own tool, and
//! its values are compared with the usage records and the provider's ledger.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends at its first surprise"
)]

mod house;

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use house::{CLIENT_TOKEN, House, ONE, SPEECH, TWO, house, house_with};
use keychoir::config::ClientConfig;
use keychoir::secret::{Fingerprint, TokenFingerprint};
use keychoir::simulator::Plan;

/// A sample: its name, its raw labels, its value.
#[derive(Debug)]
struct Sample {
    name: String,
    labels: Vec<(String, String)>,
    value: f64,
}

/// A valid page: its families in their order, each with its type, and its samples.
#[derive(Debug)]
struct Page {
    families: Vec<(String, String)>,
    samples: Vec<Sample>,
}

impl Page {
    /// Parses a page, and panics if it violates the format.
    fn read(text: &str) -> Self {
        let mut page = Self { families: Vec::new(), samples: Vec::new() };
        let mut series = HashSet::new();
        let mut help = None;
        assert!(text.ends_with('\n'), "the last line ends");
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, words) = rest.split_once(' ').expect("a family is explained");
                assert!(words.ends_with('.'), "{line}");
                help = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(help.take().as_deref(), Some(name), "help and type stand together");
                assert!(page.families.iter().all(|(known, _)| known != name), "{name} comes twice");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(name.ends_with("_total"), kind == "counter", "{name} is a {kind}");
                assert!(is_name(name) && name.starts_with("keychoir_"), "{name}");
                page.families.push((name.to_owned(), kind.to_owned()));
            } else {
                let sample = sample(line);
                let (family, kind) = page.families.last().expect("a sample has a family");
                let suffix =
                    sample.name.strip_prefix(family.as_str()).expect("a family's samples stand together");
                let suffixes: &[&str] =
                    if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                assert!(suffixes.contains(&suffix), "{line}");
                assert!(kind == "gauge" || sample.value >= 0.0, "{line}");
                assert!(series.insert(format!("{}{:?}", sample.name, sample.labels)), "{line} comes twice");
                page.samples.push(sample);
            }
        }
        page.check_histograms();
        page
    }

    fn check_histograms(&self) {
        for (name, _) in self.families.iter().filter(|(_, kind)| kind == "histogram") {
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
            sample.name == name
                && labels.iter().all(|(name, value)| {
                    sample.labels.iter().any(|(known, has)| known == name && has == value)
                })
        };
        let found: Vec<&Sample> = self.samples.iter().filter(is_it).collect();
        assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
        found[0].value
    }

    /// The samples of a family that are not zero, by the value of their one label.
    fn counts(&self, name: &str) -> BTreeMap<&str, u64> {
        let samples = self.samples.iter().filter(|sample| sample.name == name && sample.value > 0.0);
        samples.map(|sample| (sample.labels[0].1.as_str(), sample.value as u64)).collect()
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

async fn page(house: &House) -> Page {
    let answer = house.get("/metrics").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(answer.headers()["cache-control"], "no-store");
    Page::read(&answer.text().await.unwrap())
}

/// The page as soon as that many requests have ended and everything is written.
async fn settled(house: &House, requests: u64) -> Page {
    let looking = async {
        loop {
            let page = page(house).await;
            let ended: u64 = page.counts("keychoir_requests_total").values().sum();
            let waiting = page.value("keychoir_store_records_waiting", &[]);
            if ended == requests && waiting == 0.0 {
                return page;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), looking).await.expect("the requests never end")
}

#[tokio::test]
async fn the_names_and_types_are_golden() {
    let house = house(Plan::of([(ONE, 1_000), (TWO, 1_000)])).await;
    let page = page(&house).await;
    let families: Vec<String> = page.families.iter().map(|(name, kind)| format!("{name} {kind}")).collect();
    let expected = [
        "keychoir_build_info gauge",
        "keychoir_start_time_seconds gauge",
        "keychoir_requests_total counter",
        "keychoir_requests_in_flight gauge",
        "keychoir_attempts_total counter",
        "keychoir_failovers_total counter",
        "keychoir_body_bytes_total counter",
        "keychoir_characters_total counter",
        "keychoir_credits_total counter",
        "keychoir_unpriced_attempts_total counter",
        "keychoir_audio_seconds_total counter",
        "keychoir_sockets_total counter",
        "keychoir_sockets gauge",
        "keychoir_first_byte_seconds histogram",
        "keychoir_overhead_seconds histogram",
        "keychoir_log_lines_dropped_total counter",
        "keychoir_connections gauge",
        "keychoir_connections_accepted_total counter",
        "keychoir_buffer_memory_bytes gauge",
        "keychoir_buffer_memory_max_bytes gauge",
        "keychoir_buffer_disk_bytes gauge",
        "keychoir_buffer_disk_max_bytes gauge",
        "keychoir_requests_waiting gauge",
        "keychoir_keys gauge",
        "keychoir_key_status gauge",
        "keychoir_key_in_flight gauge",
        "keychoir_key_credits_used gauge",
        "keychoir_key_credits_limit gauge",
        "keychoir_key_credits_remaining gauge",
        "keychoir_key_credits_drift gauge",
        "keychoir_key_resets_at_seconds gauge",
        "keychoir_store_failing gauge",
        "keychoir_store_records_waiting gauge",
        "keychoir_store_lag_seconds gauge",
        "keychoir_store_records_written_total counter",
        "keychoir_store_records_lost_total counter",
        "keychoir_store_errors_total counter",
        "keychoir_mirror_state gauge",
        "keychoir_mirror_rows_sent_total counter",
        "keychoir_mirror_failures_total counter",
        "keychoir_mirror_lag_seconds gauge",
        "keychoir_mirror_rows_refused gauge",
    ];
    assert_eq!(families, expected);
    let label_names: HashSet<&str> =
        page.samples.iter().flat_map(|sample| &sample.labels).map(|(name, _)| name.as_str()).collect();
    let expected = [
        "class",
        "direction",
        "hash",
        "key",
        "le",
        "outcome",
        "reason",
        "socket",
        "state",
        "status",
        "version",
    ];
    assert_eq!(label_names, HashSet::from(expected));
    house.close().await;
}

#[tokio::test]
async fn a_key_with_a_name_has_it_as_a_label() {
    let folder = tempfile::tempdir().unwrap();
    let plan = Plan::of([(ONE, 1_000), (TWO, 10_000)]);
    let house = house::house_in(folder, plan, |config| config.keys[1].name = Some("studio".to_owned())).await;
    let page = settled(&house, 0).await;
    assert_eq!(page.value("keychoir_key_credits_limit", &[("name", "studio")]), 10_000.0);
    let named = |sample: &&Sample| sample.labels.iter().any(|(name, _)| name == "name");
    let of_keys = page.samples.iter().filter(|sample| sample.name.starts_with("keychoir_key_"));
    assert_eq!(of_keys.clone().filter(named).count() * 2, of_keys.count());
    house.close().await;
}

#[tokio::test]
async fn the_values_are_those_of_the_books_and_the_ledger() {
    let house = house(Plan::of([(ONE, 1_000), (TWO, 10_000)])).await;
    for _ in 0..5 {
        assert_eq!(house.speak(20).await.status(), 200);
    }
    // Polls are served, and contradict the 29 remaining credits of the refusal.
    house.simulator.always_on(ONE, SPEECH, Some("quota_short".parse().unwrap()));
    assert_eq!(house.speak(30).await.status(), 200);
    house.always(TWO, "unprocessable");
    assert_eq!(house.speak(40).await.status(), 422);
    assert_eq!(house.get("/v1/workspaces/api-keys").await.status(), 403);
    house.always(TWO, "invalid");
    assert_eq!(house.speak(10).await.status(), 401);
    let polled = async { while house.statuses().await != ["active", "invalid"] {} };
    tokio::time::timeout(Duration::from_secs(20), polled).await.unwrap();

    let page = settled(&house, 9).await;
    assert_eq!(page.counts("keychoir_requests_total"), BTreeMap::from([("2xx", 6), ("4xx", 3)]));
    assert_eq!(
        page.counts("keychoir_attempts_total"),
        BTreeMap::from([("invalid_key", 1), ("request_error", 1), ("served", 6), ("workspace_quota", 2)]),
        "the first key has its credits, so it is asked again"
    );
    assert_eq!(page.counts("keychoir_failovers_total"), BTreeMap::from([("workspace_quota", 2)]));
    let value = |name: &str| page.value(&format!("keychoir_{name}"), &[]);
    assert_eq!((value("requests_in_flight"), value("store_lag_seconds")), (0.0, 0.0));
    assert_eq!((value("store_records_written_total"), value("store_errors_total")), (10.0, 0.0));
    assert_eq!((value("credits_total"), value("characters_total")), (130.0, 130.0));
    assert_eq!((value("first_byte_seconds_count"), value("overhead_seconds_count")), (7.0, 7.0));
    assert!(value("overhead_seconds_sum") < value("first_byte_seconds_sum"));
    assert!(value("connections") >= 1.0 && value("connections_accepted_total") >= value("connections"));
    // The remaining credits serve cheaper requests.
    for (key, word, other, used) in [
        ("sk_key_numb...00001", "active", "exhausted", 100.0),
        ("sk_key_numb...00002", "invalid", "active", 30.0),
    ] {
        assert_eq!(page.value("keychoir_key_status", &[("key", key), ("status", word)]), 1.0);
        assert_eq!(page.value("keychoir_key_status", &[("key", key), ("status", other)]), 0.0);
        assert_eq!(page.value("keychoir_key_credits_used", &[("key", key)]), used);
    }
    assert_eq!(page.counts("keychoir_keys"), BTreeMap::from([("active", 1), ("invalid", 1)]));
    let hash = &Fingerprint::of(ONE).to_string()[..12];
    assert_eq!(page.value("keychoir_key_credits_remaining", &[("hash", hash)]), 900.0);

    let bytes = ["request", "response"]
        .map(|direction| page.value("keychoir_body_bytes_total", &[("direction", direction)]) as i64);
    let charged = house.simulator.ledger().totals.charged;
    assert_eq!(charged, 130);
    let records = house.records().await;
    let sums = records
        .iter()
        .fold([0, 0], |[sent, got], record| [sent + record.request_bytes, got + record.response_bytes]);
    assert_eq!((records.len(), bytes), (10, sums));
}

#[tokio::test]
async fn a_request_under_way_is_one() {
    let house = house(Plan::of([(ONE, 1_000)])).await;
    house.always(ONE, "stall=60s");
    let asked = house.speak(10);
    tokio::pin!(asked);
    let looking = async {
        while page(&house).await.value("keychoir_key_in_flight", &[]) < 1.0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        _ = &mut asked => panic!("it stalls"),
        () = looking => {}
    }
    assert_eq!(page(&house).await.value("keychoir_requests_in_flight", &[]), 1.0);
}

#[tokio::test]
async fn where_clients_have_tokens_the_metrics_are_for_them_only() {
    let client = ClientConfig {
        name: "ops".to_owned(),
        token: TokenFingerprint::of(CLIENT_TOKEN),
        rules: Default::default(),
    };
    let house = house_with(Plan::of([(ONE, 1_000)]), |config| config.clients = vec![client]).await;
    assert_eq!(house.client.get(format!("{}/metrics", house.url)).send().await.unwrap().status(), 401);
    let request = house.client.get(format!("{}/metrics", house.url)).header("xi-api-key", CLIENT_TOKEN);
    assert_eq!(request.send().await.unwrap().status(), 200);
    assert_eq!(house.hits(&[ONE]), [0], "it is no path of the provider");
    house.close().await;
}

#[tokio::test]
async fn nothing_that_a_client_sends_becomes_a_label() {
    let house = house(Plan::of([(ONE, 1_000_000)])).await;
    let before = page(&house).await.samples.len();
    for number in 0..50 {
        let request = house.client.get(format!("{}/v1/canary-{number}?canary={number}", house.url));
        request
            .header("x-request-id", format!("canary-{number}"))
            .header("xi-api-key", "canary")
            .send()
            .await
            .unwrap();
    }
    let text = house.get("/metrics").await.text().await.unwrap();
    assert!(!text.contains("canary"), "{text}");
    assert_eq!(Page::read(&text).samples.len(), before);
    house.close().await;
}
