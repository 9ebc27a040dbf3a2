//! Tests the server-sent events of the admin API: a listener first receives a snapshot, and resumes after the last
//! event that it received, if that event is still buffered. The number of listeners is limited, the admin token is
//! required, a shutdown ends the streams, and a slow listener delays no request.

use super::*;
use crate::support::events::EventReader;
use keychoir::admin::record_change_event;
use keychoir::policy::units::UnixMs;
use keychoir::store::StoredChange;
use serde_json::json;

/// Opens the stream of events, after the event with the id `last_event_id` if there is one.
async fn open_events(proxy: &TestProxy, last_event_id: Option<&str>) -> EventReader {
    let request = admin_request(proxy, Method::GET, "events").bearer_auth(ADMIN_TOKEN);
    let request = match last_event_id {
        Some(id) => request.header("last-event-id", id),
        None => request,
    };
    EventReader::new(request.send().await.unwrap())
}

/// Returns a change with this number as its generation.
fn stored_change(number: u64) -> StoredChange {
    let changed_at = UnixMs(1_796_000_000_000);
    StoredChange {
        id: StoredChange::new_id(changed_at),
        at: changed_at,
        actor: "admin_token".to_owned(),
        address: None,
        action: "reloaded".to_owned(),
        target: None,
        detail: "{}".to_owned(),
        generation: number,
    }
}

#[tokio::test]
async fn a_new_listener_receives_a_snapshot_and_then_the_events() {
    let (proxy, _) = start_admin_proxy().await;
    proxy.set_fault(FIRST_KEY, "invalid");
    let mut reader = open_events(&proxy, None).await;
    let snapshot = reader.take(3).await;
    let names: Vec<&str> = snapshot.iter().map(|event| &*event.name).collect();
    assert_eq!(names, ["overview", "key", "key"]);
    assert_eq!(snapshot[0].data["keys"]["total"], 2);
    let ids: Vec<&Value> = snapshot[1..].iter().map(|event| &event.data["id"]).collect();
    assert_eq!(ids, [&json!(key_id(FIRST_KEY)), &json!(key_id(SECOND_KEY))]);

    let response = proxy.request_speech(10).await;
    let request_id = response.headers()["x-request-id"].to_str().unwrap().to_owned();
    response.bytes().await.unwrap();
    let event = reader.wait_for("request", |_| true).await;
    let mut expected = json!({
        "request_id": request_id, "client": "app", "short_key": "sk_key_numb...00002", "method": "POST",
        "route": "/v1/text-to-speech/{id}", "status": 200, "outcome": "served", "attempts": 2,
        "retry_reasons": ["invalid_key"], "credits": 10,
    });
    expected["total_ms"] = event.data["total_ms"].clone();
    assert!(event.data["total_ms"].is_u64(), "the event must contain the duration: {}", event.data);
    assert_eq!(event.data, expected);

    record_change_event(&proxy.app.events(), &stored_change(8));
    let event = reader.wait_for("change", |_| true).await;
    assert_eq!((&event.data["action"], &event.data["generation"]), (&json!("reloaded"), &json!(8)));
    // A key event has the same members as `GET keys/{id}`.
    set_paused(&proxy, &[SECOND_KEY]);
    let event = reader.wait_for("key", |key| key["paused"] == true).await;
    let members = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let key = read_document(&proxy, &format!("keys/{}", key_id(SECOND_KEY))).await;
    assert_eq!(members(&event.data), members(&key));
    drop(reader);
    proxy.close().await;
}

#[tokio::test]
async fn a_listener_resumes_after_the_last_event_that_it_received() {
    let (proxy, _) = start_admin_proxy().await;
    let mut reader = open_events(&proxy, None).await;
    let last = reader.take(3).await.pop().unwrap();
    record_change_event(&proxy.app.events(), &stored_change(8));
    let received_event = reader.wait_for("change", |_| true).await;
    drop(reader);
    record_change_event(&proxy.app.events(), &stored_change(9));
    let mut resumed = open_events(&proxy, Some(&received_event.id)).await;
    let next_event = resumed.next().await.unwrap();
    assert_eq!(
        (&*next_event.name, &next_event.data["generation"]),
        ("change", &json!(9)),
        "the resumed stream must start with the event after the last received one"
    );
    let mut from_snapshot = open_events(&proxy, Some(&last.id)).await;
    assert_eq!(from_snapshot.wait_for("change", |_| true).await.data["generation"], 8);
    drop((resumed, from_snapshot));
    proxy.close().await;
}

#[tokio::test]
async fn a_listener_whose_last_event_is_not_buffered_receives_a_snapshot_and_the_buffered_events() {
    let (proxy, _) = start_admin_proxy().await;
    let mut reader = open_events(&proxy, None).await;
    let last = reader.take(3).await.pop().unwrap();
    drop(reader);
    for number in 0..1_001 {
        record_change_event(&proxy.app.events(), &stored_change(number));
    }
    let mut resumed = open_events(&proxy, Some(&last.id)).await;
    let names: Vec<String> = resumed.take(3).await.into_iter().map(|event| event.name).collect();
    assert_eq!(names, ["overview", "key", "key"]);
    let first_buffered = resumed.next().await.unwrap();
    assert!(
        first_buffered.data["generation"].as_u64().unwrap() >= 1,
        "an event that is not buffered must not be sent: {}",
        first_buffered.data
    );
    let last_buffered = resumed.wait_for("change", |change| change["generation"] == 1_000).await;
    let mut resumed_events = open_events(&proxy, Some(&last_buffered.id)).await;
    record_change_event(&proxy.app.events(), &stored_change(2_000));
    let next_event = resumed_events.wait_for("change", |_| true).await;
    assert_eq!(next_event.data["generation"], 2_000);
    for unknown_id in ["0-1", "", "not an id", "18446744073709551615-1"] {
        let mut reader = open_events(&proxy, Some(unknown_id)).await;
        assert_eq!(reader.next().await.unwrap().name, "overview");
    }
    drop((resumed, resumed_events));
    proxy.close().await;
}

#[tokio::test]
async fn a_listener_above_the_maximum_gets_503_with_the_name_of_the_setting() {
    let (proxy, _) = start_admin_proxy_with(|config| config.admin.max_event_listeners = 1).await;
    let first = open_events(&proxy, None).await;
    let refused_response = send(&proxy, Method::GET, "events", None).await;
    assert_eq!(refused_response.headers()["retry-after"], "1");
    let message = assert_error(refused_response, 503, "too_many_listeners").await;
    assert!(
        message.contains("admin.max_event_listeners"),
        "the message must contain `admin.max_event_listeners`: {message}"
    );
    let head = send(&proxy, Method::HEAD, "events", None).await;
    assert_eq!((head.status().as_u16(), head.text().await.unwrap().as_str()), (200, ""));
    drop(first);
    let reconnecting = async {
        while send(&proxy, Method::GET, "events", None).await.status() != 200 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), reconnecting)
        .await
        .expect("a listener must be accepted after another one has disconnected");
    proxy.close().await;
}

#[tokio::test]
async fn events_need_the_admin_token() {
    let (proxy, _) = start_admin_proxy().await;
    let client = admin_request(&proxy, Method::GET, "events").bearer_auth(CLIENT_TOKEN).send().await.unwrap();
    assert_error(client, 403, "client_token").await;
    let without_token = admin_request(&proxy, Method::GET, "events").send().await.unwrap();
    assert_error(without_token, 401, "admin_token_missing").await;
    assert!(!proxy.app.events().is_recording(), "no event must be recorded without listeners");
    proxy.close().await;
}

#[tokio::test]
async fn a_shutdown_ends_the_streams() {
    let (proxy, _) = start_admin_proxy().await;
    let mut reader = open_events(&proxy, None).await;
    reader.take(3).await;
    // The drain must complete although the stream is open.
    let (_, ()) = tokio::join!(proxy.close(), async { while reader.next().await.is_some() {} });
}

#[tokio::test]
async fn a_listener_that_does_not_read_delays_no_request() {
    let (proxy, _) = start_admin_proxy().await;
    let mut slow = open_events(&proxy, None).await;
    slow.take(3).await;
    let mut reader = open_events(&proxy, None).await;
    for number in 0..200 {
        for _ in 0..50 {
            record_change_event(&proxy.app.events(), &stored_change(number));
        }
    }
    assert_eq!(proxy.request_speech(10).await.status(), 200);
    reader.wait_for("request", |_| true).await;
    drop((slow, reader));
    proxy.close().await;
}
