//! Reads the parts of a request to the admin API: the query, the conditions `If-Match` and `If-None-Match`, and the
//! body. The dashboard compares entity tags and reads the bodies of its forms with the same functions.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, IF_MATCH};
use http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body;

use super::error::ApiError;
use super::etag;
use super::json_members::{JsonMembers, suggestion};
use crate::policy::headers::decode_parameters;

/// Maximum size of a body in bytes. Usual bodies contain a key or the rules of a client, and are far smaller.
const MAX_BODY_BYTES: usize = 64 * 1024;

/// The parameters of a query.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses a query, with percent-decoding.
    pub(super) fn parse(query: Option<&str>) -> Self {
        Self(decode_parameters(query.unwrap_or_default()))
    }

    /// Returns an error if a parameter is not in `names` or is repeated.
    pub(super) fn validate_names(&self, names: &[&str]) -> Result<(), ApiError> {
        for (index, (name, _)) in self.0.iter().enumerate() {
            if !names.contains(&name.as_str()) {
                let message = format!("The query has an unknown parameter.{}", suggestion(name, names));
                return Err(ApiError::bad_request("unknown_parameter", message));
            }
            if self.0[..index].iter().any(|(earlier, _)| earlier == name) {
                let message = format!("The query has `{name}` more than once.");
                return Err(ApiError::bad_request("repeated_parameter", message));
            }
        }
        Ok(())
    }

    /// Returns the value of a parameter, unless it is empty.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        let parameter = self.0.iter().find(|(parameter_name, _)| parameter_name == name);
        parameter.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }
}

/// Returns whether a list of entity tags contains `tag`, or is `*`.
pub(crate) fn contains_tag(list: &HeaderValue, tag: &HeaderValue) -> bool {
    let Ok(list) = list.to_str() else { return false };
    list.split(',').map(str::trim).any(|listed| {
        listed == "*" || listed.strip_prefix("W/").unwrap_or(listed).as_bytes() == tag.as_bytes()
    })
}

/// Returns the generation that `If-Match` requires, or `None` if every generation is permitted.
pub(super) fn expected_generation(headers: &HeaderMap, current: u64) -> Result<Option<u64>, ApiError> {
    let Some(condition) = headers.get(IF_MATCH) else { return Ok(None) };
    let malformed = || {
        let message = "If-Match must be the ETag of an earlier response, such as \"12\".";
        ApiError::bad_request("malformed_if_match", message)
    };
    let text = condition.to_str().map_err(|_| malformed())?.trim();
    if text == "*" {
        return Ok(None);
    }
    if contains_tag(condition, &etag(current)) {
        return Ok(Some(current));
    }
    let digits = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).ok_or_else(malformed)?;
    digits.parse().map(Some).map_err(|_| malformed())
}

/// The reason why the body of a request cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyError {
    /// The body is longer than the maximum.
    TooLarge,
    /// The body ended early or was malformed.
    Broken,
    /// The body did not arrive within the timeout.
    Timeout,
}

/// Reads a complete body of at most `max_bytes` within `timeout`.
pub(crate) async fn read_body<B>(body: B, max_bytes: usize, timeout: Duration) -> Result<Bytes, BodyError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match tokio::time::timeout(timeout, Limited::new(body, max_bytes).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(BodyError::TooLarge),
        Ok(Err(_)) => Err(BodyError::Broken),
        Err(_) => Err(BodyError::Timeout),
    }
}

/// Reads a JSON object from the body. An empty body is an empty object.
pub(super) async fn read_members<B>(head: &Parts, body: B, timeout: Duration) -> Result<JsonMembers, ApiError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let body = read_body(body, MAX_BODY_BYTES, timeout).await.map_err(|error| match error {
        BodyError::TooLarge => ApiError::body_too_large(MAX_BODY_BYTES),
        BodyError::Broken => {
            let message = "The request body ended early or was malformed.";
            ApiError::bad_request("request_body_broken", message)
        }
        BodyError::Timeout => ApiError::body_timeout(),
    })?;
    if body.is_empty() {
        return Ok(JsonMembers::default());
    }
    let media_type = head.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/json") {
        return Err(ApiError::media_type());
    }
    JsonMembers::parse(&body)
}
