//! Owns a listening Unix socket and its file. Creates the file with the configured mode, and replaces the stale file of
//! a terminated process. Removes the file on drop unless another process has replaced it. The file of an inherited
//! socket is never removed.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixSocket};

/// A listening Unix socket.
#[derive(Debug)]
pub struct UnixSocketListener {
    listener: UnixListener,
    /// The file to remove on drop, or `None` if another process owns the file.
    file: Option<SocketFile>,
}

impl UnixSocketListener {
    /// Listens at `path`. The kernel queues at most `backlog` connections that are not accepted yet.
    pub(crate) fn bind(path: &Path, mode: u32, backlog: u32) -> io::Result<Self> {
        let socket = UnixSocket::new_stream()?;
        match socket.bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_stale_file(path)?;
                socket.bind(path)?;
            }
            bind_result => bind_result?,
        }
        // `SocketFile` removes the file even if one of the following steps fails.
        let file = SocketFile::new(path)?;
        // The mode is set before `listen`, because clients can connect after that call.
        fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(Self { listener: socket.listen(backlog)?, file: Some(file) })
    }

    /// Wraps an inherited socket, whose file another process has created and will remove.
    pub(super) fn from_inherited(listener: net::UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, file: None })
    }

    /// Returns the path of the socket file, or `None` if the socket has no name in the file system.
    pub(crate) fn path(&self) -> io::Result<Option<PathBuf>> {
        match &self.file {
            Some(file) => Ok(Some(file.path.clone())),
            None => Ok(self.listener.local_addr()?.as_pathname().map(Path::to_owned)),
        }
    }

    /// Removes the socket from its runtime. Returns the socket and its file.
    pub(super) fn into_parts(self) -> io::Result<(net::UnixListener, Option<SocketFile>)> {
        Ok((self.listener.into_std()?, self.file))
    }
}

/// Removes a socket file on which no process listens. Fails if the file is not a socket or may be in use.
fn remove_stale_file(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::new(ErrorKind::AlreadyExists, "the file exists and is not a socket"));
    }
    match net::UnixStream::connect(path) {
        // The connection is refused only when no process has the socket open.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        // A process is listening or may be listening. For example, its accept queue may be full.
        Ok(_) | Err(_) => Err(ErrorKind::AddrInUse.into()),
    }
}

/// A socket file. Dropping it removes the file if its inode is unchanged.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { inode: fs::symlink_metadata(path)?.ino(), path: path.to_owned() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| metadata.ino() == self.inode) {
            // A file that cannot be removed is replaced at the next startup.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKLOG: u32 = 16;

    fn mode_of(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn the_socket_file_has_the_configured_mode_and_is_removed_on_drop() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("k.sock");
        let listener = UnixSocketListener::bind(&path, 0o600, BACKLOG).unwrap();
        assert_eq!(mode_of(&path), 0o600);
        assert_eq!(listener.path().unwrap(), Some(path.clone()));
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_socket_in_use_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("k.sock");
        // The listener of the standard library does not remove its file, so the file is left as by a killed process.
        drop(net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let listener = UnixSocketListener::bind(&path, 0o660, BACKLOG).unwrap();
        assert_eq!(UnixSocketListener::bind(&path, 0o660, BACKLOG).unwrap_err().kind(), ErrorKind::AddrInUse);
        assert!(path.exists(), "the failed listener must not remove the file");
        drop(listener);
    }

    #[tokio::test]
    async fn other_files_are_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("k.sock");
        fs::write(&path, "content").unwrap();
        assert_eq!(
            UnixSocketListener::bind(&path, 0o660, BACKLOG).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "content");
        // The socket file of another listener is not removed either.
        fs::remove_file(&path).unwrap();
        let listener = UnixSocketListener::bind(&path, 0o660, BACKLOG).unwrap();
        fs::rename(&path, directory.path().join("moved")).unwrap();
        let successor = UnixSocketListener::bind(&path, 0o660, BACKLOG).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
    }
}
