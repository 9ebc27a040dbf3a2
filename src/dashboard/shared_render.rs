//! Renders a part of a page on a blocking thread, once for all viewers who wait for it at the same time. The overview
//! uses it, because all viewers see the same content.

use std::time::Instant;

use maud::{Markup, html};
use tokio::sync::Mutex;

use crate::admin::run_blocking;
use crate::clock;
use crate::policy::units::UnixMs;

/// The part that was rendered last, and the time at which its rendering started. A request gets only a part whose
/// rendering started after the request, so that the page after an action shows the result of the action.
#[derive(Debug, Default)]
pub(super) struct SharedRender(Mutex<Option<(Instant, Markup)>>);

impl SharedRender {
    /// Returns the part. Renders it with the current time, unless another request has started to render it after this
    /// call.
    ///
    /// # Cancel safety
    ///
    /// After the future is dropped, the next request renders the part.
    pub(super) async fn render_once(&self, render: impl FnOnce(UnixMs) -> Markup + Send + 'static) -> Markup {
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
    async fn concurrent_viewers_share_a_part_and_a_later_viewer_gets_a_new_part() {
        let (shared, count) = (SharedRender::default(), Arc::new(AtomicUsize::new(0)));
        let (open_gate, gate) = mpsc::channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let get = || {
            let (count, gate) = (Arc::clone(&count), Arc::clone(&gate));
            shared.render_once(move |_| {
                // Returns when the sender is dropped.
                let _ = gate.lock().unwrap().recv();
                let number = count.fetch_add(1, Ordering::Relaxed);
                html! { (number) }
            })
        };
        let (parts, ()) = join(join_all((0..20).map(|_| get())), async { drop(open_gate) }).await;
        // The rendering for the first viewer started before the other requests, so the others share the second part.
        let numbers: Vec<&str> = parts.iter().map(|part| &*part.0).collect();
        assert_eq!(numbers[0], "0", "the first viewer must get the first part");
        assert!(
            numbers[1..].iter().all(|number| *number == "1"),
            "all other viewers must share the second part, not {numbers:?}"
        );
        assert_eq!(get().await.0, "2", "an earlier part must not be shown");
    }
}
