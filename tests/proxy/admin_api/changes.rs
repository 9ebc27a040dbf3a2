//! Tests the endpoints that change keys, clients and the configuration: each change is sent to the control task, or is
//! refused with a code and advice. The `If-Match` header must contain the current generation. Without a running control
//! task, every change is refused with 503.

use super::*;
use crate::support::start_proxy_with_app;
use http::header::IF_MATCH;
use serde_json::json;

#[tokio::test]
async fn every_change_is_sent_to_the_control_task() {
    let (proxy, received) = start_admin_proxy().await;
    let id = key_id(FIRST_KEY);
    for (method, path, body, status, expected) in [
        (
            "POST",
            "keys".to_owned(),
            json!({"name": "spare", "key": "sk_spare_000000000000000000000000001", "weight": 2}),
            201,
            "AddKey(NewKey { name: \"spare\"",
        ),
        (
            "POST",
            format!("keys/{id}/pause"),
            json!({"until": "2h", "reason": "billing"}),
            200,
            "PauseKey { key",
        ),
        ("POST", format!("keys/{id}/resume"), json!({}), 200, "ResumeKey { key"),
        (
            "POST",
            "clients".to_owned(),
            json!({"name": "phone", "quota": "5 requests", "expires_at": "30d"}),
            201,
            "AddClient { name: \"phone\"",
        ),
        (
            "PATCH",
            "clients/app".to_owned(),
            json!({"rate_limit": "60 per minute"}),
            200,
            "SetClient { name: \"app\"",
        ),
        (
            "PATCH",
            "clients/app".to_owned(),
            json!({"expires_at": "2100-01-01T00:00:00Z"}),
            200,
            "SetClient { name: \"app\", rules: ClientRules { quota: None, user_quota: None, rate_limit: None, \
             max_concurrent: None, paths: None, keys: None, workspaces: None, bring_your_own_key: None, \
             provider_tokens: None }, expiry: Some(At(UnixMs(4102444800000)))",
        ),
        (
            "PATCH",
            "clients/app".to_owned(),
            json!({"quota": "5 requests", "expires_at": null}),
            200,
            "SetClient { name: \"app\", rules: ClientRules { quota: Some(\"5 requests\"), user_quota: None, \
             rate_limit: None, max_concurrent: None, paths: None, keys: None, workspaces: None, \
             bring_your_own_key: None, provider_tokens: None }, expiry: Some(Never)",
        ),
        (
            "POST",
            "clients/app/rotate".to_owned(),
            json!({"grace": "1h"}),
            200,
            "RotateClient { name: \"app\", grace: 3600s",
        ),
        ("DELETE", "clients/app".to_owned(), json!({}), 200, "RevokeClient { name: \"app\""),
        ("POST", "reload".to_owned(), json!({}), 200, "Reload"),
    ] {
        let response = send(&proxy, method.parse().unwrap(), &path, Some(&body)).await;
        assert_eq!(response.status(), status, "{path}: the response must have the status {status}");
        let tag = response.headers()["etag"].to_str().unwrap().to_owned();
        let document: Value = response.json().await.unwrap();
        assert_eq!(
            tag,
            format!("\"{}\"", document["generation"]),
            "{path}: the tag must be the generation of the document"
        );
        let has_new_token = path == "clients" || path.ends_with("rotate");
        assert_eq!(
            document.get("token").is_some(),
            has_new_token,
            "{path}: only the response to a new token must contain a token"
        );
        let [change] = received.take().try_into().unwrap();
        assert!(
            change.starts_with(expected) && change.ends_with("AdminToken"),
            "the task must receive the change of the admin token: {change}"
        );
    }
    proxy.close().await;
}

#[tokio::test]
async fn a_stale_generation_is_refused() {
    let (proxy, received) = start_admin_proxy().await;
    let reload = |tag: &'static str| {
        admin_request(&proxy, Method::POST, "reload").bearer_auth(ADMIN_TOKEN).header(IF_MATCH, tag).send()
    };
    let stale = reload("\"6\"").await.unwrap();
    assert_eq!(stale.headers()["etag"], "\"7\"");
    assert_error(stale, 412, "stale_generation").await;
    assert_eq!(reload("\"7\"").await.unwrap().headers()["etag"], "\"8\"");
    assert_error(reload("\"7\"").await.unwrap(), 412, "stale_generation").await;
    assert_eq!(reload("\"7\", \"8\"").await.unwrap().status(), 200);
    assert_eq!(reload("*").await.unwrap().status(), 200);
    assert_error(reload("seven").await.unwrap(), 400, "malformed_if_match").await;
    assert_eq!(received.take().len(), 5, "each request with a valid header must be sent to the task");
    proxy.close().await;
}

#[tokio::test]
async fn wrong_bodies_are_refused_with_advice_and_change_nothing() {
    let (proxy, received) = start_admin_proxy().await;
    let id = key_id(FIRST_KEY);
    let pause = format!("keys/{id}/pause");
    for (method, path, body, code, hint) in [
        ("POST", pause.as_str(), json!({"resaon": "x"}), "unknown_member", "`reason`"),
        ("POST", pause.as_str(), json!({"until": "yesterday"}), "invalid_member", "\"2h\""),
        ("POST", pause.as_str(), json!({"until": "2020-01-01T00:00:00Z"}), "invalid_member", "future"),
        ("POST", pause.as_str(), json!({"reason": "x".repeat(201)}), "invalid_member", "200"),
        ("POST", pause.as_str(), json!({"reason": "a\nb"}), "invalid_member", "line break"),
        ("POST", pause.as_str(), json!([1]), "malformed_json", "object"),
        ("POST", "keys", json!({"name": "spare"}), "missing_member", "`key`"),
        ("POST", "keys", json!({"name": "spare", "key": "a b"}), "malformed_key", "space"),
        ("POST", "keys", json!({"name": 5, "key": "sk_1"}), "invalid_member", "a string"),
        ("POST", "clients", json!({"name": "x", "paths": "/v1"}), "invalid_member", "a list of strings"),
        ("POST", "clients", json!({"name": "x", "max_concurrent": -1}), "invalid_member", "whole number"),
        ("PATCH", "clients/app", json!({}), "missing_member", "quota"),
        ("PATCH", "clients/app", json!({"expires_at": "2020-01-01T00:00:00Z"}), "invalid_member", "future"),
        ("POST", "clients/app/rotate", json!({"grace": 3600}), "invalid_member", "a string"),
    ] {
        let response = send(&proxy, method.parse().unwrap(), path, Some(&body)).await;
        let message = assert_error(response, 400, code).await;
        assert!(message.contains(hint), "{path} {body}: the message must contain {hint:?}: {message}");
    }
    let post = || admin_request(&proxy, Method::POST, "reload").bearer_auth(ADMIN_TOKEN);
    let text = post().header("content-type", "text/plain").body("{}").send().await.unwrap();
    assert_error(text, 415, "unsupported_media_type").await;
    let large = post().header("content-type", "application/json").body(" ".repeat(65_537));
    assert_error(large.send().await.unwrap(), 413, "body_too_large").await;
    assert_eq!(received.take(), [""; 0]);
    proxy.close().await;
}

#[tokio::test]
async fn refused_changes_have_their_codes() {
    let (proxy, _) = start_admin_proxy().await;
    let id = key_id(FIRST_KEY);
    for (method, path, body, status, code) in [
        ("DELETE", format!("keys/{id}"), None, 409, "not_managed"),
        ("DELETE", "keys/000000000000".to_owned(), None, 404, "key_not_found"),
        ("POST", "clients".to_owned(), Some(json!({"name": "app"})), 409, "already_exists"),
        ("DELETE", "clients/unknown".to_owned(), None, 404, "not_found"),
        ("POST", "overview".to_owned(), None, 405, "method_not_allowed"),
        ("POST", "unknown".to_owned(), None, 404, "unknown_path"),
        ("POST", "keys/a/b/c".to_owned(), None, 404, "unknown_path"),
    ] {
        let response = send(&proxy, method.parse().unwrap(), &path, body.as_ref()).await;
        assert_error(response, status, code).await;
    }
    proxy.close().await;
}

#[tokio::test]
async fn no_change_is_possible_without_the_control_task() {
    let proxy = start_proxy_with_app(
        tempfile::tempdir().unwrap(),
        Plan::with_keys([(FIRST_KEY, 10)]),
        |_| {},
        |app| app.admin_token = Some(AdminTokenFingerprint::new(ADMIN_TOKEN)),
    )
    .await;
    assert_error(send(&proxy, Method::POST, "reload", None).await, 503, "control_unavailable").await;
    let overview = read_document(&proxy, "overview").await;
    assert_eq!((&overview["can_change"], &overview["generation"]), (&json!(false), &json!(0)));
    proxy.close().await;
}

#[tokio::test]
async fn a_control_task_that_has_ended_is_reported() {
    let (control, requests, _) = ControlSender::channel();
    drop(requests);
    let proxy = start_proxy_with_app(
        tempfile::tempdir().unwrap(),
        Plan::with_keys([(FIRST_KEY, 10)]),
        |_| {},
        |app| {
            app.admin_token = Some(AdminTokenFingerprint::new(ADMIN_TOKEN));
            app.control = Some(control);
        },
    )
    .await;
    assert_error(send(&proxy, Method::POST, "reload", None).await, 503, "control_unavailable").await;
    proxy.close().await;
}
