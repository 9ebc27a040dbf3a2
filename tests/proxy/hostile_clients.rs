//! Clients that send malformed HTTP, ambiguous requests, forbidden requests, too much, too little
//! or too slowly: first a table with an outcome for each, then mutations of it. A strict tap reads
//! the wire between the program and its provider; see `hostile`.

use std::time::Duration;

use crate::hostile::clients::{self, Outcome, Reach, Row, TOKEN, Then, exchange, honest};
use crate::hostile::tap::{Record, Seen, Tap};
use crate::hostile::wire::{self, Head};
use crate::hostile::{Random, Seeds, contains, mutated, shown};
use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, start_proxy_with};
use keychoir::config::ClientConfig;
use keychoir::policy::client::Rules;
use keychoir::policy::key_state::KeyStatus;
use keychoir::secret::TokenFingerprint;
use keychoir::simulator::Plan;

const KEYS: [&str; 2] = [FIRST_KEY, SECOND_KEY];

/// The timeouts of heads and body pauses: rows wait for them to expire.
const PATIENCE: Duration = Duration::from_secs(1);

/// A proxy with one client or none, whose connection to the provider is tapped.
async fn tapped(needs_no_token: bool) -> (TestProxy, Record) {
    let tap = Tap::new(&KEYS).await;
    let mut record = None;
    let proxy = start_proxy_with(Plan::of(KEYS.map(|key| (key, 1_000_000))), |config| {
        let provider = config.upstream.base_url.to_string();
        let provider = provider.trim_start_matches("http://").trim_end_matches('/').parse().unwrap();
        config.upstream.base_url = tap.url().parse().unwrap();
        record = Some(tap.open(provider));
        config.quota_polling.enabled = false;
        config.server.request_headers_timeout = PATIENCE;
        config.server.request_body_timeout = PATIENCE;
        let (name, token) = ("app".to_owned(), TokenFingerprint::new(TOKEN));
        let client = ClientConfig { name, token, rules: Rules::default() };
        config.clients = (!needs_no_token).then_some(client).into_iter().collect();
    })
    .await;
    (proxy, record.unwrap())
}

/// A regular request on a connection of its own is served, and is all that the provider receives.
async fn is_served(proxy: &TestProxy) -> Result<(), String> {
    let request = honest("/v1/voices?honest=1", "connection: close\r\n").into_bytes();
    let got = exchange(proxy.app.address(), &[request], Then::Read).await?;
    clients::check(&got, Outcome::Answers(&[200]), Then::Read)
        .map_err(|fault| format!("an honest request: {fault}"))
}

/// The hostile clients leave nothing behind: no request, lease, session or connection but the one
/// of this check.
async fn check_nothing_is_left(proxy: &TestProxy) {
    let gauges = ["requests_in_flight", "requests_waiting", "sockets", "key_in_flight"];
    let counts = async {
        loop {
            let request = honest("/metrics", "connection: close\r\n").into_bytes();
            let got = exchange(proxy.app.address(), &[request], Then::Read).await.unwrap();
            let page = String::from_utf8(wire::answers(&got).unwrap().remove(0).body).unwrap();
            let value = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
            let of = |name: &str| {
                let name = format!("keychoir_{name}");
                let lines = page.lines().filter(|line| line.split([' ', '{']).next() == Some(&name));
                lines.map(value).sum::<f64>()
            };
            let (left, open) = (gauges.map(of), of("connections"));
            if left == [0.0; 4] && open <= 1.0 {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), counts).await.expect("something is left");
}

#[tokio::test]
async fn each_hostile_client_gets_its_outcome_without_a_leak() {
    let mut wrong = Vec::new();
    for needs_no_token in [false, true] {
        let (proxy, record) = tapped(needs_no_token).await;
        for row in clients::table().into_iter().filter(|row| row.needs_no_token == needs_no_token) {
            let faults = meet(&proxy, &record, &row).await;
            wrong.extend(faults.iter().map(|fault| format!("{} ({:?}): {fault}", row.name, row.then)));
        }
        check_nothing_is_left(&proxy).await;
        assert!(proxy.app.keys().iter().all(|key| key.state.status() == KeyStatus::Active));
        proxy.close().await;
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}

/// Executes the row of one client; returns all deviations.
async fn meet(proxy: &TestProxy, record: &Record, row: &Row) -> Vec<String> {
    let (got, mut faults) = match exchange(proxy.app.address(), &row.pieces, row.then).await {
        Ok(got) => (got, Vec::new()),
        Err(fault) => (Vec::new(), vec![fault]),
    };
    if faults.is_empty() {
        faults.extend(clients::check(&got, row.outcome, row.then).err());
    }
    faults.extend(KEYS.iter().filter(|key| contains(&got, key)).map(|_| "the client got a key".to_owned()));
    faults.extend(is_served(proxy).await.err());
    let Seen { heads, whole } = match record.take() {
        Ok(seen) => seen,
        Err(fault) => return [faults, vec![fault]].concat(),
    };
    let is_leaked = |head: &&Head| contains(&head.bytes, TOKEN);
    faults.extend(
        heads.iter().filter(is_leaked).map(|head| format!("the token arrived: {}", shown(&head.bytes))),
    );
    // Requests of the regular client are not counted.
    let (begun, whole) = (heads.len() - 1, whole - 1);
    let fits = match (row.reach, row.outcome) {
        (Reach::Nothing, _) => begun == 0,
        (Reach::Whole(most), Outcome::Unseen) => begun <= most,
        (Reach::Whole(count), _) => (begun, whole) == (count, count),
        (Reach::Cut, _) => begun <= 1 && whole == 0,
    };
    if !fits {
        faults.push(format!(
            "{begun} requests reached the provider, {whole} of them whole, not {:?}",
            row.reach
        ));
    }
    faults
}

#[tokio::test]
async fn mutations_of_hostile_clients_break_nothing() {
    let rows: Vec<Vec<u8>> = clients::table().into_iter().map(|row| row.pieces.concat()).collect();
    let (proxy, record) = tapped(false).await;
    let seeds = Seeds::of_run();
    for seed in seeds.each() {
        let mut random = Random::new(seed);
        let row = random.one_of(&rows).clone();
        let pieces = mutated(&mut random, &row, &rows);
        let then =
            *random.one_of(&[Then::HalfClose, Then::HalfClose, Then::HalfClose, Then::Leave, Then::Reset]);
        let mut faults = Vec::new();
        let got = exchange(proxy.app.address(), &pieces, then).await.unwrap_or_else(|fault| {
            faults.push(fault);
            Vec::new()
        });
        if !clients::is_plausible(&got) {
            faults.push(format!("no answer: {}", shown(&got)));
        }
        faults
            .extend(KEYS.iter().filter(|key| contains(&got, key)).map(|_| "the client got a key".to_owned()));
        faults.extend(is_served(&proxy).await.err());
        faults.extend(record.take().err());
        let sent = || pieces.iter().map(|piece| shown(piece)).collect::<Vec<_>>().join("\n");
        assert!(
            faults.is_empty(),
            "{}\n{then:?} after\n{}\n{}",
            faults.join("\n"),
            sent(),
            seeds.again(seed)
        );
    }
    check_nothing_is_left(&proxy).await;
    record.take().unwrap();
    proxy.close().await;
}
