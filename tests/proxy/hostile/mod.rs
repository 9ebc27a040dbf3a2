//! Shared parts of the tests with hostile clients and hostile providers: tables of cases, reproducible mutations of
//! these cases, strict HTTP parsers for both sides of the proxy, and a tap on the connections to the provider. The
//! parsers share no code with Keychoir. `tests/proxy` and `tests/hostile_memory.rs` use this module.

#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test target uses a part of this module")]

pub mod clients;
pub mod http_parser;
pub mod mutation;
pub mod providers;
pub mod tap;

use std::time::Duration;

/// The timeout of the exchange of a request and its response.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// The maximum number of bytes in a failure message.
const MAX_SHOWN_BYTES: usize = 2_000;

/// Formats bytes for a failure message. Omits the bytes after the first [`MAX_SHOWN_BYTES`].
pub fn escape_bytes(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(MAX_SHOWN_BYTES)];
    let omitted = bytes.len() - shown.len();
    let suffix = if omitted > 0 { format!(" and {omitted} more bytes") } else { String::new() };
    format!("\"{}\"{suffix}", shown.escape_ascii())
}

/// Returns whether `bytes` contain `text`.
pub fn contains(bytes: &[u8], text: &str) -> bool {
    memchr::memmem::find(bytes, text.as_bytes()).is_some()
}
