//! Implements the operations on files for Unix: private files and directories, modes, owners and identities of files,
//! the flush of directories, reads and writes at an offset, and the space of disks.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown,
};
use std::path::Path;

use rustix::fs::{Access, StatVfs, access, fstatvfs, statvfs};
use rustix::process::geteuid;

use crate::platform::DiskSpace;

/// Creates a directory with mode 0700. Its parent must exist.
pub(crate) fn create_private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Returns options that create files with mode 0600.
pub(crate) fn private_options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

/// Opens a file or a directory, to lock it or to change its owner.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    File::open(path)
}

/// Gives `file` the owner of `directory`. Has no effect unless this process runs as root, because only root may change
/// owners.
pub(crate) fn adopt_owner(file: &File, directory: &Path) -> io::Result<()> {
    if !geteuid().is_root() {
        return Ok(());
    }
    let owner = directory.metadata()?;
    fchown(file, Some(owner.uid()), Some(owner.gid()))
}

/// Writes the entries of a directory to the disk.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Returns the mode of a file, including the bits that contain its type.
#[expect(clippy::unnecessary_wraps, reason = "the function returns `None` on Windows")]
pub(crate) fn mode(metadata: &Metadata) -> Option<u32> {
    Some(metadata.permissions().mode())
}

/// Changes the mode of a file.
pub(crate) fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Returns the device and inode numbers, which distinguish a file from another file that replaces it.
pub(crate) fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Returns whether an open file was removed from all directories.
pub(crate) fn is_removed(metadata: &Metadata) -> bool {
    metadata.nlink() == 0
}

/// Fails if this process may not create files in a directory.
pub(crate) fn check_writable(directory: &Path) -> io::Result<()> {
    Ok(access(directory, Access::WRITE_OK | Access::EXEC_OK)?)
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(bytes, offset)
}

/// Fills `bytes` from `offset`.
pub(crate) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(bytes, offset)
}

/// Returns the space of the disk that contains the file or directory at `path`.
pub(crate) fn disk_space(path: &Path) -> io::Result<DiskSpace> {
    Ok(to_disk_space(&statvfs(path)?))
}

/// Returns the space of the disk that contains an open file.
pub(crate) fn disk_space_of(file: &File) -> io::Result<DiskSpace> {
    Ok(to_disk_space(&fstatvfs(file)?))
}

fn to_disk_space(disk: &StatVfs) -> DiskSpace {
    DiskSpace {
        free: disk.f_bavail.saturating_mul(disk.f_frsize),
        total: disk.f_blocks.saturating_mul(disk.f_frsize),
    }
}
