//! The limit of open files, which bounds how many clients can be connected.

use std::io;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to the hard one, which a program that waits for events and not by
/// `select` may always do; returns how many may be open now.
///
/// # Errors
///
/// When the system refuses; then the limit stays as it was.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        setrlimit(Resource::Nofile, limit)?;
    }
    // Without a number there is no limit.
    Ok(limit.current.unwrap_or(u64::MAX))
}

/// How many files may be open now.
#[must_use]
pub fn open_files_max() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
