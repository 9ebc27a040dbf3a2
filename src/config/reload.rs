//! Detects changes of the configuration files, and lists the changed settings that need a restart.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Config;
use super::setting::{SETTINGS, Setting};
use super::source::{MAX_FILE_BYTES, ReadFileError, read_file};

/// The metadata of files at one time. If a file changes, a later value differs from an earlier one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileStamps(Vec<(PathBuf, Option<FileStamp>)>);

/// The content of files at the time of their last load. The content may be secret, so it cannot be printed.
#[derive(Clone, Default)]
pub struct FileContents(HashMap<PathBuf, FileContent>);

/// The content of a file, or the reason why it could not be read, and the metadata from before the read.
#[derive(Clone)]
pub(super) struct FileContent {
    stamp: Option<FileStamp>,
    pub(super) text: Result<String, ReadFileError>,
}

impl fmt::Debug for FileContents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl FileContents {
    pub(super) fn get(&self, path: &Path) -> Option<&FileContent> {
        self.0.get(path)
    }

    pub(super) fn insert(&mut self, path: &Path, content: FileContent) {
        self.0.insert(path.to_owned(), content);
    }

    /// Removes the files below `directory`, so that the next load reads them again.
    pub fn forget_below(&mut self, directory: &Path) {
        self.0.retain(|path, _| !path.starts_with(directory));
    }
}

impl FileContent {
    /// Reads a file. The metadata is read before the content, so that a change during the read is detected.
    pub(super) fn read(path: &Path) -> Self {
        let stamp = FileStamp::read(path);
        Self { stamp, text: read_file(path) }
    }

    /// Replaces the content of the file at `path` by `text`, which is not written yet.
    pub(super) fn replaced(path: &Path, text: &str) -> Self {
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
    inode: u64,
}

impl FileStamps {
    /// Records the metadata of a file that was read.
    pub(super) fn record(&mut self, path: &Path, content: &FileContent) {
        self.0.push((path.to_owned(), content.stamp));
    }

    /// The files that existed, without duplicates.
    pub fn existing(&self) -> impl Iterator<Item = &Path> {
        let existing = || self.0.iter().filter(|(_, stamp)| stamp.is_some()).map(|(path, _)| path.as_path());
        existing()
            .enumerate()
            .filter(move |(index, path)| !existing().take(*index).any(|other| other == *path))
            .map(|(_, path)| path)
    }

    /// Reads the current metadata of the files below `folder`, which the caller has just written.
    #[must_use]
    pub fn read_again_below(&self, folder: &Path) -> Self {
        let read = |(path, stamp): &(PathBuf, Option<FileStamp>)| {
            (path.clone(), if path.starts_with(folder) { FileStamp::read(path) } else { *stamp })
        };
        Self(self.0.iter().map(read).collect())
    }

    /// Reads the current metadata of the same files.
    #[must_use]
    pub fn read_again(&self) -> Self {
        Self(self.0.iter().map(|(path, _)| (path.clone(), FileStamp::read(path))).collect())
    }
}

impl FileStamp {
    /// Reads the metadata of a file, or `None` if the file cannot be accessed.
    fn read(path: &Path) -> Option<Self> {
        let metadata = path.metadata().ok()?;
        Some(Self { modified: metadata.modified().ok(), bytes: metadata.len(), inode: metadata.ino() })
    }
}

/// Sections of which a reload applies every setting.
const RELOADED_SECTIONS: [&str; 4] = ["pool", "retry", "websocket", "access"];

/// Settings of other sections that a reload applies. All remaining settings need a restart.
const RELOADED_SETTINGS: [&str; 15] = [
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
];

impl Config {
    /// The paths of the settings that differ in `next` and need a restart.
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
}

impl Config {
    /// Whether all settings, with their sources, all keys and all clients are the same as in `other`. The
    /// generation is not compared.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let (mut first, mut second) = (self.clone(), other.clone());
        let are_keys_same = self.keys.len() == other.keys.len()
            && self.keys.iter().zip(&other.keys).all(|(first, second)| first.is_same_as(second));
        are_keys_same
            && self.clients == other.clients
            && self.paused_keys == other.paused_keys
            && self.setting_sources == other.setting_sources
            && SETTINGS
                .iter()
                .all(|setting| setting.format_value(&mut first) == setting.format_value(&mut second))
    }
}

fn is_reloaded(setting: &Setting) -> bool {
    RELOADED_SECTIONS.contains(&setting.section()) || RELOADED_SETTINGS.contains(&setting.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reloaded_setting_and_section_exists() {
        for path in RELOADED_SETTINGS {
            assert!(SETTINGS.iter().any(|setting| setting.path == path), "{path}");
        }
        for section in RELOADED_SECTIONS {
            assert!(SETTINGS.iter().any(|setting| setting.section() == section), "{section}");
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
    fn another_password_of_a_proxy_is_a_change() {
        let (mut running, mut next) = (Config::default(), Config::default());
        running.upstream.proxy = "http://alice:hunter2@proxy".parse().unwrap();
        next.upstream.proxy = "http://alice:hunter3@proxy".parse().unwrap();
        assert_eq!(running.settings_needing_restart(&next), ["upstream.proxy"]);
        assert_eq!(running.settings_needing_restart(&running), [""; 0]);
    }

    #[test]
    fn a_changed_new_or_replaced_file_is_detected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        let mut files = FileStamps::default();
        files.record(&path, &FileContent::read(&path));
        assert_eq!(files, files.read_again());
        std::fs::write(&path, "1").unwrap();
        let written = files.read_again();
        assert_ne!(files, written);
        std::fs::write(&path, "12").unwrap();
        let longer = files.read_again();
        assert_ne!(written, longer);
        std::fs::write(folder.path().join("new"), "34").unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        assert_ne!(longer, files.read_again());
    }
}
