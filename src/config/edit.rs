//! Edits the configuration file: adds or removes one entry and keeps every other byte, above all
//! comments. The file is replaced atomically, and only if the new content is a valid configuration.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;
use toml::de::{DeTable, DeValue};

use super::source::{self, Environment};
use super::value::Folders;
use super::{Loaded, Overrides, load, variables};
use crate::secret::TokenFingerprint;

/// The errors that leave the file unchanged.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// No path of a configuration file is known.
    #[error("there is no configuration file to change: name one with --config FILE or KEYCHOIR_CONFIG")]
    NoFile,
    /// The file cannot be read.
    #[error("{} cannot be read: {reason}", .path.display())]
    Unreadable {
        /// The configuration file.
        path: PathBuf,
        /// The error of the file system.
        reason: String,
    },
    /// The file cannot be replaced.
    #[error("{} cannot be replaced: {source}", .path.display())]
    Unwritable {
        /// The configuration file.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// A client of that name exists already.
    #[error("there is a client `{0}` already")]
    Exists(String),
    /// No client of that name exists.
    #[error("there is no client `{0}` in the file")]
    Unknown(String),
    /// The clients are not written as `[[clients]]` tables.
    #[error("the clients are not written as [[clients]] entries: change the file by hand")]
    NotTables,
    /// The changed file would be invalid.
    #[error("the file stays as it is, because the new one would have mistakes:\n{0}")]
    Invalid(String),
    /// Another process changed the file meanwhile.
    #[error("the file was changed by another program meanwhile: try again")]
    Changed,
}

/// A client to be added. Texts are in the notation of the file.
#[derive(Clone, Debug, Default)]
pub struct NewClient {
    /// Its name.
    pub name: String,
    /// Its quota, such as `50 requests per day`.
    pub quota: Option<String>,
    /// Its rate limit, such as `60 per minute`.
    pub rate_limit: Option<String>,
    /// Its maximum of concurrent requests.
    pub max_concurrent: Option<u32>,
    /// Paths below which it may send requests.
    pub paths: Vec<String>,
    /// Names of the keys that serve it.
    pub keys: Vec<String>,
    /// Names of the workspaces that serve it.
    pub workspaces: Vec<String>,
    /// Whether it may send its own key of the provider.
    pub may_bring_key: bool,
}

impl NewClient {
    /// The entry in TOML, with the hash of its token.
    fn entry(&self, token: &TokenFingerprint) -> String {
        let mut lines = vec![
            "[[clients]]".to_owned(),
            format!("name = {}", quoted(&self.name)),
            format!("token_sha256 = {}", quoted(&token.to_string())),
        ];
        let texts = [("quota", &self.quota), ("rate_limit", &self.rate_limit)];
        lines.extend(
            texts.iter().filter_map(|(name, text)| Some(format!("{name} = {}", quoted(text.as_ref()?)))),
        );
        lines.extend(self.max_concurrent.map(|count| format!("max_concurrent = {count}")));
        for (name, list) in [("paths", &self.paths), ("keys", &self.keys), ("workspaces", &self.workspaces)] {
            if !list.is_empty() {
                let list: Vec<String> = list.iter().map(|text| quoted(text)).collect();
                lines.push(format!("{name} = [{}]", list.join(", ")));
            }
        }
        lines.extend(self.may_bring_key.then(|| "bring_your_own_key = true".to_owned()));
        lines.join("\n") + "\n"
    }
}

/// A string in TOML quotes.
fn quoted(text: &str) -> String {
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

/// Adds a client to the configuration file, which is created if it is missing. Returns its path,
/// and the configuration after the change.
///
/// # Errors
///
/// When a client of that name exists, or the file cannot be changed or would be invalid.
pub fn add_client(
    overrides: &Overrides,
    client: &NewClient,
    token: &TokenFingerprint,
) -> Result<(PathBuf, Loaded), EditError> {
    change(overrides, Missing::Create, |text| {
        if entry_of(text, &client.name)?.is_some() {
            return Err(EditError::Exists(client.name.clone()));
        }
        let gap = match text.trim_end_matches(' ') {
            "" => "",
            text if text.ends_with("\n\n") => "",
            text if text.ends_with('\n') => "\n",
            _ => "\n\n",
        };
        Ok(format!("{text}{gap}{}", client.entry(token)))
    })
}

/// Removes the client of this name from the configuration file. Returns its path, and the
/// configuration after the change.
///
/// # Errors
///
/// When no client of that name exists, or the file cannot be changed or would be invalid.
pub fn remove_client(overrides: &Overrides, name: &str) -> Result<(PathBuf, Loaded), EditError> {
    change(overrides, Missing::Refuse, |text| {
        let Some((start, end)) = entry_of(text, name)? else {
            return Err(EditError::Unknown(name.to_owned()));
        };
        let line_end = |at: usize| text[at..].find('\n').map_or(text.len(), |newline| at + newline + 1);
        let (before, after) =
            (&text[..text[..start].rfind('\n').map_or(0, |newline| newline + 1)], &text[line_end(end)..]);
        // The blank lines on one side of the entry suffice.
        let is_blank = before.is_empty() || before.ends_with("\n\n");
        let after = if is_blank { after.trim_start_matches('\n') } else { after };
        let before = if after.is_empty() { before.trim_end_matches('\n') } else { before };
        let newline = if after.is_empty() && !before.is_empty() { "\n" } else { "" };
        Ok(format!("{before}{newline}{after}"))
    })
}

/// The byte range of the entry of this name, from its header to the end of its last value.
fn entry_of(text: &str, name: &str) -> Result<Option<(usize, usize)>, EditError> {
    // The load that follows reports syntax errors with their position.
    let (root, _) = DeTable::parse_recoverable(text);
    let Some(clients) = root.get_ref().get("clients") else { return Ok(None) };
    let DeValue::Array(entries) = clients.get_ref() else { return Err(EditError::NotTables) };
    for entry in entries {
        let Some(table) = entry.get_ref().as_table() else { return Err(EditError::NotTables) };
        if !text[entry.span().start..].starts_with("[[") {
            return Err(EditError::NotTables);
        }
        if table.get("name").and_then(|value| value.get_ref().as_str()) == Some(name) {
            let end = table.values().map(|value| value.span().end).max();
            return Ok(Some((entry.span().start, end.unwrap_or(entry.span().end))));
        }
    }
    Ok(None)
}

/// The action if the file is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    Create,
    Refuse,
}

/// The first lines of a new file.
const FIRST_LINES: &str =
    "# Keychoir's configuration. Every setting: keychoir.toml in Keychoir's folder `config`.\n";

fn change(
    overrides: &Overrides,
    missing: Missing,
    edit: impl FnOnce(&str) -> Result<String, EditError>,
) -> Result<(PathBuf, Loaded), EditError> {
    let named = config_path(overrides)?;
    // The target of a symbolic link is changed, and the link stays.
    let path = match fs::canonicalize(&named) {
        Ok(path) => path,
        Err(error) if error.kind() == io::ErrorKind::NotFound && missing == Missing::Create => named.clone(),
        Err(source) => return Err(unreadable(&named, &source)),
    };
    let read = || match source::read_file(&path) {
        Err(source::Unreadable::Missing) if missing == Missing::Create => Ok(FIRST_LINES.to_owned()),
        read => read.map_err(|reason| unreadable(&path, &reason)),
    };
    let text = read()?;
    let edited = edit(&text)?;
    let unwritable = |source| EditError::Unwritable { path: path.clone(), source };
    let file = temporary_file_beside(&path, &edited).map_err(unwritable)?;
    let trial = Overrides { config_file: Some(file.path().to_owned()), ..overrides.clone() };
    let loaded = load(&trial).map_err(|problems| {
        let named = named.display().to_string();
        EditError::Invalid(problems.to_string().replace(&file.path().display().to_string(), &named))
    })?;
    if read()? != text {
        return Err(EditError::Changed);
    }
    file.persist(&path).map_err(|error| unwritable(error.error))?;
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(unwritable)?;
    }
    Ok((named, loaded))
}

/// The file that the command line or the environment names. Otherwise the first existing default
/// path, or the first default path if none exists.
fn config_path(overrides: &Overrides) -> Result<PathBuf, EditError> {
    if let Some(path) = &overrides.config_file {
        return Ok(path.clone());
    }
    let environment = Environment::of_process();
    if let Some(text) = environment.value(variables::CONFIG) {
        return Folders { base: None, home: environment.home() }.file(text).map_err(|_| EditError::NoFile);
    }
    let files = environment.config_files();
    let existing = files.iter().find(|path| fs::symlink_metadata(path).is_ok());
    existing.or(files.first()).cloned().ok_or(EditError::NoFile)
}

fn unreadable(path: &Path, reason: &dyn std::fmt::Display) -> EditError {
    EditError::Unreadable { path: path.to_owned(), reason: reason.to_string() }
}

/// Creates a temporary file beside `path` with this text and with the owner and mode of `path`. If
/// `path` does not exist, only the owner may read the file.
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
    // The temporary file has mode 0600, and a new configuration file keeps this mode.
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

    use super::super::Need;
    use super::*;

    fn token() -> TokenFingerprint {
        TokenFingerprint::of("token")
    }

    fn overrides(path: &Path) -> Overrides {
        Overrides {
            config_file: Some(path.to_owned()),
            is_ephemeral: true,
            keys: Need::Optional,
            ..Overrides::default()
        }
    }

    fn app() -> NewClient {
        NewClient { name: "app".to_owned(), quota: Some("3 requests".to_owned()), ..NewClient::default() }
    }

    /// The entry of `app`.
    fn entry() -> String {
        format!("[[clients]]\nname = \"app\"\ntoken_sha256 = \"{}\"\nquota = \"3 requests\"\n", token())
    }

    /// Adds the client to `before` and removes it again.
    #[track_caller]
    fn check(before: &str, with: &str, without: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        fs::write(&path, before).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        add_client(&overrides(&path), &app(), &token()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), with);
        remove_client(&overrides(&path), "app").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), without);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn an_added_and_removed_entry_leaves_every_comment() {
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
    fn a_missing_file_is_created_readable_by_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new").join("keychoir").join("k.toml");
        add_client(&overrides(&path), &app(), &token()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{FIRST_LINES}\n{}", entry()));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        // After an invalid change only the folder exists.
        let other = folder.path().join("other").join("k.toml");
        let wrong = NewClient { name: "An App".to_owned(), ..app() };
        assert!(matches!(add_client(&overrides(&other), &wrong, &token()), Err(EditError::Invalid(_))));
        assert_eq!(fs::read_dir(other.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn a_removed_entry_leaves_its_neighbours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        let other =
            "# two\n[[clients]]\nname = \"ops\"\ntoken = \"0123456789abcdef\"\n\n[log]\nlevel = \"warn\"\n";
        fs::write(&path, format!("# one\n{}# last\n\n{other}", entry())).unwrap();
        remove_client(&overrides(&path), "app").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("# one\n# last\n\n{other}"));
    }

    /// The error of an invalid change of `before`.
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
    fn a_change_to_an_invalid_configuration_is_refused() {
        check_refused(&entry(), &app(), "there is a client `app` already");
        check_refused("clients = [{ name = \"x\", token = \"y\" }]", &app(), "change the file by hand");
        check_refused("[serverr]\n", &app(), "k.toml:1:2: unknown section `serverr`");
        let client_named = |name: &str| NewClient { name: name.to_owned(), ..app() };
        check_refused("", &client_named("An App\"\n"), "this name is not plain");
        let pinned = NewClient { keys: vec!["first".to_owned()], ..app() };
        check_refused("", &pinned, "the pool has no key of the name `first`");
        let path = Path::new("/nowhere/k.toml");
        assert!(matches!(remove_client(&overrides(path), "x"), Err(EditError::Unreadable { .. })));
    }

    #[test]
    fn neither_an_unknown_client_nor_the_last_one_of_an_exposed_listener_can_be_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        fs::write(&path, format!("[server]\nlisten = \"0.0.0.0:1\"\n{}", entry())).unwrap();
        assert!(matches!(remove_client(&overrides(&path), "ops"), Err(EditError::Unknown(_))));
        let error = remove_client(&overrides(&path), "app").unwrap_err().to_string();
        assert!(error.contains("open to other machines"), "{error}");
    }
}
