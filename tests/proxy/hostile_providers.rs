//! Providers that send malformed HTTP, too much or too little, at the wrong moment, in invalid
//! encodings, with keys in every place and with impossible numbers: first a table with an outcome
//! for each, then mutations of it. After each, regular requests are served, by both keys.

use std::time::Duration;

use crate::hostile::clients::{Then, exchange};
use crate::hostile::providers::{
    self, Ask, End, GOOD_SPEECH, GOOD_VOICES, HONEST, Outcome, Provider, Row, Says, request,
};
use crate::hostile::{Random, Seeds, mutated, shown};
use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, read_usage_records, start_proxy_with};
use keychoir::config::Config;
use keychoir::policy::key_state::KeyStatus;
use keychoir::simulator::Plan;

const KEYS: [&str; 2] = [FIRST_KEY, SECOND_KEY];

/// The timeout of a response head.
const PATIENCE: Duration = Duration::from_secs(1);

/// More credits than any request costs.
const ABSURD: u64 = 1_000_000_001;

async fn before(provider: &Provider, change: impl FnOnce(&mut Config)) -> TestProxy {
    start_proxy_with(Plan::of(KEYS.map(|key| (key, 100_000))), |config| {
        config.upstream.base_url = provider.url.parse().unwrap();
        config.upstream.response_timeout = PATIENCE;
        change(config);
    })
    .await
}

/// Regular requests are served with their own responses.
async fn is_served(proxy: &TestProxy) -> Result<(), String> {
    for (ask, body) in [(Ask::Voices, GOOD_VOICES), (Ask::Speech, GOOD_SPEECH)] {
        let got = exchange(proxy.app.address(), &[request(ask, HONEST)], Then::Read).await?;
        providers::check(&got, Outcome::Body(200, body))
            .map_err(|fault| format!("an honest {ask:?}: {fault}"))?;
    }
    Ok(())
}

/// Sends a request to a hostile provider; returns the client's bytes, and all deviations.
async fn meet(proxy: &TestProxy, provider: &Provider, ask: Ask, says: Says) -> (Vec<u8>, Vec<String>) {
    let late = says.late.clone();
    provider.says(says);
    // The client closes an open WebSocket.
    let then = if ask == Ask::Socket { Then::HalfClose } else { Then::Read };
    let (got, mut faults) = match exchange(proxy.app.address(), &[request(ask, "")], then).await {
        Ok(got) => (got, Vec::new()),
        Err(fault) => (Vec::new(), vec![fault]),
    };
    provider.says(Says::default());
    // The provider has finished before the next request.
    crate::support::wait_until(|| provider.is_silent()).await;
    if !late.is_empty() {
        provider.shout(&late).await;
    }
    faults.extend(providers::leaks(&got, &KEYS));
    faults.extend(provider.faults().into_iter().map(|fault| format!("the provider got {fault}")));
    (got, faults)
}

/// No number in the usage records is negative or implausible.
async fn check_books(proxy: TestProxy) -> Vec<String> {
    let folder = proxy.close_unchecked().await;
    let records = read_usage_records(&folder.path().join("keychoir.db"));
    let is_sane = |credits: i64| u64::try_from(credits).is_ok_and(|credits| credits < ABSURD);
    let wrong = records.iter().filter(|record| !is_sane(record.credits));
    wrong.map(|record| format!("in the books: {record:?}")).collect()
}

fn unusable(proxy: &TestProxy) -> usize {
    proxy.app.keys().iter().filter(|key| key.state.status() != KeyStatus::Active).count()
}

#[tokio::test]
async fn each_hostile_response_has_its_outcome() {
    let mut wrong = Vec::new();
    // A refusal changes the state of keys, so each of these rows gets a new program.
    let (teaching, others): (Vec<Row>, Vec<Row>) =
        providers::table(FIRST_KEY).into_iter().partition(|row| row.teaches);
    wrong.extend(faults_of_rows(others).await);
    for row in teaching {
        wrong.extend(faults_of_rows(vec![row]).await);
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}

async fn faults_of_rows(rows: Vec<Row>) -> Vec<String> {
    let provider = Provider::start().await;
    let proxy = before(&provider, |_| {}).await;
    let mut wrong = Vec::new();
    for Row { name, ask, says, outcome, rests, .. } in rows {
        let (got, mut faults) = meet(&proxy, &provider, ask, says).await;
        if faults.is_empty() {
            faults.extend(providers::check(&got, outcome).err());
        }
        let found = unusable(&proxy);
        if found > rests {
            faults.push(format!("{found} keys are unusable, not {rests}"));
        }
        if found < KEYS.len() {
            faults.extend(is_served(&proxy).await.err());
        }
        let used: Vec<u64> = proxy.app.keys().iter().map(|key| key.quota.count).collect();
        if used.iter().any(|count| *count >= ABSURD) {
            faults.push(format!("{used:?} credits are used"));
        }
        wrong.extend(faults.iter().map(|fault| format!("{name}: {fault}")));
    }
    wrong.extend(check_books(proxy).await);
    wrong
}

#[tokio::test]
async fn impossible_figures_of_an_account_take_no_key() {
    let mut wrong = Vec::new();
    for (name, bytes) in providers::accounts() {
        let provider = Provider::start().await;
        provider.says_of_accounts(Says { pieces: vec![bytes], end: End::Close, ..Says::default() });
        let proxy = before(&provider, |_| {}).await;
        let mut faults: Vec<String> = is_served(&proxy).await.err().into_iter().collect();
        let status = proxy.get("/api/elevenlabs-status").await;
        if status.status() != 200 || status.json::<serde_json::Value>().await.is_err() {
            faults.push("no status".to_owned());
        }
        if unusable(&proxy) > 0 {
            faults.push(format!("{} keys are unusable", unusable(&proxy)));
        }
        faults.extend(check_books(proxy).await);
        wrong.extend(faults.iter().map(|fault| format!("{name}: {fault}")));
    }
    assert!(wrong.is_empty(), "{} faults:\n{}", wrong.len(), wrong.join("\n"));
}

#[tokio::test]
async fn mutations_of_hostile_providers_break_nothing() {
    let rows = providers::table(FIRST_KEY);
    let texts: Vec<Vec<u8>> = rows.iter().map(|row| row.says.pieces.concat()).collect();
    let provider = Provider::start().await;
    let proxy = before(&provider, |config| {
        // A mutation may be a refusal. Its cooldown ends before the next request.
        let moment = Duration::from_millis(1);
        for cooldown in [
            &mut config.pool.rate_limited_cooldown,
            &mut config.pool.concurrency_cooldown,
            &mut config.pool.exhausted_cooldown,
            &mut config.pool.invalid_confirm_cooldown,
            &mut config.pool.invalid_cooldown,
            &mut config.pool.permission_cooldown,
            &mut config.pool.feature_cooldown,
            &mut config.pool.endpoint_cooldown,
            &mut config.pool.unproven_cooldown,
            &mut config.pool.max_retry_after,
            &mut config.pool.probe_after,
            &mut config.pool.billing_cooldown,
        ] {
            *cooldown = moment;
        }
    })
    .await;
    let seeds = Seeds::of_run();
    for seed in seeds.each() {
        let mut random = Random::new(seed);
        let (row, text) = {
            let at = random.below(rows.len());
            (&rows[at], &texts[at])
        };
        let pieces = mutated(&mut random, text, &texts);
        // It always ends: a mutation may be the head of an endless response.
        let end = random.one_of(&[End::Close, End::Close, End::Reset]).clone();
        let says = Says { pieces: pieces.clone(), end, is_early: row.says.is_early, late: Vec::new() };
        let (got, mut faults) = meet(&proxy, &provider, row.ask, says.clone()).await;
        if !got.is_empty() && !got.starts_with(b"HTTP/1.1 ") {
            faults.push(format!("no answer: {}", shown(&got)));
        }
        faults.extend(is_served(&proxy).await.err());
        let said = || pieces.iter().map(|piece| shown(piece)).collect::<Vec<_>>().join("\n");
        assert!(
            faults.is_empty(),
            "{}\nafter \"{}\" {:?}\n{}\n{}",
            faults.join("\n"),
            row.name,
            says.end,
            said(),
            seeds.again(seed)
        );
    }
    crate::support::wait_until(|| proxy.app.waiting() == 0).await;
    let faults = check_books(proxy).await;
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
