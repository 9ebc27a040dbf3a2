//! Defines the workloads: five requests that are typical of client applications, with the sizes of their responses,
//! their rates, their numbers of connections, and the maximum costs relative to nginx.

use std::sync::Arc;

/// The first key of the pool. Each further key is this text with a suffix: `_1`, `_2` and so on.
pub const POOL_KEY: &str = "sk_bench_key_of_the_pool";
/// The first client token, which clients send in place of a key. Each further token is this text with a suffix: `_1`,
/// `_2` and so on.
pub const CLIENT_TOKEN: &str = "a-token-of-the-client-0123456789";
/// The size of a chunk of a paced stream.
pub const PACED_CHUNK_BYTES: u64 = 1024;
/// The interval between the chunks of a paced stream.
pub const PACED_INTERVAL_MS: u64 = 20;

/// The length of the body of a speech request.
pub const SPEECH_BODY_BYTES: usize = 200;
/// The length of the body of an upload.
pub const UPLOAD_BODY_BYTES: usize = 10 * 1024 * 1024;

/// A kind of request, with its response, that the benchmark measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// A GET for a small JSON document.
    Get,
    /// A short speech, sent as one response.
    Tts,
    /// A long speech, streamed as fast as possible.
    Stream,
    /// An upload of audio for transcription.
    Upload,
    /// A long speech, streamed in real time.
    Paced,
}

impl Workload {
    pub const ALL: [Self; 5] = [Self::Get, Self::Tts, Self::Stream, Self::Upload, Self::Paced];

    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Tts => "tts",
            Self::Stream => "stream",
            Self::Upload => "upload",
            Self::Paced => "paced",
        }
    }

    /// Returns the maximum ratio of Keychoir's processor time to nginx's processor time.
    pub fn max_cost_ratio(self) -> f64 {
        match self {
            Self::Get | Self::Tts => 1.0,
            Self::Stream | Self::Paced => 0.95,
            Self::Upload => 0.6,
        }
    }

    /// Returns the number of requests per second, which is well below the maximum of the slowest peer on one core. For
    /// paced streams, returns the number of concurrent streams.
    pub fn rate(self) -> u32 {
        match self {
            Self::Get => 3_000,
            Self::Tts => 2_000,
            Self::Stream => 100,
            Self::Upload => 12,
            Self::Paced => 64,
        }
    }

    /// Returns the number of connections over which the requests of [`Self::rate`] are distributed.
    pub fn connections(self) -> u32 {
        match self {
            Self::Get | Self::Tts => 48,
            Self::Stream | Self::Upload => 12,
            Self::Paced => 64,
        }
    }

    /// Returns the number of connections that saturate a proxy when its maximum rate is measured. Paced streams have no
    /// maximum rate and return `None`.
    pub fn saturating_connections(self) -> Option<u32> {
        match self {
            Self::Get | Self::Tts => Some(32),
            Self::Stream => Some(8),
            Self::Upload => Some(4),
            Self::Paced => None,
        }
    }

    /// Returns the length of the response body. The response to a paced request lasts for `seconds`.
    pub fn response_bytes(self, seconds: f64) -> u64 {
        match self {
            Self::Get => 300,
            Self::Tts => 16 * 1024,
            Self::Stream => 1024 * 1024,
            Self::Upload => 120,
            Self::Paced => (seconds * 1e3) as u64 / PACED_INTERVAL_MS * PACED_CHUNK_BYTES,
        }
    }

    /// Returns a complete request with the given `key`, as the provider's Python SDK sends it. The response to a paced
    /// request lasts for `seconds`.
    pub fn request(self, key: &str, seconds: f64) -> Arc<[u8]> {
        let voice_id = "21m00Tcm4TlvDq8ikWAM";
        let chunks = self.response_bytes(seconds) / PACED_CHUNK_BYTES;
        let (method_and_path, content_type, body) = match self {
            Self::Get => (format!("GET /v1/voices/{voice_id}/settings"), "", Vec::new()),
            Self::Tts => (
                format!("POST /v1/text-to-speech/{voice_id}?output_format=mp3_44100_128"),
                "application/json",
                speech_body(),
            ),
            Self::Stream => (
                format!("POST /v1/text-to-speech/{voice_id}/stream?output_format=mp3_44100_128"),
                "application/json",
                speech_body(),
            ),
            Self::Upload => {
                ("POST /v1/speech-to-text".to_owned(), "multipart/form-data; boundary=b0b0b0", upload_body())
            }
            Self::Paced => (
                format!("POST /v1/text-to-speech/{voice_id}/stream?chunks={chunks}"),
                "application/json",
                speech_body(),
            ),
        };
        let mut request = format!(
            "{method_and_path} HTTP/1.1\r\nhost: localhost\r\naccept: */*\r\naccept-encoding: gzip, deflate\r\n\
             connection: keep-alive\r\nuser-agent: python-httpx/0.28.1\r\nx-fern-language: Python\r\n\
             x-fern-sdk-name: elevenlabs\r\nx-fern-sdk-version: 2.20.0\r\nxi-api-key: {key}\r\n"
        );
        if !body.is_empty() {
            request.push_str(&format!("content-type: {content_type}\r\ncontent-length: {}\r\n", body.len()));
        }
        request.push_str("\r\n");
        let mut request = request.into_bytes();
        request.extend(body);
        request.into()
    }
}

/// Returns the body of a speech request: a JSON object that is padded with spaces to [`SPEECH_BODY_BYTES`].
fn speech_body() -> Vec<u8> {
    let json =
        r#"{"text":"The first move is what sets everything in motion.","model_id":"eleven_flash_v2_5""#;
    format!("{json}{}}}", " ".repeat(SPEECH_BODY_BYTES - 1 - json.len())).into_bytes()
}

/// Returns the body of an upload: a multipart form with an audio file.
fn upload_body() -> Vec<u8> {
    let mut form = b"--b0b0b0\r\ncontent-disposition: form-data; name=\"model_id\"\r\n\r\nscribe_v1\r\n\
        --b0b0b0\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.mp3\"\r\n\
        content-type: audio/mpeg\r\n\r\n"
        .to_vec();
    let closing_boundary = b"\r\n--b0b0b0--\r\n";
    form.resize(UPLOAD_BODY_BYTES - closing_boundary.len(), 0x55);
    form.extend(closing_boundary);
    form
}
