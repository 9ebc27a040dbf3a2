//! Parses the fields of HTML forms and the parameters of queries, and reads a form from the body of a request.

use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderMap};
use hyper::body::Body;
use serde_json::{Map, Value};

use crate::admin::{BodyError, read_body};
use crate::policy::headers::decode_parameters;

/// Maximum size of a form in bytes. The longest form contains a key and a few names.
const MAX_FORM_BYTES: usize = 16 * 1024;

/// The fields of a form or the parameters of a query.
#[derive(Default)]
pub(super) struct Form(Vec<(String, String)>);

/// The reason why a form cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FormError {
    /// The media type of the request is not that of a form.
    MediaType,
    /// The body is too large, incomplete or malformed, or does not arrive in time.
    Body(BodyError),
}

impl FormError {
    /// Returns the status of the response.
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Body(BodyError::TooLarge) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Body(BodyError::Broken) => StatusCode::BAD_REQUEST,
            Self::Body(BodyError::Timeout) => StatusCode::REQUEST_TIMEOUT,
        }
    }

    /// Returns the text of the response.
    pub(super) fn message(self) -> &'static str {
        match self {
            Self::MediaType => "Send the form as application/x-www-form-urlencoded.\n",
            Self::Body(BodyError::TooLarge) => "The form is too large.\n",
            Self::Body(BodyError::Broken) => "The form ended early.\n",
            Self::Body(BodyError::Timeout) => "The form did not arrive in time.\n",
        }
    }
}

impl Form {
    /// Parses and decodes `application/x-www-form-urlencoded` text.
    pub(super) fn parse(text: &str) -> Self {
        Self(decode_parameters(text))
    }

    /// Returns the trimmed value of the first field with this name, or `None` if it is empty or missing.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        let field = self.0.iter().find(|(known, _)| known == name);
        field.map(|(_, value)| value.trim()).filter(|value| !value.is_empty())
    }

    /// Returns the values of these fields as JSON members for the admin API. Empty fields are left out.
    pub(super) fn members(&self, names: &[&str]) -> Map<String, Value> {
        let member = |name: &&str| Some(((*name).to_owned(), Value::from(self.value(name)?)));
        names.iter().filter_map(member).collect()
    }
}

/// Reads a form from the body of a request within `timeout`.
pub(super) async fn read_form<B>(headers: &HeaderMap, body: B, timeout: Duration) -> Result<Form, FormError>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let media_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim();
    if !media_type.eq_ignore_ascii_case("application/x-www-form-urlencoded") {
        return Err(FormError::MediaType);
    }
    let body = read_body(body, MAX_FORM_BYTES, timeout).await.map_err(FormError::Body)?;
    Ok(Form::parse(&String::from_utf8_lossy(&body)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_decoded_and_trimmed() {
        let form = Form::parse("name=+a%26b%2B1+&empty=&name=second&flag");
        assert_eq!(
            (form.value("name"), form.value("empty"), form.value("flag")),
            (Some("a&b+1"), None, None)
        );
        assert_eq!(Value::Object(form.members(&["name", "empty"])), serde_json::json!({"name": "a&b+1"}));
    }
}
