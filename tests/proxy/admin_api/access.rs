//! Tests the access rules of the admin API and of the pages for operators: which token opens which path, that wrong
//! admin tokens block an address, that web pages of other origins are refused, and that pages can be public. Without an
//! admin token in the configuration, the API is disabled. No response and no change may contain a key or a token.

use super::*;
use crate::support::start_proxy_with;
use http::header::{AUTHORIZATION, ORIGIN};

#[tokio::test]
async fn only_the_admin_token_opens_the_api() {
    let (proxy, _) = start_admin_proxy().await;
    let get = |token: &str| admin_request(&proxy, Method::GET, "overview").bearer_auth(token).send();
    assert_eq!(get(ADMIN_TOKEN).await.unwrap().status(), 200);
    let missing = admin_request(&proxy, Method::GET, "overview").send().await.unwrap();
    assert_eq!(missing.headers()["www-authenticate"], "Bearer realm=\"keychoir-admin\"");
    assert_error(missing, 401, "admin_token_missing").await;
    assert_error(get("kca_wrong").await.unwrap(), 401, "admin_token_wrong").await;
    assert_error(get(CLIENT_TOKEN).await.unwrap(), 403, "client_token").await;
    // The admin token is not accepted in the header in which SDKs send their key.
    let by_key = admin_request(&proxy, Method::GET, "overview").header("xi-api-key", ADMIN_TOKEN);
    assert_error(by_key.send().await.unwrap(), 401, "admin_token_missing").await;
    let lower_case = format!("bearer  {ADMIN_TOKEN}");
    let lower_case = admin_request(&proxy, Method::GET, "overview").header(AUTHORIZATION, lower_case);
    assert_eq!(lower_case.send().await.unwrap().status(), 200);
    // A request without the token receives the same response for every path, so that the response does not reveal which
    // paths exist.
    let unknown = admin_request(&proxy, Method::GET, "unknown").send().await.unwrap();
    assert_error(unknown, 401, "admin_token_missing").await;
    proxy.close().await;
}

#[tokio::test]
async fn ten_wrong_admin_tokens_block_the_admin_api_for_an_address_but_not_its_clients() {
    let (proxy, _) = start_admin_proxy().await;
    let get = |token: &str| admin_request(&proxy, Method::GET, "keys").bearer_auth(token).send();
    for number in 0..10 {
        assert_error(get(&format!("kca_{number}")).await.unwrap(), 401, "admin_token_wrong").await;
    }
    let refused_response = get(ADMIN_TOKEN).await.unwrap();
    let wait: u64 = refused_response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&wait), "the wait must be at most a minute, and it is {wait} s");
    assert_error(refused_response, 429, "too_many_failures").await;
    assert_eq!(proxy.get("/api/keychoir/v1/me").await.status(), 200);
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn wrong_admin_tokens_are_counted_on_pages_and_next_to_a_client_token() {
    let (proxy, _) = start_admin_proxy().await;
    let pages = ["/api/keychoir/v1/keys", "/api/elevenlabs-status", "/metrics"];
    for (number, path) in pages.iter().cycle().take(10).enumerate() {
        let guess = proxy.client.get(format!("{}{path}", proxy.url)).bearer_auth(format!("kca_{number}"));
        let response = guess.header("xi-api-key", CLIENT_TOKEN).send().await.unwrap();
        // The client may read the pages.
        let expected = if path.contains("/v1/") { 401 } else { 200 };
        assert_eq!(response.status(), expected, "{path}: the response must have the status {expected}");
    }
    let keys = admin_request(&proxy, Method::GET, "keys").bearer_auth(ADMIN_TOKEN).send().await.unwrap();
    assert_error(keys, 429, "too_many_failures").await;
    let status = proxy.client.get(format!("{}{}", proxy.url, pages[1])).bearer_auth(ADMIN_TOKEN);
    assert_eq!(status.send().await.unwrap().status(), 429, "the admin token must not be compared");
    // The token of a client still opens the pages, even as a bearer token.
    let status = proxy.client.get(format!("{}{}", proxy.url, pages[1])).bearer_auth(CLIENT_TOKEN);
    assert_eq!(status.send().await.unwrap().status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn the_api_is_disabled_without_an_admin_token() {
    let proxy = start_proxy_with(Plan::with_keys([(FIRST_KEY, 10)]), |_| {}).await;
    for path in ["overview", "unknown"] {
        let response = send(&proxy, Method::GET, path, None).await;
        let message = assert_error(response, 404, "admin_api_disabled").await;
        assert!(
            message.contains("admin.token_file"),
            "the message must contain `admin.token_file`: {message}"
        );
    }
    assert_eq!(read_document(&proxy, "me").await["client"], "local");
    proxy.close().await;
}

#[tokio::test]
async fn web_pages_of_other_origins_are_refused() {
    let allowed_origin = "https://app.example";
    let (proxy, _) =
        start_admin_proxy_with(|config| config.access.origins = vec![allowed_origin.to_owned()]).await;
    let request_from = |origin: &str| {
        let request = admin_request(&proxy, Method::GET, "keys").bearer_auth(ADMIN_TOKEN);
        request.header(ORIGIN, origin).send()
    };
    // This origin may send requests to the provider.
    assert_error(request_from(allowed_origin).await.unwrap(), 403, "origin_not_allowed").await;
    assert_error(request_from("https://other.example").await.unwrap(), 403, "origin_not_allowed").await;
    assert_eq!(request_from(&proxy.url).await.unwrap().status(), 200);
    proxy.close().await;
}

#[tokio::test]
async fn the_status_and_the_metrics_open_with_the_admin_token_too() {
    let (proxy, _) = start_admin_proxy().await;
    for path in ["/api/elevenlabs-status", "/api/keychoir-keys", "/metrics"] {
        let get = || proxy.client.get(format!("{}{path}", proxy.url));
        assert_eq!(
            get().send().await.unwrap().status(),
            401,
            "{path}: a request without a token must be refused"
        );
        assert_eq!(
            get().bearer_auth(ADMIN_TOKEN).send().await.unwrap().status(),
            200,
            "{path}: the admin token must be accepted"
        );
        assert_eq!(proxy.get(path).await.status(), 200, "{path}: the token of a client must be accepted");
    }
    proxy.close().await;
}

#[tokio::test]
async fn public_pages_need_no_token() {
    let client = ClientConfig::new("app".to_owned(), TokenFingerprint::new(CLIENT_TOKEN), Default::default());
    let proxy = start_proxy_with_app(
        tempfile::tempdir().unwrap(),
        Plan::with_keys([(FIRST_KEY, 10)]),
        |config| config.clients = vec![client],
        |app| app.public_pages = keychoir::admin::PublicPages { status: false, metrics: true },
    )
    .await;
    for (path, status) in [("/metrics", 200), ("/api/elevenlabs-status", 401), ("/api/keychoir-keys", 401)] {
        let response = proxy.client.get(format!("{}{path}", proxy.url)).send().await.unwrap();
        assert_eq!(response.status(), status, "{path}: the response must have the status {status}");
    }
    proxy.close().await;
}

#[tokio::test]
async fn no_response_contains_a_key_or_a_token() {
    const NEW_KEY: &str = "sk_canary_of_a_new_key_000000000000000000000000000009";
    let (proxy, received) = start_admin_proxy().await;
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.request_speech(10).await;
    let id = key_id(FIRST_KEY);
    let mut responses = Vec::new();
    let mut add_response = async |response: Response| {
        responses.push(format!("{:?}", response.headers()));
        responses.push(response.text().await.unwrap());
    };
    for path in ["overview", "keys", &format!("keys/{id}"), "clients", "usage?by=key", "attempts", "config"] {
        add_response(send(&proxy, Method::GET, path, None).await).await;
    }
    for path in
        ["changes", "unknown", CLIENT_TOKEN, &format!("keys/{NEW_KEY}"), &format!("usage?{NEW_KEY}=1")]
    {
        add_response(send(&proxy, Method::GET, path, None).await).await;
    }
    for body in [
        serde_json::json!({"name": "new", "key": NEW_KEY}),
        serde_json::json!({"name": NEW_KEY}),
        serde_json::json!({NEW_KEY: 1}),
        serde_json::json!({"name": "new", "key": format!("{NEW_KEY} and more")}),
        serde_json::json!({"name": "new", "key": NEW_KEY, "weight": NEW_KEY}),
    ] {
        add_response(send(&proxy, Method::POST, "keys", Some(&body)).await).await;
    }
    let malformed_request = admin_request(&proxy, Method::POST, "keys").bearer_auth(ADMIN_TOKEN);
    let malformed_request =
        malformed_request.header("content-type", "application/json").body(format!("{{\"key\": {NEW_KEY}"));
    add_response(malformed_request.send().await.unwrap()).await;
    add_response(send(&proxy, Method::POST, &format!("keys/{id}/check"), None).await).await;
    add_response(admin_request(&proxy, Method::GET, "keys").bearer_auth(CLIENT_TOKEN).send().await.unwrap())
        .await;
    add_response(proxy.get("/api/keychoir/v1/me").await).await;
    responses.extend(received.take());
    for secret in [ADMIN_TOKEN, CLIENT_TOKEN, &FIRST_KEY[11..46], &SECOND_KEY[11..46], &NEW_KEY[11..46]] {
        for text in &responses {
            assert!(!text.contains(secret), "no response must contain {secret:?}: {text}");
        }
    }
    proxy.close().await;
}
