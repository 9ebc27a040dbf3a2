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

/// The key in a fault request that stands for all requests, with any key or none.
const ALL_REQUESTS: &str = "*";
/// The path prefix of the control endpoints.
pub(super) const PREFIX: &str = "/_simulator/";

/// The body of a request that sets faults, for example:
///
/// `{"key": "sk_one", "route": "POST /v1/voices", "always": "quota", "next": ["quota", "stall=200ms"]}`
///
/// Without `route`, the faults apply to all routes of the key. The key `*` stands for all requests and requires a
/// route.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FaultRequest {
    key: String,
    #[serde(default)]
    route: Option<String>,
    #[serde(default, deserialize_with = "deserialize_change")]
    always: PermanentFaultChange,
    /// Faults that are appended to the queue.
    #[serde(default)]
    next: Vec<String>,
}

/// The change of a permanent fault.
#[derive(Default)]
enum PermanentFaultChange {
    /// The field is absent, and the fault stays.
    #[default]
    Keep,
    /// The field contains a fault, or null to remove the fault.
    Replace(Option<String>),
}

/// Deserializes a field that is present.
fn deserialize_change<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<PermanentFaultChange, D::Error> {
    Option::<String>::deserialize(deserializer).map(PermanentFaultChange::Replace)
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

/// Sets the faults that the body contains. If any part of it is invalid, nothing changes.
fn set_faults(provider: &Provider, received: &ReceivedBody) -> Result<(), String> {
    let body = received.content.as_deref().unwrap_or_default();
    let request: FaultRequest = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let parse = |text: &String| text.parse::<Fault>().map_err(|error| error.to_string());
    let queued_faults = request.next.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
    let new_permanent_fault = match &request.always {
        PermanentFaultChange::Keep => None,
        PermanentFaultChange::Replace(text) => Some(text.as_ref().map(parse).transpose()?),
    };
    let route = request.route.as_deref();
    let target = match request.key.as_str() {
        ALL_REQUESTS if route.is_none() => return Err("the key `*` needs a route".to_owned()),
        ALL_REQUESTS => FaultTarget::AllRequests,
        key => FaultTarget::Key(key),
    };
    let is_key_known = provider.update_script(target, |script| {
        script.queue(route, queued_faults);
        if let Some(fault) = new_permanent_fault {
            script.set_permanent(route, fault);
        }
    });
    if is_key_known { Ok(()) } else { Err("the plan has no such key".to_owned()) }
}

fn error_response(status: StatusCode, message: &str) -> ProviderResponse {
    ProviderResponse::document(&json!({ "error": message })).with_status(status)
}
