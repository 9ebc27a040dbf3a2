//! Stores the local CA in a folder. Files are replaced atomically, so that no process reads a
//! partial one; only one process at a time changes the folder, so that two that start together end
//! with the same CA. Unusable files are quarantined, never deleted.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::local_ca::{LocalCa, MakeError, Unfit};
use super::{CaLocation, refresh_bundle};
use crate::policy::units::UnixMs;
use crate::tasks;

/// The file with the CA's certificate and private key.
const CA_KEY_FILE: &str = "authority.pem";

/// The file with the certificate alone, for clients that are to trust it.
const CA: &str = "ca.pem";

/// The lock file, held by the process that changes the folder.
const LOCK: &str = "lock";

/// Maximum wait for the lock: making a CA takes milliseconds, so a longer wait means that the
/// holder hangs.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);

/// Maximum bytes read of a file: a certificate and a key have one or two kilobytes.
const MAX_BYTES: u64 = 64 * 1024;

/// The reason why there is no CA.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The folder or a file in it cannot be created or written.
    #[error("{} cannot be written: {source}", .path.display())]
    Unwritable {
        /// The folder or file.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// The existing file cannot be read.
    #[error("{} cannot be read: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The error of the file system.
        source: io::Error,
    },
    /// Another process holds the lock for too long.
    #[error("another process holds the lock file {}", .0.display())]
    Held(PathBuf),
    /// The CA cannot be made.
    #[error(transparent)]
    Make(#[from] MakeError),
}

/// A CA, and the file that was quarantined for it.
#[derive(Debug)]
pub struct OpenedCa {
    /// The CA.
    pub authority: LocalCa,
    /// The unusable file that it replaced, if there was one.
    pub quarantined: Option<QuarantinedFile>,
}

/// An unusable file that was renamed and replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuarantinedFile {
    /// Its new path.
    pub path: PathBuf,
    /// The reason why it was unusable.
    pub reason: Unfit,
}

/// The message for the log.
impl fmt::Display for QuarantinedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = match self.reason {
            Unfit::Broken => "was broken",
            Unfit::Ending => "has expired",
        };
        write!(
            f,
            "The local authority of https {problem}; it is kept as {}, and a new one was made: apps and browsers \
             that trusted the old one must trust the new one, see `keychoir env`",
            self.path.display()
        )
    }
}

/// Opens the CA at `location`. A missing CA is made; an unusable one is quarantined and replaced.
///
/// # Errors
///
/// When the CA can be neither read nor made.
pub fn open(location: &CaLocation, now: UnixMs) -> Result<OpenedCa, AuthorityError> {
    let folder = match location {
        CaLocation::Folder(folder) => folder,
        CaLocation::Memory => return Ok(OpenedCa { authority: LocalCa::make(now)?, quarantined: None }),
    };
    if let StoredCa::Usable(authority) = read_stored(folder, now)? {
        // A process without write access can still use the CA.
        if let Err(error) = publish(folder, &authority) {
            tracing::debug!("{error}");
        }
        return Ok(OpenedCa { authority: *authority, quarantined: None });
    }
    let unwritable = |source| AuthorityError::Unwritable { path: folder.clone(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(unwritable)?;
    let _held = lock(folder)?;
    // Another process may have made the CA meanwhile.
    let quarantined = match read_stored(folder, now)? {
        StoredCa::Usable(authority) => return Ok(OpenedCa { authority: *authority, quarantined: None }),
        StoredCa::Missing => None,
        StoredCa::Unfit(reason) => {
            let new_path = folder.join(format!("{CA_KEY_FILE}.{}-{}", suffix(reason), now.0));
            fs::rename(folder.join(CA_KEY_FILE), &new_path).map_err(unwritable)?;
            Some(QuarantinedFile { path: new_path, reason })
        }
    };
    let authority = LocalCa::make(now)?;
    write(&folder.join(CA_KEY_FILE), authority.secret_pem().as_bytes())?;
    publish(folder, &authority)?;
    Ok(OpenedCa { authority, quarantined })
}

/// The file with the CA's certificate, which exists after the CA was opened in this folder.
#[must_use]
pub fn ca_file(folder: &Path) -> PathBuf {
    folder.join(CA)
}

fn suffix(reason: Unfit) -> &'static str {
    match reason {
        Unfit::Broken => "broken",
        Unfit::Ending => "ended",
    }
}

enum StoredCa {
    Usable(Box<LocalCa>),
    Unfit(Unfit),
    Missing,
}

fn read_stored(folder: &Path, now: UnixMs) -> Result<StoredCa, AuthorityError> {
    let path = folder.join(CA_KEY_FILE);
    let unreadable = |source| AuthorityError::Unreadable { path: path.clone(), source };
    let mut bytes = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(unreadable)?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(StoredCa::Missing),
        Err(error) => return Err(unreadable(error)),
    }
    Ok(
        match std::str::from_utf8(&bytes).map_err(|_| Unfit::Broken).and_then(|text| LocalCa::read(text, now))
        {
            Ok(authority) => {
                restrict_mode(&path);
                StoredCa::Usable(Box::new(authority))
            }
            Err(reason) => StoredCa::Unfit(reason),
        },
    )
}

/// Restores mode 0600, which a copy or a backup may have widened.
fn restrict_mode(path: &Path) {
    let is_open = path.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0);
    if is_open && let Err(error) = fs::set_permissions(path, Permissions::from_mode(0o600)) {
        tracing::warn!("other users may read {}, and its mode cannot be changed: {error}", path.display());
    }
}

/// Writes the files for other programs: the certificate, and the bundle if it exists.
fn publish(folder: &Path, authority: &LocalCa) -> Result<(), AuthorityError> {
    write_changed(&folder.join(CA), authority.pem().as_bytes())?;
    refresh_bundle(folder, authority);
    Ok(())
}

/// Writes a file unless it has this content already.
pub(super) fn write_changed(path: &Path, bytes: &[u8]) -> Result<(), AuthorityError> {
    if fs::read(path).is_ok_and(|existing| existing == bytes) { Ok(()) } else { write(path, bytes) }
}

/// Atomically writes a file of mode 0600 with this content to `path`.
fn write(path: &Path, bytes: &[u8]) -> Result<(), AuthorityError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let written = || {
        // The file has mode 0600 from its creation.
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        // The folder is synced too, because it contains the file's name.
        File::open(folder)?.sync_all()
    };
    written().map_err(|source| AuthorityError::Unwritable { path: path.to_owned(), source })
}

/// Waits until no other process changes the folder, and holds the lock until it is dropped.
fn lock(folder: &Path) -> Result<File, AuthorityError> {
    let path = folder.join(LOCK);
    let unwritable = |source| AuthorityError::Unwritable { path: path.clone(), source };
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path).map_err(unwritable)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::Error(error)) => return Err(unwritable(error)),
        Err(TryLockError::WouldBlock) => {}
    }
    // The system call waits without a bound, so it runs on a thread of its own.
    let (sender, locked) = mpsc::sync_channel(1);
    tasks::thread("lock", move || {
        let _ = sender.send(file.lock().map(|()| file));
    })
    .map_err(unwritable)?;
    match locked.recv_timeout(LOCK_TIMEOUT) {
        Ok(locked) => locked.map_err(unwritable),
        Err(_) => Err(AuthorityError::Held(path)),
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
    fn opened(folder: &Path, now: UnixMs) -> OpenedCa {
        open(&CaLocation::Folder(folder.to_owned()), now).unwrap()
    }

    #[test]
    fn an_authority_is_made_once_and_readable_by_its_owner_only() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("deep/tls");
        let first = opened(&folder, NOW);
        assert_eq!(first.quarantined, None);
        let second = opened(&folder, NOW.plus(Duration::from_secs(3600)));
        assert_eq!((second.authority.pem(), second.quarantined), (first.authority.pem(), None));
        assert_eq!(names(&folder), ["authority.pem", "ca.pem", "lock"]);
        assert_eq!((mode(&folder), mode(&state.path().join("deep"))), (0o700, 0o700));
        for name in names(&folder) {
            assert_eq!(mode(&folder.join(&name)), 0o600, "{name}");
        }
        assert_eq!(fs::read_to_string(ca_file(&folder)).unwrap(), first.authority.pem());
    }

    #[test]
    fn a_file_readable_by_others_becomes_private_again() {
        let folder = tempfile::tempdir().unwrap();
        opened(folder.path(), NOW);
        let path = folder.path().join(CA_KEY_FILE);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        opened(folder.path(), NOW);
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_broken_authority_is_kept_beside_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let first = opened(folder.path(), NOW);
        for (round, broken) in [b"" as &[u8], b"\xff\xfe", b"-----BEGIN"].into_iter().enumerate() {
            fs::write(folder.path().join(CA_KEY_FILE), broken).unwrap();
            let now = UnixMs(NOW.0 + round as u64);
            let again = opened(folder.path(), now);
            let quarantined = again.quarantined.unwrap();
            assert_eq!(quarantined.reason, Unfit::Broken);
            assert_eq!(quarantined.path, folder.path().join(format!("authority.pem.broken-{}", now.0)));
            assert_eq!(fs::read(&quarantined.path).unwrap(), broken);
            assert_ne!(again.authority.pem(), first.authority.pem());
            assert_eq!(fs::read_to_string(ca_file(folder.path())).unwrap(), again.authority.pem());
            assert_eq!(opened(folder.path(), now).quarantined, None);
        }
    }

    #[test]
    fn an_expired_authority_is_kept_beside_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let first = opened(folder.path(), NOW);
        let later = NOW.plus(Duration::from_secs(3600 * 24 * 3600));
        let second = opened(folder.path(), later);
        let quarantined = second.quarantined.unwrap();
        assert_eq!(quarantined.reason, Unfit::Ending);
        assert!(fs::read_to_string(&quarantined.path).unwrap().starts_with(first.authority.pem()));
        assert_ne!(second.authority.pem(), first.authority.pem());
    }

    #[test]
    fn a_lost_certificate_is_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let first = opened(folder.path(), NOW);
        for damage in [None, Some("something else")] {
            fs::remove_file(ca_file(folder.path())).unwrap();
            let _ = damage.map(|text| fs::write(ca_file(folder.path()), text).unwrap());
            assert_eq!(opened(folder.path(), NOW).authority.pem(), first.authority.pem());
            assert_eq!(fs::read_to_string(ca_file(folder.path())).unwrap(), first.authority.pem());
        }
    }

    #[test]
    fn programs_that_start_together_open_the_same_authority() {
        for broken in [None, Some("broken")] {
            let folder = tempfile::tempdir().unwrap();
            let _ = broken.map(|text| fs::write(folder.path().join(CA_KEY_FILE), text).unwrap());
            let start = Arc::new(Barrier::new(8));
            let openers: Vec<_> = (0..8)
                .map(|_| {
                    let (start, folder) = (Arc::clone(&start), folder.path().to_owned());
                    let open = move || {
                        start.wait();
                        let opened = opened(&folder, NOW);
                        (opened.authority.pem().to_owned(), opened.quarantined.is_some())
                    };
                    tasks::thread("opener", open).unwrap()
                })
                .collect();
            let opened: Vec<_> = openers.into_iter().map(|opener| opener.join().unwrap()).collect();
            assert!(opened.iter().all(|(pem, _)| *pem == opened[0].0));
            let quarantined_files = opened.iter().filter(|(_, is_quarantined)| *is_quarantined).count();
            assert_eq!(quarantined_files, usize::from(broken.is_some()));
        }
    }

    #[test]
    fn an_error_names_the_folder_that_cannot_be_made() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join("file"), "").unwrap();
        let folder = state.path().join("file/tls");
        let error = open(&CaLocation::Folder(folder.clone()), NOW).unwrap_err();
        assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}");
        // A folder at the path of the file is neither read nor moved.
        let folder = state.path().join("tls");
        fs::create_dir_all(folder.join(CA_KEY_FILE)).unwrap();
        assert!(matches!(open(&CaLocation::Folder(folder), NOW), Err(AuthorityError::Unreadable { .. })));
    }

    #[test]
    fn each_authority_in_memory_is_new() {
        let one = open(&CaLocation::Memory, NOW).unwrap();
        assert_ne!(one.authority.pem(), open(&CaLocation::Memory, NOW).unwrap().authority.pem());
    }
}
