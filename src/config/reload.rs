//! What it takes to read a configuration again: the files as they were, and which settings count
//! only from the next start.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Config;
use super::setting::TABLE;

/// Files as they were at a moment. Two of them differ when one of the files has changed between.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files(Vec<(PathBuf, Option<Stamp>)>);

/// What changes with a file: also when another takes its place, as tools that replace files do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl Files {
    /// Notes how a file is before it is read: a change during the reading is then seen.
    pub(super) fn note(&mut self, path: &Path) {
        self.0.push((path.to_owned(), stamp(path)));
    }

    /// Those that there were, each once.
    pub fn read(&self) -> impl Iterator<Item = &Path> {
        let there = || self.0.iter().filter(|(_, stamp)| stamp.is_some()).map(|(path, _)| path.as_path());
        there()
            .enumerate()
            .filter(move |(index, path)| !there().take(*index).any(|other| other == *path))
            .map(|(_, path)| path)
    }

    /// The same files as they are now.
    #[must_use]
    pub fn now(&self) -> Self {
        Self(self.0.iter().map(|(path, _)| (path.clone(), stamp(path))).collect())
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let seen = path.metadata().ok()?;
    Some(Stamp { modified: seen.modified().ok(), bytes: seen.len(), inode: seen.ino() })
}

/// Settings that a reload changes; the others are built into what runs.
const RELOADED: &[&str] = &[
    "server.requests_max",
    "server.max_requests_per_client",
    "server.base_path",
    "server.tls",
    "server.tls.cert",
    "server.tls.key",
    "server.tls_directory",
    "server.shutdown_grace_ms",
    "server.reload_interval_ms",
    "pool.strategy",
    "pool.reserve_credits",
    "pool.wait_ms_max",
    "pool.waiting_max",
    "pool.foresee_ms_max",
    "pool.invalid_confirm_ms",
    "pool.permission_cooldown_ms",
    "pool.feature_cooldown_ms",
    "pool.endpoint_cooldown_ms",
    "pool.unproven_cooldown_ms",
    "pool.max_retry_after_ms",
    "pool.probe_after_ms",
    "pool.rate_limited_cooldown_ms",
    "pool.concurrency_cooldown_ms",
    "pool.exhausted_cooldown_ms",
    "pool.invalid_cooldown_ms",
    "pool.billing_cooldown_ms",
    "pool.near_limit_ratio",
    "replay.memory_max",
    "replay.memory_total_max",
    "replay.disk_max",
    "replay.disk_total_max",
    "replay.disk_free_percent_min",
    "replay.directory",
    "replay.attempts_max",
    "replay.deadline_ms",
    "replay.error_body_bytes_max",
    "replay.error_body_ms_max",
    "ownership.answer_bytes_max",
    "ownership.not_found_ttl_ms",
    "sockets.idle_ms_max",
    "sockets.lifetime_ms_max",
    "sockets.opening_bytes_max",
    "sockets.frame_bytes_max",
    "sockets.quiet_ms_max",
    "sockets.introduction_ms_max",
    "sockets.max_session_buffer",
    "sockets.close_timeout",
    "sockets.quota_check_interval",
    "sockets.signed_url_base",
    "watch.interval_ms",
    "watch.timeout_ms",
    "watch.quota_lag_ms",
    "log.level",
    "access.deny_dangerous",
    "access.redact",
    "access.unpriced_credits",
    "access.max_unpriced_requests",
    "access.bring_your_own_key",
    "access.hosts",
    "access.origins",
    "access.forward_headers",
];

impl Config {
    /// The paths of the settings that differ in `next` and count only from the next start.
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
    fn every_reloaded_setting_is_one() {
        for path in RELOADED {
            assert!(TABLE.iter().any(|setting| setting.path == *path), "{path}");
        }
    }

    #[test]
    fn only_what_is_built_in_needs_a_restart() {
        let running = Config::default();
        let mut next = running.clone();
        next.pool.near_limit_ratio = 0.5;
        next.server.shutdown_grace = std::time::Duration::ZERO;
        assert_eq!(running.needs_restart(&next), [""; 0]);
        next.storage.path = "elsewhere.db".into();
        next.server.connections_max = 1;
        assert_eq!(running.needs_restart(&next), ["server.connections_max", "storage.path"]);
    }

    #[test]
    fn a_file_that_changes_appears_or_is_replaced_is_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.toml");
        let mut files = Files::default();
        files.note(&path);
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
