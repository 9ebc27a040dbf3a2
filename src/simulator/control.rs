//! Serves the simulator's control endpoints, with which tests in another process set faults and read the ledger. The
//! endpoints require no key. Their paths are not under `/v1`, so that a proxy does not apply its rules for the
//! provider's paths.

use http::request::Parts;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::json;

use super::fault::Fault;
use super::provider::{FaultTarget, Provider};
use super::request::ReceivedBody;
use super::response::ProviderResponse;

/// The key that stands for all requests, with any key or none.
const ALL_REQUESTS: &str = "*";
/// The path prefix of the control endpoints.
pub(super) const PREFIX: &str = "/_simulator/";

/// `{"key": "...", "route": "POST /v1/voices", "always": "quota", "next": ["quota", "stall=200ms"]}`.
/// Without `route`, the faults apply to all routes of the key. The key `*` matches every request and
/// requires a route.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultRequest {
    key: String,
    #[serde(default)]
    route: Option<String>,
    /// The permanent fault. An absent field changes nothing, and null removes the fault.
    #[serde(default, deserialize_with = "deserialize_present")]
    always: Option<Option<String>>,
    #[serde(default)]
    next: Vec<String>,
}

/// Distinguishes null from an absent field.
fn deserialize_present<'de, D: serde::Deserializer<'de>>(
    value: D,
) -> Result<Option<Option<String>>, D::Error> {
    Deserialize::deserialize(value).map(Some)
}

/// Responds to a request to a control endpoint.
pub(super) fn respond(provider: &Provider, parts: &Parts, received: &ReceivedBody) -> ProviderResponse {
    let path = parts.uri.path().strip_prefix(PREFIX).unwrap_or_default();
    match (&parts.method, path) {
        (&Method::GET, "ledger") => match serde_json::to_value(provider.ledger()) {
            Ok(ledger) => ProviderResponse::document(&ledger),
            Err(error) => error_response(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        },
        (&Method::POST, "faults") => match set_faults(provider, received) {
            Ok(()) => ProviderResponse::document(&json!({ "ok": true })),
            Err(message) => error_response(StatusCode::BAD_REQUEST, &message),
        },
        _ => error_response(
            StatusCode::NOT_FOUND,
            "the endpoints are GET /_simulator/ledger and POST /_simulator/faults",
        ),
    }
}

/// Sets the faults of the body. If any part of it is invalid, nothing changes.
fn set_faults(provider: &Provider, received: &ReceivedBody) -> Result<(), String> {
    let body = received.content.as_deref().unwrap_or_default();
    let request: FaultRequest = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let parse = |text: &String| text.parse::<Fault>().map_err(|error| error.to_string());
    let next = request.next.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let always = request.always.map(|always| always.as_ref().map(parse).transpose()).transpose()?;
    let route = request.route.as_deref();
    let target = match request.key.as_str() {
        ALL_REQUESTS if route.is_none() => return Err("the key `*` needs a route".to_owned()),
        ALL_REQUESTS => FaultTarget::AllRequests,
        key => FaultTarget::Key(key),
    };
    let is_key_known = provider.update_script(target, |script| {
        script.queue(route, next);
        if let Some(always) = always {
            script.set_permanent(route, always);
        }
    });
    if is_key_known { Ok(()) } else { Err("the plan has no such key".to_owned()) }
}

fn error_response(status: StatusCode, message: &str) -> ProviderResponse {
    ProviderResponse::document(&json!({ "error": message })).with_status(status)
}
