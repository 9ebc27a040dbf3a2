//! Identifies the end user of a request, whom a client names in `x-keychoir-user`. Only the fingerprint of the id
//! leaves this module, so that no record contains the id itself.

use http::HeaderMap;

use super::client::ClientName;
use super::headers::presented_user_ids;
use crate::secret::UserFingerprint;

/// Maximum number of bytes in an id. An e-mail address or a URL of an identity provider needs fewer.
pub const MAX_USER_ID_BYTES: usize = 256;

/// The reason why the end user of a request cannot be identified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUser {
    /// The id is empty, too long, or contains a control character or an invalid escape.
    #[error("the id of the user is empty, too long or contains control characters")]
    Malformed,
    /// The request names two users.
    #[error("the request names two users")]
    Contradictory,
}

/// Identifies the end user of a request by its header or query. Returns `None` if the request names no user.
///
/// # Errors
///
/// Fails if an id is malformed, or if the request names two users.
pub fn identify_user(
    client: &ClientName,
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<Option<UserFingerprint>, InvalidUser> {
    let mut user = None;
    for id in presented_user_ids(headers, query) {
        let id = id.trim_ascii();
        if !is_valid_id(id) {
            return Err(InvalidUser::Malformed);
        }
        let fingerprint = UserFingerprint::new(client.as_str(), id);
        if user.replace(fingerprint).is_some_and(|other| other != fingerprint) {
            return Err(InvalidUser::Contradictory);
        }
    }
    Ok(user)
}

/// Returns whether an id consists of visible text in ASCII, UTF-8 or Latin-1.
fn is_valid_id(id: &[u8]) -> bool {
    // Decoding replaces each invalid escape with this character, which would make different ids equal.
    const REPLACEMENT: &[u8] = "\u{fffd}".as_bytes();
    (1..=MAX_USER_ID_BYTES).contains(&id.len())
        && !id.iter().any(u8::is_ascii_control)
        && !id.windows(REPLACEMENT.len()).any(|window| window == REPLACEMENT)
}

#[cfg(test)]
mod tests {
    use http::header::HeaderValue;

    use super::*;

    #[track_caller]
    fn check_user(header_ids: &[&[u8]], query: Option<&str>, expected: Result<Option<&[u8]>, InvalidUser>) {
        let mut headers = HeaderMap::new();
        for id in header_ids {
            headers.append("x-keychoir-user", HeaderValue::from_bytes(id).unwrap());
        }
        let expected = expected.map(|id| id.map(|id| UserFingerprint::new("app", id)));
        assert_eq!(identify_user(&ClientName::new("app"), &headers, query), expected);
    }

    #[test]
    fn a_user_is_named_by_a_header_or_a_parameter() {
        check_user(&[], None, Ok(None));
        check_user(&[], Some("user=x&token=y"), Ok(None));
        check_user(&[b"alice"], None, Ok(Some(b"alice")));
        check_user(&["J\u{fc}rgen M".as_bytes()], None, Ok(Some("J\u{fc}rgen M".as_bytes())));
        check_user(&[b"J\xfcrgen"], None, Ok(Some(b"J\xfcrgen")));
        check_user(&[], Some("a=b&x-keychoir-user=a%40b.example"), Ok(Some(b"a@b.example")));
        check_user(&[], Some("X%2DKeychoir-User=+alice+"), Ok(Some(b"alice")));
        check_user(&[b"alice", b"alice"], Some("x-keychoir-user=alice"), Ok(Some(b"alice")));
    }

    #[test]
    fn an_id_without_visible_text_is_malformed() {
        let longest = [b'u'; MAX_USER_ID_BYTES];
        check_user(&[&longest], None, Ok(Some(&longest)));
        let malformed: [&[u8]; 4] = [b"", b" ", b"a\tb", &[b'u'; MAX_USER_ID_BYTES + 1]];
        for id in malformed {
            check_user(&[id], None, Err(InvalidUser::Malformed));
        }
        for query in
            ["x-keychoir-user=", "x-keychoir-user=a%00", "x-keychoir-user=%ff", "x-keychoir-user=%0a"]
        {
            check_user(&[], Some(query), Err(InvalidUser::Malformed));
        }
    }

    #[test]
    fn a_request_with_two_users_is_contradictory() {
        check_user(&[b"alice", b"bob"], None, Err(InvalidUser::Contradictory));
        check_user(&[b"alice"], Some("x-keychoir-user=bob"), Err(InvalidUser::Contradictory));
    }
}
