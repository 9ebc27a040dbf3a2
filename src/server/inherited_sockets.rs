//! Takes the listening sockets that the service manager passes to this process (systemd socket activation).
//! The service manager keeps the sockets open during a restart, so that connections are queued instead of refused.

use std::io;

use listenfd::ListenFd;
use tokio::net::TcpListener;

use super::listener::Listener;
use crate::platform::sockets;

/// The sockets passed to this process, before they are converted to listeners.
pub struct InheritedSockets {
    sockets: ListenFd,
    /// The names of the sockets, from `LISTEN_FDNAMES`.
    names: Vec<String>,
}

impl InheritedSockets {
    /// Takes the sockets that the variable `LISTEN_FDS` counts, and removes `LISTEN_FDS` and `LISTEN_PID`, so that
    /// child processes do not use the sockets. Takes no sockets unless `LISTEN_PID` is the ID of this process. Must be
    /// called only once, before other threads are started.
    #[must_use]
    pub fn take() -> Self {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let is_this_process = variable("LISTEN_PID") == std::process::id().to_string();
        let names = variable("LISTEN_FDNAMES").split(':').map(str::to_owned).collect();
        let sockets = if is_this_process { ListenFd::from_env() } else { ListenFd::empty() };
        Self { sockets, names }
    }

    /// Returns the number of sockets that the service manager passed.
    #[must_use]
    pub fn count(&self) -> usize {
        self.sockets.len()
    }

    /// Converts the sockets to listeners. Must be called on a runtime.
    ///
    /// # Errors
    ///
    /// Fails when a socket is neither a TCP nor a Unix stream socket. The error contains the name of the
    /// socket.
    pub fn listen(mut self) -> io::Result<Vec<Listener>> {
        let count = self.count();
        let listen = |index: usize| {
            take_listener(&mut self.sockets, index).map_err(|error| {
                let name = self.names.get(index).filter(|name| !name.is_empty());
                let label = name.map_or_else(|| format!("number {index}"), |name| format!("`{name}`"));
                io::Error::other(format!("socket {label} from systemd: {error}"))
            })
        };
        (0..count).map(listen).collect()
    }
}

/// Takes the socket with `index` as a listener.
fn take_listener(inherited: &mut ListenFd, index: usize) -> io::Result<Listener> {
    let already_taken = || io::Error::other("the socket was already taken");
    match inherited.take_tcp_listener(index) {
        Ok(listener) => {
            let listener = listener.ok_or_else(already_taken)?;
            listener.set_nonblocking(true)?;
            Ok(Listener::Tcp(TcpListener::from_std(listener)?))
        }
        Err(_) => {
            let listener = sockets::take_inherited(inherited, index)?.ok_or_else(already_taken)?;
            Ok(Listener::Unix(listener))
        }
    }
}

impl std::fmt::Debug for InheritedSockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InheritedSockets({} sockets)", self.count())
    }
}
