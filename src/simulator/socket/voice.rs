//! Converts text to audio in a session. Each piece is charged before it is sent, so that credits
//! can run out in the middle of a sentence. A slot of the workspace's concurrency limit is held
//! during speech and not during the wait for more text (the documentation of the models).

use serde_json::{Value, json};

use super::super::accounts::{CreditLimits, Refused};
use super::super::models::Model;
use super::super::shape::Shape;
use super::super::sound::Sound;
use super::super::sound::format::Format;
use super::super::sound::melody::Melody;
use super::super::speech::{base64, characters_of};
use super::super::world::World;
use super::wire::{SessionEnded, Wire};
use super::{OrRefused, query_value};

/// Characters of one audio message: the minimum for audio without a flush (the Python SDK 2.78,
/// `chunk_length_schedule`).
pub(super) const PIECE_CHARACTERS: usize = 50;
/// Maximum bytes of spoken text that the ledger stores per session.
const MAX_SPOKEN_BYTES: usize = 64 * 1_024;

/// One audio message.
pub(super) struct Piece {
    /// The audio in base64.
    pub(super) audio: String,
    pub(super) text: String,
    melody: Melody,
}

/// The format of audio messages on a WebSocket.
pub(super) trait Form: Sync {
    fn write(&self, piece: &Piece) -> String;
}

#[derive(Debug)]
pub(super) struct Voice {
    key: usize,
    model: Model,
    format: Format,
    characters: u64,
}

impl Voice {
    /// Creates the voice of a session that `key` pays.
    ///
    /// # Errors
    ///
    /// When the model or the format does not exist, or the plan does not include it.
    pub(super) fn new(world: &World, key: usize, model: &str, text: &str) -> OrRefused<Self> {
        let model = Model::find(model).ok_or_else(|| Refused::with_subject(Shape::ModelNotFound, model))?;
        let format = match query_value(text, "output_format") {
            None => Format::DEFAULT,
            Some(name) => Format::named(&name).ok_or_else(|| {
                let message = format!("Output format '{name}' is not supported.");
                Refused::with_subject(Shape::InvalidOutputFormat, message)
            })?,
        };
        let state = world.state();
        state.accounts.format(key, format)?;
        state.accounts.model(key, model)?;
        Ok(Self { key, model, format, characters: 0 })
    }

    /// Checks whether the paying workspace has the voices and its plan includes them.
    pub(super) fn find(&self, world: &World, voices: &[String]) -> OrRefused<()> {
        let state = world.state();
        voices.iter().try_for_each(|voice| state.accounts.voice(self.key, voice).map(|_| ()))
    }

    /// Speaks `text` and sends each piece in the format of `form`.
    pub(super) async fn speak(
        &mut self,
        wire: &mut Wire,
        text: &str,
        form: &impl Form,
    ) -> Result<(), SessionEnded> {
        let mut pieces = pieces_of(text).into_iter().peekable();
        let mut slot = None;
        while let Some(text) = pieces.next() {
            // The sum is rounded up, not each piece, so that all pieces together cost the same as
            // the whole text.
            let cost =
                self.model.cost(self.characters + characters_of(&text)) - self.model.cost(self.characters);
            let paid = if slot.is_none() {
                wire.session
                    .begin(self.key, cost, CreditLimits::KeyAndWorkspace)
                    .map(|held_slot| slot = Some(held_slot))
            } else {
                wire.session.spend(self.key, cost, CreditLimits::KeyAndWorkspace)
            };
            if let Err(refused) = paid {
                return Err(wire.refuse(&refused).await);
            }
            self.characters += characters_of(&text);
            wire.session.update_summary(|socket| {
                if socket.spoken.len() + text.len() <= MAX_SPOKEN_BYTES {
                    socket.spoken.push_str(&text);
                }
            });
            let melody = Melody::of(&text);
            let sound: Vec<u8> =
                Sound::of(melody.clone(), self.format).into_blocks().flat_map(Vec::from).collect();
            let piece = form.write(&Piece { audio: base64(&sound), text, melody });
            wire.pause().await?;
            if pieces.peek().is_none() {
                // Released before the last piece is sent. Otherwise a client could receive the
                // piece while the slot is still held.
                slot = None;
            }
            wire.send_now(piece.into()).await?;
        }
        drop(slot);
        Ok(())
    }
}

fn pieces_of(text: &str) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    characters.chunks(PIECE_CHARACTERS).map(String::from_iter).collect()
}

impl Piece {
    /// The characters with their start times and lengths, in milliseconds from the start of the
    /// piece.
    pub(super) fn times(&self) -> (Vec<String>, Vec<u64>, Vec<u64>) {
        let starts: Vec<u64> =
            (0..characters_of(&self.text)).map(|index| self.melody.starts_ms(index)).collect();
        let ends = (1..=characters_of(&self.text)).map(|index| self.melody.starts_ms(index));
        let lengths = starts.iter().zip(ends).map(|(start, end)| end.saturating_sub(*start)).collect();
        (self.text.chars().map(String::from).collect(), starts, lengths)
    }

    /// The alignment on the WebSockets of speech (the Python SDK 2.78, `Alignment`).
    pub(super) fn alignment(&self) -> Value {
        let (chars, starts, lengths) = self.times();
        json!({ "chars": chars, "charStartTimesMs": starts, "charDurationsMs": lengths })
    }
}
