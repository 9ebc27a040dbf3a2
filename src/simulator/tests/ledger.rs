//! Tests the ledger, its violations, the echo of a request, and the endpoints for tests in another process. Also tests
//! that a contradictory plan does not start, and that a dropped simulator ends its connections.

use super::*;
use crate::simulator::{Ledger, PlanError};

#[tokio::test]
async fn a_body_is_counted_and_hashed_as_received() {
    let simulator = start_with_keys("sk=100").await;
    post("/v1/simulator/echo?b=1&a=%20&b=2", "abc").key("sk").send_to(&simulator).await;
    let ledger = simulator.ledger();
    let [request] = ledger.requests.as_slice() else {
        panic!("exactly one request must be recorded: {ledger:?}")
    };
    assert_eq!(request.path_and_query, "/v1/simulator/echo?b=1&a=%20&b=2");
    assert_eq!((request.method.as_str(), request.key.as_deref()), ("POST", Some("sk")));
    assert_eq!((request.status, request.body_bytes, request.is_body_complete), (Some(200), 3, true));
    assert_eq!(request.body_sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

#[tokio::test]
async fn the_echo_returns_the_request_and_hides_the_key() {
    let simulator = start_with_keys("sk_one=100 sk_two=100").await;
    let call = post("/v1/simulator/echo?x=%2F", "abc").key("sk_two").header("x-fern-language", "Python");
    let echo = call.send_to(&simulator).await;
    assert!(!echo.text().contains("sk_two"));
    let echo = echo.json();
    assert_eq!(
        (&echo["method"], &echo["path_and_query"]),
        (&"POST".into(), &"/v1/simulator/echo?x=%2F".into())
    );
    assert_eq!(echo["body_bytes"], 3);
    let headers = echo["headers"].as_array().unwrap();
    for pair in [["xi-api-key", "key 2"], ["x-fern-language", "Python"], ["content-length", "3"]] {
        assert!(headers.contains(&serde_json::json!(pair)), "the echo must contain {pair:?}: {headers:?}");
    }
    assert_eq!(simulator.ledger().totals.charged, 0);
}

#[tokio::test]
async fn a_credential_of_a_client_is_a_violation_and_its_value_is_not_repeated() {
    let secret = "client-secret-42";
    let simulator =
        start(Plan::with_keys([("sk", 100)]).with_forbidden_text("other").with_forbidden_text(secret)).await;
    let cases = [
        (get("/v1/user").header("authorization", "Bearer x"), "the header authorization was forwarded"),
        (get("/v1/user").header("cookie", "a=b"), "the header cookie was forwarded"),
        (get("/v1/user").header("proxy-authorization", "x"), "the header proxy-authorization was forwarded"),
        (get("/v1/user").header("xi_api_key", "x"), "the header xi_api_key was forwarded"),
        (get("/v1/user").key("sk"), "more than one value of xi-api-key was forwarded"),
        (get("/v1/user?a=1&xi_api_key=x"), "the query parameter xi_api_key was forwarded"),
        (get("/v1/user?XI-Api%2Dkey=x"), "the query parameter xi-api-key was forwarded"),
        (get("/v1/user?authorization"), "the query parameter authorization was forwarded"),
        (
            get("/v1/user").header("sec-websocket-protocol", "convai, bearer.x"),
            "a bearer token was forwarded as a WebSocket subprotocol",
        ),
        (
            get("/v1/user").header("user-agent", secret),
            "forbidden text 2 of 2 was forwarded in the header user-agent",
        ),
        (
            get(&format!("/v1/user?a={secret}")),
            "forbidden text 2 of 2 was forwarded in the path or the query",
        ),
        (
            get("/v1/user?a=client%2Dsecret-42"),
            "forbidden text 2 of 2 was forwarded in the path or the query",
        ),
    ];
    let case_count = cases.len();
    for (call, expected) in cases {
        let reply = call.key("sk").send_to(&simulator).await;
        let message = format!(r#"{{"detail":{{"status":"simulator_violation","message":"{expected}"}}}}"#);
        assert_eq!((reply.status, reply.text()), (599, message.as_str()));
        assert_eq!(simulator.ledger().violations.last().unwrap(), &format!("GET: {expected}"));
    }
    assert_eq!(usize::try_from(simulator.ledger().totals.violations).unwrap(), case_count);
    assert!(!format!("{:?}", simulator.ledger()).contains(secret), "the ledger must not contain the secret");
    assert_eq!(
        get("/v1/user").key("unknown").send_to(&simulator).await.status,
        401,
        "a wrong key must not be a violation"
    );
}

#[tokio::test]
async fn another_process_can_parse_the_ledger() {
    let simulator = start_with_keys("sk=100").await;
    speech_call("hello").key("sk").send_to(&simulator).await;
    speech_call("hello").key("unknown-key").send_to(&simulator).await;
    let reply = get("/_simulator/ledger").send_to(&simulator).await;
    let ledger: Ledger = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(ledger, simulator.ledger());
    assert_eq!((ledger.totals.requests, ledger.totals.served, ledger.totals.refused), (2, 1, 1));
    assert_eq!(ledger.requests[1].key.as_deref(), Some("unknown"));
    let key = ledger.key("sk").unwrap();
    assert_eq!((key.requests, key.served, key.charged, key.remaining), (1, 1, 5, 95));
}

#[tokio::test]
async fn faults_can_be_set_from_another_process() {
    let simulator = start_with_keys("sk=100").await;
    let post_faults = |body: &'static str| post("/_simulator/faults", body).send_to(&simulator);
    assert_eq!(
        post_faults(r#"{"key":"sk","always":"quota","next":["maintenance","pass"]}"#).await.status,
        200
    );
    let mut statuses = Vec::new();
    for _ in 0..3 {
        statuses.push(speech_call("a").key("sk").send_to(&simulator).await.status);
    }
    assert_eq!(post_faults(r#"{"key":"sk","next":["server_error"]}"#).await.status, 200);
    assert_eq!(post_faults(r#"{"key":"sk","always":null}"#).await.status, 200);
    for _ in 0..2 {
        statuses.push(speech_call("a").key("sk").send_to(&simulator).await.status);
    }
    assert_eq!(statuses, [503, 200, 401, 500, 200]);

    // A fault of a route applies to one key or to all requests.
    let fault_of_key = r#"{"key":"sk","route":"/v1/user","always":"server_error"}"#;
    assert_eq!(post_faults(fault_of_key).await.status, 200);
    let fault_of_all = r#"{"key":"*","route":"GET /v1/models","always":"maintenance"}"#;
    assert_eq!(post_faults(fault_of_all).await.status, 200);
    let request_status = async |path: &str| get(path).key("sk").send_to(&simulator).await.status;
    assert_eq!(
        (
            request_status("/v1/user").await,
            request_status("/v1/models").await,
            request_status("/v1/voices").await
        ),
        (500, 503, 200)
    );

    for (body, expected) in [
        (r#"{"key":"other"}"#, "no such key"),
        (r#"{"key":"*","always":"quota"}"#, "needs a route"),
        (r#"{"key":"sk","next":["server_error","nonsense"]}"#, "`nonsense` is not a refusal"),
        (r#"{"key":"sk","alway":null}"#, "unknown field"),
        ("", "EOF"),
    ] {
        let reply = post_faults(body).await;
        assert_eq!(reply.status, 400);
        assert!(reply.text().contains(expected), "the error must contain {expected:?}: {}", reply.text());
    }
    assert_eq!(
        speech_call("a").key("sk").send_to(&simulator).await.status,
        200,
        "an invalid request must not change the faults"
    );
    assert_eq!(get("/_simulator/else").send_to(&simulator).await.status, 404);
}

#[tokio::test]
async fn only_the_last_thousand_requests_are_recorded() {
    let simulator = start_with_keys("sk=100").await;
    for index in 0..1_005 {
        get(&format!("/v1/simulator/echo?{index}")).send_to(&simulator).await;
    }
    let ledger = simulator.ledger();
    assert_eq!((ledger.totals.requests, ledger.requests.len()), (1_005, 1_000));
    assert_eq!(ledger.requests[0].path_and_query, "/v1/simulator/echo?5");
}

#[tokio::test]
async fn a_contradictory_plan_does_not_start() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = Simulator::start(listener, Plan::with_keys([("a", 1), ("a", 2)])).await.unwrap_err();
    let source = error.get_ref().and_then(|source| source.downcast_ref::<PlanError>());
    assert_eq!(source, Some(&PlanError::DuplicateKey { position: 2 }));
}

#[tokio::test]
async fn a_dropped_simulator_ends_its_connections() {
    use tokio::io::AsyncReadExt;
    let simulator = start_with_keys("sk=100").await;
    let mut stream = TcpStream::connect(simulator.address()).await.unwrap();
    drop(simulator);
    let mut remaining_response = Vec::new();
    let read_result = tokio::time::timeout(RESPONSE_TIMEOUT, stream.read_to_end(&mut remaining_response))
        .await
        .expect("the connection must end in time");
    assert!(remaining_response.is_empty(), "no response must arrive: {read_result:?}");
}
