//! Serves `/v1/speech-to-text/realtime`: receives audio and sends transcripts. The simulator sends the first message. A
//! commit ends a segment of the audio and sends its final transcript. The transcript depends on the length of the
//! audio, and each started second costs one credit. A session holds a slot of the workspace's concurrency limit from
//! its first message to its last.
//!
//! Sources: the Python SDK 2.78 (all messages), captured responses of 2026 (the refusal of a key).

use serde_json::{Value, json};

use super::super::accounts::CreditLimits;
use super::super::query::{query_pairs, query_value};
use super::super::response::new_trace_id;
use super::super::sound::to_seconds;
use super::connection::{SessionConnection, SessionEnded};
use super::is_set;
use super::refusal;
use super::session_auth::SessionAuth;

/// The words of a transcript. The transcript of short audio contains only the first words.
const WORDS: [&str; 5] = ["The", "simulator", "hears", "you", "well."];
/// Length of the audio after which a session commits it, if the client has requested automatic commits.
const PAUSE_MS: u64 = 2_000;

/// The received audio of a session, and its requested transcripts.
struct Transcription {
    key_index: usize,
    bytes_per_second: u64,
    received_bytes: u64,
    charged_seconds: u64,
    /// Bytes of the audio that is not committed yet.
    segment_bytes: u64,
    commits_automatically: bool,
    /// Whether each commit is followed by a transcript with the times of the words.
    has_times: bool,
    /// Whether each commit is followed by a transcript with the language.
    has_language: bool,
}

/// Serves the session until the client disconnects.
pub(super) async fn serve(
    connection: &mut SessionConnection,
    auth: SessionAuth,
    query: &str,
) -> Result<(), SessionEnded> {
    let key_index = auth.authorize(connection, None).await?;
    let format = query_value(query, "audio_format").unwrap_or_else(|| "pcm_16000".to_owned());
    let Some((rate, bytes_per_second)) = parse_rates(&format) else {
        let message = format!("Audio format '{format}' is not supported.");
        return Err(connection.send_refusal(refusal::scribe_refusal("invalid_request", &message)).await);
    };
    // The credits must suffice for one second.
    let credit_check = connection.session.provider.state().accounts.check_credits(
        key_index,
        1,
        CreditLimits::KeyAndWorkspace,
    );
    connection.require(credit_check).await?;
    let slot = connection.session.admit(key_index, 0, CreditLimits::KeyAndWorkspace);
    let _slot = connection.require(slot).await?;
    let mut transcription = Transcription {
        key_index,
        bytes_per_second,
        received_bytes: 0,
        charged_seconds: 0,
        segment_bytes: 0,
        commits_automatically: has_value(query, "commit_strategy", "vad"),
        has_times: has_value(query, "include_timestamps", "true"),
        has_language: has_value(query, "include_language_detection", "true"),
    };
    let keyterms = query_pairs(query).filter(|(name, _)| name == "keyterms").map(|(_, term)| term);
    let config = json!({
        "sample_rate": rate,
        "audio_format": format,
        "language_code": query_value(query, "language_code"),
        "commit_strategy": query_value(query, "commit_strategy").unwrap_or_else(|| "manual".to_owned()),
        "model_id": query_value(query, "model_id").unwrap_or_else(|| "scribe_v2_realtime".to_owned()),
        "enable_logging": !has_value(query, "enable_logging", "false"),
        "include_timestamps": transcription.has_times,
        "include_language_detection": transcription.has_language,
        "keyterms": keyterms.collect::<Vec<_>>(),
    });
    let session_id = new_trace_id();
    connection
        .send_json(json!({ "message_type": "session_started", "session_id": session_id, "config": config }))
        .await?;
    loop {
        let Some(message) = connection.receive_object(None).await? else { continue };
        transcription.process_message(connection, &message).await?;
    }
}

/// Returns whether a query parameter has the expected value.
fn has_value(query: &str, parameter: &str, expected: &str) -> bool {
    query_value(query, parameter).is_some_and(|value| value == expected)
}

/// Refuses an invalid message.
async fn refuse_input(connection: &mut SessionConnection, error: &str) -> SessionEnded {
    connection.send_refusal(refusal::scribe_refusal("input_error", error)).await
}

impl Transcription {
    /// Charges the audio of a message, and sends the transcripts that it causes.
    async fn process_message(
        &mut self,
        connection: &mut SessionConnection,
        message: &Value,
    ) -> Result<(), SessionEnded> {
        if message["message_type"] != "input_audio_chunk" {
            return Err(refuse_input(connection, "The message_type must be input_audio_chunk.").await);
        }
        let Some(bytes) = base64_decoded_length(message["audio_base_64"].as_str().unwrap_or_default()) else {
            return Err(refuse_input(connection, "The audio is not valid base64.").await);
        };
        self.received_bytes = self.received_bytes.saturating_add(bytes);
        self.segment_bytes = self.segment_bytes.saturating_add(bytes);
        let started_seconds = self.received_bytes.div_ceil(self.bytes_per_second);
        let cost = started_seconds.saturating_sub(self.charged_seconds);
        let charge = connection.session.charge(self.key_index, cost, CreditLimits::KeyAndWorkspace);
        connection.require(charge).await?;
        self.charged_seconds = started_seconds;
        if bytes > 0 {
            let text = self.words().join(" ");
            connection.send_json(json!({ "message_type": "partial_transcript", "text": text })).await?;
        }
        let is_pause = self.commits_automatically && self.segment_ms() >= PAUSE_MS;
        if is_pause || is_set(message, "commit") {
            self.commit(connection).await?;
        }
        Ok(())
    }

    /// Returns the length of the audio that is not committed yet.
    fn segment_ms(&self) -> u64 {
        self.segment_bytes.saturating_mul(1_000) / self.bytes_per_second
    }

    /// Returns one word per started tenth of a second, up to all words.
    fn words(&self) -> &'static [&'static str] {
        let count = usize::try_from(self.segment_ms().div_ceil(100)).unwrap_or(usize::MAX);
        &WORDS[..count.min(WORDS.len())]
    }

    /// Returns the words with their times. The words divide the segment evenly.
    fn timed_words(&self) -> Vec<Value> {
        let words = self.words();
        let length = self.segment_ms() / u64::try_from(words.len().max(1)).unwrap_or(1);
        let timed_words = words.iter().zip(0_u64..).map(|(word, index)| {
            let (start, end) = (to_seconds(index * length), to_seconds((index + 1) * length));
            json!({ "text": word, "start": start, "end": end, "type": "word", "logprob": -0.01 })
        });
        timed_words.collect()
    }

    /// Sends the transcript of the current segment, and begins the next segment.
    async fn commit(&mut self, connection: &mut SessionConnection) -> Result<(), SessionEnded> {
        let text = self.words().join(" ");
        connection.send_json(json!({ "message_type": "committed_transcript", "text": text })).await?;
        // One event contains both the times and the language. If only the language is requested, the event contains no
        // words (Pipecat 1.14).
        if self.has_times || self.has_language {
            let timed_transcript = json!({
                "message_type": "committed_transcript_with_timestamps",
                "text": text,
                "language_code": "en",
                "words": self.has_times.then(|| self.timed_words()),
            });
            connection.send_json(timed_transcript).await?;
        }
        self.segment_bytes = 0;
        Ok(())
    }
}

/// Returns the samples per second and the bytes per second of a format (the Python SDK 2.78, `AudioFormat`).
fn parse_rates(format: &str) -> Option<(u64, u64)> {
    let (coding, rate) = format.split_once('_')?;
    let rate = rate.parse().ok().filter(|rate| (8_000..=48_000).contains(rate))?;
    match coding {
        "pcm" => Some((rate, rate * 2)),
        "ulaw" => Some((rate, rate)),
        _ => None,
    }
}

/// Returns the number of bytes that `text` encodes in base64. Returns `None` if it is invalid.
fn base64_decoded_length(text: &str) -> Option<u64> {
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
    fn only_valid_base64_is_measured() {
        for (text, bytes) in [("", 0), ("Zg==", 1), ("Zm8=", 2), ("Zm9v", 3), ("Zm9vYg==", 4)] {
            assert_eq!(base64_decoded_length(text), Some(bytes), "{text:?} must have this length");
        }
        for text in ["Zg=", "Zg", "Z===", "Z g=", "Zm9-", "Zg==Zg=="] {
            assert_eq!(base64_decoded_length(text), None, "{text:?} must be invalid");
        }
    }

    #[test]
    fn formats_have_their_rates() {
        assert_eq!(parse_rates("pcm_16000"), Some((16_000, 32_000)));
        assert_eq!(parse_rates("ulaw_8000"), Some((8_000, 8_000)));
        for format in ["", "pcm", "pcm_", "pcm_0", "pcm_7999", "pcm_48001", "mp3_44100"] {
            assert_eq!(parse_rates(format), None, "{format:?} must be unknown");
        }
    }
}
