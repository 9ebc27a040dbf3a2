//! Corrects paths that result from a wrong base URL. Some clients need a base URL with `/v1` and some
//! without; a path is corrected only if no correct base URL leads to it, and its other bytes are kept.

use super::endpoint::is_root;

/// The error in a base URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PathFix {
    /// It ends in a version, and the client adds another: `/v1/v1/…`.
    DoubledVersion,
    /// Neither the base URL nor the client adds a version: `/text-to-speech/…`.
    MissingVersion,
    /// It ends in a slash, and the client's path begins with one: `//v1/…`.
    DoubledSlash,
}

impl PathFix {
    /// How to correct the base URL.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::DoubledVersion => "its base URL should not end in a version such as /v1",
            Self::MissingVersion => "its base URL should end in /v1",
            Self::DoubledSlash => "its base URL should not end in a slash",
        }
    }
}

/// The corrected path, if `path` can only result from a wrong base URL.
#[must_use]
pub fn fix_path(path: &str) -> Option<(String, PathFix)> {
    let rest = path.strip_prefix('/')?;
    if let Some(with_single_slash) = without_doubled_slash(path, rest) {
        // The version of such a base URL may be wrong as well.
        return Some(fix_path(&with_single_slash).unwrap_or((with_single_slash, PathFix::DoubledSlash)));
    }
    let (first, after) = rest.split_once('/').unwrap_or((rest, ""));
    if is_version(first) {
        let second = after.split('/').next().unwrap_or_default();
        return is_version(second).then(|| (format!("/{after}"), PathFix::DoubledVersion));
    }
    is_root(first).then(|| (format!("/v1{path}"), PathFix::MissingVersion))
}

/// The path with a single slash where a base URL that ends in a slash has left two: before the version,
/// or between the version and a known root. `rest` is the path after its first slash.
fn without_doubled_slash(path: &str, rest: &str) -> Option<String> {
    let first = |text: &str| text.split('/').next().unwrap_or_default().to_owned();
    if let Some(after_slashes) = rest.strip_prefix('/') {
        let first = first(after_slashes);
        return (is_version(&first) || is_root(&first)).then(|| rest.to_owned());
    }
    let (version, after_slashes) = path.split_once("//")?;
    let is_doubled = is_version(version.strip_prefix('/')?) && is_root(&first(after_slashes));
    is_doubled.then(|| format!("{version}/{after_slashes}"))
}

/// `v1`, `v2` and so on.
#[must_use]
pub fn is_version(segment: &str) -> bool {
    segment
        .strip_prefix('v')
        .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, expected: Option<(&str, PathFix)>) {
        let fixed = fix_path(path);
        assert_eq!(fixed.as_ref().map(|(path, fix)| (path.as_str(), *fix)), expected);
    }

    #[test]
    fn a_doubled_version_is_removed() {
        check("/v1/v1/text-to-speech/x", Some(("/v1/text-to-speech/x", PathFix::DoubledVersion)));
        check("/v1/v2/voices", Some(("/v2/voices", PathFix::DoubledVersion)));
        check("/v1/v1", Some(("/v1", PathFix::DoubledVersion)));
    }

    #[test]
    fn a_missing_version_is_added_before_a_known_root() {
        check("/text-to-speech/x/stream", Some(("/v1/text-to-speech/x/stream", PathFix::MissingVersion)));
        check("/voices", Some(("/v1/voices", PathFix::MissingVersion)));
        check("/user/%20//a;b", Some(("/v1/user/%20//a;b", PathFix::MissingVersion)));
    }

    #[test]
    fn a_doubled_slash_of_a_base_url_is_removed() {
        check("//v1/voices", Some(("/v1/voices", PathFix::DoubledSlash)));
        check("/v1//voices", Some(("/v1/voices", PathFix::DoubledSlash)));
        check("//voices", Some(("/v1/voices", PathFix::MissingVersion)));
        check("//v1/v1/voices", Some(("/v1/voices", PathFix::DoubledVersion)));
        check("/v1//user//x", Some(("/v1/user//x", PathFix::DoubledSlash)));
    }

    #[test]
    fn a_path_that_may_be_intended_is_kept() {
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
            check(path, None);
        }
    }
}
