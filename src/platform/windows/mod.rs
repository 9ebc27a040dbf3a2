//! Implements the functions and types of `platform` for Windows. This code is type-checked and not tested.

pub(crate) mod files;
pub(crate) mod service_manager;
pub(crate) mod signals;
pub(crate) mod sockets;

use std::io;

pub(crate) use sockets::UnixSocketListener;

use super::TerminalSize;

/// Returns `None`, because the size of the terminal is not known.
pub(crate) fn terminal_size() -> Option<TerminalSize> {
    None
}

/// Returns `u64::MAX`, which means unlimited.
///
/// # Errors
///
/// Never fails.
pub fn raise_open_files_limit() -> io::Result<u64> {
    Ok(u64::MAX)
}

/// Returns `u64::MAX`, which means unlimited.
#[must_use]
pub fn open_files_limit() -> u64 {
    u64::MAX
}
