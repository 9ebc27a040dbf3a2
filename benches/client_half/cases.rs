//! Defines the measured cases: the heads of their requests and responses, the sizes and the framing of the bodies, and
//! the numbers of requests.

use std::fmt::Write as _;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use keychoir::upstream::UpstreamRequestHead;

/// The requests of a case and their responses.
pub struct RequestCase {
    pub name: &'static str,
    method: Method,
    /// The size of the request body.
    pub body_bytes: usize,
    /// The sizes of the chunks of one block, which is the part of a response body that is repeated. If it is empty, the
    /// response is small and has a `content-length`.
    chunks: &'static [usize],
    /// Number of blocks in the response when time is measured.
    pub blocks: usize,
    /// Number of blocks in the response when instructions are counted.
    pub counted_blocks: usize,
    /// The pause before each block, or `None` if the blocks are sent without pauses.
    pub pause: Option<Duration>,
    /// Number of requests per round when time is measured.
    pub requests: usize,
    /// Number of requests when instructions are counted.
    pub counted_requests: usize,
}

const SMALL_GET: RequestCase = RequestCase {
    name: "GET, 120 B",
    method: Method::GET,
    body_bytes: 0,
    chunks: &[],
    blocks: 1,
    counted_blocks: 1,
    pause: None,
    requests: 500,
    counted_requests: 200,
};

/// All cases, in the order of the tables.
pub const CASES: [RequestCase; 7] = [
    SMALL_GET,
    RequestCase {
        name: "speech: POST of 300 B, 60 KiB in 5 chunks",
        method: Method::POST,
        body_bytes: 300,
        chunks: &[8_192, 16_384, 12_000, 16_384, 8_480],
        requests: 300,
        counted_requests: 100,
        ..SMALL_GET
    },
    RequestCase {
        name: "stream: 64 MiB in chunks of 16 KiB",
        chunks: &[16_384; 8],
        blocks: 512,
        counted_blocks: 64,
        requests: 1,
        counted_requests: 2,
        ..SMALL_GET
    },
    RequestCase {
        name: "stream: 64 MiB in chunks of 8 KiB",
        chunks: &[8_192; 16],
        blocks: 512,
        counted_blocks: 64,
        requests: 1,
        counted_requests: 2,
        ..SMALL_GET
    },
    RequestCase {
        name: "stream: 64 MiB in chunks of 1 KiB",
        chunks: &[1_024; 128],
        blocks: 512,
        counted_blocks: 64,
        requests: 1,
        counted_requests: 2,
        ..SMALL_GET
    },
    RequestCase {
        name: "stream: 200 paced chunks of 1 KiB",
        chunks: &[1_024],
        blocks: 200,
        counted_blocks: 200,
        pause: Some(Duration::from_micros(50)),
        requests: 1,
        counted_requests: 5,
        ..SMALL_GET
    },
    RequestCase {
        name: "upload: POST of 16 MiB",
        method: Method::POST,
        body_bytes: 16 * 1024 * 1024,
        requests: 2,
        counted_requests: 5,
        ..SMALL_GET
    },
];

const SMALL_RESPONSE_BYTES: usize = 120;

impl RequestCase {
    /// Returns the response head, with the headers of the provider's responses.
    pub fn response_head(&self) -> String {
        let mut head =
            "HTTP/1.1 200 OK\r\ndate: Sun, 29 Nov 2026 12:00:00 GMT\r\nserver: uvicorn\r\n".to_owned();
        let framing = match self.chunks {
            [] => format!("content-length: {SMALL_RESPONSE_BYTES}\r\n"),
            _ => "transfer-encoding: chunked\r\n".to_owned(),
        };
        head.push_str(&framing);
        for (name, value) in [
            ("content-type", "audio/mpeg"),
            ("request-id", "V1StGXR8Z5jdHi6BmyTt"),
            ("history-item-id", "ja9xsmfGhxYcymxGcOGB"),
            ("character-cost", "120"),
            ("current-concurrent-requests", "3"),
            ("maximum-concurrent-requests", "10"),
            ("x-trace-id", "7d1f0c5a1b9e4d2c8f3a6b5c4d3e2f1a"),
            ("strict-transport-security", "max-age=31536000; includeSubDomains"),
            ("via", "1.1 google, 1.1 google"),
        ] {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        head + "\r\n"
    }

    /// Returns one block of the response body.
    pub fn response_block(&self) -> Vec<u8> {
        let mut block = match self.chunks {
            [] => vec![b'x'; SMALL_RESPONSE_BYTES],
            _ => Vec::new(),
        };
        for bytes in self.chunks {
            block.extend_from_slice(format!("{bytes:x}\r\n").as_bytes());
            block.resize(block.len() + bytes, b'x');
            block.extend_from_slice(b"\r\n");
        }
        block
    }

    pub fn is_chunked(&self) -> bool {
        !self.chunks.is_empty()
    }

    /// Returns the bytes that end the response body.
    pub fn response_end(&self) -> &'static [u8] {
        if self.is_chunked() { b"0\r\n\r\n" } else { b"" }
    }

    /// Returns the number of body bytes in `blocks` blocks.
    pub fn response_bytes(&self, blocks: usize) -> usize {
        let block_bytes =
            if self.chunks.is_empty() { SMALL_RESPONSE_BYTES } else { self.chunks.iter().sum() };
        block_bytes * blocks
    }

    /// Returns a request head as Keychoir sends it. The path contains the index of the case in [`CASES`], by which
    /// the provider selects the response.
    pub fn request_head(&self, index: usize) -> UpstreamRequestHead {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("accept", "*/*"),
            ("accept-encoding", "gzip, deflate"),
            ("user-agent", "python-httpx/0.28.1"),
            ("content-type", "application/json"),
            ("x-fern-language", "Python"),
            ("x-fern-sdk-name", "elevenlabs"),
            ("x-fern-sdk-version", "2.24.0"),
            ("x-request-id", "0198c2f0-7b1a-7000-8000-000100000002"),
        ] {
            headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        if self.body_bytes > 0 {
            headers.insert(http::header::CONTENT_LENGTH, self.body_bytes.into());
        }
        UpstreamRequestHead {
            method: self.method.clone(),
            target: format!("/{index}").parse().unwrap(),
            headers,
        }
    }
}
