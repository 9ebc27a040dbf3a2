//! Allocations of the pure parts of a request's path, with a maximum for each.

#[path = "../benches/parts/mod.rs"]
mod parts;

mod counting;

use counting::of_one_call;
use parts::PARTS;

/// Maximum allocations of a call, part by part.
const MAXIMA: &[(&str, u64)] = &[
    ("origin", 0),
    ("identify, one of 10 clients", 0),
    ("identify, one of 10000 clients", 0),
    ("look up, GET", 0),
    ("look up, TTS", 1),
    ("look up, any", 2),
    ("names, GET", 0),
    ("names, TTS", 1),
    ("names, any", 2),
    ("account, TTS", 0),
    ("strip, GET", 0),
    ("strip, TTS", 0),
    ("estimate, TTS", 1),
    ("owner, 1000 keys", 0),
    ("choose, 1 key", 0),
    ("choose, 100 keys", 0),
    ("choose, 1000 keys", 0),
    ("choose, 1000 keys of one workspace", 0),
    ("choose, 1000 keys, only the last can pay", 0),
    ("choose, 1000 keys, round-robin", 0),
    ("choose, 1000 keys, most-remaining", 0),
    ("choose, 1000 keys, least-requests", 0),
    ("choose, 1000 keys, soonest-reset", 0),
    ("classify, served", 0),
    ("classify, refused", 12),
    ("strip answer", 0),
    ("tee up, 16 KiB", 3),
    ("tee down, 16 KiB of sound", 0),
    ("tee down, 16 KiB of text", 0),
    ("tee down, 16 KiB of text, 1000 keys", 0),
    ("way, GET", 0),
    ("way, TTS", 2),
];

#[test]
fn no_part_allocates_more_than_it_needs() {
    let mut complaints = Vec::new();
    for part in PARTS {
        let seen = of_one_call((part.set_up)());
        let max = MAXIMA.iter().find(|(name, _)| *name == part.name).map(|(_, max)| *max);
        if max.is_none_or(|max| seen.count > max) {
            let (name, count, bytes) = (part.name, seen.count, seen.bytes);
            complaints.push(format!("{name}: {count} ({bytes} bytes), at most {max:?}"));
        }
    }
    assert!(complaints.is_empty(), "allocations a call:\n{}", complaints.join("\n"));
}
