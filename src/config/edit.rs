//! Adds or removes a `[[clients]]` entry of the configuration file and leaves all other bytes, such as
//! comments, unchanged. The file is replaced atomically, and only if the new content is a valid
//! configuration.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use toml::de::{DeTable, DeValue};

use super::source::{self, Environment};
use super::value::BaseFolders;
use super::{LoadedConfig, Overrides, load, variables};
use crate::secret::TokenFingerprint;

/// The error of an edit that left the file unchanged.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// The path of the configuration file is unknown.
    #[error("no configuration file is known: name one with --config FILE or KEYCHOIR_CONFIG")]
    NoFile,
    /// The file cannot be read.
    #[error("{} cannot be read: {reason}", .path.display())]
    Unreadable {
        /// The configuration file.
        path: PathBuf,
        /// The I/O error.
        reason: String,
    },
    /// The file cannot be replaced.
    #[error("{} cannot be replaced: {source}", .path.display())]
    Unwritable {
        /// The configuration file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// A client with that name exists.
    #[error("a client named `{0}` already exists")]
    ClientExists(String),
    /// The file contains no client with that name.
    #[error("the file contains no client named `{0}`")]
    UnknownClient(String),
    /// The clients are written in a different notation than `[[clients]]` tables.
    #[error("the clients are not written as [[clients]] entries: edit the file by hand")]
    UnsupportedNotation,
    /// The edited configuration would be invalid.
    #[error("the file is unchanged, because the edited configuration would be invalid:\n{0}")]
    InvalidConfig(String),
    /// Another process changed the file during the edit.
    #[error("another program changed the file during the edit: try again")]
    ConcurrentChange,
}

/// A client to add. Strings are in the notation of the file.
#[derive(Clone, Debug, Default)]
pub struct NewClient {
    /// Its name.
    pub name: String,
    /// Its quota, such as `50 requests per day`.
    pub quota: Option<String>,
    /// Its rate limit, such as `60 per minute`.
    pub rate_limit: Option<String>,
    /// Its maximum concurrent requests.
    pub max_concurrent: Option<u32>,
    /// Paths below which it may send requests.
    pub paths: Vec<String>,
    /// Names of the keys that serve it.
    pub keys: Vec<String>,
    /// Names of the workspaces that serve it.
    pub workspaces: Vec<String>,
    /// Whether it may send its own key for the provider.
    pub may_bring_key: bool,
}

impl NewClient {
    /// Formats the entry in TOML, with the hash of its token.
    fn format_entry(&self, token: &TokenFingerprint) -> String {
        let mut lines = vec![
            "[[clients]]".to_owned(),
            format!("name = {}", quote_toml(&self.name)),
            format!("token_sha256 = {}", quote_toml(&token.to_string())),
        ];
        for (name, value) in [("quota", &self.quota), ("rate_limit", &self.rate_limit)] {
            lines.extend(value.as_ref().map(|value| format!("{name} = {}", quote_toml(value))));
        }
        lines.extend(self.max_concurrent.map(|count| format!("max_concurrent = {count}")));
        for (name, list) in [("paths", &self.paths), ("keys", &self.keys), ("workspaces", &self.workspaces)] {
            if !list.is_empty() {
                let list: Vec<String> = list.iter().map(|item| quote_toml(item)).collect();
                lines.push(format!("{name} = [{}]", list.join(", ")));
            }
        }
        lines.extend(self.may_bring_key.then(|| "bring_your_own_key = true".to_owned()));
        lines.join("\n") + "\n"
    }
}

/// Formats a string in TOML notation.
fn quote_toml(text: &str) -> String {
    let mut quoted = String::from('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => quoted += &format!("\\U{:08X}", u32::from(control)),
            other => quoted.push(other),
        }
    }
    quoted + "\""
}

/// Adds a client to the configuration file, which is created if it is missing. Returns the path of the
/// file and the edited configuration.
///
/// # Errors
///
/// Fails when a client with that name exists, the file cannot be replaced, or the edited configuration would
/// be invalid.
pub fn add_client(
    overrides: &Overrides,
    client: &NewClient,
    token: &TokenFingerprint,
) -> Result<(PathBuf, LoadedConfig), EditError> {
    edit_file(overrides, MissingFile::Create, |text| {
        if find_entry(text, &client.name)?.is_some() {
            return Err(EditError::ClientExists(client.name.clone()));
        }
        let separator = match text.trim_end_matches(' ') {
            "" => "",
            text if text.ends_with("\n\n") => "",
            text if text.ends_with('\n') => "\n",
            _ => "\n\n",
        };
        Ok(format!("{text}{separator}{}", client.format_entry(token)))
    })
}

/// Removes the client with this name from the configuration file. Returns the path of the file and the
/// edited configuration.
///
/// # Errors
///
/// Fails when the file contains no such client, it cannot be replaced, or the edited configuration would be
/// invalid.
pub fn remove_client(overrides: &Overrides, name: &str) -> Result<(PathBuf, LoadedConfig), EditError> {
    edit_file(overrides, MissingFile::Refuse, |text| {
        let Some((start, end)) = find_entry(text, name)? else {
            return Err(EditError::UnknownClient(name.to_owned()));
        };
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[end..].find('\n').map_or(text.len(), |newline| end + newline + 1);
        let (before, after) = (&text[..line_start], &text[line_end..]);
        // Blank lines are kept on only one side of the removed entry.
        let follows_blank_line = before.is_empty() || before.ends_with("\n\n");
        let after = if follows_blank_line { after.trim_start_matches('\n') } else { after };
        let before = if after.is_empty() { before.trim_end_matches('\n') } else { before };
        let newline = if after.is_empty() && !before.is_empty() { "\n" } else { "" };
        Ok(format!("{before}{newline}{after}"))
    })
}

/// Finds the start and end of the entry with this name, from its header to its last value, in bytes.
fn find_entry(text: &str, name: &str) -> Result<Option<(usize, usize)>, EditError> {
    // Syntax errors are ignored here, because loading the edited file reports them.
    let (root, _) = DeTable::parse_recoverable(text);
    let Some(clients) = root.get_ref().get("clients") else { return Ok(None) };
    let DeValue::Array(entries) = clients.get_ref() else { return Err(EditError::UnsupportedNotation) };
    for entry in entries {
        let Some(table) = entry.get_ref().as_table() else { return Err(EditError::UnsupportedNotation) };
        if !text[entry.span().start..].starts_with("[[") {
            return Err(EditError::UnsupportedNotation);
        }
        if table.get("name").and_then(|value| value.get_ref().as_str()) == Some(name) {
            let end = table.values().map(|value| value.span().end).max();
            return Ok(Some((entry.span().start, end.unwrap_or(entry.span().end))));
        }
    }
    Ok(None)
}

/// The action if the configuration file is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MissingFile {
    Create,
    Refuse,
}

/// The first line of a new file.
const FIRST_LINE: &str =
    "# Keychoir's configuration. For all settings, see config/keychoir.toml in Keychoir's folder.\n";

fn edit_file(
    overrides: &Overrides,
    missing_file: MissingFile,
    edit: impl FnOnce(&str) -> Result<String, EditError>,
) -> Result<(PathBuf, LoadedConfig), EditError> {
    let config_path = config_path(overrides)?;
    // If the path is a symbolic link, its target is replaced and not the link.
    let path = match fs::canonicalize(&config_path) {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound && missing_file == MissingFile::Create => {
            config_path.clone()
        }
        Err(source) => return Err(unreadable(&config_path, &source)),
    };
    let read = || match source::read_file(&path) {
        Err(source::ReadFileError::Missing) if missing_file == MissingFile::Create => {
            Ok(FIRST_LINE.to_owned())
        }
        content => content.map_err(|reason| unreadable(&path, &reason)),
    };
    let text = read()?;
    let edited = edit(&text)?;
    let unwritable = |source| EditError::Unwritable { path: path.clone(), source };
    let file = temporary_file_beside(&path, &edited).map_err(unwritable)?;
    let edited_overrides = Overrides { config_file: Some(file.path().to_owned()), ..overrides.clone() };
    let loaded = load(&edited_overrides).map_err(|problems| {
        let [temporary_path, config_path] =
            [file.path(), &config_path].map(|path| path.display().to_string());
        EditError::InvalidConfig(problems.to_string().replace(&temporary_path, &config_path))
    })?;
    if read()? != text {
        return Err(EditError::ConcurrentChange);
    }
    file.persist(&path).map_err(|error| unwritable(error.error))?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(unwritable)?;
    }
    Ok((config_path, loaded))
}

/// The path from the command line or the environment, or else the first existing default path, or
/// else the first default path.
fn config_path(overrides: &Overrides) -> Result<PathBuf, EditError> {
    if let Some(path) = &overrides.config_file {
        return Ok(path.clone());
    }
    let environment = Environment::capture();
    if let Some(text) = environment.value(variables::CONFIG) {
        return BaseFolders { base: None, home: environment.home() }
            .resolve(text)
            .map_err(|_| EditError::NoFile);
    }
    let paths = environment.default_config_files();
    let existing = paths.iter().find(|path| fs::symlink_metadata(path).is_ok());
    existing.or(paths.first()).cloned().ok_or(EditError::NoFile)
}

fn unreadable(path: &Path, reason: &dyn std::fmt::Display) -> EditError {
    EditError::Unreadable { path: path.to_owned(), reason: reason.to_string() }
}

/// Creates a temporary file with this content in the folder of `path`, with the owner and mode of
/// `path`. If `path` does not exist, only the owner can read the file.
fn temporary_file_beside(path: &Path, text: &str) -> io::Result<NamedTempFile> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let original = match fs::metadata(path) {
        Ok(original) => Some(original),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
            None
        }
        Err(error) => return Err(error),
    };
    // `tempfile` creates the file with mode 0600, which a new configuration file keeps.
    let mut file = tempfile::Builder::new().prefix(".keychoir-").suffix(".toml").tempfile_in(folder)?;
    file.write_all(text.as_bytes())?;
    if let Some(original) = original {
        let created = file.as_file().metadata()?;
        if (created.uid(), created.gid()) != (original.uid(), original.gid()) {
            chown(file.path(), Some(original.uid()), Some(original.gid()))?;
        }
        file.as_file().set_permissions(original.permissions())?;
    }
    file.as_file().sync_all()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::KeyRequirement;
    use super::*;

    fn token() -> TokenFingerprint {
        TokenFingerprint::new("token")
    }

    fn overrides(path: &Path) -> Overrides {
        Overrides {
            config_file: Some(path.to_owned()),
            is_ephemeral: true,
            key_requirement: KeyRequirement::Optional,
            ..Overrides::default()
        }
    }

    fn new_client() -> NewClient {
        NewClient { name: "app".to_owned(), quota: Some("3 requests".to_owned()), ..NewClient::default() }
    }

    /// The entry of `new_client`.
    fn entry() -> String {
        format!("[[clients]]\nname = \"app\"\ntoken_sha256 = \"{}\"\nquota = \"3 requests\"\n", token())
    }

    /// Adds the client to `before` and removes it again.
    #[track_caller]
    fn check(before: &str, after_adding: &str, after_removing: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        fs::write(&path, before).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        add_client(&overrides(&path), &new_client(), &token()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), after_adding);
        remove_client(&overrides(&path), "app").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), after_removing);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "the temporary file is removed");
    }

    #[test]
    fn adding_and_removing_an_entry_keeps_all_comments() {
        check("", &entry(), "");
        let file = "# mine\n[access] # here\n#redact = true\n";
        check(file, &format!("{file}\n{}", entry()), file);
        check(
            "[log]\nlevel = \"warn\"",
            &format!("[log]\nlevel = \"warn\"\n\n{}", entry()),
            "[log]\nlevel = \"warn\"\n",
        );
        let file = "[[clients]]\nname = \"ops\"\ntoken = \"0123456789abcdef\" # a\n\n# end\n";
        check(file, &format!("{file}\n{}", entry()), file);
    }

    #[test]
    fn a_missing_file_is_created_with_mode_0600() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("keychoir").join("k.toml");
        add_client(&overrides(&path), &new_client(), &token()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{FIRST_LINE}\n{}", entry()));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        // A refused edit creates only the folder.
        let refused_path = folder.path().join("other").join("k.toml");
        let invalid_client = NewClient { name: "An App".to_owned(), ..new_client() };
        let result = add_client(&overrides(&refused_path), &invalid_client, &token());
        assert!(matches!(result, Err(EditError::InvalidConfig(_))));
        assert_eq!(fs::read_dir(refused_path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn removing_an_entry_keeps_its_neighbours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        let following_lines =
            "# two\n[[clients]]\nname = \"ops\"\ntoken = \"0123456789abcdef\"\n\n[log]\nlevel = \"warn\"\n";
        fs::write(&path, format!("# one\n{}# last\n\n{following_lines}", entry())).unwrap();
        remove_client(&overrides(&path), "app").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("# one\n# last\n\n{following_lines}"));
    }

    /// Checks that adding the client to `before` is refused with an error that contains `expected`.
    #[track_caller]
    fn check_refused(before: &str, client: &NewClient, expected: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        fs::write(&path, before).unwrap();
        let error = add_client(&overrides(&path), client, &token()).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains(".keychoir-"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), before);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_edit_that_makes_the_configuration_invalid_is_refused() {
        check_refused(&entry(), &new_client(), "a client named `app` already exists");
        check_refused("clients = [{ name = \"x\", token = \"y\" }]", &new_client(), "edit the file by hand");
        check_refused("[serverr]\n", &new_client(), "k.toml:1:2: unknown section `serverr`");
        let client_named = |name: &str| NewClient { name: name.to_owned(), ..new_client() };
        check_refused("", &client_named("An App\"\n"), "this name is invalid");
        let pinned = NewClient { keys: vec!["first".to_owned()], ..new_client() };
        check_refused("", &pinned, "the pool has no key named `first`");
        let path = Path::new("/nowhere/k.toml");
        assert!(matches!(remove_client(&overrides(path), "x"), Err(EditError::Unreadable { .. })));
    }

    #[test]
    fn an_unknown_client_and_the_last_client_of_an_exposed_listener_cannot_be_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        fs::write(&path, format!("[server]\nlisten = \"0.0.0.0:1\"\n{}", entry())).unwrap();
        assert!(matches!(remove_client(&overrides(&path), "ops"), Err(EditError::UnknownClient(_))));
        let error = remove_client(&overrides(&path), "app").unwrap_err().to_string();
        assert!(error.contains("open to other machines"), "{error}");
    }
}
