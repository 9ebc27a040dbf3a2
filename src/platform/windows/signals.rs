//! Waits for the console events that stop the program. No event reloads the configuration, which is reloaded when its
//! file changes.

use std::future::pending;
use std::io;

use tokio::signal::windows::{CtrlBreak, CtrlC, CtrlClose, CtrlShutdown};
use tokio::signal::windows::{ctrl_break, ctrl_c, ctrl_close, ctrl_shutdown};

/// Receives the events Ctrl+C, Ctrl+Break, the end of the console, and the shutdown of the system.
#[derive(Debug)]
pub(crate) struct StopSignals {
    interrupt: CtrlC,
    terminate: CtrlBreak,
    close: CtrlClose,
    shutdown: CtrlShutdown,
}

impl StopSignals {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: ctrl_c()?,
            terminate: ctrl_break()?,
            close: ctrl_close()?,
            shutdown: ctrl_shutdown()?,
        })
    }

    /// Waits for the next event. Dropping the future loses no event.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.close.recv() => {}
            _ = self.shutdown.recv() => {}
        }
    }
}

/// A signal that never arrives, because Windows has no signal to reload the configuration.
#[derive(Debug)]
pub(crate) struct ReloadSignal;

impl ReloadSignal {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self)
    }

    /// Waits forever.
    pub(crate) async fn next(&mut self) {
        pending().await
    }
}
