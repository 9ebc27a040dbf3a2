//! Supabase's service key. Separate from [`ApiKey`](super::ApiKey): it is sent to another host in
//! other headers, and some keys of similar form must not be used at all.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

/// A key that bypasses row level security. Never printed, not even in part.
#[derive(Clone)]
pub struct ServiceKey {
    value: Arc<str>,
    form: ServiceKeyForm,
}

/// The headers in which a service key is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKeyForm {
    /// `sb_secret_…`: in `apikey` only. In `Authorization` it would be parsed as a token and
    /// refused.
    Secret,
    /// The older service role key, a signed token: in `apikey` and in `Authorization`.
    Token,
}

/// The reason why a text is no usable service key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnusableServiceKey {
    /// It contains characters that are invalid in a header.
    #[error("the key is empty or has an invalid character")]
    NotVisibleAscii,
    /// `sb_publishable_…`.
    #[error("this is a publishable key: it is for web pages and may not write what the mirror writes")]
    Publishable,
    /// A token of the role `anon`.
    #[error("this is the anon key: it is for web pages and may not write what the mirror writes")]
    Anon,
    /// A token of another role.
    #[error("this is a token of another role than service_role: it may not write what the mirror writes")]
    OtherRole,
}

impl ServiceKey {
    /// Validates a configured key. `default_form` is its form if the text does not show it.
    ///
    /// # Errors
    ///
    /// When it is invalid in a header, or belongs to a role without write access.
    pub fn new(value: &str, default_form: ServiceKeyForm) -> Result<Self, UnusableServiceKey> {
        if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(UnusableServiceKey::NotVisibleAscii);
        }
        if value.starts_with("sb_publishable_") {
            return Err(UnusableServiceKey::Publishable);
        }
        let form = match role(value) {
            _ if value.starts_with("sb_secret_") => ServiceKeyForm::Secret,
            Some(role) => match role.as_str() {
                "service_role" => ServiceKeyForm::Token,
                "anon" => return Err(UnusableServiceKey::Anon),
                _ => return Err(UnusableServiceKey::OtherRole),
            },
            None => default_form,
        };
        Ok(Self { value: value.into(), form })
    }

    /// The plain text of the key, only for the headers of the mirror's requests.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.value
    }

    /// The headers in which it is sent.
    #[must_use]
    pub fn form(&self) -> ServiceKeyForm {
        self.form
    }
}

impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServiceKey(...)")
    }
}

/// The role of a signed token (a JWT). The signature is not verified: this only detects confused
/// keys.
fn role(token: &str) -> Option<String> {
    let mut parts = token.split('.');
    let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let claims: Value = serde_json::from_slice(&base64url(claims)?).ok()?;
    claims.get("role")?.as_str().map(str::to_owned)
}

fn base64url(text: &str) -> Option<Vec<u8>> {
    let (mut bits, mut count) = (0_u32, 0);
    let mut bytes = Vec::with_capacity(text.len());
    for letter in text.trim_end_matches('=').bytes() {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'-' | b'+' => 62,
            b'_' | b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    // {"alg":"HS256","typ":"JWT"} and {"role":…}, with a made-up signature.
    const SERVICE: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl";
    const ANON: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoiYW5vbiJ9.c2lnbmF0dXJl";
    const USER: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoiYXV0aGVudGljYXRlZCJ9.c2lnbmF0dXJl";

    #[track_caller]
    fn check(value: &str, expected: Result<ServiceKeyForm, UnusableServiceKey>) {
        for default_form in [ServiceKeyForm::Secret, ServiceKeyForm::Token] {
            assert_eq!(ServiceKey::new(value, default_form).map(|key| key.form()), expected);
        }
    }

    #[test]
    fn a_key_with_a_known_form_has_that_form() {
        check("sb_secret_0123456789", Ok(ServiceKeyForm::Secret));
        check(SERVICE, Ok(ServiceKeyForm::Token));
    }

    #[test]
    fn a_key_without_a_known_form_is_sent_as_configured() {
        for form in [ServiceKeyForm::Secret, ServiceKeyForm::Token] {
            for value in ["opaque", "a.b.c", "a.eyJyb2xlIjox.c", "a.e30.c", "a.b.c.d"] {
                assert_eq!(ServiceKey::new(value, form).unwrap().form(), form, "{value}");
            }
        }
    }

    #[test]
    fn keys_for_web_pages_are_refused() {
        check("sb_publishable_0123456789", Err(UnusableServiceKey::Publishable));
        check(ANON, Err(UnusableServiceKey::Anon));
        check(USER, Err(UnusableServiceKey::OtherRole));
    }

    #[test]
    fn a_text_that_is_invalid_in_a_header_is_refused() {
        for value in ["", "a b", "a\r\nb", "\u{e9}"] {
            check(value, Err(UnusableServiceKey::NotVisibleAscii));
        }
    }

    #[test]
    fn a_service_key_cannot_be_printed() {
        let key = ServiceKey::new("sb_secret_0123456789", ServiceKeyForm::Secret).unwrap();
        assert_eq!(format!("{key:?} {key:#?}"), "ServiceKey(...) ServiceKey(...)");
    }
}
