//! Counts the text and audio of a session, and contains the pending reservation of a concurrency slot and
//! credits for its next text.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use crate::elevenlabs::socket::{Dialect, audio_bytes_per_second};
use crate::policy::select::Unavailable;
use crate::pool::Reserved;

/// The result of a reservation: a lease, or the reason for its failure.
pub(super) type ReservationResult = Result<Reserved, Unavailable>;

/// The text and audio of a session so far, and its pending reservation.
pub(super) struct SpeechPermit {
    /// Characters that were forwarded.
    pub(super) characters: u64,
    /// Characters that were forwarded, or are held until a key is reserved.
    pub(super) requested: u64,
    /// Bytes per second of the audio to transcribe.
    pub(super) audio_bytes_per_second: u64,
    pub(super) is_spoken: bool,
    /// When text was last sent, or data last received from the provider.
    pub(super) active_at: Option<Instant>,
    /// The reservation for a message that is held until it completes.
    pub(super) reservation: Option<Pin<Box<dyn Future<Output = ReservationResult> + Send>>>,
}

impl SpeechPermit {
    pub(super) fn new(dialect: Dialect, audio_format: Option<&str>) -> Self {
        Self {
            characters: 0,
            requested: 0,
            audio_bytes_per_second: audio_bytes_per_second(audio_format),
            is_spoken: dialect.is_spoken(),
            active_at: None,
            reservation: None,
        }
    }

    pub(super) fn has_reservation(&self) -> bool {
        self.reservation.is_some()
    }

    /// Cancels the reservation; returns whether there was one.
    pub(super) fn cancel_reservation(&mut self) -> bool {
        self.reservation.take().is_some()
    }

    pub(super) fn poll_reservation(&mut self, cx: &mut Context<'_>) -> Poll<ReservationResult> {
        let Some(reservation) = &mut self.reservation else { return Poll::Pending };
        let result = ready!(reservation.as_mut().poll(cx));
        self.reservation = None;
        Poll::Ready(result)
    }

    /// Records that a concurrency slot is occupied for text that may follow.
    pub(super) fn hold_slot(&mut self, now: Instant) {
        self.active_at.get_or_insert(now);
    }

    /// Records data from the provider.
    pub(super) fn record_activity(&mut self, now: Instant) {
        if self.active_at.is_some() {
            self.active_at = Some(now);
        }
    }

    /// When the session counts as idle, if the provider sends nothing more.
    pub(super) fn idle_at(&self, speech_idle_max: Duration) -> Option<Instant> {
        self.active_at.map(|at| at + speech_idle_max)
    }

    /// Characters of text that were forwarded.
    pub(super) fn characters(&self) -> u64 {
        self.characters
    }

    /// The duration of `audio_bytes` of audio.
    pub(super) fn audio_duration(&self, audio_bytes: u64) -> Duration {
        Duration::from_millis(audio_bytes.saturating_mul(1_000) / self.audio_bytes_per_second.max(1))
    }
}
