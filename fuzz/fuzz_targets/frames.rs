//! Whatever comes, a head is read without a panic, the same way however much of it has come, and what
//! is written is read as it was. A mask works in any pieces and is taken off as it is put on.

#![no_main]

use arbitrary::Arbitrary;
use keychoir::policy::frame::{HEAD_BYTES_MAX, Head, close_payload, mask, read, read_close};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Case {
    bytes: Vec<u8>,
    mask: [u8; 4],
    offset: u64,
    cut: u16,
    code: u16,
    reason: String,
}

fuzz_target!(|case: Case| {
    let Case { bytes, mask: masked, offset, cut, code, reason } = case;
    match read(&bytes) {
        Some((head, length)) => {
            assert!(length <= HEAD_BYTES_MAX.min(bytes.len()));
            for end in 0..length {
                assert_eq!(read(&bytes[..end]), None, "half a head is none");
            }
            assert_eq!(read(&bytes[..length]), Some((head, length)), "what follows does not matter");
            let mut written = Vec::new();
            head.write(&mut written);
            assert!(written.len() <= length, "the shortest form");
            assert_eq!(read(&written), Some((head, written.len())));
            let other = Head { mask: Some(masked), length: offset, ..head };
            written.clear();
            other.write(&mut written);
            assert_eq!(read(&written), Some((other, written.len())));
        }
        None => assert!(bytes.len() < HEAD_BYTES_MAX),
    }

    let mut pieces = bytes.clone();
    let (start, end) = pieces.split_at_mut(usize::from(cut).min(bytes.len()));
    let behind = offset.wrapping_add(start.len() as u64);
    mask(start, masked, offset);
    mask(end, masked, behind);
    let simple =
        bytes.iter().enumerate().map(|(at, byte)| byte ^ masked[(offset as usize).wrapping_add(at) % 4]);
    assert!(pieces.iter().copied().eq(simple));
    mask(&mut pieces, masked, offset);
    assert_eq!(pieces, bytes, "twice is not at all");

    let _ = read_close(&bytes);
    let payload = close_payload(code, &reason);
    assert!(payload.len() <= 125, "a control frame has no more");
    let (found, told) = read_close(&payload);
    assert!(found == code && reason.starts_with(&told));
});
