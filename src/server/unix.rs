//! A Unix socket and its file: created with the configured mode, replacing a stale file of a terminated
//! process, and removed at the end unless another process has replaced it.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixSocket};

use super::listener::BACKLOG;

/// A listening Unix socket.
#[derive(Debug)]
pub struct UnixSocketListener {
    listener: UnixListener,
    /// The file to remove at the end; `None` when another process owns it.
    file: Option<SocketFile>,
}

impl UnixSocketListener {
    pub(super) fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        let socket = UnixSocket::new_stream()?;
        match socket.bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale(path)?;
                socket.bind(path)?;
            }
            bound => bound?,
        }
        // From here on the file is removed on drop, also when the next step fails.
        let file = SocketFile::of(path)?;
        // Set before clients can connect.
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(Self { listener: socket.listen(BACKLOG)?, file: Some(file) })
    }

    /// A socket that another process created, owns and removes.
    pub(super) fn inherited(listener: net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, file: None })
    }

    pub(super) fn path(&self) -> io::Result<Option<PathBuf>> {
        match &self.file {
            Some(file) => Ok(Some(file.path.clone())),
            None => Ok(self.listener.local_addr()?.as_pathname().map(Path::to_owned)),
        }
    }

    /// The socket without its runtime, and its file.
    pub(super) fn into_parts(self) -> io::Result<(net::UnixListener, Option<SocketFile>)> {
        Ok((self.listener.into_std()?, self.file))
    }
}

/// Removes a socket file that no process listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "a file that is no socket is in the way"));
    }
    match net::UnixStream::connect(path) {
        // A refused connection means that no process has the socket open.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        // Another process accepts, or its accept queue is full.
        Ok(_) | Err(_) => Err(ErrorKind::AddrInUse.into()),
    }
}

/// A file that is removed when this is dropped, if its inode is still the same.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { inode: fs::symlink_metadata(path)?.ino(), path: path.to_owned() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|seen| seen.ino() == self.inode) {
            // A file that remains is replaced at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn the_file_has_the_mode_and_is_removed_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.sock");
        let listener = UnixSocketListener::bind(&path, 0o600).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(listener.path().unwrap(), Some(path.clone()));
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_one_in_use_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.sock");
        // The standard library's listener leaves its file behind, as a killed process does.
        drop(net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = UnixSocketListener::bind(&path, 0o660).unwrap();
        assert_eq!(UnixSocketListener::bind(&path, 0o660).unwrap_err().kind(), ErrorKind::AddrInUse);
        assert!(path.exists(), "the failed listener removes nothing");
        drop(listener);
    }

    #[tokio::test]
    async fn other_files_are_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k.sock");
        fs::write(&path, "precious").unwrap();
        assert_eq!(UnixSocketListener::bind(&path, 0o660).unwrap_err().kind(), ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
        // The socket file of a successor remains as well.
        fs::remove_file(&path).unwrap();
        let listener = UnixSocketListener::bind(&path, 0o660).unwrap();
        fs::rename(&path, folder.path().join("moved")).unwrap();
        let successor = UnixSocketListener::bind(&path, 0o660).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
    }
}
