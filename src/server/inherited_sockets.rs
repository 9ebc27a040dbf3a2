//! Listening sockets that the service manager passes to this process (systemd socket activation). They stay
//! open during a restart, so connections are queued instead of refused.

use std::io;

use listenfd::ListenFd;
use tokio::net::TcpListener;

use super::listener::Listener;
use super::unix::UnixSocketListener;

/// The sockets passed to this process, before they are converted to listeners.
pub struct InheritedSockets {
    sockets: ListenFd,
    /// The names of the sockets, from `LISTEN_FDNAMES`.
    names: Vec<String>,
}

impl InheritedSockets {
    /// Takes the sockets of `LISTEN_FDS` if `LISTEN_PID` is this process, and removes these variables, so
    /// that child processes do not use the sockets. Must be called once, before other threads are started.
    #[must_use]
    pub fn take() -> Self {
        let variable = |name| std::env::var(name).unwrap_or_default();
        let is_ours = variable("LISTEN_PID") == std::process::id().to_string();
        let names = variable("LISTEN_FDNAMES").split(':').map(str::to_owned).collect();
        let sockets = if is_ours { ListenFd::from_env() } else { ListenFd::empty() };
        Self { sockets, names }
    }

    /// The number of sockets passed.
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
            let name = self.names.get(index).filter(|name: &&String| !name.is_empty());
            let name = name.map_or_else(|| format!("number {index}"), |name| format!("`{name}`"));
            let describe =
                |error: io::Error| io::Error::other(format!("socket {name} from systemd: {error}"));
            take_listener(&mut self.sockets, index).map_err(describe)
        };
        (0..count).map(listen).collect()
    }
}

fn take_listener(sockets: &mut ListenFd, index: usize) -> io::Result<Listener> {
    let already_taken = || io::Error::other("it was already taken");
    match sockets.take_tcp_listener(index) {
        Ok(listener) => {
            let listener = listener.ok_or_else(already_taken)?;
            listener.set_nonblocking(true)?;
            Ok(Listener::Tcp(TcpListener::from_std(listener)?))
        }
        Err(_) => {
            let listener = sockets.take_unix_listener(index)?.ok_or_else(already_taken)?;
            Ok(Listener::Unix(UnixSocketListener::from_inherited(listener)?))
        }
    }
}

impl std::fmt::Debug for InheritedSockets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "InheritedSockets({} sockets)", self.count())
    }
}
