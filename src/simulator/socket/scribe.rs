//! `/v1/speech-to-text/realtime`: receives audio and sends transcripts. The server sends the first
//! message. The transcript depends on the length of the audio, and each started second costs one
//! credit. A session holds a slot of the workspace's concurrency limit from its first message to
//! its last.
//!
//! Sources: the Python SDK 2.78 (all messages), captured responses of 2026 (the refusal of a key).

use serde_json::{Map, Value, json};

use super::super::accounts::{CreditLimits, Refused};
use super::super::answer::trace_id;
use super::super::route::query;
use super::super::shape::Shape;
use super::super::sound::seconds;
use super::query_value;
use super::refusal;
use super::session_auth::SessionAuth;
use super::wire::{ClientMessage, SessionEnded, Wire};

/// The words of a transcript. Short audio contains only the first ones.
const WORDS: [&str; 5] = ["The", "simulator", "hears", "you", "well."];
/// Length of audio after which a session commits automatically, if the client requested this.
const PAUSE_MS: u64 = 2_000;

/// The state of a session.
struct Transcription {
    key: usize,
    bytes_per_second: u64,
    bytes: u64,
    charged: u64,
    /// The offset in bytes of the first uncommitted audio.
    segment_bytes: u64,
    commits_automatically: bool,
    has_times: bool,
    /// Whether each commit is followed by a transcript with the language.
    has_language: bool,
}

/// Serves the session until the client disconnects.
pub(super) async fn serve(wire: &mut Wire, auth: SessionAuth, text: &str) -> SessionEnded {
    match transcribe(wire, auth, text).await {
        Ok(never) => match never {},
        Err(ended) => ended,
    }
}

async fn transcribe(
    wire: &mut Wire,
    auth: SessionAuth,
    text: &str,
) -> Result<std::convert::Infallible, SessionEnded> {
    let key = auth.authorize(wire, None).await?;
    let format = query_value(text, "audio_format").unwrap_or_else(|| "pcm_16000".to_owned());
    let Some((rate, bytes_per_second)) = rate_of(&format) else {
        let message = format!("Audio format '{format}' is not supported.");
        return Err(wire.send_refusal(refusal::scribe("invalid_request", &message)).await);
    };
    // The credits must suffice for one second.
    let credit_check =
        wire.session.world.state().accounts.check_credits(key, 1, CreditLimits::KeyAndWorkspace).map(|_| ());
    let slot = credit_check.and_then(|()| wire.session.begin(key, 0, CreditLimits::KeyAndWorkspace));
    let _slot = match slot {
        Ok(slot) => slot,
        Err(refused) => return Err(wire.refuse(&refused).await),
    };
    let mut transcription = Transcription {
        key,
        bytes_per_second,
        bytes: 0,
        charged: 0,
        segment_bytes: 0,
        commits_automatically: has_value(text, "commit_strategy", "vad"),
        has_times: has_value(text, "include_timestamps", "true"),
        has_language: has_value(text, "include_language_detection", "true"),
    };
    let config = json!({
        "sample_rate": rate,
        "audio_format": format,
        "language_code": query_value(text, "language_code"),
        "commit_strategy": query_value(text, "commit_strategy").unwrap_or_else(|| "manual".to_owned()),
        "model_id": query_value(text, "model_id").unwrap_or_else(|| "scribe_v2_realtime".to_owned()),
        "enable_logging": !has_value(text, "enable_logging", "false"),
        "include_timestamps": transcription.has_times,
        "include_language_detection": transcription.has_language,
        "keyterms": query(text).filter(|(name, _)| name == "keyterms").map(|(_, term)| term).collect::<Vec<_>>(),
    });
    let started = json!({ "message_type": "session_started", "session_id": trace_id(), "config": config });
    wire.send(started.to_string()).await?;
    loop {
        let Some(received) = wire.next(None).await? else { continue };
        let message = match &received {
            ClientMessage::Text(text) => serde_json::from_str::<Map<String, Value>>(text).ok(),
            ClientMessage::Binary(_) => None,
        };
        let Some(message) = message else {
            return Err(wire.refuse(&Refused::from(Shape::MalformedJson)).await);
        };
        transcription.handle(wire, &message).await?;
    }
}

fn has_value(text: &str, name: &str, value: &str) -> bool {
    query_value(text, name).is_some_and(|actual| actual == value)
}

fn field<'a>(message: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    message.get(name).and_then(Value::as_str)
}

impl Transcription {
    async fn handle(&mut self, wire: &mut Wire, message: &Map<String, Value>) -> Result<(), SessionEnded> {
        if field(message, "message_type") != Some("input_audio_chunk") {
            let error = "The message_type must be input_audio_chunk.";
            return Err(wire.send_refusal(refusal::scribe("input_error", error)).await);
        }
        let Some(bytes) = bytes_in(field(message, "audio_base_64").unwrap_or_default()) else {
            let error = "The audio is not valid base64.";
            return Err(wire.send_refusal(refusal::scribe("input_error", error)).await);
        };
        self.bytes = self.bytes.saturating_add(bytes);
        self.segment_bytes = self.segment_bytes.saturating_add(bytes);
        let due = self.bytes.div_ceil(self.bytes_per_second);
        if let Err(refused) =
            wire.session.spend(self.key, due.saturating_sub(self.charged), CreditLimits::KeyAndWorkspace)
        {
            return Err(wire.refuse(&refused).await);
        }
        self.charged = due;
        if bytes > 0 {
            let partial = json!({ "message_type": "partial_transcript", "text": self.words().join(" ") });
            wire.send(partial.to_string()).await?;
        }
        let is_pause = self.commits_automatically && self.segment_ms() >= PAUSE_MS;
        if is_pause || message.get("commit").and_then(Value::as_bool).unwrap_or(false) {
            self.commit(wire).await?;
        }
        Ok(())
    }

    fn segment_ms(&self) -> u64 {
        self.segment_bytes.saturating_mul(1_000) / self.bytes_per_second
    }

    /// One word per started tenth of a second, up to the maximum.
    fn words(&self) -> &'static [&'static str] {
        let count = usize::try_from(self.segment_ms().div_ceil(100)).unwrap_or(usize::MAX).min(WORDS.len());
        &WORDS[..count]
    }

    /// The words with their times, which divide the segment evenly.
    fn timed_words(&self) -> Vec<Value> {
        let words = self.words();
        let length = self.segment_ms() / u64::try_from(words.len().max(1)).unwrap_or(1);
        let timed = words.iter().zip(0_u64..).map(|(word, index)| {
            let (start, end) = (seconds(index * length), seconds((index + 1) * length));
            json!({ "text": word, "start": start, "end": end, "type": "word", "logprob": -0.01 })
        });
        timed.collect()
    }

    async fn commit(&mut self, wire: &mut Wire) -> Result<(), SessionEnded> {
        let text = self.words().join(" ");
        let committed = json!({ "message_type": "committed_transcript", "text": text });
        wire.send(committed.to_string()).await?;
        // Both have the same event. If only the language was requested, it contains no words
        // (Pipecat 1.14).
        if self.has_times || self.has_language {
            let timed = json!({
                "message_type": "committed_transcript_with_timestamps",
                "text": text,
                "language_code": "en",
                "words": self.has_times.then(|| self.timed_words()),
            });
            wire.send(timed.to_string()).await?;
        }
        self.segment_bytes = 0;
        Ok(())
    }
}

/// Samples and bytes per second of a format (the Python SDK 2.78, `AudioFormat`).
fn rate_of(format: &str) -> Option<(u64, u64)> {
    let (coding, rate) = format.split_once('_')?;
    let rate = rate.parse().ok().filter(|rate| (8_000..=48_000).contains(rate))?;
    match coding {
        "pcm" => Some((rate, rate * 2)),
        "ulaw" => Some((rate, rate)),
        _ => None,
    }
}

/// The number of bytes that a base64 text encodes.
fn bytes_in(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches('=');
    let padding = text.len() - digits.len();
    let is_digit = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'/');
    let is_whole = text.len().is_multiple_of(4) && padding <= 2;
    (is_whole && digits.as_bytes().iter().all(is_digit))
        .then(|| u64::try_from(digits.len() * 3 / 4).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_valid_base_64_is_measured() {
        for (text, bytes) in [("", 0), ("Zg==", 1), ("Zm8=", 2), ("Zm9v", 3), ("Zm9vYg==", 4)] {
            assert_eq!(bytes_in(text), Some(bytes), "{text}");
        }
        for text in ["Zg=", "Zg", "Z===", "Z g=", "Zm9-", "Zg==Zg=="] {
            assert_eq!(bytes_in(text), None, "{text}");
        }
    }

    #[test]
    fn formats_have_their_rates() {
        assert_eq!(rate_of("pcm_16000"), Some((16_000, 32_000)));
        assert_eq!(rate_of("ulaw_8000"), Some((8_000, 8_000)));
        for format in ["", "pcm", "pcm_", "pcm_0", "pcm_7999", "pcm_48001", "mp3_44100"] {
            assert_eq!(rate_of(format), None, "{format}");
        }
    }
}
