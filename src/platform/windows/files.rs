//! Implements the operations on files for Windows: identities of files, and reads and writes at an offset. Files have
//! no mode, because they inherit the access control list of their directory. The space of a disk is unknown.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::windows::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::platform::DiskSpace;

/// The flag of `CreateFileW` that is necessary to open a directory.
const FILE_FLAG_BACKUP_SEMANTICS: u32 = 0x0200_0000;

/// Creates a directory with the access control list of its parent, which must exist.
pub(crate) fn create_private_directory(path: &Path) -> io::Result<()> {
    fs::create_dir(path)
}

/// Returns options that create files with the access control list of their directory.
pub(crate) fn private_options() -> OpenOptions {
    OpenOptions::new()
}

/// Opens a file or a directory.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(FILE_FLAG_BACKUP_SEMANTICS).open(path)
}

/// Has no effect, because the directory determines the owner of a file.
pub(crate) fn adopt_owner(_: &File, _: &Path) -> io::Result<()> {
    Ok(())
}

/// Has no effect, because Windows cannot sync a directory.
pub(crate) fn sync_directory(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Returns `None`, because files have no mode.
pub(crate) fn mode(_: &Metadata) -> Option<u32> {
    None
}

/// Has no effect, because files have no mode.
pub(crate) fn set_mode(_: &Path, _: u32) -> io::Result<()> {
    Ok(())
}

/// Returns the creation time of the file, because the stable standard library does not provide the unique index of a
/// file.
pub(crate) fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.creation_time(), 0)
}

/// Returns `false`, because an open file keeps its name.
pub(crate) fn is_removed(_: &Metadata) -> bool {
    false
}

/// Has no effect. If the directory is not writable, the creation of the first file fails.
pub(crate) fn check_writable(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Writes all of `bytes` at `offset`.
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let written_bytes = file.seek_write(bytes, offset)?;
        if written_bytes == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        bytes = &bytes[written_bytes..];
        offset += written_bytes as u64;
    }
    Ok(())
}

/// Fills `bytes` from `offset`.
pub(crate) fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let read_bytes = file.seek_read(bytes, offset)?;
        if read_bytes == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[read_bytes..];
        offset += read_bytes as u64;
    }
    Ok(())
}

/// Returns `u64::MAX` bytes, because the space is not known.
pub(crate) fn disk_space(_: &Path) -> io::Result<DiskSpace> {
    Ok(DiskSpace { free: u64::MAX, total: u64::MAX })
}

/// Returns `u64::MAX` bytes, because the space is not known.
pub(crate) fn disk_space_of(_: &File) -> io::Result<DiskSpace> {
    Ok(DiskSpace { free: u64::MAX, total: u64::MAX })
}
