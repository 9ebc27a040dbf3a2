//! What differs between operating systems: Unix sockets, modes and owners of files, signals, limits of the process and
//! the service manager. Both variants have the same items, so that the other modules name no operating system.
//!
//! On Windows, a Unix socket is an error and its types have no values, and functions for other missing features have no
//! effect. `docs/operations.md` lists them. Only Unix is tested.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
pub(crate) use unix::{UnixSocketListener, files, service_manager, signals, sockets, terminal_size};
#[cfg(unix)]
pub use unix::{open_files_limit, raise_open_files_limit};
#[cfg(windows)]
pub(crate) use windows::{UnixSocketListener, files, service_manager, signals, sockets, terminal_size};
#[cfg(windows)]
pub use windows::{open_files_limit, raise_open_files_limit};

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TerminalSize {
    pub(crate) columns: u16,
    pub(crate) rows: u16,
}

/// The space of a disk in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DiskSpace {
    /// For a process without privileges.
    pub(crate) free: u64,
    pub(crate) total: u64,
}
