//! Tests the redaction of responses: clients receive neither a key that the provider echoes nor the personal data of
//! the owner of a key, for every status, encoding and textual media type. A response that cannot be redacted is
//! replaced by an error or ends with one. The setting `access.redact` can disable the redaction.

use std::io::Write;

use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, start_fixed_upstream, start_proxy, start_proxy_with};
use flate2::Compression;
use flate2::write::GzEncoder;
use keychoir::config::Config;
use keychoir::simulator::{Plan, WorkspacePlan};
use serde_json::{Value, json};

const SHORT_FORM: &str = "sk_key_numb...00001";

/// Starts a proxy whose upstream sends `upstream_response` to every request and leaves the connection open.
async fn start_proxy_with_response(upstream_response: &[u8], change: impl FnOnce(&mut Config)) -> TestProxy {
    let url = start_fixed_upstream(upstream_response).await;
    start_proxy_with(Plan::with_keys([(FIRST_KEY, 100), (SECOND_KEY, 100)]), |config| {
        config.upstream.base_url = url;
        config.quota_polling.enabled = false;
        change(config);
    })
    .await
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// Returns a response with the status line and headers in `head`, and the length of `body`.
fn http_response(head: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

#[tokio::test]
async fn an_echoed_key_is_replaced_by_its_short_form() {
    let text = format!("{{\"used\":\"{FIRST_KEY}\",\"other\":\"{SECOND_KEY}\"}}");
    let redacted_text = text.replace(FIRST_KEY, SHORT_FORM).replace(SECOND_KEY, "sk_key_numb...00002");
    for (head, body) in [
        (
            format!("200 OK\r\nx-key: Bearer {FIRST_KEY}\r\ncontent-type: application/json"),
            text.clone().into_bytes(),
        ),
        (format!("200 {FIRST_KEY}\r\ncontent-type: text/plain"), text.clone().into_bytes()),
        ("422 Unprocessable".to_owned(), text.clone().into_bytes()),
        ("400 Bad Request\r\ncontent-encoding: gzip".to_owned(), gzip(&text)),
        ("404 Not Found\r\ncontent-encoding: gzip".to_owned(), gzip(&text)),
    ] {
        let proxy = start_proxy_with_response(&http_response(&head, &body), |_| {}).await;
        let response = proxy.get("/v1/voices").await;
        if head.contains("x-key") {
            assert_eq!(response.headers()["x-key"], format!("Bearer {SHORT_FORM}"));
        }
        assert!(!format!("{response:?}").contains(FIRST_KEY), "no header must contain the key: {response:?}");
        let length = response.content_length().unwrap();
        let received_text = response.text().await.unwrap();
        assert_eq!(
            (received_text.trim_end(), received_text.len() as u64),
            (&*redacted_text, length),
            "{head}: the key must be redacted without a change of the length"
        );
        proxy.close().await;
    }
}

#[tokio::test]
async fn keys_in_a_stream_are_redacted_without_a_delay() {
    let (key_start, key_end) = FIRST_KEY.split_at(20);
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let chunks =
        [chunk("data: one\n\n"), chunk(&format!("data: {key_start}")), chunk(&format!("{key_end}\n\n"))];
    // The upstream sends the first chunks, and then neither more data nor the end. The proxy must forward all data
    // except the rest of a possible key after its first characters.
    for (count, expected) in [
        (1, "data: one\n\n".to_owned()),
        (2, "data: one\n\ndata: sk_k".to_owned()),
        (3, format!("data: one\n\ndata: {SHORT_FORM}\n\n")),
    ] {
        let proxy =
            start_proxy_with_response(format!("{head}{}", chunks[..count].concat()).as_bytes(), |_| {}).await;
        let mut response = proxy.get("/v1/voices").await;
        let mut received_text = String::new();
        while received_text.len() < expected.len() {
            received_text.push_str(std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
        }
        assert_eq!(received_text, expected);
    }
}

#[tokio::test]
async fn every_media_type_except_audio_images_and_archives_is_redacted() {
    let text = format!("key {FIRST_KEY} .");
    for media_type in [
        "message/http",
        "multipart/mixed; boundary=a",
        "application/yaml",
        "application/octet-stream",
        "application/x-never-seen",
        "image/svg+xml",
        "text/html",
    ] {
        for status in ["200 OK", "404 Not Found", "500 Oops"] {
            let upstream_response =
                http_response(&format!("{status}\r\ncontent-type: {media_type}"), text.as_bytes());
            let proxy =
                start_proxy_with_response(&upstream_response, |config| config.retry.max_attempts = 1).await;
            let redacted_text = proxy.get("/v1/voices").await.text().await.unwrap();
            assert_eq!(
                redacted_text.trim_end(),
                text.replace(FIRST_KEY, SHORT_FORM),
                "{status} {media_type}: the key must be redacted"
            );
            proxy.close().await;
        }
    }
    for media_type in ["audio/mpeg", "video/mp4", "image/png", "application/zip"] {
        let proxy = start_proxy_with_response(
            &http_response(&format!("200 OK\r\ncontent-type: {media_type}"), text.as_bytes()),
            |_| {},
        )
        .await;
        assert_eq!(
            proxy.get("/v1/voices").await.text().await.unwrap(),
            text,
            "{media_type}: the body must be relayed unchanged"
        );
        proxy.close().await;
    }
}

#[tokio::test]
async fn keys_are_redacted_in_escapes_and_in_utf_16() {
    let escaped: String = FIRST_KEY.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
    let upstream_response = http_response(
        "200 OK\r\ncontent-type: application/json",
        format!("{{\"k\":\"{escaped}\"}}").as_bytes(),
    );
    let proxy = start_proxy_with_response(&upstream_response, |_| {}).await;
    let redacted: Value = proxy.get("/v1/voices").await.json().await.unwrap();
    assert_eq!(redacted, json!({"k": SHORT_FORM}));
    proxy.close().await;
    for to_bytes in [u16::to_le_bytes as fn(u16) -> [u8; 2], u16::to_be_bytes] {
        let encode_utf_16 = |text: &str| text.encode_utf16().flat_map(to_bytes).collect::<Vec<u8>>();
        let upstream_response = http_response(
            "200 OK\r\ncontent-type: text/plain; charset=utf-16",
            &encode_utf_16(&format!("a{FIRST_KEY}")),
        );
        let proxy = start_proxy_with_response(&upstream_response, |_| {}).await;
        let redacted_bytes = proxy.get("/v1/voices").await.bytes().await.unwrap();
        assert!(
            redacted_bytes.starts_with(&encode_utf_16(&format!("a{SHORT_FORM}"))),
            "the key must be redacted in UTF-16: {redacted_bytes:?}"
        );
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_compressed_response_is_redacted_or_relayed_unchanged() {
    let compressed_body = gzip("{\"voices\":[]}");
    let head = "200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip";
    let proxy = start_proxy_with_response(&http_response(head, &compressed_body), |_| {}).await;
    let response = proxy.get("/v1/voices").await;
    assert_eq!(response.headers()["content-encoding"], "gzip");
    assert_eq!(response.bytes().await.unwrap(), compressed_body);
    proxy.close().await;

    // A short document is decompressed, and its key is replaced.
    let proxy =
        start_proxy_with_response(&http_response(head, &gzip(&format!("{{\"k\":\"{FIRST_KEY}\"}}"))), |_| {})
            .await;
    let response = proxy.get("/v1/voices").await;
    assert!(!response.headers().contains_key("content-encoding"));
    assert_eq!(response.json::<Value>().await.unwrap(), json!({"k": SHORT_FORM}));
    proxy.close().await;

    // A document of unknown length is streamed, and the response ends with an error before the key.
    let compressed_body = gzip(&format!("{{\"k\":\"{FIRST_KEY}\"}}"));
    let mut upstream_response =
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\n\
        transfer-encoding: chunked\r\n\r\n"
            .to_vec();
    upstream_response.extend_from_slice(format!("{:x}\r\n", compressed_body.len()).as_bytes());
    upstream_response.extend_from_slice(&compressed_body);
    upstream_response.extend_from_slice(b"\r\n0\r\n\r\n");
    let proxy = start_proxy_with_response(&upstream_response, |_| {}).await;
    let response = proxy.client.get(format!("{}/v1/voices", proxy.url)).send().await;
    // The error may occur before the head is sent.
    let is_error = match response {
        Ok(response) => response.bytes().await.is_err(),
        Err(_) => true,
    };
    assert!(is_error, "the response must end with an error");
    proxy.close().await;
}

fn plan() -> Plan {
    let mut plan = Plan::with_keys([(FIRST_KEY, 0), (SECOND_KEY, 1_000)]);
    plan.keys[0].workspace = Some("one".to_owned());
    plan.with_workspace(WorkspacePlan { used: 5_420, ..WorkspacePlan::new("one", 100_000) })
}

#[tokio::test]
async fn the_owner_of_a_key_is_redacted_and_credits_are_relayed() {
    let proxy = start_proxy(plan()).await;
    let user: Value = proxy.get("/v1/user").await.json().await.unwrap();
    for name in
        ["first_name", "xi_api_key_preview", "referral_link_code", "partnerstack_partner_default_link"]
    {
        assert_eq!(user[name], Value::Null, "{name} must be redacted");
    }
    assert_eq!((&user["user_id"], &user["is_onboarding_completed"]), (&json!("redacted"), &json!(true)));
    let used_and_limit = |subscription: &Value| {
        (subscription["character_count"].as_u64().unwrap(), subscription["character_limit"].as_u64().unwrap())
    };
    assert_eq!(used_and_limit(&user["subscription"]), (5_420, 100_000));

    let subscription_response: Value = proxy.get("/user/subscription").await.json().await.unwrap();
    assert_eq!(used_and_limit(&subscription_response), (5_420, 100_000));
    assert_eq!(
        (&subscription_response["next_invoice"], &subscription_response["open_invoices"]),
        (&Value::Null, &json!([]))
    );
    assert_eq!(subscription_response["has_open_invoices"], json!(false));
    proxy.close().await;
}

#[tokio::test]
async fn the_owner_is_redacted_for_every_status_and_encoding() {
    let owner = json!({"first_name": "John", "email": "john@example.com", "tier": "creator"});
    let nested = json!({"data": {"user": owner}, "detail": {"status": "gone", "user": "John"}});
    for status in [200, 201, 300, 400, 401, 403, 404, 422, 429, 500, 503] {
        for document in [&owner, &nested] {
            let text = document.to_string();
            for upstream_response in [
                http_response(&format!("{status} X"), text.as_bytes()),
                http_response(&format!("{status} X\r\ncontent-encoding: gzip"), &gzip(&text)),
            ] {
                let proxy =
                    start_proxy_with_response(&upstream_response, |config| config.retry.max_attempts = 1)
                        .await;
                let response = proxy.get("/v1/user").await;
                assert_eq!(response.status(), status);
                let redacted: Value = response.json().await.unwrap();
                let expected = if document.get("tier").is_some() {
                    json!({"tier": "creator", "first_name": null})
                } else {
                    json!({"detail": {"status": "gone"}})
                };
                assert_eq!(redacted, expected, "{status}: only the data of the account must be relayed");
                proxy.close().await;
            }
        }
    }
}

#[tokio::test]
async fn a_response_whose_owner_cannot_be_redacted_is_not_relayed() {
    let document = json!({"first_name": "John"}).to_string();
    for (upstream_response, status) in [
        (http_response("200 OK\r\ncontent-encoding: br", document.as_bytes()), 502),
        (http_response("200 OK", b"<html>John</html>"), 502),
        (http_response("300 Multiple Choices", b"[{\"first_name\":\"John\"}]"), 502),
        (http_response("200 OK", &vec![b' '; 1024 * 1024 + 1]), 502),
        (http_response("500 Oops", &[&[b' '; 1024 * 1024], &b"John"[..]].concat()), 502),
        (http_response("200 OK\r\ncontent-type: audio/mpeg", document.as_bytes()), 200),
        (http_response("401 Unauthorized", b"John is not here"), 401),
        (http_response("404 Not Found\r\ncontent-encoding: br", b"John is not here"), 404),
        (http_response("500 Oops\r\ncontent-type: text/html", b"<html>John</html>"), 500),
        (http_response("404 Not Found", b""), 404),
    ] {
        let proxy =
            start_proxy_with_response(&upstream_response, |config| config.retry.max_attempts = 1).await;
        let response = proxy.get("/v1/user").await;
        assert_eq!(response.status(), status);
        if status == 502 {
            assert_eq!(response.headers()["x-keychoir-error"], "answer_not_redacted");
        }
        let text = response.text().await.unwrap();
        assert!(!text.contains("John"), "{status}: the response must not name the owner: {text}");
    }
}

#[tokio::test]
async fn redaction_can_be_disabled() {
    let proxy = start_proxy_with(plan(), |config| config.access.redact = false).await;
    let user: Value = proxy.get("/v1/user").await.json().await.unwrap();
    assert_eq!(user["first_name"], "Simulator");
    proxy.close().await;
    let proxy = start_proxy_with_response(&http_response("200 OK", FIRST_KEY.as_bytes()), |config| {
        config.access.redact = false
    })
    .await;
    assert_eq!(proxy.get("/v1/voices").await.text().await.unwrap(), FIRST_KEY);
    proxy.close().await;
}
