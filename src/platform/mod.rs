//! Provides the operations that differ between operating systems: on sockets, files and disks, and for signals, limits
//! of the process, the size of the terminal, and reports to the service manager. The modules `unix` and
//! `windows` have the same items, so that the other modules need not distinguish operating systems.
//!
//! On Windows, the types of Unix sockets have no values, and the functions that would create a Unix socket fail.
//! Functions for other features that Windows lacks have no effect. `docs/operations.md` lists these features. Only Unix
//! is tested.

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
    /// The free bytes that a process without privileges can use.
    pub(crate) free: u64,
    pub(crate) total: u64,
}
