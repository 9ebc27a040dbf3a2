//! Tests the formats of the JSON pages: the status document, the key details, and the health pages. A change of an
//! expected format breaks the apps and scripts that read the pages. Also tests that the state of the keys survives a
//! restart.

use crate::support::{FIRST_KEY, SECOND_KEY, start_proxy, start_proxy_in};
use keychoir::policy::units::UnixMs;
use keychoir::simulator::{Plan, WorkspacePlan};
use serde_json::{Value, json};

/// The reset of both workspaces, 2099-01-01.
const RESETS_AT: UnixMs = UnixMs(4_070_908_800_000);

fn plan() -> Plan {
    let workspace = |name: &str, used| WorkspacePlan {
        used,
        reset: Some(RESETS_AT),
        ..WorkspacePlan::new(name, 100_000)
    };
    let mut plan = Plan::with_keys([(FIRST_KEY, 0), (SECOND_KEY, 0)]);
    plan.keys[0].workspace = Some("one".to_owned());
    plan.keys[1].workspace = Some("two".to_owned());
    plan.with_workspace(workspace("one", 5_420)).with_workspace(workspace("two", 84_766))
}

#[tokio::test]
async fn the_status_document_has_the_format_of_the_contract() {
    let proxy = start_proxy(plan()).await;
    let response = proxy.get("/api/elevenlabs-status").await;
    assert_eq!(response.headers()["cache-control"], "no-store");
    assert_eq!(response.headers()["content-type"], "application/json");
    let text = response.text().await.unwrap();
    let expected = concat!(
        r#"{"totalKeys":2,"activeKeys":2,"exhaustedKeys":0,"nearLimitKeys":1,"totalRemainingCharacters":109814,"#,
        r#""keys":[{"shortKey":"sk_key_numb...00001","status":"active","characterCount":5420,"characterLimit":100000,"#,
        r#""remainingCharacters":94580,"usagePercentage":5,"isOverLimit":false,"isNearLimit":false,"#,
        r#""nextResetDate":"2099-01-01T00:00:00.000Z"},"#,
        r#"{"shortKey":"sk_key_numb...00002","status":"active","characterCount":84766,"characterLimit":100000,"#,
        r#""remainingCharacters":15234,"usagePercentage":84,"isOverLimit":false,"isNearLimit":true,"#,
        r#""nextResetDate":"2099-01-01T00:00:00.000Z"}]}"#,
    );
    assert_eq!(text, expected);
    proxy.close().await;
}

#[tokio::test]
async fn a_key_with_an_unknown_quota_has_zeros_and_a_null() {
    let mut plan = Plan::with_keys([(FIRST_KEY, 1_000)]);
    plan.keys[0].permissions = Some(vec!["text_to_speech".to_owned()]);
    let proxy = start_proxy(plan).await;
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    let status = proxy.status_document().await;
    assert_eq!(
        status["keys"][0],
        json!({
            "shortKey": "sk_key_numb...00001", "status": "active", "characterCount": 10, "characterLimit": 0,
            "remainingCharacters": 0, "usagePercentage": 0, "isOverLimit": false, "isNearLimit": false,
            "nextResetDate": null,
        })
    );
    proxy.close().await;
}

#[tokio::test]
async fn the_state_of_the_keys_survives_a_restart() {
    let first = start_proxy(plan()).await;
    first.set_fault(FIRST_KEY, "quota");
    assert_eq!(first.request_speech(10).await.status(), 200);
    let status_before = first.status_document().await;
    let (_, directory) = first.close().await;

    let second = start_proxy_in(directory, plan(), |config| config.quota_polling.enabled = false).await;
    let status = second.status_document().await;
    assert_eq!(status, status_before);
    assert_eq!(status["keys"][0]["status"], "exhausted");
    assert_eq!(second.request_speech(10).await.status(), 200);
    assert_eq!(
        second.request_counts(&[FIRST_KEY, SECOND_KEY]),
        [0, 1],
        "the exhausted key must not be used after the restart"
    );
    // The new simulator has charged only the second request. The usage records contain both.
    assert_eq!(second.simulator.ledger().totals.charged, 10);
}

#[tokio::test]
async fn the_key_details_have_a_separate_page() {
    let proxy = start_proxy(plan()).await;
    let details = proxy.get("/api/keychoir-keys").await.json::<Value>().await.unwrap();
    let key = |short: &str, state: &str| {
        json!({"shortKey": short, "name": null, "workspace": null, "plan": "creator", "drift": 0,
        "inFlight": 0, "reserved": 0, "spentPerDay": 0, "spentBy": null, "state": state, "paused": false, "reason": null,
        "advice": null, "since": null, "until": null, "possible": "everything", "evidence": [], "cannot": []})
    };
    let keys = [key("sk_key_numb...00001", "active"), key("sk_key_numb...00002", "near_limit")];
    assert_eq!(details, json!({"waiting": 0, "spentBy": null, "keys": keys}));
    proxy.close().await;
}

#[tokio::test]
async fn the_health_pages_report_liveness_and_readiness() {
    let proxy = start_proxy(plan()).await;
    let page = async |path: &str| {
        let response = proxy.get(path).await;
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    assert_eq!(page("/livez").await, (200, json!({"status": "live"})));
    let ready = json!({
        "status": "ready", "keys": "ok", "store": "ok", "upstream": "ok", "draining": "no", "recordsWaiting": 0, "recordsLost": 0,
        "mirror": "off", "mirrorRowsRefused": 0, "shared": "off", "replicas": 1,
    });
    assert_eq!(page("/readyz").await, (200, ready));
    let response = proxy.post("/readyz", &json!({})).await;
    assert_eq!(
        (response.status().as_u16(), &response.headers()["allow"]),
        (405, &"GET, HEAD".parse().unwrap())
    );
    proxy.close().await;
}
