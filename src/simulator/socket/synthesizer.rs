//! Converts text to audio in a speech or dialogue session. A segment is the text of one audio message. Each segment is
//! charged before it is sent, so that credits can run out in the middle of a sentence. A session holds a slot of the
//! workspace's concurrency limit during speech, and not during the wait for more text (the documentation of the
//! models).

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

/// Maximum number of characters in one audio message. It is also the minimum for audio without a flush (the Python SDK
/// 2.78, `chunk_length_schedule`).
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

/// The characters of a segment with their times, from the start of the segment.
pub(super) struct CharacterTimes {
    pub(super) characters: Vec<String>,
    pub(super) starts_ms: Vec<u64>,
    pub(super) durations_ms: Vec<u64>,
}

/// Converts the text of a session to audio of one model and format, for which one key pays.
#[derive(Debug)]
pub(super) struct Synthesizer {
    key_index: usize,
    model: Model,
    format: Format,
    /// Number of characters that were spoken so far.
    spoken_characters: u64,
}

impl Synthesizer {
    /// Creates the synthesizer of a session for which the key at `key_index` pays. The query contains the format.
    ///
    /// # Errors
    ///
    /// Fails if the model or the format does not exist, or the plan does not include it.
    pub(super) fn new(
        provider: &Provider,
        key_index: usize,
        model: &str,
        query: &str,
    ) -> Result<Self, Refusal> {
        let model =
            Model::find(model).ok_or_else(|| Refusal::with_subject(RefusalKind::ModelNotFound, model))?;
        let format = match query_value(query, "output_format") {
            None => Format::DEFAULT,
            Some(name) => Format::find(&name).ok_or_else(|| {
                let message = format!("Output format '{name}' is not supported.");
                Refusal::with_subject(RefusalKind::InvalidOutputFormat, message)
            })?,
        };
        let state = provider.state();
        let plan = &state.accounts.workspace(key_index)?.plan;
        plan.check_format(format)?;
        plan.check_model(model)?;
        Ok(Self { key_index, model, format, spoken_characters: 0 })
    }

    /// Refuses voices that the paying workspace does not have or its plan does not include.
    pub(super) fn check_voices(&self, provider: &Provider, voices: &[String]) -> Result<(), Refusal> {
        let state = provider.state();
        voices.iter().try_for_each(|voice| state.accounts.find_voice(self.key_index, voice).map(|_| ()))
    }

    /// Speaks `text`, and sends each segment as a message that `create_message` creates.
    pub(super) async fn speak(
        &mut self,
        connection: &mut SessionConnection,
        text: &str,
        create_message: &(dyn Fn(&AudioSegment) -> Message + Send + Sync),
    ) -> Result<(), SessionEnded> {
        let mut segments = split_segments(text).into_iter().peekable();
        let mut slot = None;
        while let Some(text) = segments.next() {
            // The cost of all segments is rounded up together, so that they cost the same as the whole text.
            let spoken_characters = self.spoken_characters + character_count(&text);
            let cost = self.model.cost(spoken_characters) - self.model.cost(self.spoken_characters);
            let session = &connection.session;
            let charge = if slot.is_none() {
                session
                    .admit(self.key_index, cost, CreditLimits::KeyAndWorkspace)
                    .map(|acquired_slot| slot = Some(acquired_slot))
            } else {
                session.charge(self.key_index, cost, CreditLimits::KeyAndWorkspace)
            };
            connection.require(charge).await?;
            self.spoken_characters = spoken_characters;
            connection.session.update_summary(|socket| {
                if socket.spoken.len() + text.len() <= MAX_SPOKEN_BYTES {
                    socket.spoken.push_str(&text);
                }
            });
            let melody = Melody::new(&text);
            let audio = base64(&Sound::new(melody.clone(), self.format).into_bytes());
            let message = create_message(&AudioSegment { audio, text, melody });
            connection.wait_between_messages().await?;
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

/// Splits a text into the texts of the audio messages.
fn split_segments(text: &str) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    characters.chunks(SEGMENT_CHARACTERS).map(String::from_iter).collect()
}

impl AudioSegment {
    /// Returns the characters with their times.
    pub(super) fn character_times(&self) -> CharacterTimes {
        let characters: Vec<String> = self.text.chars().map(String::from).collect();
        let starts_ms = (0..).take(characters.len()).map(|index| self.melody.start_ms(index)).collect();
        let duration_ms = |index| self.melody.start_ms(index + 1).saturating_sub(self.melody.start_ms(index));
        let durations_ms = (0..).take(characters.len()).map(duration_ms).collect();
        CharacterTimes { characters, starts_ms, durations_ms }
    }

    /// Creates the alignment of the speech WebSockets (the Python SDK 2.78, `Alignment`).
    pub(super) fn alignment(&self) -> Value {
        let CharacterTimes { characters, starts_ms, durations_ms } = self.character_times();
        json!({ "chars": characters, "charStartTimesMs": starts_ms, "charDurationsMs": durations_ms })
    }
}
