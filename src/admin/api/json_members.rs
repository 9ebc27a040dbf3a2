//! Parses the members of a JSON request body. Errors name the member and never its value, which may be a secret.

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::policy::quantity::duration;
use crate::policy::similar::find_similar;
use crate::policy::units::UnixMs;

/// The members of a JSON object.
#[derive(Default)]
pub(super) struct JsonMembers(Map<String, Value>);

impl JsonMembers {
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(members)) => Ok(Self(members)),
            Ok(_) => Err(ApiError::bad_request("malformed_json", "The body must be a JSON object.")),
            // The message of the parser may contain a part of the body.
            Err(error) => {
                let position = format!("line {}, column {}", error.line(), error.column());
                Err(ApiError::bad_request("malformed_json", format!("The body is not JSON: {position}.")))
            }
        }
    }

    /// Wraps the members of an object.
    pub(super) fn new(members: Map<String, Value>) -> Self {
        Self(members)
    }

    /// Rejects members that are not in `names`.
    pub(super) fn check(&self, names: &[&str]) -> Result<(), ApiError> {
        match self.0.keys().find(|name| !names.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let message = format!("The body has an unknown member.{}", did_you_mean(name, names));
                Err(ApiError::bad_request("unknown_member", message))
            }
        }
    }

    /// Returns the value of a member, unless it is `null`.
    fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Returns whether a member is `null`, for members in which `null` has a meaning.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(Value::is_null)
    }

    /// Returns a string.
    pub(super) fn string(&self, name: &str) -> Result<Option<String>, ApiError> {
        let string = |value: &Value| value.as_str().map(str::to_owned);
        self.value(name).map(|value| string(value).ok_or_else(|| wrong_type(name, "a string"))).transpose()
    }

    /// Returns a string that must be present.
    pub(super) fn required_string(&self, name: &str) -> Result<String, ApiError> {
        let missing_error =
            || ApiError::bad_request("missing_member", format!("The body needs the member `{name}`."));
        self.string(name)?.filter(|text| !text.is_empty()).ok_or_else(missing_error)
    }

    /// Returns a number from 0.
    pub(super) fn number(&self, name: &str) -> Result<Option<u32>, ApiError> {
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        let expected = "a whole number from 0 to 4294967295";
        self.value(name).map(|value| number(value).ok_or_else(|| wrong_type(name, expected))).transpose()
    }

    /// Returns `true` or `false`.
    pub(super) fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let type_error = || wrong_type(name, "true or false");
        self.value(name).map(|value| value.as_bool().ok_or_else(type_error)).transpose()
    }

    /// Returns a list of strings.
    pub(super) fn strings(&self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        let strings = |value: &Value| -> Option<Vec<String>> {
            value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        };
        let type_error = || wrong_type(name, "a list of strings");
        self.value(name).map(|value| strings(value).ok_or_else(type_error)).transpose()
    }

    /// Returns a duration such as `2h`.
    pub(super) fn duration(&self, name: &str) -> Result<Option<std::time::Duration>, ApiError> {
        let expected = "a duration such as \"2h\"";
        let parse = |text: String| duration::parse(&text).map_err(|_| wrong_type(name, expected));
        self.string(name)?.map(parse).transpose()
    }

    /// Returns a time in the future: a timestamp, or a duration from `now` on.
    pub(super) fn future_time(&self, name: &str, now: UnixMs) -> Result<Option<UnixMs>, ApiError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        let time = UnixMs::parse(&text).or_else(|| Some(now.plus(duration::parse(&text).ok()?)));
        let expected = "a time in the future such as \"2026-12-01T00:00:00Z\", or a duration such as \"2h\"";
        time.filter(|time| *time > now).map(Some).ok_or_else(|| wrong_type(name, expected))
    }
}

fn wrong_type(name: &str, expected: &str) -> ApiError {
    ApiError::bad_request("invalid_member", format!("The member `{name}` must be {expected}."))
}

/// Returns a sentence that suggests the similar one of `names`, or lists all of them. The unknown name itself is not
/// repeated, because it may be a secret that was sent by mistake.
pub(super) fn did_you_mean(name: &str, names: &[&str]) -> String {
    match find_similar(name, names.iter().copied()) {
        Some(similar) => format!(" Did you mean `{similar}`?"),
        None if names.is_empty() => " None is allowed here.".to_owned(),
        None => format!(" Known ones are: {}.", names.join(", ")),
    }
}
