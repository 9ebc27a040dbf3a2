//! Reports the state of Keychoir to a service manager with systemd's notify protocol, on the socket in the variable
//! `NOTIFY_SOCKET`, and sends keep-alive messages to its watchdog. Without the variable, nothing is sent.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

/// Reports that Keychoir is ready, with a status line.
pub(crate) fn report_ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reports that the configuration is being reloaded. [`report_ready`] reports the end of the reload.
pub(crate) fn report_reloading() {
    // The service manager identifies the reload by this time.
    match NotifyState::monotonic_usec_now() {
        Ok(reload_time) => notify(&[NotifyState::Reloading, reload_time]),
        Err(error) => debug!("the time for the service manager cannot be read: {error}"),
    }
}

/// Reports that Keychoir is stopping, and extends the stop timeout by `extension`.
pub(crate) fn report_stopping(extension: Duration) {
    let micros = u32::try_from(extension.as_micros()).unwrap_or(u32::MAX);
    let status = NotifyState::Status("Shutting down: running requests may finish");
    notify(&[NotifyState::Stopping, status, NotifyState::ExtendTimeoutUsec(micros)]);
}

/// Sends keep-alive messages to the watchdog if the watchdog is enabled. The interval is half the watchdog's timeout,
/// so that one late message does not cause a restart.
pub(crate) async fn send_keep_alives() -> Infallible {
    let Some(watchdog_timeout) = sd_notify::watchdog_enabled() else { return pending().await };
    loop {
        notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(watchdog_timeout / 2).await;
    }
}

/// Sends messages to the service manager. A failure is only logged, because Keychoir works without a service
/// manager.
fn notify(messages: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(messages) {
        debug!("the service manager cannot be notified: {error}");
    }
}
