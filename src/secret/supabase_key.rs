//! The service key with which the mirror writes to Supabase. Its type is separate from
//! [`ApiKey`](super::ApiKey), because it is sent to another host in other headers, and keys without write
//! access must be rejected.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

/// A key that bypasses row-level security. `Debug` prints no part of it.
#[derive(Clone)]
pub struct ServiceKey {
    value: Arc<str>,
    form: ServiceKeyForm,
}

/// The form of a service key, which decides in which headers it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKeyForm {
    /// `sb_secret_…`, sent in `apikey` only. Supabase would parse it as a JWT in `Authorization`, and
    /// refuse it.
    Secret,
    /// The older service role key, a JWT, sent in `apikey` and in `Authorization`.
    Token,
}

/// Why a configured text is not a valid service key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidServiceKey {
    /// It is empty, or has characters that are invalid in a header.
    #[error("the key is empty or has an invalid character")]
    NotVisibleAscii,
    /// It starts with `sb_publishable_`.
    #[error("this is a publishable key: it is for web pages and has no write access to the mirrored tables")]
    Publishable,
    /// It is a JWT for the role `anon`.
    #[error("this is the anon key: it is for web pages and has no write access to the mirrored tables")]
    Anon,
    /// It is a JWT for a role other than `service_role` and `anon`.
    #[error(
        "this is a token of another role than service_role: it has no write access to the mirrored tables"
    )]
    OtherRole,
}

impl ServiceKey {
    /// Validates a configured key. `default_form` applies if the text does not reveal its form.
    ///
    /// # Errors
    ///
    /// Fails if the key is invalid in a header, or belongs to a role without write access.
    pub fn new(value: &str, default_form: ServiceKeyForm) -> Result<Self, InvalidServiceKey> {
        if value.is_empty() || !value.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(InvalidServiceKey::NotVisibleAscii);
        }
        if value.starts_with("sb_publishable_") {
            return Err(InvalidServiceKey::Publishable);
        }
        let form = match jwt_role(value) {
            _ if value.starts_with("sb_secret_") => ServiceKeyForm::Secret,
            Some(role) => match role.as_str() {
                "service_role" => ServiceKeyForm::Token,
                "anon" => return Err(InvalidServiceKey::Anon),
                _ => return Err(InvalidServiceKey::OtherRole),
            },
            None => default_form,
        };
        Ok(Self { value: value.into(), form })
    }

    /// The plain text of the key. Use it only in the headers of the mirror's requests.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.value
    }

    /// The form, which decides in which headers the key is sent.
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

/// Returns the role in a JWT. The signature is not verified, because the role only detects that the
/// operator configured the wrong key.
fn jwt_role(token: &str) -> Option<String> {
    let mut parts = token.split('.');
    let (Some(_), Some(claims), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let claims: Value = serde_json::from_slice(&decode_base64url(claims)?).ok()?;
    claims.get("role")?.as_str().map(str::to_owned)
}

fn decode_base64url(text: &str) -> Option<Vec<u8>> {
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

    // The header {"alg":"HS256","typ":"JWT"}, the claims {"role":…} and an invented signature.
    const SERVICE_ROLE: &str =
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl";
    const ANON_ROLE: &str = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoiYW5vbiJ9.c2lnbmF0dXJl";
    const AUTHENTICATED_ROLE: &str =
        "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJyb2xlIjoiYXV0aGVudGljYXRlZCJ9.c2lnbmF0dXJl";

    #[track_caller]
    fn check(value: &str, expected: Result<ServiceKeyForm, InvalidServiceKey>) {
        for default_form in [ServiceKeyForm::Secret, ServiceKeyForm::Token] {
            assert_eq!(ServiceKey::new(value, default_form).map(|key| key.form()), expected);
        }
    }

    #[test]
    fn the_form_is_detected_from_the_key() {
        check("sb_secret_0123456789", Ok(ServiceKeyForm::Secret));
        check(SERVICE_ROLE, Ok(ServiceKeyForm::Token));
    }

    #[test]
    fn a_key_of_unknown_form_has_the_default_form() {
        for form in [ServiceKeyForm::Secret, ServiceKeyForm::Token] {
            for value in ["opaque", "a.b.c", "a.eyJyb2xlIjox.c", "a.e30.c", "a.b.c.d"] {
                assert_eq!(ServiceKey::new(value, form).unwrap().form(), form, "{value}");
            }
        }
    }

    #[test]
    fn keys_without_write_access_are_rejected() {
        check("sb_publishable_0123456789", Err(InvalidServiceKey::Publishable));
        check(ANON_ROLE, Err(InvalidServiceKey::Anon));
        check(AUTHENTICATED_ROLE, Err(InvalidServiceKey::OtherRole));
    }

    #[test]
    fn a_key_that_is_invalid_in_a_header_is_rejected() {
        for value in ["", "a b", "a\r\nb", "\u{e9}"] {
            check(value, Err(InvalidServiceKey::NotVisibleAscii));
        }
    }

    #[test]
    fn debug_does_not_print_a_service_key() {
        let key = ServiceKey::new("sb_secret_0123456789", ServiceKeyForm::Secret).unwrap();
        assert_eq!(format!("{key:?} {key:#?}"), "ServiceKey(...) ServiceKey(...)");
    }
}
