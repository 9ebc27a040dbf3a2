//! Tests that replicas share the owners of resources. A request for a cloned voice uses the account that owns the
//! voice, and a request for the next page of a list uses the account of the first page, at every replica.

use reqwest::Method;
use serde_json::{Value, json};

use super::{FIRST_KEY, SECOND_KEY, plan, refused_attempts, start};
use crate::support::replicas::TestReplicas;

/// Clones a voice at the next replica. Returns the id of the voice.
async fn clone_voice(replicas: &TestReplicas) -> String {
    let body = "--x\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nMine\r\n--x--\r\n";
    let request = replicas.request(Method::POST, "/v1/voices/add");
    let request = request.header("content-type", "multipart/form-data; boundary=x").body(body);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.json::<Value>().await.unwrap()["voice_id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_voice_that_is_cloned_at_one_replica_can_be_used_at_all_replicas() {
    let (_redis, replicas) = start(3, plan(&[(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)], None)).await;
    for _ in 0..4 {
        let voice = clone_voice(&replicas).await;
        let refused_before = refused_attempts(&replicas.simulator.ledger());
        for _ in 0..3 {
            let body = json!({"text": "abc", "model_id": "eleven_multilingual_v2"});
            let path = format!("/v1/text-to-speech/{voice}");
            let response = replicas.request(Method::POST, &path).json(&body).send().await.unwrap();
            assert_eq!(response.status(), 200);
        }
        let refused_after = refused_attempts(&replicas.simulator.ledger());
        assert_eq!(
            refused_after, refused_before,
            "no replica may send a request to an account that does not have the voice"
        );
    }
    replicas.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_page_of_a_list_comes_from_the_same_account_at_another_replica() {
    let mut accounts = plan(&[(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)], None);
    for (index, workspace) in accounts.workspaces.iter_mut().enumerate() {
        workspace.voices = (0..5).map(|voice| format!("voice-{voice}-of-{index}")).collect();
    }
    let (_redis, replicas) = start(3, accounts).await;
    let get = async |path: String| {
        let response = replicas.request(Method::GET, &path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}: the page must be served");
        response.json::<Value>().await.unwrap()
    };
    let voice_ids = |page: &Value| -> Vec<String> {
        let voices = page["voices"].as_array().unwrap().iter();
        voices.map(|voice| voice["voice_id"].as_str().unwrap().to_owned()).collect()
    };
    let mut page = get("/v2/voices?page_size=2".to_owned()).await;
    let mut listed_voices = voice_ids(&page);
    while let Some(token) = page["next_page_token"].as_str() {
        page = get(format!("/v2/voices?page_size=2&next_page_token={token}")).await;
        listed_voices.extend(voice_ids(&page));
    }
    let voices_of_account =
        |index: usize| listed_voices.iter().filter(|voice| voice.ends_with(&format!("-of-{index}"))).count();
    assert_eq!(
        (voices_of_account(0), voices_of_account(1)),
        (5, 0),
        "all pages must be of one account: {listed_voices:?}"
    );
    replicas.close().await;
}
