//! Holds the user and password for a forward proxy, and encodes them for `proxy-authorization`. Their type is
//! separate from the keys of the provider, because they are sent to another host, before any request.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// A user and a password. `Debug` prints neither.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyCredentials {
    user: Arc<str>,
    password: Arc<str>,
}

impl ProxyCredentials {
    /// Stores a user and a password, both decoded.
    #[must_use]
    pub fn new(user: &str, password: &str) -> Self {
        Self { user: user.into(), password: password.into() }
    }

    /// Returns the user, for the handshake with the forward proxy only.
    #[must_use]
    pub fn expose_user(&self) -> &str {
        &self.user
    }

    /// Returns the password, for the handshake with the forward proxy only.
    #[must_use]
    pub fn expose_password(&self) -> &str {
        &self.password
    }

    /// Returns the credentials of the scheme `Basic` in `proxy-authorization` (RFC 7617): user and password in base64,
    /// which anyone can decode.
    #[must_use]
    pub fn expose_basic(&self) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(format!("{}:{}", self.user, self.password)))
    }
}

impl fmt::Debug for ProxyCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProxyCredentials(...)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_prints_neither_user_nor_password() {
        let credentials = ProxyCredentials::new("alice", "hunter2");
        assert_eq!(
            format!("{credentials:?} {credentials:#?}"),
            "ProxyCredentials(...) ProxyCredentials(...)"
        );
    }

    #[test]
    fn basic_credentials_equal_the_examples_of_rfc_7617() {
        // The example of RFC 7617, section 2, and the example with characters beyond ASCII (section 2.1).
        let basic = |user, password| ProxyCredentials::new(user, password).expose_basic();
        assert_eq!(basic("Aladdin", "open sesame"), "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(basic("test", "123\u{a3}"), "Basic dGVzdDoxMjPCow==");
    }
}
