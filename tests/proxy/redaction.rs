//! Data that a client of the pool never receives: a key, wherever the provider echoes it, and the
//! owner of the serving key.

use std::io::Write;

use crate::support::{FIRST_KEY, SECOND_KEY, TestProxy, fixed_upstream, start_proxy, start_proxy_with};
use flate2::Compression;
use flate2::write::GzEncoder;
use keychoir::config::Config;
use keychoir::simulator::{Plan, WorkspacePlan};
use serde_json::{Value, json};

const SHORT: &str = "sk_key_numb...00001";

/// A proxy whose upstream sends `said` to every request, and leaves the connection open.
async fn before(said: &[u8], change: impl FnOnce(&mut Config)) -> TestProxy {
    let url = fixed_upstream(said).await;
    start_proxy_with(Plan::of([(FIRST_KEY, 100), (SECOND_KEY, 100)]), |config| {
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

fn message(head: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}

#[tokio::test]
async fn a_key_that_is_echoed_becomes_its_short_form() {
    let text = format!("{{\"used\":\"{FIRST_KEY}\",\"other\":\"{SECOND_KEY}\"}}");
    let shown = text.replace(FIRST_KEY, SHORT).replace(SECOND_KEY, "sk_key_numb...00002");
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
        let proxy = before(&message(&head, &body), |_| {}).await;
        let answer = proxy.get("/v1/voices").await;
        if head.contains("x-key") {
            assert_eq!(answer.headers()["x-key"], format!("Bearer {SHORT}"));
        }
        assert!(!format!("{answer:?}").contains(FIRST_KEY), "{answer:?}");
        let length = answer.content_length().unwrap();
        let heard = answer.text().await.unwrap();
        assert_eq!((heard.trim_end(), heard.len() as u64), (&*shown, length), "{head}");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_stream_is_searched_without_a_delay() {
    let (start, end) = FIRST_KEY.split_at(20);
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let pieces = [chunk("data: one\n\n"), chunk(&format!("data: {start}")), chunk(&format!("{end}\n\n"))];
    // Everything that the upstream has sent must be forwarded; it sends nothing more, and does not
    // close.
    for (count, expected) in [
        (1, "data: one\n\n".to_owned()),
        (2, "data: one\n\ndata: sk_k".to_owned()),
        (3, format!("data: one\n\ndata: {SHORT}\n\n")),
    ] {
        let proxy = before(format!("{head}{}", pieces[..count].concat()).as_bytes(), |_| {}).await;
        let mut answer = proxy.get("/v1/voices").await;
        let mut heard = String::new();
        while heard.len() < expected.len() {
            heard.push_str(std::str::from_utf8(&answer.chunk().await.unwrap().unwrap()).unwrap());
        }
        assert_eq!(heard, expected);
    }
}

#[tokio::test]
async fn every_type_but_audio_images_and_archives_is_searched() {
    let text = format!("key {FIRST_KEY} .");
    for kind in [
        "message/http",
        "multipart/mixed; boundary=a",
        "application/yaml",
        "application/octet-stream",
        "application/x-never-seen",
        "image/svg+xml",
        "text/html",
    ] {
        for status in ["200 OK", "404 Not Found", "500 Oops"] {
            let said = message(&format!("{status}\r\ncontent-type: {kind}"), text.as_bytes());
            let proxy = before(&said, |config| config.retry.max_attempts = 1).await;
            let shown = proxy.get("/v1/voices").await.text().await.unwrap();
            assert_eq!(shown.trim_end(), text.replace(FIRST_KEY, SHORT), "{status} {kind}");
            proxy.close().await;
        }
    }
    for kind in ["audio/mpeg", "video/mp4", "image/png", "application/zip"] {
        let proxy =
            before(&message(&format!("200 OK\r\ncontent-type: {kind}"), text.as_bytes()), |_| {}).await;
        assert_eq!(proxy.get("/v1/voices").await.text().await.unwrap(), text, "{kind}");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_key_is_found_in_escapes_and_in_utf_16() {
    let escaped: String = FIRST_KEY.bytes().map(|byte| format!("\\u{byte:04x}")).collect();
    let said =
        message("200 OK\r\ncontent-type: application/json", format!("{{\"k\":\"{escaped}\"}}").as_bytes());
    let proxy = before(&said, |_| {}).await;
    let shown: Value = proxy.get("/v1/voices").await.json().await.unwrap();
    assert_eq!(shown, json!({"k": SHORT}));
    proxy.close().await;
    for order in [u16::to_le_bytes as fn(u16) -> [u8; 2], u16::to_be_bytes] {
        let wide = |text: &str| text.encode_utf16().flat_map(order).collect::<Vec<u8>>();
        let said =
            message("200 OK\r\ncontent-type: text/plain; charset=utf-16", &wide(&format!("a{FIRST_KEY}")));
        let proxy = before(&said, |_| {}).await;
        let shown = proxy.get("/v1/voices").await.bytes().await.unwrap();
        assert!(shown.starts_with(&wide(&format!("a{SHORT}"))), "{shown:?}");
        proxy.close().await;
    }
}

#[tokio::test]
async fn a_compressed_response_is_searched_and_relayed_unchanged() {
    let clean = gzip("{\"voices\":[]}");
    let head = "200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip";
    let proxy = before(&message(head, &clean), |_| {}).await;
    let answer = proxy.get("/v1/voices").await;
    assert_eq!(answer.headers()["content-encoding"], "gzip");
    assert_eq!(answer.bytes().await.unwrap(), clean);
    proxy.close().await;

    // A short document is forwarded with the key replaced.
    let proxy = before(&message(head, &gzip(&format!("{{\"k\":\"{FIRST_KEY}\"}}"))), |_| {}).await;
    let answer = proxy.get("/v1/voices").await;
    assert!(!answer.headers().contains_key("content-encoding"));
    assert_eq!(answer.json::<Value>().await.unwrap(), json!({"k": SHORT}));
    proxy.close().await;

    // A document of unknown length is streamed, and cut where the key would be.
    let packed = gzip(&format!("{{\"k\":\"{FIRST_KEY}\"}}"));
    let mut said = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\n\
        transfer-encoding: chunked\r\n\r\n"
        .to_vec();
    said.extend_from_slice(format!("{:x}\r\n", packed.len()).as_bytes());
    said.extend_from_slice(&packed);
    said.extend_from_slice(b"\r\n0\r\n\r\n");
    let proxy = before(&said, |_| {}).await;
    let answer = proxy.client.get(format!("{}/v1/voices", proxy.url)).send().await;
    // The cut may come before its head was sent.
    assert!(match answer {
        Ok(answer) => answer.bytes().await.is_err(),
        Err(_) => true,
    });
    proxy.close().await;
}

fn plan() -> Plan {
    let mut plan = Plan::of([(FIRST_KEY, 0), (SECOND_KEY, 1_000)]);
    plan.keys[0].workspace = Some("one".to_owned());
    plan.with_workspace(WorkspacePlan { used: 5_420, ..WorkspacePlan::new("one", 100_000) })
}

#[tokio::test]
async fn the_owner_of_a_key_is_not_shown_and_credits_are() {
    let proxy = start_proxy(plan()).await;
    let user: Value = proxy.get("/v1/user").await.json().await.unwrap();
    for name in
        ["first_name", "xi_api_key_preview", "referral_link_code", "partnerstack_partner_default_link"]
    {
        assert_eq!(user[name], Value::Null, "{name}");
    }
    assert_eq!((&user["user_id"], &user["is_onboarding_completed"]), (&json!("redacted"), &json!(true)));
    let figures = |subscription: &Value| {
        (subscription["character_count"].as_u64().unwrap(), subscription["character_limit"].as_u64().unwrap())
    };
    assert_eq!(figures(&user["subscription"]), (5_420, 100_000));

    let own: Value = proxy.get("/user/subscription").await.json().await.unwrap();
    assert_eq!(figures(&own), (5_420, 100_000));
    assert_eq!((&own["next_invoice"], &own["open_invoices"]), (&Value::Null, &json!([])));
    assert_eq!(own["has_open_invoices"], json!(false));
    proxy.close().await;
}

#[tokio::test]
async fn an_owner_is_hidden_whatever_the_status_and_the_form() {
    let owner = json!({"first_name": "John", "email": "john@example.com", "tier": "creator"});
    let nested = json!({"data": {"user": owner}, "detail": {"status": "gone", "user": "John"}});
    for status in [200, 201, 300, 400, 401, 403, 404, 422, 429, 500, 503] {
        for document in [&owner, &nested] {
            let text = document.to_string();
            for said in [
                message(&format!("{status} X"), text.as_bytes()),
                message(&format!("{status} X\r\ncontent-encoding: gzip"), &gzip(&text)),
            ] {
                let proxy = before(&said, |config| config.retry.max_attempts = 1).await;
                let answer = proxy.get("/v1/user").await;
                assert_eq!(answer.status(), status);
                let shown: Value = answer.json().await.unwrap();
                let expected = if document.get("tier").is_some() {
                    json!({"tier": "creator", "first_name": null})
                } else {
                    json!({"detail": {"status": "gone"}})
                };
                assert_eq!(shown, expected, "{status}");
                proxy.close().await;
            }
        }
    }
}

#[tokio::test]
async fn a_response_with_an_irremovable_owner_is_not_relayed() {
    let document = json!({"first_name": "John"}).to_string();
    for (said, status) in [
        (message("200 OK\r\ncontent-encoding: br", document.as_bytes()), 502),
        (message("200 OK", b"<html>John</html>"), 502),
        (message("300 Multiple Choices", b"[{\"first_name\":\"John\"}]"), 502),
        (message("200 OK", &vec![b' '; 1024 * 1024 + 1]), 502),
        (message("500 Oops", &[&[b' '; 1024 * 1024], &b"John"[..]].concat()), 502),
        (message("200 OK\r\ncontent-type: audio/mpeg", document.as_bytes()), 200),
        (message("401 Unauthorized", b"John is not here"), 401),
        (message("404 Not Found\r\ncontent-encoding: br", b"John is not here"), 404),
        (message("500 Oops\r\ncontent-type: text/html", b"<html>John</html>"), 500),
        (message("404 Not Found", b""), 404),
    ] {
        let proxy = before(&said, |config| config.retry.max_attempts = 1).await;
        let answer = proxy.get("/v1/user").await;
        assert_eq!(answer.status(), status);
        if status == 502 {
            assert_eq!(answer.headers()["x-keychoir-error"], "answer_not_redacted");
        }
        let text = answer.text().await.unwrap();
        assert!(!text.contains("John"), "{status} {text}");
    }
}

#[tokio::test]
async fn redaction_can_be_switched_off() {
    let proxy = start_proxy_with(plan(), |config| config.access.redact = false).await;
    let user: Value = proxy.get("/v1/user").await.json().await.unwrap();
    assert_eq!(user["first_name"], "Simulator");
    proxy.close().await;
    let proxy = before(&message("200 OK", FIRST_KEY.as_bytes()), |config| config.access.redact = false).await;
    assert_eq!(proxy.get("/v1/voices").await.text().await.unwrap(), FIRST_KEY);
    proxy.close().await;
}
