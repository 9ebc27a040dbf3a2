//! Classifies an arbitrary response. The classification must not panic, and the verdict must be `Served` exactly for
//! statuses below 400.

#![no_main]

use std::time::Duration;

use http::StatusCode;
use keychoir::body::decode::decode_body;
use keychoir::elevenlabs::refusal::{ErrorBody, classify};
use keychoir::policy::verdict::Verdict;
use libfuzzer_sys::fuzz_target;

const MAX_DECODED_BYTES: usize = 64 * 1024;

fuzz_target!(|input: (u16, Option<u32>, u8, Vec<u8>)| {
    let (status, retry_after, encoding, body) = input;
    let Ok(status) = StatusCode::from_u16(100 + status % 500) else { return };
    let encoding = [None, Some("gzip"), Some("deflate"), Some("br")][usize::from(encoding % 4)];
    let decoded_body = decode_body(&body, encoding, MAX_DECODED_BYTES);
    assert!(decoded_body.as_ref().is_none_or(|decoded_body| decoded_body.len() <= MAX_DECODED_BYTES));
    let error = decoded_body.as_deref().map(ErrorBody::parse);
    let verdict =
        classify(status, error.as_ref(), retry_after.map(|seconds| Duration::from_secs(seconds.into())));
    assert_eq!(verdict == Verdict::Served, !status.is_client_error() && !status.is_server_error());
});
