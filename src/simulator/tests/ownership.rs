//! Tests the objects that belong to a workspace: created voices, continued requests, and pages of lists.

use super::*;

const KEYS: &str = "one=1000@a two=1000@b";

/// Creates a request for a voice clone, whose form has a part with the given name.
fn clone_call(part_name: &str) -> SimulatorCall {
    post(
        "/v1/voices/add",
        format!("--x\r\nContent-Disposition: form-data; name=\"{part_name}\"\r\n\r\nMine\r\n--x--"),
    )
}

#[tokio::test]
async fn a_created_voice_exists_until_it_is_removed() {
    let simulator = start_with_keys(KEYS).await;
    assert_eq!(clone_call("title").key("one").send_to(&simulator).await.status, 422);
    let created_voice = clone_call("name").key("one").send_to(&simulator).await.json();
    let voice = created_voice["voice_id"].as_str().unwrap();
    assert_eq!(voice.len(), 20);
    let path = format!("/v1/text-to-speech/{voice}");
    let speak = |key| post(&path, r#"{"text":"a"}"#).key(key).send_to(&simulator);
    assert_eq!((speak("one").await.status, speak("two").await.status), (200, 404));
    let contains_voice = |page: Value| {
        page["voices"].as_array().unwrap().iter().any(|listed_voice| listed_voice["voice_id"] == voice)
    };
    assert!(contains_voice(get("/v1/voices").key("one").send_to(&simulator).await.json()));
    assert!(!contains_voice(get("/v1/voices").key("two").send_to(&simulator).await.json()));

    let path = format!("/v1/voices/{voice}");
    let delete = |key| SimulatorCall { method: "DELETE", ..get(&path) }.key(key).send_to(&simulator);
    assert_eq!(delete("two").await.status, 404);
    assert_eq!((delete("one").await.status, delete("one").await.status), (200, 404));
}

#[tokio::test]
async fn a_list_continues_in_its_own_workspace_only() {
    let simulator = start_with_keys(KEYS).await;
    let first_page = get("/v2/voices?page_size=2").key("one").send_to(&simulator).await.json();
    assert_eq!(
        (first_page["voices"].as_array().unwrap().len(), &first_page["has_more"]),
        (2, &Value::from(true))
    );
    let next_path =
        format!("/v2/voices?page_size=2&next_page_token={}", first_page["next_page_token"].as_str().unwrap());
    let second_page = get(&next_path).key("one").send_to(&simulator).await.json();
    assert_eq!(
        (second_page["voices"].as_array().unwrap().len(), &second_page["next_page_token"]),
        (1, &Value::Null)
    );
    let reply_to_other_key = get(&next_path).key("two").send_to(&simulator).await;
    assert_eq!(
        (reply_to_other_key.status, reply_to_other_key.json()["detail"]["code"].as_str()),
        (400, Some("invalid_cursor"))
    );

    let item = speech_call("a").key("one").send_to(&simulator).await.header("history-item-id").to_owned();
    let next_path = format!("/v1/history?start_after_history_item_id={item}");
    assert_eq!(get(&next_path).key("one").send_to(&simulator).await.status, 200);
    assert_eq!(get(&next_path).key("two").send_to(&simulator).await.status, 400);
}

#[tokio::test]
async fn speech_continues_requests_of_its_own_workspace_only() {
    let simulator = start_with_keys(KEYS).await;
    let request_id = speech_call("a").key("one").send_to(&simulator).await.header("request-id").to_owned();
    let body = serde_json::json!({ "text": "b", "previous_request_ids": [request_id] }).to_string();
    assert_eq!(post(SPEECH_PATH, body.clone()).key("one").send_to(&simulator).await.status, 200);
    assert_eq!(post(SPEECH_PATH, body).key("two").send_to(&simulator).await.status, 400);
}
