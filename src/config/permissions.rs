//! Warns about files with secrets that other users can read, and about configuration files that
//! other users can change. These are warnings, because an operator may have chosen the mode on
//! purpose.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::Loaded;
use super::problem::{SourceSpan, ValueOrigin, Warning};

/// The permission bits of the group and of all other users.
const OTHERS: u32 = 0o077;
/// The write bits of the group and of all other users.
const OTHERS_WRITE: u32 = 0o022;

/// The kind of content of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Keys, tokens, or usage records.
    Secret,
    /// Settings.
    Plain,
}

/// The problem with a file's mode, or `None`.
fn mode_problem(mode: u32, content: Content) -> Option<String> {
    let bits = mode & 0o777;
    let access = match content {
        _ if mode & OTHERS_WRITE != 0 => "change",
        Content::Secret if mode & OTHERS != 0 => "read",
        Content::Secret | Content::Plain => return None,
    };
    let command = match content {
        Content::Secret => "chmod 600",
        Content::Plain => "chmod go-w",
    };
    Some(format!(
        "other users of this machine can {access} this file (mode {bits:04o}): restrict it with `{command}`"
    ))
}

/// Warnings about the files that were read, and about the database if it exists. systemd protects
/// the files in `credentials`.
pub(super) fn warnings(loaded: &Loaded, credentials: Option<&Path>) -> Vec<Warning> {
    let Loaded { config, file, file_holds_secrets, files, .. } = loaded;
    let content = |path: &Path| {
        let is_plain = file.as_deref() == Some(path) && !file_holds_secrets;
        // A certificate is public.
        let is_certificate = config.server.tls.cert.as_deref() == Some(path);
        if is_plain || is_certificate { Content::Plain } else { Content::Secret }
    };
    let is_credential = |path: &Path| credentials.is_some_and(|folder| path.starts_with(folder));
    let read = files.read().filter(|path| !is_credential(path)).map(|path| (path.to_owned(), content(path)));
    let database = config.storage.file().into_iter().flat_map(|path| {
        ["", "-wal", "-shm"].map(|suffix| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            (PathBuf::from(name), Content::Secret)
        })
    });
    let warnings = read.chain(database).filter_map(|(path, content)| {
        let metadata = fs::metadata(&path).ok().filter(fs::Metadata::is_file)?;
        let message = mode_problem(metadata.permissions().mode(), content)?;
        Some(SourceSpan::of(ValueOrigin::File(path)).warning(message))
    });
    warnings.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(mode: u32, content: Content, expected: Option<&str>) {
        let warnings = mode_problem(0o100_000 | mode, content);
        match expected {
            Some(text) => {
                assert!(warnings.as_ref().is_some_and(|warnings| warnings.contains(text)), "{warnings:?}")
            }
            None => assert_eq!(warnings, None),
        }
    }

    #[test]
    fn a_secret_file_is_readable_by_its_owner_only() {
        for mode in [0o600, 0o400, 0o700] {
            check(mode, Content::Secret, None);
        }
        check(0o640, Content::Secret, Some("read this file (mode 0640)"));
        check(0o604, Content::Secret, Some("read this file (mode 0604)"));
        check(0o666, Content::Secret, Some("change this file (mode 0666)"));
    }

    #[test]
    fn other_users_may_read_settings_and_not_change_them() {
        check(0o644, Content::Plain, None);
        check(0o664, Content::Plain, Some("change this file (mode 0664)"));
        check(0o602, Content::Plain, Some("chmod go-w"));
    }
}
