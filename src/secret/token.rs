//! Generates the tokens of clients and of the admin API, and the tokens and codes of dashboard sessions, from random
//! numbers of the system.

use ring::rand::{SecureRandom as _, SystemRandom};

/// Generates a token: `prefix`, and 192 random bits in hexadecimal. The prefix lets operators and secret
/// scanners recognize the token. Returns `None` if the system provides no random numbers.
#[must_use]
pub fn generate_token(prefix: &str) -> Option<String> {
    let mut bytes = [0_u8; 24];
    SystemRandom::new().fill(&mut bytes).ok()?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(format!("{prefix}{digits}"))
}
