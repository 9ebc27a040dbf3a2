//! Renders a part of a page on a blocking thread, once for all viewers that wait for it at the same time.

use std::time::Instant;

use maud::{Markup, html};
use tokio::sync::Mutex;

use crate::admin::run_blocking;
use crate::clock;
use crate::policy::units::UnixMs;

/// The part that was rendered last, and the start of that. No request gets a part that is older than the request, so
/// that the page after an action shows its result.
#[derive(Debug, Default)]
pub(super) struct SharedRender(Mutex<Option<(Instant, Markup)>>);

impl SharedRender {
    /// Returns the part, rendered with the current time unless that was started after this call.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future lets the next request render.
    pub(super) async fn get(&self, render: impl FnOnce(UnixMs) -> Markup + Send + 'static) -> Markup {
        let requested_at = clock::instant();
        let mut last = self.0.lock().await;
        if let Some((started_at, part)) = &*last
            && *started_at >= requested_at
        {
            return part.clone();
        }
        let (started_at, now) = (clock::instant(), clock::now());
        let part = run_blocking(move || render(now)).await.unwrap_or_else(|| html! {});
        *last = Some((started_at, part.clone()));
        part
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, mpsc};

    use futures_util::future::{join, join_all};

    use super::*;

    #[tokio::test]
    async fn concurrent_viewers_share_a_part_and_a_later_one_gets_a_new_part() {
        let (shared, count) = (SharedRender::default(), Arc::new(AtomicUsize::new(0)));
        let (open_gate, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let get = || {
            let (count, gate) = (Arc::clone(&count), Arc::clone(&gate));
            shared.get(move |_| {
                // Returns when the sender is dropped.
                let _ = gate.lock().unwrap().recv();
                let number = count.fetch_add(1, Ordering::Relaxed);
                html! { (number) }
            })
        };
        let (parts, ()) = join(join_all((0..20).map(|_| get())), async { drop(open_gate) }).await;
        // The first part was started before the other viewers came.
        let numbers: Vec<&str> = parts.iter().map(|part| &*part.0).collect();
        assert_eq!(numbers[0], "0");
        assert!(numbers[1..].iter().all(|number| *number == "1"), "{numbers:?}");
        assert_eq!(get().await.0, "2", "an earlier part must not be shown");
    }
}
