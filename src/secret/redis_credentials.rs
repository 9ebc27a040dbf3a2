//! Holds the user and password for Redis. Their type is separate from the keys of the provider, because they are sent
//! only to Redis.

use std::fmt;
use std::sync::Arc;

/// A password with an optional user. `Debug` prints neither.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisCredentials {
    user: Option<Arc<str>>,
    password: Arc<str>,
}

impl RedisCredentials {
    /// Stores a decoded password, and the decoded user if there is one.
    #[must_use]
    pub fn new(user: Option<&str>, password: &str) -> Self {
        Self { user: user.map(Into::into), password: password.into() }
    }

    /// Returns the user, for the handshake with Redis only. `None` means the user `default`.
    #[must_use]
    pub fn expose_user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// Returns the password, for the handshake with Redis only.
    #[must_use]
    pub fn expose_password(&self) -> &str {
        &self.password
    }
}

impl fmt::Debug for RedisCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RedisCredentials(...)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_prints_neither_user_nor_password() {
        let credentials = RedisCredentials::new(Some("alice"), "hunter2");
        assert_eq!(
            format!("{credentials:?} {credentials:#?}"),
            "RedisCredentials(...) RedisCredentials(...)"
        );
    }
}
