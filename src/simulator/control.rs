//! The simulator's own paths, for tests in another process. They are not under `/v1`, so that no
//! rule of a proxy for the provider's paths applies to them, and need no key.

use http::request::Parts;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::json;

use super::answer::Answer;
use super::fault::Fault;
use super::intake::Intake;
use super::world::{Whose, World};

/// Stands for every request, with any key or without one.
const EVERY_KEY: &str = "*";
/// The prefix of these paths.
pub(super) const PREFIX: &str = "/_simulator/";

/// `{"key": "...", "route": "POST /v1/voices", "always": "quota", "next": ["quota", "stall=200ms"]}`.
/// Without `route` the faults apply to all routes of the key; the key `*` stands for every request and
/// requires a route.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    key: String,
    #[serde(default)]
    route: Option<String>,
    /// An absent field changes nothing; null removes the fault.
    #[serde(default, deserialize_with = "present")]
    always: Option<Option<String>>,
    #[serde(default)]
    next: Vec<String>,
}

/// Distinguishes a null from an absent field.
fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Option<String>>, D::Error> {
    Deserialize::deserialize(value).map(Some)
}

/// Handles a request to one of these paths.
pub(super) fn answer(world: &World, parts: &Parts, intake: &Intake) -> Answer {
    let path = parts.uri.path().strip_prefix(PREFIX).unwrap_or_default();
    match (&parts.method, path) {
        (&Method::GET, "ledger") => match serde_json::to_value(world.ledger()) {
            Ok(ledger) => Answer::document(&ledger),
            Err(error) => mistake(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        },
        (&Method::POST, "faults") => match set_faults(world, intake) {
            Ok(()) => Answer::document(&json!({ "ok": true })),
            Err(message) => mistake(StatusCode::BAD_REQUEST, &message),
        },
        _ => mistake(StatusCode::NOT_FOUND, "there is GET /_simulator/ledger and POST /_simulator/faults"),
    }
}

/// Sets the faults; a mistake anywhere in the body changes nothing.
fn set_faults(world: &World, intake: &Intake) -> Result<(), String> {
    let body = intake.kept.as_deref().unwrap_or_default();
    let order: Order = serde_json::from_slice(body).map_err(|error| error.to_string())?;
    let read = |text: &String| text.parse::<Fault>().map_err(|error| error.to_string());
    let next = order.next.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let always = order.always.map(|always| always.as_ref().map(read).transpose()).transpose()?;
    let route = order.route.as_deref();
    let whose = if order.key == EVERY_KEY { Whose::EveryKey } else { Whose::Key(&order.key) };
    if matches!(whose, Whose::EveryKey) && route.is_none() {
        return Err("the key `*` needs a route".to_owned());
    }
    let is_known = world.with_script(whose, |script| {
        script.add(route, next);
        if let Some(always) = always {
            script.set(route, always);
        }
    });
    if is_known { Ok(()) } else { Err("the plan has no such key".to_owned()) }
}

fn mistake(status: StatusCode, message: &str) -> Answer {
    let mut answer = Answer::document(&json!({ "error": message }));
    answer.status = status;
    answer
}
