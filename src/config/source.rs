//! Reads environment variables and files, and determines the default paths of files. The other modules of the
//! configuration get the variables and files as arguments, so that tests can replace them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::policy::units::UnixMs;

/// Maximum number of bytes in a file. A configuration or key file has a few kilobytes. A file beyond the maximum is
/// probably the wrong file, or a device.
pub(super) const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// The environment, a function that reads files, and the time.
pub(super) struct ValueSources<'a> {
    pub(super) environment: Environment,
    pub(super) read_file: &'a dyn Fn(&Path) -> Result<String, ReadFileError>,
    /// The time at which certificates must be valid.
    pub(super) now: UnixMs,
}

/// The environment variables. A variable with only white space counts as unset.
#[derive(Default)]
pub(super) struct Environment {
    values: BTreeMap<String, String>,
    /// The names of variables that begin with `KEYCHOIR_` or `ELEVENLABS_API_KEY` and whose value is not UTF-8.
    pub(super) non_utf8_names: Vec<String>,
}

impl Environment {
    /// Reads the environment of this process.
    pub(super) fn capture() -> Self {
        std::env::vars_os().collect()
    }

    /// Returns the trimmed value of a variable, or `None` if it is unset or blank.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// Returns all variables with a value, by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Returns the home directory, which replaces `~` in paths.
    pub(super) fn home(&self) -> Option<&Path> {
        self.value("HOME").or_else(|| self.value("USERPROFILE")).map(Path::new)
    }

    /// Returns the default paths of the configuration file, in order. The first existing file is read.
    pub(super) fn default_config_files(&self) -> Vec<PathBuf> {
        let user_file = self
            .xdg_directory("XDG_CONFIG_HOME", ".config")
            .map(|directory| directory.join("keychoir/keychoir.toml"));
        user_file.into_iter().chain([PathBuf::from("/etc/keychoir/keychoir.toml")]).collect()
    }

    /// Returns the default path of the usage database: in systemd's state directory if it is set, or else in the XDG
    /// state directory. Returns `None` without a home directory.
    pub(super) fn default_database(&self) -> Option<PathBuf> {
        // systemd separates several directories by colons. Keychoir uses the first.
        let service_directory =
            self.value("STATE_DIRECTORY").and_then(|directories| directories.split(':').next());
        if let Some(directory) = service_directory.filter(|directory| !directory.is_empty()) {
            return Some(Path::new(directory).join("keychoir.db"));
        }
        Some(self.xdg_directory("XDG_STATE_HOME", ".local/state")?.join("keychoir/keychoir.db"))
    }

    /// Returns the directory in an XDG variable, or else its default below the home directory. The XDG specification
    /// requires that relative paths are ignored.
    fn xdg_directory(&self, variable: &str, default: &str) -> Option<PathBuf> {
        let directory = self.value(variable).map(PathBuf::from).filter(|directory| directory.is_absolute());
        directory.or_else(|| Some(self.home()?.join(default)))
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
                    environment.non_utf8_names.push(name);
                }
                Err(_) => {}
            }
        }
        environment
    }
}

/// The reason why a file could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReadFileError {
    #[error("it does not exist")]
    Missing,
    #[error("it is a directory")]
    Directory,
    #[error("it is larger than {} bytes", MAX_FILE_BYTES)]
    TooLarge,
    /// The file is not UTF-8. The position is that of the first invalid byte, and both numbers are counted from 1.
    #[error("it is not UTF-8 text (line {line}, column {column})")]
    NotUtf8 { line: usize, column: usize },
    #[error("{0}")]
    Other(ErrorKind),
}

impl From<ErrorKind> for ReadFileError {
    fn from(kind: ErrorKind) -> Self {
        if kind == ErrorKind::NotFound {
            Self::Missing
        } else if kind == ErrorKind::IsADirectory {
            Self::Directory
        } else {
            Self::Other(kind)
        }
    }
}

/// Reads a file as text, without a byte order mark.
pub(super) fn read_file(path: &Path) -> Result<String, ReadFileError> {
    let to_read_error = |error: std::io::Error| ReadFileError::from(error.kind());
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(to_read_error)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(to_read_error)?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(ReadFileError::TooLarge);
    }
    decode_utf8(bytes)
}

/// Decodes the content of a file, and removes a byte order mark.
fn decode_utf8(bytes: Vec<u8>) -> Result<String, ReadFileError> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let valid_length = error.utf8_error().valid_up_to();
        let valid_text =
            String::from_utf8_lossy(error.as_bytes().get(..valid_length).unwrap_or_default()).into_owned();
        let column = valid_text.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        ReadFileError::NotUtf8 { line: valid_text.matches('\n').count() + 1, column }
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
    fn check_default_database(variables: &[(&str, &str)], expected: Option<&str>) {
        let environment: Environment =
            variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        assert_eq!(environment.default_database().as_deref(), expected.map(Path::new));
    }

    #[test]
    fn the_usage_database_is_in_the_state_directory_of_the_system() {
        let home = ("HOME", "/home/me");
        check_default_database(&[], None);
        check_default_database(&[home], Some("/home/me/.local/state/keychoir/keychoir.db"));
        check_default_database(&[home, ("XDG_STATE_HOME", "/x")], Some("/x/keychoir/keychoir.db"));
        check_default_database(
            &[home, ("XDG_STATE_HOME", "x")],
            Some("/home/me/.local/state/keychoir/keychoir.db"),
        );
        check_default_database(
            &[home, ("STATE_DIRECTORY", "/s:/t"), ("XDG_STATE_HOME", "/x")],
            Some("/s/keychoir.db"),
        );
        check_default_database(
            &[home, ("STATE_DIRECTORY", " ")],
            Some("/home/me/.local/state/keychoir/keychoir.db"),
        );
    }

    #[track_caller]
    fn check_default_config_files(variables: &[(&str, &str)], expected: &[&str]) {
        let environment: Environment =
            variables.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))).collect();
        assert_eq!(
            environment.default_config_files(),
            expected.iter().map(PathBuf::from).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_configuration_file_of_the_user_precedes_that_of_the_machine() {
        const ETC: &str = "/etc/keychoir/keychoir.toml";
        let home = ("HOME", "/home/me");
        check_default_config_files(&[], &[ETC]);
        check_default_config_files(&[home], &["/home/me/.config/keychoir/keychoir.toml", ETC]);
        check_default_config_files(&[home, ("XDG_CONFIG_HOME", "/x")], &["/x/keychoir/keychoir.toml", ETC]);
        check_default_config_files(
            &[home, ("XDG_CONFIG_HOME", "x")],
            &["/home/me/.config/keychoir/keychoir.toml", ETC],
        );
    }

    #[test]
    fn an_invalid_byte_is_reported_by_its_position() {
        assert_eq!(decode_utf8(b"\xef\xbb\xbfa\n".to_vec()), Ok("a\n".into()));
        assert_eq!(decode_utf8(b"a\nb\xff".to_vec()), Err(ReadFileError::NotUtf8 { line: 2, column: 2 }));
        assert_eq!(decode_utf8(b"\xff\xfea\0".to_vec()), Err(ReadFileError::NotUtf8 { line: 1, column: 1 }));
    }

    #[test]
    fn an_unreadable_file_is_an_error_with_its_reason() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(read_file(directory.path()), Err(ReadFileError::Directory));
        assert_eq!(read_file(&directory.path().join("none")), Err(ReadFileError::Missing));
        let path = directory.path().join("large");
        let limit = usize::try_from(MAX_FILE_BYTES).unwrap();
        std::fs::write(&path, vec![b'a'; limit]).unwrap();
        assert_eq!(read_file(&path).unwrap().len(), limit);
        std::fs::write(&path, vec![b'a'; limit + 1]).unwrap();
        assert_eq!(read_file(&path), Err(ReadFileError::TooLarge));
    }
}
