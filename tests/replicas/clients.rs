//! Tests changes of operators with three replicas. A client that is added at one replica exists at all replicas, and
//! all replicas together serve exactly its quota and the quotas of its users. If an operator pauses a key at one
//! replica, no replica uses the key. The changes are encrypted in Redis.

use std::time::Duration;

use keychoir::clock;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{ADMIN, ADMIN_TOKEN, FIRST_KEY, SECOND_KEY, plan, start_with, wait_until_async};
use crate::support::replicas::TestReplicas;
use crate::support::{SPEECH_PATH, join_all};

/// Calls the admin API of a replica, and returns the document of the response, which must be successful.
async fn call_admin_api(
    replicas: &TestReplicas,
    replica: usize,
    method: Method,
    path: &str,
    body: Value,
) -> Value {
    let url = format!("{}/api/keychoir/v1/{path}", replicas.url(replica));
    let request = replicas.client.request(method, url).bearer_auth(ADMIN_TOKEN).json(&body);
    let response = request.send().await.unwrap();
    assert!(
        response.status().is_success(),
        "{path}: the call must succeed, not end with {}",
        response.status()
    );
    response.json().await.unwrap()
}

/// Adds a client at the first replica, and waits until it exists at all replicas. Returns its token.
async fn add_client(replicas: &TestReplicas, client: Value) -> String {
    let name = client["name"].clone();
    let added_client = call_admin_api(replicas, 0, Method::POST, "clients", client).await;
    let token = added_client["token"].as_str().unwrap().to_owned();
    for replica in 0..3 {
        wait_until_async(async || {
            let list = call_admin_api(replicas, replica, Method::GET, "clients", Value::Null).await;
            list["clients"].as_array().unwrap().iter().any(|client| client["name"] == name)
        })
        .await;
    }
    token
}

/// Sends a request for speech of 10 characters to the next replica, and returns the status of the response.
async fn speech_status(replicas: &TestReplicas, token: &str, user: Option<&str>) -> StatusCode {
    let body = json!({"text": "a".repeat(10), "model_id": "eleven_multilingual_v2"});
    let request = replicas.request(Method::POST, SPEECH_PATH).header("xi-api-key", token).json(&body);
    let request = match user {
        Some(user) => request.header("x-keychoir-user", user),
        None => request,
    };
    request.send().await.unwrap().status()
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_of_clients_and_users_are_exact_over_three_replicas() {
    let (_redis, replicas) =
        start_with(3, plan(&[(FIRST_KEY, 1_000_000), (SECOND_KEY, 1_000_000)], None), &ADMIN).await;
    let token = add_client(&replicas, json!({"name": "three", "quota": "3 requests"})).await;
    let mut served_count = 0;
    for _ in 0..12 {
        served_count += u32::from(speech_status(&replicas, &token, None).await == StatusCode::OK);
    }
    assert_eq!(served_count, 3, "all replicas together must serve the quota of 3 requests");

    let token = add_client(&replicas, json!({"name": "app", "user_quota": "3 requests"})).await;
    for user in ["anna", "ben"] {
        let statuses = join_all((0..12).map(|_| speech_status(&replicas, &token, Some(user)))).await;
        let served_count = statuses.iter().filter(|status| **status == StatusCode::OK).count();
        assert_eq!(
            served_count, 3,
            "all replicas together must serve 3 of the concurrent requests of {user}"
        );
    }

    let token = add_client(&replicas, json!({"name": "thousand", "quota": "1000 requests"})).await;
    let send_in_turn = async || {
        let mut served_count = 0;
        for _ in 0..50 {
            served_count += u32::from(speech_status(&replicas, &token, None).await == StatusCode::OK);
        }
        served_count
    };
    let served_count: u32 = join_all((0..24).map(|_| send_in_turn())).await.into_iter().sum();
    assert_eq!(served_count, 1_000, "all replicas together must serve the quota of 1,000 requests");

    let token = add_client(&replicas, json!({"name": "credits", "quota": "95 credits"})).await;
    let mut served_count = 0;
    for _ in 0..24 {
        served_count += u32::from(speech_status(&replicas, &token, None).await == StatusCode::OK);
    }
    assert_eq!(served_count, 9, "a quota of 95 credits must permit 9 requests of 10 credits");
    replicas.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_an_operator_are_in_force_at_all_replicas() {
    let keys = [(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)];
    let (redis, replicas) = start_with(3, plan(&keys, None), &ADMIN).await;
    let list = call_admin_api(&replicas, 1, Method::GET, "keys", Value::Null).await;
    let id = list["keys"][0]["id"].as_str().unwrap().to_owned();
    let changed_at = clock::instant();
    call_admin_api(&replicas, 1, Method::POST, &format!("keys/{id}/pause"), json!({"reason": "a test"}))
        .await;
    for replica in 0..3 {
        wait_until_async(async || {
            let list = call_admin_api(&replicas, replica, Method::GET, "keys", Value::Null).await;
            list["keys"][0]["paused"] == true
        })
        .await;
    }
    let elapsed = clock::elapsed_since(changed_at);
    assert!(
        elapsed < Duration::from_secs(10),
        "the change must be published within 10 seconds, and it took {elapsed:?}"
    );
    for _ in 0..6 {
        assert_eq!(replicas.request_speech(10).await.status(), 200);
    }
    assert_eq!(replicas.simulator.ledger().keys[0].charged, 0, "a paused key must serve no request");
    call_admin_api(&replicas, 2, Method::POST, &format!("keys/{id}/resume"), json!({})).await;
    for replica in 0..3 {
        wait_until_async(async || {
            let list = call_admin_api(&replicas, replica, Method::GET, "keys", Value::Null).await;
            list["keys"][0]["paused"] == false
        })
        .await;
    }
    let overlay: String = redis.command(&["HGET", "{keychoir:default}:1:overlay", "overlay"]);
    assert!(!overlay.contains("a test"), "the overlay in Redis must be encrypted");
    replicas.close().await;
}
