//! Compares `docs/openapi.json` with the admin API: each documented path has exactly the documented methods, each
//! response has a documented status and matches its schema, and so do errors and events.

use super::*;
use crate::support::events::EventReader;
use serde_json::json;

/// Returns the OpenAPI document.
fn openapi_document() -> Value {
    serde_json::from_str(include_str!("../../../docs/openapi.json")).unwrap()
}

/// Follows a reference within the document.
fn resolve_reference<'d>(document: &'d Value, value: &'d Value) -> &'d Value {
    match value.get("$ref").and_then(Value::as_str) {
        Some(reference) => {
            document.pointer(reference.trim_start_matches('#')).expect("the reference must exist")
        }
        None => value,
    }
}

/// Asserts that a response is documented for its operation, and that its body matches the schema.
async fn check_response(document: &Value, operation: &Value, description: &str, response: Response) {
    let status = response.status().as_u16().to_string();
    let documented = operation["responses"].get(&status);
    let documented = resolve_reference(
        document,
        documented.unwrap_or_else(|| panic!("{description}: the status {status} must be documented")),
    );
    if documented["content"].get("text/event-stream").is_some() {
        assert_eq!(
            response.headers()["content-type"],
            "text/event-stream",
            "{description}: the response must be a stream of events"
        );
        return check_events(document, EventReader::new(response)).await;
    }
    let body: Value = response.json().await.unwrap();
    let schema = &documented["content"]["application/json"]["schema"];
    check_schema(document, schema, &body, &format!("{description} {status}"));
}

/// Asserts that `body` matches `schema`, which may refer to the components of the document.
#[track_caller]
fn check_schema(document: &Value, schema: &Value, body: &Value, description: &str) {
    let schema = json!({"allOf": [schema], "components": document["components"]});
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<String> = validator.iter_errors(body).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{description}: the body must match its schema: {errors:?}\n{body:#}");
}

/// Asserts that the events of a snapshot match the schemas of their names.
async fn check_events(document: &Value, mut reader: EventReader) {
    for event in reader.take(3).await {
        let name = match &*event.name {
            "overview" => "Overview",
            "key" => "Key",
            other => panic!("a snapshot must not contain `{other}`"),
        };
        let schema = json!({"$ref": format!("#/components/schemas/{name}")});
        check_schema(document, &schema, &event.data, name);
    }
}

/// Returns a body that an operation accepts, or `None` if it needs no body.
fn valid_body(path: &str, method: &str) -> Option<Value> {
    match (path, method) {
        ("/keys", "post") => Some(json!({"name": "spare", "key": "sk_spare_00000000000000000000000001"})),
        ("/keys/{id}/pause", "post") => Some(json!({"until": "2h", "reason": "billing"})),
        ("/clients", "post") => Some(json!({"name": "phone", "quota": "5 requests"})),
        ("/clients/{name}", "patch") => Some(json!({"quota": ""})),
        ("/clients/{name}/rotate", "post") => Some(json!({"grace": "1h"})),
        _ => None,
    }
}

#[tokio::test]
async fn each_documented_path_has_exactly_the_documented_methods() {
    let document = openapi_document();
    let (proxy, _) = start_admin_proxy_with(|config| {
        config.clients[0].rules.quota = Some("10 requests per day".parse().unwrap());
    })
    .await;
    proxy.set_fault(SECOND_KEY, "missing_permissions");
    proxy.set_fault(FIRST_KEY, "invalid");
    proxy.request_speech(10).await;
    let id = key_id(FIRST_KEY);
    for (path, item) in document["paths"].as_object().unwrap() {
        let target = path.trim_start_matches('/').replace("{id}", &id).replace("{name}", "app");
        let documented: Vec<String> =
            item.as_object().unwrap().keys().filter(|name| *name != "parameters").cloned().collect();
        for method in ["get", "post", "put", "patch", "delete"] {
            let description = format!("{method} {path}");
            let http_method = method.to_uppercase().parse().unwrap();
            let token = if path == "/me" { CLIENT_TOKEN } else { ADMIN_TOKEN };
            let request = admin_request(&proxy, http_method, &target).bearer_auth(token);
            let request = match valid_body(path, method) {
                Some(body) => request.json(&body),
                None => request,
            };
            let response = request.send().await.unwrap();
            if documented.iter().any(|name| name == method) {
                assert_ne!(response.status(), 405, "{description}: the documented method must exist");
                check_response(&document, &item[method], &description, response).await;
            } else {
                assert_eq!(response.status(), 405, "{description}: an undocumented method must be refused");
                let allow_header = response.headers()["allow"].to_str().unwrap().to_lowercase();
                let mut allowed_methods: Vec<&str> =
                    allow_header.split(", ").filter(|name| *name != "head").collect();
                allowed_methods.sort_unstable();
                let mut expected: Vec<&str> = documented.iter().map(String::as_str).collect();
                expected.sort_unstable();
                assert_eq!(
                    allowed_methods, expected,
                    "{description}: the allowed methods must be the documented ones"
                );
            }
        }
    }
    proxy.close().await;
}

#[tokio::test]
async fn errors_and_filled_documents_match_their_schemas() {
    let document = openapi_document();
    let (proxy, _) = start_admin_proxy().await;
    proxy.request_speech(10).await;
    set_paused(&proxy, &[SECOND_KEY]);
    let operation = |path: &str, method: &str| document["paths"][path][method].clone();
    for (path, target) in [
        ("/keys", "keys".to_owned()),
        ("/keys/{id}", format!("keys/{}", key_id(SECOND_KEY))),
        ("/keys/{id}", "keys/000000000000".to_owned()),
        ("/usage", "usage?by=key".to_owned()),
        ("/usage", "usage?by=hour".to_owned()),
        ("/usage", "usage?by=model".to_owned()),
        ("/usage", "usage?by=user".to_owned()),
        ("/usage", "usage?by=region".to_owned()),
        ("/usage", "usage?by=nothing".to_owned()),
        ("/attempts", "attempts?failed=false".to_owned()),
    ] {
        let response = send(&proxy, Method::GET, &target, None).await;
        check_response(&document, &operation(path, "get"), &target, response).await;
    }
    let request_of_user = |user| {
        admin_request(&proxy, Method::GET, "me")
            .bearer_auth(CLIENT_TOKEN)
            .header("x-keychoir-user", user)
            .send()
    };
    for (user, status) in [("alice", 200), ("", 400)] {
        let response = request_of_user(user).await.unwrap();
        assert_eq!(
            response.status(),
            status,
            "the response about the user {user:?} must have the status {status}"
        );
        check_response(&document, &operation("/me", "get"), "me of a user", response).await;
    }
    let unauthorized = admin_request(&proxy, Method::GET, "keys").send().await.unwrap();
    check_response(&document, &operation("/keys", "get"), "without a token", unauthorized).await;
    let invalid = send(&proxy, Method::POST, "keys", Some(&json!({}))).await;
    check_response(&document, &operation("/keys", "post"), "without members", invalid).await;
    proxy.close().await;
}

#[tokio::test]
async fn events_match_their_schemas() {
    let document = openapi_document();
    let (proxy, _) = start_admin_proxy().await;
    let response = send(&proxy, Method::GET, "events", None).await;
    let mut reader = EventReader::new(response);
    proxy.request_speech(10).await;
    let request = reader.wait_for("request", |_| true).await;
    let schema = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    check_schema(&document, &schema("RequestEvent"), &request.data, "request");
    // The client of a request without a token is unknown.
    assert_eq!(proxy.client.get(format!("{}/v1/voices", proxy.url)).send().await.unwrap().status(), 401);
    let refused_event = reader.wait_for("request", |request| request["status"] == 401).await;
    check_schema(&document, &schema("RequestEvent"), &refused_event.data, "refused request");
    assert_eq!(refused_event.data["client"], json!(null));
    drop(reader);
    proxy.close().await;
}
