//! Tests conversations with agents: the payer, the cost, signed URLs, refusals, slots and the queue of callers. Also
//! tests that a ledger without the fields of WebSockets can be parsed.

use super::sockets::*;
use super::*;
use crate::simulator::{AgentPlan, Fault, KeyPlan, Ledger, RefusalKind, SocketSummary, WorkspacePlan};
use serde_json::json;

/// The path of a conversation with an agent that no workspace lists.
const AGENT: &str = "/v1/convai/conversation?agent_id=anyone";

/// Creates a plan of two workspaces. The second workspace has a private and a public agent.
fn plan_with_agents() -> Plan {
    let agents = [("private", false), ("public", true)];
    let agents = agents.map(|(id, is_public)| AgentPlan { id: id.to_owned(), is_public }).to_vec();
    let key =
        |key: &str, workspace: &str| KeyPlan { workspace: Some(workspace.into()), ..KeyPlan::new(key, 0) };
    Plan::with_keys([])
        .with_workspace(WorkspacePlan::new("one", 100))
        .with_workspace(WorkspacePlan { agents, ..WorkspacePlan::new("two", 100) })
        .with_key(key("a", "one"))
        .with_key(key("b", "two"))
}

/// Receives the agent's first message and the ping after it. Returns the conversation ID in the first message.
async fn receive_metadata(client: &mut SocketClient) -> String {
    let metadata = client.receive_json().await;
    assert_eq!(metadata["type"], "conversation_initiation_metadata");
    let event = &metadata["conversation_initiation_metadata_event"];
    assert_eq!(
        (&event["agent_output_audio_format"], &event["user_input_audio_format"]),
        (&json!("pcm_16000"), &json!("pcm_16000"))
    );
    assert_eq!(
        client.receive_json().await,
        json!({ "type": "ping", "ping_event": { "event_id": 1, "ping_ms": null } })
    );
    event["conversation_id"].as_str().unwrap().to_owned()
}

/// Receives a number of messages, and returns their types.
async fn receive_types(client: &mut SocketClient, count: usize) -> Vec<String> {
    let mut types = Vec::new();
    for _ in 0..count {
        types.push(client.receive_json().await["type"].as_str().unwrap().to_owned());
    }
    types
}

#[tokio::test]
async fn an_agent_replies_and_its_owner_can_read_the_price_afterwards() {
    let simulator = start(plan_with_agents()).await;
    let headers = [("xi-api-key", "a"), ("sec-websocket-protocol", "convai")];
    let mut client = try_connect(&simulator, AGENT, &headers).await.unwrap();
    let id = receive_metadata(&mut client).await;
    client.send_json(json!({ "type": "conversation_initiation_client_data" })).await;
    client.send_json(json!({ "type": "pong", "event_id": 1 })).await;
    client.send_json(json!({ "type": "user_message", "text": "Hello" })).await;
    let response = client.receive_json().await;
    assert_eq!(response["agent_response_event"]["agent_response"], "The simulator hears you well.");
    let audio = client.receive_json().await;
    assert!(audio["audio_event"]["audio_base_64"].as_str().unwrap().len() > 1_000);
    assert_eq!(receive_types(&mut client, 1).await, ["ping"]);
    let read_conversation =
        async |key: &str| get(&format!("/v1/convai/conversations/{id}")).key(key).send_to(&simulator).await;
    let running = read_conversation("a").await.json();
    assert_eq!((&running["status"], &running["metadata"]["cost"]), (&json!("in-progress"), &Value::Null));

    // The first audio is too short. The second audio is long enough and interrupts the previous reply.
    client.send_json(json!({ "user_audio_chunk": "A".repeat(21_328) })).await;
    assert_eq!(receive_types(&mut client, 1).await, ["interruption"]);
    client.send_json(json!({ "user_audio_chunk": "AAAA" })).await;
    assert_eq!(receive_types(&mut client, 4).await, ["user_transcript", "agent_response", "audio", "ping"]);
    client.close(1_000, "").await;
    let (request, socket) = ended_session(&simulator).await;
    assert_eq!((request.charged, socket.protocol.as_deref()), (22, Some("convai")));
    let document = read_conversation("a").await.json();
    assert_eq!((&document["status"], &document["agent_id"]), (&json!("done"), &json!("anyone")));
    let metadata = &document["metadata"];
    assert_eq!(
        (&metadata["cost"], &metadata["authorization_method"]),
        (&json!(22), &json!("authorization_header"))
    );
    assert_eq!(
        (&metadata["charging"]["call_charge"], &metadata["charging"]["llm_charge"]),
        (&json!(20), &json!(2))
    );
    let reply_to_other_key = read_conversation("b").await;
    assert_eq!(
        (reply_to_other_key.status, reply_to_other_key.json()["detail"]["code"].as_str()),
        (404, Some("conversation_not_found"))
    );
    assert_eq!(simulator.ledger().workspace("one").unwrap().used, 22);
}

/// Opens a session, and receives the close frame of its refusal.
async fn receive_refusal(simulator: &Simulator, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let mut client = try_connect(simulator, path, headers).await.unwrap();
    client.receive_close().await
}

#[tokio::test]
async fn credits_that_run_out_end_a_conversation() {
    let quota = (1_002, "This request exceeds your quota limit.".to_owned());
    for (credits, reply_count) in [("10", None), ("11", Some(1)), ("21", Some(1)), ("22", Some(2))] {
        // A cap does not apply to agents.
        let simulator = start_with_keys(&format!("sk={credits}:cap=1")).await;
        let Some(reply_count) = reply_count else {
            assert_eq!(receive_refusal(&simulator, AGENT, &[("xi-api-key", "sk")]).await, quota);
            continue;
        };
        let mut client = connect(&simulator, AGENT, "sk").await;
        receive_metadata(&mut client).await;
        for _ in 0..reply_count {
            client.send_json(json!({ "type": "user_message", "text": "Hello" })).await;
            receive_types(&mut client, 3).await;
        }
        client.send_json(json!({ "type": "user_message", "text": "Hello" })).await;
        assert_eq!(client.receive_close().await, quota);
        assert_eq!(ended_session(&simulator).await.0.charged, reply_count * 11);
    }
}

#[tokio::test]
async fn an_agent_accepts_its_own_workspace_and_a_public_agent_every_caller() {
    let simulator = start(plan_with_agents()).await;
    let path = |agent: &str| format!("/v1/convai/conversation?agent_id={agent}");
    // The caller pays for an agent that no workspace lists and for an agent of the caller's workspace. Otherwise, the
    // workspace of the agent pays.
    for (agent, key, payer) in [
        ("anyone", Some("b"), "b"),
        ("anyone", None, "a"),
        ("private", Some("b"), "b"),
        ("public", Some("b"), "b"),
        ("public", Some("a"), "b"),
        ("public", None, "b"),
    ] {
        let headers: Vec<_> = key.map(|key| ("xi-api-key", key)).into_iter().collect();
        let mut client = try_connect(&simulator, &path(agent), &headers).await.unwrap();
        receive_metadata(&mut client).await;
        drop(client);
        assert_eq!(
            ended_session(&simulator).await.1.payer.as_deref(),
            Some(payer),
            "{payer} must pay for {agent} if the key is {key:?}"
        );
    }
    let no_credential =
        "None of the authentication methods (xi-api-key, authorization header, single-use token) were found.";
    assert_eq!(receive_refusal(&simulator, &path("private"), &[]).await, (1_008, no_credential.to_owned()));
    let unknown_agent = "An agent with ID 'private' was not found.".to_owned();
    assert_eq!(
        receive_refusal(&simulator, &path("private"), &[("xi-api-key", "a")]).await,
        (1_008, unknown_agent)
    );
    let invalid_key = (1_008, "Invalid API key".to_owned());
    assert_eq!(receive_refusal(&simulator, &path("public"), &[("xi-api-key", "other")]).await, invalid_key);
    assert_eq!(receive_refusal(&simulator, "/v1/convai/conversation", &[("xi-api-key", "a")]).await.0, 1_008);
}

#[tokio::test]
async fn a_signed_url_opens_one_conversation_and_takes_precedence_over_a_key() {
    let simulator = start(plan_with_agents()).await;
    let request_credential = async |endpoint: &str, agent: &str, key: &str| {
        get(&format!("/v1/convai/conversation/{endpoint}?agent_id={agent}"))
            .key(key)
            .send_to(&simulator)
            .await
    };
    for name in ["get-signed-url", "get_signed_url"] {
        let url =
            request_credential(name, "private", "b").await.json()["signed_url"].as_str().unwrap().to_owned();
        let path = url.strip_prefix("wss://api.elevenlabs.io").unwrap();
        let mut client = try_connect(&simulator, path, &[("xi-api-key", "a")]).await.unwrap();
        let id = receive_metadata(&mut client).await;
        drop(client);
        assert_eq!(ended_session(&simulator).await.1.payer.as_deref(), Some("b"));
        let document =
            get(&format!("/v1/convai/conversations/{id}")).key("b").send_to(&simulator).await.json();
        assert_eq!(document["metadata"]["authorization_method"], "signed_url");
        assert_eq!(receive_refusal(&simulator, path, &[]).await.0, 1_008, "the token must be consumed");
    }
    let token =
        request_credential("token", "private", "b").await.json()["token"].as_str().unwrap().to_owned();
    // The token is valid for its agent only.
    let path_with_token = |agent: &str| format!("/v1/convai/conversation?agent_id={agent}&token={token}");
    assert_eq!(receive_refusal(&simulator, &path_with_token("public"), &[]).await.0, 1_008);
    receive_metadata(&mut try_connect(&simulator, &path_with_token("private"), &[]).await.unwrap()).await;
    for agent in ["private", "public"] {
        assert_eq!(
            request_credential("get-signed-url", agent, "a").await.status,
            404,
            "a credential for {agent} of another workspace must be refused"
        );
    }
    assert_eq!(get("/v1/convai/conversation/token").key("a").send_to(&simulator).await.status, 422);
    assert_eq!(get("/v1/convai/conversation/token?agent_id=x").send_to(&simulator).await.status, 401);
}

#[tokio::test]
async fn a_refusal_closes_with_its_own_code() {
    let simulator = start_with_keys("sk=100").await;
    for (kind, code) in [
        (RefusalKind::Quota, 1_002),
        (RefusalKind::Concurrency, 1_002),
        (RefusalKind::ServerError, 1_011),
        (RefusalKind::SystemBusy, 1_011),
        (RefusalKind::PaymentIssue, 1_008),
        (RefusalKind::UnusualActivity, 1_008),
    ] {
        simulator.queue_faults("sk", vec![Fault::Refuse(kind.clone())]);
        assert_eq!(
            receive_refusal(&simulator, AGENT, &[("xi-api-key", "sk")]).await.0,
            code,
            "{kind} must have this close code"
        );
    }
    simulator.queue_faults("sk", vec![Fault::Refuse(RefusalKind::InsufficientCredits)]);
    let mut client = connect(&simulator, AGENT, "sk").await;
    assert_eq!(
        client.receive_text().await,
        r#"{"type":"error","message":"received 1002 (protocol error) This request exceeds your quota limit."}"#
    );
    assert_eq!(client.receive_close().await, (1_002, "This request exceeds your quota limit.".to_owned()));
    let mut client = connect(&simulator, AGENT, "sk").await;
    receive_metadata(&mut client).await;
    client.send_json(json!([])).await;
    assert_eq!(client.receive_close().await.0, 1_008);
}

#[tokio::test]
async fn a_conversation_holds_its_slot_from_the_first_message_to_the_last() {
    let plan = Plan::with_keys([])
        .with_workspace(WorkspacePlan { max_concurrent: Some(1), ..WorkspacePlan::new("w", 100) })
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) });
    let simulator = start(plan).await;
    let mut first_client = connect(&simulator, AGENT, "sk").await;
    receive_metadata(&mut first_client).await;
    assert_eq!(receive_refusal(&simulator, AGENT, &[("xi-api-key", "sk")]).await.0, 1_002);
    drop(first_client);
    wait_until(&simulator, |ledger: &Ledger| ledger.workspaces[0].running == 0).await;
    receive_metadata(&mut connect(&simulator, AGENT, "sk").await).await;
}

/// Starts a simulator whose workspace has one slot, so that a second caller waits in the queue.
async fn start_with_one_slot(websocket_timeout_second: Duration) -> Simulator {
    let workspace =
        WorkspacePlan { max_concurrent: Some(1), queues_callers: true, ..WorkspacePlan::new("w", 100) };
    let plan = Plan::with_keys([])
        .with_workspace(workspace)
        .with_key(KeyPlan { workspace: Some("w".into()), ..KeyPlan::new("sk", 0) });
    start(Plan { websocket_timeout_second, ..plan }).await
}

#[tokio::test]
async fn a_caller_receives_the_queue_status_until_a_slot_is_available() {
    let simulator = start_with_one_slot(Duration::from_secs(3_600)).await;
    let mut first_client = connect(&simulator, AGENT, "sk").await;
    receive_metadata(&mut first_client).await;
    let mut second_client = connect(&simulator, AGENT, "sk").await;
    assert_eq!(second_client.receive_json().await["type"], "queue_status");
    // A message that arrives during the wait is processed when the session begins.
    second_client.send_json(json!({ "type": "user_message", "text": "Hello" })).await;
    drop(first_client);
    receive_metadata(&mut second_client).await;
    assert_eq!(receive_types(&mut second_client, 3).await, ["agent_response", "audio", "ping"]);
    assert_eq!(simulator.ledger().totals.charged, 11, "the wait must not be charged");
}

#[tokio::test]
async fn the_queue_status_repeats_and_ends_in_a_refusal() {
    let simulator = start_with_one_slot(Duration::from_millis(1)).await;
    let mut first_client = connect(&simulator, AGENT, "sk").await;
    receive_metadata(&mut first_client).await;
    let mut second_client = connect(&simulator, AGENT, "sk").await;
    assert!(
        receive_types(&mut second_client, 180)
            .await
            .iter()
            .all(|message_type| message_type == "queue_status")
    );
    assert_eq!(second_client.receive_close().await.0, 1_002);
    assert_eq!(simulator.ledger().workspaces[0].running, 1);
}

#[tokio::test]
async fn a_caller_that_disconnects_from_the_queue_acquires_no_slot() {
    let simulator = start_with_one_slot(Duration::from_secs(3_600)).await;
    let mut first_client = connect(&simulator, AGENT, "sk").await;
    receive_metadata(&mut first_client).await;
    let mut second_client = connect(&simulator, AGENT, "sk").await;
    assert_eq!(second_client.receive_json().await["type"], "queue_status");
    drop(second_client);
    wait_until(&simulator, |ledger: &Ledger| ledger.totals.sockets_open == 1).await;
    drop(first_client);
    wait_until(&simulator, |ledger: &Ledger| ledger.workspaces[0].running == 0).await;
}

#[tokio::test]
async fn a_wrong_host_closes_a_conversation_with_a_truncated_reason() {
    let simulator = start(Plan::with_keys([("sk", 100)]).with_other_region_key("eu")).await;
    let reason = "Invalid API key: The API key used is for a data residency stack, however this server is a global \
        server. Please check yo";
    for (key, fault) in [("eu", None), ("sk", Some("wrong_host".parse().unwrap()))] {
        simulator.set_route_fault("sk", "/v1/convai", fault);
        let mut client = connect(&simulator, AGENT, key).await;
        assert_eq!(client.receive_close().await, (1_008, reason.to_owned()));
    }
}

#[tokio::test]
async fn an_older_ledger_is_parsed() {
    // The fields of WebSockets are optional, so that this version can parse the ledger of an older version.
    let mut document = serde_json::to_value(Ledger::default()).unwrap();
    document["totals"].as_object_mut().unwrap().remove("sockets_open");
    assert_eq!(serde_json::from_value::<Ledger>(document).unwrap(), Ledger::default());
    let summary = SocketSummary { spoken: "x".into(), ..SocketSummary::default() };
    let document = serde_json::to_value(&summary).unwrap();
    assert_eq!(serde_json::from_value::<SocketSummary>(document).unwrap(), summary);
}
