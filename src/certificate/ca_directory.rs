//! Opens the local CA: reads it from a directory that several processes may use, and generates it if it is missing, or
//! for use in memory. Files are replaced atomically, so that a partial file is never read. A lock allows one writer at
//! a time, so that processes that start together use the same CA. An unusable CA file is renamed (quarantined), never
//! deleted. Also restores the private mode of the CA file, writes the certificate for clients, and updates the bundle
//! (see `bundle`).

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::local_ca::{CaDefect, CertificateError, LocalCa};
use super::{CaLocation, refresh_bundle};
use crate::platform::files;
use crate::policy::units::UnixMs;
use crate::private_file;
use crate::tasks;

/// The file with the CA's certificate and private key.
const CA_KEY_FILE: &str = "authority.pem";

/// The file with the certificate alone, for clients to trust.
const CA_CERTIFICATE_FILE: &str = "ca.pem";

/// The file that is locked by the process that changes the directory.
const LOCK_FILE: &str = "lock";

/// Maximum wait for the lock. Generating a CA takes milliseconds, so the other process hangs if the wait is longer.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of bytes read from the key file. A certificate and a key are one or two kilobytes long.
const MAX_KEY_FILE_SIZE: u64 = 64 * 1024;

/// The reason why the CA cannot be opened, or cannot issue a certificate.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The directory or a file in it cannot be created, written, locked or renamed.
    #[error("{} cannot be written: {source}", .path.display())]
    Unwritable {
        /// The directory or file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// The key file cannot be read.
    #[error("{} cannot be read: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: io::Error,
    },
    /// Another process held the lock for longer than the timeout.
    #[error("another process holds the lock file {}", .0.display())]
    Locked(PathBuf),
    /// The certificate of a new CA, or one that the CA issues, cannot be created.
    #[error(transparent)]
    Generate(#[from] CertificateError),
}

/// The local CA, as it was loaded or created.
#[derive(Debug)]
pub struct OpenedCa {
    /// The CA.
    pub ca: LocalCa,
    /// The unusable file that the CA replaced, or `None` if it replaced none.
    pub quarantined: Option<QuarantinedFile>,
}

/// An unusable file that was renamed and replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuarantinedFile {
    /// The new path of the file.
    pub path: PathBuf,
    /// The reason why the file was unusable.
    pub defect: CaDefect,
}

/// Formats the log message about the replaced CA.
impl fmt::Display for QuarantinedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}. Its file is kept as {}, and a new CA was created. Apps and browsers that trusted the old CA \
             must trust the new one, see `keychoir env`",
            self.defect,
            self.path.display()
        )
    }
}

/// Opens the CA at `location`. Generates a missing CA, and quarantines and replaces an unusable CA.
///
/// # Errors
///
/// Fails when the CA cannot be read, or a new CA cannot be generated or stored.
pub fn open(location: &CaLocation, now: UnixMs) -> Result<OpenedCa, CaError> {
    let directory = match location {
        CaLocation::Directory(directory) => directory,
        CaLocation::Memory => return Ok(OpenedCa { ca: LocalCa::generate(now)?, quarantined: None }),
    };
    if let StoredCa::Usable(ca) = read_stored_ca(directory, now)? {
        // An error is only logged, because a process without write access can still use the CA.
        if let Err(error) = publish_ca(directory, &ca) {
            tracing::debug!("{error}");
        }
        return Ok(OpenedCa { ca: *ca, quarantined: None });
    }
    let unwritable = |source| CaError::Unwritable { path: directory.clone(), source };
    private_file::create_directory(directory).map_err(unwritable)?;
    let _lock = lock_directory(directory)?;
    // The file is read again, because another process may have generated the CA before this process held the
    // lock.
    let quarantined = match read_stored_ca(directory, now)? {
        StoredCa::Usable(ca) => return Ok(OpenedCa { ca: *ca, quarantined: None }),
        StoredCa::Missing => None,
        StoredCa::Unusable(defect) => {
            let suffix = match defect {
                CaDefect::Malformed => "broken",
                CaDefect::Expired => "ended",
            };
            let path = directory.join(format!("{CA_KEY_FILE}.{suffix}-{}", now.0));
            fs::rename(directory.join(CA_KEY_FILE), &path).map_err(unwritable)?;
            Some(QuarantinedFile { path, defect })
        }
    };
    let ca = LocalCa::generate(now)?;
    write_atomically(&directory.join(CA_KEY_FILE), ca.secret_pem().as_bytes())?;
    publish_ca(directory, &ca)?;
    Ok(OpenedCa { ca, quarantined })
}

/// Returns the path of the private key of the CA in `directory`. [`open`] creates the file.
#[must_use]
pub fn ca_key_file(directory: &Path) -> PathBuf {
    directory.join(CA_KEY_FILE)
}

/// Returns the path of the CA certificate in `directory`. [`open`] creates the file.
#[must_use]
pub fn ca_certificate_file(directory: &Path) -> PathBuf {
    directory.join(CA_CERTIFICATE_FILE)
}

/// The content of the key file.
enum StoredCa {
    /// The file contains a CA that does not have to be renewed.
    Usable(Box<LocalCa>),
    /// The file contains no valid CA, or one that has expired or expires soon.
    Unusable(CaDefect),
    /// The file does not exist.
    Missing,
}

/// Reads the key file, and restricts its mode if other users could read it.
fn read_stored_ca(directory: &Path, now: UnixMs) -> Result<StoredCa, CaError> {
    let path = directory.join(CA_KEY_FILE);
    let unreadable = |source| CaError::Unreadable { path: path.clone(), source };
    let mut bytes = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            file.take(MAX_KEY_FILE_SIZE).read_to_end(&mut bytes).map_err(unreadable)?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(StoredCa::Missing),
        Err(error) => return Err(unreadable(error)),
    }
    let pem = std::str::from_utf8(&bytes).map_err(|_| CaDefect::Malformed);
    Ok(match pem.and_then(|pem| LocalCa::parse(pem, now)) {
        Ok(ca) => {
            restrict_mode(&path);
            StoredCa::Usable(Box::new(ca))
        }
        Err(defect) => StoredCa::Unusable(defect),
    })
}

/// Restores mode 0600, which a copy or a backup may have widened.
fn restrict_mode(path: &Path) {
    let is_accessible_by_others =
        path.metadata().is_ok_and(|metadata| files::mode(&metadata).is_some_and(|mode| mode & 0o077 != 0));
    if is_accessible_by_others && let Err(error) = files::set_mode(path, 0o600) {
        tracing::warn!("other users may read {}, and its mode cannot be changed: {error}", path.display());
    }
}

/// Writes the files for other programs: the CA certificate, and the bundle if `directory` contains one.
fn publish_ca(directory: &Path, ca: &LocalCa) -> Result<(), CaError> {
    write_if_changed(&ca_certificate_file(directory), ca.pem().as_bytes())?;
    refresh_bundle(directory, ca);
    Ok(())
}

/// Writes `content` to a file, unless the file already has this content.
pub(super) fn write_if_changed(path: &Path, content: &[u8]) -> Result<(), CaError> {
    if fs::read(path).is_ok_and(|existing| existing == content) {
        Ok(())
    } else {
        write_atomically(path, content)
    }
}

/// Replaces the file at `path` with a file of mode 0600 that contains `content`, and syncs it with its directory.
fn write_atomically(path: &Path, content: &[u8]) -> Result<(), CaError> {
    let replace_result =
        private_file::replace(path, content).and_then(|()| private_file::sync_directory_of(path));
    replace_result.map_err(|source| CaError::Unwritable { path: path.to_owned(), source })
}

/// Waits for the lock of the directory. Dropping the returned file releases the lock.
fn lock_directory(directory: &Path) -> Result<File, CaError> {
    let path = directory.join(LOCK_FILE);
    let unwritable = |source| CaError::Unwritable { path: path.clone(), source };
    let file = private_file::open_or_create(&path).map_err(unwritable)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::Error(error)) => return Err(unwritable(error)),
        Err(TryLockError::WouldBlock) => {}
    }
    // `File::lock` has no timeout, so it runs on its own thread.
    let (lock_sender, lock_receiver) = mpsc::sync_channel(1);
    tasks::spawn_thread("lock", move || {
        let _ = lock_sender.send(file.lock().map(|()| file));
    })
    .map_err(unwritable)?;
    match lock_receiver.recv_timeout(LOCK_TIMEOUT) {
        Ok(locked_file) => locked_file.map_err(unwritable),
        Err(_) => Err(CaError::Locked(path)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};

    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn mode_of(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    fn file_names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[track_caller]
    fn open_ca(directory: &Path, now: UnixMs) -> OpenedCa {
        open(&CaLocation::Directory(directory.to_owned()), now).unwrap()
    }

    #[test]
    fn a_ca_is_generated_once_and_readable_only_by_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("state/tls");
        let created = open_ca(&directory, NOW);
        assert_eq!(created.quarantined, None);
        let reopened = open_ca(&directory, NOW.plus(Duration::from_secs(3600)));
        assert_eq!((reopened.ca.pem(), reopened.quarantined), (created.ca.pem(), None));
        assert_eq!(file_names(&directory), ["authority.pem", "ca.pem", "lock"]);
        assert_eq!((mode_of(&directory), mode_of(&parent.path().join("state"))), (0o700, 0o700));
        for name in file_names(&directory) {
            assert_eq!(mode_of(&directory.join(&name)), 0o600, "only the owner must have access to {name}");
        }
        assert_eq!(fs::read_to_string(ca_certificate_file(&directory)).unwrap(), created.ca.pem());
    }

    #[test]
    fn a_file_that_others_can_read_becomes_private_again() {
        let directory = tempfile::tempdir().unwrap();
        open_ca(directory.path(), NOW);
        let path = directory.path().join(CA_KEY_FILE);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        open_ca(directory.path(), NOW);
        assert_eq!(mode_of(&path), 0o600);
    }

    #[test]
    fn a_malformed_ca_is_quarantined_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let original = open_ca(directory.path(), NOW);
        for (index, malformed) in [b"" as &[u8], b"\xff\xfe", b"-----BEGIN"].into_iter().enumerate() {
            fs::write(directory.path().join(CA_KEY_FILE), malformed).unwrap();
            let now = UnixMs(NOW.0 + index as u64);
            let replacement = open_ca(directory.path(), now);
            let quarantined = replacement.quarantined.unwrap();
            assert_eq!(quarantined.defect, CaDefect::Malformed);
            assert_eq!(quarantined.path, directory.path().join(format!("authority.pem.broken-{}", now.0)));
            assert_eq!(fs::read(&quarantined.path).unwrap(), malformed);
            assert_ne!(replacement.ca.pem(), original.ca.pem());
            assert_eq!(
                fs::read_to_string(ca_certificate_file(directory.path())).unwrap(),
                replacement.ca.pem()
            );
            assert_eq!(open_ca(directory.path(), now).quarantined, None);
        }
    }

    #[test]
    fn a_ca_that_expires_soon_is_quarantined_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let original = open_ca(directory.path(), NOW);
        // A CA is replaced 90 days before its lifetime of 3,650 days ends.
        let replacement = open_ca(directory.path(), NOW.plus(Duration::from_secs(3600 * 24 * 3600)));
        let quarantined = replacement.quarantined.unwrap();
        assert_eq!(quarantined.defect, CaDefect::Expired);
        assert!(fs::read_to_string(&quarantined.path).unwrap().starts_with(original.ca.pem()));
        assert_ne!(replacement.ca.pem(), original.ca.pem());
    }

    #[test]
    fn a_missing_or_changed_certificate_is_written_again() {
        let directory = tempfile::tempdir().unwrap();
        let original = open_ca(directory.path(), NOW);
        for changed in [None, Some("changed")] {
            fs::remove_file(ca_certificate_file(directory.path())).unwrap();
            let _ = changed.map(|content| fs::write(ca_certificate_file(directory.path()), content).unwrap());
            assert_eq!(open_ca(directory.path(), NOW).ca.pem(), original.ca.pem());
            assert_eq!(fs::read_to_string(ca_certificate_file(directory.path())).unwrap(), original.ca.pem());
        }
    }

    #[test]
    fn processes_that_start_together_open_the_same_ca() {
        for malformed in [None, Some("malformed")] {
            let directory = tempfile::tempdir().unwrap();
            let _ = malformed.map(|content| fs::write(directory.path().join(CA_KEY_FILE), content).unwrap());
            let barrier = Arc::new(Barrier::new(8));
            let openers: Vec<_> = (0..8)
                .map(|_| {
                    let (barrier, directory) = (Arc::clone(&barrier), directory.path().to_owned());
                    let open_together = move || {
                        barrier.wait();
                        let opened = open_ca(&directory, NOW);
                        (opened.ca.pem().to_owned(), opened.quarantined.is_some())
                    };
                    tasks::spawn_thread("opener", open_together).unwrap()
                })
                .collect();
            let opened_cas: Vec<_> = openers.into_iter().map(|opener| opener.join().unwrap()).collect();
            assert!(opened_cas.iter().all(|(pem, _)| *pem == opened_cas[0].0));
            let quarantine_count = opened_cas.iter().filter(|(_, has_quarantined)| *has_quarantined).count();
            assert_eq!(quarantine_count, usize::from(malformed.is_some()));
        }
    }

    #[test]
    fn a_directory_or_key_file_that_cannot_be_used_is_an_error() {
        let parent = tempfile::tempdir().unwrap();
        fs::write(parent.path().join("file"), "").unwrap();
        let directory = parent.path().join("file/tls");
        let error = open(&CaLocation::Directory(directory.clone()), NOW).unwrap_err();
        assert!(
            error.to_string().contains(directory.to_str().unwrap()),
            "the error must name the path: {error}"
        );
        // A directory at the path of the key file is neither read nor quarantined.
        let directory = parent.path().join("tls");
        fs::create_dir_all(directory.join(CA_KEY_FILE)).unwrap();
        assert!(matches!(open(&CaLocation::Directory(directory), NOW), Err(CaError::Unreadable { .. })));
    }

    #[test]
    fn each_ca_in_memory_is_new() {
        let open_in_memory = || open(&CaLocation::Memory, NOW).unwrap().ca;
        assert_ne!(open_in_memory().pem(), open_in_memory().pem());
    }
}
