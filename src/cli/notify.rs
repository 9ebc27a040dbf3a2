//! What a service manager hears: systemd's notify protocol, on the socket that `NOTIFY_SOCKET`
//! names. Without one, nothing is said.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::debug;

/// The program serves, as `status` says.
pub(super) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// The configuration is being read again; [`ready`] ends it.
pub(super) fn reloading() {
    // The time tells the manager which of its own reload requests this answers.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => debug!("no monotonic time for the service manager: {error}"),
    }
}

/// The program ends, and may take `within` for it.
pub(super) fn stopping(within: Duration) {
    let micros = u32::try_from(within.as_micros()).unwrap_or(u32::MAX);
    let status = NotifyState::Status("Ending: requests under way finish");
    tell(&[NotifyState::Stopping, status, NotifyState::ExtendTimeoutUsec(micros)]);
}

/// Tells the watchdog, where there is one, that the runtime still turns: twice as often as it asks
/// for, so that one late beat is no death.
pub(super) async fn beat() -> Infallible {
    let Some(patience) = sd_notify::watchdog_enabled() else { return pending().await };
    loop {
        tell(&[NotifyState::Watchdog]);
        tokio::time::sleep(patience / 2).await;
    }
}

fn tell(state: &[NotifyState<'_>]) {
    // A manager that cannot be told must not stop the traffic.
    if let Err(error) = sd_notify::notify(state) {
        debug!("the service manager cannot be told: {error}");
    }
}
