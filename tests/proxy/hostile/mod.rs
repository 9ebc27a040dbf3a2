//! Shared parts of the suites with hostile clients and hostile providers: tables of cases, reproducible
//! mutations of these cases, and strict HTTP parsers for both sides of the proxy. The parsers share no code
//! with Keychoir.

#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test target uses a part of this module")]

pub mod clients;
pub mod http_parser;
pub mod mutation;
pub mod providers;
pub mod tap;

use std::time::Duration;

/// The timeout of an exchange in these suites.
pub const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// Formats bytes for a report. Long bytes are shortened.
pub fn escape_bytes(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(2_000)];
    let omitted = bytes.len() - shown.len();
    let suffix = if omitted > 0 { format!(" and {omitted} more bytes") } else { String::new() };
    format!("\"{}\"{suffix}", shown.escape_ascii())
}

/// Whether `bytes` contain `text`.
pub fn contains(bytes: &[u8], text: &str) -> bool {
    memchr::memmem::find(bytes, text.as_bytes()).is_some()
}
