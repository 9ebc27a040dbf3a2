//! Tests the GET endpoints of the admin API: their headers and parameters, and the documents about usage, attempts,
//! users, changes, clients and settings. A client can read its own usage at `me`. The records are also readable if they
//! are only in memory.

use super::*;
use http::header::{IF_NONE_MATCH, RANGE};
use keychoir::policy::client::Rules;
use keychoir::policy::client_quota::{ClientQuota, Period, QuotaUnit};
use serde_json::json;

/// Waits until `count` attempts are recorded. The records are written shortly after the responses. Returns the page
/// with the attempts.
async fn wait_for_attempts(proxy: &TestProxy, count: usize) -> Value {
    let reading = async {
        loop {
            let page = read_document(proxy, "attempts").await;
            if page["attempts"].as_array().unwrap().len() >= count {
                return page;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), reading)
        .await
        .expect("the records must be written within the timeout")
}

#[tokio::test]
async fn every_response_has_the_generation_and_is_not_stored() {
    let (proxy, _) = start_admin_proxy().await;
    for path in ["overview", "keys", "clients", "usage", "attempts", "config", "changes"] {
        let response = send(&proxy, Method::GET, path, None).await;
        assert_eq!(response.headers()["etag"], "\"7\"", "{path}: the tag must be the current generation");
        assert_eq!(response.headers()["cache-control"], "no-store");
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        let head = send(&proxy, Method::HEAD, path, None).await;
        assert_eq!((head.status().as_u16(), head.text().await.unwrap().as_str()), (200, ""));
    }
    let read_with_tag = |path: &'static str, tag: &'static str| {
        admin_request(&proxy, Method::GET, path).bearer_auth(ADMIN_TOKEN).header(IF_NONE_MATCH, tag).send()
    };
    let unchanged = read_with_tag("config", "\"6\", W/\"7\"").await.unwrap();
    assert_eq!((unchanged.status().as_u16(), unchanged.headers()["etag"].to_str().unwrap()), (304, "\"7\""));
    assert_eq!(read_with_tag("config", "\"6\"").await.unwrap().status(), 200);
    // All other documents can change without a new generation. For example, they contain the states of keys, the usage,
    // the attempts, and the records of reloads that changed nothing.
    for path in ["overview", "keys", "clients", "clients/app", "usage", "attempts", "changes"] {
        let response = read_with_tag(path, "\"7\"").await.unwrap();
        assert_eq!((response.status().as_u16(), path), (200, path));
        assert_eq!(response.headers()["etag"], "\"7\"", "{path}: the tag must be usable in If-Match");
    }
    proxy.close().await;
}

#[tokio::test]
async fn attempts_are_listed_and_summed() {
    let (proxy, _) = start_admin_proxy().await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.request_speech(10).await;
    let page = wait_for_attempts(&proxy, 2).await;
    let [second, first] = page["attempts"].as_array().unwrap().as_slice() else {
        panic!("the page must contain two attempts: {page}")
    };
    assert_eq!(
        (&first["status"], &first["number"], &second["credits"]),
        (&json!(401), &json!(1), &json!(10))
    );
    assert_eq!((&second["client"], &second["short_key"]), (&json!("app"), &json!("sk_key_numb...00002")));
    assert_eq!(second["key_id"], key_id(SECOND_KEY));
    let failed_attempts = read_document(&proxy, "attempts?failed=true").await;
    assert_eq!(failed_attempts["attempts"].as_array().unwrap(), std::slice::from_ref(first));
    let id = first["request_id"].as_str().unwrap();
    let attempts_of_request = read_document(&proxy, &format!("attempts?request_id={id}")).await;
    assert_eq!(attempts_of_request["attempts"].as_array().unwrap().len(), 2);
    let latest = read_document(&proxy, "attempts?limit=1").await;
    assert_eq!(&latest["attempts"][0], second);
    let next_position = latest["next"].as_str().unwrap();
    assert_eq!(
        &read_document(&proxy, &format!("attempts?before={next_position}")).await["attempts"][0],
        first
    );

    let by_client = read_document(&proxy, "usage?by=client").await;
    let sums = &by_client["usage"][0];
    assert_eq!((&sums["client"], &sums["attempts"], &sums["failed"]), (&json!("app"), &json!(2), &json!(1)));
    let by_key = read_document(&proxy, "usage?by=key&client=app&since=1h").await;
    assert_eq!(by_key["usage"][0]["key_id"], key_id(SECOND_KEY));
    assert_eq!(read_document(&proxy, "usage?client=other").await["usage"], json!([]));
    let by_region = read_document(&proxy, "usage?by=region").await;
    assert_eq!(
        (&by_region["usage"][0]["region"], &by_region["usage"][0]["attempts"]),
        (&json!("127.0.0.1"), &json!(2))
    );
    assert_eq!((&second["region"], &second["user"]), (&json!("127.0.0.1"), &json!(null)));
    proxy.close().await;
}

#[tokio::test]
async fn users_are_listed_by_their_fingerprints() {
    let (proxy, _) = start_admin_proxy_with(|config| {
        config.clients[0].rules.user_quota = Some("3 requests per day".parse().unwrap());
    })
    .await;
    let body = json!({"text": "hello"});
    let speech = proxy.request(Method::POST, crate::support::SPEECH_PATH, CLIENT_TOKEN).json(&body);
    assert_eq!(speech.header("x-keychoir-user", "alice").send().await.unwrap().status(), 200);
    let fingerprint = keychoir::secret::UserFingerprint::new("app", b"alice").to_string();
    let page = wait_for_attempts(&proxy, 1).await;
    assert_eq!(page["attempts"][0]["user"], fingerprint);
    let by_user = read_document(&proxy, "usage?by=user").await;
    assert_eq!(
        (&by_user["usage"][0]["user"], &by_user["usage"][0]["credits"]),
        (&json!(fingerprint), &json!(5))
    );
    assert_eq!(read_document(&proxy, "clients/app").await["user_quota"], "3 requests per day");
    proxy.close().await;
}

#[tokio::test]
async fn recorded_changes_are_listed() {
    let (proxy, _) = start_admin_proxy().await;
    let changed_at = keychoir::policy::units::UnixMs(1_796_000_000_000);
    let record = keychoir::store::StoredChange {
        id: keychoir::store::StoredChange::new_id(changed_at),
        at: changed_at,
        actor: "admin_token".to_owned(),
        address: Some("127.0.0.1".to_owned()),
        action: "pause_key".to_owned(),
        target: Some("sk_key_numb...00001".to_owned()),
        detail: r#"{"reason":"billing"}"#.to_owned(),
        generation: 7,
    };
    proxy.app.history().record_change(record.clone()).await.unwrap();
    let changes = read_document(&proxy, "changes").await;
    let expected = json!({
        "id": record.id, "at": "2026-11-30T00:53:20.000Z", "actor": "admin_token", "address": "127.0.0.1",
        "action": "pause_key", "target": "sk_key_numb...00001", "detail": {"reason": "billing"}, "generation": 7,
    });
    assert_eq!(changes, json!({"changes": [expected], "next": null}));
    proxy.close().await;
}

#[tokio::test]
async fn wrong_parameters_are_refused_with_advice() {
    let (proxy, _) = start_admin_proxy().await;
    for (path, code, hint) in [
        ("attempts?limt=5", "unknown_parameter", "`limit`"),
        ("attempts?limit=0", "invalid_parameter", "1 to 1000"),
        ("attempts?limit=1001", "invalid_parameter", "1 to 1000"),
        ("attempts?limit=1&limit=2", "repeated_parameter", "`limit`"),
        ("attempts?failed=maybe", "invalid_parameter", "true or false"),
        ("usage?by=users", "invalid_parameter", "day, hour, key, client, user, region, model, route"),
        ("usage?since=soon", "invalid_parameter", "7d"),
        ("overview?x=1", "unknown_parameter", "None is allowed"),
    ] {
        let message = assert_error(send(&proxy, Method::GET, path, None).await, 400, code).await;
        assert!(message.contains(hint), "{path}: the message must contain {hint:?}: {message}");
    }
    proxy.close().await;
}

#[tokio::test]
async fn clients_and_settings_are_listed() {
    let (proxy, _) = start_admin_proxy_with(|config| {
        config.clients[0].rules.max_concurrent = Some(3);
        config.pool.max_queued = 17;
    })
    .await;
    let clients = read_document(&proxy, "clients").await;
    assert_eq!(
        (&clients["clients"][0]["name"], &clients["clients"][0]["max_concurrent"]),
        (&json!("app"), &json!(3))
    );
    assert_eq!(read_document(&proxy, "clients/app").await, clients["clients"][0]);
    let app = &clients["clients"][0];
    assert_eq!((&app["source"], &app["expires_at"]), (&json!("file"), &json!(null)));
    assert_eq!(app["previous_token_expires_at"], json!(null));
    assert_error(send(&proxy, Method::GET, "clients/unknown", None).await, 404, "client_not_found").await;
    let settings = read_document(&proxy, "config").await;
    let settings = settings["settings"].as_array().unwrap();
    let setting = settings.iter().find(|setting| setting["name"] == "pool.max_queued").unwrap();
    assert_eq!(*setting, json!({"name": "pool.max_queued", "value": "17", "source": "default"}));
    proxy.close().await;
}

#[tokio::test]
async fn a_client_is_listed_with_the_expiries_of_its_tokens() {
    let tomorrow = keychoir::clock::now().plus(std::time::Duration::from_secs(86_400));
    let yesterday = keychoir::policy::units::UnixMs(tomorrow.0 - 2 * 86_400_000);
    for (previous_expiry, listed_expiry) in [(tomorrow, json!(tomorrow.rfc3339())), (yesterday, json!(null))]
    {
        let (proxy, _) = start_admin_proxy_with(|config| {
            config.clients[0].origin = keychoir::policy::client::ClientOrigin::Changed;
            config.clients[0].expires_at = Some(tomorrow);
            config.clients[0].previous_token =
                Some((TokenFingerprint::new("earlier-token"), previous_expiry));
        })
        .await;
        let client = read_document(&proxy, "clients/app").await;
        assert_eq!(
            (&client["source"], &client["expires_at"]),
            (&json!("changed"), &json!(tomorrow.rfc3339()))
        );
        assert_eq!(client["previous_token_expires_at"], listed_expiry, "only a valid token must be listed");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_client_reads_its_own_usage_when_its_quota_is_spent() {
    let quota = ClientQuota { amount: 1, unit: QuotaUnit::Requests, period: Period::Total };
    let rules =
        Rules { quota: Some(quota), paths: vec!["/v1/text-to-speech".to_owned()], ..Rules::default() };
    let (proxy, _) = start_admin_proxy_with(|config| config.clients[0].rules = rules).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    assert_eq!(proxy.request_speech(10).await.status(), 402);
    let me: Value = proxy.get("/api/keychoir/v1/me").await.json().await.unwrap();
    let quota = json!({
        "limit": "1 request", "amount": 1, "unit": "requests", "period": "total", "used": 1, "remaining": 0,
        "resets_at": null,
    });
    assert_eq!((&me["client"], &me["quota"]), (&json!("app"), &quota));
    assert_eq!(me["credits"]["total"], 10);
    let unknown = admin_request(&proxy, Method::GET, "me").header("xi-api-key", "x").send().await.unwrap();
    assert_error(unknown, 401, "client_token_wrong").await;
    let admin = admin_request(&proxy, Method::GET, "me").bearer_auth(ADMIN_TOKEN).send().await.unwrap();
    assert_error(admin, 401, "client_token_wrong").await;
    proxy.close().await;
}

#[tokio::test]
async fn records_in_memory_are_read_too() {
    let (proxy, _) = start_admin_proxy_with(|config| config.storage.ephemeral = true).await;
    proxy.request_speech(10).await;
    let page = wait_for_attempts(&proxy, 1).await;
    assert_eq!(page["attempts"][0]["credits"], 10);
    assert_eq!(read_document(&proxy, "changes").await["changes"], json!([]));
    proxy.close_unchecked().await;
}

#[tokio::test]
async fn a_range_request_receives_the_whole_document() {
    let (proxy, _) = start_admin_proxy().await;
    let partial_request =
        admin_request(&proxy, Method::GET, "keys").bearer_auth(ADMIN_TOKEN).header(RANGE, "bytes=0-1");
    assert_eq!(partial_request.send().await.unwrap().status(), 200);
    let overview = read_document(&proxy, "overview").await;
    assert_eq!((&overview["keys"]["active"], &overview["credits"]["remaining"]), (&json!(2), &json!(2_000)));
    proxy.close().await;
}
