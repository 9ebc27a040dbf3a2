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
const AUTHORITY: &str = "authority.pem";

/// The file with the certificate alone, for clients that are to trust it.
const CA: &str = "ca.pem";

/// The lock file, held by the process that changes the folder.
const LOCK: &str = "lock";

/// Maximum wait for the lock: making a CA takes milliseconds, so a longer wait means that the
/// holder hangs.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(5);

/// Maximum bytes read of a file: a certificate and a key have one or two kilobytes.
const BYTES_MAX: u64 = 64 * 1024;

/// Why there is no CA.
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
    #[error("another process holds {}", .0.display())]
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
    /// The unusable file that was in its place, if there was one.
    pub set_aside: Option<QuarantinedFile>,
}

/// An unusable file that was renamed and replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuarantinedFile {
    /// Its new path.
    pub path: PathBuf,
    /// Why it was unusable.
    pub why: Unfit,
}

/// The message for the log.
impl fmt::Display for QuarantinedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.why {
            Unfit::Broken => "was broken",
            Unfit::Ending => "has reached its end",
        };
        write!(
            f,
            "The local authority of https {what}; it is kept as {}, and there is a new one: apps and browsers \
             that trusted it must come to trust that, see `keychoir env`",
            self.path.display()
        )
    }
}

/// Opens the CA at `place`. A missing CA is made; an unusable one is quarantined and replaced.
///
/// # Errors
///
/// When the CA can be neither read nor made.
pub fn open(place: &CaLocation, now: UnixMs) -> Result<OpenedCa, AuthorityError> {
    let folder = match place {
        CaLocation::Folder(folder) => folder,
        CaLocation::Memory => return Ok(OpenedCa { authority: LocalCa::make(now)?, set_aside: None }),
    };
    if let Found::Fit(authority) = look(folder, now)? {
        // A process without write access can still use the CA.
        if let Err(error) = publish(folder, &authority) {
            tracing::debug!("{error}");
        }
        return Ok(OpenedCa { authority: *authority, set_aside: None });
    }
    let unwritable = |source| AuthorityError::Unwritable { path: folder.clone(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(unwritable)?;
    let _held = lock(folder)?;
    // Another process may have made the CA meanwhile.
    let set_aside = match look(folder, now)? {
        Found::Fit(authority) => return Ok(OpenedCa { authority: *authority, set_aside: None }),
        Found::Nothing => None,
        Found::Unfit(why) => {
            let aside = folder.join(format!("{AUTHORITY}.{}-{}", word(why), now.0));
            fs::rename(folder.join(AUTHORITY), &aside).map_err(unwritable)?;
            Some(QuarantinedFile { path: aside, why })
        }
    };
    let authority = LocalCa::make(now)?;
    write(&folder.join(AUTHORITY), authority.secret_pem().as_bytes())?;
    publish(folder, &authority)?;
    Ok(OpenedCa { authority, set_aside })
}

/// The file with the CA's certificate, which exists after the CA was opened in this folder.
#[must_use]
pub fn ca_file(folder: &Path) -> PathBuf {
    folder.join(CA)
}

fn word(why: Unfit) -> &'static str {
    match why {
        Unfit::Broken => "broken",
        Unfit::Ending => "ended",
    }
}

enum Found {
    Fit(Box<LocalCa>),
    Unfit(Unfit),
    Nothing,
}

fn look(folder: &Path, now: UnixMs) -> Result<Found, AuthorityError> {
    let path = folder.join(AUTHORITY);
    let unreadable = |source| AuthorityError::Unreadable { path: path.clone(), source };
    let mut bytes = Vec::new();
    match File::open(&path) {
        Ok(file) => {
            file.take(BYTES_MAX).read_to_end(&mut bytes).map_err(unreadable)?;
        }
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(unreadable(error)),
    }
    Ok(
        match std::str::from_utf8(&bytes).map_err(|_| Unfit::Broken).and_then(|text| LocalCa::read(text, now))
        {
            Ok(authority) => {
                keep_private(&path);
                Found::Fit(Box::new(authority))
            }
            Err(why) => Found::Unfit(why),
        },
    )
}

/// Restores mode 0600, which a copy or a backup may have widened.
fn keep_private(path: &Path) {
    let is_open = path.metadata().is_ok_and(|seen| seen.permissions().mode() & 0o077 != 0);
    if is_open && let Err(error) = fs::set_permissions(path, Permissions::from_mode(0o600)) {
        tracing::warn!("others may read {}, and its mode cannot be changed: {error}", path.display());
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
    if fs::read(path).is_ok_and(|found| found == bytes) { Ok(()) } else { write(path, bytes) }
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
    match locked.recv_timeout(LOCK_WAIT_MAX) {
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
    fn it_is_made_once_and_only_its_owner_may_see_it() {
        let state = tempfile::tempdir().unwrap();
        let folder = state.path().join("deep/tls");
        let first = opened(&folder, NOW);
        assert_eq!(first.set_aside, None);
        let second = opened(&folder, NOW.plus(Duration::from_secs(3600)));
        assert_eq!((second.authority.pem(), second.set_aside), (first.authority.pem(), None));
        assert_eq!(names(&folder), ["authority.pem", "ca.pem", "lock"]);
        assert_eq!((mode(&folder), mode(&state.path().join("deep"))), (0o700, 0o700));
        for name in names(&folder) {
            assert_eq!(mode(&folder.join(&name)), 0o600, "{name}");
        }
        assert_eq!(fs::read_to_string(ca_file(&folder)).unwrap(), first.authority.pem());
    }

    #[test]
    fn what_was_opened_to_others_is_closed_again() {
        let folder = tempfile::tempdir().unwrap();
        opened(folder.path(), NOW);
        let path = folder.path().join(AUTHORITY);
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        opened(folder.path(), NOW);
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_broken_one_is_kept_beside_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let first = opened(folder.path(), NOW);
        for (round, broken) in [b"" as &[u8], b"\xff\xfe", b"-----BEGIN"].into_iter().enumerate() {
            fs::write(folder.path().join(AUTHORITY), broken).unwrap();
            let now = UnixMs(NOW.0 + round as u64);
            let again = opened(folder.path(), now);
            let aside = again.set_aside.unwrap();
            assert_eq!(aside.why, Unfit::Broken);
            assert_eq!(aside.path, folder.path().join(format!("authority.pem.broken-{}", now.0)));
            assert_eq!(fs::read(&aside.path).unwrap(), broken);
            assert_ne!(again.authority.pem(), first.authority.pem());
            assert_eq!(fs::read_to_string(ca_file(folder.path())).unwrap(), again.authority.pem());
            assert_eq!(opened(folder.path(), now).set_aside, None);
        }
    }

    #[test]
    fn one_whose_time_is_over_is_kept_beside_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let first = opened(folder.path(), NOW);
        let later = NOW.plus(Duration::from_secs(3600 * 24 * 3600));
        let second = opened(folder.path(), later);
        let aside = second.set_aside.unwrap();
        assert_eq!(aside.why, Unfit::Ending);
        assert!(fs::read_to_string(&aside.path).unwrap().starts_with(first.authority.pem()));
        assert_ne!(second.authority.pem(), first.authority.pem());
    }

    #[test]
    fn a_certificate_that_was_lost_is_written_again() {
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
    fn many_that_start_together_end_with_the_same_one() {
        for broken in [None, Some("broken")] {
            let folder = tempfile::tempdir().unwrap();
            let _ = broken.map(|text| fs::write(folder.path().join(AUTHORITY), text).unwrap());
            let start = Arc::new(Barrier::new(8));
            let openers: Vec<_> = (0..8)
                .map(|_| {
                    let (start, folder) = (Arc::clone(&start), folder.path().to_owned());
                    let open = move || {
                        start.wait();
                        let opened = opened(&folder, NOW);
                        (opened.authority.pem().to_owned(), opened.set_aside.is_some())
                    };
                    tasks::thread("opener", open).unwrap()
                })
                .collect();
            let opened: Vec<_> = openers.into_iter().map(|opener| opener.join().unwrap()).collect();
            assert!(opened.iter().all(|(pem, _)| *pem == opened[0].0));
            let asides = opened.iter().filter(|(_, is_aside)| *is_aside).count();
            assert_eq!(asides, usize::from(broken.is_some()));
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let state = tempfile::tempdir().unwrap();
        fs::write(state.path().join("file"), "").unwrap();
        let folder = state.path().join("file/tls");
        let error = open(&CaLocation::Folder(folder.clone()), NOW).unwrap_err();
        assert!(error.to_string().contains(folder.to_str().unwrap()), "{error}");
        // A folder in the place of the file is neither read nor moved.
        let folder = state.path().join("tls");
        fs::create_dir_all(folder.join(AUTHORITY)).unwrap();
        assert!(matches!(open(&CaLocation::Folder(folder), NOW), Err(AuthorityError::Unreadable { .. })));
    }

    #[test]
    fn in_memory_each_is_another() {
        let one = open(&CaLocation::Memory, NOW).unwrap();
        assert_ne!(one.authority.pem(), open(&CaLocation::Memory, NOW).unwrap().authority.pem());
    }
}
