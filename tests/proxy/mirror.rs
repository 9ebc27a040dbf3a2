//! Tests the mirror, which copies keys and usage events to Supabase, with a real PostgreSQL and a real PostgREST. After
//! every kind of fault, Supabase contains the same rows as the usage database, and speech requests are not affected.
//! Also tests the documented queries, the permissions of the tables, and the delivery at shutdown.

mod earlier_version;

use std::path::Path;
use std::time::Duration;

use crate::support::supabase::{Fault, SECRET_KEY, Supabase, foreign_token, role_token};
use crate::support::websocket::{AGENT, open_session};
use crate::support::{CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, THIRD_KEY, TestProxy, start_proxy_in, wait_until};
use keychoir::config::Config;
use keychoir::secret::{Fingerprint, SupabaseKey, SupabaseKeyForm};
use keychoir::simulator::Plan;
use serde_json::{Value, json};
use tempfile::TempDir;

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];
const SHORT_INTERVAL: Duration = Duration::from_millis(10);

fn plan() -> Plan {
    Plan::with_keys(KEYS.map(|key| (key, 100_000)))
}

/// Configures the mirror with events and short intervals.
fn configure_mirror(supabase: &Supabase) -> impl FnOnce(&mut Config) {
    let url = supabase.url();
    move |config| {
        let mirror = &mut config.supabase;
        mirror.url = url.parse().unwrap();
        mirror.key = Some(SupabaseKey::new(SECRET_KEY, SupabaseKeyForm::SecretKey).unwrap());
        mirror.events = true;
        (mirror.interval, mirror.max_retry_delay, mirror.setup_error_delay) =
            (SHORT_INTERVAL, SHORT_INTERVAL, SHORT_INTERVAL);
    }
}

async fn start_proxy(plan: Plan, change: impl FnOnce(&mut Config)) -> TestProxy {
    start_proxy_in(tempfile::tempdir().unwrap(), plan, change).await
}

/// Returns the state of the mirror and the number of refused rows from `/readyz`.
async fn mirror_state(proxy: &TestProxy) -> (String, u64) {
    let response = proxy.get("/readyz").await;
    assert_eq!(response.status(), 200, "the proxy must stay ready");
    let page: Value = response.json().await.unwrap();
    (page["mirror"].as_str().unwrap().to_owned(), page["mirrorRowsRefused"].as_u64().unwrap())
}

/// Waits until `/readyz` reports `state` and `refused` refused rows for the mirror.
async fn wait_for_mirror(proxy: &TestProxy, state: &str, refused: u64) {
    let polling = async {
        while mirror_state(proxy).await != (state.to_owned(), refused) {
            tokio::task::yield_now().await;
        }
    };
    let result = tokio::time::timeout(Duration::from_secs(30), polling).await;
    assert!(
        result.is_ok(),
        "the mirror must be {state} with {refused} refused rows, and it is {:?}",
        mirror_state(proxy).await
    );
}

/// Returns the number of usage events in Supabase.
fn event_count(supabase: &Supabase) -> usize {
    supabase.sql("SELECT count(*) FROM elevenlabs_usage_events")[0].parse().unwrap()
}

/// Sends speech requests and asserts that each of them is served.
async fn request_speech_times(proxy: &TestProxy, times: usize) {
    for _ in 0..times {
        assert_eq!(proxy.request_speech(10).await.status(), 200);
    }
}

/// Returns the rows of a query on the local database, with columns separated by `|`.
fn query_database(directory: &Path, sql: &str) -> Vec<String> {
    let database = rusqlite::Connection::open(directory.join("keychoir.db")).unwrap();
    let mut statement = database.prepare(sql).unwrap();
    let columns = statement.column_count();
    let format_value =
        |row: &rusqlite::Row<'_>, index| match row.get::<_, rusqlite::types::Value>(index).unwrap() {
            rusqlite::types::Value::Null => String::new(),
            rusqlite::types::Value::Integer(number) => number.to_string(),
            rusqlite::types::Value::Text(text) => text,
            value @ (rusqlite::types::Value::Real(_) | rusqlite::types::Value::Blob(_)) => {
                panic!("the database must contain neither floats nor blobs: {value:?}")
            }
        };
    let rows = statement.query_map([], |row| {
        Ok((0..columns).map(|index| format_value(row, index)).collect::<Vec<_>>().join("|"))
    });
    rows.unwrap().map(Result::unwrap).collect()
}

/// Stops the proxy and asserts that Supabase has the rows of its database. Returns the directory.
async fn close_and_compare(proxy: TestProxy, supabase: &Supabase) -> TempDir {
    let (_, directory) = proxy.close().await;
    compare(directory.path(), supabase);
    directory
}

/// Asserts that Supabase has the same events and keys as the database, row by row.
#[track_caller]
fn compare(directory: &Path, supabase: &Supabase) {
    const EVENT_COLUMNS: &str =
        "id, request_id, client, key_hash, workspace, method, route, model, status, verdict,
        request_bytes, response_bytes, characters, credits, credits_from, first_byte_ms, total_ms,
        user_hash, region";
    let columns = EVENT_COLUMNS.replace("user_hash", "user");
    let attempts = query_database(
        directory,
        &format!("SELECT {columns}, number, started_at_ms FROM attempts ORDER BY id"),
    );
    let supabase_columns = EVENT_COLUMNS.replace("key_hash", "api_key_hash");
    assert_eq!(
        supabase.sql(&format!(
            "SELECT {supabase_columns}, attempt, round(extract(epoch FROM started_at) * 1000)
             FROM elevenlabs_usage_events ORDER BY id::text COLLATE \"C\""
        )),
        attempts
    );
    assert!(!attempts.is_empty(), "the database must contain attempts");
    let keys = query_database(
        directory,
        "SELECT key_hash, short_key, status, character_count, coalesce(character_limit, 0),
            max(coalesce(character_limit, 0) - character_count, 0) FROM keys ORDER BY key_hash",
    );
    assert_eq!(
        supabase.sql(
            "SELECT api_key_hash, short_key, status, character_count, character_limit, remaining_characters
             FROM elevenlabs_key_usage ORDER BY api_key_hash COLLATE \"C\""
        ),
        keys
    );
    let sums = "SELECT count(*), sum(credits), sum(response_bytes) FROM ";
    assert_eq!(
        supabase.sql(&format!("{sums} elevenlabs_usage_events")),
        query_database(directory, &format!("{sums} attempts"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documented_queries_return_the_usage() {
    let supabase = Supabase::new().await;
    supabase.migrate();
    let plan = Plan::with_keys([(FIRST_KEY, 100), (SECOND_KEY, 1_000), (THIRD_KEY, 100_000)]);
    let proxy = start_proxy(plan, configure_mirror(&supabase)).await;
    // The first key is exhausted, the second one is near its limit, and the third one is unused.
    for characters in [100, 850] {
        assert_eq!(proxy.request_speech(characters).await.status(), 200);
    }
    let short = KEYS.map(|key| format!("{}...{}", &key[..11], &key[key.len() - 5..]));
    let directory = close_and_compare(proxy, &supabase).await;

    assert_eq!(
        supabase.sql("SELECT short_key, usage_percent FROM elevenlabs_key_health ORDER BY usage_percent ASC"),
        [format!("{}|0.00", short[2]), format!("{}|85.00", short[1]), format!("{}|100.00", short[0])]
    );
    assert_eq!(supabase.sql("SELECT * FROM elevenlabs_key_health ORDER BY usage_percent ASC").len(), 3);
    let over_limit = supabase.sql("SELECT short_key, remaining_characters, next_reset_date FROM elevenlabs_key_usage WHERE is_over_limit = true");
    assert!(
        over_limit.len() == 1 && over_limit[0].starts_with(&format!("{}|0|20", short[0])),
        "only the first key must be over its limit: {over_limit:?}"
    );
    assert_eq!(
        supabase.sql("SELECT short_key, usage_percentage, remaining_characters FROM elevenlabs_key_usage WHERE is_near_limit = true AND NOT is_over_limit ORDER BY usage_percentage DESC"),
        [format!("{}|0.8500|150", short[1])]
    );
    assert_eq!(
        supabase.sql("SELECT SUM(remaining_characters) AS total_remaining FROM elevenlabs_key_usage WHERE status = 'active' AND NOT is_over_limit"),
        ["100150"]
    );
    let local_reset = query_database(directory.path(), "SELECT max(resets_at_ms) FROM keys");
    let supabase_reset =
        "SELECT round(extract(epoch FROM max(next_reset_date)) * 1000) FROM elevenlabs_key_usage";
    assert_eq!(supabase.sql(supabase_reset), local_reset, "the reset date must be in UTC");

    // A request has at most one row per key, and contains neither a key nor a token.
    for request in supabase.gateway.received_requests() {
        let rows: Vec<Value> = serde_json::from_str(&request.body).unwrap();
        let mut hashes: Vec<&str> = rows
            .iter()
            .filter_map(|row| row.get("usage_percentage").and(row["api_key_hash"].as_str()))
            .collect();
        let row_count = hashes.len();
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), row_count, "a request must have at most one row per key");
        assert!(
            !KEYS.iter().any(|key| request.body.contains(&key[12..30]))
                && !request.body.contains(CLIENT_TOKEN)
        );
        assert_eq!((request.api_key.as_deref(), request.authorization), (Some(SECRET_KEY), None));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_service_role_can_read_the_tables() {
    let supabase = Supabase::new().await;
    let service_token = role_token("service_role");
    let proxy = start_proxy(plan(), |config| {
        configure_mirror(&supabase)(config);
        config.supabase.key = Some(SupabaseKey::new(&service_token, SupabaseKeyForm::LegacyJwt).unwrap());
    })
    .await;
    request_speech_times(&proxy, 1).await;
    close_and_compare(proxy, &supabase).await;
    let first_request = supabase.gateway.received_requests().remove(0);
    assert_eq!(
        (first_request.api_key, first_request.authorization),
        (Some(service_token.clone()), Some(format!("Bearer {service_token}")))
    );

    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let tables = ["elevenlabs_key_usage", "elevenlabs_key_health", "elevenlabs_usage_events"];
    for (role, refusal) in [("anon", Some(401)), ("authenticated", Some(403)), ("service_role", None)] {
        for table in tables {
            let url = format!("{}/rest/v1/{table}", supabase.url());
            let send_as_role = |request: reqwest::RequestBuilder| {
                request.header("apikey", role_token(role)).bearer_auth(role_token(role)).send()
            };
            let read_response = send_as_role(client.get(&url)).await.unwrap();
            let is_view = table == "elevenlabs_key_health";
            match refusal {
                Some(status) => {
                    assert_eq!(read_response.status(), status, "{role} must not read {table}");
                    let write = send_as_role(
                        client.patch(format!("{url}?api_key_hash=neq.x")).json(&json!({"api_key_hash": "x"})),
                    );
                    assert!(
                        is_view || write.await.unwrap().status() == status,
                        "{role} must not write {table}"
                    );
                }
                None => {
                    let rows: Vec<Value> = read_response.json().await.unwrap();
                    assert!(!rows.is_empty(), "the service role must read {table}");
                }
            }
        }
    }
    // Row level security hides the rows even if a role is granted access by mistake.
    supabase
        .sql("GRANT SELECT ON elevenlabs_key_usage, elevenlabs_usage_events, elevenlabs_key_health TO anon");
    for table in tables {
        assert_eq!(
            supabase.sql(&format!("SET ROLE anon; SELECT count(*) FROM {table}")),
            ["0"],
            "the rows of {table} must be hidden"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_observation_never_overwrites_a_newer_one() {
    let supabase = Supabase::new().await;
    let client = keychoir::upstream::http_client().unwrap().build().unwrap();
    let report = async |at: &str, hashes: &[&str], count: u64| {
        let row = |hash: &&str| {
            json!({
                "api_key_hash": hash, "short_key": "s", "character_count": count, "next_reset_date": "infinity", "last_checked": at,
            })
        };
        let url = format!("{}/rest/v1/elevenlabs_key_usage?on_conflict=api_key_hash", supabase.url());
        let rows: Vec<Value> = hashes.iter().map(row).collect();
        let request =
            client.post(url).header("prefer", "resolution=merge-duplicates,return=minimal").json(&rows);
        let response = request.header("apikey", SECRET_KEY).send().await.unwrap();
        assert!(
            response.status().is_success(),
            "the report must be stored: {}",
            response.text().await.unwrap()
        );
    };
    let counts = || supabase.sql("SELECT api_key_hash, character_count FROM elevenlabs_key_usage ORDER BY 1");
    report("2026-01-02T00:00:00.001Z", &["a", "b"], 1).await;
    report("2026-01-02T00:00:00.000Z", &["a", "b", "c"], 2).await;
    assert_eq!(counts(), ["a|1", "b|1", "c|2"], "an older report must only add the new key");
    report("2026-01-02T00:00:00.001Z", &["a"], 3).await;
    report("2026-01-02T00:00:00.002Z", &["c"], 4).await;
    assert_eq!(counts(), ["a|3", "b|1", "c|4"], "a report of the same time must replace the row");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_an_outage_are_delivered_after_it() {
    let supabase = Supabase::new().await;
    supabase.gateway.set_fault(Fault::Closed);
    let proxy = start_proxy(plan(), |config| {
        configure_mirror(&supabase)(config);
        config.supabase.max_batch_rows = 7;
    })
    .await;
    request_speech_times(&proxy, 10).await;
    wait_for_mirror(&proxy, "failing", 0).await;
    request_speech_times(&proxy, 10).await;
    assert_eq!(event_count(&supabase), 0);
    // Supabase fails in every way and recovers in between.
    let faults = [Fault::None, Fault::Closed, Fault::Status(503), Fault::ResponseLost, Fault::Status(429)];
    supabase.gateway.queue_faults(&faults.repeat(3));
    wait_until(|| supabase.gateway.has_injected_all()).await;
    supabase.gateway.set_fault(Fault::None);
    request_speech_times(&proxy, 1).await;
    wait_until(|| event_count(&supabase) >= 21).await;
    wait_for_mirror(&proxy, "ok", 0).await;
    close_and_compare(proxy, &supabase).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_response_does_not_duplicate_rows() {
    let supabase = Supabase::new().await;
    let proxy = start_proxy(plan(), configure_mirror(&supabase)).await;
    request_speech_times(&proxy, 3).await;
    supabase.gateway.set_path_fault("usage_events", Fault::ResponseLost);
    request_speech_times(&proxy, 3).await;
    wait_until(|| event_count(&supabase) == 6).await;
    let deliveries = || {
        supabase
            .gateway
            .received_requests()
            .iter()
            .filter(|request| request.path.contains("usage_events"))
            .count()
    };
    let deliveries_before = deliveries();
    // The deliveries are not acknowledged, so the rows are sent repeatedly.
    wait_until(|| deliveries() > deliveries_before + 3).await;
    assert_eq!(mirror_state(&proxy).await.0, "failing");
    supabase.gateway.set_fault(Fault::None);
    wait_for_mirror(&proxy, "ok", 0).await;
    close_and_compare(proxy, &supabase).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_supabase_key_pauses_the_mirror_until_a_restart_with_a_valid_one() {
    let supabase = Supabase::new().await;
    let proxy = start_proxy(plan(), |config| {
        configure_mirror(&supabase)(config);
        config.supabase.key = Some(SupabaseKey::new(&foreign_token(), SupabaseKeyForm::LegacyJwt).unwrap());
    })
    .await;
    request_speech_times(&proxy, 2).await;
    wait_for_mirror(&proxy, "paused", 0).await;
    assert_eq!(event_count(&supabase), 0);
    // The next startup has a valid key.
    let (_, directory) = proxy.close().await;
    let proxy = start_proxy_in(directory, plan(), configure_mirror(&supabase)).await;
    wait_until(|| event_count(&supabase) == 2).await;
    wait_for_mirror(&proxy, "ok", 0).await;
    let directory = proxy.close_unchecked().await;
    compare(directory.path(), &supabase);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_table_or_column_pauses_the_mirror_until_the_migration() {
    let supabase = Supabase::empty().await;
    let proxy = start_proxy(plan(), configure_mirror(&supabase)).await;
    request_speech_times(&proxy, 2).await;
    wait_for_mirror(&proxy, "paused", 0).await;
    supabase.migrate();
    wait_until(|| event_count(&supabase) == 2).await;
    wait_for_mirror(&proxy, "ok", 0).await;

    supabase.alter("ALTER TABLE elevenlabs_key_usage DROP COLUMN usage_percentage CASCADE");
    request_speech_times(&proxy, 2).await;
    wait_for_mirror(&proxy, "paused", 0).await;
    wait_until(|| event_count(&supabase) == 4).await;
    supabase.migrate();
    wait_for_mirror(&proxy, "ok", 0).await;
    request_speech_times(&proxy, 1).await;
    close_and_compare(proxy, &supabase).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_row_is_isolated_and_the_other_rows_are_delivered() {
    let supabase = Supabase::new().await;
    supabase.sql("ALTER TABLE elevenlabs_usage_events ADD CONSTRAINT odd CHECK (route <> '/v1/models')");
    supabase.sql(&format!(
        "ALTER TABLE elevenlabs_key_usage ADD CONSTRAINT odd CHECK (api_key_hash <> '{}')",
        Fingerprint::new(SECOND_KEY)
    ));
    supabase.gateway.set_fault(Fault::Closed);
    let proxy = start_proxy(plan(), configure_mirror(&supabase)).await;
    for number in 0..40 {
        match number {
            11 | 30 => assert_eq!(proxy.get("/v1/models").await.status(), 200),
            _ => request_speech_times(&proxy, 1).await,
        }
    }
    supabase.gateway.set_fault(Fault::None);
    wait_until(|| event_count(&supabase) == 38).await;
    wait_for_mirror(&proxy, "ok", 3).await;
    assert_eq!(supabase.sql("SELECT count(*) FROM elevenlabs_key_usage"), ["2"]);
    // Refused rows do not block other rows.
    request_speech_times(&proxy, 1).await;
    wait_until(|| event_count(&supabase) == 39).await;
    let (_, directory) = proxy.close().await;
    assert_eq!(query_database(directory.path(), "SELECT DISTINCT refused FROM outbox_events"), ["23514"]);

    supabase.sql("ALTER TABLE elevenlabs_usage_events DROP CONSTRAINT odd");
    supabase.sql("ALTER TABLE elevenlabs_key_usage DROP CONSTRAINT odd");
    let proxy = start_proxy_in(directory, plan(), configure_mirror(&supabase)).await;
    wait_until(|| event_count(&supabase) == 41).await;
    wait_for_mirror(&proxy, "ok", 0).await;
    let directory = proxy.close_unchecked().await;
    compare(directory.path(), &supabase);
    assert_eq!(query_database(directory.path(), "SELECT count(*) FROM outbox_events"), ["0"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_row_is_lost_if_a_table_refuses_every_row() {
    let supabase = Supabase::new().await;
    supabase.sql("ALTER TABLE elevenlabs_usage_events ADD COLUMN mine TEXT NOT NULL");
    supabase.gateway.set_fault(Fault::Closed);
    let proxy = start_proxy(plan(), configure_mirror(&supabase)).await;
    request_speech_times(&proxy, 5).await;
    let (_, directory) = proxy.close().await;
    // At the next startup, all rows are sent together. If Supabase refuses one row, the row is at fault. If
    // it refuses all of several rows, the table is at fault.
    supabase.gateway.set_fault(Fault::None);
    let proxy = start_proxy_in(directory, plan(), configure_mirror(&supabase)).await;
    wait_for_mirror(&proxy, "paused", 0).await;
    supabase.sql("ALTER TABLE elevenlabs_usage_events DROP COLUMN mine");
    wait_until(|| event_count(&supabase) == 5).await;
    wait_for_mirror(&proxy, "ok", 0).await;
    let directory = proxy.close_unchecked().await;
    compare(directory.path(), &supabase);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unresponsive_supabase_does_not_delay_the_shutdown() {
    let supabase = Supabase::new().await;
    supabase.gateway.set_fault(Fault::NoResponse);
    let proxy = start_proxy(plan(), |config| {
        configure_mirror(&supabase)(config);
        config.supabase.final_push_timeout = SHORT_INTERVAL;
    })
    .await;
    wait_until(|| !supabase.gateway.received_requests().is_empty()).await;
    request_speech_times(&proxy, 5).await;
    // The mirror still waits for a response. The shutdown waits for it only until `final_push_timeout`.
    let (_, directory) = proxy.close().await;
    assert_eq!(event_count(&supabase), 0);
    supabase.gateway.set_fault(Fault::None);
    let proxy = start_proxy_in(directory, plan(), configure_mirror(&supabase)).await;
    wait_until(|| event_count(&supabase) == 5).await;
    let directory = proxy.close_unchecked().await;
    compare(directory.path(), &supabase);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_remaining_rows_are_delivered_at_shutdown() {
    let supabase = Supabase::new().await;
    let proxy = start_proxy(plan(), |config| {
        configure_mirror(&supabase)(config);
        config.supabase.interval = Duration::from_secs(3_600);
    })
    .await;
    wait_until(|| !supabase.gateway.received_requests().is_empty()).await;
    request_speech_times(&proxy, 20).await;
    close_and_compare(proxy, &supabase).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_keys_are_mirrored_if_events_are_disabled() {
    let supabase = Supabase::new().await;
    let proxy = start_proxy(plan(), |config| {
        configure_mirror(&supabase)(config);
        config.supabase.events = false;
    })
    .await;
    request_speech_times(&proxy, 2).await;
    proxy.close().await;
    assert_eq!(supabase.sql("SELECT sum(character_count) FROM elevenlabs_key_usage"), ["20"]);
    assert_eq!(event_count(&supabase), 0);
    assert!(
        supabase
            .gateway
            .received_requests()
            .iter()
            .all(|request| request.row_count() > 0 && !request.path.contains("events"))
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cost_of_a_conversation_is_delivered_after_its_event() {
    let supabase = Supabase::new().await;
    let proxy = start_proxy(plan(), configure_mirror(&supabase)).await;
    let mut session = open_session(&proxy, AGENT).await;
    session.send_json(&json!({"type": "conversation_initiation_client_data"})).await;
    session.send_json(&json!({"type": "user_message", "text": "Hello?"})).await;
    while session.receive_json().await["type"] != "agent_response" {}
    session.close().await;
    drop(session);
    // The provider reports the price a second after the end at the earliest.
    let priced = "SELECT count(*) FROM elevenlabs_usage_events WHERE credits > 0 AND credits_from = 'answer'";
    wait_until(|| event_count(&supabase) == 1).await;
    wait_until(|| supabase.sql(priced) == ["1"]).await;
    let sent_requests: Vec<_> = supabase
        .gateway
        .received_requests()
        .into_iter()
        .filter(|request| request.path.contains("usage_events"))
        .collect();
    let source = |body: &str| serde_json::from_str::<Value>(body).unwrap()[0]["credits_from"].clone();
    let sources: Vec<Value> = sent_requests.iter().map(|request| source(&request.body)).collect();
    assert_eq!(sources, ["unknown", "answer"]);
    close_and_compare(proxy, &supabase).await;

    // The first request, without the cost, is sent again after the second one.
    let url = format!("{}{}", supabase.url(), sent_requests[0].path);
    let request = keychoir::upstream::http_client().unwrap().build().unwrap().post(url);
    let request = request.header("apikey", SECRET_KEY).header("prefer", "resolution=merge-duplicates");
    let response = request
        .header("content-type", "application/json")
        .body(sent_requests[0].body.clone())
        .send()
        .await
        .unwrap();
    assert!(response.status().is_success(), "the row must be stored: {}", response.text().await.unwrap());
    assert_eq!(supabase.sql(priced), ["1"]);
}
