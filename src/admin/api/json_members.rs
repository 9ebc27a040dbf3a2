//! Reads the members of a JSON request body as typed values, and suggests a similar name for an unknown member or
//! parameter. An error never contains a value, which may be a secret. A member whose value is `null` counts as absent,
//! except in [`JsonMembers::is_null`].

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::policy::quantity::duration;
use crate::policy::similar::find_similar;
use crate::policy::units::UnixMs;

/// The members of a JSON object.
#[derive(Default)]
pub(super) struct JsonMembers(Map<String, Value>);

impl JsonMembers {
    /// Parses a body, which must be a JSON object.
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

    /// Returns an error if a member is not in `names`.
    pub(super) fn reject_unknown(&self, names: &[&str]) -> Result<(), ApiError> {
        match self.0.keys().find(|name| !names.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let message = format!("The body has an unknown member.{}", suggestion(name, names));
                Err(ApiError::bad_request("unknown_member", message))
            }
        }
    }

    /// Returns the value of a member, unless it is `null`.
    fn value(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    /// Returns whether a member is `null`. In some members, `null` has another meaning than an absent member.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(Value::is_null)
    }

    /// Returns the string in a member, or `None` if the member is absent.
    pub(super) fn string(&self, name: &str) -> Result<Option<String>, ApiError> {
        let string = |value: &Value| value.as_str().map(str::to_owned);
        self.value(name).map(|value| string(value).ok_or_else(|| type_error(name, "a string"))).transpose()
    }

    /// Returns the string in a member, or an error if it is absent or empty.
    pub(super) fn required_string(&self, name: &str) -> Result<String, ApiError> {
        let missing_error =
            || ApiError::bad_request("missing_member", format!("The body needs the member `{name}`."));
        self.string(name)?.filter(|text| !text.is_empty()).ok_or_else(missing_error)
    }

    /// Returns the whole number in a member.
    pub(super) fn number(&self, name: &str) -> Result<Option<u32>, ApiError> {
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        let expected = "a whole number from 0 to 4294967295";
        self.value(name).map(|value| number(value).ok_or_else(|| type_error(name, expected))).transpose()
    }

    /// Returns the boolean in a member.
    pub(super) fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let not_boolean = || type_error(name, "true or false");
        self.value(name).map(|value| value.as_bool().ok_or_else(not_boolean)).transpose()
    }

    /// Returns the list of strings in a member.
    pub(super) fn strings(&self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        let strings = |value: &Value| -> Option<Vec<String>> {
            value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
        };
        let not_strings = || type_error(name, "a list of strings");
        self.value(name).map(|value| strings(value).ok_or_else(not_strings)).transpose()
    }

    /// Returns the duration in a member, such as `2h`.
    pub(super) fn duration(&self, name: &str) -> Result<Option<std::time::Duration>, ApiError> {
        let expected = "a duration such as \"2h\"";
        let parse = |text: String| duration::parse(&text).map_err(|_| type_error(name, expected));
        self.string(name)?.map(parse).transpose()
    }

    /// Returns the time in a member, which must be after `now`. The member contains a timestamp, or a duration after
    /// `now`.
    pub(super) fn future_time(&self, name: &str, now: UnixMs) -> Result<Option<UnixMs>, ApiError> {
        let Some(text) = self.string(name)? else { return Ok(None) };
        let time = UnixMs::parse(&text).or_else(|| Some(now.plus(duration::parse(&text).ok()?)));
        let expected = "a time in the future such as \"2026-12-01T00:00:00Z\", or a duration such as \"2h\"";
        time.filter(|time| *time > now).map(Some).ok_or_else(|| type_error(name, expected))
    }
}

/// Returns the error for a member that does not contain what is `expected`.
fn type_error(name: &str, expected: &str) -> ApiError {
    ApiError::bad_request("invalid_member", format!("The member `{name}` must be {expected}."))
}

/// Returns a sentence that suggests the one of `names` that is similar to `name`, or lists all `names`. It does not
/// contain `name`, which may be a secret that was sent by mistake.
pub(super) fn suggestion(name: &str, names: &[&str]) -> String {
    match find_similar(name, names.iter().copied()) {
        Some(similar) => format!(" Did you mean `{similar}`?"),
        None if names.is_empty() => " None is allowed here.".to_owned(),
        None => format!(" Known ones are: {}.", names.join(", ")),
    }
}
