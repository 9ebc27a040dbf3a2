//! Corrects paths that result from a wrong base URL: some clients need a base URL with `/v1`, and other clients a
//! base URL without it. A path is corrected only if no correct base URL can lead to it. The correction adds or removes
//! a version or a slash, and changes no other byte of the path.

use super::endpoint::is_root;

/// The mistake in a base URL whose effect on a path was corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PathFix {
    /// The base URL ends in a version, and the client adds a second version: `/v1/v1/…`.
    DoubledVersion,
    /// Neither the base URL nor the client adds a version: `/text-to-speech/…`.
    MissingVersion,
    /// The base URL ends in a slash, and the client's path starts with a slash: `//v1/…` or `/v1//voices`.
    DoubledSlash,
}

impl PathFix {
    /// Returns advice about the base URL of the client, for the log.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::DoubledVersion => "its base URL should not end in a version such as /v1",
            Self::MissingVersion => "its base URL should end in /v1",
            Self::DoubledSlash => "its base URL should not end in a slash",
        }
    }
}

/// Returns the corrected path and the mistake, if `path` can only result from a wrong base URL. If both a slash and a
/// version are wrong, the returned mistake is the one about the version.
#[must_use]
pub fn fix_path(path: &str) -> Option<(String, PathFix)> {
    if let Some(fixed_path) = without_doubled_slash(path) {
        // The version of such a base URL may also be wrong.
        return Some(fix_path(&fixed_path).unwrap_or((fixed_path, PathFix::DoubledSlash)));
    }
    let relative_path = path.strip_prefix('/')?;
    let (first_segment, after_first) = relative_path.split_once('/').unwrap_or((relative_path, ""));
    if is_version(first_segment) {
        let is_doubled = is_version(first_segment_of(after_first));
        return is_doubled.then(|| (format!("/{after_first}"), PathFix::DoubledVersion));
    }
    is_root(first_segment).then(|| (format!("/v1{path}"), PathFix::MissingVersion))
}

/// Removes the second slash that results from a base URL with a slash at its end. The slash is removed before a version
/// or a known root at the start of the path, and between a version and a known root. Returns `None` for other paths.
fn without_doubled_slash(path: &str) -> Option<String> {
    let (before, after) = path.split_once("//")?;
    let next_segment = first_segment_of(after);
    let is_doubled = match before.strip_prefix('/') {
        None => before.is_empty() && (is_version(next_segment) || is_root(next_segment)),
        Some(version) => is_version(version) && is_root(next_segment),
    };
    is_doubled.then(|| format!("{before}/{after}"))
}

fn first_segment_of(path: &str) -> &str {
    path.split('/').next().unwrap_or_default()
}

/// Whether a path segment is a version of the API: `v1`, `v2` and so on.
#[must_use]
pub fn is_version(segment: &str) -> bool {
    segment
        .strip_prefix('v')
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the correction of `path` with the expected one.
    #[track_caller]
    fn check_fix(path: &str, expected: Option<(&str, PathFix)>) {
        let fixed_path = fix_path(path);
        assert_eq!(fixed_path.as_ref().map(|(path, fix)| (path.as_str(), *fix)), expected);
    }

    #[test]
    fn a_doubled_version_is_removed() {
        check_fix("/v1/v1/text-to-speech/x", Some(("/v1/text-to-speech/x", PathFix::DoubledVersion)));
        check_fix("/v1/v2/voices", Some(("/v2/voices", PathFix::DoubledVersion)));
        check_fix("/v1/v1", Some(("/v1", PathFix::DoubledVersion)));
    }

    #[test]
    fn a_missing_version_is_added_before_a_known_root() {
        check_fix("/text-to-speech/x/stream", Some(("/v1/text-to-speech/x/stream", PathFix::MissingVersion)));
        check_fix("/voices", Some(("/v1/voices", PathFix::MissingVersion)));
        check_fix("/user/%20//a;b", Some(("/v1/user/%20//a;b", PathFix::MissingVersion)));
    }

    #[test]
    fn a_doubled_slash_of_a_base_url_is_removed() {
        check_fix("//v1/voices", Some(("/v1/voices", PathFix::DoubledSlash)));
        check_fix("/v1//voices", Some(("/v1/voices", PathFix::DoubledSlash)));
        check_fix("//voices", Some(("/v1/voices", PathFix::MissingVersion)));
        check_fix("//v1/v1/voices", Some(("/v1/voices", PathFix::DoubledVersion)));
        check_fix("/v1//user//x", Some(("/v1/user//x", PathFix::DoubledSlash)));
    }

    #[test]
    fn a_path_that_a_correct_base_url_can_lead_to_is_unchanged() {
        for path in [
            "/v1/voices",
            "/v2/voices",
            "/docs",
            "/",
            "",
            "*",
            "//livez",
            "///v1/voices",
            "/v1//21m00Tcm4TlvDq8ikWAM",
            "/v1/voices//x",
            "/voices-new",
            "/v1",
            "/vx/v1",
            "/api/v1/v1",
        ] {
            check_fix(path, None);
        }
    }
}
