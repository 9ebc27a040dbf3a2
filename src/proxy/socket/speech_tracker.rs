//! Counts the characters of a session, converts its bytes of audio to a duration, and holds the pending reservation of
//! a concurrency slot and credits for its next text.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::elevenlabs::socket::audio_bytes_per_second;
use crate::policy::select::Unavailable;
use crate::pool::Reserved;

/// The result of a reservation: a lease, or the reason for its failure.
pub(super) type ReservationResult = Result<Reserved, Unavailable>;

/// The characters of a session so far, the rate of its audio, and its pending reservation.
pub(super) struct SpeechTracker {
    /// Characters that were forwarded.
    pub(super) forwarded_characters: u64,
    /// The number of characters that were forwarded, plus the characters of the held message.
    pub(super) requested_characters: u64,
    /// Bytes per second of the audio to transcribe.
    audio_bytes_per_second: u64,
    /// The time at which text was last sent or data was last received from the provider, or `None` before the
    /// first text.
    pub(super) last_activity: Option<Instant>,
    /// The reservation for the held message.
    pub(super) reservation: Option<Pin<Box<dyn Future<Output = ReservationResult> + Send>>>,
}

impl SpeechTracker {
    pub(super) fn new(audio_format: Option<&str>) -> Self {
        Self {
            forwarded_characters: 0,
            requested_characters: 0,
            audio_bytes_per_second: audio_bytes_per_second(audio_format),
            last_activity: None,
            reservation: None,
        }
    }

    /// Polls the pending reservation, and removes it when it is complete. Returns `Pending` if there is none.
    pub(super) fn poll_reservation(&mut self, cx: &mut Context<'_>) -> Poll<ReservationResult> {
        let Some(reservation) = &mut self.reservation else { return Poll::Pending };
        let reservation_result = ready!(reservation.as_mut().poll(cx));
        self.reservation = None;
        Poll::Ready(reservation_result)
    }

    /// Records that data was received from the provider. Before the first text, there is no activity.
    pub(super) fn record_activity(&mut self, now: Instant) {
        if self.last_activity.is_some() {
            self.last_activity = Some(now);
        }
    }

    /// Returns the duration of `audio_bytes` of audio.
    pub(super) fn audio_duration(&self, audio_bytes: u64) -> Duration {
        Duration::from_millis(audio_bytes.saturating_mul(1_000) / self.audio_bytes_per_second.max(1))
    }
}
