//! Warns about files with secrets that other users can read, and about configuration files that other
//! users can change. Such a file is not an error, because an operator may have chosen its mode on purpose.

use std::fs;
use std::path::{Path, PathBuf};

use super::LoadedConfig;
use super::problem::{SourceSpan, ValueOrigin, Warning};
use crate::platform::files;

/// The permission bits of the group and of all other users.
const NON_OWNER_BITS: u32 = 0o077;
/// The write bits of the group and of all other users.
const NON_OWNER_WRITE_BITS: u32 = 0o022;

/// The directory in which container runtimes mount secrets, for the processes of the container only.
const CONTAINER_SECRETS: &str = "/run/secrets";

/// Whether the content of a file is secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Keys, tokens, passwords, private keys, or usage records.
    Secret,
    /// Settings or certificates.
    Public,
}

/// Describes the access of other users that is a risk, or `None` if there is no risk.
fn describe_risk(mode: u32, content: Content) -> Option<String> {
    let bits = mode & 0o777;
    let access = match content {
        _ if mode & NON_OWNER_WRITE_BITS != 0 => "change",
        Content::Secret if mode & NON_OWNER_BITS != 0 => "read",
        Content::Secret | Content::Public => return None,
    };
    let command = match content {
        Content::Secret => "chmod 600",
        Content::Public => "chmod go-w",
    };
    Some(format!(
        "other users of this machine can {access} this file (mode {bits:04o}): restrict it with `{command}`"
    ))
}

/// Returns a warning for each file with a risk, among the files that were read and the files of the database. The files
/// in the directory `credentials` and the secrets of a container are skipped, because systemd or the container runtime
/// protects them.
pub(super) fn find_risks(loaded: &LoadedConfig, credentials: Option<&Path>) -> Vec<Warning> {
    let LoadedConfig { config, file, file_contains_secrets, contents, .. } = loaded;
    let stamps = contents.stamps();
    let content_of = |path: &Path| {
        let has_only_settings = file.as_deref() == Some(path) && !file_contains_secrets;
        let is_certificate = config.server.tls.cert.as_deref() == Some(path);
        if has_only_settings || is_certificate { Content::Public } else { Content::Secret }
    };
    let is_credential = |path: &Path| {
        path.starts_with(CONTAINER_SECRETS)
            || credentials.is_some_and(|directory| path.starts_with(directory))
    };
    let files = stamps.existing().filter(|path| !is_credential(path));
    let files = files.map(|path| (path.to_owned(), content_of(path)));
    let database_files = config.storage.file().into_iter().flat_map(|path| {
        ["", "-wal", "-shm"].map(|suffix| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            (PathBuf::from(name), Content::Secret)
        })
    });
    let warnings = files.chain(database_files).filter_map(|(path, content)| {
        let metadata = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?;
        let message = describe_risk(files::mode(&metadata)?, content)?;
        Some(SourceSpan::new(ValueOrigin::File(path)).warning(message))
    });
    warnings.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_risk(mode: u32, content: Content, expected: Option<&str>) {
        // The bit of a regular file is set as well.
        let message = describe_risk(0o100_000 | mode, content);
        match expected {
            Some(part) => assert!(
                message.as_ref().is_some_and(|message| message.contains(part)),
                "the message for the mode {mode:04o} must contain {part:?}: {message:?}"
            ),
            None => assert_eq!(message, None, "the mode {mode:04o} must not be a risk"),
        }
    }

    #[test]
    fn a_secret_that_other_users_can_read_or_change_is_a_risk() {
        for mode in [0o600, 0o400, 0o700] {
            check_risk(mode, Content::Secret, None);
        }
        check_risk(0o640, Content::Secret, Some("read this file (mode 0640)"));
        check_risk(0o604, Content::Secret, Some("read this file (mode 0604)"));
        check_risk(0o666, Content::Secret, Some("change this file (mode 0666)"));
    }

    #[test]
    fn a_public_file_is_a_risk_only_if_other_users_can_change_it() {
        check_risk(0o644, Content::Public, None);
        check_risk(0o664, Content::Public, Some("change this file (mode 0664)"));
        check_risk(0o602, Content::Public, Some("chmod go-w"));
    }
}
