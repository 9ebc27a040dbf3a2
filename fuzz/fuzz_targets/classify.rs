//! Fuzzes the decompression of response bodies and the classification of responses. Neither may panic. A decoded body
//! must not exceed its limit, and the verdict must be `Served` exactly for statuses that are neither client errors nor
//! server errors.

#![no_main]

use std::time::Duration;

use arbitrary::Arbitrary;
use http::StatusCode;
use keychoir::body::decode::decode_body;
use keychoir::elevenlabs::refusal::{ErrorBody, classify};
use keychoir::policy::verdict::Verdict;
use libfuzzer_sys::fuzz_target;

const MAX_DECODED_BYTES: usize = 64 * 1024;

/// A response of the provider.
#[derive(Arbitrary, Debug)]
struct ResponseCase {
    status: u16,
    /// The seconds in `retry-after`.
    retry_after: Option<u32>,
    /// Selects one of the content encodings.
    encoding: u8,
    body: Vec<u8>,
}

fuzz_target!(|case: ResponseCase| {
    let ResponseCase { status, retry_after, encoding, body } = case;
    let Ok(status) = StatusCode::from_u16(100 + status % 500) else { return };
    let encoding = [None, Some("gzip"), Some("deflate"), Some("br")][usize::from(encoding % 4)];
    let decoded_body = decode_body(&body, encoding, MAX_DECODED_BYTES);
    assert!(
        decoded_body.as_ref().is_none_or(|decoded_body| decoded_body.len() <= MAX_DECODED_BYTES),
        "the decoded body must not exceed its limit"
    );
    let error = decoded_body.as_deref().map(ErrorBody::parse);
    let verdict =
        classify(status, error.as_ref(), retry_after.map(|seconds| Duration::from_secs(seconds.into())));
    assert_eq!(
        verdict == Verdict::Served,
        !status.is_client_error() && !status.is_server_error(),
        "only a status that is not an error may have the verdict `Served`"
    );
});
