//! Renders a part of a page on a blocking thread, once for all viewers that wait for it at the same time.

use std::time::Instant;

use maud::{Markup, html};
use tokio::sync::Mutex;

use crate::policy::units::UnixMs;
use crate::{clock, tasks};

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
        let asked_at = clock::instant();
        let mut last = self.0.lock().await;
        if let Some((started_at, part)) = &*last
            && *started_at >= asked_at
        {
            return part.clone();
        }
        let (started_at, now) = (clock::instant(), clock::now());
        // The task fails only when the program ends.
        let part = tasks::spawn_blocking(move || render(now)).await.unwrap_or_else(|_| html! {});
        *last = Some((started_at, part.clone()));
        part
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;

    use super::*;

    #[tokio::test]
    async fn concurrent_viewers_share_a_part_and_a_later_one_gets_a_new_part() {
        let (shared, count) = (SharedRender::default(), Arc::new(AtomicUsize::new(0)));
        let get = || {
            let count = Arc::clone(&count);
            shared.get(move |_| {
                let number = count.fetch_add(1, Ordering::Relaxed);
                html! { (number) }
            })
        };
        let parts = join_all((0..20).map(|_| get())).await;
        // The first one may have started before the others came.
        assert!(count.load(Ordering::Relaxed) <= 2, "{parts:?}");
        let rendered = count.load(Ordering::Relaxed);
        assert_eq!(get().await.0, rendered.to_string(), "an earlier part must not be shown");
    }
}
