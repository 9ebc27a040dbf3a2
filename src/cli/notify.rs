//! Reports the program's state to a service manager by systemd's notify protocol on the socket in
//! `NOTIFY_SOCKET`. Does nothing if the variable is not set.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

/// Reports that the program is ready, with the text `status`.
pub(super) fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reports that the configuration is being reloaded. [`ready`] reports the end of the reload.
pub(super) fn reloading() {
    // The time identifies the reload request to the service manager.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => debug!("no monotonic time for the service manager: {error}"),
    }
}

/// Reports that the program is stopping, and extends the stop timeout by `within`.
pub(super) fn stopping(within: Duration) {
    let micros = u32::try_from(within.as_micros()).unwrap_or(u32::MAX);
    let status = NotifyState::Status("Ending: requests under way finish");
    notify(&[NotifyState::Stopping, status, NotifyState::ExtendTimeoutUsec(micros)]);
}

/// Sends keep-alives to the watchdog, if it is enabled. The interval is half the required one, so
/// that one late message does not cause a restart.
pub(super) async fn send_keep_alives() -> Infallible {
    let Some(watchdog_timeout) = sd_notify::watchdog_enabled() else { return pending().await };
    loop {
        notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(watchdog_timeout / 2).await;
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // If a notification fails, the proxy continues to serve.
    if let Err(error) = sd_notify::notify(state) {
        debug!("the service manager cannot be notified: {error}");
    }
}
