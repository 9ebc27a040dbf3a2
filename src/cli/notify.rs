//! Reports the state to a service manager: systemd's notify protocol, on the socket that
//! `NOTIFY_SOCKET` names. Does nothing without one.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

/// Reports that the program serves, with the text `status`.
pub(super) fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// Reports that the configuration is being reloaded, until [`ready`] is sent.
pub(super) fn reloading() {
    // The time tells the manager which of its reload requests this belongs to.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => debug!("no monotonic time for the service manager: {error}"),
    }
}

/// Reports that the program stops, and may take `within` for it.
pub(super) fn stopping(within: Duration) {
    let micros = u32::try_from(within.as_micros()).unwrap_or(u32::MAX);
    let status = NotifyState::Status("Ending: requests under way finish");
    notify(&[NotifyState::Stopping, status, NotifyState::ExtendTimeoutUsec(micros)]);
}

/// Sends keep-alives to the watchdog, if there is one, as long as the runtime runs: twice as often
/// as required, so that one late message is not fatal.
pub(super) async fn send_keep_alives() -> Infallible {
    let Some(watchdog_timeout) = sd_notify::watchdog_enabled() else { return pending().await };
    loop {
        notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(watchdog_timeout / 2).await;
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // A failing notification must not stop the traffic.
    if let Err(error) = sd_notify::notify(state) {
        debug!("the service manager cannot be notified: {error}");
    }
}
