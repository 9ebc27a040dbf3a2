//! Converts text to audio in a session. Each segment is charged before it is sent, so that credits
//! can run out in the middle of a sentence. A slot of the workspace's concurrency limit is held
//! during speech and not during the wait for more text (the documentation of the models).

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::super::accounts::{CreditLimits, Refusal};
use super::super::base64::base64;
use super::super::models::Model;
use super::super::provider::Provider;
use super::super::query::query_value;
use super::super::refusal::RefusalKind;
use super::super::sound::Sound;
use super::super::sound::format::Format;
use super::super::sound::melody::Melody;
use super::super::speech::character_count;
use super::connection::{SessionConnection, SessionEnded};

/// Characters of one audio message: the minimum for audio without a flush (the Python SDK 2.78,
/// `chunk_length_schedule`).
pub(super) const SEGMENT_CHARACTERS: usize = 50;
/// Maximum number of bytes of spoken text that the ledger stores per session.
const MAX_SPOKEN_BYTES: usize = 64 * 1_024;

/// The content of one audio message.
pub(super) struct AudioSegment {
    /// The audio in base64.
    pub(super) audio: String,
    text: String,
    melody: Melody,
}

#[derive(Debug)]
pub(super) struct Synthesizer {
    key_index: usize,
    model: Model,
    format: Format,
    /// Characters spoken so far.
    characters: u64,
}

impl Synthesizer {
    /// Creates the synthesizer of a session for which the key at `key_index` pays. The query contains the format.
    ///
    /// # Errors
    ///
    /// Fails when the model or the format does not exist, or the plan does not include it.
    pub(super) fn new(
        provider: &Provider,
        key_index: usize,
        model: &str,
        query: &str,
    ) -> Result<Self, Refusal> {
        let model =
            Model::find(model).ok_or_else(|| Refusal::with_object_id(RefusalKind::ModelNotFound, model))?;
        let format = match query_value(query, "output_format") {
            None => Format::DEFAULT,
            Some(name) => Format::find(&name).ok_or_else(|| {
                let message = format!("Output format '{name}' is not supported.");
                Refusal::with_object_id(RefusalKind::InvalidOutputFormat, message)
            })?,
        };
        let state = provider.state();
        let plan = &state.accounts.workspace(key_index)?.plan;
        plan.check_format(format)?;
        plan.check_model(model)?;
        Ok(Self { key_index, model, format, characters: 0 })
    }

    /// Checks whether the paying workspace has the voices and its plan includes them.
    pub(super) fn check_voices(&self, provider: &Provider, voices: &[String]) -> Result<(), Refusal> {
        let state = provider.state();
        voices.iter().try_for_each(|voice| state.accounts.find_voice(self.key_index, voice).map(|_| ()))
    }

    /// Speaks `text`, and sends each segment as a message that `write` creates.
    pub(super) async fn speak(
        &mut self,
        connection: &mut SessionConnection,
        text: &str,
        write: &(dyn Fn(&AudioSegment) -> Message + Send + Sync),
    ) -> Result<(), SessionEnded> {
        let mut segments = split_segments(text).into_iter().peekable();
        let mut slot = None;
        while let Some(text) = segments.next() {
            // The sum is rounded up, not each segment, so that all segments together cost the same
            // as the whole text.
            let spoken_characters = self.characters + character_count(&text);
            let cost = self.model.cost(spoken_characters) - self.model.cost(self.characters);
            let session = &connection.session;
            let charge = if slot.is_none() {
                session
                    .admit(self.key_index, cost, CreditLimits::KeyAndWorkspace)
                    .map(|admitted| slot = Some(admitted))
            } else {
                session.charge(self.key_index, cost, CreditLimits::KeyAndWorkspace)
            };
            connection.require(charge).await?;
            self.characters = spoken_characters;
            connection.session.update_summary(|socket| {
                if socket.spoken.len() + text.len() <= MAX_SPOKEN_BYTES {
                    socket.spoken.push_str(&text);
                }
            });
            let melody = Melody::new(&text);
            let audio = base64(&Sound::new(melody.clone(), self.format).into_bytes());
            let message = write(&AudioSegment { audio, text, melody });
            connection.delay().await?;
            if segments.peek().is_none() {
                // The slot is released before the last segment is sent. Otherwise a client could receive the
                // segment while the slot is still held.
                slot = None;
            }
            connection.send_now(message).await?;
        }
        drop(slot);
        Ok(())
    }
}

fn split_segments(text: &str) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    characters.chunks(SEGMENT_CHARACTERS).map(String::from_iter).collect()
}

impl AudioSegment {
    /// Returns the characters with their start times and lengths, in milliseconds from the start of the
    /// segment.
    pub(super) fn character_times(&self) -> (Vec<String>, Vec<u64>, Vec<u64>) {
        let characters: Vec<String> = self.text.chars().map(String::from).collect();
        let starts = (0..).take(characters.len()).map(|index| self.melody.start_ms(index)).collect();
        let length = |index| self.melody.start_ms(index + 1).saturating_sub(self.melody.start_ms(index));
        let lengths = (0..).take(characters.len()).map(length).collect();
        (characters, starts, lengths)
    }

    /// Creates the alignment of the speech WebSockets (the Python SDK 2.78, `Alignment`).
    pub(super) fn alignment(&self) -> Value {
        let (characters, starts, lengths) = self.character_times();
        json!({ "chars": characters, "charStartTimesMs": starts, "charDurationsMs": lengths })
    }
}
