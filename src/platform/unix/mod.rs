//! Implements the functions and types of `platform` for Unix.

mod acceptor;
pub(crate) mod files;
mod open_files;
pub(crate) mod service_manager;
pub(crate) mod signals;
mod socket_listener;
pub(crate) mod sockets;

pub use open_files::{open_files_limit, raise_open_files_limit};
pub(crate) use socket_listener::UnixSocketListener;

use super::TerminalSize;

/// Returns the size of the terminal to which the standard output is connected, or `None` if it is not a terminal.
pub(crate) fn terminal_size() -> Option<TerminalSize> {
    let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
    Some(TerminalSize { columns: size.ws_col, rows: size.ws_row })
}
