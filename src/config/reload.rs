//! Keeps the content and the metadata of the files of a load, so that their changes are detected, and compares two
//! configurations, so that a reload does not apply settings that need a restart.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Config;
use super::setting::{SETTINGS, Setting};
use super::source::{MAX_FILE_BYTES, ReadFileError, read_file};
use crate::platform::files;

/// The metadata of files at one time. If a file changes, the metadata before and after the change differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileStamps(Vec<(PathBuf, Option<FileStamp>)>);

/// The content of files at the time of their last load. The content may be secret, so it cannot be printed.
#[derive(Clone, Default)]
pub struct FileContents(Vec<(PathBuf, FileContent)>);

/// The content of a file, or the reason why it could not be read, and the metadata from before the read.
#[derive(Clone)]
pub(super) struct FileContent {
    stamp: Option<FileStamp>,
    pub(super) text: Result<String, ReadFileError>,
}

impl fmt::Debug for FileContents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|(path, _)| path)).finish()
    }
}

impl FileContents {
    pub(super) fn get(&self, path: &Path) -> Option<&FileContent> {
        self.0.iter().find(|(read_path, _)| read_path == path).map(|(_, content)| content)
    }

    /// Adds a file that was read, or that was looked for and is missing.
    pub(super) fn push(&mut self, path: &Path, content: FileContent) {
        self.0.push((path.to_owned(), content));
    }

    /// Returns the metadata of the files.
    #[must_use]
    pub fn stamps(&self) -> FileStamps {
        FileStamps(self.0.iter().map(|(path, content)| (path.clone(), content.stamp)).collect())
    }

    /// Removes the files below `directory`, so that the next load reads them again.
    pub fn forget_below(&mut self, directory: &Path) {
        self.0.retain(|(path, _)| !path.starts_with(directory));
    }
}

impl FileContent {
    /// Reads a file. The metadata is read before the content, so that a change during the read is detected.
    pub(super) fn read(path: &Path) -> Self {
        let stamp = FileStamp::read(path);
        Self { stamp, text: read_file(path) }
    }

    /// Creates the content `text` of the file at `path`, which is not written yet.
    pub(super) fn with_text(path: &Path, text: &str) -> Self {
        let is_too_large = u64::try_from(text.len()).map_or(true, |length| length > MAX_FILE_BYTES);
        let text = if is_too_large { Err(ReadFileError::TooLarge) } else { Ok(text.to_owned()) };
        Self { stamp: FileStamp::read(path), text }
    }
}

/// File metadata that changes when the file is written or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    modified: Option<SystemTime>,
    bytes: u64,
    /// The identity of the file in the file system, which changes when another file replaces it.
    identity: (u64, u64),
}

impl FileStamps {
    /// Returns the files that existed, without duplicates.
    pub fn existing(&self) -> impl Iterator<Item = &Path> {
        let existing = || self.0.iter().filter(|(_, stamp)| stamp.is_some()).map(|(path, _)| path.as_path());
        existing()
            .enumerate()
            .filter(move |(index, path)| !existing().take(*index).any(|other| other == *path))
            .map(|(_, path)| path)
    }

    /// Reads the current metadata of the files below `directory`, which the caller has just written, and keeps the
    /// metadata of all other files.
    #[must_use]
    pub fn read_again_below(&self, directory: &Path) -> Self {
        let read_again = |(path, stamp): &(PathBuf, Option<FileStamp>)| {
            (path.clone(), if path.starts_with(directory) { FileStamp::read(path) } else { *stamp })
        };
        Self(self.0.iter().map(read_again).collect())
    }

    /// Reads the current metadata of the same files.
    #[must_use]
    pub fn read_again(&self) -> Self {
        Self(self.0.iter().map(|(path, _)| (path.clone(), FileStamp::read(path))).collect())
    }
}

impl FileStamp {
    /// Reads the metadata of a file. Returns `None` if the file cannot be accessed.
    fn read(path: &Path) -> Option<Self> {
        let metadata = path.metadata().ok()?;
        Some(Self {
            modified: metadata.modified().ok(),
            bytes: metadata.len(),
            identity: files::identity(&metadata),
        })
    }
}

/// The sections whose settings are all applied by a reload.
const RELOADED_SECTIONS: [&str; 4] = ["pool", "retry", "websocket", "access"];

/// Settings of other sections that a reload applies. All remaining settings need a restart.
const RELOADED_SETTINGS: [&str; 16] = [
    "server.max_requests",
    "server.max_requests_per_client",
    "server.base_path",
    "server.tls",
    "server.tls.cert",
    "server.tls.key",
    "server.tls_directory",
    "server.drain_timeout",
    "server.reload_interval",
    "affinity.max_response_scan_size",
    "affinity.not_found_ttl",
    "quota_polling.interval",
    "quota_polling.timeout",
    "quota_polling.quota_lag",
    "log.level",
    "admin.token_file",
];

impl Config {
    /// Returns the paths of the settings that differ in `next` and need a restart.
    #[must_use]
    pub fn settings_needing_restart(&self, next: &Self) -> Vec<&'static str> {
        let (mut old, mut new) = (self.clone(), next.clone());
        SETTINGS
            .iter()
            .filter(|setting| !is_reloaded(setting))
            .filter(|setting| setting.differs(&mut old, &mut new))
            .map(|setting| setting.path)
            .collect()
    }

    /// Returns this configuration with the settings of `running` that need a restart, so that none of them applies
    /// only to a part of the running process.
    #[must_use]
    pub fn with_restart_settings_of(&self, running: &Self) -> Self {
        let (mut config, mut running) = (self.clone(), running.clone());
        for setting in SETTINGS.iter().filter(|setting| !is_reloaded(setting)) {
            setting.copy_value(&mut running, &mut config);
            match running.setting_sources.get(setting.path) {
                Some(source) => config.setting_sources.insert(setting.path, source.clone()),
                None => config.setting_sources.remove(setting.path),
            };
        }
        config
    }

    /// Returns whether all settings, keys, clients and the admin token are the same as in `other`, including parts that
    /// are not printed. The generation is not compared.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let (mut first, mut second) = (self.clone(), other.clone());
        let has_same_keys = self.keys.len() == other.keys.len()
            && self.keys.iter().zip(&other.keys).all(|(first, second)| first.is_same_as(second));
        has_same_keys
            && self.clients == other.clients
            && self.paused_keys == other.paused_keys
            && self.admin_token == other.admin_token
            && self.setting_sources == other.setting_sources
            && SETTINGS.iter().all(|setting| !setting.differs(&mut first, &mut second))
    }
}

/// Returns whether a reload applies a change of the setting.
fn is_reloaded(setting: &Setting) -> bool {
    RELOADED_SECTIONS.contains(&setting.section()) || RELOADED_SETTINGS.contains(&setting.path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::AdminTokenFingerprint;

    #[test]
    fn every_reloaded_setting_and_section_exists() {
        for path in RELOADED_SETTINGS {
            assert!(SETTINGS.iter().any(|setting| setting.path == path), "the setting {path} must exist");
        }
        for section in RELOADED_SECTIONS {
            assert!(SETTINGS.iter().any(|setting| setting.section() == section), "[{section}] must exist");
        }
    }

    #[test]
    fn only_settings_that_a_reload_does_not_apply_need_a_restart() {
        let running = Config::default();
        let mut next = running.clone();
        next.pool.near_limit_ratio = 0.5;
        next.server.drain_timeout = std::time::Duration::ZERO;
        assert_eq!(running.settings_needing_restart(&next), [""; 0]);
        next.storage.path = "elsewhere.db".into();
        next.server.max_connections = 1;
        assert_eq!(running.settings_needing_restart(&next), ["server.max_connections", "storage.path"]);
    }

    #[test]
    fn a_different_admin_token_is_a_change() {
        let running = Config::default();
        let token = Some(AdminTokenFingerprint::new("kca_changed"));
        assert!(!running.is_same_as(&Config { admin_token: token, ..running.clone() }));
    }

    #[test]
    fn settings_that_need_a_restart_keep_their_values_and_sources() {
        let mut start = Config::default();
        start.setting_sources.insert("server.listen", "--listen".to_owned());
        let mut next = Config::default();
        next.setting_sources.insert("storage.path", "keychoir.toml:3:1".to_owned());
        next.setting_sources.insert("pool.max_queued", "keychoir.toml:5:1".to_owned());
        next.upstream.base_url = "https://elsewhere.example".parse().unwrap();
        next.upstream.proxy = "http://alice:hunter3@proxy".parse().unwrap();
        next.storage.path = "elsewhere.db".into();
        next.pool.max_queued = 7;
        let applied = next.with_restart_settings_of(&start);
        assert_eq!(start.settings_needing_restart(&applied), [""; 0]);
        assert_eq!(applied.upstream.base_url, start.upstream.base_url);
        assert_eq!(applied.upstream.proxy, start.upstream.proxy);
        assert_eq!((applied.storage.path, applied.pool.max_queued), (start.storage.path, 7));
        let mut sources: Vec<_> = applied.setting_sources.into_iter().collect();
        sources.sort_unstable();
        assert_eq!(
            sources,
            [("pool.max_queued", "keychoir.toml:5:1".to_owned()), ("server.listen", "--listen".to_owned())]
        );
    }

    #[test]
    fn a_different_password_of_a_proxy_is_a_change() {
        let (mut running, mut next) = (Config::default(), Config::default());
        running.upstream.proxy = "http://alice:hunter2@proxy".parse().unwrap();
        next.upstream.proxy = "http://alice:hunter3@proxy".parse().unwrap();
        assert_eq!(running.settings_needing_restart(&next), ["upstream.proxy"]);
        assert!(!running.is_same_as(&next), "a changed password must count as a change");
        assert!(running.is_same_as(&running));
        assert_eq!(running.settings_needing_restart(&running), [""; 0]);
    }

    #[test]
    fn a_changed_new_or_replaced_file_is_detected() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("k.toml");
        let mut contents = FileContents::default();
        contents.push(&path, FileContent::read(&path));
        let missing = contents.stamps();
        assert_eq!(missing, missing.read_again());
        std::fs::write(&path, "1").unwrap();
        let written = missing.read_again();
        assert_ne!(missing, written);
        std::fs::write(&path, "12").unwrap();
        let extended = missing.read_again();
        assert_ne!(written, extended);
        std::fs::write(temporary.path().join("new"), "34").unwrap();
        std::fs::rename(temporary.path().join("new"), &path).unwrap();
        assert_ne!(extended, missing.read_again());
    }
}
