//! Tests account affinity with three accounts: a request that names a voice, a history item, an earlier request or
//! a page of a list is sent to the account that owns the resource, and fails over only to other keys of this account.
//! The proxy finds the owners in responses and keeps them over a restart, without the identifiers of the resources.
//! A request with resources of two owners is refused.

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, assert_proxy_error, start_proxy,
    start_proxy_in, start_proxy_with,
};
use keychoir::config::{Config, KeyConfig};
use keychoir::secret::ApiKey;
use keychoir::simulator::{KeyPlan, Plan, WorkspacePlan};
use reqwest::Method;
use serde_json::{Value, json};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

/// Returns a plan of three accounts, each with a voice whose owner the proxy does not know.
fn three_accounts() -> Plan {
    let mut plan = Plan::with_keys([]);
    for (index, key) in KEYS.into_iter().enumerate() {
        let name = format!("account-{index}");
        plan = plan
            .with_workspace(WorkspacePlan {
                voices: vec![format!("voice-of-{index}")],
                ..WorkspacePlan::new(&name, 10_000)
            })
            .with_key(KeyPlan { workspace: Some(name), ..KeyPlan::new(key, 0) });
    }
    plan
}

fn speech_path(voice: &str) -> String {
    format!("/v1/text-to-speech/{voice}")
}

fn speech_body() -> Value {
    json!({ "text": "abc", "model_id": "eleven_multilingual_v2" })
}

impl TestProxy {
    /// Adds a voice, and returns its identifier.
    async fn clone_voice(&self) -> String {
        let body = "--x\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nMine\r\n--x--\r\n";
        let request = self.request(Method::POST, "/v1/voices/add", CLIENT_TOKEN);
        let request = request.header("content-type", "multipart/form-data; boundary=x").body(body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        response.json::<Value>().await.unwrap()["voice_id"].as_str().unwrap().to_owned()
    }

    async fn get_json(&self, path: &str) -> Value {
        let response = self.get(path).await;
        assert_eq!(response.status(), 200, "{path}: the document must be readable");
        response.json().await.unwrap()
    }

    /// Sends a DELETE, and returns the status of the response.
    async fn delete(&self, path: &str) -> u16 {
        self.request(Method::DELETE, path, CLIENT_TOKEN).send().await.unwrap().status().as_u16()
    }

    /// Makes the provider refuse all keys except `key`.
    fn refuse_keys_except(&self, key: &str) {
        for refused_key in KEYS.into_iter().filter(|other_key| *other_key != key) {
            self.set_fault(refused_key, "system_busy");
        }
        self.simulator.set_fault(key, None);
    }

    fn clear_faults(&self) {
        for key in KEYS {
            self.simulator.set_fault(key, None);
        }
    }
}

fn header_value(response: &reqwest::Response, name: &str) -> String {
    response.headers()[name].to_str().unwrap().to_owned()
}

/// Returns the number of requests that each key received between the two counts.
fn count_differences(counts_after: &[usize], counts_before: &[usize]) -> Vec<usize> {
    counts_after.iter().zip(counts_before).map(|(after, before)| after - before).collect()
}

/// Exhausts the first two keys. The third key remains active.
async fn exhaust_two_keys(proxy: &TestProxy) {
    proxy.set_fault(FIRST_KEY, "quota");
    proxy.set_fault(SECOND_KEY, "quota");
    assert_eq!(proxy.request_speech(3).await.status(), 200);
    proxy.clear_faults();
    assert_eq!(proxy.key_statuses().await, ["exhausted", "exhausted", "active"]);
}

#[tokio::test]
async fn speech_is_requested_from_the_account_that_owns_the_voice() {
    let proxy = start_proxy(three_accounts()).await;
    // A request for a voice of an unknown owner is sent to one account after another, and the owner is recorded.
    assert_eq!(proxy.post(&speech_path("voice-of-2"), &speech_body()).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    for _ in 0..3 {
        assert_eq!(proxy.post(&speech_path("voice-of-2"), &speech_body()).await.status(), 200);
    }
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 4]);
    // A voice that every account has is requested with the current key.
    assert_eq!(proxy.request_speech(3).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 1, 4]);
    let records = proxy.into_records().await;
    assert_eq!(records[0].verdict, "not_found");
}

#[tokio::test]
async fn the_providers_response_for_a_missing_voice_is_relayed() {
    let proxy = start_proxy(three_accounts()).await;
    let response = proxy.post(&speech_path("unknown-voice"), &speech_body()).await;
    assert_eq!(response.status(), 404);
    assert!(!response.headers().contains_key("x-keychoir-error"));
    assert_eq!(response.json::<Value>().await.unwrap()["detail"]["code"], "voice_not_found");
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    // A request that changes an account is sent to one account only.
    assert_eq!(proxy.delete("/v1/voices/voice-of-1").await, 404);
    assert_eq!(proxy.request_counts(&KEYS), [2, 1, 1]);
    proxy.close().await;
}

#[tokio::test]
async fn the_owner_of_a_created_voice_is_recorded_immediately() {
    let proxy = start_proxy(three_accounts()).await;
    proxy.set_fault(FIRST_KEY, "payment_issue");
    let voice = proxy.clone_voice().await;
    proxy.clear_faults();
    let counts_before = proxy.request_counts(&KEYS);
    assert_eq!(proxy.post(&speech_path(&voice), &speech_body()).await.status(), 200);
    assert_eq!(
        proxy.delete(&format!("/v1/voices/{voice}")).await,
        200,
        "a deletion must be sent to the owner"
    );
    let counts_after = proxy.request_counts(&KEYS);
    assert_eq!(count_differences(&counts_after, &counts_before), [0, 2, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_dialogue_is_sent_to_the_account_of_its_voices() {
    let proxy = start_proxy(three_accounts()).await;
    let lines = json!({ "inputs": [{ "text": "a", "voice_id": "voice-of-1" }] });
    for expected_counts in [[1, 1, 0], [1, 2, 0]] {
        assert_eq!(proxy.post("/v1/text-to-dialogue", &lines).await.status(), 200);
        assert_eq!(proxy.request_counts(&KEYS), expected_counts);
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_history_item_is_read_from_its_account_without_credits() {
    let proxy = start_proxy(three_accounts()).await;
    let response = proxy.request_speech(3).await;
    let (item, audio) = (header_value(&response, "history-item-id"), response.bytes().await.unwrap());
    exhaust_two_keys(&proxy).await;
    let counts_before = proxy.request_counts(&KEYS);
    let download = proxy.get(&format!("/v1/history/{item}/audio")).await;
    assert_eq!((download.status().as_u16(), download.bytes().await.unwrap()), (200, audio));
    assert_eq!(proxy.delete(&format!("/v1/history/{item}")).await, 200);
    let counts_after = proxy.request_counts(&KEYS);
    assert_eq!(count_differences(&counts_after, &counts_before), [2, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn an_earlier_request_is_continued_by_its_account_only() {
    let proxy = start_proxy(three_accounts()).await;
    proxy.refuse_keys_except(SECOND_KEY);
    proxy.set_fault(FIRST_KEY, "quota");
    let request_id = header_value(&proxy.request_speech(3).await, "request-id");
    proxy.clear_faults();
    let continue_requests = |ids: Value| {
        let proxy = &proxy;
        async move { proxy.post(SPEECH_PATH, &json!({ "text": "abc", "previous_request_ids": ids })).await }
    };
    assert_eq!(continue_requests(json!([request_id])).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 2, 0]);

    // The account is exhausted, and other accounts cannot continue the request.
    proxy.set_fault(SECOND_KEY, "quota");
    let refused_response = continue_requests(json!([request_id])).await;
    assert_proxy_error(&refused_response, 401, "owner_exhausted");
    let detail = refused_response.json::<Value>().await.unwrap()["detail"].clone();
    assert_eq!(detail["status"], "quota_exceeded");
    let message = detail["message"].as_str().unwrap();
    assert!(
        message.starts_with("The ElevenLabs account that this earlier request belongs to"),
        "the message must report that the earlier request belongs to the account: {message}"
    );
    assert_eq!(proxy.request_counts(&KEYS)[2], 0, "the request must not be sent to another account");

    // A request that continues no other is served by the next account.
    let later_response = proxy.request_speech(3).await;
    assert_eq!(later_response.status(), 200);
    let refused_response =
        continue_requests(json!([request_id, header_value(&later_response, "request-id")])).await;
    assert_proxy_error(&refused_response, 400, "conflicting_owners");
    proxy.close().await;
}

#[tokio::test]
async fn a_request_with_resources_of_two_owners_is_refused_and_names_them() {
    let proxy = start_proxy(three_accounts()).await;
    let request_id = header_value(&proxy.request_speech(3).await, "request-id");
    assert_eq!(proxy.post(&speech_path("voice-of-1"), &speech_body()).await.status(), 200);
    let counts_before = proxy.request_counts(&KEYS);
    let body = json!({ "text": "abc", "previous_request_ids": [request_id] });
    let response = proxy.post(&speech_path("voice-of-1"), &body).await;
    assert_proxy_error(&response, 400, "conflicting_owners");
    let message = response.json::<Value>().await.unwrap()["detail"]["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("a voice and an earlier request"),
        "the message must contain `a voice and an earlier request`: {message}"
    );
    assert_eq!(proxy.request_counts(&KEYS), counts_before, "the provider must receive no request");
    proxy.close().await;
}

#[tokio::test]
async fn a_request_with_an_owner_fails_over_within_its_account_only() {
    let plan = three_accounts()
        .with_key(KeyPlan { workspace: Some("account-1".into()), ..KeyPlan::new("sk_second_of_1", 0) });
    let proxy = start_proxy_with(plan, |config| {
        for index in [1, 3] {
            config.keys[index].workspace = Some("account-1".to_owned());
        }
    })
    .await;
    assert_eq!(proxy.post(&speech_path("voice-of-1"), &speech_body()).await.status(), 200);
    proxy.set_fault(SECOND_KEY, "invalid");
    assert_eq!(proxy.post(&speech_path("voice-of-1"), &speech_body()).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY, "sk_second_of_1"]), [1, 2, 0, 1]);
    proxy.set_fault("sk_second_of_1", "rate_limit=30");
    let refused_response = proxy.post(&speech_path("voice-of-1"), &speech_body()).await;
    assert_proxy_error(&refused_response, 429, "owner_rate_limited");
    assert_eq!(proxy.request_counts(&[FIRST_KEY, THIRD_KEY]), [1, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn all_pages_of_a_list_are_requested_from_one_account() {
    let proxy = start_proxy(three_accounts()).await;
    let first_page = proxy.get_json("/v2/voices?page_size=2").await;
    let token = first_page["next_page_token"].as_str().unwrap().to_owned();
    exhaust_two_keys(&proxy).await;
    // Another key is current, but the pages and the next list are requested from the first account.
    let second_page = proxy.get_json(&format!("/v2/voices?page_size=2&next_page_token={token}")).await;
    assert_eq!(second_page["voices"][1]["voice_id"], "voice-of-0");
    let list = proxy.get_json("/v1/voices").await;
    assert!(list["voices"].as_array().unwrap().iter().any(|voice| voice["voice_id"] == "voice-of-0"));
    assert_eq!(
        proxy.request_counts(&[SECOND_KEY]),
        [1],
        "the second key must receive only the request that exhausted it"
    );
    proxy.close().await;
}

#[tokio::test]
async fn a_list_records_the_owners_of_voices_except_premade_ones() {
    let proxy = start_proxy(three_accounts()).await;
    proxy.refuse_keys_except(THIRD_KEY);
    for key in [FIRST_KEY, SECOND_KEY] {
        proxy.set_fault(key, "invalid");
    }
    let list = proxy.get_json("/v1/voices").await;
    assert_eq!(list["voices"].as_array().unwrap().len(), 4);
    let counts_before = proxy.request_counts(&KEYS);
    assert_eq!(proxy.post(&speech_path("voice-of-2"), &speech_body()).await.status(), 200);
    let counts_after = proxy.request_counts(&KEYS);
    assert_eq!(count_differences(&counts_after, &counts_before), [0, 0, 1]);
    // A premade voice has no owner, so the request fails over when the key is exhausted.
    proxy.clear_faults();
    let second_proxy = start_proxy(three_accounts()).await;
    second_proxy.get_json("/v1/voices").await;
    second_proxy.set_fault(FIRST_KEY, "quota");
    assert_eq!(second_proxy.request_speech(3).await.status(), 200);
    second_proxy.close().await;
    proxy.close().await;
}

#[tokio::test]
async fn a_resource_that_its_owner_has_lost_is_searched_in_all_accounts_the_next_time() {
    let proxy = start_proxy(three_accounts()).await;
    assert_eq!(proxy.post(&speech_path("voice-of-1"), &speech_body()).await.status(), 200);
    let deletion = proxy.client.delete(format!("{}/v1/voices/voice-of-1", proxy.simulator.base_url()));
    assert_eq!(deletion.header("xi-api-key", SECOND_KEY).send().await.unwrap().status(), 200);
    for expected_counts in [[1, 3, 0], [2, 4, 1]] {
        assert_eq!(proxy.post(&speech_path("voice-of-1"), &speech_body()).await.status(), 404);
        assert_eq!(proxy.request_counts(&KEYS), expected_counts);
    }
    proxy.close().await;
}

#[tokio::test]
async fn an_owner_is_restored_after_a_restart_and_its_added_key_is_used() {
    let first = start_proxy_with(three_accounts(), |config| config.keys.truncate(2)).await;
    assert_eq!(first.post(&speech_path("voice-of-1"), &speech_body()).await.status(), 200);
    assert_eq!(first.request_counts(&KEYS), [1, 1, 0]);
    let (_, directory) = first.close().await;

    // The account receives a name, another key, and a later position in the configuration.
    let added_key = "sk_later_key_of_account_1";
    let plan = three_accounts()
        .with_key(KeyPlan { workspace: Some("account-1".into()), ..KeyPlan::new(added_key, 0) });
    let second = start_proxy_in(directory, plan, |config: &mut Config| {
        let key = |key: &str, workspace: Option<&str>| {
            let mut config = KeyConfig::from(ApiKey::new(key).unwrap());
            config.workspace = workspace.map(str::to_owned);
            config
        };
        config.keys = vec![
            key(THIRD_KEY, None),
            key(FIRST_KEY, None),
            key(added_key, Some("studio")),
            key(SECOND_KEY, Some("studio")),
        ];
    })
    .await;
    assert_eq!(second.post(&speech_path("voice-of-1"), &speech_body()).await.status(), 200);
    assert_eq!(second.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY, added_key]), [0, 0, 0, 1]);
    // The usage records also contain the requests before the restart, which this provider has not received.
    second.close_unchecked().await;
}

#[tokio::test]
async fn the_database_contains_no_resource_identifiers() {
    let proxy = start_proxy(three_accounts()).await;
    let response = proxy.request_speech(3).await;
    let item = header_value(&response, "history-item-id");
    let voice = proxy.clone_voice().await;
    assert_eq!(proxy.post(&speech_path("voice-of-2"), &speech_body()).await.status(), 200);
    let (_, directory) = proxy.close().await;
    let database = std::fs::read(directory.path().join("keychoir.db")).unwrap();
    for identifier in [&item, &voice, "voice-of-2"] {
        assert!(
            !database.windows(identifier.len()).any(|bytes| bytes == identifier.as_bytes()),
            "the database must not contain {identifier:?}"
        );
    }
    let connection = rusqlite::Connection::open(directory.path().join("keychoir.db")).unwrap();
    let sql = "SELECT (SELECT count(*) FROM owners) + (SELECT sum(changes) FROM owners_plentiful)";
    let count: i64 = connection.query_row(sql, [], |row| row.get(0)).unwrap();
    assert!(count >= 4, "the owners of at least four resources must be recorded, not of {count}");
}
