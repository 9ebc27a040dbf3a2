//! Parses the public base URL of Keychoir's WebSockets, which replaces the provider's URL in the signed
//! URLs of responses.

use std::fmt;
use std::str::FromStr;

use super::base_url::BaseUrl;
use super::mask::quote_masked;
use super::problem::ValueError;

/// A URL with `ws://` or `wss://`, a host, an optional port and an optional path prefix, or an empty string for none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketBase(String);

impl SocketBase {
    /// Returns the URL without a trailing slash, or `None` if it is not configured.
    #[must_use]
    pub fn url(&self) -> Option<&str> {
        (!self.0.is_empty()).then_some(self.0.as_str())
    }
}

impl FromStr for SocketBase {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let Some((scheme @ ("ws" | "wss"), rest)) = text.split_once("://") else {
            let address = text.split_once("://").map_or(text, |(_, rest)| rest);
            let error = ValueError::new(format!("{} has no ws:// or wss://", quote_masked(text)));
            return Err(error.suggest(format!("wss://{address}").parse::<Self>().ok()));
        };
        // The rest of the URL is validated like a base URL.
        let base_url = format!("http{}://{rest}", &scheme[2..]).parse::<BaseUrl>()?.to_string();
        Ok(Self(format!("ws{}", base_url.trim_start_matches("http"))))
    }
}

impl fmt::Display for SocketBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_base(text: &str, expected: &str) {
        let printed_text = match text.parse::<SocketBase>() {
            Ok(base) => base.to_string(),
            Err(error) => format!("! {error}"),
        };
        assert_eq!(printed_text, expected);
    }

    #[test]
    fn a_socket_base_is_a_websocket_url() {
        check_base("", "");
        check_base("wss://localhost:11011", "wss://localhost:11011");
        check_base(" ws://127.0.0.1:11011/ ", "ws://127.0.0.1:11011");
        check_base("wss://voice.example/elevenlabs", "wss://voice.example/elevenlabs");
        check_base(
            "https://localhost:11011",
            "! `https://localhost:11011` has no ws:// or wss://; did you mean `wss://localhost:11011`?",
        );
        check_base("localhost", "! `localhost` has no ws:// or wss://; did you mean `wss://localhost`?");
    }

    #[test]
    fn an_invalid_socket_base_is_refused() {
        assert!("wss://".parse::<SocketBase>().is_err());
        assert!("wss://user:pass@host".parse::<SocketBase>().is_err());
    }
}
