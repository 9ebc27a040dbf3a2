//! Raises and returns the process's limit of open files (`RLIMIT_NOFILE`), which bounds the number of client
//! connections.

use std::io;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit, and returns the limit. `u64::MAX` means unlimited.
/// A high limit is safe, because the process does not use `select`.
///
/// # Errors
///
/// Fails when the operating system rejects the new limit. In that case, the limit is unchanged.
pub fn raise_open_files_limit() -> io::Result<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit)?;
    }
    Ok(limit.current.unwrap_or(u64::MAX))
}

/// Returns the current limit of open files. `u64::MAX` means unlimited.
#[must_use]
pub fn open_files_limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
