//! Stores the local CA in a folder that several processes may use. Files are replaced atomically, so that a
//! partial file is never read. A lock allows one writer at a time, so that processes that start together use
//! the same CA. An unusable file is renamed (quarantined), never deleted.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::local_ca::{CaDefect, CertificateError, LocalCa};
use super::{CaLocation, refresh_bundle};
use crate::policy::units::UnixMs;
use crate::tasks;

/// The file with the CA's certificate and private key.
const CA_KEY_FILE: &str = "authority.pem";

/// The file with the certificate alone, for clients to trust.
const CA_CERTIFICATE_FILE: &str = "ca.pem";

/// The file that is locked by the process that changes the folder.
const LOCK_FILE: &str = "lock";

/// Maximum wait for the lock. Generating a CA takes milliseconds, so a longer wait means that the other
/// process hangs.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum number of bytes read of the key file. A certificate and a key have one or two kilobytes.
const MAX_KEY_FILE_SIZE: u64 = 64 * 1024;

/// The reason why the CA cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The folder or a file in it cannot be created or written.
    #[error("{} cannot be written: {source}", .path.display())]
    Unwritable {
        /// The folder or file.
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
    /// Another process has held the lock for too long.
    #[error("another process holds the lock file {}", .0.display())]
    Locked(PathBuf),
    /// A new CA cannot be generated.
    #[error(transparent)]
    Generate(#[from] CertificateError),
}

/// An opened CA.
#[derive(Debug)]
pub struct OpenedCa {
    /// The CA.
    pub ca: LocalCa,
    /// The unusable file that the CA replaced, if any.
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

/// Formats the message for the log.
impl fmt::Display for QuarantinedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = match self.defect {
            CaDefect::Malformed => "was malformed",
            CaDefect::Expired => "has expired",
        };
        write!(
            f,
            "The local authority of https {problem}. It is kept as {}, and a new one was created. Apps and browsers \
             that trusted the old one must trust the new one, see `keychoir env`",
            self.path.display()
        )
    }
}

/// Opens the CA at `location`. Generates a missing CA, and quarantines and replaces an unusable one.
///
/// # Errors
///
/// Fails when the CA can be neither read nor generated.
pub fn open(location: &CaLocation, now: UnixMs) -> Result<OpenedCa, CaError> {
    let folder = match location {
        CaLocation::Folder(folder) => folder,
        CaLocation::Memory => return Ok(OpenedCa { ca: LocalCa::generate(now)?, quarantined: None }),
    };
    if let StoredCa::Usable(ca) = read_stored(folder, now)? {
        // Not an error: a process without write access can still use the CA.
        if let Err(error) = publish(folder, &ca) {
            tracing::debug!("{error}");
        }
        return Ok(OpenedCa { ca: *ca, quarantined: None });
    }
    let unwritable = |source| CaError::Unwritable { path: folder.clone(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(unwritable)?;
    let _lock = lock(folder)?;
    // Read again, because another process may have generated the CA before this process held the lock.
    let quarantined = match read_stored(folder, now)? {
        StoredCa::Usable(ca) => return Ok(OpenedCa { ca: *ca, quarantined: None }),
        StoredCa::Missing => None,
        StoredCa::Unusable(defect) => {
            let suffix = match defect {
                CaDefect::Malformed => "broken",
                CaDefect::Expired => "ended",
            };
            let path = folder.join(format!("{CA_KEY_FILE}.{suffix}-{}", now.0));
            fs::rename(folder.join(CA_KEY_FILE), &path).map_err(unwritable)?;
            Some(QuarantinedFile { path, defect })
        }
    };
    let ca = LocalCa::generate(now)?;
    write_atomically(&folder.join(CA_KEY_FILE), ca.secret_pem().as_bytes())?;
    publish(folder, &ca)?;
    Ok(OpenedCa { ca, quarantined })
}

/// The path of the CA certificate. The file exists once the CA was opened in this folder.
#[must_use]
pub fn ca_file(folder: &Path) -> PathBuf {
    folder.join(CA_CERTIFICATE_FILE)
}

enum StoredCa {
    Usable(Box<LocalCa>),
    Unusable(CaDefect),
    Missing,
}

fn read_stored(folder: &Path, now: UnixMs) -> Result<StoredCa, CaError> {
    let path = folder.join(CA_KEY_FILE);
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
        path.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0);
    if is_accessible_by_others && let Err(error) = fs::set_permissions(path, Permissions::from_mode(0o600)) {
        tracing::warn!("other users may read {}, and its mode cannot be changed: {error}", path.display());
    }
}

/// Writes the files for other programs: the CA certificate, and the bundle if it exists.
fn publish(folder: &Path, ca: &LocalCa) -> Result<(), CaError> {
    write_if_changed(&ca_file(folder), ca.pem().as_bytes())?;
    refresh_bundle(folder, ca);
    Ok(())
}

/// Writes a file, unless it already has this content.
pub(super) fn write_if_changed(path: &Path, bytes: &[u8]) -> Result<(), CaError> {
    if fs::read(path).is_ok_and(|existing| existing == bytes) {
        Ok(())
    } else {
        write_atomically(path, bytes)
    }
}

/// Replaces the file at `path` by one of mode 0600 with this content.
fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), CaError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let replace = || {
        // A temporary file is created with mode 0600.
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        // The folder contains the name of the file, so it is synced as well.
        File::open(folder)?.sync_all()
    };
    replace().map_err(|source| CaError::Unwritable { path: path.to_owned(), source })
}

/// Waits for the lock of the folder. Dropping the file releases the lock.
fn lock(folder: &Path) -> Result<File, CaError> {
    let path = folder.join(LOCK_FILE);
    let unwritable = |source| CaError::Unwritable { path: path.clone(), source };
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path).map_err(unwritable)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::Error(error)) => return Err(unwritable(error)),
        Err(TryLockError::WouldBlock) => {}
    }
    // `File::lock` has no timeout, so it runs on its own thread.
    let (sender, locked) = mpsc::sync_channel(1);
    tasks::spawn_thread("lock", move || {
        let _ = sender.send(file.lock().map(|()| file));
    })
    .map_err(unwritable)?;
    match locked.recv_timeout(LOCK_TIMEOUT) {
        Ok(locked) => locked.map_err(unwritable),
        Err(_) => Err(CaError::Locked(path)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};

    use super::*;

    const NOW: UnixMs = UnixMs(1_800_000_000_000);

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o777
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[track_caller]
    fn open_folder(folder: &Path, now: UnixMs) -> OpenedCa {
        open(&CaLocation::Folder(folder.to_owned()), now).unwrap()
    }

    #[test]
    fn a_ca_is_generated_once_and_readable_only_by_its_owner() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("deep/tls");
        let first = open_folder(&folder, NOW);
        assert_eq!(first.quarantined, None);
        let second = open_folder(&folder, NOW.plus(Duration::from_secs(3600)));
        assert_eq!((second.ca.pem(), second.quarantined), (first.ca.pem(), None));
        assert_eq!(names(&folder), ["authority.pem", "ca.pem", "lock"]);
        assert_eq!((mode(&folder), mode(&state.path().join("deep"))), (0o700, 0o700));
        for name in names(&folder) {
            assert_eq!(mode(&folder.join(&name)), 0o600, "{name}");
        }
        assert_eq!(fs::read_to_string(ca_file(&folder)).unwrap(), first.ca.pem());
    }

    #[test]
    fn a_file_that_others_can_read_becomes_private_again() {
        let folder = tempfile::tempdir().unwrap();
        open_folder(folder.path(), NOW);
        let path = folder.path().join(CA_KEY_FILE);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        open_folder(folder.path(), NOW);
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_malformed_ca_is_quarantined_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let first = open_folder(folder.path(), NOW);
        for (index, malformed) in [b"" as &[u8], b"\xff\xfe", b"-----BEGIN"].into_iter().enumerate() {
            fs::write(folder.path().join(CA_KEY_FILE), malformed).unwrap();
            let now = UnixMs(NOW.0 + index as u64);
            let second = open_folder(folder.path(), now);
            let quarantined = second.quarantined.unwrap();
            assert_eq!(quarantined.defect, CaDefect::Malformed);
            assert_eq!(quarantined.path, folder.path().join(format!("authority.pem.broken-{}", now.0)));
            assert_eq!(fs::read(&quarantined.path).unwrap(), malformed);
            assert_ne!(second.ca.pem(), first.ca.pem());
            assert_eq!(fs::read_to_string(ca_file(folder.path())).unwrap(), second.ca.pem());
            assert_eq!(open_folder(folder.path(), now).quarantined, None);
        }
    }

    #[test]
    fn an_expired_ca_is_quarantined_and_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let first = open_folder(folder.path(), NOW);
        let later = NOW.plus(Duration::from_secs(3600 * 24 * 3600));
        let second = open_folder(folder.path(), later);
        let quarantined = second.quarantined.unwrap();
        assert_eq!(quarantined.defect, CaDefect::Expired);
        assert!(fs::read_to_string(&quarantined.path).unwrap().starts_with(first.ca.pem()));
        assert_ne!(second.ca.pem(), first.ca.pem());
    }

    #[test]
    fn a_lost_certificate_is_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let first = open_folder(folder.path(), NOW);
        for damage in [None, Some("something else")] {
            fs::remove_file(ca_file(folder.path())).unwrap();
            let _ = damage.map(|text| fs::write(ca_file(folder.path()), text).unwrap());
            assert_eq!(open_folder(folder.path(), NOW).ca.pem(), first.ca.pem());
            assert_eq!(fs::read_to_string(ca_file(folder.path())).unwrap(), first.ca.pem());
        }
    }

    #[test]
    fn processes_that_start_together_open_the_same_ca() {
        for malformed in [None, Some("malformed")] {
            let folder = tempfile::tempdir().unwrap();
            let _ = malformed.map(|text| fs::write(folder.path().join(CA_KEY_FILE), text).unwrap());
            let barrier = Arc::new(Barrier::new(8));
            let openers: Vec<_> = (0..8)
                .map(|_| {
                    let (barrier, folder) = (Arc::clone(&barrier), folder.path().to_owned());
                    let open = move || {
                        barrier.wait();
                        let opened = open_folder(&folder, NOW);
                        (opened.ca.pem().to_owned(), opened.quarantined.is_some())
                    };
                    tasks::spawn_thread("opener", open).unwrap()
                })
                .collect();
            let opened: Vec<_> = openers.into_iter().map(|opener| opener.join().unwrap()).collect();
            assert!(opened.iter().all(|(pem, _)| *pem == opened[0].0));
            let quarantined_files = opened.iter().filter(|(_, is_quarantined)| *is_quarantined).count();
            assert_eq!(quarantined_files, usize::from(malformed.is_some()));
        }
    }

    #[test]
    fn an_error_names_the_folder_that_cannot_be_created() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join("file"), "").unwrap();
        let folder = state.path().join("file/tls");
        let error = open(&CaLocation::Folder(folder.clone()), NOW).unwrap_err();
        assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}");
        // A folder at the path of the key file is neither read nor quarantined.
        let folder = state.path().join("tls");
        fs::create_dir_all(folder.join(CA_KEY_FILE)).unwrap();
        assert!(matches!(open(&CaLocation::Folder(folder), NOW), Err(CaError::Unreadable { .. })));
    }

    #[test]
    fn each_ca_in_memory_is_new() {
        let ca = open(&CaLocation::Memory, NOW).unwrap();
        assert_ne!(ca.ca.pem(), open(&CaLocation::Memory, NOW).unwrap().ca.pem());
    }
}
