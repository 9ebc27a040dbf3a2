//! Reads the environment, files and the clock. The other modules of the configuration receive these
//! values as arguments, so that tests can replace them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::clock;
use crate::policy::units::UnixMs;

/// Maximum bytes of a file. A configuration or key file has a few kilobytes; a larger one is the
/// wrong file or a device.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The environment of the process, a function that reads files, and the time.
pub(super) struct ValueSources<'a> {
    pub(super) environment: Environment,
    pub(super) read: &'a dyn Fn(&Path) -> Result<String, Unreadable>,
    /// The time of the load.
    pub(super) now: UnixMs,
}

/// The environment variables that Keychoir reads. An empty or blank one counts as unset.
#[derive(Default)]
pub(super) struct Environment {
    values: BTreeMap<String, String>,
    /// Names of variables whose value is not UTF-8.
    pub(super) unreadable: Vec<String>,
}

impl Environment {
    /// The environment of this process.
    pub(super) fn of_process() -> Self {
        std::env::vars_os().collect()
    }

    /// The trimmed value; `None` if it is blank.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// All variables with a value, by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The home folder, which replaces `~` in paths.
    pub(super) fn home(&self) -> Option<&Path> {
        self.value("HOME").or_else(|| self.value("USERPROFILE")).map(Path::new)
    }

    /// The default paths of the configuration file, in order. The first existing file is read, and
    /// a new file is created at the first path.
    pub(super) fn config_files(&self) -> Vec<PathBuf> {
        let config = self.value("XDG_CONFIG_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
        let config = config.or_else(|| Some(self.home()?.join(".config")));
        let of_user = config.map(|config| config.join("keychoir/keychoir.toml"));
        of_user.into_iter().chain([PathBuf::from("/etc/keychoir/keychoir.toml")]).collect()
    }

    /// The default path of the usage database: in systemd's state folder if it is set, else in the
    /// XDG state folder.
    pub(super) fn state_file(&self) -> Option<PathBuf> {
        // systemd separates several folders by colons. The first one is used.
        let service_folder = self.value("STATE_DIRECTORY").and_then(|folders| folders.split(':').next());
        if let Some(folder) = service_folder.filter(|folder| !folder.is_empty()) {
            return Some(Path::new(folder).join("keychoir.db"));
        }
        // The XDG specification requires that relative paths are ignored.
        let state = self.value("XDG_STATE_HOME").map(PathBuf::from).filter(|folder| folder.is_absolute());
        let state = state.or_else(|| Some(self.home()?.join(".local/state")))?;
        Some(state.join("keychoir/keychoir.db"))
    }
}

impl FromIterator<(OsString, OsString)> for Environment {
    fn from_iter<T: IntoIterator<Item = (OsString, OsString)>>(variables: T) -> Self {
        let mut environment = Self::default();
        for (name, value) in variables {
            let Ok(name) = name.into_string() else { continue };
            match value.into_string() {
                Ok(value) if value.trim().is_empty() => {}
                Ok(value) => {
                    environment.values.insert(name, value.trim().to_owned());
                }
                Err(_) if name.starts_with("KEYCHOIR_") || name.starts_with("ELEVENLABS_API_KEY") => {
                    environment.unreadable.push(name);
                }
                Err(_) => {}
            }
        }
        environment
    }
}

/// The reason why a file could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("there is no such file")]
    Missing,
    #[error("it is a folder")]
    Folder,
    #[error("it is larger than {} bytes", MAX_FILE_BYTES)]
    TooLarge,
    /// The position of the first invalid byte, counted from 1.
    #[error("it is no UTF-8 text (line {line}, column {column})")]
    NotUtf8 { line: usize, column: usize },
    #[error("{0}")]
    Other(ErrorKind),
}

impl From<ErrorKind> for Unreadable {
    fn from(kind: ErrorKind) -> Self {
        if kind == ErrorKind::NotFound {
            Self::Missing
        } else if kind == ErrorKind::IsADirectory {
            Self::Folder
        } else {
            Self::Other(kind)
        }
    }
}

/// The current time.
pub(super) fn now() -> UnixMs {
    clock::now()
}

/// Reads a file as text, without a byte order mark.
pub(super) fn read_file(path: &Path) -> Result<String, Unreadable> {
    let unreadable = |error: std::io::Error| Unreadable::from(error.kind());
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(Unreadable::TooLarge);
    }
    decode(bytes)
}

fn decode(bytes: Vec<u8>) -> Result<String, Unreadable> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let before = String::from_utf8_lossy(error.as_bytes().get(..valid).unwrap_or_default()).into_owned();
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Unreadable::NotUtf8 { line: before.matches('\n').count() + 1, column }
    })?;
    if text.starts_with('\u{feff}') {
        text.remove(0);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_state_file(variables: &[(&str, &str)], expected: Option<&str>) {
        let environment: Environment =
            variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        assert_eq!(environment.state_file().as_deref(), expected.map(Path::new));
    }

    #[test]
    fn the_usage_database_is_in_the_state_folder_of_the_system() {
        let home = ("HOME", "/home/me");
        check_state_file(&[], None);
        check_state_file(&[home], Some("/home/me/.local/state/keychoir/keychoir.db"));
        check_state_file(&[home, ("XDG_STATE_HOME", "/x")], Some("/x/keychoir/keychoir.db"));
        check_state_file(
            &[home, ("XDG_STATE_HOME", "x")],
            Some("/home/me/.local/state/keychoir/keychoir.db"),
        );
        check_state_file(
            &[home, ("STATE_DIRECTORY", "/s:/t"), ("XDG_STATE_HOME", "/x")],
            Some("/s/keychoir.db"),
        );
        check_state_file(
            &[home, ("STATE_DIRECTORY", " ")],
            Some("/home/me/.local/state/keychoir/keychoir.db"),
        );
    }

    #[track_caller]
    fn check_config_files(variables: &[(&str, &str)], expected: &[&str]) {
        let environment: Environment =
            variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        assert_eq!(environment.config_files(), expected.iter().map(PathBuf::from).collect::<Vec<_>>());
    }

    #[test]
    fn a_configuration_file_belongs_to_the_user_or_the_machine() {
        const ETC: &str = "/etc/keychoir/keychoir.toml";
        let home = ("HOME", "/home/me");
        check_config_files(&[], &[ETC]);
        check_config_files(&[home], &["/home/me/.config/keychoir/keychoir.toml", ETC]);
        check_config_files(&[home, ("XDG_CONFIG_HOME", "/x")], &["/x/keychoir/keychoir.toml", ETC]);
        check_config_files(
            &[home, ("XDG_CONFIG_HOME", "x")],
            &["/home/me/.config/keychoir/keychoir.toml", ETC],
        );
    }

    #[test]
    fn an_invalid_byte_is_named_by_its_position() {
        assert_eq!(decode(b"\xef\xbb\xbfa\n".to_vec()), Ok("a\n".into()));
        assert_eq!(decode(b"a\nb\xff".to_vec()), Err(Unreadable::NotUtf8 { line: 2, column: 2 }));
        assert_eq!(decode(b"\xff\xfea\0".to_vec()), Err(Unreadable::NotUtf8 { line: 1, column: 1 }));
    }

    #[test]
    fn an_unreadable_file_is_an_error_with_its_reason() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read_file(folder.path()), Err(Unreadable::Folder));
        assert_eq!(read_file(&folder.path().join("none")), Err(Unreadable::Missing));
        let path = folder.path().join("large");
        let limit = usize::try_from(MAX_FILE_BYTES).unwrap();
        std::fs::write(&path, vec![b'a'; limit]).unwrap();
        assert_eq!(read_file(&path).unwrap().len(), limit);
        std::fs::write(&path, vec![b'a'; limit + 1]).unwrap();
        assert_eq!(read_file(&path), Err(Unreadable::TooLarge));
    }
}
