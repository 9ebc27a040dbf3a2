//! Defines the reports to the service manager, which have no effect, because Keychoir does not run as a Windows
//! service.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

pub(crate) fn report_ready(_: &str) {}

pub(crate) fn report_reloading() {}

pub(crate) fn report_stopping(_: Duration) {}

/// Waits forever.
pub(crate) async fn send_keep_alives() -> Infallible {
    pending().await
}
