//! Tests that the commands to Redis contain no secret and no readable name or identifier of a key, client, user or
//! voice.

use reqwest::Method;
use serde_json::json;

use super::{ADMIN, ADMIN_TOKEN, FIRST_KEY, SECOND_KEY, plan, start_with};

#[tokio::test(flavor = "multi_thread")]
async fn no_redis_command_contains_a_key_a_token_or_an_identifier() {
    const RUNTIME_KEY: &str = "sk_runtime_key_of_an_operator_0000";
    let keys = [(FIRST_KEY, 10_000), (SECOND_KEY, 10_000), (RUNTIME_KEY, 10_000)];
    let (redis, replicas) = start_with(2, plan(&keys[..2], Some(5)), &ADMIN).await;
    let mut monitor = redis.monitor();
    let url = |path: &str| format!("{}/api/keychoir/v1/{path}", replicas.url(0));
    let post = async |path: &str, body| {
        let request = replicas.client.post(url(path)).bearer_auth(ADMIN_TOKEN).json(&body);
        let response = request.send().await.unwrap();
        assert!(
            response.status().is_success(),
            "{path}: the call must succeed, not end with {}",
            response.status()
        );
        response.json::<serde_json::Value>().await.unwrap()
    };
    post("keys", json!({"name": "canary-key", "key": RUNTIME_KEY, "workspace": "canary-workspace"})).await;
    let client = post("clients", json!({"name": "canary-client", "quota": "1000 credits"})).await;
    let token = client["token"].as_str().unwrap();
    replicas.simulator.set_fault(FIRST_KEY, Some("rate_limit=60".parse().unwrap()));
    let body = json!({"text": "canary text", "model_id": "eleven_multilingual_v2"});
    for path in ["/v1/text-to-speech/canary-voice-0", "/v1/voices/canary-voice-1"] {
        let method = if path.contains("speech") { Method::POST } else { Method::GET };
        let request = replicas.request(method, path).header("xi-api-key", token).json(&body);
        request.header("x-keychoir-user", "canary-user").send().await.unwrap().bytes().await.unwrap();
    }
    let commands = monitor.read_commands();
    assert!(
        commands.contains("EVAL") && commands.contains("evidence"),
        "the replicas must have published the refusal: {commands}"
    );
    for secret in [FIRST_KEY, SECOND_KEY, RUNTIME_KEY, ADMIN_TOKEN, token, "canary", "elevenlabs-canary"] {
        assert!(!commands.contains(secret), "Redis must not receive {secret}");
    }
    replicas.close_unchecked().await;
}
