//! Raises the limit of open files, which bounds the number of connected clients.

use std::io;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard limit, which is safe for a process that does not use
/// `select`; returns the limit now in force.
///
/// # Errors
///
/// When the system refuses; then the limit is unchanged.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit)?;
    }
    // No number means no limit.
    Ok(limit.current.unwrap_or(u64::MAX))
}

/// The limit of open files now in force.
#[must_use]
pub fn open_files_max() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
