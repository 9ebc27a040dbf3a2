//! Receives the operating system signals to stop and to reload the configuration, for `keychoir serve` and for the
//! commands that run until a signal to stop.

use std::io;

use crate::platform::signals::{ReloadSignal, StopSignals};

/// The handled signals. Signals that arrive after the construction are not lost.
#[derive(Debug)]
pub(super) struct Signals {
    stop: StopSignals,
    reload: ReloadSignal,
}

/// The action that a signal requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalEvent {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGHUP.
    Reload,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { stop: StopSignals::new()?, reload: ReloadSignal::new()? })
    }

    /// Waits for the next signal.
    ///
    /// # Cancel safety
    ///
    /// No signal is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> SignalEvent {
        tokio::select! {
            () = self.stop.next() => SignalEvent::Stop,
            () = self.reload.next() => SignalEvent::Reload,
        }
    }

    /// Waits for a signal to stop, and ignores other signals.
    pub(super) async fn wait_for_stop(&mut self) {
        while self.next().await != SignalEvent::Stop {}
    }
}
