//! Requests for objects of an account are served by that account, over three of them: voices,
//! history, continued requests, lists and their pages.

use std::time::Duration;

use crate::support::{
    CLIENT_TOKEN, FIRST_KEY, SECOND_KEY, SPEECH_PATH, THIRD_KEY, TestProxy, start_proxy, start_proxy_in,
    start_proxy_with,
};
use keychoir::app::DrainOutcome;
use keychoir::config::{Config, KeyConfig};
use keychoir::secret::ApiKey;
use keychoir::simulator::{KeyPlan, Plan, WorkspacePlan};
use serde_json::{Value, json};

const KEYS: [&str; 3] = [FIRST_KEY, SECOND_KEY, THIRD_KEY];

/// Three accounts; their voices are their own and were created elsewhere.
fn three() -> Plan {
    let mut plan = Plan::of([]);
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

fn speech(voice: &str) -> String {
    format!("/v1/text-to-speech/{voice}")
}

fn text() -> Value {
    json!({ "text": "abc", "model_id": "eleven_multilingual_v2" })
}

impl TestProxy {
    async fn clone_voice(&self) -> String {
        let body = "--x\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nMine\r\n--x--\r\n";
        let request =
            self.client.post(format!("{}/v1/voices/add", self.url)).header("xi-api-key", CLIENT_TOKEN);
        let request = request.header("content-type", "multipart/form-data; boundary=x").body(body);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.json::<Value>().await.unwrap()["voice_id"].as_str().unwrap().to_owned()
    }

    async fn json(&self, path: &str) -> Value {
        let answer = self.get(path).await;
        assert_eq!(answer.status(), 200, "{path}");
        answer.json().await.unwrap()
    }

    async fn delete(&self, path: &str) -> u16 {
        let request = self.client.delete(format!("{}{path}", self.url)).header("xi-api-key", CLIENT_TOKEN);
        request.send().await.unwrap().status().as_u16()
    }

    /// The provider refuses all other keys.
    fn only(&self, key: &str) {
        for other in KEYS.into_iter().filter(|other| *other != key) {
            self.set_fault(other, "system_busy");
        }
        self.simulator.always(key, None);
    }

    fn all_serve(&self) {
        for key in KEYS {
            self.simulator.always(key, None);
        }
    }
}

fn header(answer: &reqwest::Response, name: &str) -> String {
    answer.headers()[name].to_str().unwrap().to_owned()
}

/// The first two keys are exhausted; the third serves.
async fn spend_two(proxy: &TestProxy) {
    proxy.set_fault(FIRST_KEY, "quota");
    proxy.set_fault(SECOND_KEY, "quota");
    assert_eq!(proxy.request_speech(3).await.status(), 200);
    proxy.all_serve();
    assert_eq!(proxy.key_statuses().await, ["exhausted", "exhausted", "active"]);
}

#[tokio::test]
async fn a_voice_is_spoken_by_the_account_that_has_it() {
    let proxy = start_proxy(three()).await;
    // An unknown voice is tried once in every account, and its owner is then recorded.
    assert_eq!(proxy.post(&speech("voice-of-2"), &text()).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    for _ in 0..3 {
        assert_eq!(proxy.post(&speech("voice-of-2"), &text()).await.status(), 200);
    }
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 4]);
    // Voices of every account are served by the key in use.
    assert_eq!(proxy.request_speech(3).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [2, 1, 4]);
    let records = proxy.into_records().await;
    assert_eq!(records[0].verdict, "not_found");
}

#[tokio::test]
async fn a_missing_voice_gets_the_providers_response() {
    let proxy = start_proxy(three()).await;
    let answer = proxy.post(&speech("unknown-voice"), &text()).await;
    assert_eq!(answer.status(), 404);
    assert!(!answer.headers().contains_key("x-keychoir-error"));
    assert_eq!(answer.json::<Value>().await.unwrap()["detail"]["code"], "voice_not_found");
    assert_eq!(proxy.request_counts(&KEYS), [1, 1, 1]);
    // A request with an effect is not tried in several accounts.
    assert_eq!(proxy.delete("/v1/voices/voice-of-1").await, 404);
    assert_eq!(proxy.request_counts(&KEYS), [2, 1, 1]);
    proxy.close().await;
}

#[tokio::test]
async fn a_voice_is_known_as_soon_as_it_was_created() {
    let proxy = start_proxy(three()).await;
    proxy.set_fault(FIRST_KEY, "payment_issue");
    let voice = proxy.clone_voice().await;
    proxy.all_serve();
    let before = proxy.request_counts(&KEYS);
    assert_eq!(proxy.post(&speech(&voice), &text()).await.status(), 200);
    assert_eq!(proxy.delete(&format!("/v1/voices/{voice}")).await, 200, "also what has an effect");
    let after = proxy.request_counts(&KEYS);
    assert_eq!([after[0] - before[0], after[1] - before[1], after[2] - before[2]], [0, 2, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_dialogue_is_sent_to_the_account_of_its_voices() {
    let proxy = start_proxy(three()).await;
    let lines = json!({ "inputs": [{ "text": "a", "voice_id": "voice-of-1" }] });
    for hits in [[1, 1, 0], [1, 2, 0]] {
        assert_eq!(proxy.post("/v1/text-to-dialogue", &lines).await.status(), 200);
        assert_eq!(proxy.request_counts(&KEYS), hits);
    }
    proxy.close().await;
}

#[tokio::test]
async fn history_is_read_from_its_account_even_without_credits() {
    let proxy = start_proxy(three()).await;
    let first = proxy.request_speech(3).await;
    let (item, audio) = (header(&first, "history-item-id"), first.bytes().await.unwrap());
    spend_two(&proxy).await;
    let before = proxy.request_counts(&KEYS);
    let heard = proxy.get(&format!("/v1/history/{item}/audio")).await;
    assert_eq!((heard.status().as_u16(), heard.bytes().await.unwrap()), (200, audio));
    assert_eq!(proxy.delete(&format!("/v1/history/{item}")).await, 200);
    let after = proxy.request_counts(&KEYS);
    assert_eq!([after[0] - before[0], after[1] - before[1], after[2] - before[2]], [2, 0, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_request_is_continued_by_its_account_only() {
    let proxy = start_proxy(three()).await;
    proxy.only(SECOND_KEY);
    proxy.set_fault(FIRST_KEY, "quota");
    let first = header(&proxy.request_speech(3).await, "request-id");
    proxy.all_serve();
    let continued = |ids: Value| {
        let proxy = &proxy;
        async move { proxy.post(SPEECH_PATH, &json!({ "text": "abc", "previous_request_ids": ids })).await }
    };
    assert_eq!(continued(json!([first])).await.status(), 200);
    assert_eq!(proxy.request_counts(&KEYS), [1, 2, 0]);

    // Its account is exhausted: no other can continue the request.
    proxy.set_fault(SECOND_KEY, "quota");
    let refused = continued(json!([first])).await;
    assert_eq!(
        (refused.status().as_u16(), &header(&refused, "x-keychoir-error")[..]),
        (401, "owner_exhausted")
    );
    let detail = refused.json::<Value>().await.unwrap()["detail"].clone();
    assert_eq!(detail["status"], "quota_exceeded");
    let message = detail["message"].as_str().unwrap();
    assert!(message.starts_with("The ElevenLabs account that this earlier request belongs to"), "{message}");
    assert_eq!(proxy.request_counts(&KEYS)[2], 0, "no other key was sent");

    // Without it, the next account speaks.
    let second = proxy.request_speech(3).await;
    assert_eq!(second.status(), 200);
    let both = continued(json!([first, header(&second, "request-id")])).await;
    assert_eq!((both.status().as_u16(), &header(&both, "x-keychoir-error")[..]), (400, "conflicting_owners"));
    proxy.close().await;
}

#[tokio::test]
async fn resources_of_two_owners_are_refused_and_named() {
    let proxy = start_proxy(three()).await;
    let request = header(&proxy.request_speech(3).await, "request-id");
    assert_eq!(proxy.post(&speech("voice-of-1"), &text()).await.status(), 200);
    let before = proxy.request_counts(&KEYS);
    let body = json!({ "text": "abc", "previous_request_ids": [request] });
    let answer = proxy.post(&speech("voice-of-1"), &body).await;
    assert_eq!(
        (answer.status().as_u16(), &header(&answer, "x-keychoir-error")[..]),
        (400, "conflicting_owners")
    );
    let message = answer.json::<Value>().await.unwrap()["detail"]["message"].as_str().unwrap().to_owned();
    assert!(message.contains("a voice and an earlier request"), "{message}");
    assert_eq!(proxy.request_counts(&KEYS), before, "no key was sent");
    proxy.close().await;
}

#[tokio::test]
async fn an_owned_request_fails_over_within_its_account_only() {
    let plan = three()
        .with_key(KeyPlan { workspace: Some("account-1".into()), ..KeyPlan::new("sk_second_of_1", 0) });
    let proxy = start_proxy_with(plan, |config| {
        for index in [1, 3] {
            config.keys[index].workspace = Some("account-1".to_owned());
        }
    })
    .await;
    assert_eq!(proxy.post(&speech("voice-of-1"), &text()).await.status(), 200);
    proxy.set_fault(SECOND_KEY, "invalid");
    assert_eq!(proxy.post(&speech("voice-of-1"), &text()).await.status(), 200);
    assert_eq!(proxy.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY, "sk_second_of_1"]), [1, 2, 0, 1]);
    proxy.set_fault("sk_second_of_1", "rate_limit=30");
    let refused = proxy.post(&speech("voice-of-1"), &text()).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(header(&refused, "x-keychoir-error"), "owner_rate_limited");
    assert_eq!(proxy.request_counts(&[FIRST_KEY, THIRD_KEY]), [1, 0]);
    proxy.close().await;
}

#[tokio::test]
async fn a_list_stays_with_its_account_from_page_to_page() {
    let proxy = start_proxy(three()).await;
    let first = proxy.json("/v2/voices?page_size=2").await;
    let token = first["next_page_token"].as_str().unwrap().to_owned();
    spend_two(&proxy).await;
    // Another key is in use by now; the pages and the next list stay with the first account.
    let second = proxy.json(&format!("/v2/voices?page_size=2&next_page_token={token}")).await;
    assert_eq!(second["voices"][1]["voice_id"], "voice-of-0");
    let again = proxy.json("/v1/voices").await;
    assert!(again["voices"].as_array().unwrap().iter().any(|voice| voice["voice_id"] == "voice-of-0"));
    assert_eq!(proxy.request_counts(&[SECOND_KEY]), [1], "only when it was spent");
    proxy.close().await;
}

#[tokio::test]
async fn a_list_records_owned_resources_and_not_shared_ones() {
    let proxy = start_proxy(three()).await;
    proxy.only(THIRD_KEY);
    for key in [FIRST_KEY, SECOND_KEY] {
        proxy.set_fault(key, "invalid");
    }
    let list = proxy.json("/v1/voices").await;
    assert_eq!(list["voices"].as_array().unwrap().len(), 4);
    let before = proxy.request_counts(&KEYS);
    assert_eq!(proxy.post(&speech("voice-of-2"), &text()).await.status(), 200);
    let after = proxy.request_counts(&KEYS);
    assert_eq!([after[0] - before[0], after[1] - before[1], after[2] - before[2]], [0, 0, 1]);
    // A premade voice has no owner: the request fails over when this key is exhausted.
    proxy.all_serve();
    let first = start_proxy_with(three(), |_| {}).await;
    first.json("/v1/voices").await;
    first.set_fault(FIRST_KEY, "quota");
    assert_eq!(first.request_speech(3).await.status(), 200);
    first.close().await;
    proxy.close().await;
}

#[tokio::test]
async fn a_resource_that_its_owner_lost_is_searched_elsewhere_the_next_time() {
    let proxy = start_proxy(three()).await;
    assert_eq!(proxy.post(&speech("voice-of-1"), &text()).await.status(), 200);
    let removed = proxy.client.delete(format!("{}/v1/voices/voice-of-1", proxy.simulator.base_url()));
    assert_eq!(removed.header("xi-api-key", SECOND_KEY).send().await.unwrap().status(), 200);
    for hits in [[1, 3, 0], [2, 4, 1]] {
        assert_eq!(proxy.post(&speech("voice-of-1"), &text()).await.status(), 404);
        assert_eq!(proxy.request_counts(&KEYS), hits);
    }
    proxy.close().await;
}

#[tokio::test]
async fn an_owner_is_known_after_a_restart_and_to_added_keys() {
    let first = start_proxy_with(three(), |config| config.keys.truncate(2)).await;
    assert_eq!(first.post(&speech("voice-of-1"), &text()).await.status(), 200);
    assert_eq!(first.request_counts(&KEYS), [1, 1, 0]);
    let (_, folder) = first.close().await;

    // The account gets a name, another key, and a later position.
    let later = "sk_later_key_of_account_1";
    let plan = three().with_key(KeyPlan { workspace: Some("account-1".into()), ..KeyPlan::new(later, 0) });
    let second = start_proxy_in(folder, plan, |config: &mut Config| {
        let key = |key: &str, workspace: Option<&str>| {
            let mut config = KeyConfig::from(ApiKey::new(key).unwrap());
            config.workspace = workspace.map(str::to_owned);
            config
        };
        config.keys = vec![
            key(THIRD_KEY, None),
            key(FIRST_KEY, None),
            key(later, Some("studio")),
            key(SECOND_KEY, Some("studio")),
        ];
    })
    .await;
    assert_eq!(second.post(&speech("voice-of-1"), &text()).await.status(), 200);
    assert_eq!(second.request_counts(&[FIRST_KEY, SECOND_KEY, THIRD_KEY, later]), [0, 0, 0, 1]);
    // Its records contain the first run, and its provider's ledger does not.
    assert_eq!(second.app.drain(Duration::from_secs(10)).await, DrainOutcome::Completed);
}

#[tokio::test]
async fn identifiers_and_tokens_are_nowhere_in_the_database() {
    let proxy = start_proxy(three()).await;
    let spoken = proxy.request_speech(3).await;
    let item = header(&spoken, "history-item-id");
    let voice = proxy.clone_voice().await;
    assert_eq!(proxy.post(&speech("voice-of-2"), &text()).await.status(), 200);
    let (_, folder) = proxy.close().await;
    let file = std::fs::read(folder.path().join("keychoir.db")).unwrap();
    for identifier in [&item, &voice, "voice-of-2"] {
        assert!(!file.windows(identifier.len()).any(|part| part == identifier.as_bytes()), "{identifier}");
    }
    let connection = rusqlite::Connection::open(folder.path().join("keychoir.db")).unwrap();
    let all = "SELECT (SELECT count(*) FROM owners) + (SELECT sum(changes) FROM owners_plentiful)";
    let count: i64 = connection.query_row(all, [], |row| row.get(0)).unwrap();
    assert!(count >= 4, "{count}");
}
