//! Defines the key with which the mirror writes to Supabase, and detects its form. The type is separate from
//! [`ApiKey`](super::ApiKey), because the key is sent to a different host in different headers, and a key without write
//! access must be rejected.

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

/// A Supabase key that bypasses row-level security. `Debug` prints no part of the key.
#[derive(Clone)]
pub struct SupabaseKey {
    value: Arc<str>,
    form: SupabaseKeyForm,
}

/// The form of a Supabase key, which determines the headers in which the key is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SupabaseKeyForm {
    /// A secret key, `sb_secret_…`, which is sent only in `apikey`. In `Authorization`, Supabase would parse
    /// the key as a JWT and reject it.
    SecretKey,
    /// A service role key, which is an older form and a JWT. It is sent in `apikey` and in `Authorization`.
    LegacyJwt,
}

/// The reason why a configured value is not a valid Supabase key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSupabaseKey {
    /// The value is empty, or contains characters that are invalid in a header.
    #[error("the key is empty or has an invalid character")]
    NotVisibleAscii,
    /// The value starts with `sb_publishable_`.
    #[error("this is a publishable key: it is for web pages and has no write access to the mirrored tables")]
    Publishable,
    /// The value is a JWT for the role `anon`.
    #[error("this is the anon key: it is for web pages and has no write access to the mirrored tables")]
    Anon,
    /// The value is a JWT for a role other than `service_role` and `anon`.
    #[error(
        "this is a token of a role other than service_role: it has no write access to the mirrored tables"
    )]
    OtherRole,
}

impl SupabaseKey {
    /// Validates a configured key. `default_form` applies if the form cannot be detected from the value.
    ///
    /// # Errors
    ///
    /// Fails if the key is invalid in a header, or belongs to a role without write access.
    pub fn new(value: &str, default_form: SupabaseKeyForm) -> Result<Self, InvalidSupabaseKey> {
        if !super::is_visible_ascii(value) {
            return Err(InvalidSupabaseKey::NotVisibleAscii);
        }
        if value.starts_with("sb_publishable_") {
            return Err(InvalidSupabaseKey::Publishable);
        }
        let form = match jwt_role(value) {
            _ if value.starts_with("sb_secret_") => SupabaseKeyForm::SecretKey,
            None => default_form,
            Some(role) if role == "service_role" => SupabaseKeyForm::LegacyJwt,
            Some(role) if role == "anon" => return Err(InvalidSupabaseKey::Anon),
            Some(_) => return Err(InvalidSupabaseKey::OtherRole),
        };
        Ok(Self { value: value.into(), form })
    }

    /// Returns the plain text of the key. Use it only in the headers of the mirror's requests.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.value
    }

    /// Returns the form, which determines the headers in which the key is sent.
    #[must_use]
    pub fn form(&self) -> SupabaseKeyForm {
        self.form
    }
}

impl fmt::Debug for SupabaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SupabaseKey(...)")
    }
}

/// Returns the role in a JWT, or `None` if `token` is not a JWT with a role. The signature is not verified,
/// because the role serves only to detect that the operator configured the wrong key.
fn jwt_role(token: &str) -> Option<String> {
    let mut jwt_parts = token.split('.');
    let (Some(_), Some(claims), Some(_), None) =
        (jwt_parts.next(), jwt_parts.next(), jwt_parts.next(), jwt_parts.next())
    else {
        return None;
    };
    let claims: Value = serde_json::from_slice(&decode_base64url(claims)?).ok()?;
    claims.get("role")?.as_str().map(str::to_owned)
}

/// Decodes base64url. Also accepts padding and the characters of standard base64. Returns `None` if `encoded` contains
/// any other character.
fn decode_base64url(encoded: &str) -> Option<Vec<u8>> {
    let (mut bits, mut bit_count) = (0_u32, 0);
    let mut decoded = Vec::with_capacity(encoded.len());
    for digit in encoded.trim_end_matches('=').bytes() {
        let six_bits = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'-' | b'+' => 62,
            b'_' | b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(six_bits);
        bit_count += 6;
        if bit_count >= 8 {
            bit_count -= 8;
            decoded.push(u8::try_from(bits >> bit_count & 0xff).ok()?);
        }
    }
    Some(decoded)
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

    /// Asserts the detected form of a key, or the reason why it is invalid.
    #[track_caller]
    fn assert_form(value: &str, expected: Result<SupabaseKeyForm, InvalidSupabaseKey>) {
        for default_form in [SupabaseKeyForm::SecretKey, SupabaseKeyForm::LegacyJwt] {
            assert_eq!(SupabaseKey::new(value, default_form).map(|key| key.form()), expected);
        }
    }

    #[test]
    fn the_form_is_detected_from_the_key() {
        assert_form("sb_secret_0123456789", Ok(SupabaseKeyForm::SecretKey));
        assert_form(SERVICE_ROLE, Ok(SupabaseKeyForm::LegacyJwt));
    }

    #[test]
    fn a_key_of_unknown_form_has_the_default_form() {
        for form in [SupabaseKeyForm::SecretKey, SupabaseKeyForm::LegacyJwt] {
            for value in ["opaque", "a.b.c", "a.eyJyb2xlIjox.c", "a.e30.c", "a.b.c.d"] {
                assert_eq!(
                    SupabaseKey::new(value, form).unwrap().form(),
                    form,
                    "the key {value} must have the default form"
                );
            }
        }
    }

    #[test]
    fn keys_without_write_access_are_rejected() {
        assert_form("sb_publishable_0123456789", Err(InvalidSupabaseKey::Publishable));
        assert_form(ANON_ROLE, Err(InvalidSupabaseKey::Anon));
        assert_form(AUTHENTICATED_ROLE, Err(InvalidSupabaseKey::OtherRole));
    }

    #[test]
    fn a_key_that_is_invalid_in_a_header_is_rejected() {
        for value in ["", "a b", "a\r\nb", "\u{e9}"] {
            assert_form(value, Err(InvalidSupabaseKey::NotVisibleAscii));
        }
    }

    #[test]
    fn debug_does_not_print_a_supabase_key() {
        let key = SupabaseKey::new("sb_secret_0123456789", SupabaseKeyForm::SecretKey).unwrap();
        assert_eq!(format!("{key:?} {key:#?}"), "SupabaseKey(...) SupabaseKey(...)");
    }
}
