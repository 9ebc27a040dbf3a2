//! Detects changed configuration files, and lists changed settings that need a restart.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Config;
use super::setting::TABLE;

/// The metadata of files at one time. Two values differ if a file has changed in between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files(Vec<(PathBuf, Option<FileStamp>)>);

/// File metadata that changes when the file is written or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl Files {
    /// Records the metadata of a file before the file is read, so that a change during the read is
    /// detected.
    pub(super) fn record(&mut self, path: &Path) {
        self.0.push((path.to_owned(), stamp(path)));
    }

    /// The existing files, without duplicates.
    pub fn read(&self) -> impl Iterator<Item = &Path> {
        let existing = || self.0.iter().filter(|(_, stamp)| stamp.is_some()).map(|(path, _)| path.as_path());
        existing()
            .enumerate()
            .filter(move |(index, path)| !existing().take(*index).any(|other| other == *path))
            .map(|(_, path)| path)
    }

    /// The current metadata of the same files.
    #[must_use]
    pub fn now(&self) -> Self {
        Self(self.0.iter().map(|(path, _)| (path.clone(), stamp(path))).collect())
    }
}

fn stamp(path: &Path) -> Option<FileStamp> {
    let metadata = path.metadata().ok()?;
    Some(FileStamp { modified: metadata.modified().ok(), bytes: metadata.len(), inode: metadata.ino() })
}

/// Settings that a reload applies. All other settings need a restart.
const RELOADED: &[&str] = &[
    "server.max_requests",
    "server.max_requests_per_client",
    "server.base_path",
    "server.tls",
    "server.tls.cert",
    "server.tls.key",
    "server.tls_directory",
    "server.drain_timeout",
    "server.reload_interval",
    "pool.strategy",
    "pool.reserve_credits",
    "pool.queue_timeout",
    "pool.max_queued",
    "pool.cost_estimate_timeout",
    "pool.invalid_confirm_cooldown",
    "pool.permission_cooldown",
    "pool.feature_cooldown",
    "pool.endpoint_cooldown",
    "pool.unproven_cooldown",
    "pool.max_retry_after",
    "pool.probe_after",
    "pool.rate_limited_cooldown",
    "pool.concurrency_cooldown",
    "pool.exhausted_cooldown",
    "pool.invalid_cooldown",
    "pool.billing_cooldown",
    "pool.near_limit_ratio",
    "retry.buffer_size",
    "retry.max_total_buffer_size",
    "retry.spill_size",
    "retry.max_total_spill_size",
    "retry.min_disk_free_percent",
    "retry.spill_directory",
    "retry.max_attempts",
    "retry.timeout",
    "retry.max_error_body_size",
    "retry.error_body_timeout",
    "affinity.max_response_scan_size",
    "affinity.not_found_ttl",
    "websocket.idle_timeout",
    "websocket.max_session_duration",
    "websocket.replay_buffer",
    "websocket.max_buffered_message_size",
    "websocket.speech_idle_timeout",
    "websocket.auth_message_timeout",
    "websocket.max_session_buffer",
    "websocket.close_timeout",
    "websocket.quota_check_interval",
    "websocket.signed_url_base",
    "quota_polling.interval",
    "quota_polling.timeout",
    "quota_polling.quota_lag",
    "log.level",
    "access.block_admin_endpoints",
    "access.redact",
    "access.unpriced_credits",
    "access.max_unpriced_requests",
    "access.bring_your_own_key",
    "access.hosts",
    "access.origins",
    "access.forward_headers",
];

impl Config {
    /// The paths of the settings that differ in `next` and need a restart.
    #[must_use]
    pub fn needs_restart(&self, next: &Self) -> Vec<&'static str> {
        let (mut old, mut new) = (self.clone(), next.clone());
        TABLE
            .iter()
            .filter(|setting| !RELOADED.contains(&setting.path))
            .filter(|setting| setting.show(&mut old) != setting.show(&mut new))
            .map(|setting| setting.path)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reloaded_setting_exists() {
        for path in RELOADED {
            assert!(TABLE.iter().any(|setting| setting.path == *path), "{path}");
        }
    }

    #[test]
    fn only_a_setting_fixed_at_the_start_needs_a_restart() {
        let running = Config::default();
        let mut next = running.clone();
        next.pool.near_limit_ratio = 0.5;
        next.server.drain_timeout = std::time::Duration::ZERO;
        assert_eq!(running.needs_restart(&next), [""; 0]);
        next.storage.path = "elsewhere.db".into();
        next.server.max_connections = 1;
        assert_eq!(running.needs_restart(&next), ["server.max_connections", "storage.path"]);
    }

    #[test]
    fn a_changed_new_or_replaced_file_is_detected() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        let mut files = Files::default();
        files.record(&path);
        assert_eq!(files, files.now());
        std::fs::write(&path, "1").unwrap();
        let written = files.now();
        assert_ne!(files, written);
        std::fs::write(&path, "12").unwrap();
        let longer = files.now();
        assert_ne!(written, longer);
        std::fs::write(folder.path().join("new"), "34").unwrap();
        std::fs::rename(folder.path().join("new"), &path).unwrap();
        assert_ne!(longer, files.now());
    }
}
