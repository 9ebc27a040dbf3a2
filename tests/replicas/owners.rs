//! Owners of identifiers that one replica learns and another one needs.

use reqwest::Method;
use serde_json::{Value, json};

use super::{FIRST_KEY, SECOND_KEY, plan, start};
use crate::support::replicas::TestReplicas;

async fn clone_voice(replicas: &TestReplicas) -> String {
    let body = "--x\r\nContent-Disposition: form-data; name=\"name\"\r\n\r\nMine\r\n--x--\r\n";
    let request = replicas.request(Method::POST, "/v1/voices/add");
    let request = request.header("content-type", "multipart/form-data; boundary=x").body(body);
    let response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.json::<Value>().await.unwrap()["voice_id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_voice_that_is_cloned_at_one_replica_speaks_at_the_others() {
    let (_redis, replicas) = start(3, plan(&[(FIRST_KEY, 100_000), (SECOND_KEY, 100_000)], None)).await;
    for _ in 0..4 {
        let voice = clone_voice(&replicas).await;
        let refused: u64 = replicas.simulator.ledger().keys.iter().map(|key| key.refused).sum();
        for _ in 0..3 {
            let body = json!({"text": "abc", "model_id": "eleven_multilingual_v2"});
            let path = format!("/v1/text-to-speech/{voice}");
            let response = replicas.request(Method::POST, &path).json(&body).send().await.unwrap();
            assert_eq!(response.status(), 200);
        }
        let refused_after: u64 = replicas.simulator.ledger().keys.iter().map(|key| key.refused).sum();
        assert_eq!(refused_after, refused, "no replica must ask an account that does not have the voice");
    }
    replicas.close().await;
}
